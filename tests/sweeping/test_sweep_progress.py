"""A sweep that was stopped or killed goes on to the values of one that was not, wherever it ended."""

import os
import shlex
import shutil
import signal

import jax
import numpy as np
import pytest
import safetensors.numpy
from data_helpers import write_lines
from helpers import run_config, write_bert, write_config, write_model, write_rows
from test_sweep_command import RATE, read, sweep_of

import neuroada_jax as na
from neuroada_jax import cli, files
from neuroada_jax.commands import shared
from neuroada_jax.sweeping import group, scoring, starts, store

pytestmark = pytest.mark.filterwarnings("always::neuroada_jax.errors.NeuroadaWarning")
GRID = {RATE: [1e-9, 0.01, 0.02, 2e-9], "seed": [42, 43]}
TOTAL, THIRD = 6, 2


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A config whose members validate every step and are scored."""
    folder = tmp_path_factory.mktemp("inputs")
    model, rows = write_model(folder / "model"), write_rows(folder / "rows.jsonl", 24)
    return run_config(
        folder,
        model,
        rows,
        bypass={"targets": ["q_proj"], "k": 1},
        data={"validation": str(write_rows(folder / "held_back.jsonl", 22))},
        optimizer={"learning_rate": 1e-3, "schedule": "cosine", "warmup_ratio": 0.3},
        training={"steps": TOTAL, "validate_every": 1, "log_every": 1},
        evaluation={"sets": [{"name": "seen", "data": str(rows), "limit": 2, "max_new_tokens": 2}]},
    )


def made(folder, content):
    folder.mkdir()
    return write_config(folder / "run.yaml", content), folder / "out"


@pytest.fixture(scope="module")
def complete(tmp_path_factory, content):
    """What sweeps leave that nothing ended, without halving and with it."""
    left = {}
    for flags in ((), ("--halving",)):
        config = made(tmp_path_factory.mktemp("complete") / "sweep", content)
        assert sweep_of(config, GRID, *flags) == 0
        left[flags] = results(config)
    return left


def results(config):
    """Return the records, and the arrays of the adapters, of all members."""
    arrays = {
        path.parents[1].name: safetensors.numpy.load_file(path)
        for path in sorted(config[1].glob("members/*/adapter/adapter.safetensors"))
    }
    assert not list(config[1].glob("members/*/progress*"))
    return read(config)["members"], arrays


def assert_equal(found, expected):
    """Check that two sweeps left the same; other groups pad to other lengths, which may round otherwise."""
    for one, other in zip(found[0], expected[0], strict=True):
        assert [line["step"] for line in one["steps"]] == [line["step"] for line in other["steps"]]
        losses = [[line["value"] for line in record["steps"]] for record in (one, other)]
        np.testing.assert_allclose(*losses, rtol=1e-6)
        same = [{**record, "steps": None, "validation": None, "best_step": None} for record in (one, other)]
        assert same[0] == same[1]
    assert found[1].keys() == expected[1].keys()
    for name, arrays in expected[1].items():
        for key, array in arrays.items():
            np.testing.assert_allclose(found[1][name][key], array, atol=1e-6, err_msg=f"{name} {key}")


def ended_at(monkeypatch, step, how, nth=1):
    """End the process's sweep where a group is at a step, for the n-th time: by SIGTERM, or as `kill -9` would."""
    look, seen = group.Group._look, []

    def ending(self, pending):
        loss = look(self, pending)
        seen.append(self.step)
        if seen.count(step) == nth and self.step == step:
            os.kill(os.getpid(), signal.SIGTERM) if how == "stop" else killed()
        return loss

    monkeypatch.setattr(group.Group, "_look", ending)


def killed():
    raise SystemExit(137)


# (flags, flags of the second call, step, how, n-th time): with --at-once 3 there are three groups.
ENDS = [
    pytest.param((), (), 1, "stop", 1, marks=pytest.mark.slow),
    ((), (), 4, "stop", 1),
    pytest.param(("--at-once", "3"), (), TOTAL, "stop", 2, marks=pytest.mark.slow),
    pytest.param(("--at-once", "3"), ("--at-once", "2"), 3, "stop", 3, marks=pytest.mark.slow),
    (("training.save_every=2",), (), 5, "kill", 1),
    pytest.param(("training.save_every=2",), ("training.save_every=1",), 4, "kill", 1, marks=pytest.mark.slow),
    pytest.param(("--halving",), ("--halving",), 1, "stop", 1, marks=pytest.mark.slow),
    pytest.param(
        ("--halving", "--at-once", "3"), ("--halving", "--at-once", "3"), THIRD, "stop", 2, marks=pytest.mark.slow
    ),
    pytest.param(("--halving",), ("--halving",), 4, "stop", 1, marks=pytest.mark.slow),
    pytest.param(("--halving",), ("--halving",), 3, "kill", 1, marks=pytest.mark.slow),
    pytest.param(("--halving", "--at-once", "2"), ("--halving",), 5, "kill", 2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("first, second, step, how, nth", ENDS)
def test_an_ended_sweep_goes_on(tmp_path, content, complete, monkeypatch, capsys, first, second, step, how, nth):
    config = made(tmp_path / "sweep", content)
    with monkeypatch.context() as patch:
        ended_at(patch, step, how, nth)
        if how == "kill":
            with pytest.raises(SystemExit, match="137"):
                sweep_of(config, GRID, *first)
        else:
            assert sweep_of(config, GRID, *first) == shared.STOPPED
            said = capsys.readouterr().err
            assert f"stopped, step {step} of the members in work is saved; go on with: neuroada sweep" in said
    assert not (config[1] / "sweep.json").exists()
    steps = []
    advance = group.Group.advance

    def counting(self, params, until, *rest):
        steps.append((len(self.starts), until - self.step))
        return advance(self, params, until, *rest)

    monkeypatch.setattr(group.Group, "advance", counting)
    assert sweep_of(config, GRID, *second) == 0
    assert_equal(results(config), complete[("--halving",) if "--halving" in first else ()])
    whole = 8 * TOTAL if "--halving" not in first else 8 * THIRD + 4 * (TOTAL - THIRD)
    assert sum(members * left for members, left in steps) < whole  # what was saved is not done again


def test_scoring_that_is_interrupted_is_all_that_is_done_again(tmp_path, content, complete, monkeypatch):
    config = made(tmp_path / "sweep", content)
    scores, scored = scoring.scores, []

    def ending(start, *rest):
        scored.append(start.member.name)
        if len(scored) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return scores(start, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "scores", ending)
        assert sweep_of(config, GRID) == shared.STOPPED
    monkeypatch.setattr(group.Group, "_look", lambda *_: pytest.fail("a step was taken again"))
    assert sweep_of(config, GRID) == 0
    assert_equal(results(config), complete[()])


def test_a_rate_beyond_the_grid_goes_on_too(tmp_path, content, monkeypatch):
    grid = {RATE: [1e-4, 2e-4]}
    whole, config = made(tmp_path / "whole", content), made(tmp_path / "sweep", content)
    assert sweep_of(whole, grid, "--extend") == 0
    with monkeypatch.context() as patch:
        ended_at(patch, 4, "stop", 2)  # the first member beyond
        assert sweep_of(config, grid, "--extend") == shared.STOPPED
    assert len(list(config[1].glob("members/*/progress.safetensors"))) == 1
    assert sweep_of(config, grid, "--extend") == 0
    assert_equal(results(config), results(whole))


# Every form of a member's state: factors, bfloat16 values, moments of other optimisers, skipped steps, a classifier.
KINDS = {
    "lora": {"method": "lora", "lora": {"r": 2, "targets": ["q_proj"]}},
    "official": {"fidelity": "official", "model": {"dtype": "bfloat16"}},
    "shared columns": {"bypass": {"shared_columns": True, "targets": ["q_proj"]}},
    "some neurons": {"bypass": {"neurons": 0.5, "targets": ["q_proj"]}},
    "gradient": {"bypass": {"score": "gradient", "targets": ["q_proj"]}},
    "random over the model": {"bypass": {"score": "random", "random_over": "model", "targets": ["q_proj"]}},
    "skipping": {"watchdog": {"nonfinite": "skip"}},
    "stalled": {"training": {"early_stopping": 1}},
    "encoder": {},
}


@pytest.fixture
def usual_promotion():
    """JAX's own promotion of dtypes, since its attention mixes bfloat16 and float32 where a step is differentiated."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("usual_promotion")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_member_goes_on(tmp_path, content, monkeypatch, kind):
    changed = {**content, "evaluation": {"sets": [], "before": False}}
    for section, fields in KINDS[kind].items():
        changed[section] = {**changed.get(section, {}), **fields} if isinstance(fields, dict) else fields
    if kind == "encoder":
        rows = [{"sentence1": "abcdef"[i % 6] * (1 + i % 9), "sentence2": "b", "label": i % 2, "idx": 0} for i in range(40)]
        data = {"task": "mrpc", "validation": str(write_lines(tmp_path / "dev.jsonl", rows[20:])), "max_length": 40}
        changed["data"] = {**data, "train": str(write_lines(tmp_path / "train.jsonl", rows[:20]))}
        changed["model"] = {"path": str(write_bert(tmp_path / "bert")), "dtype": "float32"}
        changed["bypass"] = {"k": 2, "targets": ["query"]}
    grid, whole, config = {RATE: [0.02, 0.05]}, made(tmp_path / "whole", changed), made(tmp_path / "sweep", changed)
    assert sweep_of(whole, grid) == 0
    with monkeypatch.context() as patch:
        ended_at(patch, 2, "stop")
        assert sweep_of(config, grid) == shared.STOPPED
    assert len(list(config[1].glob("members/*/progress.safetensors"))) == 2
    assert sweep_of(config, grid) == 0
    assert_equal(results(config), results(whole))


def stopped_sweep(folder, content, monkeypatch):
    config = made(folder, content)
    with monkeypatch.context() as patch:
        ended_at(patch, 4, "stop")
        assert sweep_of(config, {RATE: [0.01, 0.02]}) == shared.STOPPED
    return config, sorted(config[1].glob("members/*/progress.safetensors"))


def flipped(path):
    path.write_bytes(path.read_bytes()[:-9] + b"\x00\x55" + path.read_bytes()[-7:])


def other_format(path):
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(tensors, path, {"neuroada_progress": '{"format": 2}'})


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "a flipped byte": flipped,
    "not one": lambda path: path.write_bytes(b"{}" * 50),
    "other format": other_format,
    "no metadata": lambda path: safetensors.numpy.save_file(safetensors.numpy.load_file(path), path),
}


@pytest.mark.parametrize(
    "damage", [each if each == "a flipped byte" else pytest.param(each, marks=pytest.mark.slow) for each in DAMAGES]
)
def test_a_damaged_file_starts_its_member_again(tmp_path, content, monkeypatch, capsys, damage):
    config, (one, _) = stopped_sweep(tmp_path / "sweep", content, monkeypatch)
    DAMAGES[damage](one)
    assert sweep_of(config, {RATE: [0.01, 0.02]}) == 0
    said = capsys.readouterr().err
    assert f"{one}: damaged" in said and "starts again" in said and "going on from step 4: 1 member" in said
    steps = [[line["step"] for line in record["steps"]] for record in read(config)["members"]]
    assert steps == [list(range(1, TOTAL + 1))] * 2


def test_other_rows_do_not_go_on(tmp_path, content, monkeypatch, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", 24)
    config, _ = stopped_sweep(tmp_path / "sweep", content | {"data": content["data"] | {"train": str(rows)}}, monkeypatch)
    before = {path: path.read_bytes() for path in config[1].rglob("*") if path.is_file()}
    rows.write_text(rows.read_text().replace("a", "b"))
    assert sweep_of(config, {RATE: [0.01, 0.02]}) == 2
    assert "a sweep over other rows than those of today" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


def test_another_base_does_not_go_on(tmp_path, content, monkeypatch, capsys):
    model = write_model(tmp_path / "model")
    config, _ = stopped_sweep(tmp_path / "sweep", content | {"model": content["model"] | {"path": str(model)}}, monkeypatch)
    weights = model / "model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    safetensors.numpy.save_file({name: array * 1.5 for name, array in tensors.items()}, weights, {"format": "pt"})
    assert sweep_of(config, {RATE: [0.01, 0.02]}) == 2
    assert "a sweep on another base model" in capsys.readouterr().err


def test_what_a_killed_writer_left_is_removed(tmp_path, content, monkeypatch):
    config, (one, _) = stopped_sweep(tmp_path / "sweep", content, monkeypatch)
    left = one.with_name(f".{one.name}.0123456789abcdef.neuroada-tmp")
    left.write_bytes(b"half")
    assert sweep_of(config, {RATE: [0.01, 0.02]}) == 0
    assert not left.exists()


def test_overwriting_starts_again(tmp_path, content, monkeypatch, capsys):
    config, _ = stopped_sweep(tmp_path / "sweep", content, monkeypatch)
    capsys.readouterr()
    assert sweep_of(config, {RATE: [0.01, 0.02]}, "--overwrite") == 0
    assert "go on from" not in capsys.readouterr().err


def rate_of(path):
    return float(path.parent.name.partition("=")[2].partition(",")[0])


def test_files_of_another_member_are_not_taken_for_its_own(tmp_path, content, monkeypatch, capsys):
    whole = made(tmp_path / "whole", content)
    assert sweep_of(whole, {RATE: [0.01, 0.02]}) == 0
    config, (one, other) = stopped_sweep(tmp_path / "sweep", content, monkeypatch)
    one.write_bytes(other.read_bytes())
    capsys.readouterr()
    assert sweep_of(config, {RATE: [0.01, 0.02]}) == 0
    assert f"{one}: damaged (it is of another member or config)" in capsys.readouterr().err
    assert_equal(results(config), results(whole))
    for name in ("member.json", "adapter"):
        source, target = other.parent / name, one.parent / name
        files.remove(target)
        shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
        assert sweep_of(config, {RATE: [0.01, 0.02]}) == 0
        assert "runs again" in capsys.readouterr().err
        assert_equal(results(config), results(whole))


def cut(adapter):
    path = adapter / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:200])


def emptied(adapter):
    files.remove(adapter)
    adapter.mkdir()


def a_file(adapter):
    files.remove(adapter)
    adapter.write_text("no folder")


def with_more(adapter):
    (adapter / "more").mkdir()


@pytest.mark.parametrize(
    "damage", [cut, *(pytest.param(each, marks=pytest.mark.slow) for each in (emptied, a_file, files.remove, with_more))]
)
def test_an_adapter_that_is_not_what_was_written_is_made_again(tmp_path, content, capsys, damage):
    config = made(tmp_path / "sweep", content | {"evaluation": {"sets": [], "before": False}})
    assert sweep_of(config, {RATE: [0.01, 0.02]}) == 0
    before = results(config)
    (best,) = [path for path in config[1].glob("members/*/adapter") if rate_of(path) == 0.02]
    damage(best)
    assert sweep_of(config, {RATE: [0.01, 0.02]}) == 0
    assert "no longer has the adapter that was written" in capsys.readouterr().err
    assert_equal(results(config), before)
    assert (config[1] / "best" / "adapter" / "adapter.safetensors").read_bytes() == (
        best / "adapter.safetensors"
    ).read_bytes()


def test_members_of_another_config_run_again(tmp_path, content):
    """The fields of a grid may differ from call to call; what a member was trained with may not."""
    config = made(tmp_path / "sweep", content | {"evaluation": {"sets": [], "before": False}})
    assert sweep_of(config, {"seed": [42]}, f"{RATE}=1e-9") == 0
    slow = read(config)["members"][0]["validation"]
    assert sweep_of(config, {"seed": [42], RATE: [0.05]}, f"{RATE}=0.05") == 0
    assert sweep_of(config, {"seed": [42]}, f"{RATE}=0.05") == 0
    assert read(config)["members"][0]["validation"] < slow - 0.01


def test_the_order_of_the_grid_does_not_matter(tmp_path, content, capsys):
    config = made(tmp_path / "sweep", content | {"evaluation": {"sets": [], "before": False}})
    assert sweep_of(config, {RATE: [0.01], "seed": [1, 2]}) == 0
    assert sweep_of(config, {"seed": [2, 1], RATE: [0.01]}) == 0
    assert "2 of 2 members have finished before" in capsys.readouterr().err


@pytest.mark.parametrize(
    "axis, added",
    [
        pytest.param("bypass.k", 2, marks=pytest.mark.slow),
        ("seed", 43),
        pytest.param("optimizer.schedule", "linear", marks=pytest.mark.slow),
    ],
)
def test_a_further_field_trains_only_what_is_new(tmp_path, content, capsys, axis, added):
    """Members of the first grid have other folders, and fields, than those of the second."""
    config = made(tmp_path / "sweep", content)
    assert sweep_of(config, {RATE: [0.01, 0.02]}) == 0
    before = {record["fields"][RATE]: record for record in read(config)["members"]}
    old = {"bypass.k": 1, "seed": 42, "optimizer.schedule": "cosine"}[axis]
    assert sweep_of(config, {RATE: [0.01, 0.02], axis: [old, added]}) == 0
    assert "2 of 4 members have finished before" in capsys.readouterr().err
    found = read(config)
    assert [record["fields"] for record in found["members"]] == [
        {RATE: rate, axis: value} for rate in (0.01, 0.02) for value in (old, added)
    ]
    for record in found["members"]:
        if record["fields"][axis] == old:
            assert record["validation"] == before[record["fields"][RATE]]["validation"]
    assert len(found["cells"]) == (2 if axis == "seed" else 4)
    assert found["best"]["fields"].keys() == {RATE, axis}


@pytest.mark.parametrize(
    "grid, flags, statuses",
    [
        ({RATE: [1e-9, 2e-9, 3e-9, 0.01, 0.02, 0.03]}, (), ["dropped"] * 3 + ["finished"] * 3),
        pytest.param(
            *({RATE: [1e38, 2e38, 3e38, 1e-9, 0.01, 0.02]}, (), ["diverged"] * 3 + ["finished"] * 3), marks=pytest.mark.slow
        ),
        pytest.param(
            {RATE: [1e38, 2e38, 0.01, 0.02]},
            ("watchdog.nonfinite=skip", "watchdog.max_skips=100"),
            ["diverged"] * 2 + ["finished"] * 2,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_halving_that_is_ended_while_it_drops_has_decided(tmp_path, content, monkeypatch, grid, flags, statuses):
    config = made(tmp_path / "sweep", content | {"evaluation": {"sets": [], "before": False}})
    write, written = store.Store.write, []

    def ending(self, member, record):
        write(self, member, record)
        written.append(member)
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "write", ending)
        with pytest.raises(SystemExit, match="137"):
            sweep_of(config, grid, "--halving", *flags)
    assert len(written) == 1
    assert sweep_of(config, grid, "--halving", *flags) == 0
    assert [record["status"] for record in read(config)["members"]] == statuses
    # Further members are compared with one another; what was decided stands.
    assert sweep_of(config, {RATE: [*grid[RATE], 4e-9, 0.04]}, "--halving", *flags) == 0
    assert [record["status"] for record in read(config)["members"]] == [*statuses, "dropped", "finished"]


def test_a_sweep_that_is_stopped_before_it_overwrites_is_to_overwrite(tmp_path, content, monkeypatch, capsys):
    config, prepare = made(tmp_path / "sweep", content), starts.prepare
    assert sweep_of(config, {RATE: [0.01]}, "optimizer.schedule=linear") == 0
    ended_at(monkeypatch, 2, "stop")

    def ending(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return prepare(*arguments)

    for patched, overwrites in ((ending, True), (prepare, False)):
        monkeypatch.setattr(starts, "prepare", patched)
        capsys.readouterr()
        assert sweep_of(config, {RATE: [0.01]}, "--overwrite") == shared.STOPPED
        command = capsys.readouterr().err.rpartition("go on with: neuroada ")[2]
        assert ("--overwrite" in command) is overwrites
    monkeypatch.undo()
    assert cli.main(shlex.split(command)) == 0


def test_a_signal_while_the_last_step_is_saved_is_heard(tmp_path, content, monkeypatch):
    config, write, sent = made(tmp_path / "sweep", content), store.Store.write_progress, []

    def ending(self, member, done, about):
        if done.step == TOTAL and not sent:
            sent.append(member)
            os.kill(os.getpid(), signal.SIGTERM)
        write(self, member, done, about)

    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "write_progress", ending)
        patch.setattr(scoring, "scores", lambda *_: pytest.fail("scored after the signal"))
        assert sweep_of(config, {RATE: [0.01, 0.02]}, f"training.save_every={TOTAL}") == shared.STOPPED
    assert sweep_of(config, {RATE: [0.01, 0.02]}) == 0


def test_ctrl_c_in_python_saves(tmp_path, content, monkeypatch):
    config = made(tmp_path / "sweep", content)
    settings = content | {"output": str(config[1])}
    with monkeypatch.context() as patch:
        ended_at(patch, 4, "stop")
        with pytest.raises(KeyboardInterrupt):
            na.sweep(settings, {RATE: [0.01, 0.02]})
    assert len(list(config[1].glob("members/*/progress.safetensors"))) == 2


def test_what_stands_in_the_way_is_said_before_the_training(tmp_path, content, capsys):
    for name, folder in (("members", False), ("best", False), ("sweep.json", True), ("sweep.png", True)):
        config = made(tmp_path / name, content)
        config[1].mkdir()
        (config[1] / name).mkdir() if folder else (config[1] / name).write_text("")
        assert sweep_of(config, {RATE: [0.01]}) == 2
        said = capsys.readouterr().err
        assert name in said and "cannot be written" in said and "step 1" not in said


def test_overwriting_keeps_the_run_of_the_chosen_config(tmp_path, content, capsys):
    config = made(tmp_path / "sweep", content | {"evaluation": {"sets": [], "before": False}})
    assert sweep_of(config, {RATE: [0.01]}) == 0
    mine = config[1] / "best" / "run" / "mine"
    mine.parent.mkdir()
    mine.write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    (config[1] / "members").rename(elsewhere)
    (config[1] / "members").symlink_to(elsewhere)
    assert sweep_of(config, {RATE: [1e38]}, "--overwrite") == 2
    assert mine.read_text() == "mine" and [path.name for path in mine.parents[1].iterdir()] == ["run"]
    assert list(elsewhere.iterdir())  # a link is removed, not what it leads to
