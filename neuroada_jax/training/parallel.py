"""One batch on several devices: who holds what, and the forms of the step that add up to the step of one device.

Every form splits a batch by rows, sums losses, target counts and gradients over the devices, and divides once.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from neuroada_jax import console
from neuroada_jax.bypass import Tree
from neuroada_jax.errors import UserError
from neuroada_jax.losses import target_losses
from neuroada_jax.training import step
from neuroada_jax.training.config import ParallelSection, TrainingSection
from neuroada_jax.training.step import AnyBatch, StepMetrics, TrainState

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
SHARDS = (DATA, FSDP)  # the axes that split a batch by rows
RunStep = Callable[[TrainState, AnyBatch], tuple[TrainState, StepMetrics]]


@dataclasses.dataclass(frozen=True)
class Parallel:
    """The devices of a run.

    Attributes:
      mode: "single", "shard_map", "pmap" or "jit".
      mesh: of the axes data, fsdp and tensor.
    """

    mode: str
    mesh: Mesh

    @property
    def shards(self) -> int:
        """The devices that get different rows of a batch."""
        return self.mesh.shape[DATA] * self.mesh.shape[FSDP]

    def filled_rows(self, training: TrainingSection) -> int:
        """The rows of a batch on these devices: `training.batch_size`, and the empty rows that make it divisible.

        Raises:
          UserError: rows that do not divide under pmap; names the nearest sizes that do.
        """
        rows, parts = training.batch_size, self.shards * training.accumulation
        above = -(-rows // parts) * parts
        if self.mode == "pmap" and rows != above:
            nearest = " or ".join(str(size) for size in (above - parts, above) if size)
            raise UserError(
                f"training.batch_size: {rows} rows cannot be shared by {self.shards} devices in {training.accumulation} "
                f"part(s) each (training.accumulation); with parallel.mode: pmap take {nearest}, or another mode, which "
                "fills the batch up"
            )
        return above

    def shardings(self, state: TrainState) -> TrainState:
        """Where every array of a state, real or abstract, is kept."""
        return jax.tree.map(lambda _: NamedSharding(self.mesh, PartitionSpec()), state)

    def place(self, state: TrainState) -> TrainState:
        """The state on these devices. It takes the state over: a buffer that already is where it belongs is kept."""
        return state if self.mode == "single" else jax.device_put(state, self.shardings(state))

    def local(self, tree: Tree) -> Tree:
        """A tree of the state for work that one device does, such as an evaluation."""
        return tree if self.mode in ("single", "jit") else jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)

    def make_step(
        self,
        module: nn.Module,
        optimizer: optax.GradientTransformation,
        training: TrainingSection,
        losses: Callable[..., Array] = target_losses,
        dropout_seed: int | None = None,
    ) -> RunStep:
        """The step (state, batch) -> (state, metrics) of a placed state and a whole batch; the state is donated.

        Where rows are split, every device drops something else: with dropout, runs on different numbers of devices differ
        as runs with different accumulation do.

        Args:
          module: the model.
          optimizer: what updates the trainable tree.
          training: the rows of a batch, and in how many parts each device computes its own.
          losses: as `step.make_sums` takes them.
          dropout_seed: as `step.make_sums` takes it.
        """
        if self.mode == "single":
            return step.make_step(module, optimizer, training.accumulation, losses, dropout_seed)
        sums = step.make_sums(module, training.accumulation, losses, dropout_seed)
        run_step = {"shard_map": shard_map_step, "pmap": pmap_step}[self.mode](sums, step.make_update(optimizer), self.mesh)
        rows = self.filled_rows(training)
        if rows != training.batch_size:
            console.say(
                f"training.batch_size: {training.batch_size} rows on {self.shards} devices: "
                f"{rows - training.batch_size} empty rows fill every batch up to {rows}"
            )
        return lambda state, batch: run_step(state, self._share(fill(batch, rows)))

    def _share(self, batch: AnyBatch) -> AnyBatch:
        """A batch on the devices by rows; for pmap along a new leading axis."""
        if self.mode == "pmap":
            return step.split(batch, self.shards)
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec(SHARDS)))


def layout(section: ParallelSection, platform: str, available: int) -> tuple[str, tuple[int, int, int]]:
    """What a config asks for: the mode, never "auto", and the devices along data, fsdp and tensor.

    CPU devices are several only where somebody asked JAX for virtual ones, to try what GPUs would do: `auto` takes one of
    them, unless `parallel.devices` says how many.

    Args:
      section: of a config.
      platform: of the devices: "cpu", "gpu" or "tpu".
      available: how many there are.

    Raises:
      UserError: more devices than there are, or a number that fsdp and tensor do not divide.
    """
    shared = section.fsdp * section.tensor
    one = section.mode == "single" or (platform == "cpu" and section.mode == "auto" and shared == 1)
    count = section.devices or (1 if one else available)
    mesh = f"{section.fsdp} x {section.tensor}, " if shared > 1 else ""
    if max(count, shared) > available:
        raise UserError(f"parallel: {mesh}a mesh of {max(count, shared)} devices, but there are {available} ({platform})")
    if count % shared:
        raise UserError(f"parallel: {mesh}fsdp times tensor, does not divide {count} devices")
    automatic = "jit" if shared > 1 else "shard_map" if count > 1 else "single"
    return automatic if section.mode == "auto" else section.mode, (count // shared, section.fsdp, section.tensor)


def resolve(section: ParallelSection, available: Sequence[Any] | None = None) -> Parallel:
    """The devices that a config asks for; arguments and errors as in `layout`, of all that JAX sees if not told."""
    available = jax.devices() if available is None else available
    mode, shape = layout(section, available[0].platform, len(available))
    devices = np.array(available[: math.prod(shape)]).reshape(shape)
    return Parallel(mode, Mesh(devices, (DATA, FSDP, TENSOR), axis_types=(AxisType.Auto,) * 3))


def fill(batch: AnyBatch, rows: int) -> AnyBatch:
    """The batch with empty rows below, `rows` in all: no length, no target. Such rows add 0 to every sum."""

    def filled(leaf: np.ndarray) -> np.ndarray:
        return np.pad(leaf, ((0, rows - leaf.shape[0]),) + ((0, 0),) * (leaf.ndim - 1))

    return jax.tree.map(filled, batch)


def _data_parallel(sums: Callable[..., step.Sums], update: Callable[..., Any], shards: int, axis: Any) -> RunStep:
    """What one device does: the sums over its own rows, one reduction of all of them, and the whole update.

    It differentiates and then reduces, so it is for `pmap`, and for `shard_map` without its check of what varies over the
    mesh: under that check, gradients for replicated inputs come out summed already, and would be summed twice.
    """

    def body(state: TrainState, rows: AnyBatch) -> tuple[TrainState, StepMetrics]:
        shard = lax.axis_index(axis) if shards > 1 else None
        return update(state, lax.psum(sums(state, rows, shard), axis))

    return body


def shard_map_step(sums: Callable[..., step.Sums], update: Callable[..., Any], mesh: Mesh) -> RunStep:
    """The data-parallel step of `jax.shard_map`: every device holds the whole state; rows are split by `SHARDS`."""
    whole, rows = PartitionSpec(), PartitionSpec(SHARDS)
    body = _data_parallel(sums, update, mesh.size, SHARDS)
    sharded = jax.shard_map(body, mesh=mesh, in_specs=(whole, rows), out_specs=whole, check_vma=False)
    return jax.jit(sharded, donate_argnums=0)


def pmap_step(sums: Callable[..., step.Sums], update: Callable[..., Any], mesh: Mesh) -> RunStep:
    """The data-parallel step of `jax.pmap`: every device holds the whole state; rows are split along a new first axis."""
    body = _data_parallel(sums, update, mesh.size, DATA)
    devices = mesh.devices.flatten().tolist()
    return jax.pmap(body, DATA, in_axes=(None, 0), out_axes=None, devices=devices, donate_argnums=0)
