"""What scores need beside the weights: gradients, norms of inputs, low-rank factors, seeds."""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from neuroada_jax import models
from neuroada_jax.core import quantised, scores, trees
from neuroada_jax.core.scores import Needs
from neuroada_jax.core.trees import ModulePath, Tree
from neuroada_jax.models.losses import label_losses
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.step import AnyBatch, split

INPUT_BATCHES = 16  # from which the norms of inputs are taken by default


class Statistics:
    """The statistics of a run's targets, see `core.scores`."""

    def __init__(
        self,
        config: RunConfig,
        model: models.Model,
        params: Tree,
        paths: list[ModulePath],
        batches: Iterable[AnyBatch] | None,
        losses: Callable[..., jax.Array],
    ) -> None:
        """Take the arguments of `connections.choose`."""
        self._config, self._model, self._params, self._paths = config, model, params, paths
        self._batches, self._key = batches, jax.random.key(config.seed)
        # Otherwise the output layer, which is frozen as a rule, gets no gradient.
        self._losses = functools.partial(losses, output_trains=True) if ("lm_head",) in paths else losses

    def of(self, needs: Needs) -> Callable[[int, ModulePath], Tree | None]:
        """Return the function (number, path of a target) -> its statistic, or None where a score needs none."""
        match needs:
            case Needs.GRADIENT:
                sums = gradient_sums(*self._pass_over(None), self._config.training.accumulation, self._losses)
                return lambda _, path: trees.get(sums, path)
            case Needs.INPUTS:
                squares = input_squares(*self._pass_over(INPUT_BATCHES), self._config.training.accumulation, self._losses)
                return lambda _, path: {"for_all": _norms(trees.get(squares, path)["squares"])}
            case Needs.FACTORS:
                rank = self._config.bypass.rank
                return lambda number, path: _factors_of(self._kernel(path), rank, self._key_of(number))
            case Needs.SEEDS:
                return lambda number, path: scores.seeds(self._key_of(number), quantised.shape(self._kernel(path))[:-1])
        return lambda *_: None

    def _kernel(self, path: ModulePath) -> Any:
        return trees.get(self._params, path)["kernel"]

    def _key_of(self, number: int) -> jax.Array:
        return jax.random.fold_in(self._key, number)

    def _pass_over(self, default: int | None) -> tuple[nn.Module, Tree, list[ModulePath], Iterable[AnyBatch]]:
        """Return the module, its weights, the targets, and as many batches as the config asks for; None: all."""
        assert self._batches is not None
        limit = self._config.bypass.statistic_batches or default
        module = self._model.module(self._config.training.remat_policy)
        return module, self._params, self._paths, itertools.islice(self._batches, limit)


def _norms(squares: jax.Array) -> jax.Array:
    """Return the norms of inputs (*L, I); 1 for an expert that no row was routed to, whose score is then |W|."""
    return jnp.where(jnp.any(squares > 0, axis=-1, keepdims=True), jnp.sqrt(squares), 1)


@functools.partial(jax.jit, static_argnums=1)
def _factors_of(kernel: Any, rank: int, key: jax.Array) -> Tree:
    """Return `scores.factors` of a kernel whose layers may lie apart and be quantised; one of these is dense at a time."""
    if isinstance(kernel, tuple):
        return jax.tree.map(lambda *each: jnp.stack(each), *(_factors_of(layer, rank, key) for layer in kernel))
    if quantised.is_quantised(kernel):
        return quantised.by_layer(lambda own: scores.factors(quantised.dequantise(own), rank, key), kernel)
    return scores.factors(kernel, rank, key)


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
    shape of every target kernel, and during a batch one more in the kernel's dtype; targets that are quantised are
    dequantised meanwhile.

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
        chosen = trees.put(chosen, path, {"kernel": quantised.dense_stack(trees.get(params, path)["kernel"])})

    def variables(kernels: Tree, params: Tree) -> Tree:
        for path in paths:
            node = {**trees.get(params, path), **trees.get(kernels, path)}
            params = trees.put(params, path, node)
        return {"params": params}

    return _sums(module, params, chosen, variables, batches, accumulation, losses)


def input_squares(
    module: nn.Module,
    params: Tree,
    paths: list[ModulePath],
    batches: Iterable[AnyBatch],
    accumulation: int = 1,
    losses: Callable[..., jax.Array] = label_losses,
) -> Tree:
    """Sum the squares of every input of the targets over the tokens of batches on which the loss depends.

    Padding is not among them, nor are tokens of a last layer that reach no label. The cost is a forward and a backward pass
    of training for each batch. Arguments as in `gradient_sums`.

    Returns:
      A tree with float32 (*L, I) under "squares" at each of the paths.
    """
    zeros: Tree = {}
    for path in paths:
        *leading, _, inputs = quantised.shape(trees.get(params, path)["kernel"])
        zeros = trees.put(zeros, path, {"squares": jnp.zeros((*leading, inputs), jnp.float32)})
    variables = lambda squares, params: {"params": params, "observed": squares}  # noqa: E731
    return _sums(module, params, zeros, variables, batches, accumulation, losses, mean=False)


def _sums(
    module: nn.Module,
    params: Tree,
    arguments: Tree,
    variables: Callable[[Tree, Tree], Tree],
    batches: Iterable[AnyBatch],
    accumulation: int,
    losses: Callable[..., jax.Array],
    mean: bool = True,
) -> Tree:
    """Sum gradients of the loss by `arguments` over batches, in float32: of the mean over a batch's labels, or of the sum.

    `variables` maps (arguments, params) to the collections of the module; for the others see `gradient_sums`.
    """

    def loss_sum(arguments: Tree, params: Tree, batch: AnyBatch) -> jax.Array:
        return jnp.sum(losses(module, variables(arguments, params), batch))

    def add(sums: Tree, params: Tree, arguments: Tree, batch: AnyBatch) -> Tree:
        divisor = jnp.maximum(jnp.sum(batch.label_mask), 1) if mean else jnp.float32(1)

        def add_part(sums: Tree, part: AnyBatch) -> tuple[Tree, None]:
            gradient = jax.grad(loss_sum)(arguments, params, part)
            return jax.tree.map(lambda total, leaf: total + leaf.astype(jnp.float32) / divisor, sums, gradient), None

        return lax.scan(add_part, sums, split(batch, accumulation))[0]

    step = jax.jit(add, donate_argnums=0)
    sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), arguments)
    for batch in batches:
        sums = step(sums, params, arguments, batch)
    return sums
