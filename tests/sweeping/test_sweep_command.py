"""`neuroada sweep`: what it leaves, what chooses, going on after an end, halving, rates beyond the grid, and bad input."""

import json
import math
import shlex

import jax
import numpy as np
import pytest
from helpers import run_config, write_config, write_model, write_rows

import neuroada_jax as na
from neuroada_jax import cli, files
from neuroada_jax.adapters import native
from neuroada_jax.errors import NeuroadaWarning, UserError
from neuroada_jax.sweeping import choice, grid, group, scoring, starts, sweep
from neuroada_jax.training import config_file, signals

RATE = "optimizer.learning_rate"
pytestmark = pytest.mark.filterwarnings("always::neuroada_jax.errors.NeuroadaWarning")  # the command line shows them


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A config with enough validation rows, and an evaluation set whose rows nothing is chosen by."""
    folder = tmp_path_factory.mktemp("inputs")
    model, rows = write_model(folder / "model"), write_rows(folder / "rows.jsonl", 24)
    held_back = write_rows(folder / "held_back.jsonl", 22)
    made = run_config(
        folder,
        model,
        rows,
        bypass={"targets": ["q_proj"], "k": 1},
        data={"validation": str(held_back)},
        training={"steps": 3, "validate_every": 1, "log_every": 1},
        evaluation={"sets": [{"name": "seen", "data": str(rows), "limit": 4, "max_new_tokens": 2}]},
    )
    return made


@pytest.fixture
def config(tmp_path, content):
    return write_config(tmp_path / "run.yaml", content), tmp_path / "out"


def sweep_of(config, grid, *options):
    path, out = config
    axes = [word for field, values in grid.items() for word in ("--grid", f"{field}={','.join(map(str, values))}")]
    return cli.main(["sweep", str(path), *axes, "--json", f"output={out}", *options])


def read(config):
    return files.read_json(config[1] / "sweep.json")


def test_what_a_sweep_prints_and_leaves(config, capsys):
    code = sweep_of(config, {RATE: [0.001, 0.02, 4.0], "seed": [42, 43]})
    printed = json.loads(capsys.readouterr().out)
    assert code == 0 and printed == read(config)
    assert len(printed["members"]) == 6 and not printed["at_edge"]
    for record in printed["members"]:
        assert record.keys() >= {"fields", "validation", "scores", "trained"}
        assert record["fields"].keys() == {RATE, "seed"} and set(record["scores"]) == {"seen"}
    best = printed["best"]
    assert best["fields"][RATE] == 0.02
    own = [record["validation"] for record in printed["members"] if record["fields"][RATE] == 0.02]
    assert best["validation"] == min(own)
    assert best["mean"]["validation"]["mean"] == pytest.approx(sum(own) / 2)
    low, high = best["mean"]["validation"]["interval"]
    assert low < min(own) and high > max(own)  # two values: the interval is 9 deviations wide on either side

    directory = config[1]
    assert (directory / "sweep.png").read_bytes().startswith(b"\x89PNG")
    chosen = config_file.load(str(directory / "best" / "config.yaml"))
    assert (chosen.optimizer.learning_rate, chosen.seed) == (0.02, best["fields"]["seed"])
    assert chosen.directory == directory / "best" / "run" and not chosen.directory.exists()
    adapter = native.read(str(directory / "best" / "adapter"))
    assert adapter.metadata["seed"] == best["fields"]["seed"]

    # The same command has nothing to train any more; without --json it prints a table.
    assert (
        cli.main(["sweep", str(config[0]), "--grid", f"{RATE}=1e-3,0.02,4", "--grid", "seed=42,43", f"output={directory}"])
        == 0
    )
    said = capsys.readouterr()
    assert "6 of 6 members have finished before" in said.err and "loading weights" not in said.err
    assert "validation loss" in said.out and "best" in said.out and "±" in said.out


def test_a_killed_sweep_goes_on_and_a_finished_member_does_not_run_again(config, monkeypatch):
    advance, ran = group.Group.advance, []

    def dying(self, params, until, *rest):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.extend(start.member.fields[RATE] for start in self.starts)
        return advance(self, params, until, *rest)

    monkeypatch.setattr(group.Group, "advance", dying)
    grid = {RATE: [0.01, 0.02, 0.03, 0.04]}
    assert sweep_of(config, grid, "--at-once", "2") == 130
    assert ran == [0.01, 0.02] and not (config[1] / "sweep.json").exists()
    before = {path: path.stat().st_mtime_ns for path in config[1].glob("members/*/adapter/*")}
    ran.append(None)  # alive again
    assert sweep_of(config, {RATE: [0.04, 0.02, 0.03, 0.01, 0.005]}) == 0  # and a wider grid
    assert ran == [0.01, 0.02, None, 0.04, 0.03, 0.005]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [record["fields"][RATE] for record in read(config)["members"]] == [0.04, 0.02, 0.03, 0.01, 0.005]


def test_members_are_saved_before_their_adapters_and_only_one_group_is_on_the_device(config, monkeypatch, capsys):
    save, begun, alive, groups = scoring.save, [], [], []

    def stopped(*given):
        begun.append(1)
        if len(begun) == 2:
            raise signals.Stopped(3)
        return save(*given)

    advance, initial = group.Group.advance, group.Group.__init__

    def noting(self, *given):
        initial(self, *given)
        groups.append(self)

    def counting(self, *given):
        alive.append(sum(isinstance(jax.tree.leaves(each.stack.state)[0], jax.Array) for each in groups))
        return advance(self, *given)

    grid, options = {RATE: [0.01, 0.02, 0.03]}, ("--at-once", "3", "evaluation.sets=[]")
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "save", stopped)
        assert sweep_of(config, grid, *options) == 75
    assert len(list(config[1].glob("members/*/progress.safetensors"))) == 2
    capsys.readouterr()
    monkeypatch.setattr(group.Group, "__init__", noting)
    monkeypatch.setattr(group.Group, "advance", counting)
    assert sweep_of(config, {RATE: [0.01, 0.02, 0.03, 0.04, 0.05]}, "--at-once", "1", "evaluation.sets=[]") == 0
    assert "going on from step 3: 2 members" in capsys.readouterr().err
    assert alive == [1, 1, 1, 1]  # the two that go on have no step left


@pytest.mark.slow
def test_another_config_or_other_rows_do_not_go_on(config, tmp_path, capsys):
    assert sweep_of(config, {RATE: [0.01]}) == 0
    assert sweep_of(config, {RATE: [0.01, 0.02]}, "training.batch_size=2") == 2
    assert "training.batch_size (4 then, 2 now)" in capsys.readouterr().err
    assert cli.main(["train", str(config[0]), f"output={config[1] / 'run'}"]) == 0
    assert cli.main(["sweep", str(config[0]), "--grid", f"{RATE}=0.01", f"output={config[1] / 'run'}"]) == 2
    assert "holds a run" in capsys.readouterr().err


@pytest.mark.slow
def test_half_of_the_cells_are_dropped_at_a_third_of_the_steps(config):
    assert sweep_of(config, {RATE: [1e-9, 2e-9, 0.01, 0.02], "bypass.k": [2]}, "--halving") == 0
    records = read(config)["members"]
    assert {record["fields"][RATE]: record["status"] for record in records} == {
        1e-9: "dropped",
        2e-9: "dropped",
        0.01: "finished",
        0.02: "finished",
    }
    assert [len(record["steps"]) for record in sorted(records, key=lambda each: each["fields"][RATE])] == [1, 1, 3, 3]
    assert all(bool(record["scores"]) is (record["status"] == "finished") for record in records)


def test_a_member_that_diverges_is_shown_and_left_out(config, capsys):
    assert sweep_of(config, {RATE: [0.01, 1e38]}) == 0
    assert "became NaN or infinite" in capsys.readouterr().err
    sound, lost = read(config)["members"]
    assert (sound["status"], lost["status"], lost["validation"], lost["scores"]) == ("finished", "diverged", None, {})
    assert read(config)["best"]["fields"] == {RATE: 0.01}
    capsys.readouterr()
    assert sweep_of(config, {RATE: [1e38]}, "--overwrite", "--json") == 2
    printed = capsys.readouterr()
    assert "no member is left" in printed.err
    assert json.loads(printed.out) == read(config)
    assert read(config)["best"] is None


def test_a_best_rate_at_the_edge_warns_and_extend_goes_on_outwards(config, capsys):
    assert sweep_of(config, {RATE: [1e-4, 2e-4], "bypass.k": [3]}) == 0
    assert "the highest of those tried" in capsys.readouterr().err and read(config)["at_edge"]
    assert sweep_of(config, {RATE: [1e-4, 2e-4], "bypass.k": [1, 3]}, "--extend") == 0  # the best one has finished before
    content = read(config)
    assert content["grid"][RATE] == [1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3]  # at most four times
    assert content["at_edge"] and content["best"]["fields"] == {RATE: 3.2e-3, "bypass.k": 3}


def record(rate, seed, validation, status="finished", score=0.0):
    scores = {"test": {"value": score, "metric": "accuracy"}}
    fields = {RATE: rate, "seed": seed}
    made = {"fields": fields, "cell": f"{rate}", "seed": seed, "status": status, "scores": scores, "trained": 1}
    return {**made, "validation": validation if status == "finished" else None}


def test_validation_chooses_and_scores_do_not():
    records = [record(1, 42, 0.5, score=0.9), record(2, 42, 0.4, score=0.1), record(1, 43, 0.5), record(2, 43, 0.5)]
    found = choice.cells(records)
    assert choice.best(found).fields == {RATE: 2} and choice.best_record(choice.best(found))["seed"] == 42
    # A cell whose members have not all finished is chosen only where there is no other.
    records[3] = record(2, 43, None, "diverged")
    assert choice.best(choice.cells(records)).fields == {RATE: 1}
    assert choice.best(choice.cells(records[3:])) is None
    assert choice.survivors({"a": [1.0], "b": [0.5], "c": [None], "d": [2.0]}) == {"a", "b"}
    low = choice.cells([record(0.1, 1, 0.1), record(0.4, 1, 0.2), record(0.8, 1, 0.2)])
    assert choice.edge(low, low[0]) == "lowest" and choice.beyond(low, low[0]) == 0.025
    assert choice.edge(low, low[1]) is None and choice.beyond(low, low[2]) == 1.6


BAD = [
    ("--grid optimizer.learning_rte=1", "did you mean 'optimizer.learning_rate'"),
    ("--grid learning_rate=1", "did you mean 'optimizer.learning_rate'"),
    ("--grid nonsense=1", "unknown field"),
    ("--grid optimizer.learning_rate=", "no values"),
    ("--grid optimizer.learning_rate", "expected FIELD=VALUE"),
    ("--grid optimizer.learning_rate=fast", "found 'fast'"),
    ("--grid optimizer.learning_rate=-1", "greater than 0"),
    ("--grid optimizer.learning_rate=nan,1", "optimizer.learning_rate"),
    ("--grid optimizer.learning_rate=[1", "not YAML"),
    ("--grid seed=1.5", "seed"),
    ("--grid seed=1,1", "given twice"),
    ("--grid seed=1 --grid seed=2", "given twice"),
    ("--grid seeds=1,2", "give the values to seed"),
    ("--grid bypass.k=0", "bypass.k"),
    ("--grid bypass.score=best", "bypass.score"),
    ("--grid data.max_length=8,16", "changes the shapes or the rows of data"),
    ("--grid model.path=a,b", "changes the shapes or the rows of model"),
    ("--grid output=a,b", "cannot be swept"),
    ("--grid bypass=1", "unknown field"),
    ("--grid seed=1 --at-once 0", "--at-once: expected at least 1"),
    ("--grid seed=1 data.validation=null training.validate_every=null", "never on what is reported"),
    ("--grid seed=1 bypass.score=custom", "a sweep does not take"),
    ("--grid classifier.train=true,false", "cannot be swept"),
    ("--grid classifier.class_weights=none,balanced", "it changes the loss"),
    ("--grid classifier.learning_rate=null,0.01", "llama is a decoder, which has no classifier"),
    ("--grid bypass.score=magnitude,lowrank", "bypass.rank: 32 is more than the rank of"),
    ("--grid lora.r=2,64 method=lora lora.targets=[q_proj]", "lora.r: 64 is more than the rank of"),
    (
        "--grid bypass.score=magnitude,gradient model.quantization=int8 bypass.select_from=original",
        "'original' needs a score of the weights alone",
    ),
    ("--grid training.steps=2,3 --grid training.epochs=1", "training.steps and training.epochs exclude each other"),
    ("--grid training.accumulation=1,2", "in turns over method, bypass, lora, optimizer, classifier.weight_decay"),
    ("--grid optimizer.learning_rate=1e39", "expected at most 3.4028e+38"),
    ("--grid training.steps=1180591620717411303424", "expected an integer below 2^31"),
    ("--grid seed=1 seeds=[1,2]", "--grid seed=1,2"),
    ("--grid seed=1 parallel.fsdp=2", "one device"),
    ("--grid bypass.k=1,2 method=lora lora.r=2 lora.targets=[q_proj]", "what differs has no effect"),
    ("--grid lora.r=1,2", "what differs has no effect"),
    ("--grid lora.alpha=null,2 method=lora lora.r=1 lora.targets=[q_proj]", "what differs has no effect"),
    ("--grid method=neuroada,lora --grid bypass.k=1,2 lora.targets=[q_proj]", "what differs has no effect"),
    ("--grid bypass.rank=4,8", "what differs has no effect"),
    ("--grid bypass.statistic_batches=1,2", "what differs has no effect"),
    ("--grid bypass.statistic_batches=null,16 bypass.score=activation", "what differs has no effect"),
    ("--grid bypass.select_from=null,quantised", "what differs has no effect"),
    ("--grid bypass.select_from=null,quantised bypass.score=gradient model.quantization=nf4", "what differs has no effect"),
    ("--grid bypass.select_from=null,original model.quantization=nf4", "what differs has no effect"),
    ("--grid classifier.learning_rate=null,0.01 optimizer.learning_rate=0.01", "what differs has no effect"),
    ("--grid classifier.weight_decay=null,0", "what differs has no effect"),
]


@pytest.mark.parametrize("words, expected", BAD)
def test_bad_input_is_one_line_and_writes_nothing(config, capsys, words, expected):
    assert cli.main(["sweep", str(config[0]), f"output={config[1]}", *shlex.split(words)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0 and said.startswith("neuroada: error: ") and expected in said
    assert not config[1].exists()


@pytest.mark.parametrize(
    "axes, base",
    [
        ({"bypass.score": ["random"], "bypass.random_over": ["neuron", "map"]}, {}),
        ({"bypass.layers": [None], "bypass.exclude_layers": [[0], [1]]}, {"bypass.layers": [0]}),
        ({"fidelity": ["official"], "optimizer.beta2": [0.999]}, {"optimizer.beta2": 0.95}),
    ],
)
def test_values_that_go_together_alone_are_a_grid(content, axes, base):
    content = json.loads(json.dumps(content))
    for name, value in base.items():
        config_file.apply_override(content, f"{name}={json.dumps(value)}")
    found = grid.members(config_file.from_dict(content, "sweep"), grid.check(axes, "--grid"), "--grid")
    assert len(found) == math.prod(map(len, axes.values()))


def test_skipped_steps_are_said_and_a_member_of_which_every_step_is_skipped_diverged(config, capsys, monkeypatch):
    look = group.Group._look

    def skipping(self, pending):
        sound = np.array([False, self.step > 1])
        return look(self, [metrics._replace(finite=metrics.finite & sound) for metrics in pending])

    monkeypatch.setattr(group.Group, "_look", skipping)
    assert sweep_of(config, {RATE: [0.02, 0.01]}, "watchdog.nonfinite=skip", "watchdog.max_skips=100") == 0
    said = capsys.readouterr().err
    assert [member["status"] for member in read(config)["members"]] == ["diverged", "finished"]
    assert "learning_rate 0.02: the loss became NaN or infinite at step 3; it is left out" in said
    assert "learning_rate 0.01: 1 of 3 steps had a NaN or infinite loss and were skipped" in said


def test_rates_so_close_that_the_next_is_one_of_them_end_the_extension(config):
    assert sweep_of(config, {RATE: [1e-3, 1.00001e-3]}, "--extend", "training.steps=1") == 0
    found = read(config)
    assert found["grid"][RATE] == [1e-3, 1.00001e-3] and len(found["members"]) == 2


def test_an_extension_ends_where_no_config_may_have_the_next_rate(config, capsys):
    # Rates that change nothing, so that the lowest is the best; the next one would be 0.
    assert sweep_of(config, {RATE: [1e-300, 1e-10]}, "--extend", "training.steps=1", "evaluation.sets=[]") == 0
    found = read(config)
    assert found["at_edge"] and found["grid"][RATE] == [1e-300, 1e-10] and found["best"]["fields"][RATE] == 1e-300
    assert "the lowest of those tried" in capsys.readouterr().err


def test_from_python(content, tmp_path):
    made = {**content, "output": str(tmp_path / "out"), "evaluation": {}}
    with pytest.warns(NeuroadaWarning, match="the highest of those tried"):
        found = na.sweep(made, {RATE: [0.01, 0.02]})
    assert found["best"]["fields"] == {RATE: 0.02} and found["at_edge"]
    for wrong, expected in (
        ([1], "expected a dict"),
        ({RATE: 1.0}, "expected a list"),
        ({}, "at least one field"),
        ({RATE: np.ones((2, 2))}, RATE),
        ({RATE: np.array(1.0)}, "expected a list"),
    ):
        with pytest.raises(UserError, match=expected):
            na.sweep(made, wrong)
    for wrong in (True, 0):
        with pytest.raises(UserError, match=f"at_once: expected an integer from 1, found {wrong!r}"):
            na.sweep(made, {"seed": [1]}, at_once=wrong)
    of_numpy = {"seed": np.array([42]), RATE: (np.float32(0.02),)}
    found = na.sweep({**made, "output": str(tmp_path / "numpy")}, of_numpy)
    assert json.loads(json.dumps(found["grid"]))["seed"] == [42]
    few = {**made, "data": {**made["data"], "validation": 0.2}, "output": str(tmp_path / "few")}
    with pytest.warns(NeuroadaWarning, match="5 examples choose among 1 members"):
        sweep.sweep(few, {"seed": [42]})


# Every field of a config: what a sweep does with it. A new field has to be put into one of the groups.
LEFT = {
    "training.keep_last": 3,
    "training.keep_best": 1,
    "training.validation_samples": 1,
    "watchdog.spike": 5.0,
    "watchdog.stall_warn": 5.0,
    "watchdog.stall_stop": 5.0,
    "parallel.mode": "single",
    "parallel.devices": 1,
    "tracking": ["tensorboard"],
    "merge": True,
}
USED = (
    *("name", "output", "seed", "method", "fidelity", "model.", "data.", "optimizer.", "bypass.", "lora.", "classifier."),
    *("training.epochs", "training.steps", "training.batch_size", "training.accumulation", "training.remat"),
    *("training.log_every", "training.save_every", "training.validate_every", "training.early_stopping"),
    *("watchdog.nonfinite", "watchdog.max_skips", "evaluation.sets", "evaluation.batch_size"),
)
REFUSED = ("seeds", "evaluation.best_epoch", "parallel.fsdp", "parallel.tensor")
OF_RUNS_ALONE = ("evaluation.before",)  # on by default; docs/sweep.md says that the base model is not scored


def test_a_sweep_says_which_fields_it_leaves(content):
    made = config_file.from_dict(content, "sweep")
    flat = config_file.flatten_config(made)
    assert not starts.left_out(made)
    groups = [[name for name in flat if name in LEFT or name.startswith(group)] for group in (USED, REFUSED, OF_RUNS_ALONE)]
    assert {name for group in groups for name in group} == flat.keys()
    for name, value in LEFT.items():
        other = json.loads(json.dumps(content))
        config_file.apply_override(other, f"{name}={json.dumps(value)}")
        assert starts.left_out(config_file.from_dict(other, "sweep")) == [name]


def test_what_it_leaves_is_said(config, capsys):
    assert sweep_of(config, {RATE: [0.01]}, "merge=true", "training.keep_best=1") == 0
    said = capsys.readouterr().err
    assert "a sweep leaves training.keep_best, merge to a run of its best/config.yaml" in said
    assert config_file.load(str(config[1] / "best" / "config.yaml")).merge
