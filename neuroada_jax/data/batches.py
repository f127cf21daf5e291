"""Examples become batches of few shapes: a batch is a pure function of (seed, epoch, index)."""

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float32, Int32, Int64, Num

from neuroada_jax.data.examples import Examples, LabelledExamples
from neuroada_jax.data.packing import default_buckets, pack, shapes
from neuroada_jax.errors import UserError

# With group_by_length, examples are sorted inside windows of this many batches: long enough that a batch's rows are
# about equally long, short enough that an epoch's order stays random.
WINDOW = 50


class Batch(NamedTuple):
    """One step's data, as NumPy arrays. Masks come from lengths and positions: no token id is special.

    A row holds one example or, packed, several end to end.

    input_ids: int32 (B, T), zeros beyond a row's length.
    lengths: int32 (B,), the tokens in a row, 0 for rows that only fill the batch.
    label_positions: int32 (B, M), the position whose hidden state predicts the target (index of the target - 1).
    label_ids: int32 (B, M).
    label_mask: float32 (B, M), 1 for targets, 0 for filling (where position and id are 0).
    positions: int32 (B, T) of a packed batch, None otherwise: each token's position in its own example, 0 beyond a row's
        length. A token sees just as many tokens before it (`models.attention.packed_mask`), so filling sees itself alone.
    """

    input_ids: Int32[np.ndarray, "B T"]
    lengths: Int32[np.ndarray, "B"]
    label_positions: Int32[np.ndarray, "B M"]
    label_ids: Int32[np.ndarray, "B M"]
    label_mask: Float32[np.ndarray, "B M"]
    positions: Int32[np.ndarray, "B T"] | None = None


class ClassificationBatch(NamedTuple):
    """One step's data for an encoder, as NumPy arrays. As in `Batch`, no token id is special.

    input_ids: int32 (B, T), padded on the right with the tokenizer's own padding (RoBERTa counts positions by it).
    lengths: int32 (B,), the tokens in a row, 0 for rows that only fill the batch.
    token_types: int32 (B, T), 0 for the first and 1 for the second text of a pair.
    labels: (B,), int32 classes, or float32 numbers for regression.
    label_mask: float32 (B,), 1 for examples, 0 for filling.
    """

    input_ids: Int32[np.ndarray, "B T"]
    lengths: Int32[np.ndarray, "B"]
    token_types: Int32[np.ndarray, "B T"]
    labels: Num[np.ndarray, "B"]
    label_mask: Float32[np.ndarray, "B"]


Made = TypeVar("Made", Batch, ClassificationBatch)


class AnyBatches(Generic[Made]):
    """All epochs over some examples; any batch can be had in any order, so a run resumes from two numbers.

    Every example is in exactly one batch of an epoch. The last batch is filled with empty rows. Only the order of the
    epoch asked for last is kept in memory.

    Rows are packed once, and an epoch shuffles them whole: it has the same number of steps and the same tight number of
    targets a row as any other. An example keeps its companions; since it does not see them, all that they share is a
    gradient's sum.

    row_count: rows in an epoch: as many as examples, or fewer when packed.
    steps_per_epoch: ceil(row_count / batch_size).
    shapes: the (T, M) that can occur, ascending in T, one M for each T; so at most this many compiled steps.
    own_rows: the rows of a batch that are wanted here, where several processes share it; all of them to begin with.
    """

    def __init__(
        self,
        examples: Any,
        batch_size: int,
        seed: int,
        buckets: Sequence[int] | None = None,
        group_by_length: bool = False,
        shuffle: bool = True,
        packed_length: int | None = None,
    ):
        """buckets: the sequence lengths T to pad to, in any order; None for `default_buckets`.

        group_by_length: put rows of similar length together (less padding), at random with `shuffle`.
        shuffle: False keeps the examples' order (with group_by_length, up to sorting inside windows; packed, that of the
            rows that packing makes).
        packed_length: T of rows that hold several examples each (hardly any padding); None for one example a row.

        Raises UserError: batch_size below 1, seed below 0, buckets not positive or all below the longest row;
        packed_length below the longest example, or together with buckets or group_by_length.
        """
        if batch_size < 1:
            raise UserError(f"batch_size: found {batch_size}, expected at least 1")
        if seed < 0:
            raise UserError(f"seed: found {seed}, expected 0 or more")
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.group_by_length, self.shuffle = group_by_length, shuffle
        self.packed = packed_length is not None
        lengths, targets = examples.lengths, examples.label_counts
        self._rows = np.arange(len(examples))[:, None]  # row -> its examples, -1 where it has fewer than others
        if packed_length is not None:
            if buckets is not None or group_by_length:
                raise UserError("packed_length: packed rows are all of this length, without buckets or group_by_length")
            buckets = [packed_length]
            random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))  # not the one of an epoch
            # Rows of a file often come in blocks by subject: shuffled first, equally long ones of all blocks mix.
            order = random.permutation(len(examples)) if shuffle else np.arange(len(examples))
            rows = pack(lengths[order], packed_length)
            self._rows = np.where(rows >= 0, order[rows], -1)
            lengths, targets = (np.where(rows >= 0, each[self._rows], 0).sum(axis=1) for each in (lengths, targets))
        elif buckets is None:
            buckets = default_buckets(lengths, 1 if group_by_length else batch_size)
        self.row_count = len(self._rows)
        self.steps_per_epoch = -(-self.row_count // batch_size)
        self._lengths = lengths
        self.shapes = shapes(buckets, lengths, targets)
        self._sizes = np.array([size for size, _ in self.shapes])
        self.own_rows = slice(0, batch_size)  # of a batch: the others stay empty, but for their lengths
        # One attribute, so that a prefetching thread never sees the order of another epoch.
        self._cached: tuple[int, np.ndarray] | None = None

    def batch(self, epoch: int, index: int) -> Made:
        """Batch `index` (0 to steps_per_epoch - 1) of `epoch` (0, 1, ...). Raises IndexError outside."""
        chosen = self._chosen(epoch, index)
        bucket = int(np.searchsorted(self._sizes, self._lengths[chosen].max()))
        return self._filled(chosen, *self.shapes[bucket])

    def _filled(self, chosen: Int64[np.ndarray, "b"], time: int, targets: int) -> Made:
        """A batch of these rows."""
        raise NotImplementedError

    def rows(self, epoch: int, index: int) -> Int32[np.ndarray, "b"]:
        """int32 (b,): the numbers of the data rows in that batch, in its order; more than B if packed.

        Raises IndexError outside.
        """
        numbers = self._rows[self._chosen(epoch, index)]
        return self.examples.row_numbers[numbers[numbers >= 0]]

    def _chosen(self, epoch: int, index: int) -> Int64[np.ndarray, "b"]:
        """Numbers of a batch's rows; empty rows are left away."""
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
        """Numbers of rows, int64 (steps_per_epoch, B), -1 for empty ones; all of them in the last batch."""
        count = self.row_count
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


class Batches(AnyBatches[Batch]):
    """Of examples with targets, for a decoder."""

    examples: Examples

    def _filled(self, chosen: Int64[np.ndarray, "b"], time: int, targets: int) -> Batch:
        batch = Batch(
            input_ids=np.zeros((self.batch_size, time), np.int32),
            lengths=np.zeros(self.batch_size, np.int32),
            label_positions=np.zeros((self.batch_size, targets), np.int32),
            label_ids=np.zeros((self.batch_size, targets), np.int32),
            label_mask=np.zeros((self.batch_size, targets), np.float32),
            positions=np.zeros((self.batch_size, time), np.int32) if self.packed else None,
        )
        batch.lengths[: len(chosen)] = self._lengths[chosen]
        for row, numbers in list(enumerate(self._rows[chosen]))[self.own_rows]:
            token = target = 0  # the next free places
            for number in numbers[numbers >= 0].tolist():
                ids, is_label = self.examples.example(number)
                where = is_label.nonzero()[0]
                own, labelled = slice(token, token + len(ids)), slice(target, target + len(where))
                batch.input_ids[row, own] = ids
                batch.label_positions[row, labelled] = token + where - 1
                batch.label_ids[row, labelled] = ids[where]
                if batch.positions is not None:
                    batch.positions[row, own] = np.arange(len(ids))
                token, target = own.stop, labelled.stop
            batch.label_mask[row, :target] = 1
        return batch


class ClassificationBatches(AnyBatches[ClassificationBatch]):
    """Of examples with labels, for an encoder; one a row, and M is 0."""

    examples: LabelledExamples

    def _filled(self, chosen: Int64[np.ndarray, "b"], time: int, targets: int) -> ClassificationBatch:
        rows, labels = self.batch_size, self.examples.labels
        batch = ClassificationBatch(
            input_ids=np.full((rows, time), self.examples.pad_id, np.int32),
            lengths=np.zeros(rows, np.int32),
            token_types=np.zeros((rows, time), np.int32),
            labels=np.zeros(rows, labels.dtype),
            label_mask=np.zeros(rows, np.float32),
        )
        batch.lengths[: len(chosen)] = self._lengths[chosen]
        for row, number in list(enumerate(chosen.tolist()))[self.own_rows]:
            ids, token_types = self.examples.example(number)
            batch.input_ids[row, : len(ids)] = ids
            batch.token_types[row, : len(ids)] = token_types
        batch.labels[: len(chosen)] = labels[chosen]
        batch.label_mask[: len(chosen)] = 1
        return batch
