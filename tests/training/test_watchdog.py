"""What the watchdog sees: steps that are not finite, spikes, batches that do not come, compilations."""

import json
import math
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_helpers import CHAT, message_of
from helpers import CONFIG, random_tensors, run_config, write_model, write_rows

from neuroada_jax.adapters import native
from neuroada_jax.errors import NeuroadaWarning, UserError
from neuroada_jax.pretrained import tensor_checks
from neuroada_jax.training import config_file, run
from neuroada_jax.training.config import WatchdogSection
from neuroada_jax.training.watchdog import Failed, Watchdog, in_background


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """A model that gives NaN wherever the letter q is read, and rows of which two hold it."""
    folder = tmp_path_factory.mktemp("poisoned")
    untied = {**CONFIG, "tie_word_embeddings": False}
    tensors = random_tensors(untied)
    embedding = tensors["model.embed_tokens.weight"]
    letters = [CHAT.encode(text, add_special_tokens=False)[-1] for text in ("q", " q")]
    embedding[letters] = np.inf
    model = write_model(folder / "model", weights={"model.embed_tokens.weight": embedding}, tie_word_embeddings=False)
    return model, write_rows(folder / "rows.jsonl")


def settings(folder, inputs, **watchdog):
    training = {"steps": None, "epochs": 1, "batch_size": 2, "log_every": 5}
    bypass = {"targets": ["q_proj"], "k": 2}
    return config_file.from_dict(run_config(folder, *inputs, bypass=bypass, training=training, watchdog=watchdog), "test")


def lines(folder):
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("always::neuroada_jax.errors.NeuroadaWarning")
def test_steps_that_are_not_finite_are_left_out_and_counted(tmp_path, poisoned, monkeypatch):
    monkeypatch.setattr(tensor_checks, "check_finite", lambda *_: None)  # which would refuse the infinite embeddings
    with pytest.warns(NeuroadaWarning, match=r"step \d+ is skipped: NaN or infinite loss or gradient \(1 of at most 2\)"):
        results = run.train(settings(tmp_path, poisoned, nonfinite="skip", max_skips=2))
    written = lines(tmp_path)
    bad = [line["step"] for line in written if line["loss"] is None]
    assert 1 <= len(bad) <= 2 and bad == [line["step"] for line in written if not line.get("finite", True)]
    assert results["watchdog"]["skipped"] == len(bad) and results["steps"] == len(written) == 12
    rates = [line["learning_rate"] for line in written]
    assert [rates[step] == rates[step - 1] for step in range(1, 12)] == [step in bad for step in range(1, 12)]
    adapter = native.read(str(tmp_path / "out" / "adapter"))
    assert all(np.isfinite(values).all() and values.any() for values in adapter.values.values())

    message = message_of(run.train, settings(tmp_path / "stop", poisoned))
    assert message.startswith(f"the loss or its gradient became NaN or infinite at step {bad[0]} (rows {poisoned[1]}:")
    message = message_of(run.train, settings(tmp_path / "none", poisoned, nonfinite="skip", max_skips=0))
    assert message.startswith(f"the loss or its gradient is NaN or infinite at step {bad[0]}, after 0 skipped steps (rows ")


def line(step, loss):
    return {"step": step, "loss": loss, **({} if math.isfinite(loss) else {"finite": False})}


def ordinary(count):
    return [2.0 + 0.1 * math.sin(7 * step) for step in range(count)]


def test_a_spike():
    counts = {}
    watchdog = Watchdog(WatchdogSection(), counts)
    watchdog.look([line(1, 50.0)] + [line(step + 2, loss) for step, loss in enumerate(ordinary(60))])
    with pytest.warns(NeuroadaWarning, match=r"step 63: loss 8\.0000 is a spike, \d+ deviations above the median 2\.0"):
        watchdog.look([line(62, 5.0), line(63, 8.0), line(64, 2.2)])
    assert counts["spikes"] == 2
    with pytest.warns(NeuroadaWarning, match="step 90"):  # a run that goes on knows what came before
        Watchdog(WatchdogSection(), {}, [line(step, loss) for step, loss in enumerate(ordinary(30))]).look([line(90, 5.0)])
    Watchdog(WatchdogSection(spike=None), {}, [line(step, 2.0) for step in range(30)]).look([line(31, 9.0)])
    Watchdog(WatchdogSection(), {}, [line(step, 2.0) for step in range(30)]).look([line(31, 2.1)])


def test_skipped_steps_of_before_count():
    counts = {"skipped": 2}
    watchdog = Watchdog(WatchdogSection(nonfinite="skip", max_skips=3), counts)
    with pytest.warns(NeuroadaWarning, match=r"step 7 is skipped.*\(3 of at most 3\)"):
        watchdog.look([line(7, math.nan)])
    with pytest.raises(Failed, match="at step 8, after 3 skipped steps") as caught:
        watchdog.look([line(8, math.inf)])
    assert caught.value.step == 8 and counts["skipped"] == 3


def test_data_that_do_not_come():
    counts, come = {}, threading.Event()
    watchdog = Watchdog(WatchdogSection(stall_warn=0.02, stall_stop=0.1), counts)
    assert watchdog.wait(in_background(lambda: 3), 1) == 3 and counts["stalls"] == 0

    def late():
        time.sleep(0.05)
        return 4

    with pytest.warns(NeuroadaWarning, match=r"waiting for the batch of step 2 for 0\.02 s \(watchdog\.stall_warn\)"):
        assert watchdog.wait(in_background(late), 2) == 4
    with (
        pytest.warns(NeuroadaWarning, match="step 3"),
        pytest.raises(UserError, match=r"the batch of step 3 did not arrive within 0\.1 s \(watchdog\.stall_stop\)"),
    ):
        watchdog.wait(in_background(come.wait), 3)
    come.set()
    assert counts["stalls"] == 2
    with pytest.raises(ZeroDivisionError):
        watchdog.wait(in_background(lambda: 1 // 0), 4)


def test_a_step_that_compiles_again():
    counts = {}
    watchdog, double = Watchdog(WatchdogSection(), counts), jax.jit(lambda x: 2 * x)
    with watchdog.compiling(1, expected=True):
        double(jnp.zeros(3))
    other = jnp.zeros(4)
    with watchdog.compiling(2, expected=False):
        double(jnp.zeros(3))
    assert counts["compiled_again"] == 0
    with (
        pytest.warns(NeuroadaWarning, match=r"step 3 was compiled again \(.* s\), although .*; 1 so far"),
        watchdog.compiling(3, expected=False),
    ):
        double(other)


def test_a_loss_that_does_not_move_is_said_once():
    watchdog = Watchdog(WatchdogSection(spike=None), counts := {})
    watchdog.look([line(i + 1, 2.5 + i % 2) for i in range(60)])
    assert not counts["frozen"]
    with pytest.warns(NeuroadaWarning, match=r"the loss has been 10.8000 for 50 steps") as caught:
        watchdog.look([line(i + 61, 10.8) for i in range(70)])
    assert counts["frozen"] == 1 and sum("for 50 steps" in str(each.message) for each in caught) == 1


def test_a_loss_far_above_the_first_is_said_once():
    watchdog = Watchdog(WatchdogSection(spike=None), counts := {})
    watchdog.look([line(1, 2.0)])
    with pytest.warns(NeuroadaWarning, match="the loss is 90, and was 2 at first"):
        watchdog.look([line(i + 2, 90.0) for i in range(3)])
    watchdog.look([line(i + 5, 90.0) for i in range(3)])
    assert counts["exploded"] == 1


def test_steps_that_are_all_bad_end_a_run_whatever_max_skips_says():
    watchdog = Watchdog(WatchdogSection(nonfinite="skip", max_skips=10**6))
    with pytest.warns(NeuroadaWarning), pytest.raises(Failed, match="in each of the last 20 steps, to 20"):
        watchdog.look([line(i + 1, math.nan) for i in range(30)])


def test_a_short_run_whose_steps_are_all_bad_ends_too():
    skip = WatchdogSection(nonfinite="skip", max_skips=10**6)
    with pytest.warns(NeuroadaWarning), pytest.raises(Failed, match="in every step of the run, 1 to 5"):
        Watchdog(skip, last=5).look([line(i + 1, math.nan) for i in range(5)])
    resumed = [{"step": 0, "validation_loss": 2.0}, *(line(i + 1, math.nan) for i in range(3))]
    with pytest.warns(NeuroadaWarning), pytest.raises(Failed, match="in every step of the run, 1 to 5"):
        Watchdog(skip, {}, resumed, 5).look([line(i, math.nan) for i in (4, 5)])
    with pytest.warns(NeuroadaWarning):
        Watchdog(skip, {}, [line(1, 2.0)], 5).look([line(i, math.nan) for i in (2, 3, 4, 5)])


def test_bad_steps_in_a_row_are_counted_over_interruptions():
    skip = WatchdogSection(nonfinite="skip", max_skips=10**6)
    with pytest.warns(NeuroadaWarning), pytest.raises(Failed, match="in each of the last 20 steps, to 31"):
        Watchdog(skip, {}, [line(i, math.nan if i > 11 else 2.0) for i in range(1, 27)]).look(
            [line(i, math.nan) for i in range(27, 40)]
        )


@pytest.mark.filterwarnings("ignore::neuroada_jax.errors.NeuroadaWarning")
def test_a_run_of_bad_steps_alone_ends_with_an_error(tmp_path, poisoned, monkeypatch):
    monkeypatch.setattr(tensor_checks, "check_finite", lambda *_: None)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "q q", "completion": "a"}) + "\n")
    config = settings(tmp_path, (poisoned[0], rows), nonfinite="skip", max_skips=10**6)
    assert "is NaN or infinite in every step of the run, 1 to 1 (rows " in message_of(run.train, config)
