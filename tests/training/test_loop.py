"""The host stays within a few steps of the device, so that a request to stop does not wait for all that was dispatched."""

import jax
import jax.numpy as jnp
import pytest
from helpers import run_config, write_config, write_model, write_rows

from neuroada_jax import cli
from neuroada_jax.sweeping import group
from neuroada_jax.training import loop

STEPS = 12


@jax.jit
def slow(loss):
    """Return the loss after products that take longer than a step of the tiny model is dispatched in."""
    matrix = jnp.full((300, 300), 1e-3)
    return loss + 0 * jax.lax.fori_loop(0, 100, lambda _, each: each @ each * 1e-3, matrix).sum()


class Watched:
    """A step whose losses are slow; `most` is the largest number of steps that waited for the device."""

    def __init__(self):
        self.losses, self.most = [], 0

    def step(self, run_step):
        def run(*arguments):
            *rest, metrics = run_step(*arguments)
            self.losses.append(slow(metrics.loss))
            self.most = max(self.most, sum(not loss.is_ready() for loss in self.losses))
            return *rest, metrics._replace(loss=self.losses[-1])

        return run


@pytest.fixture
def config(tmp_path):
    slow(jnp.float32(1.0)).block_until_ready()
    content = run_config(
        tmp_path,
        write_model(tmp_path / "model"),
        write_rows(tmp_path / "rows.jsonl", 24),
        training={"steps": STEPS, "log_every": 1000},
        data={"validation": str(write_rows(tmp_path / "held_back.jsonl", 22))},
        evaluation={"sets": [], "before": False},
    )
    return str(write_config(tmp_path / "run.yaml", content))


def test_a_run(config, monkeypatch):
    watched, run = Watched(), loop.run
    monkeypatch.setattr(loop, "run", lambda state, step, *rest: run(state, watched.step(step), *rest))
    assert cli.main(["train", config]) == 0
    assert len(watched.losses) == STEPS
    assert 1 < watched.most <= loop.AHEAD + 1  # one that was just dispatched


def test_a_sweep(config, monkeypatch):
    watched, advance = Watched(), group.Group.advance

    def watching(self, *arguments):
        compiled = self._programs.compiled
        monkeypatch.setattr(self._programs, "compiled", lambda *found: watched.step(compiled(*found)))
        return advance(self, *arguments)

    monkeypatch.setattr(group.Group, "advance", watching)
    assert cli.main(["sweep", config, "--grid", "seed=1,2"]) == 0
    assert len(watched.losses) == STEPS
    assert 1 < watched.most <= loop.AHEAD + 1
