"""YAML files of runs, decoded strictly into the dataclasses of config.py, with `a.b=c` overrides from the command line."""

import copy
import dataclasses
import datetime
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from neuroada_jax import console, credentials, files
from neuroada_jax.errors import UserError
from neuroada_jax.tasks import SUITES
from neuroada_jax.training.config import EvaluationSet, RunConfig

Section = TypeVar("Section")


LARGEST_YAML = 2**22  # bytes; a config has a few thousand
DEEPEST_YAML = 32  # lists and sections inside one another; a config has four
_LARGEST_FLOAT = 3.4028234663852886e38  # of float32
MOST_NODES = 100_000  # values of the content once aliases are replaced by what they stand for


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.1 as PyYAML does, except that 9e-3 is a number, as users expect, and that no key may stand twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return a section.

        Raises:
          yaml.MarkedYAMLError: a key stands twice, or is no text or number.
        """
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a list or a section as a key", problem_mark=key.start_mark)
            if key.value in first and key.tag != "tag:yaml.org,2002:merge":
                problem = f"{key.value!r} stands twice in this section, first in line {first[key.value]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            first[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes strings that `_Loader` would read as numbers."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text into plain Python data.

    Raises:
      UserError: not YAML, a key that stands twice, or more than the bounds above; names the line.
    """
    if len(text) > LARGEST_YAML:
        raise UserError(f"{where}: has {len(text):,} characters, expected at most {LARGEST_YAML:,}")
    loader = None
    try:
        loader = _Loader(text)
        _check_depth(text, where)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node, where)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}:{line} not YAML ({getattr(error, 'problem', error)})") from error
    # A date that is none, a number of too many digits, a tag whose value does not fit it.
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error) or type(error).__name__
        raise UserError(f"{where}: not YAML that can be read ({reason})") from error
    finally:
        if loader is not None:
            loader.dispose()


def _check_depth(text: str, where: str) -> None:
    """Refuse text whose lists and sections stand too deep inside one another, before code that recurses reads it."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST_YAML:
            line = event.start_mark.line + 1
            raise UserError(f"{where}: line {line}: more than {DEEPEST_YAML} lists and sections stand inside one another")


def _check_nodes(root: Any, where: str) -> None:
    """Refuse content that is far larger than its text, by aliases, or that holds itself."""
    left = MOST_NODES

    def walk(node: Any, above: tuple[Any, ...]) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise UserError(f"{where}: more than {MOST_NODES:,} values once its aliases are replaced")
        if any(node is each for each in above):
            line = node.start_mark.line + 1
            raise UserError(f"{where}: line {line}: an alias stands inside of what it stands for")
        if isinstance(node, yaml.CollectionNode):
            for each in node.value:
                for child in each if isinstance(each, tuple) else (each,):
                    walk(child, (*above, node))

    walk(root, ())


def nearest(name: str, known: list[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known name, else all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _section_fields(location: tuple[Any, ...]) -> list[str]:
    """Return the field names that are valid at a path of the config."""
    kind: Any = RunConfig
    for key in location:
        if isinstance(key, int):
            kind = EvaluationSet
        else:
            kind = next((f.type for f in dataclasses.fields(kind) if f.name == key), RunConfig)
    return [f.name for f in dataclasses.fields(kind)]


# In place of pydantic's wording, which speaks of Python types.
_REASONS = {
    "dataclass_type": "expected a section of fields",
    "too_short": "expected at least one item",
    "list_type": "input should be a list",
}


def _message(error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    location = first["loc"]
    path = ".".join(str(part) for part in location)
    kind = first["type"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{path}: unknown field{nearest(str(location[-1]), _section_fields(location[:-1]))}"
    if kind in ("missing", "missing_argument"):
        return f"{path}: this field is required"
    reason = first["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return reason if not path or re.match(r"\w+(\.\w+)+: ", reason) else f"{path}: {reason}"
    reason = _REASONS.get(kind, reason)
    return f"{path}: {reason[0].lower()}{reason[1:]}, found {_short(repr(first['input']))}"


def paths_of_field(name: str) -> list[str]:
    """Return the dotted paths of the fields with this name, or with this path where "_" stands for its dot."""

    def walk(kind: Any, prefix: str) -> list[str]:
        found = []
        for field in dataclasses.fields(kind):
            path = f"{prefix}{field.name}"
            if dataclasses.is_dataclass(field.type):
                found += walk(field.type, f"{path}.")
            elif name in (field.name, path.replace(".", "_")):
                found.append(path)
        return found

    return walk(RunConfig, "")


def apply_override(content: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c` to nested dicts and lists; c is parsed as YAML.

    Raises:
      UserError: no "=", or a path through something that is not a section.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"override {override!r}: expected the form section.field=value")
    *parents, last = path.split(".")
    node: Any = content
    for key in parents:
        node = node.setdefault(key, {}) if isinstance(node, dict) else node[_index(node, key, override)]
    if isinstance(node, dict):
        node[last] = parse_yaml(text, f"override {override!r}")
    else:
        node[_index(node, last, override)] = parse_yaml(text, f"override {override!r}")


def _index(node: Any, key: str, override: str) -> int:
    if not isinstance(node, list):
        raise UserError(f"override {override!r}: {key!r} is not inside a section")
    if not key.isdigit() or int(key) >= len(node):
        raise UserError(f"override {override!r}: {key!r} is no index of a list of {len(node)}")
    return int(key)


def from_dict(content: Any, where: str) -> RunConfig:
    """Decode plain data into a RunConfig.

    Raises:
      UserError: an unknown field (with the nearest valid name), a wrong type or value, a text with a token or password; one
        line with the field's path.
    """
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a mapping of sections, found {type(content).__name__}")
    config = decode(RunConfig, _without_suites(_with_current_names(content, where), where), where)
    for name, value in flatten_config(config).items():
        if name not in ("seed", "seeds"):
            _check_size(value, f"{where}: {name}")
        if credentials.is_in(json.dumps(value, default=str, ensure_ascii=False)):
            raise UserError(
                f"{where}: {name}: holds a token or password, and a config is copied into the run's folder; expected it in "
                "the environment (HF_TOKEN, WANDB_API_KEY), or none"
            )
    return config


def _check_size(value: Any, where: str) -> None:
    """Check that numbers of a field fit into 32 bits, as they are on a device; seeds have a bound of their own.

    Raises:
      UserError: a larger one.
    """
    if isinstance(value, list):
        for each in value:
            _check_size(each, where)
    elif isinstance(value, int) and abs(value) >= 2**31:
        raise UserError(f"{where}: found {_short(str(value))}, expected an integer below 2^31")
    elif isinstance(value, float) and abs(value) > _LARGEST_FLOAT:
        raise UserError(f"{where}: found {value:g}, expected at most {_LARGEST_FLOAT:.5g}, the largest float32")


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:100]}... ({len(text)} characters)"


def decode(kind: type[Section], content: dict[str, Any], where: str) -> Section:
    """Decode plain data into a section of a config, or into a config.

    Raises:
      UserError: a wrong type or value; one line with the field's path.
    """
    try:
        # By way of JSON, since only there pydantic's strict mode accepts mappings for dataclasses.
        return pydantic.TypeAdapter(kind).validate_json(json.dumps(content, default=_plain))
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_message(error)}") from error
    except (TypeError, ValueError, RecursionError) as error:  # also an integer of more than 4,300 digits
        raise UserError(f"{where}: {error}") from error


def _plain(value: Any) -> Any:
    """Return the plain form of a value that YAML or Python brings and JSON lacks: NumPy's numbers, paths, dates."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    if isinstance(value, Path | datetime.date):
        return str(value)
    raise TypeError(f"expected numbers, texts, lists and sections, found {type(value).__name__}")


# Sections that neuroada-jax 0.1 had under another name.
FORMER_SECTIONS = {"head": "classifier"}


def _with_current_names(content: dict[str, Any], where: str) -> dict[str, Any]:
    for former, name in FORMER_SECTIONS.items():
        if former in content and name in content:
            raise UserError(f"{where}: {former} is the former name of {name}; give one of them")
    return {FORMER_SECTIONS.get(key, key): section for key, section in content.items()}


def _without_suites(content: dict[str, Any], where: str) -> dict[str, Any]:
    """Replace every set `suite: <name>` by one for each of the suite's tasks, which share its other fields."""
    section = content.get("evaluation")
    sets = section.get("sets") if isinstance(section, dict) else None
    if not isinstance(sets, list):
        return content
    single: list[Any] = []
    for number, each in enumerate(sets):
        if not isinstance(each, dict) or "suite" not in each:
            single.append(each)
            continue
        field, suite = f"{where}: evaluation.sets.{number}", each["suite"]
        if not isinstance(suite, str) or suite not in SUITES:
            raise UserError(f"{field}.suite: unknown suite {suite!r}; known: {', '.join(SUITES)}")
        taken = [name for name in ("name", "data", "task") if name in each]
        if taken:
            raise UserError(f"{field}.{taken[0]}: a suite has its own names, data and tasks; remove it")
        single += [
            {"task": task, **{key: value for key, value in each.items() if key != "suite"}} for task in SUITES[suite]
        ]
    return {**content, "evaluation": {**(section or {}), "sets": single}}


def load(path: str, overrides: Sequence[str] = (), typed: Mapping[str, str] | None = None) -> RunConfig:
    """Read a run's YAML file.

    Args:
      path: the file.
      overrides: `section.field=value` strings, applied in order.
      typed: override -> the option that stands for it on the command line, for messages.

    Raises:
      UserError: see `from_dict`; also a missing file.
    """
    try:
        text = files.read_bytes(Path(path), largest=LARGEST_YAML, stream=True).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file ({error})") from error
    content = parse_yaml(text, path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(content).__name__}")
    stages = [content]  # the content of the file, and after each override
    for override in overrides:
        stages.append(copy.deepcopy(stages[-1]))
        apply_override(stages[-1], override)
        _make_room(stages[-1], override, overrides)
    wrong = _error(stages[-1])
    if wrong is None:
        return from_dict(stages[-1], path)
    # The last override that brought the error about; none where the file has it by itself.
    blamed = next((number for number in range(len(stages) - 1, 0, -1) if _error(stages[number - 1]) != wrong), 0)
    if not blamed:
        raise UserError(f"{path}: {wrong}")
    override = overrides[blamed - 1]
    raise UserError(f"{(typed or {}).get(override, f'override {override!r}')}: {wrong}")


_EITHER = {"epochs": "steps", "steps": "epochs"}  # of the section training


def _make_room(content: dict[str, Any], override: str, overrides: Sequence[str]) -> None:
    """Remove epochs from a file's content, and say so, where an override gives steps in their place; or the reverse."""
    section, _, name = override.partition("=")[0].partition(".")
    other, training = _EITHER.get(name, ""), content.get("training")
    if section != "training" or not other or any(each.startswith(f"training.{other}=") for each in overrides):
        return
    if isinstance(training, dict) and None not in (training.get(name), training.get(other)):
        console.say(f"{override} takes the place of training.{other}={training.pop(other)}")


def _error(content: dict[str, Any]) -> str | None:
    """Return what is wrong with the content of a config, without its place; None if nothing is."""
    try:
        from_dict(content, "")
    except UserError as error:
        return str(error).removeprefix(": ")
    return None


def flatten_config(config: RunConfig) -> dict[str, Any]:
    """Return every field by its dotted path, such as "training.steps"."""

    def walk(node: Any, prefix: str) -> dict[str, Any]:
        if isinstance(node, dict):
            return {path: leaf for key, child in node.items() for path, leaf in walk(child, f"{prefix}{key}.").items()}
        return {prefix.removesuffix("."): node}

    return walk(dataclasses.asdict(config), "")


def to_yaml(config: RunConfig) -> str:
    """Return the complete config as YAML, with all defaults; `load` gives the same config back."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False)
