"""Kills a training run again and again with SIGKILL, resumes it each time, and compares the end with a run left alone.

    make soak              (or: python -m benchmarks.soak --kills 50 --seed 0)

The model is a tiny random one that is made here, so that nothing is downloaded; the run scores a set before, after each of
its epochs and at the end, and saves every few steps. A kill waits for a stage of the run that is drawn at random (the start
of the process, its steps, a checkpoint half written, an evaluation), and then for a moment more. When a run ends before all
kills are spent, the next one begins. It ends with one line, `soak: N kills, M resumes, K mismatches`, and with an error
unless K is 0. What must be equal, byte for byte: the trained values, metrics.jsonl and so the data of every step, the
scores, all predictions, and results.json but for times. After every kill, metrics.jsonl must be whole lines in order.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from neuroada_jax import console
from neuroada_jax.core import trees
from neuroada_jax.models import from_hf_config, names

STEPS_OF_EPOCH, EPOCHS, SAVE_EVERY, LOG_EVERY = 30, 4, 7, 3
STEPS = STEPS_OF_EPOCH * EPOCHS
COMPARED = (
    "adapter/adapter.safetensors",
    "metrics.jsonl",
    "epochs.jsonl",
    "predictions-some-before.jsonl",
    "predictions-some-after.jsonl",
)
TIMES = ("directory", "train_seconds", "tokens_per_second")
DEADLINE = 600.0  # seconds for a stage to come, or a run to end; then it hangs


class Run:
    """A training process on a config, and the files of its run."""

    def __init__(self, config: Path, *options: str) -> None:
        self.out = _output(config)
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
        command = [sys.executable, "-m", "neuroada_jax.cli", "train", str(config), "--json", *options]
        self._errors = config.with_suffix(".stderr")
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        self.began = time.monotonic()

    def lines(self) -> int:
        """Of metrics.jsonl."""
        path = self.out / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def saving(self) -> bool:
        """Whether a checkpoint is half written."""
        return any((self.out / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    def wait_for(self, stage: Callable[[], bool]) -> None:
        """Until the stage has come, or the process has ended."""
        while self.process.poll() is None and not stage():
            if time.monotonic() - self.began > DEADLINE:
                raise SystemExit(f"soak: {self.out}: no progress in {DEADLINE:.0f} s")
            time.sleep(0.001)

    def kill(self) -> None:
        """SIGKILL, which a process neither hears nor can put off."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def complaint(self) -> str | None:
        """What a process that ended by itself had against it."""
        if self.process.wait(DEADLINE) == 0:
            return None
        return self._errors.read_text(errors="replace").strip().splitlines()[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Soaks, prints a line for every kill on standard error and the last one on standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the stages and moments (default: 0)")
    parser.add_argument("--stages", nargs="+", choices=sorted(_STAGES), default=sorted(_STAGES))
    settings = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="neuroada-soak-") as folder:
        return soak(Path(folder), settings.kills, settings.stages, random.Random(settings.seed))


def soak(folder: Path, kills: int, stages: Sequence[str], draw: random.Random) -> int:
    """See the module; returns the exit code."""
    make_inputs(folder)
    whole = write_config(folder, "whole")
    if complaint := Run(whole).complaint():
        raise SystemExit(f"soak: the run that is left alone fails: {complaint}")
    done: Counter[str] = Counter()
    resumes, mismatches, rounds = 0, 0, 0
    while sum(done.values()) < kills:
        rounds += 1
        config = write_config(folder, f"run-{rounds}")
        out = _output(config)
        while True:
            resumed = (out / "config.yaml").exists()
            resumes += resumed
            run = Run(config, *(["--resume"] if resumed else []))
            if sum(done.values()) < kills:
                stage = draw.choice(stages)
                _STAGES[stage](run, draw)
                if run.process.poll() is None:
                    run.kill()
                    done[stage] += 1
                    reason = _broken_lines(out)
                    mismatches += reason is not None
                    after = f"after {run.lines()} of {STEPS} steps"
                    console.say(f"kill {sum(done.values())} of {kills}: {stage}, {after}{f'; {reason}' if reason else ''}")
                    continue
            if complaint := run.complaint():
                console.say(f"the process ended with: {complaint}")
                mismatches += 1
                break
            differing = compare(_output(whole), out)
            mismatches += len(differing)
            console.say(
                f"run {rounds} ends, {f'and differs in {differing}' if differing else 'equal to the one left alone'}"
            )
            break
    console.say("kills by stage: " + ", ".join(f"{stage} {done[stage]}" for stage in sorted(done)))
    print(f"soak: {sum(done.values())} kills, {resumes} resumes, {mismatches} mismatches")
    return int(mismatches > 0)


def _at_start(run: Run, draw: random.Random) -> None:
    time.sleep(draw.uniform(0, 4))


def _at_steps(run: Run, draw: random.Random) -> None:
    before, more = run.lines(), draw.randrange(1, STEPS // 2)
    run.wait_for(lambda: run.lines() != before and run.lines() >= min(more, STEPS - LOG_EVERY))
    time.sleep(draw.uniform(0, 0.02))


def _at_a_save(run: Run, draw: random.Random) -> None:
    for _ in range(draw.randrange(1, 5)):
        run.wait_for(lambda: not run.saving())
        run.wait_for(run.saving)
    time.sleep(draw.uniform(0, 0.05))


def _at_an_evaluation(run: Run, draw: random.Random) -> None:
    if draw.random() < 0.3:  # that before training, where it is still to come
        run.wait_for((run.out / "config.yaml").exists)
    else:
        ends = [STEPS_OF_EPOCH * epoch for epoch in range(1, EPOCHS + 1)]
        run.wait_for(lambda: (run.out / "checkpoints").exists() and run.lines() in ends)
    time.sleep(draw.uniform(0, 0.5))


_STAGES = {"start": _at_start, "steps": _at_steps, "save": _at_a_save, "evaluation": _at_an_evaluation}


def _broken_lines(out: Path) -> str | None:
    """What is wrong with the metrics.jsonl that a killed process left."""
    path = out / "metrics.jsonl"
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        return "metrics.jsonl has half a line"
    steps = [json.loads(line)["step"] for line in content.splitlines()]
    return None if steps == list(range(1, len(steps) + 1)) else "metrics.jsonl repeats or lacks a step"


def compare(whole: Path, out: Path) -> list[str]:
    """The files of two runs that should be equal and are not."""
    differing = [name for name in COMPARED if (whole / name).read_bytes() != (out / name).read_bytes()]
    a, b = (json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in (whole, out))
    for results in (a, b):
        for field in TIMES:
            del results[field]
    return differing + ["results.json"] * (a != b)


def _output(config: Path) -> Path:
    return config.with_suffix("")


def write_config(folder: Path, name: str) -> Path:
    """The config of a run in `folder`/`name`."""
    rows = str(folder / "rows.jsonl")
    content: dict[str, Any] = {
        "name": "soak",
        "output": str(folder / name),
        "model": {"path": str(folder / "model")},
        "data": {"train": rows, "max_length": 32, "buckets": [32]},
        "bypass": {"k": 2, "targets": ["q_proj", "down_proj"]},
        "optimizer": {"learning_rate": 0.02, "warmup_ratio": 0.1},
        "training": {
            "epochs": EPOCHS,
            "batch_size": 4,
            "remat": "none",
            "log_every": LOG_EVERY,
            "save_every": SAVE_EVERY,
            "keep_best": 1,
        },
        "evaluation": {
            "sets": [{"name": "some", "data": rows, "limit": 8, "max_new_tokens": 2}],
            "best_epoch": "some",
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def make_inputs(folder: Path) -> None:
    """A random LLaMA of two layers with a tokenizer of bytes, and rows to learn."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "dtype": "float32",
    }
    model = from_hf_config(config)
    params = model.abstract_params()
    shapes = {path: leaf.shape for path, leaf in trees.flatten(params)}
    random_numbers = np.random.default_rng(0)
    tensors = {}
    for name, slot in names.checkpoint_names(params, model.layers_path).items():
        shape = shapes[slot.path] if slot.layer is None else shapes[slot.path][1:]
        tensors[name] = 0.3 * random_numbers.standard_normal(shape, np.float32) + ("norm" in name)
    (folder / "model").mkdir()
    safetensors.numpy.save_file(tensors, str(folder / "model" / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer.save_pretrained(str(folder / "model"))
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = [
        {"prompt": f"{'so ' * (number % 4)}after {letters[number % 25]},", "completion": letters[number % 25 + 1]}
        for number in range(4 * STEPS_OF_EPOCH)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
