"""Learning-rate schedules and the partitioned optimiser, which updates the bypass values and a classifier only."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from neuroada_jax.training.config import ClassifierSection, OptimizerSection

TRAINED = ("bypass", "classifier")


def schedule(config: OptimizerSection, total_steps: int, learning_rate: float | None = None) -> optax.Schedule:
    """Return the learning rate by step (0 is the first update): warm-up from 0, then linear, cosine or constant.

    As in transformers' Trainer, there are ceil(warmup_ratio * total_steps) warm-up steps, and linear and cosine schedules
    reach 0 at `total_steps`. The peak is `learning_rate`; None stands for that of `config`.
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)
    rate = config.learning_rate if learning_rate is None else learning_rate
    rest = max(total_steps - warmup, 1)
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
    """Label every leaf with its top-level collection if that is in `TRAINED`, else with "frozen".

    This suits the trainable tree of the training step, and a combined tree such as {"params": ..., "bypass": ...}, whose
    other leaves get zero updates and no optimiser state.
    """
    return {
        key: jax.tree.map(lambda _, label=key if key in TRAINED else "frozen": label, node) for key, node in tree.items()
    }


def schedules_of(config: OptimizerSection, total_steps: int, classifier: ClassifierSection) -> dict[str, optax.Schedule]:
    """Return the schedules of the values and of the classifier, which may have a peak of its own."""
    return {
        "bypass": schedule(config, total_steps),
        "classifier": schedule(config, total_steps, classifier.learning_rate),
    }


def build(
    config: OptimizerSection,
    total_steps: int,
    classifier: ClassifierSection | None = None,
    schedules: Mapping[str, optax.Schedule] | None = None,
) -> optax.GradientTransformation:
    """Build AdamW with clipping by the global norm and moments in the dtype of the values (float32).

    The classifier has its own learning rate and weight decay where `classifier` sets them. Biases do not decay, as in
    transformers' Trainer. `schedules` are the rates by step of each of `TRAINED`; None: those of `schedules_of`.
    """
    classifier = classifier or ClassifierSection()
    rates = schedules or schedules_of(config, total_steps, classifier)

    def adamw(rate: optax.Schedule, weight_decay: float | None) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
            optax.scale_by_schedule(_bias_correction_error(config.beta1, config.beta2)),
            optax.add_decayed_weights(config.weight_decay if weight_decay is None else weight_decay, _decaying),
            optax.scale_by_learning_rate(rate),
        )

    transforms = {
        "bypass": adamw(rates["bypass"], None),
        "classifier": adamw(rates["classifier"], classifier.weight_decay),
        "frozen": optax.set_to_zero(),
    }
    partitioned = optax.partition(transforms, labels)
    if config.clip_norm is None:
        return partitioned
    # Masked, so that in a combined tree, too, the norm is that of the trained leaves.
    clip = optax.masked(optax.clip_by_global_norm(config.clip_norm), _trained)
    return optax.chain(clip, partitioned)


def _bias_correction_error(beta1: float, beta2: float) -> optax.Schedule:
    """Return the factor by step that turns optax's updates into those of PyTorch, whose bias corrections are exact.

    optax computes 1 - beta^t in float32. For beta2 = 0.999 the relative error is 1.3e-5 at the first steps, most of the
    difference between our losses and those of the published code.
    """

    def ratio(beta: float, t: jax.Array) -> jax.Array:
        """Return the bias correction of optax divided by the exact one."""
        return (1 - beta**t) / -jnp.expm1(t * (math.log(beta) if beta else -math.inf))

    return lambda count: ratio(beta1, count + 1) / jnp.sqrt(ratio(beta2, count + 1))


def _decaying(tree: dict[str, Any]) -> dict[str, Any]:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "bias", tree)


def _trained(tree: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda label: label != "frozen", labels(tree))
