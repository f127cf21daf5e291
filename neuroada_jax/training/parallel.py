"""One batch on several devices: who holds what, and the forms of the step that add up to the step of one device.

Every form splits a batch by rows, sums losses, target counts and gradients over the devices, and divides once.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from neuroada_jax import console
from neuroada_jax.core import bypass
from neuroada_jax.core.trees import Tree
from neuroada_jax.errors import UserError
from neuroada_jax.models.losses import label_losses
from neuroada_jax.models.remat import Placement, placed
from neuroada_jax.training import step
from neuroada_jax.training.config import ParallelSection, RunConfig, TrainingSection
from neuroada_jax.training.step import AnyBatch, StepMetrics, TrainState

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
SHARDS = (DATA, FSDP)  # the axes that split a batch by rows
NEURONS = (TENSOR, FSDP)  # the axes that split weights by neuron: gathering over fsdp then leaves whole blocks

# How mode jit keeps an array: the first pattern that its path in the state fits gives the spec of its last axes. A stacked
# leaf has its layers before them, whole. Norms are small, and kept whole.
TABLE = (
    ("*[nN]orm*", PartitionSpec()),
    ("*/kernel", PartitionSpec(NEURONS, None)),
    ("*/embedding", PartitionSpec(NEURONS, None)),
    ("*/bias", PartitionSpec(NEURONS)),
    ("*/values", PartitionSpec(NEURONS, None)),
    ("*/columns", PartitionSpec(NEURONS, None)),
    ("*/base_entries", PartitionSpec(NEURONS, None)),
    ("*", PartitionSpec()),
)
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

    def check(self, config: RunConfig) -> None:
        """Raises UserError for what a config cannot have on these devices; needs no weights and no data."""
        self.filled_rows(config.training)
        if jax.process_count() == 1:
            return
        if config.training.save_every is not None:
            raise UserError("training.save_every: several processes save no checkpoints yet; leave it out")
        if self.mode == "jit" and (config.evaluation.sets or config.merge):
            field = "evaluation.sets" if config.evaluation.sets else "merge"
            raise UserError(f"{field}: several processes that share the weights cannot do that; use the adapter afterwards")

    def own_rows(self, training: TrainingSection) -> slice:
        """The rows of a batch that the devices of this process read."""
        every = NamedSharding(self.mesh, PartitionSpec(SHARDS)).addressable_devices_indices_map(
            (self.filled_rows(training),)
        )
        own = [index[0].indices(self.filled_rows(training)) for index in every.values() if index]
        return slice(min(start for start, _, _ in own), max(stop for _, stop, _ in own))

    def shardings(self, state: TrainState) -> TrainState:
        """Where every array of a state, real or abstract, is kept."""
        if self.mode == "jit":
            return shardings(state, self.mesh)
        # The first state has to be where the step leaves those that follow, or it would be compiled for by itself: on its
        # one device by name, and for pmap on a mesh of its one axis.
        if self.mode == "single":
            return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(self.mesh.devices.flat[0]), state)
        mesh = Mesh(self.mesh.devices.flatten(), (DATA,)) if self.mode == "pmap" else self.mesh
        return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), state)

    def weights(self, params: Tree) -> Tree | None:
        """Where a model's weights are read to; None for the default device, from which `place` copies them."""
        return shardings(params, self.mesh) if self.mode == "jit" else None

    def place(self, state: TrainState) -> TrainState:
        """The state on these devices. It takes the state over: a buffer that already is where it belongs is kept."""
        if jax.process_count() == 1:
            return jax.device_put(state, self.shardings(state))
        return jax.tree.map(_on_all_processes, state, self.shardings(state))

    def local(self, tree: Tree) -> Tree:
        """A tree of the state for work that one device does, such as an evaluation."""
        return tree if self.mode in ("single", "jit") else jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)

    def make_step(
        self,
        module: nn.Module,
        optimizer: optax.GradientTransformation,
        training: TrainingSection,
        losses: Callable[..., Array] = label_losses,
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
        program = self.program(module, optimizer, training.accumulation, losses, dropout_seed)
        if self.mode == "single":
            return program
        rows = self.filled_rows(training)
        if rows != training.batch_size:
            console.say(
                f"training.batch_size: {training.batch_size} rows on {self.shards} devices: "
                f"{rows - training.batch_size} empty rows fill every batch up to {rows}"
            )
        return lambda state, batch: program(state, self._share(fill(batch, rows)))

    def program(
        self,
        module: nn.Module,
        optimizer: optax.GradientTransformation,
        accumulation: int = 1,
        losses: Callable[..., Array] = label_losses,
        dropout_seed: int | None = None,
    ) -> Any:
        """What `make_step` runs: the jitted function of a placed state and a placed batch; arguments as in `make_step`."""
        if self.mode == "single":
            return step.make_step(module, optimizer, accumulation, losses, dropout_seed)
        sums = step.make_sums(module, accumulation, losses, dropout_seed)
        form = {"shard_map": shard_map_step, "pmap": pmap_step, "jit": jit_step}[self.mode]
        return form(sums, step.make_update(optimizer, self.by_neuron(bypass.make_resident)), self.mesh)

    def abstract(self, state: TrainState, batch: AnyBatch) -> tuple[TrainState, AnyBatch]:
        """The shapes of a state and of a whole batch as `program` takes them; not for pmap."""
        rows = NamedSharding(self.mesh, PartitionSpec(SHARDS))
        placed = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), state, self.shardings(state))
        return placed, jax.tree.map(lambda leaf: leaf.update(sharding=rows), batch)

    def by_neuron(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which treats every neuron by itself, of trees of weights that may be split by neuron.

        Every device computes its own. Left to the compiler, they would first send one another columns and values.
        """
        if self.mode != "jit":
            return function

        def mapped(*trees: Any) -> Any:
            spec = lambda trees: jax.tree.map(lambda each: each.spec, shardings(trees, self.mesh))  # noqa: E731
            results = spec(jax.eval_shape(function, *trees))
            return jax.shard_map(function, mesh=self.mesh, in_specs=spec(trees), out_specs=results, check_vma=False)(*trees)

        return jax.jit(mapped)

    def _share(self, batch: AnyBatch) -> AnyBatch:
        """A batch on the devices by rows; for pmap along a new leading axis."""
        if self.mode == "pmap":
            return step.split(batch, self.shards)
        rows = NamedSharding(self.mesh, PartitionSpec(SHARDS))
        return jax.tree.map(lambda leaf: _on_all_processes(leaf, rows), batch)

    def whole(self, tree: Any) -> Any:
        """Small trees of the state, such as the values, as every process can read them whole."""
        if self.mode != "jit" or jax.process_count() == 1:
            return tree
        return jax.jit(lambda tree: tree, out_shardings=NamedSharding(self.mesh, PartitionSpec()))(tree)


def _on_all_processes(leaf: Any, sharding: NamedSharding) -> Array:
    """An array whose parts each process puts on its own devices, from a copy that has at least these parts right."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf if leaf.sharding.is_equivalent_to(sharding, leaf.ndim) else jax.device_put(leaf, sharding)
    here = np.asarray(leaf)
    return jax.make_array_from_callback(here.shape, sharding, lambda index: here[index])


def layout(section: ParallelSection, platform: str, available: int, processes: int = 1) -> tuple[str, tuple[int, int, int]]:
    """What a config asks for: the mode, never "auto", and the devices along data, fsdp and tensor.

    CPU devices are several only where somebody asked JAX for virtual ones, to try what GPUs would do: `auto` takes one of
    them, unless `parallel.devices` says how many.

    Args:
      section: of a config.
      platform: of the devices: "cpu", "gpu" or "tpu".
      available: how many there are, in all processes.
      processes: of the run. Several use all of their devices.

    Raises:
      UserError: more devices than there are, or a number that fsdp and tensor do not divide; a mode that several processes
        cannot have.
    """
    shared = section.fsdp * section.tensor
    if processes > 1 and section.mode in ("single", "pmap"):
        raise UserError(
            f"parallel.mode: {section.mode} is for one process, and there are {processes}; take shard_map or jit"
        )
    if processes > 1 and section.devices not in (None, available):
        raise UserError(f"parallel.devices: {processes} processes use all of their {available} devices; leave it out")
    virtual = platform == "cpu" and processes == 1
    one = section.mode == "single" or (virtual and section.mode == "auto" and shared == 1)
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
    processes = jax.process_count() if available is None else 1
    available = jax.devices() if available is None else available
    mode, shape = layout(section, available[0].platform, len(available), processes)
    devices = np.array(available[: math.prod(shape)]).reshape(shape)
    return Parallel(mode, Mesh(devices, (DATA, FSDP, TENSOR), axis_types=(AxisType.Auto,) * 3))


def shardings(tree: Any, mesh: Mesh, axes: tuple[str, ...] = NEURONS) -> Any:
    """Where `TABLE` keeps every array of a tree, real or abstract, with neurons split over `axes` alone.

    Neurons that cannot be split evenly are split over fewer of the axes, or not at all.
    """

    return jax.tree_util.tree_map_with_path(lambda path, leaf: _sharding(path, leaf, mesh, axes), tree)


def _sharding(path: Any, leaf: Any, mesh: Mesh, axes: tuple[str, ...]) -> NamedSharding:
    spec = _rule(path)
    if NEURONS not in spec or not leaf.ndim:
        return NamedSharding(mesh, PartitionSpec())
    first = leaf.ndim - len(spec)
    neurons = leaf.shape[first + spec.index(NEURONS)]
    for chosen in (axes, *((axis,) for axis in axes), ()):
        if neurons % math.prod(mesh.shape[axis] for axis in chosen) == 0:
            break
    return NamedSharding(mesh, PartitionSpec(*(None,) * first, *(chosen if axis else None for axis in spec)))


def _rule(path: Any) -> PartitionSpec:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return next(spec for pattern, spec in TABLE if fnmatch.fnmatchcase(f"/{name}", pattern))


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


def jit_step(sums: Callable[..., step.Sums], update: Callable[..., Any], mesh: Mesh) -> RunStep:
    """The step of `jax.jit` on arrays that are split as `TABLE` says: the compiler moves what has to move.

    Left to itself it would compute where the weights are, and send activations instead. Here every layer first gathers its
    own weights over the axis fsdp. Sums are taken of each part of the batch by itself (by `vmap`, so that dropout is that
    of the other forms) and added up at the end: else the compiler reduces every gradient inside of the loops that form it.
    """
    shards = mesh.shape[DATA] * mesh.shape[FSDP]

    def gathered(tree: Any) -> Any:
        return lax.with_sharding_constraint(tree, shardings(tree, mesh, (TENSOR,)))

    def whole_input(x: Array) -> Array:
        # Of one part of the batch: vmap adds the axes that split the rows. Neurons read all inputs.
        return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec())) if mesh.shape[TENSOR] > 1 else x

    def gather_outside_layers(path: Any, leaf: Array) -> Array:
        stacked = leaf.ndim > len(_rule(path))
        return leaf if stacked else lax.with_sharding_constraint(leaf, _sharding(path, leaf, mesh, (TENSOR,)))

    def run_step(state: TrainState, batch: AnyBatch) -> tuple[TrainState, StepMetrics]:
        ready = jax.tree_util.tree_map_with_path(gather_outside_layers, state)
        parts = step.split(batch, shards)
        with placed(Placement(gathered, whole_input)):
            if shards == 1:
                total = sums(ready, batch)
            else:
                one_part = lambda rows, shard: sums(ready, rows, shard)  # noqa: E731
                every = jax.vmap(one_part, spmd_axis_name=SHARDS)(parts, jnp.arange(shards, dtype=jnp.int32))
                total = gathered(jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), every))
        new, metrics = update(state, total)
        return lax.with_sharding_constraint(new, shardings(new, mesh)), metrics

    return jax.jit(run_step, donate_argnums=0)
