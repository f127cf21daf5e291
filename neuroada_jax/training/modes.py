"""Modes of parallel training: one class each, with the form of the step that equals the step of one device.

Every mode splits a batch by example, sums losses, label counts and gradients over the devices, and divides once.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from neuroada_jax import console
from neuroada_jax.core import bypass
from neuroada_jax.core.trees import ModulePath, Tree
from neuroada_jax.errors import UserError
from neuroada_jax.models import unrolled
from neuroada_jax.models.losses import label_losses
from neuroada_jax.models.remat import Placement, placed
from neuroada_jax.training import processes, step
from neuroada_jax.training.config import RunConfig, TrainingSection
from neuroada_jax.training.sharding import (
    DATA,
    EXAMPLE_AXES,
    FSDP,
    TENSOR,
    across_processes,
    complete_on,
    mesh_of_process,
    on_first_process,
    pad,
    rule,
    sharding_at,
    shardings,
)
from neuroada_jax.training.step import AnyBatch, RunStep, StepMetrics, TrainState


@dataclasses.dataclass(frozen=True)
class Parallel(abc.ABC):
    """Devices of a run and the form that the training step takes on them; the base class keeps the state replicated.

    Attributes:
      mode: the value of `parallel.mode` that stands for the class.
      mesh: devices along the axes data, fsdp and tensor.
    """

    mode: ClassVar[str]
    mesh: Mesh

    @property
    def shards(self) -> int:
        """The number of devices that get different examples of a batch."""
        return self.mesh.shape[DATA] * self.mesh.shape[FSDP]

    def padded_size(self, training: TrainingSection) -> int:
        """Return `training.batch_size` rounded up until every micro batch of every device has equally many examples."""
        parts = self.shards * training.accumulation
        return -(-training.batch_size // parts) * parts

    def check(self, config: RunConfig) -> None:
        """Check that these devices support a config; needs neither weights nor data.

        Raises:
          UserError: they do not.
        """
        self.padded_size(config.training)

    def slice_of_process(self, training: TrainingSection) -> slice:
        """Return the slice of a padded batch that the devices of this process read."""
        size = self.padded_size(training)
        indices = NamedSharding(self.mesh, PartitionSpec(EXAMPLE_AXES)).addressable_devices_indices_map((size,))
        own = [index[0].indices(size) for index in indices.values() if index]
        return slice(min(start for start, _, _ in own), max(stop for _, stop, _ in own))

    def shardings(self, state: TrainState) -> TrainState:
        """Return the sharding of every array of a train state, real or abstract."""
        return jax.tree.map(lambda _: NamedSharding(self.mesh, PartitionSpec()), state)

    def weight_shardings(self, params: Tree) -> Tree | None:
        """Return the shardings to load a model's weights with; None for the default device, from which `place` copies."""
        return None

    def layers_apart(self, params: Tree, layers_path: ModulePath) -> Tree:
        """Return the weights of a run in the form that its step reads fastest (`models.unrolled`); deletes stacked ones."""
        return unrolled.apart(params, layers_path)

    def place(self, state: TrainState) -> TrainState:
        """Return the state on these devices, which takes the argument over: buffers that are in place already are kept."""
        return self.place_like(state, self.shardings(state))

    def place_like(self, tree: Any, shardings: Any) -> Any:
        """Return a tree with these shardings, as `place` does."""
        if jax.process_count() == 1:
            return jax.device_put(tree, shardings)
        return jax.tree.map(across_processes, tree, shardings)

    def local(self, tree: Any) -> Any:
        """Return this process's own copy of a replicated tree, for single-device work such as evaluation."""
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)

    @property
    def shares_weights(self) -> bool:
        """Whether no process has all weights, so that all have to score the same batch together."""
        return False

    def own(self, tree: Tree) -> Tree:
        """Return a replicated tree as the devices of this process hold it, without a copy, for `spread` batches."""
        if jax.process_count() == 1:
            return tree
        everywhere = NamedSharding(mesh_of_process(self.mesh), PartitionSpec())

        def here(leaf: Array) -> Array:
            shards = [shard.data for shard in leaf.addressable_shards]
            return jax.make_array_from_single_device_arrays(leaf.shape, everywhere, shards)

        return jax.tree.map(here, tree)

    def spread(self, batch: AnyBatch) -> AnyBatch:
        """Return a host batch, padded and split by example over the devices that score it, all or those of this process."""
        mesh = self.mesh if self.shares_weights else mesh_of_process(self.mesh)
        shards = mesh.shape[DATA] * mesh.shape[FSDP]
        padded = pad(batch, -(-len(batch.lengths) // shards) * shards)
        examples = NamedSharding(mesh, PartitionSpec(EXAMPLE_AXES))
        return jax.tree.map(lambda leaf: across_processes(leaf, examples), padded)

    def gathered(self, params: Tree) -> Tree:
        """Return the complete parameters for the first process to save; where processes share them, all have to call it."""
        return self.local(params)

    def unsharded(self, tree: Any) -> Any:
        """Return small trees of the state, such as the values, in a form that every process can read completely."""
        return tree

    def on_host(self, tree: Any) -> Any:
        """Return small trees of the state as NumPy arrays of their own; where processes share them, all have to call it."""

        here = lambda leaf: leaf if leaf.is_fully_addressable else leaf.addressable_data(0)  # noqa: E731
        return jax.tree.map(lambda leaf: np.array(here(leaf)), self.unsharded(tree))

    def by_neuron(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of weight trees, which treats every neuron separately, for weights that may be sharded."""
        return function

    def ahead_of_time(self) -> "Parallel":
        """Return the mode whose program can be compiled for described devices and sends the same bytes as this one."""
        return self

    def make_step(
        self,
        module: nn.Module,
        optimizer: optax.GradientTransformation,
        training: TrainingSection,
        losses: Callable[..., Array] = label_losses,
        dropout_seed: int | None = None,
    ) -> RunStep:
        """Return the step (state, batch) -> (state, metrics) of a placed state and a host batch; the state is donated.

        Devices with different examples use different dropout masks: with dropout, runs on different numbers of devices
        differ as runs with different accumulation do.

        Args:
          module: the model.
          optimizer: transformation of the gradient of the trainable tree.
          training: batch size, and the number of micro batches on each device.
          losses: as in `step.make_sums`.
          dropout_seed: as in `step.make_sums`.
        """
        program = self.program(module, optimizer, training.accumulation, losses, dropout_seed)
        if jax.process_count() > 1:
            program = processes.begun_together(program)
        size, padded = training.batch_size, self.padded_size(training)
        if padded != size:
            console.say(
                f"training.batch_size: {size} examples on {self.shards} devices: every batch is padded with "
                f"{padded - size} empty examples to {padded}"
            )
        return lambda state, batch: program(state, self._distribute(pad(batch, padded)))

    def program(
        self,
        module: nn.Module,
        optimizer: optax.GradientTransformation,
        accumulation: int = 1,
        losses: Callable[..., Array] = label_losses,
        dropout_seed: int | None = None,
    ) -> Any:
        """Return the jitted function of a placed state and a placed batch that `make_step` calls; arguments as there."""
        sums = step.make_sums(module, accumulation, losses, dropout_seed)
        return self._program(sums, step.make_update(optimizer, self.by_neuron(bypass.make_resident)))

    @abc.abstractmethod
    def _program(self, sums: Callable[..., step.Sums], update: Callable[..., Any]) -> Any:
        """Return the jitted step made of its two halves (`step.make_sums`, `step.make_update`)."""

    def abstract(self, state: TrainState, batch: AnyBatch) -> tuple[TrainState, AnyBatch]:
        """Return the shapes of a state and of a padded batch with the shardings that `program` takes; not for pmap."""
        examples = NamedSharding(self.mesh, PartitionSpec(EXAMPLE_AXES))
        with_sharding = lambda leaf, sharding: leaf.update(sharding=sharding)  # noqa: E731
        placed_state = jax.tree.map(with_sharding, state, self.shardings(state))
        return placed_state, jax.tree.map(lambda leaf: with_sharding(leaf, examples), batch)

    def _distribute(self, batch: AnyBatch) -> AnyBatch:
        """Return a padded host batch split by example over the devices."""
        examples = NamedSharding(self.mesh, PartitionSpec(EXAMPLE_AXES))
        return jax.tree.map(lambda leaf: across_processes(leaf, examples), batch)


class SingleDevice(Parallel):
    """One device, whose step is that of `step.make_step`."""

    mode = "single"

    def shardings(self, state: TrainState) -> TrainState:
        # By name: a first state whose sharding differs from that of the step's result would be compiled for separately.
        return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(self.mesh.devices.flat[0]), state)

    def local(self, tree: Any) -> Any:
        return tree

    def spread(self, batch: AnyBatch) -> AnyBatch:
        return batch

    def abstract(self, state: TrainState, batch: AnyBatch) -> tuple[TrainState, AnyBatch]:
        return state, batch

    def _program(self, sums: Callable[..., step.Sums], update: Callable[..., Any]) -> Any:
        return step.jit_step(lambda state, batch: update(state, sums(state, batch)))

    def _distribute(self, batch: AnyBatch) -> AnyBatch:
        return batch


class ShardMap(Parallel):
    """Data parallelism with `jax.shard_map`: every device holds the complete state and its own examples."""

    mode = "shard_map"

    def _program(self, sums: Callable[..., step.Sums], update: Callable[..., Any]) -> Any:
        replicated, examples = PartitionSpec(), PartitionSpec(EXAMPLE_AXES)
        body = _data_parallel(sums, update, self.mesh.size, EXAMPLE_AXES)
        in_specs = (replicated, examples)
        mapped = jax.shard_map(body, mesh=self.mesh, in_specs=in_specs, out_specs=replicated, check_vma=False)
        return step.jit_step(mapped)


class Pmap(Parallel):
    """Data parallelism with `jax.pmap`: every device holds the complete state; batches get a leading axis of devices."""

    mode = "pmap"

    def padded_size(self, training: TrainingSection) -> int:
        """Return `training.batch_size`.

        Raises:
          UserError: the devices and micro batches do not divide it; names the nearest sizes that they divide.
        """
        above = super().padded_size(training)
        if training.batch_size != above:
            below = above - self.shards * training.accumulation
            nearest = " or ".join(str(size) for size in (below, above) if size)
            raise UserError(
                f"training.batch_size: {training.batch_size} examples cannot be divided over {self.shards} devices in "
                f"{training.accumulation} micro batch(es) each (training.accumulation); with parallel.mode: pmap use "
                f"{nearest}, or use another mode, which pads the batch"
            )
        return above

    def shardings(self, state: TrainState) -> TrainState:
        # On a mesh of pmap's single axis, where the step leaves its results: another sharding would compile a second step.
        mesh = Mesh(mesh_of_process(self.mesh).devices.flatten(), (DATA,))
        return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), state)

    def ahead_of_time(self) -> Parallel:
        return ShardMap(self.mesh)

    def _program(self, sums: Callable[..., step.Sums], update: Callable[..., Any]) -> Any:
        body = _data_parallel(sums, update, self.mesh.size, DATA)
        devices = self.mesh.devices.flatten().tolist() if jax.process_count() == 1 else None  # None: those of all processes
        return jax.pmap(body, DATA, in_axes=(None, 0), out_axes=None, devices=devices, donate_argnums=0)

    def _distribute(self, batch: AnyBatch) -> AnyBatch:
        each = step.split(batch, self.shards)
        here = [i for i, device in enumerate(self.mesh.devices.flat) if device.process_index == jax.process_index()]
        return jax.tree.map(lambda leaf: leaf[here], each) if len(here) < self.shards else each


class AutomaticPartitioning(Parallel):
    """`jax.jit` over arrays sharded as `sharding.RULES` says (fsdp, tensor): the compiler inserts the communication."""

    mode = "jit"

    @property
    def shares_weights(self) -> bool:
        return jax.process_count() > 1

    def shardings(self, state: TrainState) -> TrainState:
        return shardings(state, self.mesh)

    def weight_shardings(self, params: Tree) -> Tree | None:
        return shardings(params, self.mesh)

    def layers_apart(self, params: Tree, layers_path: ModulePath) -> Tree:
        # Each layer's weights are gathered into a new array, and the scan keeps one layer's at a time.
        return params

    def local(self, tree: Any) -> Any:
        return tree

    def own(self, tree: Tree) -> Tree:
        return tree

    def gathered(self, params: Tree) -> Tree:
        return on_first_process(params, self.mesh) if self.shares_weights else params

    def unsharded(self, tree: Any) -> Any:
        if all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
            return tree
        return complete_on(self.mesh)(tree)

    def by_neuron(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function under `shard_map`: every device computes its own neurons.

        The compiler's own partitioning would first exchange columns and values between the devices.
        """

        def mapped(*trees: Any) -> Any:
            specs = lambda trees: jax.tree.map(lambda each: each.spec, shardings(trees, self.mesh))  # noqa: E731
            results = specs(jax.eval_shape(function, *trees))
            return jax.shard_map(function, mesh=self.mesh, in_specs=specs(trees), out_specs=results, check_vma=False)(
                *trees
            )

        return jax.jit(mapped)

    def _program(self, sums: Callable[..., step.Sums], update: Callable[..., Any]) -> Any:
        """Return the step in which every layer first gathers its own weights over the fsdp axis.

        The compiler alone would leave the weights where they are and send activations. Each shard of the batch is summed
        separately, by `vmap` (so that its dropout is that of the other modes), and the sums are added once at the end:
        otherwise the compiler reduces every gradient inside the loops that form it.
        """
        mesh, shards = self.mesh, self.shards

        def gather(tree: Any) -> Any:
            return lax.with_sharding_constraint(tree, shardings(tree, mesh, (TENSOR,)))

        def gather_input(x: Array) -> Array:
            # x belongs to one shard of the batch: vmap adds the example axes. Every neuron reads all inputs.
            return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec())) if mesh.shape[TENSOR] > 1 else x

        def gather_outside_layers(path: Any, leaf: Array) -> Array:
            stacked = leaf.ndim > len(rule(path))
            return leaf if stacked else lax.with_sharding_constraint(leaf, sharding_at(path, leaf, mesh, (TENSOR,)))

        def run_step(state: TrainState, batch: AnyBatch) -> tuple[TrainState, StepMetrics]:
            ready = jax.tree_util.tree_map_with_path(gather_outside_layers, state)
            with placed(Placement(gather, gather_input)):
                if shards == 1:
                    total = sums(ready, batch)
                else:
                    of_shard = jax.vmap(lambda shard, part: sums(ready, part, shard), spmd_axis_name=EXAMPLE_AXES)
                    each = of_shard(jnp.arange(shards, dtype=jnp.int32), step.split(batch, shards))
                    total = gather(jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), each))
            new, metrics = update(state, total)
            return lax.with_sharding_constraint(new, shardings(new, mesh)), metrics

        return step.jit_step(run_step)


def _data_parallel(sums: Callable[..., step.Sums], update: Callable[..., Any], shards: int, axis: Any) -> RunStep:
    """Return the program of one device: the sums over its examples, one `psum` of them all, and the complete update.

    It differentiates first and reduces afterwards, so it suits `pmap`, and `shard_map` with check_vma=False: with the check
    on, gradients of replicated inputs arrive already summed, and the psum would count them twice.
    """

    def body(state: TrainState, examples: AnyBatch) -> tuple[TrainState, StepMetrics]:
        shard = lax.axis_index(axis) if shards > 1 else None
        return update(state, lax.psum(sums(state, examples, shard), axis))

    return body


MODES: dict[str, type[Parallel]] = {each.mode: each for each in (SingleDevice, ShardMap, Pmap, AutomaticPartitioning)}
