"""Communication of a compiled program between devices, read from its HLO text."""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*)$")
_COLLECTIVE = re.compile(rf"^(.*?) (?:ragged-)?({'|'.join(KINDS)})(-start)?\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)|branch_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# {{0,1},{2,3}} lists the groups, [2,2]<=[4] gives their number and size, mesh['a'=2,'b'=2] {'a'} the axes they span.
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\] \{([^}]*)\})")
_AXIS = re.compile(r"'(\w+)'(?:=(\d+)|:\(\d+\)(\d+))?")
_BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Totals of all collectives of one kind in one call of a program.

    Attributes:
      count: number of collectives issued; those in a loop count once for every iteration.
      bytes: size of the complete arrays that are summed or gathered. In a ring of n devices each sends (n - 1) / n of it,
        and twice that for an all-reduce.
    """

    count: int = 0
    bytes: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.count + other.count, self.bytes + other.bytes)

    def __mul__(self, times: int) -> "Traffic":
        return Traffic(times * self.count, times * self.bytes)


def collectives(hlo: str) -> dict[str, Traffic]:
    """Return the traffic of an optimised HLO module by kind, without the kinds that do not occur.

    Args:
      hlo: text as `jax.jit(f).lower(...).compile().as_text()` returns it.

    Raises:
      ValueError: a loop with collectives has an unknown trip count, or the groups of a collective have an unknown syntax.
    """
    bodies, entry = _computations(hlo)
    known: dict[str, dict[str, Traffic]] = {}

    def total(name: str) -> dict[str, Traffic]:
        if name not in known:
            known[name] = {}
            for instruction in bodies.get(name, ()):
                _add(known[name], _own(instruction), 1)
                for called, times in _calls(instruction):
                    inside = total(called)
                    if inside and times is None:
                        raise ValueError(f"a loop with collectives has no known trip count: {instruction[:200]}")
                    _add(known[name], inside, times or 1)
        return known[name]

    return {kind: traffic for kind, traffic in sorted(total(entry).items()) if traffic.count}


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Return the instructions of every computation, without their names, and the name of the entry computation."""
    bodies: dict[str, list[str]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            current = match[2]
            bodies[current] = []
            entry = current if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            bodies[current].append(match[1])
    return bodies, entry


def _add(total: dict[str, Traffic], more: dict[str, Traffic], times: int) -> None:
    for kind, traffic in more.items():
        total[kind] = total.get(kind, Traffic()) + traffic * times


def _own(instruction: str) -> dict[str, Traffic]:
    """Return the traffic of one instruction: empty if it is not a collective, or one in groups of a single device."""
    match = _COLLECTIVE.match(instruction)
    if not match:
        return {}
    kind, starts, size = match[2], match[3], _group_size(instruction)
    if size == 1:
        return {}
    arrays = list(_array_bytes(match[1]))
    half = len(arrays) // 2  # the result of a start instruction contains its operands, too
    if kind == "reduce-scatter" and not starts:
        if size is None:
            raise ValueError(f"a reduce-scatter among groups that cannot be read: {instruction[:200]}")
        found = sum(arrays) * size  # its result is a share of what is summed
    elif kind == "reduce-scatter":
        found = sum(arrays[:half])
    elif kind == "all-gather" and starts:
        found = sum(arrays[half:])
    elif kind == "collective-permute" and starts:
        found = arrays[0]
    else:
        found = sum(arrays)
    return {kind: Traffic(1, found)}


def _group_size(instruction: str) -> int | None:
    """Return the number of devices in each group of a collective; None where the text does not give it."""
    match = _GROUPS.search(instruction)
    if not match:
        return None
    if match[1]:
        return len(match[1].split(","))
    if match[2]:
        return int(match[2])
    sizes = {name: int(size) for name, size, _ in _AXIS.findall(match[3])}
    return math.prod(int(part) if part else sizes[name] for name, _, part in _AXIS.findall(match[4]))


def _array_bytes(shapes: str) -> Iterator[int]:
    for dtype, dimensions in _ARRAY.findall(shapes):
        bits = 8 if dtype == "pred" else int(_BITS.findall(dtype)[0])
        yield math.prod(int(size) for size in dimensions.split(",") if size) * bits // 8


def _calls(instruction: str) -> Iterator[tuple[str, int | None]]:
    """Yield the computations that an instruction calls, and how often; None for an unknown trip count."""
    trips = _TRIPS.search(instruction)
    for name, branches in _CALLED.findall(instruction):
        if name:
            yield name, (int(trips[1]) if trips else None) if f"body=%{name}" in instruction else 1
        for branch in branches.split(",") if branches else ():
            yield branch.strip().lstrip("%"), 1
