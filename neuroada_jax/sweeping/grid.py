"""The grid of a sweep: fields with their values become members, each of them the config of a run."""

import copy
import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from neuroada_jax.core.scores import RULES, Needs
from neuroada_jax.errors import UserError
from neuroada_jax.training import config_file, modules, resuming, statistics
from neuroada_jax.training.config import RunConfig

Grid = dict[str, list[Any]]

RATE, SEED, K = "optimizer.learning_rate", "seed", "bypass.k"
# Members that differ in these alone have arrays of the same shapes and take their steps in one program.
SHARED = (
    *(RATE, "optimizer.schedule", "optimizer.warmup_ratio", "classifier.learning_rate", SEED),
    *("bypass.score", "lora.alpha"),
)
# Members that differ in others of these are trained in turns. Any further field changes the rows or the loss, so that two
# members would not be comparable, the frozen weights, or nothing of the result.
_IN_TURNS = (
    *("method", "bypass.", "lora.", "optimizer.", "classifier.weight_decay"),
    *("training.epochs", "training.steps", "training.batch_size", "fidelity"),
)
# Fields that change nothing of a member's result.
FREE = (*resuming.FREE, "parallel.", "tracking", "evaluation.before", "training.validation_samples")
MOST_MEMBERS = 1000
_AS_STORED = (None, "none", "auto")  # without a quantisation of its own, so that a run has no other weights to select from


@dataclasses.dataclass(frozen=True)
class Member:
    """A run of a sweep.

    Attributes:
      fields: the grid's fields with this member's values.
      config: of the run.
    """

    fields: dict[str, Any]
    config: RunConfig

    @property
    def cell(self) -> str:
        """The member's fields without its seed: members of one cell differ in the seed alone."""
        return json.dumps({name: value for name, value in sorted(self.fields.items()) if name != SEED})

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.seed

    @property
    def name(self) -> str:
        """The member's folder."""
        text = ",".join(f"{name}={shown(value)}" for name, value in sorted(self.fields.items()))
        plain = re.sub(r"[^\w.=,+-]", "_", text)
        if plain == text and len(text) <= 120:
            return text
        return f"{plain[:100]}-{xxhash.xxh3_64_hexdigest(text.encode())[:8]}"

    @property
    def digest(self) -> str:
        """The digest of all that the member's result depends on: two members with the same one are the same run."""
        flat = config_file.flatten_config(self.config)
        without = (*FREE, *_idle(self.config))
        flat |= {name: value for name, value in _defaults(self.config).items() if flat[name] is None}
        content = {name: value for name, value in flat.items() if not name.startswith(without)}
        return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, default=str).encode())


def _idle(config: RunConfig) -> list[str]:
    """Return the fields that have no effect beside the others."""
    if config.method == "lora":
        return ["bypass."]
    rule = RULES.get(config.bypass.score)
    needs = Needs.NOTHING if rule is None else rule.needs
    as_stored = config.model.quantization in _AS_STORED
    idle = {
        "bypass.rank": needs is not Needs.FACTORS,
        "bypass.statistic_batches": needs not in (Needs.GRADIENT, Needs.INPUTS),
        "bypass.select_from": as_stored or config.bypass.score not in modules.OF_WEIGHTS_ALONE,
    }
    return ["lora.", *(name for name, alone in idle.items() if alone)]


def _defaults(config: RunConfig) -> dict[str, Any]:
    """Return what null stands for, of the fields for which the config alone tells."""
    inputs = config.bypass.score == "activation"
    return {
        "lora.alpha": config.lora.resolved_alpha,
        "classifier.learning_rate": config.optimizer.learning_rate,
        "classifier.weight_decay": config.optimizer.weight_decay,
        "bypass.statistic_batches": statistics.INPUT_BATCHES if inputs else None,
        "bypass.select_from": "original",
    }


def shown(value: Any) -> str:
    """Return a value as it is shown, floats as short as they can be."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def describe(fields: Mapping[str, Any]) -> str:
    """Return fields as they are shown: the last part of each name with its value."""
    return ", ".join(f"{name.rpartition('.')[2]} {shown(value)}" for name, value in fields.items()) or "the config"


def counted(members: int) -> str:
    """Return a number of members as it is shown."""
    return "1 member" if members == 1 else f"{members} members"


def parse(options: Sequence[str]) -> Grid:
    """Return the grid of `--grid FIELD=V,V` options.

    Raises:
      UserError: an option without field or values, or a field that is given twice.
    """
    grid: Grid = {}
    for option in options:
        field, equals, text = option.partition("=")
        if not equals or not field:
            raise UserError(f"--grid {option}: expected FIELD=VALUE,VALUE,...")
        if field in grid:
            raise UserError(f"--grid {option}: {field} is given twice; give all its values in one")
        values = config_file.parse_yaml(f"[{text}]", f"--grid {option}")
        if not isinstance(values, list):
            raise UserError(f"--grid {option}: expected values with commas between")
        grid[field] = values
    return grid


def check(grid: Mapping[str, Any], where: str) -> Grid:
    """Return a grid whose fields exist, can be swept and have values, each value once.

    Args:
      grid: field -> values.
      where: what the grid was given as, for messages.

    Raises:
      UserError: an empty grid, an unknown field (names the nearest), one that cannot be swept, or wrong values.
    """
    if not grid:
        raise UserError(f"{where}: expected at least one field with its values, such as {RATE}=1e-3,3e-3")
    known = _fields(RunConfig)
    checked: Grid = {}
    for field, values in grid.items():
        if field not in known:
            paths = config_file.paths_of_field(str(field))
            hint = f"; did you mean {paths[0]!r}?" if paths else config_file.nearest(str(field), known)
            raise UserError(f"{where} {field}: unknown field{hint}")
        if field not in SHARED and not field.startswith(_IN_TURNS):
            raise UserError(f"{where} {field}: {_why_not(field)}")
        scalar = not hasattr(values, "__iter__") or getattr(values, "ndim", 1) == 0
        if scalar or isinstance(values, str | bytes | Mapping):
            raise UserError(f"{where} {field}: expected a list of values, found {values!r}")
        listed = [value.tolist() if hasattr(value, "tolist") else value for value in values]  # NumPy's as plain ones
        if not listed:
            raise UserError(f"{where} {field}: no values, expected at least one")
        twice = [value for number, value in enumerate(listed) if value in listed[:number]]
        if twice:
            raise UserError(f"{where} {field}: {twice[0]!r} is given twice")
        checked[field] = listed
    return checked


def _fields(kind: Any, prefix: str = "") -> list[str]:
    """Return the dotted paths of all fields of a config."""
    found = []
    for field in dataclasses.fields(kind):
        inner = dataclasses.is_dataclass(field.type)
        found += _fields(field.type, f"{prefix}{field.name}.") if inner else [f"{prefix}{field.name}"]
    return found


def _why_not(field: str) -> str:
    section = field.partition(".")[0]
    swept = f"a sweep goes over {', '.join(SHARED)}, and in turns over {', '.join(name.rstrip('.') for name in _IN_TURNS)}"
    if section == "seeds":
        return f"give the values to {SEED}"
    if field == "classifier.class_weights":
        return f"it changes the loss, so that validation losses are not comparable; {swept}"
    if section in ("model", "data"):
        return f"it changes the shapes or the rows of {section}, so that validation losses are not comparable; {swept}"
    return f"it cannot be swept; {swept}"


def members(config: RunConfig, grid: Grid, where: str) -> list[Member]:
    """Return a member for every combination of the values of a checked grid.

    Raises:
      UserError: a value of a wrong type, a combination that is no config, or too many members.
    """
    count = 1
    for values in grid.values():
        count *= len(values)
    if count > MOST_MEMBERS:
        raise UserError(f"{where}: {count:,} members, expected at most {MOST_MEMBERS:,}")
    if {"training.steps", "training.epochs"} <= grid.keys():
        raise UserError(f"{where}: training.steps and training.epochs exclude each other; give one of them")
    combinations = (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
    found = [_blamed(config, fields, where) for fields in combinations]
    seen: dict[str, Member] = {}
    for each in found:
        same = seen.setdefault(each.digest, each)
        if same is not each:
            raise UserError(
                f"{where}: {describe(same.fields)} and {describe(each.fields)} are the same run: what differs has no effect"
            )
    return found


def _blamed(config: RunConfig, fields: Mapping[str, Any], where: str) -> Member:
    """Return the member with these values; an error that one of them brings about by itself names that one alone."""
    try:
        return member(config, fields, where)
    except UserError:
        for field, value in fields.items():
            member(config, {field: value}, where)
        raise


def member(config: RunConfig, fields: Mapping[str, Any], where: str) -> Member:
    """Return the member with these values.

    Raises:
      UserError: they make no config.
    """
    content = copy.deepcopy(dataclasses.asdict(config))
    given = " ".join(f"{field}={value}" for field, value in fields.items())
    for field, value in fields.items():
        *parents, last = field.split(".")
        node = content
        for key in parents:
            node = node[key]
        node[last] = value
        if field in ("training.steps", "training.epochs") and value is not None:
            other = {"steps": "epochs", "epochs": "steps"}[last]
            node[other] = None
    made = config_file.from_dict(content, f"{where} {given}")
    flat = config_file.flatten_config(made)
    return Member({field: flat[field] for field in fields}, made)


def group_key(made: Member) -> str:
    """Return what is the same for members whose steps can be one program, as far as their configs tell."""
    flat = config_file.flatten_config(made.config)
    return json.dumps({name: value for name, value in sorted(flat.items()) if name not in SHARED}, default=str)
