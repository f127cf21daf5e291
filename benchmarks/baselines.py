"""The methods that ours is compared with in JAX, on our own model: plain autodiff, masks, full fine-tuning.

Scatter replaces the formula of every adapted linear map by a Flax method interceptor, so that all else is the same. LoRA is
the library's own.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from benchmarks.methods import LEARNING_RATE
from neuroada_jax.core import bypass, selection, trees
from neuroada_jax.core.entries import add_entries
from neuroada_jax.core.trees import ModulePath, Tree
from neuroada_jax.data.batches import Batch
from neuroada_jax.models import losses
from neuroada_jax.models.layers import BypassDense
from neuroada_jax.models.remat import kept_activation

ADAMW = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, weight_decay=0.0))

# (trainable, frozen, batch) -> the mean loss.
Loss = Callable[[Tree, Tree, Batch], Any]


class Baseline(NamedTuple):
    """A training method on a frozen or trained model.

    Attributes:
      split: (parameters, paths of the adapted linear maps) -> (trainable, frozen); together they hold the parameters.
      loss: module -> the loss over these two trees.
      constrain: (gradient, frozen) -> the gradient that the optimiser sees.
      count: trainable -> how many numbers a step can change.
    """

    split: Callable[[Tree, Sequence[ModulePath]], tuple[Tree, Tree]]
    loss: Callable[[nn.Module], Loss]
    constrain: Callable[[Tree, Tree], Tree] = lambda gradient, frozen: gradient
    count: Callable[[Tree], int] = bypass.count


def make_step(baseline: Baseline, module: nn.Module) -> Any:
    """Return the jitted step (trainable, optimiser state, frozen, batch) -> (trainable, optimiser state, loss).

    Clipping and AdamW are the library's; the first two arguments are donated. It must be traced under JAX's standard dtype
    promotion, since optax mixes int32 counts and floats.
    """
    loss = baseline.loss(module)

    def step(trainable: Tree, state: Any, frozen: Tree, batch: Batch) -> Any:
        value, gradient = jax.value_and_grad(loss)(trainable, frozen, batch)
        updates, state = ADAMW.update(baseline.constrain(gradient, frozen), state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


def scatter(k: int) -> Baseline:
    """Return the published formulation: a merged kernel under plain autodiff."""

    def split(params: Tree, paths: Sequence[ModulePath]) -> tuple[Tree, Tree]:
        built = bypass.build(params, paths, k)
        return {"bypass": built.values}, {"params": params, "columns": built.columns}

    def formula(x: Any, kernel: Any, columns: Any, values: Any) -> Any:
        return product(x, add_entries(kernel, columns, values))

    return Baseline(split, lambda module: _adapted_loss(module, formula))


def masked(k: int) -> Baseline:
    """Return the mask-based baseline: complete kernels train, their gradients are zeroed outside a boolean mask."""

    def split(params: Tree, paths: Sequence[ModulePath]) -> tuple[Tree, Tree]:
        kernels: Tree = {}
        masks: Tree = {}
        rest = params
        for path in paths:
            node = dict(trees.get(params, path))
            kernel = node.pop("kernel")
            columns = selection.select(selection.magnitude(kernel), k)
            mask = jnp.put_along_axis(jnp.zeros(kernel.shape, jnp.bool), columns, True, axis=-1, inplace=False)
            kernels = trees.put(kernels, path, {"kernel": kernel})
            masks = trees.put(masks, path, {"kernel": mask})
            rest = trees.put(rest, path, node)
        return kernels, {"params": rest, "mask": masks}

    def loss_of(module: nn.Module) -> Loss:
        def loss(kernels: Tree, frozen: Tree, batch: Batch) -> Any:
            params = frozen["params"]
            for path, kernel in trees.kernels(kernels):
                params = trees.put(params, path, {**trees.get(params, path), "kernel": kernel})
            return mean_loss(module, {"params": params}, batch)

        return loss

    def constrain(gradient: Tree, frozen: Tree) -> Tree:
        return jax.tree.map(lambda leaf, kept: jnp.where(kept, leaf, 0), gradient, frozen["mask"])

    def count(kernels: Tree) -> int:
        return sum(leaf.size // leaf.shape[-1] * min(k, leaf.shape[-1]) for leaf in jax.tree.leaves(kernels))

    return Baseline(split, loss_of, constrain, count)


def full() -> Baseline:
    """Return full fine-tuning: every weight trains, embedding and output layer included."""

    def loss_of(module: nn.Module) -> Loss:
        # The loss takes the output layer's gradient only where the bypass's tree has an entry for it, if an empty one.
        return lambda params, _, batch: mean_loss(module, {"params": params, "bypass": {"lm_head": {}}}, batch)

    return Baseline(lambda params, paths: (params, {}), loss_of)


def mean_loss(module: nn.Module, variables: Tree, batch: Batch) -> Any:
    """Return the mean loss over the labels."""
    return jnp.sum(losses.label_losses(module, variables, batch)) / jnp.sum(batch.label_mask)


def product(x: Any, kernel: Any) -> Any:
    """Return x W^T."""
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (1,)), ((), ())))


def _adapted_loss(module: nn.Module, formula: Callable[[Any, Any, Any, Any], Any]) -> Loss:
    """Return the mean loss with `formula`, (x, kernel, columns, values) -> y, in every adapted linear map."""

    def intercept(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        adapted = isinstance(layer, BypassDense) and context.method_name == "__call__"
        if not adapted or not layer.has_variable("bypass", "values"):
            return next_function(*args, **kwargs)
        kernel = layer.get_variable("params", "kernel")
        columns, values = layer.get_variable("columns", "columns"), layer.get_variable("bypass", "values")
        # Named as the layer's own output is, or remat recomputes it.
        return kept_activation(formula(args[0], kernel, columns, values))

    def loss(trainable: Tree, frozen: Tree, batch: Batch) -> Any:
        with nn.intercept_methods(intercept):
            return mean_loss(module, {**frozen, **trainable}, batch)

    return loss
