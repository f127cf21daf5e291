"""The JAX side of the step benchmark: the library's own step, the frozen floor, plain autodiff and LoRA.

The last two are the model's own layers with another formula in them (flax's method interceptors), so that everything else
is the same.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks.methods import (
    FLOOR,
    LEARNING_RATE,
    MODELS,
    OURS,
    SCATTER,
    Method,
    Running,
    Tokens,
    lora_rank,
    targets,
)
from neuroada_jax import models
from neuroada_jax.core import bypass, ops, trees
from neuroada_jax.core.trees import ModulePath, Tree
from neuroada_jax.data.batches import Batch
from neuroada_jax.models import Model, Remat, losses
from neuroada_jax.models.layers import BypassDense
from neuroada_jax.models.remat import saved
from neuroada_jax.pretrained.load import LoadedModel, load_model
from neuroada_jax.training import optimizer, step
from neuroada_jax.training.config import OptimizerSection
from neuroada_jax.training.step import TrainState

ADAMW = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, weight_decay=0.0))

# (module, x, its kernel) -> y of an adapted linear map.
Formula = Callable[[BypassDense, Any, Any], Any]
# (trainable, frozen, batch) -> the mean loss.
Loss = Callable[[Tree, Tree, Batch], Any]


def load(source: str, dtype: str) -> LoadedModel:
    """The weights of a checkpoint; for a name in MODELS they are drawn at random, on the device."""
    if source not in MODELS:
        return load_model(source, dtype)
    model = models.from_hf_config(MODELS[source], dtype)
    shapes, structure = jax.tree.flatten(model.abstract_params())
    keys = jax.random.split(jax.random.key(0), len(shapes))
    drawn = [_drawn(key, each.shape, each.dtype) for key, each in zip(keys, shapes, strict=True)]
    return LoadedModel(model, source, source, {}, jax.tree.unflatten(structure, drawn))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _drawn(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Normal numbers of deviation 0.02; slice by slice, so that their bits do not stand beside a whole model."""
    draw = lambda key: 0.02 * jax.random.normal(key, shape[1:], dtype)  # noqa: E731
    return jax.lax.map(draw, jax.random.split(key, shape[0]))


def gpu_memory() -> tuple[int, int]:
    """(bytes that arrays hold now on the GPU, the most that they ever held), as JAX's allocator counts."""
    counted = jax.devices()[0].memory_stats()
    return counted["bytes_in_use"], counted["peak_bytes_in_use"]


def own(loaded: LoadedModel) -> LoadedModel:
    """The model with weights of its own, for a method that writes to them."""
    return dataclasses.replace(loaded, params=jax.tree.map(jnp.copy, loaded.params))


def methods(ks: Sequence[int], remats: Iterable[Remat]) -> list[Method]:
    """The rows of the table, the floor first; what costs the same at every k appears at the first one only."""
    found = [Method("JAX", FLOOR, None, _floor)]
    found += [Method("JAX", OURS, k, lambda base, k=k: _ours(base, k, Remat.NONE), owns_weights=True) for k in ks]
    first = ks[0]
    for remat in remats:
        if remat is not Remat.NONE:
            build = lambda base, remat=remat: _ours(base, first, remat)  # noqa: E731
            found.append(Method("JAX", f"{OURS}, remat {remat.value}", first, build, owns_weights=True))
    found.append(Method("JAX", "LoRA", first, lambda base: _lora(base, first), core=False))
    found.append(Method("JAX", SCATTER, first, lambda base: _scatter(base, first), core=False))
    return found


def to_batch(tokens: Tokens) -> Batch:
    """The library's form of the tokens: positions and ids of the labelled ones, filled up to a multiple of 8."""
    counts = tokens.labelled.sum(axis=1)
    rows, most = len(counts), -(-int(counts.max()) // 8) * 8
    batch = Batch(
        input_ids=tokens.ids,
        lengths=np.full(rows, tokens.ids.shape[1], np.int32),
        label_positions=np.zeros((rows, most), np.int32),
        label_ids=np.zeros((rows, most), np.int32),
        label_mask=np.zeros((rows, most), np.float32),
    )
    for row, count in enumerate(counts):
        where = tokens.labelled[row].nonzero()[0]
        batch.label_positions[row, :count] = where - 1
        batch.label_ids[row, :count] = tokens.ids[row, where]
        batch.label_mask[row, :count] = 1
    return batch


def training_step(model: Model, k: int, remat: Remat) -> tuple[Callable[[Tree], TrainState], Any]:
    """The library's training step as the training loop runs it: AdamW, clipping and the resident write included.

    Returns: the function that makes the first state of frozen weights, and the jitted step (state, batch).
    """
    transformation = optimizer.build(OptimizerSection(learning_rate=LEARNING_RATE), 1000)

    def first_state(params: Tree) -> TrainState:
        return step.initial_state(params, bypass.build(params, targets(params, model), k), transformation)

    return first_state, step.make_step(model.module(remat), transformation)


def floor_gradient(model: Model) -> tuple[Callable[[Tree], Tree], Any]:
    """The gradient of the layer norms' scales: it needs the input gradient of every layer, and costs a sum over tokens.

    Returns: the function that finds these scales in the weights, and the jitted (scales, params, batch) -> (loss,
    gradient).
    """
    path = (*model.layers_path, "input_layernorm")

    @jax.jit
    def gradient(norm: Tree, params: Tree, batch: Batch) -> Any:
        return jax.value_and_grad(lambda norm: mean_loss(model.module(), {"params": trees.put(params, path, norm)}, batch))(
            norm
        )

    return lambda params: trees.get(params, path), gradient


def _ours(base: LoadedModel, k: int, remat: Remat) -> Running:
    first_state, run_step = training_step(base.model, k, remat)
    state = first_state(base.params)
    trained = bypass.count(state.trainable)

    def run(tokens: Tokens) -> float:
        nonlocal state
        state, metrics = run_step(state, to_batch(tokens))
        return float(jax.block_until_ready((state, metrics))[1].loss)

    return Running(run, trained)


def mean_loss(module: nn.Module, variables: Tree, batch: Batch) -> Any:
    """Of the labelled tokens."""
    return jnp.sum(losses.label_losses(module, variables, batch)) / jnp.sum(batch.label_mask)


def _floor(base: LoadedModel) -> Running:
    scales, gradient = floor_gradient(base.model)

    def run(tokens: Tokens) -> float:
        return float(jax.block_until_ready(gradient(scales(base.params), base.params, to_batch(tokens)))[0])

    return Running(run, 0)


def _scatter(base: LoadedModel, k: int) -> Running:
    return _adapted(base, scatter_trees(base.params, targets(base.params, base.model), k), scatter)


def _lora(base: LoadedModel, k: int) -> Running:
    return _adapted(base, lora_trees(base.params, targets(base.params, base.model), lora_rank(base.model, k)), lora)


def scatter_trees(params: Tree, paths: Sequence[ModulePath], k: int) -> tuple[Tree, Tree]:
    """What `scatter` trains, and what it keeps beside the weights."""
    built = bypass.build(params, paths, k)
    return {"bypass": built.values}, {"columns": built.columns}


def scatter(module: BypassDense, x: Any, kernel: Any) -> Any:
    """The published formulation: a merged kernel under plain autodiff."""
    columns, values = module.get_variable("columns", "columns"), module.get_variable("bypass", "values")
    return _product(x, ops.add_entries(kernel, columns, values))


def lora_trees(params: Tree, paths: Sequence[ModulePath], rank: int) -> tuple[Tree, Tree]:
    """What `lora` trains, in the kernels' dtype, A and B where a bypass has columns and values; it keeps nothing else."""
    down: Tree = {}
    up: Tree = {}
    for path in paths:
        kernel = trees.get(params, path)["kernel"]
        layers, outputs, inputs = kernel.shape
        first = jax.random.normal(jax.random.key(0), (layers, rank, inputs), kernel.dtype) * inputs**-0.5
        down = trees.put(down, path, {"columns": first})
        up = trees.put(up, path, {"values": jnp.zeros((layers, outputs, rank), kernel.dtype)})
    return {"bypass": up, "columns": down}, {}


def lora(module: BypassDense, x: Any, kernel: Any) -> Any:
    """y = x W^T + (x A^T) B^T with B = 0 at the start."""
    first, second = module.get_variable("columns", "columns"), module.get_variable("bypass", "values")
    return _product(x, kernel) + _product(_product(x, first), second)


def _product(x: Any, kernel: Any) -> Any:
    """x W^T."""
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (1,)), ((), ())))


def adapted_loss(module: nn.Module, formula: Formula) -> Loss:
    """The mean loss with `formula` in place of every adapted linear map."""

    def intercept(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        adapted = isinstance(module, BypassDense) and context.method_name == "__call__"
        if not adapted or not module.has_variable("bypass", "values"):
            return next_function(*args, **kwargs)
        # Marked as the layer's own output is, or remat would compute it again.
        return saved(formula(module, args[0], module.get_variable("params", "kernel")))

    def loss(trainable: Tree, frozen: Tree, batch: Batch) -> Any:
        with nn.intercept_methods(intercept):
            return mean_loss(module, {**frozen, **trainable}, batch)

    return loss


def make_update(loss: Loss, change: Callable[[Tree, Tree], Tree] = lambda gradient, frozen: gradient) -> Any:
    """The jitted step (trainable, optimiser state, frozen, batch) -> (trainable, optimiser state, loss).

    Clipping and AdamW as the library's; the first two arguments are donated. To be traced and compiled under JAX's standard
    dtype promotion, since optax's own code mixes int32 counts and floats.

    Args:
      loss: to train.
      change: (gradient, frozen) -> the gradient to use.
    """

    def update(trainable: Tree, state: Any, frozen: Tree, batch: Batch) -> Any:
        value, gradient = jax.value_and_grad(loss)(trainable, frozen, batch)
        updates, state = ADAMW.update(change(gradient, frozen), state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    return jax.jit(update, donate_argnums=(0, 1))


def _adapted(base: LoadedModel, trees: tuple[Tree, Tree], formula: Formula) -> Running:
    """The step with `formula` on a loaded model, from what it trains and what it keeps beside the weights."""
    trainable, static = trees
    run_step = make_update(adapted_loss(base.model.module(), formula))
    trained = bypass.count(trainable)
    state = ADAMW.init(trainable)

    def run(tokens: Tokens) -> float:
        nonlocal trainable, state
        with jax.numpy_dtype_promotion("standard"):
            trainable, state, value = run_step(trainable, state, {"params": base.params, **static}, to_batch(tokens))
        return float(jax.block_until_ready((trainable, value))[1])

    return Running(run, trained)
