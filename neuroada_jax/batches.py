"""Examples become batches of few shapes: a batch is a pure function of (seed, epoch, index)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64, Integer

from neuroada_jax.data import Examples
from neuroada_jax.errors import UserError

# With group_by_length, examples are sorted inside windows of this many batches: long enough that a batch's rows are
# about equally long, short enough that an epoch's order stays random.
WINDOW = 50
# How many sizes default_buckets gives, at most.
BUCKETS = 6
# Sizes that default_buckets chooses among.
CANDIDATES = 512


class Batch(NamedTuple):
    """One step's data, as NumPy arrays. Masks come from lengths: no token id is special.

    input_ids: int32 (B, T), zeros beyond a row's length.
    lengths: int32 (B,), 0 for rows that only fill the batch.
    target_positions: int32 (B, M), the position whose hidden state predicts the target (index of the target - 1).
    target_ids: int32 (B, M).
    target_mask: float32 (B, M), 1 for targets, 0 for filling (where position and id are 0).
    """

    input_ids: Int32[np.ndarray, "B T"]
    lengths: Int32[np.ndarray, "B"]
    target_positions: Int32[np.ndarray, "B M"]
    target_ids: Int32[np.ndarray, "B M"]
    target_mask: Float32[np.ndarray, "B M"]


class Batches:
    """All epochs over some examples; any batch can be had in any order, so a run resumes from two numbers.

    Every example is in exactly one batch of an epoch. The last batch is filled with empty rows. Only the order of the
    epoch asked for last is kept in memory.

    steps_per_epoch: ceil(n / batch_size).
    shapes: the (T, M) that can occur, ascending in T, one M for each T; so at most this many compiled steps.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        seed: int,
        buckets: Sequence[int] | None = None,
        group_by_length: bool = False,
        shuffle: bool = True,
    ):
        """buckets: the sequence lengths T to pad to, in any order; None for `default_buckets`.

        group_by_length: put rows of similar length together (less padding), at random with `shuffle`.
        shuffle: False keeps the examples' order (with group_by_length, up to sorting inside windows).

        Raises UserError: batch_size below 1, seed below 0, buckets not positive or all below the longest row.
        """
        if batch_size < 1:
            raise UserError(f"batch_size: found {batch_size}, expected at least 1")
        if seed < 0:
            raise UserError(f"seed: found {seed}, expected 0 or more")
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.group_by_length, self.shuffle = group_by_length, shuffle
        self.steps_per_epoch = -(-len(examples) // batch_size)
        self._lengths = examples.lengths
        if buckets is None:
            buckets = default_buckets(self._lengths, 1 if group_by_length else batch_size)
        self.shapes = _shapes(buckets, self._lengths, examples.target_counts)
        self._sizes = np.array([size for size, _ in self.shapes])
        # One attribute, so that a prefetching thread never sees the order of another epoch.
        self._cached: tuple[int, np.ndarray] | None = None

    def batch(self, epoch: int, index: int) -> Batch:
        """Batch `index` (0 to steps_per_epoch - 1) of `epoch` (0, 1, ...). Raises IndexError outside."""
        chosen = self._chosen(epoch, index)
        bucket = int(np.searchsorted(self._sizes, self._lengths[chosen].max()))
        time, targets = self.shapes[bucket]
        batch = Batch(
            input_ids=np.zeros((self.batch_size, time), np.int32),
            lengths=np.zeros(self.batch_size, np.int32),
            target_positions=np.zeros((self.batch_size, targets), np.int32),
            target_ids=np.zeros((self.batch_size, targets), np.int32),
            target_mask=np.zeros((self.batch_size, targets), np.float32),
        )
        for row, number in enumerate(chosen.tolist()):
            ids, is_target = self.examples.example(number)
            where = is_target.nonzero()[0]
            batch.input_ids[row, : len(ids)] = ids
            batch.lengths[row] = len(ids)
            batch.target_positions[row, : len(where)] = where - 1
            batch.target_ids[row, : len(where)] = ids[where]
            batch.target_mask[row, : len(where)] = 1
        return batch

    def rows(self, epoch: int, index: int) -> Int32[np.ndarray, "b"]:
        """int32 (at most B,): the numbers of the data rows in that batch, in its order. Raises IndexError outside."""
        return self.examples.row_numbers[self._chosen(epoch, index)]

    def _chosen(self, epoch: int, index: int) -> Int64[np.ndarray, "b"]:
        """Example numbers of a batch; empty rows are left away."""
        if epoch < 0 or not 0 <= index < self.steps_per_epoch:
            raise IndexError(f"batch {index} of epoch {epoch}: an epoch has batches 0 to {self.steps_per_epoch - 1}")
        # Without shuffling every epoch is the same one.
        epoch = epoch if self.shuffle else 0
        cached = self._cached
        if cached is None or cached[0] != epoch:
            self._cached = cached = (epoch, self._epoch_order(epoch))
        chosen = cached[1][index]
        return chosen[chosen >= 0]

    def _epoch_order(self, epoch: int) -> Int64[np.ndarray, "steps B"]:
        """Example numbers, int64 (steps_per_epoch, B), -1 for empty rows; all of them in the last batch."""
        count = len(self.examples)
        random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
        order = random.permutation(count) if self.shuffle else np.arange(count)
        if self.group_by_length:
            window = WINDOW * self.batch_size
            for first in range(0, count, window):
                part = order[first : first + window]
                order[first : first + window] = part[np.argsort(self._lengths[part], kind="stable")]
        filled = np.full(self.steps_per_epoch * self.batch_size, -1, np.int64)
        filled[:count] = order
        batches = filled.reshape(-1, self.batch_size)
        if self.group_by_length and self.shuffle:
            whole = count // self.batch_size
            batches[:whole] = batches[random.permutation(whole)]
        return batches


def default_buckets(lengths: Integer[np.ndarray, "n"], draws: int = 1) -> list[int]:
    """At most 6 ascending multiples of 8, the last of which holds the longest row, that pad least.

    A batch is padded to the bucket of its longest row. The longest of `draws` random rows is within T with probability
    (share of lengths within T)^draws, so draws = the batch size (1 when batches are grouped by length, since then a
    row stands for its batch). Of all choices, this one has the smallest expected T, found by dynamic programming.
    (Plain quantiles of the lengths leave one bucket for the whole of a long tail and so pad a great deal more.)
    """
    sizes, counts = np.unique(-(-lengths // 8) * 8, return_counts=True)
    if len(sizes) > CANDIDATES:  # every so many, and the last: the search is quadratic
        chosen = np.linspace(0, len(sizes) - 1, CANDIDATES).round().astype(int)
        within = np.cumsum(counts)[chosen]
        sizes = sizes[chosen]
    else:
        within = np.cumsum(counts)
    share = np.concatenate([[0.0], (within / within[-1]) ** draws])
    # cost[i, j]: batches longer than size i - 1 and within size j, padded to size j.
    cost = sizes * (share[None, 1:] - share[:-1, None])
    cost[np.tril_indices(len(sizes), -1)] = np.inf
    total, steps = cost[0], []
    for _ in range(min(BUCKETS, len(sizes)) - 1):
        # One bucket more: up to size i - 1 as before, then one bucket from there to size j.
        options = np.concatenate([[np.inf], total[:-1]])[:, None] + cost
        steps.append(options.argmin(0))
        total = options.min(0)
    last = len(sizes) - 1
    result = [int(sizes[last])]
    for step in reversed(steps):
        last = int(step[last]) - 1
        result.append(int(sizes[last]))
    return result[::-1]


def _shapes(
    buckets: Sequence[int], lengths: Int32[np.ndarray, "n"], target_counts: Int32[np.ndarray, "n"]
) -> list[tuple[int, int]]:
    """(T, M) for every bucket that some example needs; M covers every example that fits into T."""
    sizes, longest = sorted(set(buckets)), int(lengths.max())
    if not sizes or sizes[0] < 1 or sizes[-1] < longest:
        raise UserError(f"buckets: found {sizes}, expected positive lengths up to at least the longest row, {longest}")
    shapes, below = [], 0
    for size in sizes:
        fits = lengths <= size
        if (fits & (lengths > below)).any():
            shapes.append((size, min(_round_up(int(target_counts[fits].max())), size)))
        below = size
    return shapes


def _round_up(size: int) -> int:
    return -(-size // 8) * 8
