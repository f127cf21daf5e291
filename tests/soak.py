"""Kill a training run with SIGKILL at random moments, resume it each time, and compare it with an undisturbed run.

    make soak              (or: python tests/soak.py --kills 50 --seed 0)

The model is a tiny random one that is made here: nothing is downloaded. The run scores a set before training, after each
epoch and at the end, and saves a checkpoint every few steps. A kill waits for a randomly chosen stage of the run (start-up,
training steps, a half-written checkpoint, an evaluation) and then a random moment longer; where a run ends before all kills
are spent, the next run begins. The last line is `soak: N kills, M resumes, K mismatches`; the exit code is 1 unless K is 0.

These must be equal, byte for byte: the trained values, metrics.jsonl (and so the data of every step), the scores, all
predictions, and results.json except for times. After every kill, metrics.jsonl must consist of complete lines in order.
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

import helpers

from neuroada_jax import console

STEPS_OF_EPOCH, EPOCHS, BATCH_SIZE, SAVE_EVERY, LOG_EVERY = 30, 4, 4, 7, 3
STEPS = STEPS_OF_EPOCH * EPOCHS
COMPARED = (
    "adapter/adapter.safetensors",
    "metrics.jsonl",
    "epochs.jsonl",
    "predictions-some-before.jsonl",
    "predictions-some-after.jsonl",
)
TIMES = ("directory", "train_seconds", "tokens_per_second")
DEADLINE = 600.0  # seconds within which a stage must come and a run must end


class Run:
    """A training process and the files of its run."""

    def __init__(self, config: Path, *options: str) -> None:
        self.out = _output(config)
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
        command = [sys.executable, "-m", "neuroada_jax.cli", "train", str(config), "--json", *options]
        self._errors = config.with_suffix(".stderr")
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        self.began = time.monotonic()

    def lines(self) -> int:
        """Return the number of complete lines of metrics.jsonl."""
        path = self.out / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def saving(self) -> bool:
        """Return whether a checkpoint is half written."""
        return any((self.out / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    def wait_for(self, stage: Callable[[], bool]) -> None:
        """Wait until the stage has come or the process has ended."""
        while self.process.poll() is None and not stage():
            if time.monotonic() - self.began > DEADLINE:
                raise SystemExit(f"soak: {self.out}: no progress in {DEADLINE:.0f} s")
            time.sleep(0.001)

    def kill_at(self, stage: str, rng: random.Random) -> bool:
        """Kill the process at a stage; return False where it had ended before."""
        _STAGES[stage](self, rng)
        if self.process.poll() is not None:
            return False
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        return True

    def error(self) -> str | None:
        """Wait for the end; return the last line of standard error where the process failed."""
        if self.process.wait(DEADLINE) == 0:
            return None
        return self._errors.read_text(errors="replace").strip().splitlines()[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak; a line for every kill goes to standard error, the result to standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the stages and moments (default: 0)")
    parser.add_argument("--stages", nargs="+", choices=sorted(_STAGES), default=sorted(_STAGES))
    settings = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="neuroada-soak-") as folder:
        return soak(Path(folder), settings.kills, settings.stages, random.Random(settings.seed))


def soak(folder: Path, kills: int, stages: Sequence[str], rng: random.Random) -> int:
    """Train in `folder` with kills at the given stages; return the exit code."""
    helpers.write_model(folder / "model")
    helpers.write_rows(folder / "rows.jsonl", BATCH_SIZE * STEPS_OF_EPOCH)
    undisturbed = write_config(folder, "undisturbed")
    if error := Run(undisturbed).error():
        raise SystemExit(f"soak: the undisturbed run fails: {error}")
    killed: Counter[str] = Counter()
    resumes, mismatches, rounds = 0, 0, 0
    while killed.total() < kills:
        rounds += 1
        config = write_config(folder, f"run-{rounds}")
        run = Run(config)
        while killed.total() < kills and run.kill_at(stage := rng.choice(stages), rng):
            killed[stage] += 1
            reason = broken_lines(run.out)
            mismatches += reason is not None
            after = f"after {run.lines()} of {STEPS} steps"
            console.say(f"kill {killed.total()} of {kills}: {stage}, {after}{f'; {reason}' if reason else ''}")
            resumed = (run.out / "config.yaml").exists()
            resumes += resumed
            run = Run(config, *["--resume"] * resumed)
        if error := run.error():
            console.say(f"the process ended with: {error}")
            mismatches += 1
            continue
        differing = compare(_output(undisturbed), run.out)
        mismatches += len(differing)
        verdict = f"and differs in {differing}" if differing else "equal to the undisturbed one"
        console.say(f"run {rounds} ends, {verdict}")
    console.say("kills by stage: " + ", ".join(f"{stage} {killed[stage]}" for stage in sorted(killed)))
    print(f"soak: {killed.total()} kills, {resumes} resumes, {mismatches} mismatches")
    return int(mismatches > 0)


def _at_start(run: Run, rng: random.Random) -> None:
    time.sleep(rng.uniform(0, 4))


def _at_steps(run: Run, rng: random.Random) -> None:
    before, more = run.lines(), rng.randrange(1, STEPS // 2)
    run.wait_for(lambda: run.lines() != before and run.lines() >= min(more, STEPS - LOG_EVERY))
    time.sleep(rng.uniform(0, 0.02))


def _at_a_save(run: Run, rng: random.Random) -> None:
    for _ in range(rng.randrange(1, 5)):
        run.wait_for(lambda: not run.saving())
        run.wait_for(run.saving)
    time.sleep(rng.uniform(0, 0.05))


def _at_an_evaluation(run: Run, rng: random.Random) -> None:
    if rng.random() < 0.3:  # the one before training, where it is still to come
        run.wait_for((run.out / "config.yaml").exists)
    else:
        ends = [STEPS_OF_EPOCH * epoch for epoch in range(1, EPOCHS + 1)]
        run.wait_for(lambda: (run.out / "checkpoints").exists() and run.lines() in ends)
    time.sleep(rng.uniform(0, 0.5))


_STAGES = {"start": _at_start, "steps": _at_steps, "save": _at_a_save, "evaluation": _at_an_evaluation}


def broken_lines(out: Path) -> str | None:
    """Return what is wrong with the metrics.jsonl of a killed process, if anything."""
    path = out / "metrics.jsonl"
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        return "metrics.jsonl has half a line"
    steps = [json.loads(line)["step"] for line in content.splitlines()]
    return None if steps == list(range(1, len(steps) + 1)) else "metrics.jsonl repeats or lacks a step"


def compare(undisturbed: Path, out: Path) -> list[str]:
    """Return the files that differ between two runs and should not."""
    differing = [name for name in COMPARED if (undisturbed / name).read_bytes() != (out / name).read_bytes()]
    a, b = (json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in (undisturbed, out))
    for results in (a, b):
        for field in TIMES:
            del results[field]
    return differing + ["results.json"] * (a != b)


def _output(config: Path) -> Path:
    return config.with_suffix("")


def write_config(folder: Path, name: str) -> Path:
    """Write the config of a run whose output is `folder`/`name`."""
    rows = folder / "rows.jsonl"
    content = helpers.run_config(
        folder,
        folder / "model",
        rows,
        output=str(folder / name),
        data={"max_length": 32, "buckets": [32]},
        bypass={"k": 2, "targets": ["q_proj", "down_proj"]},
        optimizer={"warmup_ratio": 0.1},
        training={
            "steps": None,
            "epochs": EPOCHS,
            "batch_size": BATCH_SIZE,
            "log_every": LOG_EVERY,
            "save_every": SAVE_EVERY,
            "keep_best": 1,
        },
        evaluation={
            "sets": [{"name": "some", "data": str(rows), "limit": 8, "max_new_tokens": 2}],
            "best_epoch": "some",
        },
    )
    return helpers.write_config(folder / f"{name}.yaml", content)


if __name__ == "__main__":
    sys.exit(main())
