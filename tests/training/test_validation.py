"""Validation during a run: its loss, the state it keeps, early stopping, and the same after an interruption."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_helpers import message_of
from helpers import run_config, write_bert, write_model, write_rows

from neuroada_jax.adapters import native, on_base
from neuroada_jax.data.batches import Batch
from neuroada_jax.data.examples import encode
from neuroada_jax.data.rows import load_rows, rows_from_list
from neuroada_jax.errors import NeuroadaWarning, UserError
from neuroada_jax.models.losses import label_losses
from neuroada_jax.pretrained.load import load_model
from neuroada_jax.pretrained.tokenizer import load_tokenizer
from neuroada_jax.tasks.overlap import questions
from neuroada_jax.training import config_file, report, run, validation
from neuroada_jax.training.signals import Stop, Stopped
from neuroada_jax.training.step import TrainState


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return write_model(folder / "model"), write_rows(folder / "rows.jsonl")


def settings(folder, inputs, data=None, **training):
    training = {"steps": 6, "validate_every": 2, **training}
    sections = {
        "bypass": {"targets": ["q_proj"], "k": 2},
        "data": {"validation": 0.25, **(data or {})},
        "training": training,
    }
    return config_file.from_dict(run_config(folder, *inputs, **sections), "test")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_loss_is_that_of_the_rows_one_by_one_and_the_best_state_is_kept(tmp_path, inputs):
    # A rate that overshoots, so that the last state is not the best.
    config = settings(tmp_path, inputs, validation_samples=2)
    config = config_file.from_dict(_content(config, learning_rate=0.3), "test")
    prepared = run.prepare(config)
    assert len(prepared.rows) == 18 and len(prepared.validation.batches.examples) == 6
    results = run.finish(run.fit(prepared))
    seen = lines(config.directory / "validation.jsonl")
    assert [line["step"] for line in seen] == [0, 2, 4, 6]
    assert results["validation"]["steps"] == [{"step": line["step"], "value": line["value"]} for line in seen]
    assert not results["validation"]["stopped_early"]
    assert "prompt" not in json.dumps(results["validation"])  # the samples stay in the run's folder
    assert results["validation"]["start_loss"] == seen[0]["value"] and not results["watchdog"]["validation_frozen"]
    best = min(seen[1:], key=lambda line: line["value"])
    assert (results["validation"]["best_step"], results["validation"]["best_loss"]) == (best["step"], best["value"])
    assert [len(line["samples"]) for line in seen] == [2, 2, 2, 2]
    assert set(seen[0]["samples"][0]) == {"prompt", "generation"}
    logged = {line["step"]: line for line in lines(config.directory / "metrics.jsonl")}
    assert [step for step, line in logged.items() if "validation_loss" in line] == [0, 2, 4, 6]
    assert logged[4]["validation_loss"] == seen[2]["value"]
    assert logged[4]["validation_perplexity"] == pytest.approx(np.exp(seen[2]["value"]))
    assert set(logged[0]) == {"step", "validation_loss", "validation_perplexity"} and len(logged) == 7
    assert not (config.directory / "validation").exists()  # the adapters of a run that has ended

    # The adapter is that of the best state: its loss, row by row, is the line's; and the first line's is the base model's.
    model, tokenizer = load_model(str(inputs[0])), load_tokenizer(str(inputs[0]))
    tuned = on_base.merge(native.read(str(config.directory / "adapter")), model)
    rows = load_rows(str(inputs[1]))
    trained = {row["prompt"] for row in prepared.rows.rows}
    held_back = [row for row in rows.rows if row["prompt"] not in trained]
    examples = encode(rows_from_list(held_back), "plain", tokenizer, 64)
    module = model.model.module()
    for params, line in ((tuned, best), (model.params, seen[0])):
        total = []
        for i in range(len(examples)):
            ids, is_label = examples.example(i)
            where = is_label.nonzero()[0]
            batch = jax.tree.map(jnp.asarray, _single(ids, where))
            total += np.asarray(label_losses(module, {"params": params}, batch))[0].tolist()
        assert np.mean(total) == pytest.approx(line["value"], rel=1e-5)
    assert (config.directory / "loss.png").exists()


def _content(config, **optimizer):
    content = dataclasses.asdict(config)
    content["optimizer"] |= optimizer
    return content


def _single(ids, where):
    ones = np.ones((1, len(where)), np.float32)
    return Batch(
        ids[None],
        np.array([len(ids)], np.int32),
        (where - 1)[None].astype(np.int32),
        ids[where][None].astype(np.int32),
        ones,
    )


def test_a_validation_file_of_an_encoder(tmp_path):
    model = write_bert(tmp_path / "bert")
    rows = [{"sentence1": "a" * (i % 5 + 1), "sentence2": "ab"[i % 2], "label": i % 2} for i in range(12)]
    for name, part in (("train", rows), ("dev", rows[:5])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data = {"task": "mrpc", "max_length": 32, "validation": str(tmp_path / "dev.jsonl")}
    config = settings(tmp_path, (model, tmp_path / "train.jsonl"), data, steps=4)
    content = _content(config)
    content["bypass"] = {"targets": ["query"]}
    with pytest.warns(NeuroadaWarning, match="is no lower than before it"):
        results = run.train(config_file.from_dict(content, "test"))
    seen = lines(config.directory / "validation.jsonl")
    assert len(seen) == 3 and results["validation"]["examples"] == 5
    assert "validation_perplexity" not in lines(config.directory / "metrics.jsonl")[-1]
    content["training"]["validation_samples"] = 1
    message = message_of(run.prepare, config_file.from_dict({**content, "output": str(tmp_path / "other")}, "test"))
    assert message == "training.validation_samples: bert is an encoder, which continues no prompts; set it to 0"


def test_early_stopping_ends_the_run_at_the_best_state(tmp_path, inputs, monkeypatch):
    values = iter([1.5, 3.0, 2.0, 2.5, 2.25, 1.0])
    monkeypatch.setattr(validation, "mean_loss", lambda *_: next(values))
    with pytest.warns(NeuroadaWarning, match=r"training, 2.0000 \(step 4\), is no lower than before it, 1.5000"):
        results = run.train(settings(tmp_path, inputs, steps=20, early_stopping=2))
    assert results["steps"] == 8 and results["validation"]["best_step"] == 4 and results["validation"]["stopped_early"]
    assert results["validation"]["start_loss"] == 1.5
    assert [line["step"] for line in lines(tmp_path / "out" / "metrics.jsonl")] == list(range(9))


def test_a_validation_loss_that_never_changes_is_said(tmp_path, inputs):
    config = config_file.from_dict(_content(settings(tmp_path, inputs), learning_rate=1e-30), "test")
    with pytest.warns(NeuroadaWarning, match=r"the validation loss is \d\.\d{4} in each of 4 validations"):
        results = run.train(config)
    assert results["watchdog"]["validation_frozen"] == 1


@pytest.mark.parametrize(
    ("values", "frozen"),
    [([2.0], False), ([2.0, 2.0], True), ([2.0, 2.0, 2.001], False), ([None, None], True), ([None, 2.0], False)],
)
def test_what_is_no_change_of_the_validation_loss(tmp_path, values, frozen):
    kept = validation.Validation(tmp_path, lambda state: 0.0, lambda *_: None, 0)
    kept.lines = [{"step": step, "value": value} for step, value in enumerate(values, 1)]
    assert validation.is_frozen(kept) is frozen


def test_an_interrupted_run_goes_on_with_the_same_validations(tmp_path, inputs, monkeypatch, capsys):
    whole = run.train(settings(tmp_path / "whole", inputs, save_every=2, early_stopping=5, log_every=1))
    stop, taken = Stop(), []

    def after_three(found):
        taken.extend(found)
        if len(taken) >= 3:
            stop.request()

    config = settings(tmp_path / "parted", inputs, save_every=2, early_stopping=5, log_every=1)
    with pytest.raises(Stopped):
        run.fit(run.prepare(config), stop=stop, on_lines=after_three)
    assert re.search(r"training\W+3/6", capsys.readouterr().err)  # not the step before
    # Once more, in the midst of the validation of step 4, which the resumed run makes up for.
    score, stop = validation.mean_loss, Stop()
    with monkeypatch.context() as patch:
        patch.setattr(validation, "mean_loss", lambda *_: stop.request())
        with pytest.raises(Stopped):
            run.fit(run.prepare(config, resume=True), stop=stop)
    assert validation.mean_loss is score and "validation_loss" not in lines(config.directory / "metrics.jsonl")[4]
    results = run.train(config, resume=True)
    assert results["validation"] == whole["validation"]
    for file in ("validation.jsonl", "metrics.jsonl"):
        assert (config.directory / file).read_text() == (tmp_path / "whole" / "out" / file).read_text()
    both = [native.read(str(tmp_path / name / "out" / "adapter")).values for name in ("whole", "parted")]
    assert all(np.array_equal(both[0][name], both[1][name]) for name in both[0])
    # The finished run, whose best adapter is now its own alone, goes on once more, also from before its best state.
    assert sorted(path.name for path in config.directory.glob("[cv]*")) == [
        "checkpoints",
        "config.yaml",
        "validation.jsonl",
    ]
    for left in ("6", "4"):
        assert run.train(config, resume=True)["validation"] == whole["validation"]
        again = native.read(str(config.directory / "adapter")).values
        assert all(np.array_equal(both[0][name], again[name]) for name in both[0])
        shutil.rmtree(config.directory / "checkpoints" / left, ignore_errors=True)


def test_adapters_of_states_that_no_checkpoint_needs_are_removed(tmp_path):
    values = iter([9.0, 8.0, 7.0, 6.0, 5.0, 4.5, 4.0])
    found = validation.Validation(tmp_path, lambda _: next(values), lambda path, _: path.mkdir(parents=True), 0)
    left = []
    for step in range(7):
        found(TrainState(np.array(step), {}, None, {}, {}, {}, np.array(-1)))
        if step in (2, 4):  # the second is still being written
            (tmp_path / "checkpoints" / ("2" if step == 2 else "4.orbax-checkpoint-tmp")).mkdir(parents=True)
        left.append(sorted(path.name for path in tmp_path.glob("validation/*")))
    assert left == [[], ["1"], ["2"], ["2", "3"], ["2", "4"], ["2", "4", "5"], ["2", "4", "6"]]


def test_a_stalled_run_is_not_continued(tmp_path):
    def state(step):
        return TrainState(np.array(step), {}, None, {}, {}, {}, np.array(-1))

    values, saved = iter([0.5, 1.0, float("nan"), 2.0]), []
    found = validation.Validation(tmp_path, lambda _: next(values), lambda path, _: saved.append(path.name), 0, patience=2)
    for step, stalled in ((0, False), (2, False), (4, False), (6, True)):
        found(state(step))
        assert found.stalled is stalled
    assert saved == ["2"] and found.best["step"] == 2
    assert found(state(6)) == {}  # scored already
    again = validation.Validation(tmp_path, print, print, 6, patience=2)
    assert again.stalled and validation.Validation(tmp_path, print, print, 4, patience=2).stalled is False
    assert "NaN" not in (tmp_path / "validation.jsonl").read_text()


@pytest.mark.parametrize(
    ("mode", "extra"),
    [("pmap", {}), ("jit", {"fsdp": 2, "tensor": 2}), pytest.param("shard_map", {}, marks=pytest.mark.slow)],
)
def test_devices_share_the_validation(tmp_path, inputs, mode, extra):
    losses = []
    for name, section in (("one", {"mode": "single"}), ("eight", {"mode": mode, "devices": 8, **extra})):
        content = _content(settings(tmp_path / name, inputs, steps=2, batch_size=8))
        results = run.train(config_file.from_dict({**content, "parallel": section}, "test"))
        losses.append([line["value"] for line in lines(tmp_path / name / "out" / "validation.jsonl")])
        assert losses[-1] == [results["validation"][f"{which}_loss"] for which in ("start", "best")]
    assert len(jax.devices()) == 8
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def split_of(labels, share, seed=0):
    """(training, validation) labels of rows with these labels."""
    rows = rows_from_list([{"label": label} for label in labels])
    names = sorted(set(labels))
    parts = validation.split(rows, share, seed, [names.index(label) for label in labels])
    numbers = [[number for _, number in part.places] for part in parts]
    assert sorted(numbers[0] + numbers[1]) == list(range(len(labels))) and all(part == sorted(part) for part in numbers)
    return tuple([row["label"] for row in part.rows] for part in parts)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.29, 0.5, 0.9])
@pytest.mark.parametrize("sizes", [(10, 10, 10), (97, 3), (40, 2, 1, 1), (5, 5, 5, 5, 5), (1, 1, 8), (20,)])
def test_a_share_of_classes_has_the_same_share_of_each(sizes, share):
    labels = [name for name, size in zip("abcde", sizes, strict=False) for _ in range(size)]
    several = [split_of(labels, share, seed) for seed in (0, 0, 1)]
    assert several[0] == several[1]
    train, held_back = several[0]
    for name, size in zip("abcde", sizes, strict=False):
        assert train.count(name) >= 1 and held_back.count(name) <= np.ceil(share * size)
        assert held_back.count(name) >= min(np.floor(share * size), size - 1)
    assert 0 < len(held_back) <= round(share * len(labels))
    if min(sizes) > 9:
        assert len(held_back) == round(share * len(labels))


def test_a_share_needs_a_class_of_two_rows():
    assert "each of the 20 labels of rows has one row" in message_of(split_of, [chr(97 + i) for i in range(20)], 0.5)


def test_rows_for_validation_are_not_trained_on(tmp_path, inputs):
    """Also where an evaluation set says which of its questions were."""
    content = dataclasses.asdict(settings(tmp_path, inputs))
    content["evaluation"]["sets"] = [{"name": "same", "data": str(inputs[1])}]
    prepared = run.prepare(config_file.from_dict(content, "test"))
    trained = {row["prompt"] for row in prepared.rows.rows}
    assert len(trained) == 18
    assert prepared.scorers["same"].options.trained_on == questions(prepared.rows.rows)


@pytest.mark.parametrize("task", ["classification", "regression", "multilabel"])
def test_the_share_of_a_task_on_own_rows(tmp_path, task):
    labels = {"classification": "a" * 16 + "bbbb", "regression": range(20), "multilabel": [["a"], ["b"]] * 10}[task]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{i}", "label": label}) + "\n" for i, label in enumerate(labels)))
    data = {"task": task, "max_length": 32, "validation": 0.25}
    inputs = write_bert(tmp_path / "bert"), path
    content = {**dataclasses.asdict(settings(tmp_path, inputs, data)), "bypass": {"targets": ["query"]}}
    prepared = run.prepare(config_file.from_dict(content, "test"))
    held_back = prepared.validation.batches.examples.labels
    assert len(held_back) == 5 and (task != "classification" or np.bincount(held_back).tolist() == [4, 1])


def test_several_files_of_validation_rows(tmp_path, inputs):
    files = [str(write_rows(tmp_path / name, 3)) for name in ("a.jsonl", "b.jsonl")]
    config = settings(tmp_path, inputs, {"validation": files})
    assert len(run.prepare(config).validation.batches.examples) == 6
    assert report._evaluation_rows(config) == ["--task", "instruct", "--data", *files]


@pytest.mark.parametrize(
    ("data", "training", "says"),
    [
        *(
            ({"validation": bad}, {}, f"data.validation: expected a share between 0 and 1, a file, {more}, found {bad!r}")
            for more in ["directory or hub name, or a list of them"]
            for bad in (1.5, 1, 0, True, [], ["a", 1], {"a": 1})
        ),
        ({"validation": None}, {}, "training.validate_every: it needs data.validation"),
        ({"validation": None}, {"validate_every": None, "early_stopping": 2}, "training.early_stopping: it needs"),
        ({"validation": 0.01}, {}, "data.validation: a share of 0.01 of 24 rows is 0, expected 1 to 23"),
        ({"validation": "nothing.jsonl"}, {}, "nothing.jsonl: no such file or directory"),
    ],
)
def test_validation_that_cannot_be(tmp_path, inputs, data, training, says):
    def prepare():
        return run.prepare(settings(tmp_path, inputs, data, **training))

    with pytest.raises(UserError) as caught:
        prepare()
    assert says in str(caught.value)


def test_only_one_thing_chooses_the_state(tmp_path, inputs):
    content = run_config(tmp_path, *inputs, data={"validation": 0.5})
    content["evaluation"] = {"sets": [{"name": "some", "data": str(inputs[1])}], "best_epoch": "some"}
    assert "both choose the state to keep" in message_of(config_file.from_dict, content, "test")
