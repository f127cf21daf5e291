"""TensorBoard, wandb and trackio get what metrics.jsonl gets; a package that is missing is named; none ends a run."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys

import pytest
from data_helpers import message_of
from helpers import run_config

from neuroada_jax.errors import NeuroadaWarning
from neuroada_jax.training import config_file, trackers


def settings(folder, *names):
    content = run_config(folder, folder, folder, tracking=list(names))
    return config_file.from_dict(content, "test")


def line(step, loss):
    return {"step": step, "loss": loss, "learning_rate": 0.5, "labels": 3}


def log(settings, *parts):
    """A run in several parts: each goes on after so many steps with these lines."""
    for done, lines in parts:
        made = trackers.Log(settings, done)
        made.write(lines)
        made.close()


def needs(name):
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f'{name} is not installed (pip install -e ".[tracking]")')


FIRST = (0, [line(1, 4.0), line(2, float("nan")), line(3, 2.0)])
SECOND = (2, [line(3, 1.5), line(4, 1.0)])  # resumed after step 2


@needs("tensorboard")
def test_tensorboard(tmp_path):
    log(settings(tmp_path, "tensorboard"), FIRST, SECOND)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 4.0), (3, 1.5), (4, 1.0)]
    assert [event.step for event in found.Scalars("labels")] == [1, 2, 3, 4]


def in_a_process(folder, name, environment):
    """Trackers start services and threads of their own."""
    script = f"""if True:
        import sys
        sys.path.insert(0, "tests")
        sys.path.insert(0, "tests/training")
        import pathlib, test_trackers
        chosen = test_trackers.settings(pathlib.Path({str(folder)!r}), {name!r})
        test_trackers.log(chosen, test_trackers.FIRST, test_trackers.SECOND)
    """
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert "failed, and the run goes on" not in done.stderr


@needs("wandb")
def test_wandb_offline(tmp_path):
    home = {"WANDB_MODE": "offline", "WANDB_CONFIG_DIR": str(tmp_path / "c"), "WANDB_CACHE_DIR": str(tmp_path / "k")}
    in_a_process(tmp_path, "wandb", home)
    runs = sorted((tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb"))
    identity = (tmp_path / "out" / trackers.WANDB_ID).read_text().strip()
    assert runs and all(path.name == f"run-{identity}.wandb" for path in runs)
    assert any(b"learning_rate" in path.read_bytes() for path in runs)


@needs("trackio")
def test_trackio(tmp_path):
    in_a_process(tmp_path, "trackio", {"TRACKIO_DIR": str(tmp_path / "trackio")})
    (path,) = (tmp_path / "trackio").glob("neuroada-jax*.db")
    with sqlite3.connect(path) as database:
        found = [(step, json.loads(metrics)) for step, metrics in database.execute("select step, metrics from metrics")]
    losses = [(step, metrics["loss"]) for step, metrics in found if "loss" in metrics]
    assert (1, 4.0) in losses and losses[-2:] == [(3, 1.5), (4, 1.0)]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    trackers.check([])
    assert message_of(trackers.check, ["wandb"]) == 'tracking: wandb is not installed; pip install -e ".[tracking]"'


def test_a_tracker_that_fails_is_left_out(tmp_path, monkeypatch):
    class Broken:
        def __init__(self, *_):
            self.calls = 0

        def write(self, lines):
            raise ConnectionError("no route to host")

        def close(self):
            pytest.fail("it was left out")

    monkeypatch.setitem(trackers._TRACKERS, "wandb", Broken)
    made = trackers.Log(settings(tmp_path, "wandb"), 0)
    with pytest.warns(NeuroadaWarning, match=r"wandb failed, the run continues without it \(no route to host\)"):
        made.write([line(1, 4.0)])
    made.write([line(2, 3.0)])
    made.close()
    assert (tmp_path / "out" / "metrics.jsonl").read_text().count("\n") == 2
