"""The values that a bfloat16 base rounds to nothing: their share, and what a run says about it."""

from typing import Any

import jax
import jax.numpy as jnp

from neuroada_jax import console
from neuroada_jax.core import bypass, trees
from neuroada_jax.training.modes import Parallel
from neuroada_jax.training.step import TrainState


def share(state: TrainState, devices: Parallel) -> float | None:
    """Return the share of values that leave their weight as it was; None where the base has 32 bits or more."""
    if all(jnp.finfo(leaf.dtype).bits >= 32 for leaf in jax.tree.leaves(state.base_entries)):
        return None
    values, base_entries, columns = devices.unsharded((state.bypass.values, state.base_entries, state.columns))
    found, total = bypass.rounded_to_nothing(values, base_entries), bypass.count(values)
    trained = total
    for path, mask in trees.leaves(columns, "trained"):
        size = trees.get(values, path)["values"].size
        trained -= size - int(jnp.sum(mask)) * size // mask.size
    return (found * total - (total - trained)) / trained  # values that do not train are zero


def report(share: float, dtype: Any) -> None:
    """Say which share of the values rounds to nothing in the base's dtype; warn where it is more than half."""
    name = jnp.dtype(dtype).name
    message = f"{100 * share:.1f} % of the values round to nothing in {name}: their weights are still those of the base"
    if share > 0.5:
        console.warn(f"{message}; take a larger optimizer.learning_rate, or model.dtype=float32")
    else:
        console.say(message)
