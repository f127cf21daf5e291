"""The targets of this library on a GPU, measured on the one of this machine: `benchmarks/gpu.sh`, in about six minutes.

    gradient    algorithms for the gradient of the values: error against float64 sums, equal bits of two runs, time alone
    step        LLaMA-7B, bfloat16, 4 x 512, no remat: the frozen floor, k = 1, LoRA with the budget of k = 20, and
                k = 20 by each GPU kernel
    decoding    greedy, prompts of 128 tokens, 128 new ones, at batch 1 and 8, as a share of the bandwidth limit: all
                weights read once for each token
    memory      16 x 512, k = 1, full remat: the most that JAX's allocator held
    dense       the step at k = 20 by dense products

Each part is a process of its own and reports row by row, so that a failure or the end of `--seconds` costs only what
comes after it. A target is that of an H100; on another device none is met or missed. `--tiny` runs everything in this
process with a tiny model, on any device: a test of the script.
"""

import argparse
import functools
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common, jax_methods
from benchmarks.common import Column, Row
from benchmarks.methods import FLOOR, LLAMA_7B, MODELS, OURS, random_tokens
from neuroada_jax import console
from neuroada_jax.core import cuda_kernels, value_gradient
from neuroada_jax.core.value_gradient import GradientAlgorithm
from neuroada_jax.errors import NeuroadaWarning
from neuroada_jax.generation.generate import Ending, generate
from neuroada_jax.models import Remat
from neuroada_jax.planning import machines

MODELS["tiny"] = LLAMA_7B | {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
KERNELS = (GradientAlgorithm.PALLAS, GradientAlgorithm.CUDA)
CALLS = 20  # of one gradient, between two looks at the clock
EXACT = 1e-5  # the largest error of a gradient, relative to the norm; dense products in float32 are TF32's
COLUMNS = (
    Column("measured", "check"),
    Column("found", "found", "{:.4g}".format),
    Column("target", "target", str),
    Column("", "ok", lambda ok: "met" if ok else "MISSED"),
    Column("note", "note", str),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and save benchmarks/results/gpu.json."""
    parser = common.parser(__doc__, repeats=8)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seconds", type=float, default=360, help="for everything")
    parser.add_argument("--tiny", action="store_true", help="a test of this script")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)  # the process of one part
    settings = parser.parse_args(arguments)
    if settings.part:
        for row in PARTS[settings.part](settings):
            print(json.dumps(row), flush=True)
        return

    until = time.monotonic() + settings.seconds
    rows = []
    for part in settings.parts:
        console.say(f"{part} ...")
        left = until - time.monotonic()
        rows += list(PARTS[part](settings)) if settings.tiny else _in_fresh_process(part, settings, left)
    common.report("gpu", f"targets on {jax.devices()[0].device_kind}", COLUMNS, rows, settings)


def _in_fresh_process(part: str, settings: argparse.Namespace, seconds: float) -> list[Row]:
    """Return the rows that a part reported before it ended, failed or ran out of time."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--repeats", str(settings.repeats)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(seconds, 1))
        output, why = result.stdout, ""
        if result.returncode:
            why = (result.stderr.strip() or "killed").splitlines()[-1]
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout or b""  # bytes also where text was asked for
        output, why = said.decode() if isinstance(said, bytes) else said, "no time left"
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return rows + ([_row(f"{part}: the rest", None, note=why)] if why else [])


def _row(check: str, found: float | None, *, most: float | None = None, least: float | None = None, note: str = "") -> Row:
    """Return a row; `ok` is None where there is no target, nothing was found, or the device is another one."""
    ok = None
    if found is not None and (most is not None or least is not None) and "H100" in jax.devices()[0].device_kind:
        ok = found <= most if most is not None else found >= least
    target = f"<= {most}" if most is not None else None if least is None else f">= {least}"
    return {"check": check, "found": found, "target": target, "ok": ok, "note": note}


def _gradient(settings: argparse.Namespace) -> Iterator[Row]:
    maps = [(8192, 11008, 4096, 20), (8192, 4096, 11008, 20), (8192, 4096, 4096, 20), (8192, 11008, 4096, 4)]
    odd = [(77, 33, 17, 3), (65, 1030, 255, 41), (500, 40, 28672, 64)]
    if settings.tiny:
        maps, odd = [(24, 40, 16, 20)], []
    for sizes in maps:
        yield from _one_gradient(sizes, jnp.bfloat16, settings.repeats)
    for sizes in odd:
        for dtype in (jnp.bfloat16, jnp.float32):
            yield from _one_gradient(sizes, dtype, 0)


def _one_gradient(sizes: tuple[int, ...], dtype: Any, repeats: int) -> Iterator[Row]:
    """Yield the rows of every algorithm; without repeats it is not timed."""
    tokens, outputs, inputs, k = sizes
    keys = jax.random.split(jax.random.key(0), 3)
    dy, x = (jax.random.normal(key, (tokens, size), dtype) for key, size in zip(keys, (outputs, inputs), strict=False))
    columns = jax.random.randint(keys[2], (outputs, k), 0, inputs)
    chosen = np.unique(np.linspace(0, outputs - 1, 64, dtype=int))
    gathered = np.asarray(x)[:, np.asarray(columns)[chosen]].astype(np.float64)
    want = np.einsum("to,tok->ok", np.asarray(dy)[:, chosen].astype(np.float64), gathered)
    for algorithm in (*KERNELS, GradientAlgorithm.DENSE_CHUNKS):
        name = f"gradient, {' x '.join(map(str, sizes))}, {jnp.dtype(dtype).name}, {algorithm}"
        reason = cuda_kernels.why_not(inputs, dtype) if algorithm is GradientAlgorithm.CUDA else None
        if reason:
            yield _row(f"{name}: error", None, note=reason)
            continue
        run = jax.jit(functools.partial(value_gradient.value_gradient, algorithm=algorithm))
        got, again = (np.asarray(run(dy, x, columns)) for _ in range(2))
        exact = algorithm in KERNELS or dtype == jnp.bfloat16  # else TF32
        error = float(np.linalg.norm(got[chosen] - want) / np.linalg.norm(want))
        yield _row(f"{name}: error", error, most=EXACT if exact else None)
        yield _row(
            f"{name}: bytes that differ in a second run", int(np.sum(got.view(np.uint8) != again.view(np.uint8))), most=0
        )
        if repeats:
            calls = functools.partial(_calls, run, (dy, x, columns))
            yield _row(f"{name}: ms", 1e3 * _median(calls, repeats) / CALLS)


def _calls(run: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    for _ in range(CALLS):
        result = run(*arguments)
    jax.block_until_ready(result)


def _step(settings: argparse.Namespace) -> Iterator[Row]:
    floor = _seconds_of_a_step(FLOOR, 1, settings)
    yield _row("step: frozen floor, s", floor, most=0.100)
    yield _row("step: k = 1 / floor", _seconds_of_a_step(OURS, 1, settings) / floor, most=1.05)
    lora = _seconds_of_a_step("LoRA", 20, settings)
    yield _row("step: LoRA with the budget of k = 20 / floor", lora / floor)
    for algorithm in KERNELS:
        reason = cuda_kernels.why_not(1) if algorithm is GradientAlgorithm.CUDA else None
        if reason:
            yield _row(f"step: k = 20, {algorithm} / floor", None, note=reason)
            continue
        value_gradient.GPU_KERNELS = (algorithm,)
        seconds = _seconds_of_a_step(OURS, 20, settings)
        yield _row(f"step: k = 20, {algorithm} / floor", seconds / floor, most=1.12)
        yield _row(f"step: k = 20, {algorithm} / LoRA", seconds / lora, most=0.95)


def _dense(settings: argparse.Namespace) -> Iterator[Row]:
    value_gradient.GPU_KERNELS = ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NeuroadaWarning)  # that there is no GPU kernel
        yield _row("step: k = 20, dense_chunks, s", _seconds_of_a_step(OURS, 20, settings))


def _seconds_of_a_step(name: str, k: int, settings: argparse.Namespace) -> float:
    model, (batch, length) = ("tiny", (1, 16)) if settings.tiny else ("llama-7b", (4, 512))
    method = next(method for method in jax_methods.methods([k], []) if method.name == name)
    running = method.build(jax_methods.load(model, "bfloat16"))
    tokens = random_tokens(batch, length, MODELS[model]["vocab_size"])
    seconds = _median(lambda: running.step(tokens), settings.repeats)
    del running, method  # the weights
    gc.collect()
    jax.clear_caches()  # a trace is of one algorithm
    return seconds


def _median(run: Callable[[], object], repeats: int) -> float:
    seconds = []
    for turn in range(2 + repeats):
        began = time.perf_counter()
        run()
        seconds += [time.perf_counter() - began] if turn >= 2 else []
    return statistics.median(seconds)


def _decoding(settings: argparse.Namespace) -> Iterator[Row]:
    name, prompt, new = ("tiny", 8, 4) if settings.tiny else ("llama-7b", 128, 128)
    loaded = jax_methods.load(name, "bfloat16")
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
    for batch, least in ((1, 0.75), (8, 0.6)):
        ids = random_tokens(batch, prompt, MODELS[name]["vocab_size"]).ids.tolist()

        def decode(limit: int, ids: list[list[int]] = ids) -> None:
            generate(loaded.model, loaded.params, ids, Ending(), max_new_tokens=limit)

        prefill, both = (_median(functools.partial(decode, limit), settings.repeats // 2 or 1) for limit in (1, new))
        each = (both - prefill) / (new - 1)
        yield _row(f"decoding: batch {batch}, tokens/s", batch / each)
        bandwidth = _bandwidth()
        share, note = (None, "unknown GPU") if bandwidth is None else (weights / each / bandwidth, "")
        yield _row(f"decoding: batch {batch}, of the bandwidth limit", share, least=least, note=note)


def _bandwidth() -> float | None:
    """Return the bytes per second of this GPU's memory, by its data sheet."""
    known = [machines.find(name, jnp.bfloat16) for name in machines.NAMES if name != "cpu"]
    kind = jax.devices()[0].device_kind
    return next((machine.bandwidth for machine in known if machine.gpu and machine.gpu.model == kind), None)


def _memory(settings: argparse.Namespace) -> Iterator[Row]:
    model, (batch, length) = ("tiny", (2, 16)) if settings.tiny else ("llama-7b", (16, 512))
    method = next(method for method in jax_methods.methods([1], [Remat.FULL]) if method.name.endswith("remat full"))
    running = method.build(jax_methods.load(model, "bfloat16"))
    tokens = random_tokens(batch, length, MODELS[model]["vocab_size"])
    seconds = _median(lambda: running.step(tokens), min(settings.repeats, 4))
    on_gpu = jax.default_backend() == "gpu"
    found, note = (jax_methods.gpu_memory()[1] / 1e9, "") if on_gpu else (None, "not a GPU")
    yield _row("memory: 16 x 512, k = 1, full remat, GB", found, most=16.5, note=note)
    yield _row("memory: 16 x 512, k = 1, full remat, s a step", seconds)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "gradient": _gradient,
    "step": _step,
    "decoding": _decoding,
    "memory": _memory,
    "dense": _dense,
}


if __name__ == "__main__":
    main()
