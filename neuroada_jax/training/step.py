"""The training step: loss at the labels, gradient of the trainable tree alone, update, resident write."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from neuroada_jax.core import bypass, low_rank, platform, trees
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.core.trees import ModulePath, Tree
from neuroada_jax.models import dense_modules
from neuroada_jax.models.losses import label_losses

AnyBatch = Any  # Batch or ClassificationBatch: a tuple of arrays (B, ...) with a `label_mask`
SKIP = -2  # of TrainState.failed_step: non-finite steps are skipped


class TrainState(NamedTuple):
    """Everything that a step reads and writes; the step donates it, so that no array exists twice.

    Attributes:
      step: int32 scalar, the number of updates done.
      trainable: {"bypass": values or low-rank factors}, and with a trained classifier {"classifier": modules}, float32
        (values in the base dtype under `fidelity: official`); the only tree that gradients and optimiser state mirror.
      opt_state: state of the optax transformation.
      params: the frozen weights, resident (base + values at the chosen entries), without the trained classifier.
      columns: int32 columns of the bypass, and where only some of a map's values train, "trained": bool, broadcast to them.
        The others stay zero. Of low-rank factors, their "scale" alone.
      base_entries: the original weights at the chosen entries, in the base dtype.
      failed_step: int32 scalar, the first step whose loss, gradient or updated values were not finite; -1 if there is
        none. Once set, the state is frozen at the last good one. SKIP (-2): non-finite steps are skipped; they advance
        `step` but change neither values nor moments.
    """

    step: Int[Array, ""]
    trainable: Tree
    opt_state: Any
    params: Tree
    columns: Tree
    base_entries: Tree
    failed_step: Int[Array, ""]

    @property
    def bypass(self) -> Bypass:
        """The values trained so far, with their columns."""
        return Bypass(self.trainable["bypass"], self.columns)

    @property
    def classifier(self) -> Tree:
        """The classifier trained so far; empty where none is trained."""
        return self.trainable.get("classifier", {})

    @property
    def tuned(self) -> Tree:
        """The complete parameters of the model as trained so far, without a copy of any weight.

        Connections are in the kernels or, of quantised ones, beside their codes; low-rank factors are beside the kernels.
        """
        params = low_rank.beside(bypass.with_values(self.params, self.bypass), self.bypass)
        return dense_modules.join(params, self.classifier)


class StepMetrics(NamedTuple):
    """Scalars of one step.

    Attributes:
      loss: mean over the labels, in nats (for regression, the mean squared error).
      gradient_norm: global L2 norm before clipping.
      labels: number of labels.
      finite: whether loss, gradient and updated values are finite.
    """

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    labels: Float[Array, ""]
    finite: Bool[Array, ""]


RunStep = Callable[[TrainState, AnyBatch], tuple[TrainState, StepMetrics]]


def initial_state(
    params: Tree,
    built: Bypass,
    optimizer: optax.GradientTransformation,
    classifier: Sequence[ModulePath] = (),
    skip_nonfinite: bool = False,
) -> TrainState:
    """Return the state before the first step. It takes over `params`: the step donates them.

    Args:
      params: complete parameters of the model.
      built: zero values, and the columns; or low-rank factors.
      optimizer: of the trainable tree.
      classifier: paths of the modules that are trained densely; none of them carries a bypass.
      skip_nonfinite: skip steps that are not finite, rather than freeze the state at the first.
    """
    params, modules = dense_modules.split(params, classifier)
    trainable = {"bypass": built.values}
    if modules:
        trainable["classifier"] = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), modules)
    return TrainState(
        step=jnp.int32(0),
        trainable=trainable,
        opt_state=optimizer.init(trainable),
        params=params,
        columns=built.columns,
        base_entries=bypass.read(params, built.columns),
        failed_step=jnp.int32(SKIP if skip_nonfinite else -1),
    )


def split(batch: AnyBatch, parts: int) -> AnyBatch:
    """Return the batch as `parts` micro batches along a new leading axis: (B, ...) -> (parts, B / parts, ...)."""
    return jax.tree.map(lambda leaf: leaf.reshape(parts, leaf.shape[0] // parts, *leaf.shape[1:]), batch)


class Sums(NamedTuple):
    """Sums over the examples of a batch; those of its parts add up to those of the complete batch.

    Attributes:
      loss: over the labels.
      labels: number of labels, float32.
      gradient: of `loss`, in the shape of the trainable tree.
    """

    loss: Float[Array, ""]
    labels: Float[Array, ""]
    gradient: Tree


def make_sums(
    module: nn.Module,
    accumulation: int = 1,
    losses: Callable[..., Array] = label_losses,
    dropout_seed: int | Array | None = None,
    form: str = "resident",
) -> Callable[..., Sums]:
    """Return the first half of a step: (state, batch, shard) -> sums over the examples of a batch or of a part of one.

    `shard`, an int32 scalar or None, is the number of the part where several devices share a batch: each has its own
    dropout mask.

    Args:
      module: the model.
      accumulation: number of micro batches, computed one after the other.
      losses: (module, variables, batch) -> the loss of every label, in the shape of `batch.label_mask`.
      dropout_seed: `losses` also gets `dropout=key`; the key follows from this seed, the step, the micro batch and the
        shard alone, so that a resumed run has the masks of an uninterrupted one. None: it gets no key.
      form: of the linear maps: "resident" where the state's weights hold base + values, "bypass" where they are the base's.
    """

    def loss_sum(trainable: Tree, state: TrainState, shard: Array | None, batch: AnyBatch, part: Array) -> Array:
        params = dense_modules.join(state.params, trainable.get("classifier", {}))
        variables = {"params": params, "columns": state.columns, form: trainable["bypass"]}
        if dropout_seed is None:
            return jnp.sum(losses(module, variables, batch))
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(dropout_seed), state.step), part)
        if shard is not None:
            key = jax.random.fold_in(key, shard)
        return jnp.sum(losses(module, variables, batch, dropout=key))

    def sums(state: TrainState, batch: AnyBatch, shard: Array | None = None) -> Sums:
        labels = jnp.sum(batch.label_mask)
        value_and_grad = jax.value_and_grad(loss_sum)
        if accumulation == 1:
            loss, gradient = value_and_grad(state.trainable, state, shard, batch, jnp.int32(0))
            return Sums(loss, labels, gradient)

        def add(total: tuple[Array, Tree], part: tuple[AnyBatch, Array]) -> tuple[tuple[Array, Tree], None]:
            return jax.tree.map(jnp.add, total, value_and_grad(state.trainable, state, shard, *part)), None

        zeros = (jnp.zeros_like(labels), jax.tree.map(jnp.zeros_like, state.trainable))
        parts = (split(batch, accumulation), jnp.arange(accumulation, dtype=jnp.int32))
        (loss, gradient), _ = lax.scan(add, zeros, parts)
        return Sums(loss, labels, gradient)

    return sums


def _of_trained(gradient: Tree, columns: Tree) -> Tree:
    """Return the gradient of the trainable tree with zeros where a value does not train."""
    values = gradient["bypass"]
    for path, trained in trees.leaves(columns, "trained"):
        own = trees.get(values, path)["values"]
        values = trees.put(values, path, {"values": jnp.where(trained, own, jnp.zeros_like(own))})
    return {**gradient, "bypass": values}


def make_update(
    optimizer: optax.GradientTransformation, write: Callable[[Tree, Bypass, Tree], Tree] = bypass.make_resident
) -> Callable[[TrainState, Sums], tuple[TrainState, StepMetrics]]:
    """Return the second half of a step, (state, sums over the batch) -> (state, metrics): one division, then the update.

    Args:
      optimizer: of the trainable tree.
      write: writes the new values into the resident weights.
    """

    def update(state: TrainState, sums: Sums) -> tuple[TrainState, StepMetrics]:
        divisor = jnp.maximum(sums.labels, 1)
        loss = sums.loss / divisor
        gradient = jax.tree.map(lambda leaf: leaf / divisor.astype(leaf.dtype), sums.gradient)
        gradient = _of_trained(gradient, state.columns)
        norm = optax.tree.norm(gradient)

        with jax.numpy_dtype_promotion("standard"):  # optax's own code mixes int32 counts and float32 in there
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        # The values are checked too: an absurd learning rate overflows them although loss and gradient are finite.
        sound = [jnp.all(jnp.isfinite(leaf)) for leaf in [loss, norm, *jax.tree.leaves(trainable)]]
        finite = jnp.all(jnp.stack(sound))
        good = finite & (state.failed_step < 0)
        # Selecting between the small trees alone is enough: a bad step leaves the last good state behind.
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), (trainable, opt_state), (state.trainable, state.opt_state)
        )
        new = TrainState(
            step=state.step + (good | (state.failed_step == SKIP)).astype(jnp.int32),
            trainable=trainable,
            opt_state=opt_state,
            params=write(state.params, Bypass(trainable["bypass"], state.columns), state.base_entries),
            columns=state.columns,
            base_entries=state.base_entries,
            failed_step=jnp.where((state.failed_step == -1) & ~finite, state.step, state.failed_step),
        )
        return new, StepMetrics(loss, norm, sums.labels, finite)

    return update


def make_step(
    module: nn.Module,
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
    losses: Callable[..., Array] = label_losses,
    dropout_seed: int | None = None,
) -> RunStep:
    """Return the jitted step of one device, (state, batch) -> (state, metrics); the state is donated.

    Accumulation sums losses and label counts over the micro batches and divides once, so that N micro batches give the
    result of the complete batch (apart from dropout, whose masks differ between them). Arguments as in `make_sums`.
    """
    sums, update = make_sums(module, accumulation, losses, dropout_seed), make_update(optimizer)

    def step(state: TrainState, batch: AnyBatch) -> tuple[TrainState, StepMetrics]:
        return update(state, sums(state, batch))

    return jit_step(step)


def jit_step(step: RunStep) -> RunStep:
    """Return the jitted step, (state, batch) -> (state, metrics), with XLA's options for it; the state is donated."""
    return jax.jit(step, donate_argnums=0, compiler_options=platform.step_options())
