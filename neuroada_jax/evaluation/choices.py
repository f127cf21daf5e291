"""Scoring fixed answers: the losses of a few continuations of one prompt, which is read once for all of them."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Float64, Int32

from neuroada_jax.core.trees import Tree
from neuroada_jax.data.batches import Batch
from neuroada_jax.data.examples import Example
from neuroada_jax.generation.generate import bucket
from neuroada_jax.models import Model
from neuroada_jax.models.losses import label_scores


class _Row(NamedTuple):
    """Examples that share their first tokens, in one row: these tokens, then what each has of its own.

    ids: int32 (t,).
    positions: int32 (t,), of each token in its example.
    owner: int32 (t,), which example a token is of, -1 for those that all share.
    targets: for each example, (slots whose hidden states predict its targets, the targets).
    """

    ids: np.ndarray
    positions: np.ndarray
    owner: np.ndarray
    targets: list[tuple[np.ndarray, np.ndarray]]


def losses(
    model: Model,
    params: Tree,
    groups: Sequence[Sequence[Example]],
    batch_size: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Float64[np.ndarray, "n C"]:
    """The summed loss of the targets of every example; at most C in each of n groups, which begin alike, then infinities.

    What the examples of a group share is computed once: an example sees it and itself, and counts its positions as if it
    were alone. Sliding windows are told by slots, which then lie further apart: such a model reads every example alone.

    Args:
      model: a decoder.
      params: of the whole model.
      groups: examples as of `data.Examples.example`, none longer than the model's positions.
      batch_size: rows at a time.
      on_progress: called with (batches done, batches in all).
    """
    alone = any(window is not None for window in model.config.windows)
    parts = [[example] for group in groups for example in group] if alone else groups
    rows = [_row(part) for part in parts]
    found: list[list[float]] = [[] for _ in rows]
    order = sorted(range(len(rows)), key=lambda number: len(rows[number].ids))
    most = max(sum(len(slots) for slots, _ in row.targets) for row in rows)
    batches = range(0, len(order), batch_size)
    for done, first in enumerate(batches, start=1):
        chosen = order[first : first + batch_size]
        batch, seen = _batch([rows[number] for number in chosen], batch_size, most)
        scored = np.asarray(_scored(model.module(), params, batch, seen), np.float64)
        for row, number in enumerate(chosen):
            ends = np.cumsum([len(slots) for slots, _ in rows[number].targets])
            found[number] = [part.sum() for part in np.split(scored[row, : ends[-1]], ends[:-1])]
        if on_progress:
            on_progress(done, len(batches))
    each = iter(itertools.chain.from_iterable(found))
    filled = np.full((len(groups), max(map(len, groups))), np.inf)
    for line, group in zip(filled, groups, strict=True):
        line[: len(group)] = list(itertools.islice(each, len(group)))
    return filled


@functools.partial(jax.jit, static_argnames="module")
def _scored(module: nn.Module, params: Tree, batch: Batch, seen: Array) -> Float[Array, "B M"]:
    return label_scores(module, {"params": params}, batch, seen)[0]


def _row(examples: Sequence[Example]) -> _Row:
    shortest = min(len(ids) for ids, _ in examples)
    together = np.stack([ids[:shortest] for ids, _ in examples])
    differs = np.flatnonzero((together != together[0]).any(axis=0))
    shared = int(differs[0]) if len(differs) else shortest
    ids, positions, owner, targets = [examples[0][0][:shared]], [np.arange(shared)], [np.full(shared, -1)], []
    begin = shared
    for number, (own, is_label) in enumerate(examples):
        where = is_label.nonzero()[0]
        before = where - 1  # the token whose hidden state predicts the target
        targets.append((np.where(before < shared, before, before - shared + begin), own[where]))
        ids.append(own[shared:])
        positions.append(np.arange(shared, len(own)))
        owner.append(np.full(len(own) - shared, number))
        begin += len(own) - shared
    flat, places, owners = (np.concatenate(part).astype(np.int32) for part in (ids, positions, owner))
    return _Row(flat, places, owners, targets)


def _batch(rows: Sequence[_Row], size: int, most: int) -> tuple[Batch, Bool[np.ndarray, "B T T"]]:
    """The rows padded to `size` of them, and which slots each of their tokens sees: every one sees itself."""
    width = bucket(max(len(row.ids) for row in rows))

    def filled(*shape: int) -> Int32[np.ndarray, "..."]:
        return np.zeros((size, *shape), np.int32)

    ids, positions, owner = filled(width), filled(width), filled(width) - 1
    slots, targets, mask = filled(most), filled(most), np.zeros((size, most), np.float32)
    for number, row in enumerate(rows):
        here = slice(len(row.ids))
        ids[number, here], positions[number, here], owner[number, here] = row.ids, row.positions, row.owner
        every = [np.concatenate(part) for part in zip(*row.targets, strict=True)]
        slots[number, : len(every[0])], targets[number, : len(every[0])] = every
        mask[number, : len(every[0])] = 1
    lengths = np.array([len(row.ids) for row in rows] + [0] * (size - len(rows)), np.int32)
    order = np.arange(width)
    seen = (order[None, :] <= order[:, None]) & ((owner[:, None, :] == -1) | (owner[:, None, :] == owner[:, :, None]))
    return Batch(ids, lengths, slots, targets, mask, positions), seen
