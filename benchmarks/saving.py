"""What a checkpoint costs a run of several processes: the time until it is written, and its share of 100 steps.

    python -m benchmarks.saving --processes 4 --k 1 20

The processes run on this machine over loopback and hold a state of the model's shapes, replicated or under fsdp. Process 0
gathers and writes it while the others wait until it is on the disk, which a run does in the background: `share`, of 100
steps of one process from checkpoint.json, is an upper bound.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks import common
from benchmarks.common import Column, Row
from neuroada_jax import console
from neuroada_jax.planning import shapes
from neuroada_jax.training import parallel, peers, processes
from neuroada_jax.training.config import (
    BypassSection,
    DataSection,
    ModelSection,
    OptimizerSection,
    RunConfig,
    TrainingSection,
)
from neuroada_jax.training.config_execution import ParallelSection
from neuroada_jax.training.modes import Parallel
from neuroada_jax.training.shared_checkpoint import SharedCheckpoints
from neuroada_jax.training.step import TrainState

COLUMNS = (
    Column("method", "method"),
    Column("k", "k"),
    common.SECONDS,
    Column("bytes", "bytes", console.size),
    Column("share of 100 steps", "share", lambda share: f"{100 * share:.2f} %"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write benchmarks/results/saving.json."""
    parser = common.parser(__doc__, repeats=4)
    parser.add_argument("--model", default=common.MODEL)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 20])
    parser.add_argument("--process", nargs=2, help=argparse.SUPPRESS)  # address and number of a process of the job
    settings = parser.parse_args(arguments)
    if settings.process:
        _save_often(*settings.process, settings)
        return
    rows = _rows(settings)
    del settings.process
    common.report("saving", f"what a checkpoint costs {settings.processes} processes", COLUMNS, rows, settings)


def _rows(settings: argparse.Namespace) -> list[Row]:
    """Run a job of this program's own processes; return the rows of the table."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = [f"--{name}={getattr(settings, name)}" for name in ("model", "processes", "repeats")]
    command = [sys.executable, "-m", "benchmarks.saving", *options, "--k", *map(str, settings.k), "--process", address]
    job = [
        subprocess.Popen([*command, str(index)], stdout=subprocess.PIPE, text=True) for index in range(settings.processes)
    ]
    said = [each.communicate()[0] for each in job]
    if any(each.returncode for each in job):
        raise SystemExit(f"saving: the processes ended with {[each.returncode for each in job]}")
    timed = json.loads((common.RESULTS / "checkpoint.json").read_text())["rows"]
    steps = {row["k"]: row["seconds"] for row in timed if row["method"] == "step"}
    rows: list[Row] = json.loads(said[0].splitlines()[-1])
    for row in rows:
        if row["method"].endswith("until written"):
            row["share"] = row["seconds"] / (100 * steps[row["k"]])
    return rows


def _save_often(address: str, index: str, settings: argparse.Namespace) -> None:
    """Save in one process of the job; the first one prints the rows as JSON."""
    rows: list[Row] = []
    sections = {"shard_map": ParallelSection(mode="shard_map"), "fsdp": ParallelSection(fsdp=settings.processes)}
    with processes.joined(address, settings.processes, int(index)) as together:
        for k in settings.k:
            for name, section in sections.items():
                devices = parallel.resolve(section)
                state = devices.place(_state(settings.model, k))
                waited, written, size = _times(state, devices, settings.repeats)
                rows.append({"method": f"{name}: process 0 waits", "k": k, "seconds": statistics.median(waited)})
                more = {"seconds": statistics.median(written), "bytes": size}
                rows.append({"method": f"{name}: until written", "k": k, **more})
        if together.is_first:
            print(json.dumps(rows))


def _state(model: str, k: int) -> TrainState:
    """Return a state of the model's shapes, without weights: only what a checkpoint holds."""
    config = RunConfig(
        name="saving",
        model=ModelSection(path=model, dtype="float32"),
        data=DataSection(train="rows.jsonl"),
        bypass=BypassSection(k=k),
        optimizer=OptimizerSection(learning_rate=1e-3),
        training=TrainingSection(steps=1),
    )
    state = shapes.abstract_run(config).state._replace(params={}, base_entries={})
    rng = np.random.default_rng(0)  # zeros would be compressed to nothing
    return jax.tree.map(lambda leaf: rng.integers(2**30, size=leaf.shape).astype(leaf.dtype), state)


def _times(state: TrainState, devices: Parallel, repeats: int) -> tuple[list[float], list[float], int]:
    """Return the seconds that `save` takes, those until the checkpoint is written, and its bytes on the first process."""
    together, waited, written = peers.current(), [], []
    with tempfile.TemporaryDirectory(prefix="neuroada-saving-") as folder:
        with SharedCheckpoints(Path(folder) / "checkpoints", 2, 0, devices) as checkpoints:
            for step in range(repeats + 1):
                numbered = state._replace(step=devices.place_like(np.int32(step), devices.shardings(state).step))
                together.share("begin", None)
                began = time.perf_counter()
                checkpoints.save(numbered)
                waited.append(time.perf_counter() - began)
                checkpoints.wait()
                written.append(time.perf_counter() - began)
        size = sum(path.stat().st_size for path in Path(folder, "checkpoints", str(repeats)).rglob("*") if path.is_file())
    return waited[1:], written[1:], size  # the first one compiles and creates the folder


if __name__ == "__main__":
    main()
