"""What a layer keeps for the backward pass, and where its arrays are while it computes."""

import contextlib
import contextvars
import enum
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

BYPASS_COLLECTIONS = ("bypass", "columns", "base_entries")
_SAVED = "saved_output"
_PART_TOKENS = 2048  # fewer would leave a GPU idle


class Remat(enum.StrEnum):
    """What a layer keeps for the backward pass.

    Norms, gated products and attention probabilities are computed a second time under all three: cheaper than keeping them.
    """

    NONE = "none"  # the inputs and outputs of linear maps, and what fused attention wants to keep
    NAMES = "names"  # the outputs of linear maps and of attention
    FULL = "full"  # the layer's input only: one more forward pass


_KEEP_NAMED = jax.checkpoint_policies.save_only_these_names(_SAVED)


class Placement(NamedTuple):
    """Where arrays have to be while a layer computes, on devices that share the weights.

    Attributes:
      weights: the variables of one layer, by collection, as the layer needs them.
      inputs: what a linear map reads.
    """

    weights: Callable[[Any], Any]
    inputs: Callable[[Array], Array]


_placement: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("placement", default=None)


@contextlib.contextmanager
def placed(placement: Placement) -> Iterator[None]:
    """Models that are applied inside gather the weights of one layer at a time, in the forward and the backward pass."""
    token = _placement.set(placement)
    try:
        yield
    finally:
        _placement.reset(token)


def remat_module(module: type[nn.Module], remat: Remat) -> type[nn.Module]:
    """The module class under the given remat policy, for use as the body of a layer scan.

    Where weights are gathered (`placed`), `Remat.NONE` keeps what `Remat.NAMES` does: what a linear map keeps for its
    backward pass would be all gathered weights.
    """
    placement = _placement.get()
    if placement is not None:
        module = nn.map_variables(module, ("params", *BYPASS_COLLECTIONS), placement.weights)
    elif remat is Remat.NONE:
        return module
    policy = None if remat is Remat.FULL else _KEEP_NAMED
    # The scan already keeps XLA from merging the recomputation with the forward pass.
    return nn.remat(module, policy=policy, prevent_cse=False)


def token_wise(block: Callable[..., Any], remat: Remat, shape: tuple[int, ...]) -> Callable[..., Any]:
    """A layer's block that treats every token by itself, under what its policy asks beyond `remat_module`.

    Under `Remat.NONE` it keeps its input and its linear maps' outputs alone. Under `Remat.FULL` memory goes into weights,
    the layers' inputs and one layer's recomputation: of that, a part of the batch at a time is enough, and nothing is
    computed more often for it.

    Args:
      block: maps (module, (B, T, D)) to (B, T, D).
      remat: the layer's policy.
      shape: (B, T, D).
    """
    if remat is Remat.NONE:
        return nn.remat(block, policy=_KEEP_NAMED, prevent_cse=False)
    rows, tokens = shape[0], shape[0] * shape[1]
    fitting = [parts for parts in range(1, rows + 1) if rows % parts == 0 and tokens // parts <= _PART_TOKENS]
    parts = min(fitting, default=rows)
    if remat is Remat.NAMES or parts == 1:
        return block

    def one_part(module: nn.Module, carry: None, part: Array) -> tuple[None, Array]:
        return carry, block(module, part)

    run = nn.scan(
        nn.remat(one_part, prevent_cse=False),
        variable_broadcast=("params", *BYPASS_COLLECTIONS),
        split_rngs={"params": False, "dropout": True},
    )
    return lambda module, x: run(module, None, x.reshape(parts, rows // parts, *shape[1:]))[1].reshape(shape)


def saved(x: Array) -> Array:
    """Marks an activation that the policies other than `Remat.FULL` keep."""
    return checkpoint_name(x, _SAVED)


def placement() -> Placement | None:
    """The placement that models are applied under, None where a device holds all weights."""
    return _placement.get()
