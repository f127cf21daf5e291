"""The members of a sweep before their first step: rows by seed, connections, classifiers, and one set of weights."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import optax
import xxhash

from neuroada_jax import console
from neuroada_jax.core.trees import Tree
from neuroada_jax.errors import UserError
from neuroada_jax.models import Model, dense_modules, unrolled
from neuroada_jax.pretrained.load import IdentifiedModel, LoadedModel, OpenedModel, load_with_progress, with_params
from neuroada_jax.sweeping.grid import Member
from neuroada_jax.sweeping.group import Start
from neuroada_jax.training import config_file, connections, modules, resuming, step, weights
from neuroada_jax.training.config import RunConfig, TrainingSection
from neuroada_jax.training.config_execution import ParallelSection, WatchdogSection
from neuroada_jax.training.preparation import PreparedRows, prepare_rows
from neuroada_jax.training.step import TrainState
from neuroada_jax.training.weights import OriginalColumns

_LEFT = (
    *("training.keep_last", "training.keep_best", "training.validation_samples"),
    *("watchdog.spike", "watchdog.stall_warn", "watchdog.stall_stop", "parallel.", "tracking", "merge"),
)
FEW_ROWS = 20  # validation rows, below which the choice is a matter of luck


def prepare(members: Sequence[Member], model: tuple[OpenedModel, Any]) -> dict[str, PreparedRows]:
    """Read, check and tokenise the rows of every member; those that differ in the optimiser alone share them.

    Args:
      members: of the sweep.
      model: the opened model and its tokenizer.

    Returns: by `rows_key`.

    Raises:
      UserError: see `preparation.prepare_rows`.
    """
    _check_trained(members, model[0].model)
    found: dict[str, PreparedRows] = {}
    for member in members:
        key = rows_key(member.config)
        if key in found:
            continue
        if found:
            with console.collected():  # the first one has said all of it
                found[key] = prepare_rows(member.config, model)
        else:
            found[key] = prepare_rows(member.config, model)
        held_back = found[key].validation
        count = 0 if held_back is None else len(held_back.batches.examples)
        if count < FEW_ROWS and len(found) == 1:
            console.warn(
                f"data.validation: {count} examples choose among {len(members)} members, which is mostly luck; expected "
                f"at least {FEW_ROWS}, better some hundreds"
            )
    return found


def _check_trained(members: Sequence[Member], model: Model) -> None:
    """Check that what every member trains suits the model; the first one's is checked with its rows."""
    checked = [(members[0].config.trained, members[0].config.classifier)]
    for config in (member.config for member in members):
        if (config.trained, config.classifier) not in checked:
            checked.append((config.trained, config.classifier))
            modules.check_kind(config, model)
            modules.checked_targets(config, model)


def rows_key(config: RunConfig) -> str:
    """Return what the rows, the targets and the numbers of steps depend on."""
    flat = config_file.flatten_config(config)
    free = ("bypass.k", "bypass.score", "lora.r", "lora.alpha")
    other = ("optimizer.", "classifier.learning_rate", "name", "output", *free)
    return digest({name: value for name, value in flat.items() if not name.startswith(other)})


def digest(content: dict[str, Any]) -> str:
    """Return a digest of plain data, equal for equal data."""
    return xxhash.xxh3_128_hexdigest(repr(sorted(content.items())).encode())


def with_rows(member: Member, rows: PreparedRows) -> PreparedRows:
    """Return shared rows as the member's own."""
    return dataclasses.replace(rows, config=modules.resolved(member.config, rows.opened.model))


@dataclasses.dataclass
class Weights:
    """The frozen weights of a sweep, which exist once.

    Attributes:
      base_model: the model with its digests, without parameters.
      params: the frozen parameters; programs take them over and give them back.
      classifier: paths of the modules that train densely.
    """

    base_model: IdentifiedModel
    params: Tree
    classifier: list[tuple[str, ...]]


def load(members: Sequence[Member], rows: dict[str, PreparedRows]) -> tuple[LoadedModel, dict[str, OriginalColumns]]:
    """Read the weights of a sweep; return them, and the columns of members that select from weights as they are read."""
    first, originals = rows[rows_key(members[0].config)], {}
    for member in members:
        own = with_rows(member, rows[rows_key(member.config)])
        key, found = _trained_key(own), weights.original_columns(own.config, own.opened, own.target_paths)
        if found is not None and key not in originals:
            originals[key] = found

    def on_kernel(*kernel: Any) -> None:
        for each in originals.values():
            each.add(*kernel)

    return load_with_progress(first.opened, members[0].seed, on_kernel=on_kernel if originals else None), originals


def _trained_key(own: PreparedRows) -> str:
    """Return what the connections and the initial state of a member depend on."""
    return digest({"trains": own.config.trained, "rows": rows_key(own.config)})


def begin(
    members: Sequence[Member],
    rows: dict[str, PreparedRows],
    loaded: LoadedModel,
    originals: Mapping[str, OriginalColumns] | None = None,
) -> tuple[Weights, list[Start]]:
    """Choose the connections of every member and initialise its state.

    Args:
      members: that have to be trained.
      rows: from `prepare`.
      loaded: the model with its weights, which the result takes over.
      originals: from `load`; None: connections are chosen from `loaded`.
    """
    first = rows[rows_key(members[0].config)]
    paths = modules.dense_paths(first.config, loaded, loaded.initialised, first.target_paths)
    params, _ = dense_modules.split(loaded.params, paths)
    starts = []

    @functools.cache
    def with_classifier(seed: int) -> LoadedModel:
        return with_params(first.opened, loaded, seed)

    states: dict[str, TrainState] = {}
    for member in members:
        own = with_rows(member, rows[rows_key(member.config)])
        key = _trained_key(own)
        if key not in states:
            complete = with_classifier(member.seed).params
            built = connections.choose(
                own.config,
                loaded.model,
                complete,
                own.target_paths,
                (own.batches.batch(0, index) for index in range(own.batches.steps_per_epoch)),
                own.objective.losses,
            )
            built = originals[key].put_into(built) if originals and key in originals else built
            skip = own.config.watchdog.nonfinite == "skip"
            state = step.initial_state(complete, built, optax.identity(), paths, skip)
            states[key] = state._replace(params={})
        starts.append(Start(member, own, states[key]))
    base_model = loaded.without_params()
    return Weights(base_model, unrolled.apart(params, loaded.model.layers_path), paths), starts


def at_rate(start: Start, member: Member) -> Start:
    """Return the start of a member that differs from that of `start` in its rate alone."""
    return Start(member, with_rows(member, start.rows), start.state)


def digest_of_rows(rows: PreparedRows) -> str:
    """Return the digest of all rows of a member: those it trains on, chooses by and is scored on."""
    return digest({"data.train": resuming.digest_of_data(rows.batches), **resuming.digests_of_held_out(rows)})


def check_validation(config: RunConfig) -> None:
    """Check that a config can be swept.

    Raises:
      UserError: it has nothing to choose by, several seeds, or devices that split the weights.
    """
    if config.data.validation is None:
        raise UserError(
            "data.validation: a sweep chooses by the loss on validation rows, never on what is reported; give a share of "
            "the rows, such as data.validation=0.1, or a file"
        )
    if config.seeds is not None:
        raise UserError(f"seeds: a sweep takes them as --grid seed={','.join(map(str, config.seeds))}; remove seeds")
    section = config.parallel
    if section.fsdp * section.tensor > 1 or (section.devices or 1) > 1:
        raise UserError("parallel: a sweep runs on one device; remove devices, fsdp and tensor")


def left_out(config: RunConfig) -> list[str]:
    """Return the fields of a config that are not as usual and have no effect on a sweep, but on a run of its choice."""
    sections: Any = {"training": TrainingSection(steps=1), "watchdog": WatchdogSection(), "parallel": ParallelSection()}
    flat = config_file.flatten_config(config)
    usual = config_file.flatten_config(dataclasses.replace(config, tracking=[], merge=False, **sections))
    return [name for name in flat if name.startswith(_LEFT) and flat[name] != usual[name]]
