"""Schedules and the partitioned optimiser: only the bypass values train."""

import math
from typing import Any

import jax
import optax

from neuroada_jax.training.config import OptimizerSection

TRAINED = ("bypass",)


def schedule(config: OptimizerSection, total_steps: int) -> optax.Schedule:
    """Learning rate by step (0 is the first update): warm-up from 0, then linear, cosine or constant.

    The steps are those of transformers' Trainer: ceil(warmup_ratio * total) warm-up steps, and 0 at `total_steps`.
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)
    rate, rest = config.learning_rate, max(total_steps - warmup, 1)
    after: optax.Schedule
    match config.schedule:
        case "linear":
            after = optax.linear_schedule(rate, 0.0, rest)
        case "cosine":
            after = optax.cosine_decay_schedule(rate, rest)
        case "constant":
            after = optax.constant_schedule(rate)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), after], [warmup])


def labels(tree: dict[str, Any]) -> dict[str, Any]:
    """The partition of a tree by its top-level collections: the trainable ones by name, everything else "frozen".

    It serves the trainable tree alone, as the training step keeps it, and a combined one such as
    {"params": ..., "bypass": ...}, whose other leaves then get zero updates and no optimiser state.
    """
    return {
        key: jax.tree.map(lambda _, label=key if key in TRAINED else "frozen": label, node) for key, node in tree.items()
    }


def build(config: OptimizerSection, total_steps: int) -> optax.GradientTransformation:
    """AdamW with clipping by the global norm; moments in the values' dtype (float32)."""
    adamw = optax.adamw(
        schedule(config, total_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    transforms = {**dict.fromkeys(TRAINED, adamw), "frozen": optax.set_to_zero()}
    partitioned = optax.partition(transforms, labels)
    if config.clip_norm is None:
        return partitioned
    # Masked, so that the norm is that of what trains, in a combined tree too.
    clip = optax.masked(optax.clip_by_global_norm(config.clip_norm), _trained)
    return optax.chain(clip, partitioned)


def _trained(tree: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda label: label != "frozen", labels(tree))
