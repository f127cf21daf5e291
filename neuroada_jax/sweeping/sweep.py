"""A sweep from config and grid to the chosen adapter: members in groups, the choice, and the files it leaves."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from neuroada_jax import console, files
from neuroada_jax.adapters import native
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained.load import open_with_tokenizer
from neuroada_jax.sweeping import capacity, choice, report, scoring, starts
from neuroada_jax.sweeping import grid as grids
from neuroada_jax.sweeping.choice import DIVERGED, DROPPED, FINISHED, Cell
from neuroada_jax.sweeping.grid import RATE, Grid, Member, counted
from neuroada_jax.sweeping.group import Course, Group, Programs, Start
from neuroada_jax.sweeping.stack import fresh
from neuroada_jax.sweeping.starts import Weights
from neuroada_jax.sweeping.store import Store
from neuroada_jax.training import config_file, signals
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.config_execution import ParallelSection
from neuroada_jax.training.preparation import PreparedRows
from neuroada_jax.training.signals import Stop

_OF_FILES = ("examples", "base", "member", "adapter")  # in a record, to check a member's files by
MOST_EXTENSIONS = 4  # times that `extend` goes on outwards


class Options(NamedTuple):
    """How a sweep goes through its grid.

    Attributes:
      extend: go on outwards, at most `MOST_EXTENSIONS` times, while the best rate is at the edge.
      halving: drop the worse half of the cells at a third of the steps.
      at_once: members at a time, at most; None: as many as fit into memory.
      overwrite: replace a sweep that is in the folder; otherwise it goes on.
    """

    extend: bool = False
    halving: bool = False
    at_once: int | None = None
    overwrite: bool = False


def sweep(
    config: str | Path | Mapping[str, Any] | RunConfig,
    /,
    grid: object,
    *,
    extend: bool = False,
    halving: bool = False,
    at_once: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a config at every combination of a grid's values, and choose the best by `data.validation`.

    Runs of equal shapes share one program and one set of frozen weights; others take turns. Each equals a run of its own
    with its values. A sweep that was ended goes on when it is called again: members that have finished do not run twice.

    Args:
      config: of a run: a YAML file or its content.
      grid: field -> values, such as {"optimizer.learning_rate": [1e-3, 3e-3], "seed": [42, 43]}.
      extend: go on outwards while the best rate is at the edge of the grid.
      halving: drop the worse half of the cells at a third of the steps.
      at_once: members at a time, at most; None: as many as fit into memory.
      overwrite: replace a sweep that is in the config's output directory.

    Returns: the content of sweep.json.

    Raises:
      UserError: in one line: a grid, config, model or rows that do not fit; no member without a diverging loss.
      Stopped: a KeyboardInterrupt, on Ctrl-C or SIGTERM in the main thread: what the members have done is saved.
    """
    if isinstance(config, RunConfig):
        made = config
    elif isinstance(config, Mapping):
        made = config_file.from_dict(dict(config), "sweep")
    else:
        made = config_file.load(os.fspath(config))
    if not isinstance(grid, Mapping):
        raise UserError(f"sweep: grid: expected a dict of fields and their values, found {type(grid).__name__}")
    if at_once is not None and (type(at_once) is not int or at_once < 1):
        raise UserError(f"sweep: at_once: expected an integer from 1, found {at_once!r}")
    with signals.listening() as stop:
        content, _ = run(made, dict(grid), Options(extend, halving, at_once, overwrite), "sweep: grid:", stop)
    choice.check_chosen(content)
    return content


def run(
    config: RunConfig, given: Mapping[str, Any], options: Options, where: str, stop: Stop | None = None
) -> tuple[dict[str, Any], list[Cell]]:
    """Do a sweep; return the content of sweep.json, and the cells; `choice.check_chosen` says whether a member is left.

    Args:
      config: that the grid is laid over.
      given: field -> values.
      options: see `Options`.
      where: what the grid was given as, for messages.
      stop: asked between steps; None: nobody will.

    Raises:
      UserError: see `sweep`.
      Stopped: on request; what the members have done is saved.
    """
    starts.check_validation(config)
    checked = grids.check(given, where)
    own = dataclasses.replace(config, parallel=ParallelSection(mode="single"))
    members = grids.members(own, checked, where)
    if any(member.config.method == "neuroada" and member.config.bypass.score == "custom" for member in members):
        raise UserError("bypass.score: 'custom' stands for a Python function, which a sweep does not take; choose another")
    if left := starts.left_out(config):
        console.say(f"a sweep leaves {', '.join(left)} to a run of its best/config.yaml")
    store = Store(config.directory)
    store.check(config, list(checked), options.overwrite)
    model = open_with_tokenizer(config.model.path, config.model.dtype, quantization_of=config.model.held)
    rows = starts.prepare(members, model)
    with store.opened(config, options.overwrite):
        return _Sweep(config, own, checked, options, store, rows, stop or Stop()).run(members)


class _Sweep:
    """A sweep whose inputs are checked and whose folder is locked."""

    def __init__(
        self,
        config: RunConfig,
        own: RunConfig,
        checked: Grid,
        options: Options,
        store: Store,
        rows: dict[str, PreparedRows],
        stop: Stop,
    ) -> None:
        """Take the user's config, that of the members before the grid, the grid, what was prepared, and who may stop it."""
        self._config, self._own, self._grid, self._options, self._stop = config, own, checked, options, stop
        self._store, self._rows = store, rows
        self._records: dict[str, dict[str, Any]] = {}  # by the name of the member
        self._order: list[str] = []  # of these names, as the grid has them
        self._plans: list[dict[str, Any]] = []
        self._weights: Weights | None = None
        self._base = ""  # digest of the base model
        self._starts: list[Start] = []
        self._programs: dict[Any, Programs] = {}

    def run(self, members: list[Member]) -> tuple[dict[str, Any], list[Cell]]:
        """Train what has not finished, extend the grid, choose, and write the results."""
        self._train(members, self._options.halving)
        extensions = 0
        while True:
            found = choice.cells([self._records[name] for name in self._order])
            best = choice.best(found)
            edge = best and choice.edge(found, best)
            if best is None or edge is None or not self._options.extend or extensions == MOST_EXTENSIONS:
                break
            extensions += 1
            rate = choice.beyond(found, best)
            if rate in self._grid[RATE]:
                break  # rates so close to one another that the next one is one of them
            try:
                more = [self._at_rate(record, rate) for record in best.records]
            except UserError:
                break  # no config may have it: 0, or beyond float32
            console.say(f"the best rate {best.fields[RATE]:g} is the {edge} one: going on with {rate:g}")
            self._grid[RATE] = sorted([*self._grid[RATE], rate])
            self._train(more, halving=False)
        return self._finish(found, best, edge), found

    def _at_rate(self, record: Mapping[str, Any], rate: float) -> Member:
        return grids.member(self._own, {**record["fields"], RATE: rate}, "--extend")

    def _train(self, members: Sequence[Member], halving: bool) -> None:
        """Train the members that have no record yet."""
        waiting = []
        self._order += [member.name for member in members]
        for member in members:
            record = self._store.record(member)
            if record is None or (record["status"] == DROPPED and not self._options.halving):
                waiting.append(member)
                continue
            self._check_rows(member, record["examples"])
            self._records[member.name] = record
        if len(waiting) < len(members):
            console.say(f"{len(members) - len(waiting)} of {len(members)} members have finished before")
        if not waiting:
            return
        finished = [member for member in members if member not in waiting] if self._options.extend else []
        begun = self._begin(waiting, finished)
        going_on = self._halved(begun) if halving else begun
        for group in self._groups(going_on, lambda start: start.rows.total_steps):
            self._advance(group, group.total)
            self._end(group)

    def _begin(self, waiting: Sequence[Member], finished: Sequence[Member]) -> list[Start]:
        """Return the starts of members; the weights are read at the first call.

        Those of finished members are kept for rates beyond the grid, which may follow from any of them.
        """
        if self._weights is None:
            members = [*waiting, *finished]
            loaded, originals = starts.load(members, self._rows)
            self._base = starts.digest(dict(loaded.digests))
            for name, record in self._records.items():
                self._check_base(name, record["base"])
            self._weights, self._starts = starts.begin(members, self._rows, loaded, originals)
            begun = self._starts[: len(waiting)]
        else:
            known = {(start.member.seed, _but_rate(start.member)): start for start in self._starts}
            begun = [starts.at_rate(known[member.seed, _but_rate(member)], member) for member in waiting]
        begun = [self._continued(start) for start in begun]
        for step in sorted({start.step for start in begun if start.progress}):
            console.say(f"going on from step {step}: {counted(sum(start.step == step for start in begun))}")
        return begun

    def _continued(self, start: Start) -> Start:
        """Return a member with what an earlier process has done of its steps."""
        found = self._store.progress(start.member, fresh(start.state, start.member.config))
        if found is None:
            return start
        progress, about = found
        self._check_rows(start.member, about["examples"])
        self._check_base(start.member.name, about["base"])
        chosen = start.state._replace(columns=progress.state.columns, base_entries=progress.state.base_entries)
        return dataclasses.replace(start, state=chosen, progress=progress)

    def _check_base(self, name: str, base: str) -> None:
        """Check that a member was trained on the base model of today.

        Raises:
          UserError: it was not.
        """
        if base != self._base:
            where = self._store.directory
            raise UserError(f"{where} holds a sweep on another base model ({name}); --overwrite replaces it")

    @property
    def _trained_on(self) -> Weights:
        assert self._weights is not None
        return self._weights

    def _groups(self, waiting: Sequence[Start], until: Callable[[Start], int]) -> Iterator[Group]:
        """Yield the members in groups of equal shapes that fit into memory, one after the other on the device.

        What they need until a step is stated before the first one.
        """
        groups, needs = capacity.grouped(waiting, self._programs, self._trained_on, self._options.at_once, until)
        self._plans += [need.to_json() for need in needs]
        for group in groups:
            with group.on_device():
                yield group

    def _advance(self, group: Group, until: int) -> None:
        weights = self._trained_on
        weights.params = group.advance(weights.params, until, self._stop, self._keep)

    def _keep(self, group: Group) -> None:
        """Write the progress of a group's members, from which a sweep that was ended goes on."""
        for i, start in enumerate(group.starts):
            self._store.write_progress(start.member, group.progress(i), self._trained_with(start))

    def _trained_with(self, start: Start) -> dict[str, str]:
        return {"examples": starts.digest_of_rows(start.rows), "base": self._base}

    def _halved(self, begun: Sequence[Start]) -> list[Start]:
        """Take members to a third of their steps, and drop the worse half of the cells; return the members that go on.

        What an earlier process has decided stands; the others are compared with one another.
        """
        decided = self._store.halving()
        known = [start for start in begun if start.member.digest in decided]
        undecided = [start for start in begun if start.member.digest not in decided]
        if any(start.step > _third(start) for start in undecided):
            console.say("some members have taken more than a third of their steps before: no further cell is dropped")
            known, undecided = list(begun), []
        losses: dict[str, list[float | None]] = {}
        reached = []
        for group in self._groups(undecided, _third):
            self._advance(group, _third(group.starts[0]))
            self._keep(group)
            self._trained_on.params, values = group.losses(self._trained_on.params, self._stop)
            for i, (start, course, value) in enumerate(zip(group.starts, group.courses, values, strict=True)):
                found = value if course.diverged is None and math.isfinite(value) else None
                losses.setdefault(start.member.cell, []).append(found)
                decided[start.member.digest] = {"validation": found}
                reached.append(dataclasses.replace(start, progress=group.progress(i)))
        if reached:
            kept = choice.survivors(losses)
            for start in reached:
                decided[start.member.digest]["kept"] = start.member.cell in kept
            self._store.write_halving(decided)
            console.say(f"at a third of the steps {len(losses) - len(kept)} of {len(losses)} cells are dropped")
        going_on = []
        for start in [*known, *reached]:
            decision = decided.get(start.member.digest, {"kept": True})
            if decision["kept"]:
                going_on.append(start)
                continue
            course, last = start.progress.course if start.progress else Course(), decision["validation"]
            self._write(start, course, DIVERGED if last is None else DROPPED, {}, last)
        return going_on

    def _end(self, group: Group) -> None:
        """Save and score the members of a trained group."""
        self._keep(group)  # a stop while they are saved and scored loses no step
        for i, (start, course) in enumerate(zip(group.starts, group.courses, strict=True)):
            if course.validation is None:
                self._write(start, course, DIVERGED, {}, None)
                continue
            if course.skipped:
                name = grids.describe(start.member.fields)
                console.warn(f"{name}: {course.skipped} of {group.step} steps had a NaN or infinite loss and were skipped")
            trained = group.best_of(i)
            scoring.save(self._store.adapter(start.member), start, trained, self._trained_on)
            self._write(start, course, FINISHED, scoring.scores(start, trained, self._trained_on), course.validation)

    def _write(self, start: Start, course: Course, status: str, scores: dict[str, Any], validation: float | None) -> None:
        """Write the record of a member that has ended."""
        member, best = start.member, course.best
        record = {
            "fields": member.fields,
            "validation": validation,
            "scores": scores,
            "trained": start.trained,
            "status": status,
            "seed": member.seed,
            "cell": member.cell,
            "best_step": best and best["step"],
            "diverged_at": course.diverged,
            "steps": course.lines,
            **self._trained_with(start),
        }
        self._store.write(member, files.finite(record))
        self._records[member.name] = files.finite(record)

    def _check_rows(self, member: Member, examples: str) -> None:
        """Check that a member was trained on the rows of today.

        Raises:
          UserError: it was not.
        """
        rows = self._rows[starts.rows_key(member.config)]
        if examples != starts.digest_of_rows(rows):
            raise UserError(
                f"{self._store.directory} holds a sweep over other rows than those of today; --overwrite replaces it, or "
                "give another folder with output=FOLDER"
            )

    def _finish(self, found: list[Cell], best: Cell | None, edge: str | None) -> dict[str, Any]:
        """Write what the sweep leaves; return the content of sweep.json, whose best is None where every member diverged."""
        directory, records = self._store.directory, [self._records[name] for name in self._order]
        content: dict[str, Any] = {
            "name": self._config.name,
            "directory": str(directory),
            "grid": self._grid,
            "members": [{key: value for key, value in each.items() if key not in _OF_FILES} for each in records],
            "best": None,
            "at_edge": edge is not None,
            "cells": [cell.to_json() for cell in found],
            "plan": self._plans,
            "config": dataclasses.asdict(self._config),
            "versions": native.installed_versions(),
        }
        if best is not None:
            chosen = choice.best_record(best)
            member = grids.member(self._config, chosen["fields"], "the chosen config")
            target = directory / "best"
            self._store.write_best(self._store.adapter(member), _run_config(member.config, target))
            content["best"] = {
                **{key: chosen[key] for key in ("fields", "validation", "scores", "trained", "cell", "best_step")},
                "mean": best.to_json(),
                "adapter": str(target / "adapter"),
                "config": str(target / "config.yaml"),
            }
        files.write_text(directory / "sweep.json", files.to_json(content, indent=1) + "\n")
        report.draw(directory / "sweep.png", found, best, self._config.name)
        if best is None:
            self._store.remove_best()
        elif edge is not None:
            console.warn(
                f"the best rate {best.fields[RATE]:g} is the {edge} of those tried, so that the best may lie beyond: add "
                "rates to the grid, or --extend goes on outwards"
            )
        return content


def _run_config(config: RunConfig, target: Path) -> RunConfig:
    """Return the chosen config as that of a run of its own, whose folder is beside the adapter."""
    return dataclasses.replace(config, name=f"{config.name}-best", output=str(target / "run"))


def _third(start: Start) -> int:
    """Return the step at which halving drops."""
    return max(1, start.rows.total_steps // 3)


def _but_rate(member: Member) -> str:
    return starts.digest({name: value for name, value in member.fields.items() if name != RATE})
