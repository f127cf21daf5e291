"""Runs in several processes on this machine: what one process trains, one of them writes, and none outlives another."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from data_helpers import message_of
from helpers import run_config, write_config, write_model, write_rows
from test_parallel_runs import SECTIONS, assert_equal, outcome

from neuroada_jax import cli
from neuroada_jax.data.batches import Batches
from neuroada_jax.data.examples import Examples
from neuroada_jax.training import parallel, processes
from neuroada_jax.training.config import ParallelSection, TrainingSection


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(model directory, file of rows that make an uneven last batch)."""
    folder = tmp_path_factory.mktemp("inputs")
    return write_model(folder / "model"), write_rows(folder / "rows.jsonl", 21)


@pytest.fixture
def start(tmp_path):
    """Starts a run in several processes; what is still alive at the end is killed."""
    started = []

    def run(path, count, devices, *overrides):
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        environment = {**os.environ, "XLA_FLAGS": flags, "TMPDIR": str(tmp_path)}
        command = [sys.executable, "-m", "neuroada_jax.cli", "train", str(path), *overrides, "--coordinator", address]
        for number in range(count):
            each = [*command, "--processes", str(count), "--process", str(number)]
            with (tmp_path / f"{number}.log").open("w") as log:
                started.append(subprocess.Popen(each, env=environment, stdout=log, stderr=subprocess.STDOUT))
        return started[-count:]

    yield run
    for each in started:
        each.kill()
        each.wait()


def logs(folder, count):
    return [(folder / f"{number}.log").read_text() for number in range(count)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, inputs):
    """The outcome of the run in this process, on one device."""
    folder = tmp_path_factory.mktemp("alone")
    assert cli.main(["train", str(write_config(folder / "run.yaml", run_config(folder, *inputs, **SECTIONS)))]) == 0
    return outcome(folder / "out")


@pytest.mark.parametrize(
    ("count", "devices", "overrides"),
    [
        pytest.param(2, 4, [], id="2"),
        pytest.param(4, 2, [], id="4", marks=pytest.mark.slow),
        pytest.param(2, 4, ["parallel.fsdp=8"], id="2, fsdp", marks=pytest.mark.slow),
    ],
)
def test_several_processes_train_what_one_does(count, devices, overrides, tmp_path, inputs, alone, start):
    path = write_config(tmp_path / "run.yaml", run_config(tmp_path, *inputs, **SECTIONS))
    codes = [each.wait(timeout=100) for each in start(path, count, devices, *overrides)]
    said = logs(tmp_path, count)
    assert codes == [0] * count, said
    assert_equal(outcome(tmp_path / "out"), alone)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["steps"] == 7
    # One shows the run, the others only that they are there; and they leave nothing behind.
    assert "trained values" in said[0]
    for number in range(1, count):
        lines = [line for line in said[number].splitlines() if not line.startswith(("[Gloo]", "[transformers]"))]
        assert lines == [f"process {number} of {count}, {devices} device(s)"]
    assert not list(tmp_path.glob("neuroada-process-*"))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others_with_a_clear_message(victim, tmp_path, inputs, start):
    sections = {**SECTIONS, "training": {"steps": 100_000, "batch_size": 8, "log_every": 1}}
    path = write_config(tmp_path / "run.yaml", run_config(tmp_path, *inputs, **sections))
    running = start(path, 2, 1)
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        assert all(each.poll() is None for each in running), logs(tmp_path, 2)
        time.sleep(0.2)
    running[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    # 1, or JAX's own abort, which comes at once where the first process is gone.
    assert running[1 - victim].wait(timeout=60) in ((1,) if victim else (1, -signal.SIGABRT))
    assert time.monotonic() - killed < 30
    assert (
        f"neuroada: error: process {victim} of 2 ended before the run did, see its own output for the reason; "
        f"process {1 - victim} stops too\n"
    ) in logs(tmp_path, 2)[1 - victim]


def test_an_error_of_the_first_process_alone_ends_all(tmp_path, inputs, start):
    """Its folder holds a run already; the others write elsewhere, and do not know."""
    path = write_config(tmp_path / "run.yaml", run_config(tmp_path, *inputs, **SECTIONS))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("name: other\n")
    first, other = start(path, 2, 1)
    assert first.wait(timeout=100) == 2 and other.wait(timeout=60) == 1
    said = logs(tmp_path, 2)
    assert "neuroada: error: " in said[0] and "holds a run already" in said[0]
    assert "process 0 of 2 ended before the run did" in said[1]
    assert not list(tmp_path.glob("neuroada-process-*"))


def test_a_process_makes_its_own_rows_alone():
    offsets = np.arange(0, 45, 4)
    examples = Examples(np.arange(44, dtype=np.int32), np.arange(44) % 4 > 1, np.arange(11, dtype=np.int32), offsets, 0, 0)
    whole, part = Batches(examples, 8, 0), Batches(examples, 8, 0)
    part.own_rows = slice(2, 4)
    for index in range(2):
        wanted, found = whole.batch(0, index), part.batch(0, index)
        np.testing.assert_array_equal(found.lengths, wanted.lengths)  # what the log counts
        assert found.input_ids.shape == wanted.input_ids.shape
        for leaf, full in zip(
            (found.input_ids, found.label_ids, found.label_mask),
            (wanted.input_ids, wanted.label_ids, wanted.label_mask),
            strict=True,
        ):
            np.testing.assert_array_equal(leaf[2:4], full[2:4])
            assert not leaf[:2].any() and not leaf[4:].any()
    devices = parallel.resolve(ParallelSection(mode="shard_map"))
    assert devices.slice_of_process(TrainingSection(steps=1, batch_size=12)) == slice(0, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2, 0), "--processes, --process: need --coordinator HOST:PORT"),
        (("host", 2, 0), "--coordinator: expected HOST:PORT or auto, found 'host'"),
        (("host:1", None, 0), "--coordinator HOST:PORT: needs --processes and --process"),
        (("host:1", 2, 2), "--process: expected 0 to 1, found 2"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, message):
    assert message_of(lambda: processes.joined(*arguments).__enter__()) == message


@pytest.mark.parametrize("number", [1, 300])
def test_a_farewell_carries_any_process_number(number):
    one, other = socket.socketpair()
    with one, other:
        one.sendall(processes._FAREWELL.pack(processes._FAILED, number)[:3])
        one.sendall(processes._FAREWELL.pack(processes._FAILED, number)[3:])
        assert processes._receive(other) == (processes._FAILED, number)
        one.close()
        assert processes._receive(other) is None


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"mode": "pmap"}, "parallel.mode: pmap supports one process, found 2; use shard_map or jit"),
        ({"devices": 4}, "parallel.devices: expected null or 8 (all of 2 processes), found 4"),
    ],
)
def test_what_several_processes_cannot_have(section, message):
    assert message_of(parallel.layout, ParallelSection(**section), "cpu", 8, 2) == message
    assert parallel.layout(ParallelSection(), "cpu", 8, 2) == ("shard_map", (8, 1, 1))
