"""Runs in several processes give what one process gives, with checkpoints, validation and scores; one job, or none."""

import json
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import safetensors.numpy
from helpers import run_config, write_config, write_model, write_rows
from test_parallel_runs import assert_equal
from xla_flags import UNOPTIMISED

from neuroada_jax import cli

SCRIPT = Path(__file__).with_name("one_of_several.py")
SECTIONS = {
    "bypass": {"targets": ["q_proj", "down_proj"], "k": 2},
    "training": {
        "steps": 6,
        "batch_size": 8,
        "save_every": 3,
        "keep_last": 9,
        "validate_every": 2,
        "validation_samples": 0,
    },
}
MODES = {
    "shard_map": ["parallel.mode=shard_map"],
    "pmap": ["parallel.mode=pmap"],
    "fsdp": ["parallel.fsdp=4", "training.validation_samples=1"],
    "tensor": ["parallel.tensor=2", "parallel.fsdp=2", "training.validation_samples=1"],
}
DIFFERENT = {
    "optimizer.learning_rate": "optimizer.learning_rate=0.5",
    "bypass.k": "bypass.k=3",
    "seed": "seed=7",
    "data.train": "data.train={0}/other.jsonl",
    "model.path": "model.path={0}/another",
}
XLA = re.compile(r"\[Gloo\]|peer ranks|^W\d{4} |^[\s\d:]*$")  # its own lines, also broken up by others
SCORES, MERGED = "predictions-some-after.jsonl", "merged/model.safetensors"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a model, another one of the same config, rows, the same rows in another order, and a config."""
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model")
    write_model(folder / "another", seed=1)
    lines = write_rows(folder / "rows.jsonl", 21).read_text().splitlines()
    (folder / "other.jsonl").write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    scored = {"sets": [{"name": "some", "data": str(folder / "rows.jsonl"), "limit": 5, "max_new_tokens": 2}]}
    data = {"validation": str(folder / "other.jsonl")}
    sections = {**SECTIONS, "evaluation": scored, "data": data, "merge": True}
    content = run_config(folder, folder / "model", folder / "rows.jsonl", **sections)
    write_config(folder / "run.yaml", content)
    return folder


@pytest.fixture(scope="module")
def alone(inputs):
    """The folder of the run in this process, on one device."""
    assert cli.main(["train", str(inputs / "run.yaml"), f"output={inputs / 'alone'}"]) == 0
    return inputs / "alone"


@pytest.fixture
def start(tmp_path):
    """Starts a job; its processes write to <index>.log, and those that are alive at the end are killed."""
    started = []

    def run(arguments, count, devices, script=None):
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = " ".join([f"--xla_force_host_platform_device_count={devices}", *UNOPTIMISED])
        for index in range(count):
            words = [*arguments, "--coordinator", address, "--processes", str(count), "--process", str(index)]
            log = tmp_path / f"{index}.log"
            started.append(forked.start(words, log, script, XLA_FLAGS=flags, TMPDIR=str(tmp_path)))
        return started[-count:]

    yield run
    for each in started:
        each.kill()
        each.join()


def ended(running, seconds):
    """The exit codes of processes."""
    deadline = time.monotonic() + seconds
    for each in running:
        each.join(max(0.0, deadline - time.monotonic()))
    return [each.exitcode for each in running]


def said(folder, count):
    return [(folder / f"{index}.log").read_text() for index in range(count)]


def outcome(out):
    """(adapter tensors, losses of the steps) of the run in a folder."""
    losses = [line["loss"] for line in lines(out / "metrics.jsonl") if line["step"]]
    return safetensors.numpy.load_file(out / "adapter" / "adapter.safetensors"), np.array(losses)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("count", "devices", "modes"),
    [
        pytest.param(2, 1, ["shard_map"], id="2"),
        pytest.param(2, 2, ["pmap", "fsdp", "tensor"], id="2, all modes", marks=pytest.mark.slow),
        pytest.param(4, 1, list(MODES), id="4, all modes", marks=pytest.mark.slow),
    ],
)
def test_several_processes_give_what_one_gives(count, devices, modes, tmp_path, inputs, alone, start):
    """In one job: a run in each mode, runs that the last process has otherwise, a resumed run, and one that must not be."""
    runs, config = {}, {"config": str(inputs / "run.yaml")}
    for mode in modes:
        runs[mode] = config | {"overrides": [f"output={tmp_path / mode}", *MODES[mode]]}
    for field, override in DIFFERENT.items():
        runs[field] = config | {"overrides": [f"output={tmp_path / 'none'}"], "different": [override.format(inputs)]}
    for mode in modes:  # as if it had ended after step 4
        runs[f"{mode}, resumed"] = runs[mode] | {"resume": True, "forget": str(tmp_path / mode / "checkpoints" / "6")}
    runs["again"] = runs[modes[0]]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    codes = ended(start([str(tmp_path)], count, devices, SCRIPT), 400 * len(modes))
    output = said(tmp_path, count)
    # The last run finds another one in its folder, on the first process alone: that ends all of them.
    refused = (
        f"{tmp_path / modes[0]} holds a run already; use --overwrite to replace it, --resume to go on, or another name"
    )
    assert codes == [2] * count, output
    assert output[0].endswith(f"neuroada: error: {refused}\n")
    for index in range(1, count):
        ours = [line for line in output[index].splitlines() if not XLA.search(line)]
        assert ours == [f"process {index} of {count}, {devices} device(s)", f"neuroada: error: process 0: {refused}"]

    for mode in modes:
        out, resumed = tmp_path / mode, tmp_path / f"{mode}, before"
        assert_equal(outcome(out), outcome(alone))
        for name, tensor in outcome(resumed)[0].items():  # on the same devices, bit for bit
            np.testing.assert_array_equal(outcome(out)[0][name], tensor)
        assert (out / "metrics.jsonl").read_bytes() == (resumed / "metrics.jsonl").read_bytes()
        losses = [[each["value"] for each in lines(folder / "validation.jsonl")] for folder in (out, resumed, alone)]
        assert losses[0] == losses[1] and len(losses[0]) == 4
        np.testing.assert_allclose(losses[0], losses[2], atol=1e-5)
        samples = [each["samples"][0] for each in lines(out / "validation.jsonl") if "samples" in each]
        assert len(samples) == 4 * (mode in ("fsdp", "tensor")) and all(each["prompt"] for each in samples)
        assert lines(out / SCORES) == lines(alone / SCORES) and len(lines(out / SCORES)) == 5
        assert {each.name for each in out.iterdir()} == {each.name for each in alone.iterdir()}
        merged, expected = (safetensors.numpy.load_file(folder / MERGED) for folder in (out, alone))
        assert merged.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_allclose(merged[name], tensor, rtol=0, atol=1e-4)
    errors = [json.loads((tmp_path / f"{index}.json").read_text()) for index in range(count)]
    assert errors == [errors[0]] * count and errors[0].keys() == DIFFERENT.keys()
    for field, message in errors[0].items():
        assert message.startswith(field) and f"process {count - 1} has" in message and "process 0 has" in message
    assert not (tmp_path / "none" / "adapter").exists() and not list(tmp_path.glob(".neuroada-process*"))

    # One process goes on from the checkpoint of several.
    shutil.rmtree(tmp_path / modes[0] / "checkpoints" / "6")
    assert (
        cli.main(["train", str(inputs / "run.yaml"), *runs[modes[0]]["overrides"], "--resume", "parallel.mode=single"]) == 0
    )
    for name, tensor in outcome(tmp_path / f"{modes[0]}, before")[0].items():
        np.testing.assert_allclose(outcome(tmp_path / modes[0])[0][name], tensor, rtol=0, atol=1e-6)


def test_two_processes_score_each_row_once(tmp_path, inputs, start):
    command = ["evaluate", "--model", str(inputs / "model"), "--data", str(inputs / "rows.jsonl"), "--max-new-tokens", "2"]
    command += ["--out", str(tmp_path / "several.jsonl")]
    running = start(command, 2, 1)
    assert ended(running, 200) == [0, 0], said(tmp_path, 2)
    assert cli.main([*command[:-1], str(tmp_path / "one.jsonl")]) == 0
    found = [lines(tmp_path / f"{name}.jsonl") for name in ("several", "one")]
    assert found[0] == found[1] and len(found[0]) == 21
    assert "accuracy" in said(tmp_path, 2)[0] and "accuracy" not in said(tmp_path, 2)[1]


@pytest.mark.slow  # half a minute of processes that start
@pytest.mark.parametrize("victim", [1, 0])
def test_a_signal_to_one_process_stops_all_and_a_kill_ends_all(victim, tmp_path, inputs, start):
    command = ["train", str(inputs / "run.yaml"), f"output={tmp_path / 'out'}"]
    command += ["training.steps=100000", "training.save_every=null", "training.log_every=1", "evaluation.sets=[]"]
    command += ["training.validate_every=null", "data.validation=null"]
    running = start(command, 2, 1)
    seen = wait_for_steps(tmp_path, running, 0)
    running[victim].terminate()
    assert ended(running, 60) == [75, 75], said(tmp_path, 2)
    (step,) = (int(each.name) for each in (tmp_path / "out" / "checkpoints").iterdir())
    assert step == len(lines(tmp_path / "out" / "metrics.jsonl")) >= seen
    assert f"neuroada: stopped, step {step} is saved; go on with: neuroada train " in said(tmp_path, 2)[0]

    running = start([*command, "--resume"], 2, 1)
    wait_for_steps(tmp_path, running, step)
    running[victim].kill()
    # 1, or JAX's own abort, which comes at once where the first process is gone.
    assert ended(running, 60)[1 - victim] in ((1,) if victim else (1, -signal.SIGABRT))
    found = f"neuroada: error: process {victim} of 2 ended before the run did, see its own output for the reason"
    assert found in said(tmp_path, 2)[1 - victim]


def wait_for_steps(folder, running, before):
    """Wait for a step after `before`; return the number of steps in metrics.jsonl."""
    metrics, deadline = folder / "out" / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > before):
        assert all(each.exitcode is None for each in running) and time.monotonic() < deadline, said(folder, 2)
        time.sleep(0.2)
    return metrics.read_bytes().count(b"\n")
