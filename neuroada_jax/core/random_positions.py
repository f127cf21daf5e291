"""Random positions over a matrix, a layer or a model: the published ablations randomLayer, randomBlock and randomGlobal.

The neurons of a map then differ in their number of connections. Arrays (O, k) hold them with a k that is wide enough for
every neuron, the same for every seed; the entries beyond a neuron's own do not train.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from neuroada_jax.core.trees import ModulePath

Place = tuple[ModulePath, tuple[int, ...]]  # of a matrix: the path of its map, and where in its stack it is
_TOO_NARROW = 1e-6  # the probability of a map with a neuron that has more positions than its arrays; these are drawn again


class Matrix(NamedTuple):
    """One matrix (O, I), of one layer and expert, and the number of positions that it adds to those of its scope."""

    outputs: int
    inputs: int
    positions: int


def width(matrices: Sequence[Matrix], inputs: int, neurons: int) -> int:
    """Return the k of arrays for all neurons of a map, at most its inputs.

    Args:
      matrices: of a scope.
      inputs: I of the map, which is one of these or several.
      neurons: O of all its matrices together.
    """
    mean = inputs * sum(each.positions for each in matrices) / sum(each.outputs * each.inputs for each in matrices)
    found = max(1, math.ceil(mean))
    while found < inputs and neurons * _poisson_tail(mean, found) > _TOO_NARROW:
        found += 1
    return min(found, inputs)


def _poisson_tail(mean: float, count: int) -> float:
    """Return a bound of the probability of more than `count` events, from the mean on; a hypergeometric one is lower."""
    first = math.exp((count + 1) * math.log(mean) - mean - math.lgamma(count + 2))
    return first / (1 - mean / (count + 2))


def draw(matrices: Sequence[Matrix], widths: Sequence[int], seed: Sequence[int]) -> list[np.ndarray]:
    """Return positions drawn uniformly from all entries of the matrices of a scope, as columns by neuron.

    Args:
      matrices: of the scope.
      widths: k of the arrays of each.
      seed: of the generator.

    Returns: for each matrix int32 (O, k), a neuron's columns ascending, and I in the places beyond them.
    """
    for attempt in range(1000):
        found = _draw(matrices, widths, np.random.default_rng([*seed, attempt]))
        if found is not None:
            return found
    raise AssertionError(f"no draw fits into arrays of widths {sorted(set(widths))}")


def _draw(matrices: Sequence[Matrix], widths: Sequence[int], generator: np.random.Generator) -> list[np.ndarray] | None:
    """Return the positions; None where a neuron has more than fit."""
    ends = np.cumsum([each.outputs * each.inputs for each in matrices], dtype=np.int64)
    chosen = _distinct(int(ends[-1]), sum(each.positions for each in matrices), generator)
    found = []
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    for (outputs, inputs, _), wide, end, part in zip(matrices, widths, ends, parts, strict=True):
        neurons, columns = np.divmod(part - (end - outputs * inputs), inputs)
        counts = np.bincount(neurons, minlength=outputs)
        if counts.max() > wide:
            return None
        own = np.full((outputs, wide), inputs, np.int32)
        own[neurons, np.arange(len(part)) - np.repeat(np.cumsum(counts) - counts, counts)] = columns
        found.append(own)
    return found


def _distinct(total: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Return `count` of the numbers below `total`, ascending int64, every subset of this size with equal probability."""
    if 2 * count > total:  # those that are left out are fewer
        return np.delete(np.arange(total, dtype=np.int64), _distinct(total, total - count, generator))
    found = np.empty(0, np.int64)
    while len(found) < count:  # positions are alike, so that the union of draws has no favourites
        more = generator.integers(0, total, count - len(found), dtype=np.int64)
        found = np.union1d(found, more)
    return found


@jax.jit
def trained(columns: Int[Array, "*L O k"], drawn: Int[Array | np.ndarray, "*L O k"]) -> Bool[Array, "*L O k"]:
    """Return which of the columns are among those drawn for their neuron."""
    step = lambda found, own: (found | (columns == own[..., None]), None)  # noqa: E731
    return lax.scan(step, jnp.zeros(columns.shape, bool), jnp.moveaxis(jnp.asarray(drawn), -1, 0))[0]


def scopes(over: str, stacks: Mapping[ModulePath, tuple[int, ...]]) -> list[list[Place]]:
    """Return the matrices of each scope.

    Args:
      over: "map" (one matrix), "block" (those of a layer) or "model".
      stacks: the axes *L of each map's kernel, by its path; the first is that of the layers, if there is one.
    """
    found: dict[Hashable, list[Place]] = {}
    for path, stack in stacks.items():
        for place in np.ndindex(*stack):
            key = {"map": (path, place), "block": place[0] if place else path, "model": None}[over]
            found.setdefault(key, []).append((path, place))
    return list(found.values())
