"""Losses of several continuations of one prompt, which is computed once for all of them."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Float64, Int32

from neuroada_jax.core.trees import Tree, on_host
from neuroada_jax.data.batches import Batch
from neuroada_jax.data.examples import Example
from neuroada_jax.generation.generate import bucket
from neuroada_jax.models import Model
from neuroada_jax.models.losses import label_scores


class _Row(NamedTuple):
    """Examples with a common prefix, in one row: the prefix, then the remaining tokens of each example.

    Attributes:
      ids: int32 (t,).
      positions: int32 (t,), the position of each token in its example.
      owner: int32 (t,), the example that a token belongs to; -1 for the common prefix.
      labels: for each example, (slots whose hidden states predict its labels, the labels' ids).
    """

    ids: np.ndarray
    positions: np.ndarray
    owner: np.ndarray
    labels: list[tuple[np.ndarray, np.ndarray]]


def losses(
    model: Model,
    params: Tree,
    groups: Sequence[Sequence[Example]],
    batch_size: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Float64[np.ndarray, "n C"]:
    """Return the summed loss of the labels of every example.

    The common prefix of a group is computed once: an example attends to it and to itself, with the positions that it has
    alone. A sliding window counts slots, which lie further apart in such a row, so a model with windows gets one example a
    row.

    Args:
      model: a decoder.
      params: complete plain parameters.
      groups: n groups of at most C examples with a common prefix; examples are those of `Examples.example`, none longer
        than the model's positions.
      batch_size: rows at a time.
      on_progress: called with (batches done, batches in all).

    Returns:
      float64 (n, C), in nats; infinity where a group has fewer than C examples.
    """
    alone = any(window is not None for window in model.config.windows)
    parts = [[example] for group in groups for example in group] if alone else groups
    rows = [_row(part) for part in parts]
    found: list[list[float]] = [[] for _ in rows]
    order = sorted(range(len(rows)), key=lambda number: len(rows[number].ids))
    most = max(sum(len(slots) for slots, _ in row.labels) for row in rows)
    batches = range(0, len(order), batch_size)
    for done, first in enumerate(batches, start=1):
        chosen = order[first : first + batch_size]
        batch, seen = _batch([rows[number] for number in chosen], batch_size, most)
        scored = on_host(_scored(model.module(), params, batch, seen)).astype(np.float64)
        for row, number in enumerate(chosen):
            ends = np.cumsum([len(slots) for slots, _ in rows[number].labels])
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
    """Join examples at their common prefix."""
    shortest = min(len(ids) for ids, _ in examples)
    together = np.stack([ids[:shortest] for ids, _ in examples])
    differs = np.flatnonzero((together != together[0]).any(axis=0))
    shared = int(differs[0]) if len(differs) else shortest
    ids, positions, owner, labels = [examples[0][0][:shared]], [np.arange(shared)], [np.full(shared, -1)], []
    begin = shared
    for number, (own, is_label) in enumerate(examples):
        where = is_label.nonzero()[0]
        before = where - 1  # the token whose hidden state predicts the label
        labels.append((np.where(before < shared, before, before - shared + begin), own[where]))
        ids.append(own[shared:])
        positions.append(np.arange(shared, len(own)))
        owner.append(np.full(len(own) - shared, number))
        begin += len(own) - shared
    flat, places, owners = (np.concatenate(part).astype(np.int32) for part in (ids, positions, owner))
    return _Row(flat, places, owners, labels)


def _batch(rows: Sequence[_Row], size: int, most: int) -> tuple[Batch, Bool[np.ndarray, "B T T"]]:
    """Return a batch of `size` rows, and which slots each token attends to; every token attends to itself."""
    width = bucket(max(len(row.ids) for row in rows))

    def filled(*shape: int) -> Int32[np.ndarray, "..."]:
        return np.zeros((size, *shape), np.int32)

    ids, positions, owner = filled(width), filled(width), filled(width) - 1
    slots, labels, mask = filled(most), filled(most), np.zeros((size, most), np.float32)
    for number, row in enumerate(rows):
        here = slice(len(row.ids))
        ids[number, here], positions[number, here], owner[number, here] = row.ids, row.positions, row.owner
        every = [np.concatenate(part) for part in zip(*row.labels, strict=True)]
        slots[number, : len(every[0])], labels[number, : len(every[0])] = every
        mask[number, : len(every[0])] = 1
    lengths = np.array([len(row.ids) for row in rows] + [0] * (size - len(rows)), np.int32)
    order = np.arange(width)
    seen = (order[None, :] <= order[:, None]) & ((owner[:, None, :] == -1) | (owner[:, None, :] == owner[:, :, None]))
    return Batch(ids, lengths, slots, labels, mask, positions), seen
