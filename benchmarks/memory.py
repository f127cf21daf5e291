"""Bytes of one compiled training step of LLaMA-7B and others, by method: from shapes alone, nothing is allocated.

    make bench-memory           (or: python -m benchmarks.memory --models llama-7b llama-3-8b --batch 16 2)
    make bench-memory-h100      the same, compiled for an H100, which need not be there

`peak_bytes` is the sum of `bytes`: what a step is given (weights, what a method adds to them, optimiser, batch) and the
compiler's own figure for temporaries. Weights are bfloat16, every position is labelled, the optimiser is AdamW. All methods
but full fine-tuning adapt the seven linear maps of every layer:

    neuroada-jax         the library's step; values and moments are float32
    autodiff scatter     the published formulation under plain autodiff; values and moments are float32
    mask-based NeuroAda  these maps train whole, gradients times a boolean mask; moments in bfloat16, as PyTorch has them
    LoRA                 factors and moments in bfloat16, the smallest that LoRA can be
    full fine-tuning     every weight; moments in bfloat16

`seconds` is what tracing and compiling took, once. XLA computes bfloat16 products in float32 on most CPUs: the CPU's
temporaries hold float32 copies that a GPU does not need.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import common, jax_methods
from benchmarks.common import Column, Row
from benchmarks.jax_methods import ADAMW, LEARNING_RATE, Formula
from benchmarks.methods import FULL, MASKED, MODELS, OURS, SCATTER, targets
from neuroada_jax import console, models
from neuroada_jax.core import bypass, trees
from neuroada_jax.core.trees import Tree
from neuroada_jax.data.batches import Batch
from neuroada_jax.models import Model, Remat
from neuroada_jax.planning import plan
from neuroada_jax.planning.machines import Compiler, compiler_for, find, temporaries
from neuroada_jax.planning.roofline import nbytes
from neuroada_jax.training import optimizer, step
from neuroada_jax.training.config import OptimizerSection

DTYPE = "bfloat16"
LORA = "LoRA"
COLUMNS = (
    Column("method", "method"),
    Column("k", "k"),
    Column("rank", "rank"),
    Column("model", "model"),
    Column("batch", "shape", lambda shape: " x ".join(map(str, shape))),
    Column("remat", "remat"),
    Column("trained", "trained", "{:,}".format),
    Column("total", "peak_bytes", console.size),
    Column("temporaries", "bytes", lambda kinds: console.size(kinds["temporaries"])),
    Column("/full", "ratio_to_full", "{:.2f}".format),
)


class Program(NamedTuple):
    """A method's jitted step, the shapes that it takes, and the same by kind."""

    step: Any
    arguments: tuple[Any, ...]
    kinds: dict[str, Any]
    trained: int


class Case(NamedTuple):
    """A method by name, with its k or its rank; `build` makes its program for a model, a remat policy and a batch."""

    method: str
    k: int | None
    rank: int | None
    build: Callable[[Model, Remat, Batch], Program]


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles, prints the table and saves benchmarks/results/memory.json, or memory-h100.json."""
    jax.config.update("jax_platforms", "cpu")  # a GPU's compiler needs no GPU, and an array here would take one
    parser = common.parser(__doc__, repeats=None)
    parser.add_argument("--target", default="cpu", choices=["cpu", "h100"])
    parser.add_argument("--models", nargs="+", default=["llama-7b", "llama-3-8b"], choices=MODELS, metavar="MODEL")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 2], help="rows")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 20])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32], help="of LoRA")
    parser.add_argument("--remat", nargs="+", default=["none", "full"], choices=[remat.value for remat in Remat])
    settings = parser.parse_args(arguments)

    compiler = compiler_for(find(settings.target, DTYPE))
    if settings.target != "cpu" and not (compiler.platform == "gpu" and compiler.flash_attention):
        sys.exit("what compiles for a GPU is missing: pip install 'neuroada-jax[cuda]', or make bench-memory-h100")
    rows = _compile_all(compiler, settings.models, settings.batch, settings.length, settings.remat, _cases(settings))
    name = "memory" if settings.target == "cpu" else f"memory-{settings.target}"
    common.report(name, f"one step, {DTYPE}, compiled for {compiler.name}", COLUMNS, rows, settings)


def _cases(settings: Any) -> list[Case]:
    """The rows for every model, batch and policy, full fine-tuning first; what does not depend on k appears once."""
    cases = [Case(FULL, None, None, _full)]
    cases += [Case(OURS, k, None, lambda *where, k=k: _ours(*where, k)) for k in settings.k]
    first = settings.k[0]
    trees = lambda params, paths: jax_methods.scatter_trees(params, paths, first)  # noqa: E731
    cases.append(Case(SCATTER, first, None, lambda *where: _adapted(*where, trees, jax_methods.scatter)))
    cases.append(Case(MASKED, first, None, lambda *where: _masked(*where, first)))
    for rank in settings.ranks:
        factors = lambda params, paths, rank=rank: jax_methods.lora_trees(params, paths, rank)  # noqa: E731
        build = lambda *where, factors=factors: _adapted(*where, factors, jax_methods.lora)  # noqa: E731
        cases.append(Case(LORA, None, rank, build))
    return cases


def _compile_all(
    compiler: Compiler,
    names: Sequence[str],
    batches: Sequence[int],
    length: int,
    remats: Sequence[str],
    cases: Sequence[Case],
) -> list[Row]:
    rows: list[Row] = []
    total = len(names) * len(batches) * len(remats) * len(cases)
    with console.bar(f"compiling for {compiler.name}", total) as shown:
        for name in names:
            model = models.from_hf_config(MODELS[name], DTYPE)
            for batch in batches:
                for remat in remats:
                    group: list[Row] = []
                    for case in cases:
                        shown.update(len(rows) + len(group), total, f"{name}, {batch} rows, remat {remat}: {case.method}")
                        program = case.build(model, Remat(remat), plan.abstract_batch(batch, length))
                        row = {"method": case.method, "k": case.k, "rank": case.rank, "dtype": DTYPE, "model": name}
                        row |= {"shape": [batch, length], "remat": remat, "compiled_for": compiler.name}
                        group.append(row | _compiled(compiler, program))
                    full = group[0]["peak_bytes"]
                    rows += [row | {"ratio_to_full": row["peak_bytes"] / full} for row in group]
        shown.update(total, total)
    return rows


def _compiled(compiler: Compiler, program: Program) -> Row:
    began = time.perf_counter()
    with jax.numpy_dtype_promotion("standard"):  # see make_update
        room = temporaries(compiler.compile(compiler.trace(program.step, *program.arguments)))
    kinds = {kind: nbytes(tree) for kind, tree in program.kinds.items()} | {"temporaries": room}
    return {
        "trained": program.trained,
        "bytes": kinds,
        "peak_bytes": sum(kinds.values()),
        "seconds": time.perf_counter() - began,
    }


def _ours(model: Model, remat: Remat, batch: Batch, k: int) -> Program:
    """The library's step as the training loop runs it."""
    transformation = optimizer.build(OptimizerSection(learning_rate=LEARNING_RATE), 1)
    params = model.abstract_params()
    paths = targets(params, model)
    state = jax.eval_shape(
        lambda params: step.initial_state(params, bypass.build(params, paths, k), transformation), params
    )
    kinds = {
        "weights": state.params,
        "adapter": (state.trainable, state.columns, state.base_entries),
        "optimizer": state.opt_state,
        "batch": batch,
    }
    run_step = step.make_step(model.module(remat), transformation)
    return Program(run_step, (state, batch), kinds, bypass.count(state.trainable))


def _program(update: Any, params: Tree, trainable: Tree, frozen: Tree, adapter: Any, batch: Batch, trained: int) -> Program:
    """Of a step by `jax_methods.make_update`, whose `trainable` and `frozen` hold `params` and `adapter` between them."""
    state = jax.eval_shape(ADAMW.init, trainable)
    kinds = {"weights": params, "adapter": adapter, "optimizer": state, "batch": batch}
    return Program(update, (trainable, state, frozen, batch), kinds, trained)


def _adapted(
    model: Model, remat: Remat, batch: Batch, trees: Callable[..., tuple[Tree, Tree]], formula: Formula
) -> Program:
    """A step with `formula` in every adapted map; `trees` of the parameters and the maps' paths: trained, kept beside."""
    params = model.abstract_params()
    paths = targets(params, model)
    trainable, static = jax.eval_shape(lambda params: trees(params, paths), params)
    update = jax_methods.make_update(jax_methods.adapted_loss(model.module(remat), formula))
    frozen = {"params": params, **static}
    return _program(update, params, trainable, frozen, (trainable, static), batch, bypass.count(trainable))


def _masked(model: Model, remat: Remat, batch: Batch, k: int) -> Program:
    """Whole kernels train; their gradients are zeroed outside a boolean mask of the same shape."""
    params = rest = model.abstract_params()
    kernels: Tree = {}
    masks: Tree = {}
    chosen = 0
    for path in targets(params, model):
        node = trees.get(params, path)
        kernel = node["kernel"]
        kernels = trees.put(kernels, path, {"kernel": kernel})
        masks = trees.put(masks, path, {"kernel": jax.ShapeDtypeStruct(kernel.shape, jnp.bool)})
        rest = trees.put(rest, path, {name: leaf for name, leaf in node.items() if name != "kernel"})
        chosen += kernel.size // kernel.shape[-1] * min(k, kernel.shape[-1])
    module = model.module(remat)

    def loss(kernels: Tree, frozen: Tree, batch: Batch) -> Any:
        params = frozen["params"]
        for path, kernel in trees.kernels(kernels):
            params = trees.put(params, path, {**trees.get(params, path), "kernel": kernel})
        return jax_methods.mean_loss(module, {"params": params}, batch)

    def mask(gradient: Tree, frozen: Tree) -> Tree:
        return jax.tree.map(lambda leaf, kept: jnp.where(kept, leaf, 0), gradient, frozen["mask"])

    update = jax_methods.make_update(loss, mask)
    return _program(update, params, kernels, {"params": rest, "mask": masks}, masks, batch, chosen)


def _full(model: Model, remat: Remat, batch: Batch) -> Program:
    """Every weight trains, embedding and output layer included."""
    params = model.abstract_params()
    module = model.module(remat)

    def loss(params: Tree, _: Tree, batch: Batch) -> Any:
        # An output layer in the bypass's tree, empty or not, is one that the loss takes the gradient for.
        return jax_methods.mean_loss(module, {"params": params, "bypass": {"lm_head": {}}}, batch)

    return _program(jax_methods.make_update(loss), params, params, {}, (), batch, bypass.count(params))


if __name__ == "__main__":
    main()
