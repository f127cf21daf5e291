"""Run configs: strict decoding, messages that name the field, overrides, and the round trip through YAML."""

import copy
import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from data_helpers import message_of

from neuroada_jax.tasks import SUITES
from neuroada_jax.training import config, config_file

ROOT = Path(__file__).resolve().parents[2]
MINIMAL = {
    "name": "a",
    "model": {"path": "m"},
    "data": {"train": "d.jsonl"},
    "optimizer": {"learning_rate": 0.1},
    "training": {"steps": 3},
}


def with_field(path: str, value: object) -> dict:
    content = copy.deepcopy(MINIMAL)
    *sections, last = path.split(".")
    node = content
    for section in sections:
        node = node.setdefault(section, {})
    node[last] = value
    return content


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_are_those_of_the_published_runs():
    loaded = config_file.from_dict(MINIMAL, "here")
    assert loaded.bypass.k == 1 and loaded.bypass.targets is None
    assert (loaded.optimizer.clip_norm, loaded.optimizer.beta1, loaded.optimizer.beta2) == (1.0, 0.9, 0.999)
    assert loaded.directory == Path("runs/a")
    assert loaded.training.remat_policy.value == "full"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("trainig", "here: trainig: unknown field; did you mean 'training'?"),
        ("optimizer.learningrate", "here: optimizer.learningrate: unknown field; did you mean 'learning_rate'?"),
        (
            "bypass.K",
            "here: bypass.K: unknown field; known: k, score, targets, shared_columns, random_over, neurons, layers, "
            "exclude_layers, rank, statistic_batches, select_from",
        ),
        ("model.paths", "here: model.paths: unknown field; did you mean 'path'?"),
    ],
)
def test_unknown_field_names_its_path_and_the_nearest_name(path, message):
    assert message_of(config_file.from_dict, with_field(path, 1), "here") == message


def test_unknown_field_inside_a_list():
    content = with_field("evaluation.sets", [{"name": "t", "data": "d"}, {"name": "u", "dat": "d"}])
    message = message_of(config_file.from_dict, content, "here")
    assert message in (
        "here: evaluation.sets.1.dat: unknown field; did you mean 'data'?",
        "here: evaluation.sets.1.data: this field is required",
    )


@pytest.mark.parametrize(
    ("path", "value", "found"),
    [
        ("training.steps", "3", "'3'"),
        ("training.batch_size", 2.5, "2.5"),
        ("bypass.k", True, "True"),
        ("bypass.targets", "q_proj", "'q_proj'"),
        ("bypass.targets", [1], "1"),
        ("optimizer.learning_rate", "fast", "'fast'"),
        ("optimizer.schedule", "square", "'square'"),
        ("bypass.score", "gradients", "'gradients'"),
        ("fidelity", "exact", "'exact'"),
        ("model.dtype", "float16", "'float16'"),
        ("model.path", None, "None"),
        ("merge", "yes", "'yes'"),
        ("data.buckets", [1.5], "1.5"),
        ("model", "SmolLM2", "'SmolLM2'"),
    ],
)
def test_wrong_type_names_the_field_and_what_was_found(path, value, found):
    message = message_of(config_file.from_dict, with_field(path, value), "here")
    assert message.startswith(f"here: {path}")
    assert message.endswith(f"found {found}")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("bypass.k", 0),
        ("bypass.k", -3),
        ("bypass.targets", []),
        ("optimizer.learning_rate", 0),
        ("optimizer.learning_rate", float("inf")),
        ("optimizer.learning_rate", float("nan")),
        ("optimizer.warmup_ratio", 1.5),
        ("training.steps", 0),
        ("training.batch_size", 0),
        ("training.log_every", 0),
        ("data.max_length", 1),
        ("data.limit", 0),
        ("seed", -1),
    ],
)
def test_values_out_of_range_are_refused(path, value):
    assert message_of(config_file.from_dict, with_field(path, value), "here").startswith(f"here: {path}")


def numbers(kind=config.RunConfig, prefix=""):
    """Return the paths of all fields that take a number, each with the type of it."""
    found = {}
    for field in dataclasses.fields(kind):
        path, text = f"{prefix}{field.name}", str(field.type)
        if dataclasses.is_dataclass(field.type):
            found |= numbers(field.type, f"{path}.")
        elif re.search(r"\b(int|float)\b", text):
            found[path] = (int if re.search(r"\bint\b", text) else float, "list[" in text)
    return found


@pytest.mark.parametrize("path", numbers())
def test_numbers_beyond_32_bits_are_refused(path):
    kind, listed = numbers()[path]
    for value in (2**40 if "seed" in path else 2**31, 10**400) if kind is int else (1e39, 1e300):
        content = with_field(path, [value] if listed else value)
        if path == "training.epochs":
            del content["training"]["steps"]
        message = message_of(config_file.from_dict, content, "here")
        assert path.rpartition(".")[2] in message and len(message) < 600


@pytest.mark.parametrize(("field", "value"), [("group_by_length", True), ("buckets", [64])])
def test_packing_leaves_nothing_to_group(field, value):
    content = with_field(f"data.{field}", value)
    content["data"]["packing"] = True
    message = message_of(config_file.from_dict, content, "here")
    assert message.startswith("here: data.packing: packed rows all have data.max_length tokens; remove ")
    assert f"data.{field}" in message


@pytest.mark.parametrize(
    ("field", "value", "needed"),
    [("beta2", 0.95, 0.999), ("beta1", 0.8, 0.9), ("epsilon", 1e-6, 1e-8), ("clip_norm", None, 1.0)],
)
def test_official_fidelity_leaves_no_choice_of_the_optimiser(field, value, needed):
    content = with_field(f"optimizer.{field}", value)
    assert config_file.from_dict(content, "here").fidelity == "recommended"
    message = message_of(config_file.from_dict, content | {"fidelity": "official"}, "here")
    assert message == f"here: optimizer.{field}: found {value}, but fidelity: official needs {needed}; remove one of them"
    config_file.from_dict(with_field(f"optimizer.{field}", needed) | {"fidelity": "official"}, "here")


def with_set(**fields: object) -> dict:
    return {**MINIMAL, "evaluation": {"sets": [{"name": "s", "data": "d", **fields}]}}


def test_an_evaluation_set_says_how_it_generates(tmp_path):
    beams = {"beams": 4, "early_stopping": True, "length_penalty": 2, "stop": ["\n"]}
    loaded = config_file.from_dict(with_set(generation=beams), "here")
    assert loaded.evaluation.sets[0].generation == config.GenerationSection(
        beams=4, early_stopping=True, length_penalty=2.0, stop=("\n",)
    )
    assert config_file.load(write(tmp_path, config_file.to_yaml(loaded))) == loaded
    assert config_file.from_dict(with_set(), "here").evaluation.sets[0].generation == config.GenerationSection()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"generation": {"beam": 4}}, ".generation.beam: unknown field; did you mean 'beams'?"),
        ({"generation": {"beams": 0}}, ".generation: beams: expected at least 1, found 0"),
        ({"generation": {"beams": 4, "top_k": 3}}, ".generation: beams: a search with 4 beams samples nothing"),
        ({"generation": {"beams": "4"}}, ".generation.beams: input should be a valid integer, found '4'"),
        ({"method": "choices", "generation": {"beams": 4}}, ": generation: method 'choices' generates nothing"),
        ({"method": "choices", "max_new_tokens": 4}, ": max_new_tokens: method 'choices' generates nothing"),
    ],
)
def test_generation_settings_that_make_no_sense(fields, message):
    assert message_of(config_file.from_dict, with_set(**fields), "here").startswith(f"here: evaluation.sets.0{message}")


def test_required_fields():
    for path in ("name", "model", "data", "optimizer", "training"):
        content = {key: value for key, value in MINIMAL.items() if key != path}
        assert message_of(config_file.from_dict, content, "here") == f"here: {path}: this field is required"
    content = {**MINIMAL, "optimizer": {}}
    assert message_of(config_file.from_dict, content, "here") == "here: optimizer.learning_rate: this field is required"


def test_either_epochs_or_steps():
    for found, training in {"neither": {}, "both": {"epochs": 1, "steps": 1}}.items():
        message = message_of(config_file.from_dict, {**MINIMAL, "training": training}, "here")
        assert message.startswith(f"here: training: give either epochs or steps, found {found}")
        assert ("set the other one to null" in message) is (found == "both")  # as an override removes the config's own
    assert config_file.from_dict({**MINIMAL, "training": {"epochs": 2}}, "here").training.epochs == 2


def test_batch_size_is_a_multiple_of_accumulation():
    content = {**MINIMAL, "training": {"steps": 1, "batch_size": 6, "accumulation": 4}}
    message = message_of(config_file.from_dict, content, "here")
    assert message == "here: training: batch_size 6 is not a multiple of accumulation 4"


def test_unknown_task_and_style():
    message = message_of(config_file.from_dict, with_field("data.task", "sst"), "here")
    assert message.startswith("here: data.task: unknown task 'sst'; did you mean 'sst2'? known: instruct, alpaca, sst2, ")
    message = message_of(config_file.from_dict, with_field("data.style", "fancy"), "here")
    assert message.startswith("here: data.style: unknown style 'fancy'; known: plain")
    sets = [{"name": "t", "data": "d"}, {"name": "u", "data": "d", "task": "what"}]
    message = message_of(config_file.from_dict, with_field("evaluation.sets", sets), "here")
    assert message.startswith("here: evaluation.sets.1.task: unknown task 'what'")
    message = message_of(config_file.from_dict, with_field("evaluation.sets", [sets[0], sets[0]]), "here")
    assert message == "here: evaluation.sets: two sets have the same name"


@pytest.mark.parametrize("text", ["9e-3", "9.0e-3", "0.009", "9E-3"])
def test_scientific_notation_is_a_number(text, tmp_path):
    path = write(tmp_path, yaml.safe_dump(MINIMAL))
    assert config_file.load(path, [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == 0.009


def test_overrides(tmp_path):
    content = with_field("evaluation.sets", [{"name": "t", "data": "d"}])
    path = write(tmp_path, yaml.safe_dump(content))
    changes = [
        "optimizer.learning_rate=1",
        "bypass.k=20",
        "bypass.targets=[q_proj, v_proj]",
        "evaluation.sets.0.limit=5",
        "training.steps=null",
        "training.epochs=2",
        "name=a=b",
        "seed=1",
        "seed=2",
    ]
    loaded = config_file.load(path, changes)
    assert loaded.optimizer.learning_rate == 1.0 and loaded.bypass.k == 20
    assert loaded.bypass.targets == ["q_proj", "v_proj"]
    assert loaded.evaluation.sets[0].limit == 5
    assert (loaded.training.steps, loaded.training.epochs) == (None, 2)
    assert loaded.name == "a=b" and loaded.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bypass.k", "override 'bypass.k': expected the form section.field=value"),
        ("=3", "override '=3': expected the form section.field=value"),
        ("name.first=3", "override 'name.first=3': 'first' is not inside a section"),
        ("evaluation.sets.1.limit=3", "override 'evaluation.sets.1.limit=3': '1' is no index of a list of 1"),
        ("evaluation.sets.x.limit=3", "override 'evaluation.sets.x.limit=3': 'x' is no index of a list of 1"),
        ("evaluation.sets.x=3", "override 'evaluation.sets.x=3': 'x' is no index of a list of 1"),
        ("bypass.k=[1", "override 'bypass.k=[1': line 1 not YAML"),
        ("bypass.kk=1", "override 'bypass.kk=1': bypass.kk: unknown field"),
        ("optimizer=3", "override 'optimizer=3': optimizer: expected a section of fields"),
        ("training.steps=null", "override 'training.steps=null': training: give either epochs or steps, found neither"),
        ("name=null", "override 'name=null': name: input should be a valid string"),
    ],
)
def test_bad_overrides(override, message, tmp_path):
    path = write(tmp_path, yaml.safe_dump(with_field("evaluation.sets", [{"name": "t", "data": "d"}])))
    assert message in message_of(config_file.load, path, [override])


def test_of_epochs_and_steps_an_override_takes_the_place_of_the_other(tmp_path, capsys):
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        path = write(tmp_path, yaml.safe_dump({**MINIMAL, "training": {other: 5}}))
        training = config_file.load(path, ["seed=1", f"training.{given}=20"]).training
        assert (getattr(training, given), getattr(training, other)) == (20, None)
        assert capsys.readouterr().err == f"training.{given}=20 takes the place of training.{other}=5\n"
        assert getattr(config_file.load(path, [f"training.{other}=7"]).training, other) == 7
        config_file.load(path, [f"training.{given}=20", f"training.{other}=null"])
        assert "found both" in message_of(config_file.load, path, [f"training.{given}=2", f"training.{other}=2"])
        config_file.load(path)
        assert capsys.readouterr().err == ""


def test_of_several_overrides_the_one_at_fault_is_named_and_else_the_file(tmp_path):
    path = write(tmp_path, yaml.safe_dump(MINIMAL))
    fine = ["bypass.k=2", "seed=4"]
    for bad in ("bypass.k=0", "training.steps=abc", "evaluation.sets=[{name: n}]", "data.max_length=1"):
        message = message_of(config_file.load, path, [fine[0], bad, fine[1]])
        assert message.startswith(f"override {bad!r}: {bad.partition('=')[0]}")
    assert message_of(config_file.load, path, ["bypass.k=0", "bypass.k=-1"]).startswith("override 'bypass.k=-1': ")
    # Given together they are right: each alone would be wrong.
    assert config_file.load(path, ["training.epochs=2", "training.steps=null"]).training.epochs == 2
    path = write(tmp_path, yaml.safe_dump(with_field("bypass.kk", 1)))
    assert message_of(config_file.load, path, fine).startswith(f"{path}: bypass.kk: unknown field")


def test_round_trip(tmp_path):
    content = with_field("evaluation.sets", [{"name": "t", "data": "d", "method": "choices", "task": "sst2"}])
    content |= {"name": "1e5", "seed": 7, "output": "2024-01-01"}  # texts that look like something else
    content["optimizer"] = {"learning_rate": 1e-5, "clip_norm": None, "epsilon": 1e-30}
    loaded = config_file.from_dict(content, "here")
    assert config_file.load(write(tmp_path, config_file.to_yaml(loaded))) == loaded
    assert "clip_norm: null" in config_file.to_yaml(loaded)


def test_yaml_errors_name_the_line(tmp_path):
    path = write(tmp_path, "name: a\nmodel:\n  path: [m\ndata: 1\n")
    message = message_of(config_file.load, path)
    assert message.startswith(f"{path}: line ") and "not YAML" in message
    for text in ("", "- a\n", "just words\n"):
        assert "expected a mapping of sections" in message_of(config_file.load, write(tmp_path, text))
    (tmp_path / "run.yaml").write_bytes(b"name: \xff\xfe\n")
    assert message_of(config_file.load, path).startswith(path)


def test_missing_file(tmp_path):
    path = str(tmp_path / "none.yaml")
    assert message_of(config_file.load, path) == f"{path}: cannot be read (No such file or directory)"
    assert "cannot be read" in message_of(config_file.load, str(tmp_path))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path):
    loaded = config_file.load(str(path))
    assert config_file.from_dict(yaml.safe_load(config_file.to_yaml(loaded)), "again") == loaded


def test_a_suite_stands_for_its_tasks():
    sets = [{"suite": "commonsense", "limit": 5}, {"task": "gsm8k"}, {"name": "mine", "data": "d"}]
    loaded = config_file.from_dict(with_field("evaluation.sets", sets), "here").evaluation.sets
    assert [each.name for each in loaded] == [*SUITES["commonsense"], "gsm8k", "mine"]
    assert [each.limit for each in loaded] == [5] * 8 + [None] * 2
    assert loaded[0].task == "boolq" and loaded[0].data is None and loaded[0].max_new_tokens is None


@pytest.mark.parametrize(
    ("each", "message"),
    [
        ({"suite": "glee"}, "here: evaluation.sets.0.suite: unknown suite 'glee'; known: commonsense, arithmetic"),
        ({"suite": ["x"]}, "here: evaluation.sets.0.suite: unknown suite ['x']; known: commonsense, arithmetic"),
        (
            {"suite": "arithmetic", "data": "d"},
            "here: evaluation.sets.0.data: a suite has its own names, data and tasks; remove it",
        ),
        ({"data": "d"}, "here: evaluation.sets.0: a set without a task needs a name and data"),
        ({"name": "n"}, "here: evaluation.sets.0: a set without a task needs a name and data"),
    ],
)
def test_sets_that_say_too_little_or_too_much(each, message):
    assert message_of(config_file.from_dict, with_field("evaluation.sets", [each]), "here") == message
