"""The choice among the members of a sweep: means over seeds, the best cell by validation, and whether it is at the edge."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from neuroada_jax.errors import UserError
from neuroada_jax.sweeping.grid import RATE, SEED

FINISHED, DIVERGED, DROPPED = "finished", "diverged", "dropped"  # a member's "status"


class Spread(NamedTuple):
    """Figures of several seeds.

    Attributes:
      mean: of the finite values; None where there is none.
      deviation: of a sample; None for fewer than two values.
      interval: 95 % interval of the mean by Student's t; None for fewer than two values.
      n: number of finite values.
    """

    mean: float | None
    deviation: float | None
    interval: tuple[float, float] | None
    n: int

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON has them."""
        return {**self._asdict(), "interval": None if self.interval is None else list(self.interval)}


def spread(values: Sequence[float | None]) -> Spread:
    """Return the figures of values, of which those that are None or not finite do not count."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return Spread(None, None, None, 0)
    mean = statistics.mean(finite)
    if len(finite) < 2:
        return Spread(mean, None, None, 1)
    from scipy import stats  # here, since it takes half a second

    deviation = statistics.stdev(finite)
    half = float(stats.t.ppf(0.975, len(finite) - 1)) * deviation / math.sqrt(len(finite))
    return Spread(mean, deviation, (mean - half, mean + half), len(finite))


class Cell(NamedTuple):
    """The members that differ in their seed alone.

    Attributes:
      fields: that they share.
      records: of the members.
      validation: their validation losses.
    """

    fields: dict[str, Any]
    records: list[dict[str, Any]]
    validation: Spread

    @property
    def complete(self) -> bool:
        """Whether every member has finished."""
        return all(record["status"] == FINISHED for record in self.records)

    @property
    def status(self) -> str:
        """What a table says of the cell beside its figures."""
        for status in (DIVERGED, DROPPED):
            count = sum(record["status"] == status for record in self.records)
            if count:
                return status if count == len(self.records) else f"{count} of {len(self.records)} {status}"
        return ""

    def scores(self, name: str) -> Spread:
        """Return the figures of an evaluation set."""
        return spread([(record["scores"].get(name) or {}).get("value") for record in self.records])

    def to_json(self) -> dict[str, Any]:
        """Return the fields with the figures of all seeds."""
        sets = {name: None for record in self.records for name in record["scores"]}
        return {
            "fields": self.fields,
            "seeds": [record["seed"] for record in self.records],
            "status": self.status,
            "validation": self.validation.to_json(),
            "scores": {name: self.scores(name).to_json() for name in sets},
        }


def cells(records: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """Return the cells of members' records, in the order of their first members."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record["cell"], []).append(dict(record))
    return [
        Cell(
            {name: value for name, value in own[0]["fields"].items() if name != SEED},
            own,
            spread([record["validation"] for record in own if record["status"] == FINISHED]),
        )
        for own in found.values()
    ]


def best(found: Sequence[Cell]) -> Cell | None:
    """Return the cell with the lowest mean validation loss, one whose members have all finished if there is any.

    Scores of evaluation sets have no part in it: what is reported must not choose. None where no member has finished.
    """
    candidates = [cell for cell in found if cell.complete] or [cell for cell in found if cell.validation.n]
    return min(candidates, key=lambda cell: cell.validation.mean or 0.0, default=None)


def best_record(cell: Cell) -> dict[str, Any]:
    """Return the record of the cell's member with the lowest validation loss."""
    return min((record for record in cell.records if record["status"] == FINISHED), key=lambda record: record["validation"])


def _rates(found: Sequence[Cell], chosen: Cell) -> list[float]:
    """Return the rates that were tried together with the other fields of the chosen cell, ascending."""
    others = {name: value for name, value in chosen.fields.items() if name != RATE}
    same = [cell for cell in found if {name: value for name, value in cell.fields.items() if name != RATE} == others]
    return sorted({cell.fields[RATE] for cell in same if RATE in cell.fields})


def edge(found: Sequence[Cell], chosen: Cell) -> str | None:
    """Return "lowest" or "highest" where the chosen rate is that of the rates tried; None inside, or for one rate."""
    rates = _rates(found, chosen)
    if len(rates) < 2:
        return None
    rate = chosen.fields[RATE]
    return "lowest" if rate == rates[0] else "highest" if rate == rates[-1] else None


def beyond(found: Sequence[Cell], chosen: Cell) -> float:
    """Return the next rate outwards of a chosen cell at the edge: the last step of the grid once more, as a factor."""
    rates = _rates(found, chosen)
    low = edge(found, chosen) == "lowest"
    factor = rates[0] / rates[1] if low else rates[-1] / rates[-2]
    return float(f"{(rates[0] if low else rates[-1]) * factor:.4g}")


def check_chosen(content: Mapping[str, Any]) -> None:
    """Check that a sweep has chosen a member.

    Raises:
      UserError: every one diverged.
    """
    if content["best"] is None:
        where = content["directory"]
        raise UserError(f"{where}: no member is left, each loss became NaN or infinite; try lower values of {RATE}")


def survivors(losses: Mapping[str, Sequence[float | None]]) -> set[str]:
    """Return the better half of the cells by their mean validation loss, rounded up; without those that diverged.

    Args:
      losses: cell -> the validation losses of its members; None where one diverged.
    """
    sound: dict[str, float] = {}
    for name, own in losses.items():
        finite = [value for value in own if value is not None and math.isfinite(value)]
        if len(finite) == len(own):
            sound[name] = statistics.mean(finite)
    ranked = sorted(sound, key=lambda name: sound[name])
    return set(ranked[: -(-len(losses) // 2)])
