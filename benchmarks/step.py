"""One complete training step: this library and PyTorch on the same weights and tokens, and the frozen floor of both.

    make bench-step        (or: python -m benchmarks.step --batch 4 --length 256 --k 1 20 --repeats 5 --warmups 2)

All methods run in one process and take turns. They train on the same batch of real commonsense tokens, rows end to end,
under two settings: every position labelled, and the answers alone, as in a real run. The peak memory above the loaded
model is measured in a fresh process for each method: until the first step ends, compilation included, and during the
second step. The benchmark takes about fifteen minutes on two idle cores; --no-memory and --methods make it shorter.

On a GPU, whose memory would not hold all methods at once, the fresh process is timed as well. `--model llama-7b` (or
another name in methods.py) takes random weights, and --dtype bfloat16 is usual there. The peak is that of all arrays,
from the first weight to the last step, as the framework's allocator counts them; the "total" includes the weights:

    python -m benchmarks.step --model llama-7b --dtype bfloat16 --batch 4 --length 512
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from benchmarks import common, jax_methods, process_memory
from benchmarks.common import Column, Row
from benchmarks.methods import (
    FLOOR,
    MODELS,
    PEFT_LORA,
    RELEASED,
    Method,
    Running,
    Tokens,
    label_of,
    random_tokens,
    real_tokens,
)
from neuroada_jax import console
from neuroada_jax.errors import UserError
from neuroada_jax.models import Remat
from neuroada_jax.pretrained.load import open_with_tokenizer

DATA = "data/train/commonsense_15k.jsonl.gz"
EVERY, ANSWERS = "every", "answers"  # the labelled positions
REFERENCES = {"ratio_to_released": RELEASED, "ratio_to_lora": PEFT_LORA}
COLUMNS = (
    Column("method", "method"),
    Column("library", "framework"),
    Column("k", "k"),
    Column("labels", "labels"),
    Column("trained", "trained", "{:,}".format),
    common.SECONDS,
    Column("tokens/s", "tokens_per_second", "{:.0f}".format),
    common.RATIO,
    Column("/released", "ratio_to_released", "{:.2f}".format),
    Column("/LoRA", "ratio_to_lora", "{:.2f}".format),
    common.PEAK,
    Column("total", "total_bytes", common.PEAK.write),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and save benchmarks/results/step.json."""
    parser = common.parser(__doc__, repeats=3)
    parser.add_argument("--model", default=common.MODEL, help=f"a checkpoint, or {', '.join(MODELS)}")
    parser.add_argument("--data", default=DATA, help="commonsense rows")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 20])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--remat", nargs="+", default=["none", "full"], choices=[remat.value for remat in Remat])
    parser.add_argument("--warmups", type=int, default=1, help="turns before the measured ones")
    parser.add_argument("--methods", nargs="+", default=[""], help="only methods with one of these texts in their name")
    parser.add_argument("--no-memory", action="store_true", help="skip the fresh processes that measure peak memory")
    parser.add_argument("--peak-of", nargs=2, metavar=("METHOD", "LABELS"), help=argparse.SUPPRESS)
    settings = parser.parse_args(arguments)

    # Neither thread pool may spin while the other framework works; must be set before PyTorch is loaded.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    # On a GPU, JAX would reserve three quarters of the memory; must be set before its first array.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    frameworks: dict[str, ModuleType] = {"JAX": jax_methods}
    if not common.missing("torch", "peft"):
        from benchmarks import torch_methods

        frameworks["PyTorch"] = torch_methods
    batches = _batches(settings)
    methods = _methods(frameworks, settings)
    if settings.peak_of:
        label, labels = settings.peak_of
        method = next(each for each in methods if each.label == label)
        print(json.dumps(_alone(method, frameworks[method.framework], batches[labels], settings)))
        return

    on_gpu = jax.default_backend() == "gpu"
    rows = _time_alone(methods, batches, settings) if on_gpu else _time(methods, frameworks, batches, settings)
    about = argparse.Namespace(**{**vars(settings), "data": Path(settings.data).name, "labels": list(batches)})
    common.save("step", rows, about)  # in case the rest is interrupted
    if process_memory.available() and not settings.no_memory and not on_gpu:
        _add_peaks(rows, settings)
    title = f"one training step, {settings.batch} x {settings.length} tokens, {settings.dtype}"
    common.report("step", title, COLUMNS, rows, about)


def _batches(settings: argparse.Namespace) -> dict[str, Tokens]:
    """Return the tokens under each label setting."""
    if settings.model in MODELS:
        return {EVERY: random_tokens(settings.batch, settings.length, MODELS[settings.model]["vocab_size"])}
    opened, tokenizer = open_with_tokenizer(settings.model, settings.dtype)
    try:
        every, answers = real_tokens(settings.data, tokenizer, settings.batch, settings.length)
    except UserError as error:
        console.say(f"{error}: random tokens instead, every position labelled")
        return {EVERY: random_tokens(settings.batch, settings.length, opened.model.config.vocab_size)}
    return {EVERY: every, ANSWERS: answers}


def _methods(frameworks: Mapping[str, ModuleType], settings: argparse.Namespace) -> list[Method]:
    remats = [Remat(remat) for remat in settings.remat]
    found = [method for framework in frameworks.values() for method in framework.methods(settings.k, remats)]
    is_floor = lambda method: method.name == FLOOR  # noqa: E731
    return [each for each in found if is_floor(each) or any(text in each.label for text in settings.methods)]


def _time(
    methods: Sequence[Method],
    frameworks: Mapping[str, ModuleType],
    batches: Mapping[str, Tokens],
    settings: argparse.Namespace,
) -> list[Row]:
    """Return the rows without memory, by setting and method."""
    console.say("loading the model")
    loaded = {name: framework.load(settings.model, settings.dtype) for name, framework in frameworks.items()}
    running: dict[Method, Running] = {}
    for method in methods:
        own = frameworks[method.framework].own if method.owns_weights else lambda weights: weights
        running[method] = method.build(own(loaded[method.framework]))
    rows = []
    for labels, tokens in batches.items():
        losses: dict[Method, float] = {}

        def run(method: Method, tokens: Tokens = tokens, losses: dict[Method, float] = losses) -> None:
            loss = running[method].step(tokens)
            losses.setdefault(method, loss)

        chosen = [method for method in methods if labels == EVERY or method.core]
        times = common.alternate(
            {method: lambda method=method: run(method) for method in chosen},
            settings.repeats,
            warmups=settings.warmups,
            title=labels,
        )
        times = {method: [each / running[method].runs for each in seconds] for method, seconds in times.items()}
        for method in chosen:
            row = _row(method, times, tokens)
            rows.append(
                row
                | {"labels": labels, "dtype": settings.dtype, "first_loss": losses[method]}
                | {"trained": running[method].trained}
            )
    return rows


def _time_alone(methods: Sequence[Method], batches: Mapping[str, Tokens], settings: argparse.Namespace) -> list[Row]:
    """Return the rows with memory, each from a fresh process; a method that fails (out of memory, say) has no figures."""
    rows = []
    for labels, tokens in batches.items():
        chosen = [method for method in methods if labels == EVERY or method.core]
        found = {}
        with console.bar(labels, len(chosen)) as shown:
            for done, method in enumerate(chosen):
                shown.update(done, len(chosen), method.label)
                measured = found[method] = _in_fresh_process(method.label, labels, settings, settings.repeats) or {}
                if measured:
                    seconds, total = statistics.median(measured["seconds"]), console.size(measured["total_bytes"])
                    console.say(f"{method.label}: {seconds:.4g} s, {total}")
            shown.update(len(chosen), len(chosen))
        times = {method: measured["seconds"] for method, measured in found.items() if measured}
        for method, measured in found.items():
            rows.append(_row(method, times, tokens) | {"labels": labels, "dtype": settings.dtype} | measured)
            if measured:
                rows[-1]["seconds"] = statistics.median(measured["seconds"])
    return rows


def _row(method: Method, times: Mapping[Method, list[float]], tokens: Tokens) -> Row:
    """Return time and ratios: to the floor of the same framework, and to the PyTorch references at the same k."""
    seconds = times.get(method, [])
    median = statistics.median(seconds) if seconds else None

    def ratio(framework: str, name: str, k: int | None) -> float | None:
        found = [other for other in times if (other.framework, other.name, other.k) == (framework, name, k)]
        return common.ratio(seconds, times[found[0]]) if seconds and found else None

    return {
        "method": method.name,
        "framework": method.framework,
        "k": method.k,
        "shape": list(tokens.ids.shape),
        "labelled": int(tokens.labelled.sum()),
        "seconds": median,
        "tokens_per_second": median and tokens.ids.size / median,
        "ratio_to_floor": ratio(method.framework, FLOOR, None),
        **{field: ratio("PyTorch", name, method.k) for field, name in REFERENCES.items()},
        "peak_bytes": None,
        "peak_bytes_with_compilation": None,
        "total_bytes": None,
    }


def _add_peaks(rows: Sequence[Row], settings: argparse.Namespace) -> None:
    """Set the memory of every row, measured in a fresh process of this script."""
    # PyTorch's models compute all logits in both settings: one measurement is enough for them.
    rows = [row for row in rows if row["labels"] == EVERY or row["framework"] == "JAX"]
    with console.bar("peak memory", len(rows)) as shown:
        for done, row in enumerate(rows):
            label = label_of(row["framework"], row["method"], row["k"])
            shown.update(done, len(rows), label)
            if measured := _in_fresh_process(label, row["labels"], settings, repeats=0):
                row.update({field: measured[field] for field in ("peak_bytes", "peak_bytes_with_compilation")})
        shown.update(len(rows), len(rows))


def _in_fresh_process(label: str, labels: str, settings: argparse.Namespace, repeats: int) -> dict[str, Any] | None:
    """Return the result of `_alone` in a fresh process; if it fails, print the reason and return None."""
    command = [
        *(sys.executable, "-m", "benchmarks.step", "--peak-of", label, labels),
        *("--model", settings.model, "--data", settings.data, "--dtype", settings.dtype),
        *("--batch", str(settings.batch), "--length", str(settings.length), "--repeats", str(repeats)),
        *("--k", *map(str, settings.k), "--remat", *settings.remat, "--warmups", str(settings.warmups)),
    ]
    environment = {**os.environ, **process_memory.ALLOCATOR}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        console.say(f"{label}: not measured ({(result.stderr.strip() or 'killed').splitlines()[-1]})")
        return None
    return dict(json.loads(result.stdout.splitlines()[-1]))


def _alone(method: Method, framework: ModuleType, tokens: Tokens, settings: argparse.Namespace) -> dict[str, Any]:
    """Return the times of steps and the peak memory above the loaded model.

    On a CPU, `peak_bytes_with_compilation` is the peak until the first step ends and `peak_bytes` that of the second
    step. On a GPU both are of the complete process, and `total_bytes` includes the weights.
    """
    on_gpu = jax.default_backend() == "gpu"
    loaded = framework.load(settings.model, settings.dtype)
    before = framework.gpu_memory()[0] if on_gpu else process_memory.resident()
    process_memory.mark()
    running = method.build(loaded)
    first_loss = running.step(tokens)
    with_compilation = process_memory.peak() - before
    process_memory.mark()
    running.step(tokens)
    peak, total = process_memory.peak() - before, None
    seconds = []
    for turn in range(settings.repeats and settings.warmups + settings.repeats):
        began = time.perf_counter()
        running.step(tokens)
        seconds += [(time.perf_counter() - began) / running.runs] if turn >= settings.warmups else []
    if on_gpu:
        total = framework.gpu_memory()[1]
        peak = with_compilation = total - before
    return {
        "seconds": seconds,
        "first_loss": first_loss,
        "trained": running.trained,
        "peak_bytes": peak,
        "peak_bytes_with_compilation": with_compilation,
        "total_bytes": total,
    }


if __name__ == "__main__":
    main()
