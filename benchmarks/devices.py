"""What a step takes of each of several GPUs, and what it sends between them: LLaMA-7B, 13B and 3-70B, from shapes alone.

    make bench-devices     (or: python -m benchmarks.devices --target cpu --devices 1 8)

Every figure is compiled: `neuroada plan` on as many described GPUs. Nothing runs, and nothing is timed. Each device has
`--rows` rows of `--length` tokens (where `tensor` devices share their outputs, all of them that many times as many), every
position labelled, under full remat in bfloat16.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks import common
from benchmarks.common import Column, Row
from benchmarks.methods import MODELS
from neuroada_jax import console
from neuroada_jax.planning import plan
from neuroada_jax.training import config_file

NAMES = ("llama-7b", "llama-13b", "llama-3-70b")
COLUMNS = (
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles, prints the table and saves benchmarks/results/devices.json."""
    parser = common.parser(__doc__, repeats=None)
    parser.add_argument("--target", default="h100")
    parser.add_argument("--models", nargs="+", default=NAMES, choices=MODELS, metavar="MODEL")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 20])
    parser.add_argument("--rows", type=int, default=2, help="of each device")
    parser.add_argument("--length", type=int, default=512)
    settings = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    if max(settings.devices) > 1 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", max(settings.devices))

    cases = [
        (name, k, count, fsdp, tensor)
        for name in settings.models
        for k in settings.k
        for count in settings.devices
        for fsdp, tensor in _meshes(count, first=k == settings.k[0])
    ]
    rows = []
    with console.bar(f"compiling for {settings.target}", len(cases)) as shown:
        for done, case in enumerate(cases):
            shown.update(done, len(cases), "{}, k = {}, {} devices, fsdp {}, tensor {}".format(*case))
            rows.append(_compiled(settings, *case))
        shown.update(len(cases), len(cases))
    common.report("devices", f"one step on each of several {settings.target}, bfloat16", COLUMNS, rows, settings)


def _meshes(count: int, first: bool) -> list[tuple[int, int]]:
    """(fsdp, tensor) to try on so many devices."""
    if count == 1:
        return [(1, 1)]
    shared = min(count, 8)
    return [(1, 1), (shared, 1), *([(1, shared)] if first else []), *([(count, 1)] if first and count > 8 else [])]


def _compiled(settings: argparse.Namespace, name: str, k: int, count: int, fsdp: int, tensor: int) -> Row:
    target, rows, length = settings.target, settings.rows, settings.length
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as model:
        (Path(model) / "config.json").write_text(json.dumps(MODELS[name]))
        content = {
            "name": name,
            "model": {"path": model, "dtype": "bfloat16"},
            "bypass": {"k": k},
            "data": {"train": "none", "max_length": length},
            "optimizer": {"learning_rate": 8e-3},
            "training": {"steps": 1, "batch_size": rows * count, "remat": "full"},
            "parallel": {"fsdp": fsdp, "tensor": tensor},
        }
        made = plan.measure(config_file.from_dict(content, "devices"), target, count)
    if target != "cpu" and made["attention"] != "cudnn":
        sys.exit(f"not compiled as it would run: {'; '.join(made['notes'])}; `make bench-devices` installs what it needs")
    kinds = made["collectives"]
    sent = {kind: kinds.get(kind, {"bytes": 0})["bytes"] for kind in ("all-reduce", "reduce-scatter", "all-gather")}
    return {
        "method": "data parallel" if fsdp == tensor == 1 else "shared weights",
        "model": name,
        "k": k,
        "dtype": "bfloat16",
        "shape": [made["rows"], length],
        "devices": count,
        "fsdp": fsdp,
        "tensor": tensor,
        "total_bytes": made["total_bytes"],
        "bytes": made["bytes"],
        "weight_bytes": made["bytes"]["weights"],
        "summed_bytes": sent["all-reduce"] + sent["reduce-scatter"],
        "gathered_bytes": sent["all-gather"],
        "count": sum(traffic["count"] for traffic in kinds.values()),
        "collectives": kinds,
        "trained": made["trainable"],
        "flops": made["flops"],
        "compiled_for": made["compiled_for"],
        "seconds": time.perf_counter() - began,
        "peak_bytes": made["total_bytes"],
    }


if __name__ == "__main__":
    main()
