"""Runs that are stopped at every stage, by a signal, go on to what they would have become; and who may go on."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from data_helpers import message_of
from helpers import run_config, write_config, write_model, write_rows

import neuroada_jax as na
from neuroada_jax import cli
from neuroada_jax.adapters import native
from neuroada_jax.errors import NeuroadaWarning
from neuroada_jax.evaluation import continuation
from neuroada_jax.training import kept_states, rounding, run, run_directory, signals, trackers, validation


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return write_model(folder / "model"), write_rows(folder / "rows.jsonl")


def settings(folder, inputs, rows=None, **training):
    """Two epochs of 6 steps, each scored by a part of a set, and the rest of the set scored before and after."""
    folder.mkdir(exist_ok=True)
    test = {"name": "some", "data": str(inputs[1]), "limit": 8, "max_new_tokens": 2}
    content = run_config(
        folder,
        inputs[0],
        rows or inputs[1],
        bypass={"targets": ["q_proj"], "k": 2},
        evaluation={"sets": [test], "best_epoch": "some"},
        training={"steps": None, "epochs": 2, "log_every": 4, **training},
    )
    return write_config(folder / "run.yaml", content)


def neuroada(capfd, *arguments):
    capfd.readouterr()
    code = cli.main(["train", *map(str, arguments)])
    return code, capfd.readouterr().err


def results(folder):
    found = json.loads((folder / "out" / "results.json").read_text())
    differing = ("directory", "train_seconds", "tokens_per_second")
    assert all(found[key] for key in differing)
    return {key: value for key, value in found.items() if key not in differing}


def send_at_call(monkeypatch, owner, name, number):
    """SIGTERM in the midst of call `number` of a method, counted from 1."""
    method, calls = getattr(owner, name), []

    def and_send(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return method(*arguments, **options)

    monkeypatch.setattr(owner, name, and_send)


def test_a_run_that_is_stopped_at_every_stage_ends_as_if_it_was_not(tmp_path, inputs, monkeypatch, capfd):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    path = settings(whole, inputs)
    assert cli.main(["train", str(path)]) == 0
    path = settings(parted, inputs)
    handlers = [signal.getsignal(number) for number in signals.SIGNALS]
    stages = (
        # After the evaluation before; while metrics are written; as the first epoch is scored; as the run is scored.
        (continuation.ContinuationScorer, "predict", 1, None),
        (trackers.JsonLines, "write", 1, 4),
        (continuation.ContinuationScorer, "predict", 1, 6),
        (trackers.JsonLines, "write", 1, 8),
        (continuation.ContinuationScorer, "predict", 2, 12),
    )
    flags = []
    for owner, name, number, saved in stages:
        with monkeypatch.context() as patch:
            send_at_call(patch, owner, name, number)
            code, err = neuroada(capfd, path, *flags)
        assert code == 75
        what = f"step {saved} is saved" if saved else "nothing new to save"
        assert err.splitlines()[-1] == f"neuroada: stopped, {what}; go on with: neuroada train {path} --resume"
        assert "SIGTERM: saving, then stopping; once more ends at once" in err
        flags = ["--resume"]
    code, err = neuroada(capfd, path, *flags)
    assert code == 0 and "resuming after step 12" in err
    assert handlers == [signal.getsignal(number) for number in signals.SIGNALS]

    assert results(parted) == results(whole)
    assert results(whole)["before"]["some"]["value"] is not None
    for file in ("metrics.jsonl", "epochs.jsonl", "predictions-some-before.jsonl", "predictions-some-after.jsonl"):
        assert (parted / "out" / file).read_text() == (whole / "out" / file).read_text()
    a, b = (native.read(str(folder / "out" / "adapter")) for folder in (whole, parted))
    assert all(np.array_equal(a.values[module], b.values[module]) for module in a.values)
    left = [sorted(path.name for path in (folder / "out").iterdir()) for folder in (whole, parted)]
    assert left[0] == left[1] and "checkpoints" not in left[0]


def test_several_seeds_are_stopped_and_go_on(tmp_path, inputs, monkeypatch, capfd):
    path = settings(tmp_path, inputs)
    short = ["training.epochs=1", "evaluation.sets=[]", "evaluation.best_epoch=null", "--seeds", "1,2"]
    with monkeypatch.context() as patch:
        send_at_call(patch, trackers.JsonLines, "write", 3)  # a run of 6 steps writes twice
        code, err = neuroada(capfd, path, *short)
    again = f"{path} training.epochs=1 'evaluation.sets=[]' evaluation.best_epoch=null --seeds 1,2 --resume"
    assert code == 75 and err.splitlines()[-1].endswith(f"step 4 is saved; go on with: neuroada train {again}")
    code, err = neuroada(capfd, path, *short, "--resume")
    assert code == 0 and err.count("resuming after step 4") == 1
    assert json.loads((tmp_path / "out" / "results.json").read_text())["seeds"] == [1, 2]


# What follows the last step of a run, in order; the last two once results.json is there.
ENDS = [
    (trackers.Log, "close", 1),
    (run, "_save_adapter", 1),
    (rounding, "share", 1),
    (validation, "draw_losses", 1),
    (run.results, "results", 1),
    (run_directory, "tidy", 1),
    (run_directory.shutil, "rmtree", 2),
]


@pytest.mark.parametrize(("owner", "name", "number"), ENDS, ids=[name for _, name, _ in ENDS])
def test_a_stop_after_the_last_step_loses_nothing(owner, name, number, tmp_path, inputs, monkeypatch, capfd):
    path = settings(tmp_path, inputs)
    short = ["training.epochs=1", "evaluation.sets=[]", "evaluation.best_epoch=null"]
    with monkeypatch.context() as patch:
        send_at_call(patch, owner, name, number)
        code, err = neuroada(capfd, path, *short)
    out = tmp_path / "out"
    assert code == (0 if name in ("tidy", "rmtree") else 75)
    if code:
        assert "stopped, step 6 is saved; go on with:" in err and not (out / "results.json").exists()
        code, err = neuroada(capfd, path, *short, "--resume")
        assert code == 0 and "resuming after step 6" in err
    assert json.loads((out / "results.json").read_text())["steps"] == 6 and not (out / "checkpoints").exists()
    code, err = neuroada(capfd, path, *short, "--resume")
    assert code == 2 and "the run has finished: no checkpoint to resume from; --overwrite starts again" in err


def test_former_runs_of_seeds_that_were_to_be_replaced_are_not_taken_for_new_ones(tmp_path, inputs, monkeypatch, capfd):
    rows = write_rows(tmp_path / "rows.jsonl")
    path = settings(tmp_path, inputs, rows)
    short = ["training.epochs=1", "evaluation.sets=[]", "evaluation.best_epoch=null", "--seeds", "1,2"]
    code, _ = neuroada(capfd, path, *short, "training.save_every=2")  # which leaves checkpoints, too
    assert code == 0
    former = {seed: (tmp_path / "out" / f"seed-{seed}" / "metrics.jsonl").read_text() for seed in (1, 2)}
    rows.write_text(rows.read_text().replace("after a,", "behind a,"))
    code, err = neuroada(capfd, path, *short, "training.save_every=2", "--resume")
    assert code == 2 and f"{tmp_path / 'out' / 'seed-1'}: cannot resume on other training rows" in err

    with monkeypatch.context() as patch:
        send_at_call(patch, trackers.JsonLines, "write", 1)
        code, err = neuroada(capfd, path, *short, "--overwrite")
    assert code == 75 and not (tmp_path / "out" / "results.json").exists()
    assert list((tmp_path / "out" / "seed-2").iterdir()) == []
    code, err = neuroada(capfd, path, *short, "--resume")
    assert code == 0 and err.count("resuming after step 4") == 1
    for seed, lines in former.items():
        assert (tmp_path / "out" / f"seed-{seed}" / "metrics.jsonl").read_text() != lines


@pytest.mark.filterwarnings("always::neuroada_jax.errors.NeuroadaWarning")
def test_seeds_that_had_not_begun_go_on_by_force_too(tmp_path, inputs, monkeypatch, capfd):
    path = settings(tmp_path, inputs)
    short = ["training.epochs=1", "evaluation.sets=[]", "evaluation.best_epoch=null", "--seeds", "1,2"]
    with monkeypatch.context() as patch:
        send_at_call(patch, trackers.JsonLines, "write", 1)
        assert neuroada(capfd, path, *short)[0] == 75
    code, err = neuroada(capfd, path, *short, "--resume", "--force-resume", "optimizer.beta2=0.99")
    assert code == 0 and "resuming anyway" in err
    assert [(tmp_path / "out" / f"seed-{seed}" / "results.json").exists() for seed in (1, 2)] == [True, True]


@pytest.mark.filterwarnings("always::neuroada_jax.errors.NeuroadaWarning")
def test_a_forced_alpha_is_trained_with_and_what_was_chosen_cannot_be_forced(tmp_path, inputs, monkeypatch, capfd):
    path = settings(tmp_path, inputs)
    short = ["training.epochs=1", "evaluation.sets=[]", "evaluation.best_epoch=null"]
    lora = ["method=lora", "lora.r=2", "lora.alpha=4", "lora.targets=[q_proj]"]
    forced = ["--resume", "--force-resume"]

    def stopped(*options):
        with monkeypatch.context() as patch:
            send_at_call(patch, trackers.JsonLines, "write", 1)
            assert neuroada(capfd, path, *short, *options, "--overwrite")[0] == 75

    stopped()
    for other in ("bypass.score=reverse", "bypass.neurons=0.5", "bypass.layers=[0]", "bypass.k=1"):
        code, err = neuroada(capfd, path, *short, *forced, other)
        field = other.partition("=")[0]
        assert code == 2 and f"what trains was chosen when the run began and cannot change: {field} (" in err
    stopped(*lora)
    code, err = neuroada(capfd, path, *short, *lora, *forced, "lora.r=4")
    assert code == 2 and "cannot change: lora.r (2 then, 4 now)" in err
    states = []
    with monkeypatch.context() as patch:
        save = run._save_adapter
        patch.setattr(run, "_save_adapter", lambda *given: states.append(given[-1]) or save(*given))
        code, err = neuroada(capfd, path, *short, *lora, *forced, "lora.alpha=40")
    assert code == 0 and "resuming after step 4" in err
    assert native.read(str(tmp_path / "out" / "adapter")).metadata["lora"] == {"r": 2, "alpha": 40.0}
    assert {float(scale) for leaf in jax.tree.leaves(states[-1].columns) for scale in np.ravel(leaf)} == {20.0}


def test_a_run_on_eight_devices_goes_on_there_and_on_another_mesh(tmp_path, inputs, monkeypatch, capfd):
    path = settings(tmp_path, inputs, batch_size=8)
    short = ["evaluation.sets=[]", "evaluation.best_epoch=null", "parallel.mode=shard_map", "parallel.devices=8"]

    def train(name, *options, code=0):
        found, err = neuroada(capfd, path, *short, f"output={tmp_path / name}", *options)
        assert found == code, err
        return err

    train("whole")
    with monkeypatch.context() as patch:
        send_at_call(patch, trackers.JsonLines, "write", 1)
        assert "step 4 is saved" in train("same", code=75)
    shutil.copytree(tmp_path / "same", tmp_path / "other")
    train("same", "--resume")
    mesh = ["parallel.mode=jit", "parallel.fsdp=2", "parallel.devices=4"]
    assert "resuming after step 4" in train("other", "--resume", *mesh)

    whole, same, other = (native.read(str(tmp_path / name / "adapter")).values for name in ("whole", "same", "other"))
    assert (tmp_path / "same" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    for module, values in whole.items():
        assert values.tobytes() == same[module].tobytes()
        np.testing.assert_allclose(values, other[module], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("always::neuroada_jax.errors.NeuroadaWarning")
def test_what_may_change_and_what_may_not(tmp_path, inputs, monkeypatch, capfd):
    rows, held_out = (write_rows(tmp_path / name) for name in ("rows.jsonl", "dev.jsonl"))
    path = settings(tmp_path, inputs, rows)
    short = ["training.epochs=1", "evaluation.sets=[]", "evaluation.best_epoch=null", f"data.validation={held_out}"]
    with monkeypatch.context() as patch:
        send_at_call(patch, trackers.JsonLines, "write", 1)
        neuroada(capfd, path, *short)
    code, err = neuroada(capfd, path, *short, "--resume", "optimizer.learning_rate=0.03", "training.log_every=3")
    assert code == 2 and err.splitlines()[-2:] == [
        "changed since the last run: optimizer.learning_rate (0.02 then, 0.03 now), training.log_every (4 then, 3 now)",
        f"neuroada: error: {tmp_path / 'out'}: cannot resume with another config; changed: optimizer.learning_rate "
        "(0.02 then, 0.03 now) (--force-resume resumes anyway)",
    ]
    held_out.write_text(held_out.read_text().replace("after a,", "behind a,"))
    code, err = neuroada(capfd, path, *short, "--resume")
    assert code == 2 and "cannot resume with other rows of data.validation than the run began with" in err
    rows.write_text(rows.read_text().replace("after a,", "behind a,"))
    code, err = neuroada(capfd, path, *short, "--resume")
    assert code == 2 and "cannot resume on other training rows than those that the run began with" in err
    forced = [*short, "--resume", "--force-resume", "training.log_every=3", "training.keep_last=1", "merge=true"]
    code, err = neuroada(capfd, path, *forced)
    assert code == 0 and "resuming after step 4" in err
    assert "on other training rows than those that the run began with; resuming anyway (--force-resume)" in err
    assert "log_every: 3" in (tmp_path / "out" / "config.yaml").read_text()
    code, err = neuroada(capfd, path, *short, "--force-resume")
    assert code == 2 and "--force-resume: only together with --resume" in err


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory, inputs):
    """The directories of a run that was stopped after a checkpoint, and of runs of two seeds, the second one stopped."""
    folder = tmp_path_factory.mktemp("unfinished")
    path = settings(folder, inputs)
    short = ["training.epochs=1", "evaluation.sets=[]", "evaluation.best_epoch=null"]
    for name, writes, options in (("one", 1, []), ("two", 3, ["--seeds", "1,2"])):
        with pytest.MonkeyPatch.context() as patch:
            send_at_call(patch, trackers.JsonLines, "write", writes)
            assert cli.main(["train", str(path), *short, f"output={folder / name}", *options]) == 75
    return folder


COMMANDS = {
    "merge": ["--adapter", "{}", "--out", "{out}"],
    "generate": ["--adapter", "{}", "--prompt", "a"],
    "generate --model": ["--model", "{}", "--prompt", "a"],
    "evaluate": ["--adapter", "{}", "--task", "boolq"],
    "export": ["{}", "--to", "peft-shira", "--out", "{out}"],
    "inspect": ["{}"],
}


def error_of(capfd, command, directory, out):
    capfd.readouterr()
    arguments = [argument.format(directory, out=out) for argument in COMMANDS[command]]
    assert cli.main([command.split()[0], *arguments]) == 2
    assert not out.exists()
    return capfd.readouterr().err.splitlines()[-1].removeprefix("neuroada: error: ").removeprefix(str(directory))


def test_na_load_says_it_too(unfinished):
    one = unfinished / "one"
    resume = f"neuroada train {one / 'config.yaml'} --resume"
    message = f"{one / 'adapter'}: the run in {one} is not finished; resume it with: {resume}"
    assert message_of(lambda: na.load("model", adapter=one / "adapter")) == message


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_on_a_run_that_is_not_finished_says_how_to_resume_it(command, unfinished, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    one, two, out = unfinished / "one", unfinished / "two", tmp_path / "out"
    for path in (one, one / "adapter", one / "merged"):
        resume = f"neuroada train {one / 'config.yaml'} --resume"
        assert error_of(capfd, command, path, out) == f": the run in {one} is not finished; resume it with: {resume}"
    every = f"{two / 'seed-1' / 'adapter'}, {two / 'seed-2' / 'adapter'}"
    for path in (two, two / "adapter"):
        message = error_of(capfd, command, path, out)
        assert message == f": {two} holds runs of several seeds; give the adapter of one of them: {every}"
    assert "is not finished" in error_of(capfd, command, two / "seed-2" / "adapter", out)
    finished = two / "seed-1"
    assert error_of(capfd, command, finished, out) == f" is the directory of a run; its adapter is {finished / 'adapter'}"
    # Beside a config of the user's own there is no run.
    shutil.copy(one / "config.yaml", tmp_path)
    assert "resume" not in error_of(capfd, command, tmp_path / "none", out) + error_of(capfd, command, tmp_path, out)


def test_the_command_that_is_named_resumes_the_run_also_where_it_was_moved(unfinished, tmp_path, monkeypatch, capfd):
    moved = shutil.copytree(unfinished / "one", tmp_path / "moved")
    resume = error_of(capfd, "inspect", moved, tmp_path / "out").partition("resume it with: neuroada ")[2]
    assert f"output={moved}" in resume
    assert cli.main(resume.split()) == 0
    assert "resuming after step 4" in capfd.readouterr().err and (moved / "adapter" / "adapter.json").is_file()


def test_a_run_that_is_stopped_before_it_began_is_started_again(tmp_path, inputs, monkeypatch, capfd):
    path = settings(tmp_path, inputs)
    again = f"neuroada: stopped before the run had begun; start it with: neuroada train {path}"
    with monkeypatch.context() as patch:
        send_at_call(patch, continuation.ContinuationScorer, "prepare", 1)
        code, err = neuroada(capfd, path)
        assert code == 75 and err.splitlines()[-1] == again
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("name: another run\n")
    with monkeypatch.context() as patch:
        send_at_call(patch, continuation.ContinuationScorer, "prepare", 1)
        code, err = neuroada(capfd, path, "--overwrite", "--json")
        assert code == 75 and err.splitlines()[-1] == f"{again} --json --overwrite"
    assert (tmp_path / "out" / "config.yaml").read_text() == "name: another run\n"


# The pieces by themselves.


def metrics_line(step, loss=0.5):
    return {"step": step, "loss": loss, "learning_rate": 0.1, "gradient_norm": 1.0, "labels": 3, "tokens": 9}


def test_lines_are_whole_and_never_repeat_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = trackers.JsonLines(path, 0)
    log.write([metrics_line(1), metrics_line(2, math.nan)])
    log.write([metrics_line(3)])
    log.close()
    content = path.read_bytes()
    assert [json.loads(line)["loss"] for line in content.splitlines()] == [0.5, None, 0.5]
    second = content.index(b"\n", content.index(b"\n") + 1)
    for cut in range(second + 1, len(content)):  # a process that died as it wrote the third
        path.write_bytes(content[:cut])
        log = trackers.JsonLines(path, 2)
        assert [line["step"] for line in log.lines] == [1, 2]
        log.write([metrics_line(3)])
        log.close()
        assert path.read_bytes() == content
    with pytest.warns(NeuroadaWarning, match="1 of the 4 lines are missing$"):
        trackers.JsonLines(path, 4).close()


@pytest.mark.parametrize("damage", ["null", "{", '{"step": 2}', '{"step": "2"}', b"\xff"])
def test_a_damaged_line_of_metrics_is_named_and_the_others_stay(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(metrics_line(step)).encode() for step in (1, 2, 3)]
    lines[1] = damage if isinstance(damage, bytes) else damage.encode()
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.warns(NeuroadaWarning, match="1 of the 3 lines are missing; line 2 is damaged"):
        log = trackers.JsonLines(path, 3)
    log.close()
    assert [line["step"] for line in log.lines] == [1, 3]


@pytest.mark.parametrize("damage", ["null", "{", '{"value": 1}', '{"step": 2}', '{"step": 2, "value": "x"}'])
def test_a_damaged_line_of_epochs_is_one_line(tmp_path, damage):
    path = tmp_path / "epochs.jsonl"
    path.write_text('{"step": 1, "value": 0.5}\n' + damage + "\n")
    assert message_of(kept_states.KeptStates, tmp_path, "epochs", lambda *_: None, 3).startswith(
        f"{path}:2: damaged, expected"
    )


def test_lines_on_a_full_disk(tmp_path, monkeypatch):
    log = trackers.JsonLines(tmp_path / "metrics.jsonl", 0)
    write, calls = os.write, []

    def until_full(file, text):
        if calls:
            raise OSError(28, "No space left on device")
        calls.append(1)
        return write(file, text[:10])

    monkeypatch.setattr(os, "write", until_full)
    message = message_of(log.write, [{"step": 1, "loss": 0.5}])
    log.close()
    assert message == f"{tmp_path / 'metrics.jsonl'}: cannot be written (No space left on device)"
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_stop_that_a_destructor_drops_is_asked_for_again(capfd):
    class Sending:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)  # the handler runs here, and Python drops what it raises

    hook, handlers = sys.unraisablehook, [signal.getsignal(number) for number in (*signals.SIGNALS, signals.FORWARDED)]

    def work():
        Sending()
        for _ in range(500):
            time.sleep(0.01)

    with signals.listening():
        assert signal.getsignal(signals.FORWARDED) is handlers[-1]  # a caller's own
    with pytest.raises(signals.Stopped), signals.listening():
        work()
    said = capfd.readouterr().err
    assert "SIGTERM: saving, then stopping" in said and "Traceback" not in said and "ignored" not in said
    assert sys.unraisablehook is hook
    assert handlers == [signal.getsignal(number) for number in (*signals.SIGNALS, signals.FORWARDED)]


def test_a_stop_that_is_held_back():
    with signals.listening() as stop, stop.held():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(signals.Stopped), stop.held(False):
            pytest.fail("is not reached")
    with pytest.raises(signals.Stopped), signals.listening():
        os.kill(os.getpid(), signal.SIGTERM)


def test_no_handlers_outside_the_main_thread():
    seen = []

    def work():
        with signals.listening() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, signal.getsignal(signal.SIGTERM))]


def test_the_second_signal_ends_at_once():
    """Also while Python is deep in a call of a library: here, in one that waits for a lock for ever."""
    script = """if True:
        import ctypes
        from neuroada_jax.training import signals
        with signals.listening() as stop, stop.held():
            print("ready", flush=True)
            library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            library.pthread_mutex_lock(mutex)
            library.pthread_mutex_lock(mutex)  # unlike other waits, no signal ends this one
    """
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert "SIGINT: saving, then stopping" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM again: ending at once" in process.stderr.readline()
    assert process.wait(30) == 128 + signal.SIGTERM
    process.stdout.close()
    process.stderr.close()
