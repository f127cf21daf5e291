"""The JSON schema of a config, for editors: types, limits, defaults, and the docstrings' words on every field."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pydantic

from neuroada_jax.data.prompts import PromptStyle
from neuroada_jax.tasks import ENCODER_TASKS, SUITES, TASKS
from neuroada_jax.training.config import EvaluationSet, RunConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """Return the schema of the YAML file of a run, as JSON."""
    schema = pydantic.TypeAdapter(RunConfig).json_schema()
    kinds = {kind.__name__: kind for kind in _sections(RunConfig)}
    for name, section in [(RunConfig.__name__, schema), *schema["$defs"].items()]:
        kind = kinds[name]
        section["description"] = _summary(kind)
        words = descriptions(kind)
        for field, content in section["properties"].items():
            content.pop("title", None)  # pydantic's: the field's name with a capital
            content["description"] = words[field]
            if field in _EXAMPLES:
                content["examples"] = _EXAMPLES[field]
    sets = schema["$defs"][EvaluationSet.__name__]["properties"]
    sets["suite"] = {
        "enum": list(SUITES),
        "description": "stands for a set for each task of the suite, in place of name, data and task.",
    }
    schema["title"] = "config of neuroada train"
    return {"$schema": DIALECT, **schema}


# Suggestions rather than an enum: which of them fit depends on the model, and the reader of configs names the nearest.
_EXAMPLES = {
    "task": list(dict.fromkeys([*TASKS, *ENCODER_TASKS])),
    "style": [style.value for style in PromptStyle],
}


def _sections(kind: Any) -> Iterator[Any]:
    """Yield a section and those inside it."""
    yield kind
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from _sections(field.type)
        elif field.type == list[EvaluationSet]:
            yield from _sections(EvaluationSet)


def _summary(kind: Any) -> str:
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def descriptions(kind: Any) -> dict[str, str]:
    """Return the words on every field of a section, from the `Attributes:` of its docstring and of those it inherits."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        _, _, block = inspect.cleandoc(each.__doc__ or "").partition("\nAttributes:\n")
        for name, words in re.findall(r"^  (\w+): (.*(?:\n    .*)*)", block, re.MULTILINE):
            found[name] = re.sub(r"\bNone\b", "null", " ".join(words.split()))
    return found
