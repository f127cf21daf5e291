"""Memory, traffic and time of a run before there are weights or a GPU: its own step, compiled from shapes alone."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from neuroada_jax.adapters.inspection import INDEX_BYTES
from neuroada_jax.core import bypass, platform, trees
from neuroada_jax.errors import UserError, install_line
from neuroada_jax.models import unrolled
from neuroada_jax.planning import machines, roofline
from neuroada_jax.planning.changes import with_changes
from neuroada_jax.planning.collectives import collectives
from neuroada_jax.planning.machines import Compiler, Machine
from neuroada_jax.planning.result import Footprint, Plan
from neuroada_jax.planning.roofline import nbytes
from neuroada_jax.planning.shapes import AbstractRun, abstract_run, longest_batch
from neuroada_jax.training import checkpoint, modules, parallel, step
from neuroada_jax.training.classification_objective import Classification
from neuroada_jax.training.config import ParallelSection, RunConfig
from neuroada_jax.training.config_file import apply_override, from_dict
from neuroada_jax.training.modes import Parallel, SingleDevice
from neuroada_jax.training.sharding import DATA
from neuroada_jax.training.step import AnyBatch, TrainState

JAX_SHARE = 0.75  # of a GPU's memory, which JAX allocates when it starts unless it is configured otherwise


def plan(config: RunConfig, machine: str = "cpu", devices: int | None = None) -> Plan:
    """Return the plan of one step of a run, with changes that make it fit if it does not; reads the model's config only.

    The batch is the longest possible: every example has the length that `data.max_length` allows, every position a label.

    Args:
      config: the run.
      machine: one of `machines.NAMES`.
      devices: how many devices share a batch and, as the config's section `parallel` says, the weights. None: as many as
        that section says, else one.

    Raises:
      UserError: an unknown machine, devices that do not fit the config's mesh, a batch that pmap cannot divide, a model or
        target that does not exist, examples longer than the model allows.
    """

    def with_settings(settings: Sequence[str]) -> Plan:
        content = dataclasses.asdict(config)
        for setting in settings:
            apply_override(content, setting)
        return measure(from_dict(content, "plan"), machine, devices)

    return with_changes(measure(config, machine, devices), with_settings)


def start_devices(config: RunConfig, devices: int | None = None) -> None:
    """Make JAX start with as many virtual CPU devices as `plan` needs; no effect once JAX has started."""
    count = _section(config, devices).devices or 1
    if count > 1 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def _section(config: RunConfig, devices: int | None) -> ParallelSection:
    """Return the section `parallel` with the number of devices that the plan is for."""
    section = config.parallel
    count = devices if devices is not None else section.devices or section.fsdp * section.tensor
    if count < 1:
        raise UserError(f"--devices: expected at least 1, found {count}")
    if count > 1 and section.mode == "single":
        raise UserError(f"--devices: parallel.mode: single of the config uses 1, found {count}")
    return dataclasses.replace(section, devices=count)


def measure(config: RunConfig, machine_name: str, devices: int | None) -> Plan:
    """Return the plan of a config as it stands; arguments and errors as in `plan`."""
    run = abstract_run(config)
    opened = run.opened
    dtype = jnp.dtype(opened.model.config.dtype).name
    section = _section(config, devices)
    parallel.layout(section, "gpu", section.devices or 1)  # raises its errors before the CPU is timed
    machine = machines.find(machine_name, dtype)
    compiler = machines.compiler_for(machine, section.devices or 1)
    mode = parallel.resolve(section, compiler.devices)
    program = _compile(config, run, mode, compiler)
    state, batch = program.state, program.batch
    memory = Footprint(
        weights=_device_bytes(state.params),
        bypass=_device_bytes((state.trainable, state.columns, state.base_entries)),
        optimizer=_device_bytes(state.opt_state),
        batch=nbytes(batch),
        temporaries=machines.temporaries(program.compiled),
    )
    flops, bytes_moved = _work(program, section.tensor)
    fusible = dtype == "bfloat16" and not config.data.packing  # cuDNN's attention takes no mask, which packing needs
    count, mesh = mode.mesh.size, dict(mode.mesh.shape)
    return Plan(
        name=config.name,
        model=config.model.path,
        method=config.method,
        machine=machine,
        devices=count,
        mode=mode.ahead_of_time().mode,
        mesh=mesh,
        can_share_weights=section.mode in ("auto", "jit") and count == mesh[DATA] > 1,
        dtype=dtype,
        remat=config.training.remat,
        accumulation=config.training.accumulation,
        examples=batch.input_ids.shape[0],
        tokens=batch.input_ids.shape[1],
        labels=math.prod(batch.label_mask.shape[1:]),
        trainable=modules.count_trained(config, opened.model, state.trainable["bypass"]) + bypass.count(state.classifier),
        parameters=bypass.count(opened.model.abstract_params()),
        memory=memory,
        flops=flops,
        bytes_moved=bytes_moved,
        collectives=collectives(program.compiled.as_text()) if count > 1 else {},
        adapter_bytes=nbytes(state.trainable) + _index_bytes(state),
        checkpoint_bytes=nbytes(checkpoint.saved(state)),
        compiled_for=compiler.name,
        compile_seconds=program.seconds,
        attention="cudnn" if compiler.flash_attention and fusible else "xla",
        notes=tuple(_notes(machine, compiler, dtype, fusible, count, memory.total)),
    )


class _Program(NamedTuple):
    """A run's step, traced and compiled.

    Attributes:
      state: shapes and shardings of the train state.
      batch: shapes of the examples of one device.
      local: trace of one device's step on these examples with unsharded weights, for the roofline.
      frozen: whether each flat argument of `local` is a weight.
      unfused: the same with attention as matrix products of XLA, which can be counted; cuDNN's attention is one call.
      compiled: the step on all devices.
      seconds: time of tracing and compiling.
    """

    state: TrainState
    batch: AnyBatch
    local: Any
    frozen: list[bool]
    unfused: Any
    compiled: Any
    seconds: float


def _compile(config: RunConfig, run: AbstractRun, mode: Parallel, compiler: Compiler) -> _Program:
    """Trace and compile the step of a run.

    Raises:
      UserError: the batch cannot be divided over the devices, or the step cannot be compiled.
    """
    size = mode.padded_size(config.training)
    mode = mode.ahead_of_time()
    model, state = run.opened.model, run.state
    task = run.objective.task if isinstance(run.objective, Classification) else None
    batch, own_batch = (longest_batch(config, examples, task) for examples in (size, size // mode.shards))
    module, objective = model.module(config.training.remat_policy), run.objective
    settings = (module, run.transformation, config.training.accumulation, objective.losses, objective.dropout_seed)

    def trace_local(compiler: Compiler) -> Any:
        return compiler.trace(step.make_step(*settings), run.state, own_batch)

    # The work is counted with stacked layers, in which a loop says what it keeps.
    began = time.perf_counter()
    local = traced = trace_local(compiler)
    with platform.tracing_for(compiler.platform, flash_attention=compiler.flash_attention):
        state = state._replace(params=mode.layers_apart(state.params, model.layers_path))
    if not isinstance(mode, SingleDevice) or unrolled.is_apart(state.params):
        state, batch = mode.abstract(state, batch)
        traced = compiler.trace(mode.program(*settings), state, batch)
    try:
        compiled = compiler.compile(traced)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{config.model.path}: its step cannot be compiled for {compiler.name} ({reason})") from error
    seconds = time.perf_counter() - began
    unfused = trace_local(compiler._replace(flash_attention=False)) if compiler.flash_attention else local
    frozen = jax.tree.map(lambda _: False, run.state)._replace(params=jax.tree.map(lambda _: True, run.state.params))
    leaves = jax.tree.leaves((frozen, jax.tree.map(lambda _: False, own_batch)))
    return _Program(state, own_batch, local, leaves, unfused, compiled, seconds)


def _work(program: _Program, tensor: int) -> tuple[int, int]:
    """Return the FLOPs and the memory traffic of one device in a step; `tensor` devices share each matrix product."""
    state = program.state
    work = roofline.work(program.local.jaxpr, program.frozen)
    flops = roofline.work(program.unfused.jaxpr, program.frozen).flops // tensor
    read_and_written = work.stacked_bytes + _device_bytes((state.trainable, state.opt_state))
    read = work.weight_bytes // tensor + _device_bytes((state.columns, state.base_entries))
    return flops, read + 2 * read_and_written


def _index_bytes(state: TrainState) -> int:
    """Return the bytes of the columns in an adapter's file, which has them for every value."""
    return INDEX_BYTES * sum(leaf.size for _, leaf in trees.leaves(state.trainable["bypass"], "values"))


def _device_bytes(tree: Any) -> int:
    """Return the bytes that one device holds of a tree of shapes, which may have shardings."""
    leaves = jax.tree.leaves(tree)
    shapes = (leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape for leaf in leaves)
    return sum(math.prod(shape) * leaf.dtype.itemsize for leaf, shape in zip(leaves, shapes, strict=True))


def _notes(machine: Machine, compiler: Compiler, dtype: str, fusible: bool, devices: int, total: int) -> Iterator[str]:
    """Yield the notes of a plan; `fusible` says whether cuDNN could compute the attention."""
    if not machine.gpu:
        rate, bandwidth = machine.flops[dtype] / 1e9, machine.bandwidth / 1e9
        yield f"the floor uses the speed of this CPU as measured now: {rate:.0f} GFLOP/s in {dtype}, {bandwidth:.1f} GB/s"
    if machine.gpu and compiler.platform == "cpu":
        yield (
            f"compiled for this CPU, since JAX's CUDA plugin is not installed ({install_line('cuda')}): the temporaries on "
            f"{machine.name} will differ, and in bfloat16, which a CPU widens, be several times smaller"
        )
    elif machine.gpu and fusible and not compiler.flash_attention:
        yield (
            "cuDNN is not installed (nvidia-cudnn-cu12): attention is compiled in XLA's own form, which keeps all scores "
            "of a layer; the flash attention of a run needs less memory"
        )
    if machine.gpu and JAX_SHARE * machine.memory < total <= machine.memory:
        yield (
            f"JAX allocates {JAX_SHARE:.0%} of a GPU's memory: set XLA_PYTHON_CLIENT_MEM_FRACTION to "
            f"{min(total / machine.memory + 0.03, 0.98):.2f} or more"
        )
    if devices > 1 and compiler.platform == "cpu" and dtype == "bfloat16":
        yield "compiled for this CPU, which may send bfloat16 arrays as float32: twice the bytes that a GPU sends"
