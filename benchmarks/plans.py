"""Bytes of compiled training steps, from shapes alone: nothing is allocated, run or timed, and no GPU is needed.

    make bench-memory     python -m benchmarks.plans memory     LLaMA-7B and Llama-3-8B by method, compiled for this CPU
    make bench-devices    python -m benchmarks.plans devices    LLaMA-7B to 70B on 1, 8 and 64 H100s

`memory --machine h100` compiles the methods for an H100. The rows of this library are those of `neuroada plan`; weights are
bfloat16, every position is labelled, the optimiser is AdamW.

memory: all methods except full fine-tuning adapt the seven linear maps of every layer. `peak_bytes` is the sum of `bytes`:
a step's arguments (weights, adapter, optimiser state, batch) and the compiler's own figure for temporaries.

    neuroada-jax         the library's step; values and moments are float32
    LoRA                 the library's step with `method: lora`; factors and moments are float32
    autodiff scatter     the published formulation under plain autodiff; values and moments are float32
    mask-based NeuroAda  complete kernels train, gradients times a boolean mask; moments in bfloat16, as PyTorch has them
    full fine-tuning     every weight; moments in bfloat16

XLA computes bfloat16 products in float32 on most CPUs: a CPU's temporaries hold float32 copies that a GPU does not need.

devices: each device has `--rows` rows of `--length` tokens under full remat (where `tensor` devices share the outputs of
every layer, all of them work on that many times as many rows).
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import baselines, common
from benchmarks.baselines import ADAMW, Baseline
from benchmarks.common import Column, Row
from benchmarks.methods import FULL, MASKED, MODELS, OURS, SCATTER, targets
from neuroada_jax import console, models
from neuroada_jax.errors import install_line
from neuroada_jax.models import Remat
from neuroada_jax.planning import plan, shapes
from neuroada_jax.planning.machines import Compiler, compiler_for, find, temporaries
from neuroada_jax.planning.roofline import nbytes
from neuroada_jax.training import config_file

DTYPE = "bfloat16"
LENGTH = 512
MEMORY_COLUMNS = (
    Column("method", "method"),
    Column("k", "k"),
    Column("rank", "rank"),
    Column("model", "model"),
    Column("batch", "shape", lambda shape: " x ".join(map(str, shape))),
    Column("remat", "remat"),
    Column("trained", "trained", "{:,}".format),
    Column("total", "peak_bytes", console.size),
    Column("temporaries", "bytes", lambda kinds: console.size(kinds["temporaries"])),
    Column("/full", "ratio_to_full", "{:.2f}".format),
)
DEVICES_COLUMNS = (
    Column("model", "model"),
    Column("k", "k"),
    Column("devices", "devices"),
    Column("fsdp", "fsdp"),
    Column("tensor", "tensor"),
    Column("a device", "total_bytes", console.size),
    Column("of it weights", "weight_bytes", console.size),
    Column("summed", "summed_bytes", console.size),
    Column("gathered", "gathered_bytes", console.size),
    Column("collectives", "count"),
)


class Setting(NamedTuple):
    """A training step of this library, to be planned; with a rank, of LoRA."""

    model: str
    k: int
    rows: int  # of all devices
    length: int = LENGTH
    remat: str = "full"
    devices: int = 1
    fsdp: int = 1
    tensor: int = 1
    rank: int | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table and save its JSON file; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    each = {name: commands.add_parser(name) for name in ("memory", "devices")}
    for command in each.values():
        common.add_output(command)
        command.add_argument(
            "--machine", dest="compiled_for", default="h100", choices=["cpu", "h100"], help="to compile for"
        )
    for name, chosen in (("memory", ["llama-7b", "llama-3-8b"]), ("devices", ["llama-7b", "llama-13b", "llama-3-70b"])):
        each[name].add_argument("--models", nargs="+", default=chosen, choices=MODELS, metavar="MODEL")
        each[name].add_argument("--k", type=int, nargs="+", default=[1, 20])
        each[name].add_argument("--length", type=int, default=LENGTH)
    each["memory"].set_defaults(compiled_for="cpu")
    each["memory"].add_argument("--batch", type=int, nargs="+", default=[16, 2], help="rows")
    each["memory"].add_argument("--ranks", type=int, nargs="+", default=[8, 32], help="of LoRA")
    remats = [remat.value for remat in Remat]
    each["memory"].add_argument("--remat", nargs="+", default=["none", "full"], choices=remats)
    each["devices"].add_argument("--devices", type=int, nargs="+", default=[1, 8, 64])
    each["devices"].add_argument("--rows", type=int, default=2, help="of each device")
    settings = parser.parse_args(arguments)

    jax.config.update("jax_platforms", "cpu")  # a GPU's compiler needs no GPU, and arrays would take its memory
    return {"memory": memory, "devices": devices}[settings.command](settings)


def memory(settings: argparse.Namespace) -> int:
    """Save memory.json (or memory-MACHINE.json): the steps of every model, batch and remat policy by method."""
    compiler = installed_compiler(settings.compiled_for)
    baseline_of: list[tuple[str, int | None, int | None, Baseline | None]] = [(FULL, None, None, baselines.full())]
    baseline_of += [(OURS, k, None, None) for k in settings.k]
    first = settings.k[0]  # what does not depend on k appears once
    baseline_of.append((SCATTER, first, None, baselines.scatter(first)))
    baseline_of.append((MASKED, first, None, baselines.masked(first)))
    baseline_of += [("LoRA", None, rank, None) for rank in settings.ranks]
    groups = [(name, rows, remat) for name in settings.models for rows in settings.batch for remat in settings.remat]

    found: list[Row] = []
    total = len(groups) * len(baseline_of)
    with console.bar(f"compiling for {compiler.name}", total) as shown:
        for name, rows, remat in groups:
            group: list[Row] = []
            for method, k, rank, baseline in baseline_of:
                shown.update(len(found) + len(group), total, f"{name}, {rows} rows, remat {remat}: {method}")
                row: Row = {"method": method, "k": k, "rank": rank, "dtype": DTYPE, "model": name}
                row |= {"shape": [rows, settings.length], "remat": remat, "compiled_for": compiler.name}
                setting = Setting(name, k or 1, rows, settings.length, remat, rank=rank)
                row |= _bytes_of(baseline, setting, compiler) if baseline else _ours(setting, settings.compiled_for)
                group.append(row | {"peak_bytes": sum(row["bytes"].values())})
            found += [row | {"ratio_to_full": row["peak_bytes"] / group[0]["peak_bytes"]} for row in group]
        shown.update(total, total)
    name = "memory" if settings.compiled_for == "cpu" else f"memory-{settings.compiled_for}"
    common.report(name, f"one step, {DTYPE}, compiled for {compiler.name}", MEMORY_COLUMNS, found, settings)
    return 0


def devices(settings: argparse.Namespace) -> int:
    """Save devices.json: what a step takes on each of several devices, and what it sends between them."""
    most = max(settings.devices)
    if most > 1 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", most)
    installed_compiler(settings.compiled_for)
    cases = [
        Setting(name, k, settings.rows * count, settings.length, "full", count, fsdp, tensor)
        for name in settings.models
        for k in settings.k
        for count in settings.devices
        for fsdp, tensor in _meshes(count, first=k == settings.k[0])
    ]
    found = []
    with console.bar(f"compiling for {settings.compiled_for}", len(cases)) as shown:
        for done, case in enumerate(cases):
            mesh = f"{case.devices} devices, fsdp {case.fsdp}, tensor {case.tensor}"
            shown.update(done, len(cases), f"{case.model}, k = {case.k}, {mesh}")
            found.append(_on_each_device(case, settings.compiled_for))
        shown.update(len(cases), len(cases))
    title = f"one step on each of several {settings.compiled_for}, {DTYPE}"
    common.report("devices", title, DEVICES_COLUMNS, found, settings)
    return 0


def installed_compiler(machine: str) -> Compiler:
    """Return the machine's compiler; exit where what compiles for a GPU is not installed."""
    compiler = compiler_for(find(machine, DTYPE))
    if machine != "cpu" and not (compiler.platform == "gpu" and compiler.flash_attention):
        sys.exit(f"what compiles for a GPU is missing: {install_line('cuda')}, or make check-gpu")
    return compiler


def _plan(setting: Setting, machine: str) -> Any:
    """Return the plan of this library's step."""
    with tempfile.TemporaryDirectory() as model:
        (Path(model) / "config.json").write_text(json.dumps(MODELS[setting.model]))
        content = {
            "name": setting.model,
            "model": {"path": model, "dtype": DTYPE},
            **({"bypass": {"k": setting.k}} if setting.rank is None else {"method": "lora", "lora": {"r": setting.rank}}),
            "data": {"train": "none", "max_length": setting.length},
            "optimizer": {"learning_rate": 8e-3},
            "training": {"steps": 1, "batch_size": setting.rows, "remat": setting.remat},
            "parallel": {"fsdp": setting.fsdp, "tensor": setting.tensor},
        }
        return plan.measure(config_file.from_dict(content, "plans"), machine, setting.devices).to_json()


def _ours(setting: Setting, machine: str) -> Row:
    made = _plan(setting, machine)
    kinds = {"adapter" if kind == "bypass" else kind: size for kind, size in made["bytes"].items()}
    return {"trained": made["trainable"], "bytes": kinds, "seconds": made["compile_seconds"]}


def _bytes_of(baseline: Baseline, setting: Setting, compiler: Compiler) -> Row:
    """Return the bytes of a baseline's step, compiled from shapes."""
    model = models.from_hf_config(MODELS[setting.model], DTYPE)
    params, batch = model.abstract_params(), shapes.abstract_batch(setting.rows, setting.length)
    paths = targets(params, model)
    began = time.perf_counter()
    trainable, frozen = jax.eval_shape(lambda params: baseline.split(params, paths), params)
    state = jax.eval_shape(ADAMW.init, trainable)
    step = baselines.make_step(baseline, model.module(Remat(setting.remat)))
    with jax.numpy_dtype_promotion("standard"):  # see make_step
        compiled = compiler.compile(compiler.trace(step, trainable, state, frozen, batch))
    kinds = {
        "weights": nbytes(params),
        "adapter": nbytes((trainable, frozen)) - nbytes(params),
        "optimizer": nbytes(state),
        "batch": nbytes(batch),
        "temporaries": temporaries(compiled),
    }
    return {"trained": baseline.count(trainable), "bytes": kinds, "seconds": time.perf_counter() - began}


def _meshes(count: int, first: bool) -> list[tuple[int, int]]:
    """Return the (fsdp, tensor) to try on so many devices."""
    if count == 1:
        return [(1, 1)]
    shared = min(count, 8)
    return [(1, 1), (shared, 1), *([(1, shared)] if first else []), *([(count, 1)] if first and count > 8 else [])]


def _on_each_device(setting: Setting, machine: str) -> Row:
    began = time.perf_counter()
    made = _plan(setting, machine)
    kinds = made["collectives"]
    sent = {kind: kinds.get(kind, {"bytes": 0})["bytes"] for kind in ("all-reduce", "reduce-scatter", "all-gather")}
    return {
        "method": "data parallel" if setting.fsdp == setting.tensor == 1 else "shared weights",
        **{key: getattr(setting, key) for key in ("model", "k", "devices", "fsdp", "tensor")},
        **{key: made[key] for key in ("total_bytes", "bytes", "collectives", "flops", "compiled_for")},
        "dtype": DTYPE,
        "shape": [made["rows"], setting.length],
        "weight_bytes": made["bytes"]["weights"],
        "summed_bytes": sent["all-reduce"] + sent["reduce-scatter"],
        "gathered_bytes": sent["all-gather"],
        "count": sum(traffic["count"] for traffic in kinds.values()),
        "trained": made["trainable"],
        "seconds": time.perf_counter() - began,
        "peak_bytes": made["total_bytes"],
    }


if __name__ == "__main__":
    sys.exit(main())
