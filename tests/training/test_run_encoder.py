"""GLUE runs of a tiny encoder from config to results: the epoch that is kept, resuming, several seeds, bad input."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from data_helpers import write_lines
from helpers import write_bert, write_config

from neuroada_jax import cli, files
from neuroada_jax.adapters import native
from neuroada_jax.errors import UserError
from neuroada_jax.evaluation.scoring import Score
from neuroada_jax.training import best_epoch, config_file, run, seeds
from neuroada_jax.training.step import TrainState


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A bare BERT with its tokenizer: the head is what a run draws."""
    return write_bert(tmp_path_factory.mktemp("model") / "bert")


def rows(count, seed, regression=False):
    """Pairs of one letter each; the label says whether it is the same, or how far apart they are."""
    draw = random.Random(seed)
    pairs = [(draw.choice("abcdef"), draw.choice("abcdef")) for _ in range(count)]
    label = lambda a, b: float(abs(ord(a) - ord(b))) if regression else int(a == b)  # noqa: E731
    return [{"sentence1": a * draw.randint(1, 9), "sentence2": b, "label": label(a, b), "idx": 0} for a, b in pairs]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """name -> file of rows."""
    folder = tmp_path_factory.mktemp("data")
    made = {"train": rows(24, 0), "dev": rows(21, 1), "numbers": rows(24, 0, True), "dev_numbers": rows(8, 1, True)}
    return {name: str(write_lines(folder / f"{name}.jsonl", each)) for name, each in made.items()}


def content(folder, model, data, task="mrpc", **sections):
    train, dev = ("numbers", "dev_numbers") if task == "stsb" else ("train", "dev")
    made = {
        "name": "tiny",
        "output": str(folder / "out"),
        "model": {"path": str(model)},
        "bypass": {"k": 2, "targets": ["query", "intermediate.dense"]},
        "data": {"train": data[train], "task": task, "max_length": 40, "buckets": [24]},
        "optimizer": {"learning_rate": 0.02, "schedule": "constant"},
        "training": {"epochs": 3, "batch_size": 8, "remat": "none", "log_every": 2},
        "evaluation": {"sets": [{"name": "dev", "data": data[dev]}], "best_epoch": "dev", "batch_size": 8},
    }
    for name, value in sections.items():
        made[name] = {**made.get(name, {}), **value} if isinstance(value, dict) else value
    return made


def settings(folder, model, data, **sections):
    return config_file.from_dict(content(folder, model, data, **sections), "test")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model, data):
    """(the folder of a whole run, its results); the adapters of its epochs, which a finished run lacks, are beside it."""
    folder = tmp_path_factory.mktemp("trained")
    fitted = run.fit(run.prepare(settings(folder, model, data, training={"save_every": 4}, merge=True)))
    shutil.copytree(folder / "out" / "epochs", folder / "epochs")
    results = run.finish(fitted)
    assert not (folder / "out" / "epochs").exists()
    return folder / "out", results


def neuroada(capsys, *arguments):
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_keeps_its_best_epoch_and_is_judged_by_the_other_half(trained, data):
    out, results = trained
    assert json.loads((out / "results.json").read_text()) == results and results["seed"] == 42
    best, epochs = results["best_epoch"], lines(out / "epochs.jsonl")
    assert best["epochs"] == epochs and [epoch["step"] for epoch in epochs] == [3, 6, 9]
    assert best["value"] == max(epoch["value"] for epoch in epochs) and best["metric"] == "accuracy"
    assert best["epoch"] == 1 + [epoch["value"] for epoch in epochs].index(best["value"])
    assert {"f1", "epoch", "step"} <= epochs[0].keys()
    parts = best_epoch.split(21, 42)
    assert best["split"] == parts.describe() and best["split"]["choosing_rows"] == 11
    score = results["after"]["dev"]
    assert score["n"] == 10 and len(score["interval"]) == 2 and score["metric"] == "accuracy"
    assert 0 <= score["beside"]["f1"] <= 1 and results["before"]["dev"].keys() == score.keys()
    predictions = lines(out / "predictions-dev-after.jsonl")
    kept = [lines_of["sentence1"] for lines_of in np.array(lines(Path(data["dev"])))[parts.test]]
    assert [each["sentence1"] for each in predictions] == kept
    assert np.mean([each["correct"] for each in predictions]) == pytest.approx(score["value"])
    assert results["last_loss"] < results["first_loss"]
    assert results["compiled_steps"] == results["possible_steps"] == 1
    values = 2 * 2 * (16 + 24) + (16 * 2 + 2)
    assert results["trainable"] == values


def test_a_head_keeps_its_own_order_of_labels(trained, data, tmp_path):
    """Going on from a head whose outputs are the other way round, under their names, is going on from the head."""
    tensors = safetensors.numpy.load_file(str(trained[0] / "merged" / "model.safetensors"))
    found = {}
    for name, step, labels in (
        ("same", 1, ["not_equivalent", "equivalent"]),
        ("turned", -1, ["EQUIVALENT", "not-equivalent"]),
    ):
        base_model = shutil.copytree(trained[0] / "merged", tmp_path / name)
        turned = {each: np.ascontiguousarray(array[::step]) for each, array in tensors.items() if "classifier" in each}
        safetensors.numpy.save_file(tensors | turned, str(base_model / "model.safetensors"), metadata={"format": "pt"})
        config = json.loads((base_model / "config.json").read_text()) | {"id2label": dict(enumerate(labels))}
        (base_model / "config.json").write_text(json.dumps(config))
        results = run.train(settings(tmp_path / f"run-{name}", base_model, data, training={"epochs": 1}))
        out = tmp_path / f"run-{name}" / "out"
        predictions = lines(out / "predictions-dev-after.jsonl")
        logits = [each.pop("logits") for each in predictions]  # in the task's order
        found[name] = results["first_loss"], results["last_loss"], logits, predictions
        kept = native.read(str(out / "adapter")).metadata["base"]["labels"]
        assert kept == sorted(["equivalent", "not_equivalent"], reverse=step == 1)
    assert found["same"][:2] == pytest.approx(found["turned"][:2], rel=1e-5)
    np.testing.assert_allclose(found["same"][2], found["turned"][2], rtol=1e-3, atol=1e-4)
    assert found["same"][3] == found["turned"][3]


def test_the_adapter_is_that_of_the_best_epoch_and_evaluates_to_the_same(trained, data, capsys, tmp_path):
    out, results = trained
    kept, best = (
        native.read(str(out / "adapter")),
        native.read(str(out.parent / "epochs" / str(results["best_epoch"]["step"]))),
    )
    for found, want in ((kept.values, best.values), (kept.dense_parameters, best.dense_parameters)):
        assert found.keys() == want.keys()
        assert all(found[name].tobytes() == want[name].tobytes() for name in want)
    assert kept.metadata["base"]["labels"] == ["not_equivalent", "equivalent"]
    test = write_lines(tmp_path / "test.jsonl", [lines(Path(data["dev"]))[i] for i in best_epoch.split(21, 42).test])
    arguments = ["evaluate", "--data", test, "--task", "mrpc", "--out", tmp_path / "p.jsonl", "--json"]
    want = results["after"]["dev"]
    for model in (["--adapter", out / "adapter"], ["--model", out / "merged"]):
        code, printed, _ = neuroada(capsys, *arguments, *model)
        assert code == 0
        assert json.loads(printed) == {
            "task": "mrpc",
            "metric": "accuracy",
            "value": want["value"],
            "n": 10,
            "interval": want["interval"],
            "f1": want["beside"]["f1"],
            "f1_interval": want["beside_intervals"]["f1"],
        }
        assert len(lines(tmp_path / "p.jsonl")) == 10
    code, printed, _ = neuroada(capsys, *arguments[:-1], "--adapter", out / "adapter")
    assert code == 0 and "mrpc" in printed and "f1" in printed


def test_a_resumed_run_is_the_whole_run(trained, tmp_path, model, data, monkeypatch):
    out, whole = trained
    sections = settings(tmp_path, model, data, training={"save_every": 4}, merge=True)
    original, calls = best_epoch.BestEpoch.__call__, []

    def stop_in_the_third(self, state):
        calls.append(int(state.step))
        original(self, state)
        if len(calls) == 3:  # scored and kept, but not in any checkpoint
            raise KeyboardInterrupt

    monkeypatch.setattr(best_epoch.BestEpoch, "__call__", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run.train(sections)
    monkeypatch.setattr(best_epoch.BestEpoch, "__call__", original)
    assert calls == [3, 6, 9] and len(lines(tmp_path / "out" / "epochs.jsonl")) == 3
    resumed = run.train(sections, resume=True)  # from step 8
    for field in ("best_epoch", "before", "after", "first_loss", "last_loss", "steps"):
        assert resumed[field] == whole[field], field
    found, want = native.read(str(tmp_path / "out" / "adapter")), native.read(str(out / "adapter"))
    assert all(found.values[name].tobytes() == want.values[name].tobytes() for name in want.values)


@pytest.mark.slow
def test_regression(tmp_path, model, data):
    sections = {"task": "stsb", "training": {"epochs": None, "steps": 4}, "evaluation": {"before": False}}
    results = run.train(settings(tmp_path, model, data, **sections))
    score = results["after"]["dev"]
    low, high = score["interval"]
    assert score["metric"] == "pearson" and -1 <= low <= high <= 1 and score["n"] == 4
    assert -1 <= score["beside"]["spearman"] <= 1 and results["before"] == {}
    assert [epoch["step"] for epoch in results["best_epoch"]["epochs"]] == [3, 4]  # the end counts as an epoch's
    predictions = lines(tmp_path / "out" / "predictions-dev-after.jsonl")
    found, want = ([each[field] for each in predictions] for field in ("prediction", "answer"))
    assert score["value"] == pytest.approx(np.corrcoef(found, want)[0, 1], abs=1e-4)
    assert not (tmp_path / "out" / "epochs").exists()
    assert native.read(str(tmp_path / "out" / "adapter")).metadata["base"]["labels"] == ["similarity"]


@pytest.mark.slow
@pytest.mark.filterwarnings("always::neuroada_jax.errors.NeuroadaWarning")
def test_several_seeds(tmp_path, model, data, capsys):
    sections = {"training": {"epochs": None, "steps": 2}, "evaluation": {"before": False}}
    path = write_config(tmp_path / "run.yaml", content(tmp_path, model, data, **sections))
    code, printed, _ = neuroada(capsys, "train", path, "--seeds", "1,7")
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert code == 0 and "seed" in printed and "mean" in printed and "±" in printed and "dev, f1" in printed
    assert [row["seed"] for row in results["runs"]] == results["seeds"] == [1, 7]
    values = [row["after"]["dev"]["value"] for row in results["runs"]]
    accuracy = results["after"]["dev"]["value"]
    assert accuracy["values"] == values and accuracy["mean"] == pytest.approx(np.mean(values))
    assert accuracy["deviation"] == pytest.approx(np.std(values, ddof=1))
    assert len({row["best_epoch"]["split"]["digest"] for row in results["runs"]}) == 2
    assert json.loads((out / "seed-7" / "results.json").read_text())["after"] == results["runs"][1]["after"]
    heads = [native.read(str(out / f"seed-{seed}" / "adapter")).dense_parameters["classifier.weight"] for seed in (1, 7)]
    assert np.abs(heads[0] - heads[1]).max() > 1e-3

    code, _, err = neuroada(capsys, "train", path, "seeds=[7, 8]")
    assert code == 2 and "seed-7 holds a run already; use --overwrite" in err and not (out / "seed-8").exists()
    (out / "seed-7" / "metrics.jsonl").unlink()  # a finished run is left alone
    code, printed, _ = neuroada(capsys, "train", path, "--seeds", "7,8", "--resume", "--json")
    assert code == 0 and json.loads(printed)["after"]["dev"]["value"]["values"][0] == values[1]
    assert not (out / "seed-7" / "metrics.jsonl").exists() and (out / "seed-8" / "adapter").exists()

    again = ["train", path, "--seeds", "7,9", "--resume"]  # seed 7 counts only as what the others would be
    another = [{"name": name, "data": data["dev"]} for name in ("dev", "new")]
    for override, told in (
        ("optimizer.learning_rate=99", "another config; changed: optimizer.learning_rate (0.02 then, 99.0 now)"),
        (f"evaluation.sets={json.dumps(another)}", "another config; changed: evaluation.sets ("),
    ):
        code, _, err = neuroada(capsys, *again, override)
        assert code == 2 and told in err.splitlines()[-1] and str(out / "seed-7") in err and not (out / "seed-9").exists()
    code, _, err = neuroada(capsys, *again, override, "--force-resume")
    assert (
        code == 2
        and "resuming anyway (--force-resume)" in err
        and err.splitlines()[-1].endswith("seed-7 has no score of new, found dev")
    )


def test_one_run_and_several_seeds_do_not_share_a_folder(tmp_path, model, data, capsys):
    path = write_config(tmp_path / "run.yaml", content(tmp_path, model, data))
    for there, options, told in (
        ("seed-1/config.yaml", [], "out holds runs of several seeds; use another name, or remove them"),
        ("config.yaml", ["--seeds", "1,2"], "out holds one run, without seeds; use another name, or remove it"),
    ):
        files.write_text(tmp_path / "out" / there, "")
        for flag in ([], ["--overwrite"], ["--resume"]):
            code, _, err = neuroada(capsys, "train", path, *options, *flag)
            assert code == 2 and err.splitlines()[-1].endswith(told)
        (tmp_path / "out" / there).unlink()


def test_a_plan_counts_the_head(tmp_path, model, data, trained, capsys):
    path = write_config(tmp_path / "run.yaml", content(tmp_path, model, data))
    code, printed, _ = neuroada(capsys, "plan", path, "--json")
    plan, results = json.loads(printed), trained[1]
    assert code == 0 and plan["labelled_per_row"] == 1 and plan["tokens_per_row"] == 24
    assert (plan["trainable"], plan["parameters"]) == (results["trainable"], results["total_parameters"])
    assert plan["fits"] and plan["flops"] > 0


def test_the_best_epoch_up_to_a_checkpoint_is_found_again(tmp_path):
    epochs = [{"epoch": number, "step": 3 * number, "value": value} for number, value in ((1, 0.7), (2, 0.5), (3, 0.9))]
    files.write_text(tmp_path / "epochs.jsonl", "".join(json.dumps(epoch) + "\n" for epoch in epochs))
    assert best_epoch.BestEpoch(tmp_path, print, print, 9).best["epoch"] == 3
    resumed = best_epoch.BestEpoch(tmp_path, print, print, 8)
    assert resumed.best["epoch"] == 1 and len(resumed.lines) == 2
    assert best_epoch.BestEpoch(tmp_path, print, print, 0).lines == []


def test_an_epoch_without_a_finite_score_is_never_the_best(tmp_path):
    values, saved = [float("nan"), 0.5, float("nan"), 0.9, 0.7], []

    def score(state):
        value = values[int(state.step) - 1]
        return Score(value, 8, None, [], "pearson", {"spearman": value})

    best = best_epoch.BestEpoch(tmp_path, score, lambda path, state: saved.append(path.name), 0)
    for step in (1, 2, 3, 3, 4, 5):  # an epoch is scored once
        best(TrainState(np.array(step), {}, None, {}, {}, {}, np.array(-1)))
    assert saved == ["1", "2", "4"] and best.best["value"] == 0.9 and best.score(1) is None
    text = (tmp_path / "epochs.jsonl").read_text()
    assert "NaN" not in text and text.startswith(
        '{"epoch": 1, "step": 1, "metric": "pearson", "value": null, "spearman": null}'
    )
    assert best_epoch.BestEpoch(tmp_path, score, print, 9).best["step"] == 4


def test_scores_that_are_not_finite_are_null_and_have_no_mean():
    assert files.to_json({"a": [float("nan"), (1.5, float("inf"))], "b": "é"}) == '{"a": [null, [1.5, null]], "b": "é"}'
    assert seeds._spread([None, 0.5]) == {"mean": None, "deviation": None, "values": [None, 0.5]}


@pytest.mark.parametrize(("count", "choosing"), [(2, 1), (277, 139), (1043, 522), (5000, 2500), (5001, 1000), (5463, 1000)])
def test_a_split_is_two_parts_of_the_published_sizes(count, choosing):
    parts = best_epoch.split(count, 42)
    assert len(parts.choosing) == choosing
    assert sorted([*parts.choosing, *parts.test]) == list(range(count))
    assert all((np.diff(each) > 0).all() for each in parts)
    again, other = best_epoch.split(count, 42), best_epoch.split(count, 43)
    assert parts.describe() == again.describe()
    assert count == 2 or parts.describe()["digest"] != other.describe()["digest"]


def test_one_row_is_not_split():
    with pytest.raises(UserError, match="a set of 1 row"):
        best_epoch.split(1, 0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.task=cola", "train.jsonl:1: no column 'sentence', which task 'cola' names; found sentence1, "),
        ("data.task=commonsense", "data.task: 'commonsense' trains a decoder to continue texts, and bert is an encoder"),
        ("data.task=glue", "data.task: unknown task 'glue'"),
        ("data.style=plain", "data.style: bert is an encoder, which has no prompts"),
        ("evaluation.sets.0.task=rte", "evaluation.sets.0.task: the classifier is trained for 'mrpc', found 'rte'"),
        ("evaluation.sets.0.method=choices", "evaluation.sets.0.method: bert is an encoder, which has no prompts"),
        (
            "evaluation.sets.0.max_new_tokens=8",
            "evaluation.sets.0.max_new_tokens: bert is an encoder, which has no prompts",
        ),
        (
            "evaluation.sets.0.generation={beams: 2}",
            "evaluation.sets.0.generation: bert is an encoder, which has no prompts",
        ),
        ("evaluation.best_epoch=test", "evaluation.best_epoch: no set 'test', found dev"),
        ("evaluation.sets.0.limit=1", "evaluation.best_epoch: a set of 1 row"),
        ("data.max_length=41", "data.max_length: 41 is more than the model's 40 positions"),
        ("data.max_length=4", "max_length: found 4, expected at least 5"),
        ("seeds=[1, 1]", "seeds: 1 is given twice"),
        ("seeds=[-1]", "seeds.0: input should be greater than or equal to 0, found -1"),
        ("seed=4294967296", "seed: input should be less than 4294967296, found 4294967296"),  # JAX's keys have 32 bits
        ("--seeds=", "--seeds: expected numbers with commas between, such as 42,43,44, found ''"),
        ("--seeds=42,,43", "--seeds: expected numbers with commas between, such as 42,43,44, found '42,,43'"),
        ("evaluation.sets=[{task: mrpc, split: x}]", "evaluation.sets.0: split: it needs data"),
    ],
)
def test_bad_config(override, message, tmp_path, model, data, capsys):
    path = write_config(tmp_path / "run.yaml", content(tmp_path, model, data))
    code, out, err = neuroada(capsys, "train", path, override)
    line = err.splitlines()[-1]
    assert code == 2 and out == "" and line.startswith("neuroada: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_bad_evaluations(trained, model, data, capsys):
    out, _ = trained
    for arguments, message in (
        (["--adapter", out / "adapter", "--task", "qqp"], "no column 'question1', which task 'qqp' names; found sentence1"),
        (["--adapter", out / "adapter", "--task", "instruct"], "bert is an encoder, which cannot continue a text"),
        (
            ["--adapter", out / "adapter", "--task", "stsb"],
            "task 'stsb' has 1 label(s) (similarity), and the classifier of ",
        ),
        (["--adapter", out / "adapter", "--task", "mrpc", "--max-length", 41], "--max-length: found 41, expected 1 to "),
        (["--adapter", out / "adapter", "--task", "rte"], "has not_equivalent, equivalent"),
        (["--adapter", out / "adapter", "--task", "mrpc", "--style", "plain"], "--style: bert is an encoder, which has no"),
        (["--model", model, "--task", "mrpc"], "has no classifier.bias: give an --adapter"),
    ):
        code, _, err = neuroada(capsys, "evaluate", "--data", data["dev"], *arguments)
        assert code == 2 and message in err.splitlines()[-1], err


def test_a_bad_label_names_its_line(tmp_path, model, data, capsys):
    bad = write_lines(tmp_path / "bad.jsonl", [*rows(2, 0), {**rows(1, 0)[0], "label": 2}])
    path = write_config(tmp_path / "run.yaml", content(tmp_path, model, {**data, "train": str(bad)}))
    code, _, err = neuroada(capsys, "train", path)
    assert code == 2
    assert f"{bad}:3: label 2, expected one of task 'mrpc': 0 (not_equivalent), 1 (equivalent)" in err
