"""The JSON schema of a config: it accepts every config here, refuses mistakes, and has words on every field."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from neuroada_jax import cli
from neuroada_jax.core.scores import RULES
from neuroada_jax.tasks import SUITES
from neuroada_jax.training import config_file, schema
from neuroada_jax.training.config import RunConfig

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
SCHEMA = schema.json_schema()
KINDS = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
}
LIMITS = {
    "minimum": lambda value, limit: value >= limit,
    "maximum": lambda value, limit: value <= limit,
    "exclusiveMinimum": lambda value, limit: value > limit,
    "exclusiveMaximum": lambda value, limit: value < limit,
    "minItems": lambda value, limit: len(value) >= limit,
    "minLength": lambda value, limit: len(value) >= limit,
    "enum": lambda value, members: value in members,
    "const": lambda value, member: value == member,
}
WORDS = {"$schema", "$defs", "title", "description", "default", "examples"}  # that restrict nothing
KNOWN = WORDS | set(LIMITS) | {"$ref", "anyOf", "type", "properties", "required", "additionalProperties", "items"}


def accepts(node, value):
    """Whether a schema accepts a value; of the keywords of JSON Schema, those that occur in this one."""
    assert set(node) <= KNOWN, f"a keyword that this test does not know: {set(node) - KNOWN}"
    if "$ref" in node and not accepts(SCHEMA["$defs"][node["$ref"].removeprefix("#/$defs/")], value):
        return False
    if "anyOf" in node and not any(accepts(each, value) for each in node["anyOf"]):
        return False
    if "type" in node and (
        not isinstance(value, KINDS[node["type"]]) or (isinstance(value, bool) and node["type"] != "boolean")
    ):
        return False
    if not all(test(value, node[limit]) for limit, test in LIMITS.items() if limit in node):
        return False
    if isinstance(value, list):
        return all(accepts(node.get("items", {}), each) for each in value)
    if isinstance(value, dict):
        return set(node.get("required", ())) <= set(value) and all(
            _accepts_field(node, name, each) for name, each in value.items()
        )
    return True


def _accepts_field(node, name, value):
    if name in node.get("properties", {}):
        return accepts(node["properties"][name], value)
    more = node.get("additionalProperties", True)
    return accepts(more, value) if isinstance(more, dict) else more


def content_of(path):
    return config_file.parse_yaml(path.read_text(encoding="utf-8"), str(path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_here_is_accepted(path):
    assert accepts(SCHEMA, content_of(path))
    # With every default written out, as in a run's config.yaml.
    assert accepts(SCHEMA, yaml.safe_load(config_file.to_yaml(config_file.load(str(path)))))


def fields(node=SCHEMA, path=""):
    """(path, schema) of every field."""
    for name, each in node["properties"].items():
        yield f"{path}{name}", each
        inner = each.get("items", each)
        if "$ref" in inner:
            yield from fields(SCHEMA["$defs"][inner["$ref"].removeprefix("#/$defs/")], f"{path}{name}.")


def test_every_field_has_words_and_every_field_of_a_config_is_there():
    found = dict(fields())
    for path, each in found.items():
        assert len(each["description"]) > 5 and "None" not in each["description"], path
    config = config_file.from_dict(content_of(CONFIGS[0]), "")
    assert {path for path in found if not path.startswith("evaluation.sets.")} >= {
        path for path in config_file.flatten_config(config) if "template_arguments" not in path
    }
    assert found["evaluation.sets.suite"]["enum"] == list(SUITES)
    assert {field.name for field in dataclasses.fields(RunConfig)} == set(SCHEMA["properties"])
    assert found["bypass.score"]["enum"] == [*RULES, "custom"]
    assert found["data.max_length"]["default"] == 512 and "sst2" in found["data.task"]["examples"]
    assert found["evaluation.sets.generation.top_p"]["description"].startswith("samples from the fewest")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("bypass.kk", 1),
        ("nonsense", {}),
        ("bypass.k", 0),
        ("bypass.k", "8"),
        ("bypass.k", True),
        ("bypass.score", "largest"),
        ("bypass.targets", []),
        ("optimizer.learning_rate", 0),
        ("optimizer", 3),
        ("data.learn", "first"),
        ("evaluation.sets", [{"suite": "commonsenses"}]),
        ("evaluation.sets", [{"taks": "sst2"}]),
        ("seed", -1),
        ("tracking", ["mlflow"]),
    ],
)
def test_mistakes_are_refused_as_the_reader_of_configs_refuses_them(path, value):
    content = copy.deepcopy(content_of(CONFIGS[0]))
    *sections, last = path.split(".")
    node = content
    for section in sections:
        node = node.setdefault(section, {})
    node[last] = value
    assert not accepts(SCHEMA, content)
    with pytest.raises(config_file.UserError):
        config_file.from_dict(content, "")
    assert not accepts(SCHEMA, {key: section for key, section in content_of(CONFIGS[0]).items() if key != "model"})


def test_the_command_prints_or_writes_it(tmp_path, capsys):
    assert cli.main(["schema", "--out", str(tmp_path / "s.json")]) == 0 and capsys.readouterr().out == ""
    assert json.loads((tmp_path / "s.json").read_text()) == json.loads(json.dumps(SCHEMA))
    assert cli.main(["schema", "--out", str(tmp_path / "s.json" / "x")]) == 2
    assert capsys.readouterr().err.startswith(f"neuroada: error: {tmp_path / 's.json' / 'x'}: cannot be written (")
    for arguments in ([], ["--json"]):
        assert cli.main(["schema", *arguments]) == 0
        assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(SCHEMA))
