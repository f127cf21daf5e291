"""Which connections a run trains: its config's score, applied to weights, gradients or chance."""

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
    """The dtype of values and moments: float32, or the base's own under `fidelity: official`."""
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
    """The bypass of a run before its first step: zero values, and columns by the score of its config.

    Args:
      config: the run.
      model: its base.
      params: the base's weights.
      paths: the linear maps that carry a bypass.
      batches: one pass over the training data; read for the score "gradient" only, which cannot do without.
      losses: of a batch, as in `step.make_step`; for the score "gradient" too.
      by_neuron: `parallel.Parallel.by_neuron`, for weights that devices share.
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
    for number, path in enumerate(paths):  # one map's scores at a time
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
    """The gradient of the mean loss with respect to the target kernels, summed over batches; no weight changes meanwhile.

    As the published code sums it (one mean loss for each batch), but in float32 on any base. It costs a forward and a
    backward pass of full fine-tuning for each batch, and in memory a float32 array of the shape of every target kernel,
    beside one of the kernel's dtype while a batch is under way.

    Args:
      module: the model; its remat policy counts.
      params: its weights.
      paths: the target kernels (*L, O, I).
      batches: what to sum over.
      accumulation: equal parts that a batch is computed in.
      losses: (module, variables, batch) -> the loss of every target; gradients must reach all target kernels through it.

    Returns: a tree with float32 (*L, O, I) under "kernel" at each of the paths.
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
        targets = jnp.maximum(jnp.sum(batch.label_mask), 1)

        def add_part(sums: Tree, part: AnyBatch) -> tuple[Tree, None]:
            gradient = jax.grad(loss_sum)(kernels, params, part)
            return jax.tree.map(lambda total, leaf: total + leaf.astype(jnp.float32) / targets, sums, gradient), None

        return lax.scan(add_part, sums, split(batch, accumulation))[0]

    step = jax.jit(add, donate_argnums=0)
    sums = jax.tree.map(lambda kernel: jnp.zeros(kernel.shape, jnp.float32), chosen)
    for batch in batches:
        sums = step(sums, params, chosen, batch)
    return sums
