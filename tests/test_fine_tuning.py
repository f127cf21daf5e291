"""The Python interface: the run of a config, one copy of the weights, and one-line errors."""

import dataclasses
import functools
import json
import warnings

import jax
import numpy as np
import pytest
from data_helpers import message_of
from helpers import run_config, write_bert, write_config, write_model, write_rows
from safetensors.numpy import load_file

import neuroada_jax as na
from neuroada_jax import cli, fine_tuning
from neuroada_jax.adapters import native
from neuroada_jax.core import trees
from neuroada_jax.errors import NeuroadaWarning, UserError
from neuroada_jax.training import run
from neuroada_jax.training.config import RunConfig

ROWS = [{"prompt": f"after {a},", "completion": b} for a, b in zip("abcdefghijkl", "bcdefghijklm", strict=True)]
OPTIONS = {"k": 2, "learning_rate": 0.3, "steps": 3, "batch_size": 4, "max_length": 64, "remat": "none"}
REVIEWS = [{"sentence": text, "label": label} for text, label in (("a warm film", 1), ("tedious", 0))] * 4
LABELLING = {"task": "sst2", "learning_rate": 0.02, "steps": 2, "batch_size": 4, "max_length": 32, "remat": "none"}
PROMPTS = ["after c,", "the answer"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("python")
    write_model(found / "model", seed=5)
    write_bert(found / "bert")
    return found


@pytest.fixture(scope="module")
def model(folder):
    return na.load(folder / "model")


@pytest.fixture(scope="module")
def tuned(model):
    return na.fine_tune(model, ROWS, **OPTIONS)


@pytest.fixture(scope="module")
def encoder(folder):
    return na.load(folder / "bert")


@pytest.fixture(scope="module")
def labeller(encoder):
    return na.fine_tune(encoder, REVIEWS, **LABELLING)


# Without the tests' own checks of argument types, which a user does not have.
fine_tune = getattr(na.fine_tune, "__wrapped__", na.fine_tune)


def weights(model):
    return {name: np.array(leaf) for name, leaf in trees.flatten(model._params(None))}


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_run_is_the_run_of_the_config(folder, tuned, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    content = run_config(tmp_path, folder / "model", rows, bypass={"k": 2}, optimizer={"learning_rate": 0.3})
    assert cli.main(["train", str(write_config(tmp_path / "run.yaml", content))]) == 0
    by_file = native.read(str(tmp_path / "out" / "adapter"))
    assert_same(by_file.values, tuned.adapter.values)
    assert_same(by_file.columns, tuned.adapter.columns)
    written = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in tuned.history] == [line["loss"] for line in written]


def test_a_model_is_what_it_was_and_can_be_tuned_again(folder, model, tuned):
    assert_same(weights(model), weights(na.load(folder / "model")))
    again = na.fine_tune(model, iter(ROWS), **OPTIONS)
    assert_same(again.adapter.values, tuned.adapter.values)
    other = na.fine_tune(model, ROWS, **{**OPTIONS, "k": 1})
    assert other.adapter.metadata["k"] == 1 and again.generate(PROMPTS, max_new_tokens=4) == tuned.generate(
        PROMPTS, max_new_tokens=4
    )
    assert_same(weights(model), weights(na.load(folder / "model")))


def test_base_and_tuned_generate_from_one_copy_of_the_weights(folder, model, tuned, tmp_path):
    before = model.generate(PROMPTS, max_new_tokens=6)
    with_adapter = tuned.generate(PROMPTS, max_new_tokens=6, style="verbatim")
    assert with_adapter != before == model.generate(PROMPTS, max_new_tokens=6)
    tuned.merged().save(tmp_path / "merged")
    merged = na.load(tmp_path / "merged")
    assert merged.generate(PROMPTS, max_new_tokens=6, style="verbatim") == with_adapter
    assert merged.generate(PROMPTS, max_new_tokens=6) == tuned.generate(PROMPTS, max_new_tokens=6)


def test_generation_asks_in_the_style_of_the_training(tuned):
    plain = tuned.generate(PROMPTS, max_new_tokens=6)
    assert plain == tuned.generate([f"{prompt}\n" for prompt in PROMPTS], max_new_tokens=6, style="verbatim")


def test_a_saved_adapter_comes_back(folder, tuned, tmp_path, capsys):
    tuned.save(tmp_path / "adapter")
    capsys.readouterr()
    again = na.load(folder / "model", adapter=tmp_path / "adapter")
    assert "prompts: plain; an answer ends at <|im_end|>\n" in capsys.readouterr().err
    assert again.generate(PROMPTS, max_new_tokens=6) == tuned.generate(PROMPTS, max_new_tokens=6)
    assert again.history == [] and "exists" in message_of(tuned.save, tmp_path / "adapter")
    other = write_model(tmp_path / "other", seed=6)
    assert "is not the base model of this adapter" in message_of(na.load, other, adapter=tmp_path / "adapter")


def test_files_stay_with_an_output_alone(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = []
    tuned = na.fine_tune(model, ROWS, **OPTIONS, output="kept", on_log=lines.append)
    assert lines == tuned.history and len(lines) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"kept"}
    assert json.loads((tmp_path / "kept" / "results.json").read_text()) == json.loads(json.dumps(tuned.results))
    assert "holds a run already" in message_of(na.fine_tune, model, ROWS, **OPTIONS, output="kept")
    assert na.fine_tune(model, ROWS, **OPTIONS, output="kept", overwrite=True).history == lines


def test_rows_of_a_file_are_those_in_memory(model, tuned, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", count=12)
    assert_same(na.fine_tune(model, path, **OPTIONS).adapter.values, tuned.adapter.values)
    files = []
    for number, part in enumerate((ROWS[:5], ROWS[5:])):
        files.append(tmp_path / f"rows-{number}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in part))
    assert_same(na.fine_tune(model, files, **OPTIONS).adapter.values, tuned.adapter.values)


def test_whole_sections(model, tmp_path):
    sets = [{"name": "own", "data": str(write_rows(tmp_path / "rows.jsonl", count=4)), "max_new_tokens": 2}]
    tuned = na.fine_tune(model, ROWS, **OPTIONS, evaluation={"sets": sets, "before": False}, data={"style": "verbatim"})
    assert "own" in json.dumps(tuned.results) and tuned.adapter.metadata["prompt"]["style"] == "verbatim"


def test_an_encoder_learns_labels(folder, encoder, labeller, tmp_path):
    found = labeller.predict(["a warm film", "tedious", "tedious"])
    assert {each.label for each in found} <= {"negative", "positive"} and found[1] == found[2]
    assert all(0.5 <= each.probability <= 1 for each in found)
    labeller.save(tmp_path / "adapter")
    again = na.load(folder / "bert", adapter=tmp_path / "adapter").predict(["a warm film", "tedious", "tedious"])
    assert [each.label for each in again] == [each.label for each in found]
    np.testing.assert_allclose([each.probability for each in again], [each.probability for each in found], rtol=1e-6)
    assert "fine_tune trains one" in message_of(encoder.predict, ["tedious"])


def test_every_field_of_a_config_is_an_option():
    options = fine_tuning._options()
    for field in dataclasses.fields(RunConfig):
        inner = [each.name for each in dataclasses.fields(field.type)] if dataclasses.is_dataclass(field.type) else []
        named = {field.name, *(inner if field.name in fine_tuning._FLAT else [])}
        assert named <= options.keys() | fine_tuning._ELSEWHERE.keys()
    flat = [each.name for name in fine_tuning._FLAT for each in dataclasses.fields(RunConfig.__annotations__[name])]
    assert len(flat) == len(set(flat))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "fine_tune: rows: no rows, expected at least one"),
        ([{"prompt": "a", "completion": "b"}, "c"], {}, "fine_tune: rows: row 1: expected a dict, found str"),
        ({"prompt": "a"}, {}, "fine_tune: rows: expected a path, a hub name or dicts, found dict"),
        (3, {}, "fine_tune: rows: expected a path, a hub name or dicts, found int"),
        ("", {}, "fine_tune: rows: expected a path, a hub name or dicts, found an empty text"),
        ([{1: 2}], {}, "fine_tune: rows: row 0: expected fields named by texts, found [1]"),
        (ROWS, {"on_log": 3}, "fine_tune: on_log: expected a function of a line's dict, found int"),
        (ROWS, {"output": ""}, "fine_tune: output: expected the run's directory, found an empty text"),
        (ROWS, {"output": b"x"}, "fine_tune: expected numbers, texts, lists and sections, found bytes"),
        ("nowhere.jsonl", {}, "nowhere.jsonl: no such file or directory"),
        ([{"question": "a"}], {}, "rows: row 0: "),
        (ROWS, {"learning_rat": 1.0}, "fine_tune: unknown option 'learning_rat'; did you mean 'learning_rate'?"),
        (ROWS, {"k": "2"}, "fine_tune: bypass.k: input should be a valid integer, found '2'"),
        (ROWS, {"k": 0}, "fine_tune: bypass.k: input should be greater than or equal to 1, found 0"),
        (ROWS, {"epochs": 1}, "fine_tune: training: give either epochs or steps, found both"),
        (ROWS, {"seeds": [1, 2]}, "fine_tune: seeds is for config files alone: fine_tune is one run; call it once"),
        (ROWS, {"train": "rows.jsonl"}, "fine_tune: train is for config files alone: the rows are the second argument"),
        (ROWS, {"data": {"train": "x"}}, "fine_tune: data.train is for config files alone: the rows are the second"),
        (ROWS, {"model": {"path": "x"}}, "fine_tune: model is for config files alone: the model is the first argument"),
        (ROWS, {"bypass": {"k": 3}}, "fine_tune: k is given twice, also in bypass; give it once"),
        (ROWS, {"evaluation": {"sets": [{"suite": "x"}]}}, "fine_tune: evaluation.sets.0.suite: unknown suite 'x'"),
        (ROWS, {"targets": ["nope"]}, "bypass.targets: 'nope' matches no linear map"),
        (ROWS, {"classifier": {"train": False}}, "classifier: llama is a decoder"),
        (
            ROWS,
            {"merge": True},
            "fine_tune: merge needs output, the run's directory: without it no file of the run is kept",
        ),
        (ROWS, {"resume": True}, "fine_tune: resume needs output"),
        (ROWS, {"save_every": 2}, "fine_tune: save_every needs output"),
    ],
)
def test_bad_input_is_one_line_and_the_model_stays_open(model, rows, options, message):
    found = message_of(fine_tune, model, rows, **{**OPTIONS, **options})
    assert found.startswith(message) and "\n" not in found
    assert model.generate(["a"], max_new_tokens=1)


def test_what_is_asked_of_the_wrong_kind(model, tuned, encoder, labeller):
    assert "llama is a decoder, which has no classifier; use generate" in message_of(tuned.predict, ["a"])
    assert "bert is an encoder, which continues no text; use predict" in message_of(labeller.generate, ["a"])
    assert "expected a list of texts" in message_of(tuned.generate, "a")
    assert "expected a list of texts" in message_of(labeller.predict, "a")
    assert message_of(labeller.predict, ["a"], batch_size=0) == "predict: batch_size: expected an integer above 0, found 0"
    assert "single texts or pairs" in message_of(labeller.predict, ["a", ("a", "b")])
    assert "unknown option 'temprature'; did you mean 'temperature'?" in message_of(tuned.generate, ["a"], temprature=1.0)
    assert message_of(tuned.generate, ["a"], temperature="hot").startswith(
        "generate: temperature: input should be a valid number"
    )
    assert message_of(tuned.generate, ["a"], top_k=0).startswith("generate: top_k: expected at least 1, found 0")
    assert "found str" in message_of(fine_tune, "model", ROWS, **OPTIONS)


def test_a_closed_model_says_so(folder):
    with na.load(folder / "model") as model:
        tuned = na.fine_tune(model, ROWS, **OPTIONS)
    expected = f"the model {folder / 'model'} is closed (close() was called); load it again with neuroada_jax.load"
    calls = (model.generate, tuned.generate, lambda _: na.fine_tune(model, ROWS, **OPTIONS), lambda _: tuned.merged())
    assert [message_of(call, ["a"]) for call in calls] == [expected] * 4
    assert "closed" in repr(model) and tuned.adapter.values  # an adapter can still be saved


def test_a_run_that_fails_after_its_training_gives_the_weights_back(model, monkeypatch):
    def fail(fitted):
        raise UserError("the disk is full")

    before = weights(model)
    monkeypatch.setattr(run, "finish", fail)
    assert message_of(na.fine_tune, model, ROWS, **OPTIONS) == "the disk is full"
    assert_same(weights(model), before)


def test_a_loss_that_is_not_finite_names_no_temporary_file(folder):
    message = message_of(na.fine_tune, na.load(folder / "model"), ROWS, **{**OPTIONS, "learning_rate": 1e38})
    assert message.startswith("the loss or its gradient became NaN or infinite at step ")
    assert message.endswith("); with output=..., the adapter of the last good step is kept")


def test_an_interrupted_run_closes_its_model(folder):
    def interrupt(line):
        raise KeyboardInterrupt

    model = na.load(folder / "model")
    with pytest.raises(KeyboardInterrupt):
        na.fine_tune(model, ROWS, **OPTIONS, on_log=interrupt)
    assert "its weights went into a run that did not end" in message_of(model.generate, ["a"])


@pytest.mark.parametrize("layout", [{"mode": "shard_map", "devices": 4}, {"mode": "jit", "fsdp": 2, "devices": 2}])
def test_several_devices(folder, tuned, layout):
    model = na.load(folder / "model")
    parallel = na.fine_tune(model, ROWS, **OPTIONS, parallel=layout)
    for module, values in parallel.adapter.values.items():
        np.testing.assert_allclose(values, tuned.adapter.values[module], atol=1e-4)
    assert_same(weights(model), weights(na.load(folder / "model")))
    assert all(len(each.devices()) == 1 for each in jax.tree.leaves(model._params(None)))
    assert parallel.generate(PROMPTS, max_new_tokens=4) == tuned.generate(PROMPTS, max_new_tokens=4)


def test_numbers_of_numpy_and_a_data_frame(model, tuned):
    import pandas

    options = {**OPTIONS, "k": np.int64(2), "learning_rate": np.float64(0.3), "steps": jax.numpy.int32(3)}
    assert_same(fine_tune(model, pandas.DataFrame(ROWS), **options).adapter.values, tuned.adapter.values)


def test_chats_are_asked_in_their_template(model):
    chats = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4
    chatty = na.fine_tune(model, chats, **{**OPTIONS, "steps": 1})
    asked = [chatty.generate(["a"], max_new_tokens=4, **style) for style in ({}, {"style": "chat"}, {"style": "plain"})]
    assert asked[0] == asked[1] != asked[2]
    options = {"max_new_tokens": 4, "chat_template": "{{ messages[0].content ~ more }}"}
    others = [chatty.generate(["x"], **options, template_arguments={"more": text}) for text in ("a", "b")]
    assert others == [chatty.generate(["x" + text], max_new_tokens=4, style="verbatim") for text in ("a", "b")]
    for asked in (chatty, model):
        unchecked = type(asked).generate  # of types
        call = functools.partial(getattr(unchecked, "__wrapped__", unchecked), asked)
        message = message_of(call, ["x"], style="chat", template_arguments={"b": 1})
        assert message.startswith("prompts: template_arguments: the chat template does not read 'b'; it reads none")
        message = message_of(call, ["x"], style="plain", template_arguments={"b": 1})
        assert message == "template_arguments: prompts in style plain use no chat template; remove it, or give style chat"
        for bad in ([1], {1: 2}):
            message = message_of(call, ["x"], template_arguments=bad)
            assert message == f"template_arguments: expected values by the names of variables, found {bad!r}"
        assert message_of(call, ["x"], chat_template=3) == "chat_template: expected a file or text, found int"
        assert message_of(call, ["x"], style="poem").startswith("prompt style: found 'poem'")


def test_a_callback_can_neither_change_nor_use_what_the_run_holds(model):
    said = []

    def look(line):
        line.clear()
        said.append(message_of(model.generate, ["a"]))

    assert all("loss" in line for line in na.fine_tune(model, ROWS, **OPTIONS, on_log=look).history)
    assert len(said) == 3 and all("its weights are in a run that goes on" in each for each in said)


def test_what_rounds_to_nothing_in_the_dtype_of_the_base_is_reported(folder, tuned, tmp_path, capsys):
    source = write_model(tmp_path / "model", seed=5, dtype="bfloat16")
    narrow, before = na.load(source, "bfloat16"), load_file(source / "model.safetensors")
    shares = []
    for rate in (1e-5, 0.3):
        with warnings.catch_warnings(record=True) as caught, jax.numpy_dtype_promotion("standard"):
            warnings.simplefilter("always", NeuroadaWarning)
            trained = na.fine_tune(narrow, ROWS, **{**OPTIONS, "learning_rate": rate})
        unchanged = []
        for name, values in trained.adapter.values.items():
            entries = np.take_along_axis(before[f"{name}.weight"], trained.adapter.columns[name], axis=1)
            unchanged.append(((entries.astype(np.float32) + values).astype(entries.dtype) == entries).reshape(-1))
        shares.append(trained.results["rounded_to_nothing"])
        assert shares[-1] == pytest.approx(np.concatenate(unchanged).mean())
        line = f"{100 * shares[-1]:.1f} % of the values round to nothing in bfloat16"
        said = [str(each.message) for each in caught if "round to nothing" in str(each.message)]
        assert [line in each for each in said] == [True] * (shares[-1] > 0.5)
        assert (line in capsys.readouterr().err) == (shares[-1] <= 0.5)
    assert shares[0] > 0.5 > shares[1]
    assert tuned.results["rounded_to_nothing"] is None  # of a float32 base


def test_bad_texts_and_places(folder, model, tuned, labeller, tmp_path):
    generate, predict = (getattr(call, "__wrapped__", call) for call in (na.TunedModel.generate, na.TunedModel.predict))
    for prompts in (None, 3, [None], [b"a"]):
        assert message_of(generate, tuned, prompts) == "generate: prompts: expected a list of texts"
    assert "text 0 holds half of a surrogate pair" in message_of(generate, tuned, ["\ud800"])
    assert generate(tuned, iter(["a", "b"]), max_new_tokens=2) == tuned.generate(["a", "b"], max_new_tokens=2)
    for number in (0, 2.5, True, None, "4"):
        assert "max_new_tokens: expected an integer above 0" in message_of(generate, tuned, ["a"], max_new_tokens=number)
    for texts in (None, [None], [{"sentence": "a"}], [("a", None)], []):
        assert message_of(predict, labeller, texts).startswith("predict: texts: expected a list of texts")
    save, load = (getattr(call, "__wrapped__", call) for call in (na.TunedModel.save, na.load))
    assert message_of(save, tuned, None) == "expected the path of a directory, found None"
    assert message_of(load, None) == "load: source: expected a path or a name, found None"
    assert message_of(load, folder / "model", "float16").startswith("load: dtype: expected 'float32', 'bfloat16' or 'auto'")
    assert load(folder / "model", jax.numpy.float32).config["dtype"] == "float32"


def test_validation_rows_may_be_a_share_a_file_or_in_memory(model, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 12)
    held_back = [json.loads(line) for line in path.read_text().splitlines()]
    losses = []
    for given in (0.25, [str(path)], path, held_back):
        tuned = na.fine_tune(model, ROWS, validation=given, validate_every=3, **OPTIONS)
        losses.append(tuned.results["validation"]["best_loss"])
        assert tuned.history[-1]["validation_loss"] == losses[-1]
    assert losses[1] == losses[2] == losses[3] != losses[0]
    assert "fine_tune: validation: row 0: expected a dict, found int" in message_of(
        fine_tune, model, ROWS, validation=[1], **OPTIONS
    )
