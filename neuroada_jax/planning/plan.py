"""What a run will need, before there are weights or a GPU: the run's own step, compiled from shapes alone."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from neuroada_jax import console
from neuroada_jax.core import bypass
from neuroada_jax.core.trees import Tree
from neuroada_jax.data.batches import Batch, ClassificationBatch
from neuroada_jax.errors import UserError, install_line
from neuroada_jax.planning import machines, roofline
from neuroada_jax.planning.collectives import collectives
from neuroada_jax.planning.machines import Compiler, Target
from neuroada_jax.planning.roofline import nbytes
from neuroada_jax.pretrained.load import OpenedModel, open_model
from neuroada_jax.tasks import GLUE
from neuroada_jax.training import checkpoint, connections, modules, objectives, optimizer, parallel, step
from neuroada_jax.training.config import ParallelSection, RunConfig
from neuroada_jax.training.config_file import apply_override, from_dict
from neuroada_jax.training.objectives import Objective
from neuroada_jax.training.step import AnyBatch

# JAX takes this share of a GPU's memory for itself when it starts, and no more, unless it is told otherwise.
JAX_SHARE = 0.75


def plan(config: RunConfig, target: str = "cpu", devices: int | None = None) -> dict[str, Any]:
    """What one step of a run takes on each of `devices` machines of a kind. Reads the model's config only.

    The batch is the longest there can be: every row as long as `data.max_length` lets it be, every position labelled.

    Args:
      config: the run.
      target: one of `targets.NAMES`.
      devices: how many share a batch and, as the config's section `parallel` says, the weights. None: as many as that
        section says, else one.

    Returns: plain data, in the order in which `neuroada plan` shows it. All bytes and FLOPs are those of one device.

      trainable, parameters, trainable_percent  values of the bypass, numbers in the model
      bytes           by kind: weights, bypass (values, columns and base entries), optimizer, batch, temporaries (compiled)
      total_bytes     their sum
      device_memory_bytes, fits
      change_first    the setting to change first where it does not fit, as `section.field=value`; else None
      changes         all that it takes, compiled again to see; with the total in `changed_total_bytes`
      flops           of the matrix products of a step
      bytes_moved     what a step cannot but move: weights once for every matrix product that reads them, the activations
                      that are saved out and in, what is trained in and out
      floor_seconds   the roofline: the longer of flops and bytes_moved at the target's best rates; without collectives
      collectives     by kind ("all-reduce", "all-gather" ...): how often a step issues one, and the bytes of the whole
                      arrays that are summed or gathered; compiled. A ring of n devices sends (n - 1) / n of these bytes
                      from each device, and twice that for an all-reduce
      collective_bytes  of all kinds
      adapter_bytes, checkpoint_bytes  of the tensors in these files
      compiled_for    the target, or "cpu" where the compiler for it is missing
      notes           what a reader should know of these numbers

    Raises:
      UserError: an unknown target, devices that do not make the config's mesh, rows that pmap cannot share, a model or
        target module that is not there, rows longer than the model allows.
    """
    return with_changes(measure(config, target, devices), lambda changes: measure(_with(config, changes), target, devices))


def start_devices(config: RunConfig, devices: int | None = None) -> None:
    """Has JAX start with as many virtual CPU devices as `plan` needs; without effect where it has started already."""
    count = _mesh(config, devices).devices or 1
    if count > 1 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def longest_batch(config: RunConfig, rows: int, is_decoder: bool = True) -> AnyBatch:
    """The shapes of the longest batch there can be with so many rows: of a decoder with a label at every position."""
    if config.data.packing:
        length = config.data.max_length
    elif config.data.buckets:
        # Rows are cut to max_length, so that longer buckets than the first that holds it stay empty.
        fitting = [size for size in config.data.buckets if size >= config.data.max_length]
        length = min(fitting, default=max(config.data.buckets))
    else:
        length = -(-config.data.max_length // 8) * 8

    if not is_decoder:
        return abstract_classification_batch(rows, length, config.data.task)
    return abstract_batch(rows, length, config.data.packing)


def abstract_classification_batch(rows: int, length: int, task: str) -> ClassificationBatch:
    """The shapes of an encoder's batch of a GLUE task."""
    ids, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, length), (rows,)))
    numbers = jax.ShapeDtypeStruct((rows,), jnp.float32)
    leaves: Any = (ids, lengths, ids, numbers if GLUE[task].is_regression else lengths, numbers)
    return ClassificationBatch(*leaves)


def abstract_batch(rows: int, length: int, packed: bool = False) -> Batch:
    """The shapes of a batch with a label at every position."""

    def shape(*sizes: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((rows, *sizes), dtype)

    return Batch(
        input_ids=shape(length),
        lengths=shape(),
        label_positions=shape(length),
        label_ids=shape(length),
        label_mask=shape(length, dtype=jnp.float32),
        positions=shape(length) if packed else None,
    )


def abstract_state(config: RunConfig) -> tuple[OpenedModel, Any, step.TrainState, Objective]:
    """A config's model without weights, its optimiser, the shapes of what training keeps between steps, and its objective.

    Raises:
      UserError: a model or target module that is not there, rows longer than the model allows.
    """
    base_model = open_model(config.model.path, config.model.dtype, config_only=True)
    objective, base_model = objectives.objective(config, base_model)
    modules.check_length(config, base_model.model)
    paths = modules.target_paths(config, base_model.model)
    # The number of steps is a constant in the schedule: it takes no room.
    transformation = optimizer.build(config.optimizer, 1, config.classifier)

    def initial_state(params: Tree) -> step.TrainState:
        built = bypass.build(params, paths, config.bypass.k, dtype=connections.value_dtype(config, base_model.model))
        return step.initial_state(params, built, transformation, classifier)

    # Whether the checkpoint lacks more than the head (BERT's pooler) is only known from its weights.
    classifier = base_model.model.architecture.classifier if config.classifier.train else ()
    return base_model, transformation, jax.eval_shape(initial_state, base_model.model.abstract_params()), objective


def _mesh(config: RunConfig, devices: int | None) -> ParallelSection:
    """The section `parallel` with the number of devices that the plan is for; pmap's program is that of shard_map."""
    section = config.parallel
    count = devices if devices is not None else section.devices or section.fsdp * section.tensor
    if count < 1:
        raise UserError(f"--devices: expected at least 1, found {count}")
    if count > 1 and section.mode == "single":
        raise UserError(f"--devices: {count} devices, but the config says parallel.mode: single")
    return dataclasses.replace(section, devices=count)


def measure(config: RunConfig, target_name: str, devices: int | None) -> dict[str, Any]:
    """The plan of a config as it stands."""
    base_model, transformation, state, objective = abstract_state(config)
    dtype = jnp.dtype(base_model.model.config.dtype).name
    may_be_fused = dtype == "bfloat16" and not config.data.packing  # packed rows need a mask, and cuDNN takes none
    section = _mesh(config, devices)
    parallel.layout(section, "gpu", section.devices or 1)  # its errors come before the timings
    target = machines.find(target_name, dtype)
    compiler = machines.compiler_for(target, section.devices or 1)
    mesh = parallel.resolve(section, compiler.devices)
    rows = mesh.filled_rows(config.training)
    if mesh.mode == "pmap":  # its program, in a form that described devices can be compiled for
        mesh = dataclasses.replace(mesh, mode="shard_map")
    is_decoder = base_model.model.architecture.is_decoder
    whole, batch = (longest_batch(config, count, is_decoder) for count in (rows, rows // mesh.shards))
    module = base_model.model.module(config.training.remat_policy)
    settings = (module, transformation, config.training.accumulation, objective.losses, objective.dropout_seed)

    def trace_part(compiler: Compiler) -> Any:
        """The step of one device on its own rows, with all weights."""
        return compiler.trace(step.make_step(*settings), state, batch)

    began = time.perf_counter()
    part = trace_part(compiler)
    traced = part
    if mesh.mode != "single":
        state, whole = mesh.abstract(state, whole)
        traced = compiler.trace(mesh.program(*settings), state, whole)
    try:
        compiled = compiler.compile(traced)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{config.model.path}: its step cannot be compiled for {compiler.name} ({reason})") from error
    seconds = time.perf_counter() - began
    by_kind = {
        "weights": _own_bytes(state.params),
        "bypass": _own_bytes((state.trainable, state.columns, state.base_entries)),
        "optimizer": _own_bytes(state.opt_state),
        "batch": nbytes(batch),
        "temporaries": machines.temporaries(compiled),
    }
    total = sum(by_kind.values())
    sent = collectives(compiled.as_text()) if mesh.mesh.size > 1 else {}

    none = jax.tree.map(lambda _: False, (state, batch))
    frozen = jax.tree.leaves((none[0]._replace(params=jax.tree.map(lambda _: True, state.params)), none[1]))
    work = roofline.work(part.jaxpr, frozen)
    # XLA's attention spells its matrix products out, cuDNN's is one call.
    spelt_out = trace_part(compiler._replace(flash_attention=False)) if compiler.flash_attention else part
    # Devices along the axis tensor share the products of the same rows.
    tensor = section.tensor
    flops = roofline.work(spelt_out.jaxpr, frozen).flops // tensor
    in_and_out = work.stacked_bytes + _own_bytes((state.trainable, state.opt_state))
    moved = work.weight_bytes // tensor + 2 * in_and_out + _own_bytes((state.columns, state.base_entries))

    trainable, parameters = bypass.count(state.trainable), bypass.count(base_model.model.abstract_params())
    return {
        "name": config.name,
        "model": config.model.path,
        "target": target.name,
        "devices": mesh.mesh.size,
        "mode": mesh.mode,
        "mesh": dict(mesh.mesh.shape),
        "can_share_weights": section.mode in ("auto", "jit") and mesh.mesh.size == mesh.mesh.shape[parallel.DATA] > 1,
        "dtype": dtype,
        "remat": config.training.remat,
        "accumulation": config.training.accumulation,
        "rows": batch.input_ids.shape[0],
        "tokens_per_row": batch.input_ids.shape[1],
        "labelled_per_row": math.prod(batch.label_mask.shape[1:]),
        "trainable": trainable,
        "parameters": parameters,
        "trainable_percent": 100 * trainable / parameters,
        "bytes": by_kind,
        "total_bytes": total,
        "device_memory_bytes": target.memory,
        "fits": total <= target.memory,
        "flops": flops,
        "bytes_moved": moved,
        "floor_seconds": max(flops / target.flops[dtype], moved / target.bandwidth),
        "collectives": {kind: dataclasses.asdict(traffic) for kind, traffic in sent.items()},
        "collective_bytes": sum(traffic.bytes for traffic in sent.values()),
        "adapter_bytes": nbytes((state.trainable, state.columns)),
        "checkpoint_bytes": nbytes(checkpoint.saved(state)),
        "compiled_for": compiler.name,
        "compile_seconds": seconds,
        "attention": "cudnn" if compiler.flash_attention and may_be_fused else "xla",
        "notes": list(_notes(target, compiler, dtype, may_be_fused, mesh.mesh.size, total)),
    }


def _own_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of shapes, which may say how they are split."""
    own = (leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape for leaf in jax.tree.leaves(tree))
    leaves = zip(jax.tree.leaves(tree), own, strict=True)
    return sum(math.prod(shape) * leaf.dtype.itemsize for leaf, shape in leaves)


def _notes(target: Target, compiler: Compiler, dtype: str, may_be_fused: bool, devices: int, total: int) -> Iterator[str]:
    if not target.gpu:
        rate, bandwidth = target.flops[dtype] / 1e9, target.bandwidth / 1e9
        yield f"the floor is at this machine's speed just now: {rate:.0f} GFLOP/s in {dtype}, {bandwidth:.1f} GB/s"
    if target.gpu and compiler.platform == "cpu":
        yield (
            f"compiled for this CPU, since JAX's CUDA plugin is not installed ({install_line('cuda')}): the "
            f"temporaries on {target.name} will differ, and be several times smaller in bfloat16, which a CPU widens"
        )
    elif target.gpu and may_be_fused and not compiler.flash_attention:
        yield (
            "cuDNN is not installed (nvidia-cudnn-cu12): attention is compiled in XLA's own form, which keeps all scores "
            "of a layer; the flash attention that a run uses needs less"
        )
    if target.gpu and JAX_SHARE * target.memory < total <= target.memory:
        yield (
            f"JAX takes {JAX_SHARE:.0%} of a GPU's memory: set XLA_PYTHON_CLIENT_MEM_FRACTION to "
            f"{min(total / target.memory + 0.03, 0.98):.2f} or more"
        )
    if devices > 1 and compiler.platform == "cpu" and dtype == "bfloat16":
        yield "compiled for this CPU, which may send bfloat16 arrays as float32, and so twice what a GPU sends of them"


def with_changes(plan: dict[str, Any], measure: Callable[[list[str]], dict[str, Any]]) -> dict[str, Any]:
    """The plan with what to change where it does not fit: what costs least first, and only what can help.

    Args:
      plan: of a config as it stands.
      measure: the plan of the config with some `section.field=value` applied.
    """
    current, changes = plan, {}
    while not current["fits"] and (change := _next_change(current)):
        changes[change.partition("=")[0]] = change
        current = measure(list(changes.values()))
        console.say(f"with {' '.join(changes.values())}: {console.size(current['total_bytes'])}")
    first = next(iter(changes.values()), None)
    if not current["fits"]:
        first = "model.path" if _state_alone_is_too_much(current) else first or "data.max_length"
    changed_total = current["total_bytes"] if changes else None
    return plan | {"change_first": first, "changes": list(changes.values()), "changed_total_bytes": changed_total}


def _state_alone_is_too_much(plan: dict[str, Any]) -> bool:
    return plan["total_bytes"] - plan["bytes"]["temporaries"] > plan["device_memory_bytes"]


def _next_change(plan: dict[str, Any]) -> str | None:
    narrower = "model.dtype=bfloat16" if plan["dtype"] == "float32" else None
    if _state_alone_is_too_much(plan):
        return f"parallel.fsdp={plan['devices']}" if plan["can_share_weights"] else narrower
    if plan["remat"] != "full":
        return "training.remat=full"
    finer = [parts for parts in range(2 * plan["accumulation"], plan["rows"] + 1) if plan["rows"] % parts == 0]
    return f"training.accumulation={finer[0]}" if finer else narrower


def _with(config: RunConfig, changes: list[str]) -> RunConfig:
    content = dataclasses.asdict(config)
    for change in changes:
        apply_override(content, change)
    return from_dict(content, "plan")


def print_plan(plan: dict[str, Any]) -> None:
    """The plan as a table, with its notes below."""
    size, by_kind = console.size, plan["bytes"]
    per = " per device" if plan["devices"] > 1 else ""
    rows = [
        ("parameters", f"{plan['parameters']:,}"),
        ("trained values", f"{plan['trainable']:,} ({plan['trainable_percent']:.4f} %)"),
        (f"batch{per}", f"{plan['rows']} rows in {plan['accumulation']} part(s), {plan['tokens_per_row']} tokens each"),
        ("labels, assumed", f"{plan['labelled_per_row']} a row"),
        (f"weights, {plan['dtype']}", size(by_kind["weights"])),
        ("bypass: values, columns, base entries", size(by_kind["bypass"])),
        ("optimiser", size(by_kind["optimizer"])),
        ("batch", size(by_kind["batch"])),
        (f"activations and temporaries, remat {plan['remat']}", size(by_kind["temporaries"])),
        (f"total{per}", size(plan["total_bytes"])),
        (f"memory of {plan['target']}", size(plan["device_memory_bytes"])),
        ("fits", "yes" if plan["fits"] else "no"),
    ]
    if plan["change_first"]:
        rows.append(("change first", plan["change_first"]))
    if plan["changes"]:
        rows.append((f"total with {' '.join(plan['changes'])}", size(plan["changed_total_bytes"])))
    rows += [
        ("matrix products", f"{plan['flops'] / 1e12:.3f} TFLOP"),
        ("memory traffic, at least", size(plan["bytes_moved"])),
        ("floor of a step (roofline)", f"{plan['floor_seconds']:.4g} s"),
        *(
            (f"{kind} between devices", f"{size(traffic['bytes'])} in {traffic['count']}")
            for kind, traffic in plan["collectives"].items()
        ),
        ("adapter on disk", size(plan["adapter_bytes"])),
        ("checkpoint on disk", size(plan["checkpoint_bytes"])),
        ("compiled for", f"{plan['compiled_for']}, in {plan['compile_seconds']:.0f} s"),
    ]
    console.table(f"one step of {plan['name']} on {plan['devices']} x {plan['target']}", ("", ""), rows)
    for note in plan["notes"]:
        console.say(f"note: {note}")
