"""How many members of a sweep fit beside each other: the memory and time of their step, compiled before it runs."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neuroada_jax import console
from neuroada_jax.core.trees import Tree
from neuroada_jax.errors import UserError
from neuroada_jax.planning import machines, roofline
from neuroada_jax.planning.machines import Machine
from neuroada_jax.sweeping import grid as grids
from neuroada_jax.sweeping.grid import counted
from neuroada_jax.sweeping.group import Group, Programs, Start
from neuroada_jax.sweeping.starts import Weights


@dataclasses.dataclass(frozen=True)
class Need:
    """What the step of some members needs.

    Attributes:
      members: taken at a time.
      weights: bytes of the frozen weights, which are there once.
      states: bytes of values, moments, columns, base entries and kept states of all members.
      temporaries: bytes of activations, gradients and buffers, and of the batches.
      seconds: least time of all their steps by the machine's speed; None where that is not known.
    """

    members: int
    weights: int
    states: int
    temporaries: int
    seconds: float | None

    @property
    def total(self) -> int:
        """The sum of all bytes."""
        return self.weights + self.states + self.temporaries

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON has them."""
        return {**dataclasses.asdict(self), "total_bytes": self.total}

    def __str__(self) -> str:
        """Return the bytes as they are stated."""
        size = console.size
        return (
            f"{size(self.total)}, of which {size(self.weights)} are weights, {size(self.states)} states and "
            f"{size(self.temporaries)} activations and buffers"
        )


def _say(needs: Sequence[tuple[Need, int, float | None]]) -> None:
    """State what the members need before their training, those that need the same in one line.

    Args:
      needs: of the members of each kind: what those at a time need, how many there are, and the least time of all.
    """
    alike: dict[tuple[int, str], list[tuple[int, float | None]]] = {}
    for need, count, seconds in needs:
        alike.setdefault((need.members, str(need)), []).append((count, seconds))
    for (at_once, text), same in alike.items():
        members = counted(sum(count for count, _ in same))
        console.say(f"{members}, {at_once} at a time: {text}{_at_least([seconds for _, seconds in same])}")
    if len(alike) > 1:
        console.say(f"in all {sum(count for _, count, _ in needs)} members{_at_least([seconds for *_, seconds in needs])}")


def _at_least(times: Sequence[float | None]) -> str:
    known = [seconds for seconds in times if seconds is not None]
    return f"; at least {_duration(sum(known))}" if known else ""


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


@functools.cache  # the speed of a CPU is measured
def machine_here(dtype: Any) -> tuple[Machine | None, int]:
    """Return the machine that runs the sweep, None where its speed is unknown, and the bytes of memory to be used."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        machine = machines.this_machine(dtype)
        return machine, machine.memory
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    return machines.of_kind(device.device_kind), int(limit)


def grouped(
    waiting: Sequence[Start],
    programs: dict[Any, Programs],
    weights: Weights,
    most: int | None,
    until: Callable[[Start], int],
) -> tuple[list[Group], list[Need]]:
    """Return members in groups of equal shapes and steps that fit into memory, and the need of each kind, which is stated.

    Args:
      waiting: the members.
      programs: of the kinds met so far; those of further ones are added.
      weights: of the sweep.
      most: members at a time; None: as many as fit.
      until: the step that a member is trained to.

    Raises:
      UserError: not even one member fits.
    """
    kinds: dict[Any, list[Start]] = {}
    for start in waiting:
        batches, dropout = start.rows.batches, start.rows.objective.dropout_seed is not None
        # A dropout mask depends on the padded length, and batches of similar lengths differ from seed to seed.
        alone = len(batches.shapes) > 1 and (dropout or batches.group_by_length)
        key = (grids.group_key(start.member), start.rows.total_steps, batches.steps_per_epoch)
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(start.state))
        apart = (start.member.seed if alone else None, start.step)
        kinds.setdefault(((*key, shapes), apart), []).append(start)
    machine = machine_here(weights.base_model.model.config.dtype)
    groups, needs = [], []
    for (kind, _), own in kinds.items():
        left = own
        if kind not in programs:
            programs[kind] = Programs(own[0], weights.base_model.model)
        while left:
            group, need = fitting(left, programs[kind], weights.params, machine, most)
            if left is own:
                share = (until(own[0]) - own[0].step) / group.total
                seconds = None if need.seconds is None else need.seconds * share * len(own) / need.members
                needs.append((need, len(own), seconds))
            groups.append(group)
            left = left[need.members :]
    _say(needs)
    for number, group in enumerate(groups, 1):
        group.place = f", group {number} of {len(groups)}" if len(groups) > 1 else ""
    return groups, [need for need, *_ in needs]


def fitting(
    starts: Sequence[Start],
    programs: Programs,
    params: Tree,
    machine: tuple[Machine | None, int],
    most: int | None = None,
) -> tuple[Group, Need]:
    """Return the group of the first members that fit into memory, and what it needs.

    Args:
      starts: members of equal shapes.
      programs: of the members.
      params: its frozen weights.
      machine: from `machine_here`.
      most: members at a time; None: as many as fit.

    Raises:
      UserError: not even one member fits.
    """
    count = min(len(starts), most or len(starts))
    count = -(-len(starts) // -(-len(starts) // count))  # in parts of about the same size
    while True:
        group = Group(starts[:count], programs)
        need = measure(group, params, machine[0])
        if need.total <= machine[1] or not machine[1]:
            return group, need
        if count == 1:
            raise UserError(
                f"a member needs {console.size(need.total)}, and there are {console.size(machine[1])}; `neuroada plan` "
                "says what would fit"
            )
        each = (need.states + need.temporaries) / count
        fit = max(1, min(count - 1, int((machine[1] - need.weights) / each)))
        count = -(-len(starts) // -(-len(starts) // fit))


def measure(group: Group, params: Tree, machine: Machine | None) -> Need:
    """Return what the step of a group needs at its longest batch; compiles it."""
    compiled = group.compiled(params)
    kept = roofline.nbytes(group.stack.state.trainable)
    return Need(
        members=len(group.starts),
        weights=roofline.nbytes(params),
        states=roofline.nbytes(group.stack) + kept,
        temporaries=machines.temporaries(compiled) + _batch_bytes(compiled, group, params),
        seconds=None if machine is None else _seconds(group, params, machine),
    )


def _batch_bytes(compiled: Any, group: Group, params: Tree) -> int:
    """Return the bytes of the batches among the arguments of the step."""
    known = roofline.nbytes(params) + roofline.nbytes(group.stack)
    return max(0, int(compiled.memory_analysis().argument_size_in_bytes) - known)


def _seconds(group: Group, params: Tree, machine: Machine) -> float:
    """Return the least time of all steps and validations, whose cost per token is a third of a step's."""
    traced = group.trace(params)
    leaves = jax.tree.leaves(params)
    frozen = [True] * len(leaves)
    frozen += [False] * (len(traced.jaxpr.in_avals) - len(leaves))
    flops = roofline.work(traced.jaxpr, frozen).flops
    longest = group.longest()[0]
    first, training = group.starts[0].rows, group.config.training
    steps = [first.batches.shape_of(0, index)[0] for index in range(first.batches.steps_per_epoch)]
    share = float(np.mean(steps)) / longest
    assert first.validation is not None
    checked = first.validation.batches
    tokens = sum(checked.shape_of(0, index)[0] for index in range(checked.steps_per_epoch))
    times = math.ceil(group.total / (training.validate_every or first.batches.steps_per_epoch))
    whole = group.total * share + times * tokens / longest / 3
    return flops * whole / machine.flops[jnp.dtype(first.opened.model.config.dtype).name]
