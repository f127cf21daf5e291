"""Rematerialisation: which activations of a layer are kept for the backward pass, and where its arrays are placed."""

import contextlib
import contextvars
import enum
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

BYPASS_COLLECTIONS = ("bypass", "resident", "columns", "observed")
_KEPT = "kept_activation"
_PART_TOKENS = 2048  # fewer would leave a GPU idle


class Remat(enum.StrEnum):
    """Activations that a layer keeps for the backward pass.

    All three policies recompute norms, gated products and attention probabilities, which is cheaper than keeping them.
    """

    NONE = "none"  # the inputs and outputs of linear maps, and the residuals of fused attention
    NAMES = "names"  # the outputs of linear maps and of attention
    FULL = "full"  # the layer's input only, at the cost of a second forward pass


_KEEP_NAMED = jax.checkpoint_policies.save_only_these_names(_KEPT)


class Placement(NamedTuple):
    """Functions that place the arrays of a layer while it computes, on devices that share the weights.

    Attributes:
      weights: the variables of one layer, by collection -> the same variables, gathered for its computation.
      inputs: the input of a linear map -> the same input, placed for its product.
    """

    weights: Callable[[Any], Any]
    inputs: Callable[[Array], Array]


_placement: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("placement", default=None)
_outside_scan: contextvars.ContextVar[bool] = contextvars.ContextVar("outside_scan", default=False)


@contextlib.contextmanager
def placed(placement: Placement) -> Iterator[None]:
    """Make models that are applied inside gather the weights of one layer at a time, forward and backward."""
    token = _placement.set(placement)
    try:
        yield
    finally:
        _placement.reset(token)


@contextlib.contextmanager
def outside_scan() -> Iterator[None]:
    """Apply layers inside without a scan around them."""
    token = _outside_scan.set(True)
    try:
        yield
    finally:
        _outside_scan.reset(token)


def prevent_cse() -> bool:
    """Return whether XLA has to be kept from merging a layer's recomputation with its forward pass.

    In a scan it cannot merge them: they are in two loops.
    """
    return _outside_scan.get()


def remat_module(module: type[nn.Module], remat: Remat) -> type[nn.Module]:
    """Return the module class of a layer under a remat policy, for a layer scan or inside `outside_scan`.

    Where weights are gathered (`placed`), `Remat.NONE` keeps the same activations as `Remat.NAMES`: otherwise the linear
    maps would keep all gathered weights for the backward pass.
    """
    placement = _placement.get()
    if placement is not None:
        module = nn.map_variables(module, ("params", *BYPASS_COLLECTIONS), placement.weights)
    elif remat is Remat.NONE:
        return module
    policy = None if remat is Remat.FULL else _KEEP_NAMED
    return nn.remat(module, policy=policy, prevent_cse=prevent_cse())


def token_wise(block: Callable[..., Any], remat: Remat, shape: tuple[int, ...]) -> Callable[..., Any]:
    """Return a token-wise block of a layer under the part of its remat policy that `remat_module` does not cover.

    Under `Remat.NONE` the block keeps its input and the outputs of its linear maps only. Under `Remat.FULL` it is
    recomputed for one part of the batch at a time: besides weights and layer inputs, memory then holds the activations of
    one part of one layer, at no additional computation. Without a scan over the layers the batch stays in one part: XLA
    makes the zeros in which the loops over parts begin for all layers at once, and they take more than the parts save.

    Args:
      block: (module, (B, T, D)) -> (B, T, D), without interaction between tokens.
      remat: the layer's policy.
      shape: (B, T, D).
    """
    if remat is Remat.NONE:
        return nn.remat(block, policy=_KEEP_NAMED, prevent_cse=prevent_cse())
    batch, tokens = shape[0], shape[0] * shape[1]
    fitting = [parts for parts in range(1, batch + 1) if batch % parts == 0 and tokens // parts <= _PART_TOKENS]
    parts = min(fitting, default=batch)
    if remat is Remat.NAMES or parts == 1 or prevent_cse():
        return block

    def one_part(module: nn.Module, carry: None, part: Array) -> tuple[None, Array]:
        return carry, block(module, part)

    run = nn.scan(
        nn.remat(one_part, prevent_cse=False),
        variable_broadcast=("params", *BYPASS_COLLECTIONS),
        split_rngs={"params": False, "dropout": True},
    )
    return lambda module, x: run(module, None, x.reshape(parts, batch // parts, *shape[1:]))[1].reshape(shape)


def kept_activation(x: Array) -> Array:
    """Name an activation for `jax.checkpoint`, so that the policies other than `Remat.FULL` keep it."""
    return checkpoint_name(x, _KEPT)


def placement() -> Placement | None:
    """Return the placement that models are applied under, None where every device holds all weights."""
    return _placement.get()
