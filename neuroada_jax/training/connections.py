"""Selection of the connections that a run trains, by weights, by gradients or at random."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from neuroada_jax import models
from neuroada_jax.core import bypass, selection, trees
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.core.trees import ModulePath, Tree
from neuroada_jax.models.losses import label_losses
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.step import AnyBatch, split


def value_dtype(config: RunConfig, model: models.Model) -> Any:
    """Return the dtype of values and moments: float32, or the base dtype with `fidelity: official`."""
    return model.config.dtype if config.fidelity == "official" else jnp.float32


def choose(
    config: RunConfig,
    model: models.Model,
    params: Tree,
    paths: list[ModulePath],
    batches: Iterable[AnyBatch] | None = None,
    losses: Callable[..., jax.Array] = label_losses,
    by_neuron: Callable[..., Any] = lambda function: function,
) -> Bypass:
    """Return the bypass of a run before its first step: zero values at the columns that its `bypass.score` selects.

    Args:
      config: the run.
      model: its base model.
      params: the weights of the base model.
      paths: the targets.
      batches: one pass over the training data; read, and required, only for the score "gradient".
      losses: as in `step.make_step`; for the score "gradient" only.
      by_neuron: `modes.Parallel.by_neuron`, for sharded weights.
    """
    k, dtype = config.bypass.k, value_dtype(config, model)

    def build(params: Tree, score: Callable[[jax.Array], jax.Array] = selection.magnitude) -> Bypass:
        return by_neuron(lambda params: bypass.build(params, paths, k, score=score, dtype=dtype))(params)

    match config.bypass.score:
        case "magnitude":
            return build(params)
        case "reverse":
            return build(params, selection.reverse)
        case "gradient":
            module = model.module(config.training.remat_policy)
            assert batches is not None
            if ("lm_head",) in paths:
                losses = functools.partial(losses, output_trains=True)
            sums = gradient_sums(module, params, paths, batches, config.training.accumulation, losses)
            return build(sums)
    key = jax.random.key(config.seed)
    values: Tree = {}
    columns: Tree = {}
    for number, path in enumerate(paths):  # the random scores of one linear map at a time
        kernel = trees.get(params, path)["kernel"]
        scores = jax.random.uniform(jax.random.fold_in(key, number), kernel.shape)
        built = bypass.build(trees.put({}, path, {"kernel": scores}), [path], k, dtype=dtype)
        values = trees.put(values, path, trees.get(built.values, path))
        columns = trees.put(columns, path, trees.get(built.columns, path))
    return Bypass(values, columns)


def gradient_sums(
    module: nn.Module,
    params: Tree,
    paths: list[ModulePath],
    batches: Iterable[AnyBatch],
    accumulation: int = 1,
    losses: Callable[..., jax.Array] = label_losses,
) -> Tree:
    """Sum the gradient of the mean loss by the target kernels over batches, at constant weights.

    The published code sums in the same way (one mean loss for each batch), but in the base dtype; here it is float32. The
    cost is a forward and a backward pass of full fine-tuning for each batch. In memory it takes a float32 array of the
    shape of every target kernel, and during a batch one more in the kernel's dtype.

    Args:
      module: the model, with its remat policy.
      params: its weights.
      paths: the targets, with kernels (*L, O, I).
      batches: the batches to sum over.
      accumulation: number of equal micro batches in which a batch is computed.
      losses: (module, variables, batch) -> the loss at every label; gradients must reach all target kernels through it.

    Returns:
      A tree with float32 (*L, O, I) under "kernel" at each of the paths.
    """
    chosen: Tree = {}
    for path in paths:
        chosen = trees.put(chosen, path, {"kernel": trees.get(params, path)["kernel"]})

    def loss_sum(kernels: Tree, params: Tree, batch: AnyBatch) -> jax.Array:
        for path in paths:
            node = {**trees.get(params, path), **trees.get(kernels, path)}
            params = trees.put(params, path, node)
        return jnp.sum(losses(module, {"params": params}, batch))

    def add(sums: Tree, params: Tree, kernels: Tree, batch: AnyBatch) -> Tree:
        labels = jnp.maximum(jnp.sum(batch.label_mask), 1)

        def add_part(sums: Tree, part: AnyBatch) -> tuple[Tree, None]:
            gradient = jax.grad(loss_sum)(kernels, params, part)
            return jax.tree.map(lambda total, leaf: total + leaf.astype(jnp.float32) / labels, sums, gradient), None

        return lax.scan(add_part, sums, split(batch, accumulation))[0]

    step = jax.jit(add, donate_argnums=0)
    sums = jax.tree.map(lambda kernel: jnp.zeros(kernel.shape, jnp.float32), chosen)
    for batch in batches:
        sums = step(sums, params, chosen, batch)
    return sums
