"""Batches of examples in few shapes; a batch is a pure function of (seed, epoch, index)."""

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float32, Int32, Int64, Num

from neuroada_jax.data.examples import Examples, LabelledExamples
from neuroada_jax.data.packing import default_buckets, pack, shapes
from neuroada_jax.errors import UserError

# With group_by_length, examples are sorted within windows of this many batches: large enough that the rows of a batch have
# similar lengths, small enough that an epoch's order stays random.
WINDOW = 50


class Batch(NamedTuple):
    """The data of one step for a decoder, as NumPy arrays.

    A row of these arrays holds one example or, packed, several concatenated ones. Masks are derived from lengths and
    positions: no token id has a special meaning.

    Attributes:
      input_ids: int32 (B, T), zeros beyond a row's length.
      lengths: int32 (B,), tokens in each row; 0 for empty rows that pad the batch.
      label_positions: int32 (B, M), the position whose hidden state predicts the label (the label's position - 1).
      label_ids: int32 (B, M), the tokens to predict.
      label_mask: float32 (B, M), 1 for labels, 0 for padding (where position and id are 0).
      positions: int32 (B, T) of a packed batch, else None: each token's position in its own example, 0 beyond a row's
        length. A token attends to itself and to that many tokens before it (`models.attention.packed_mask`), so padding
        attends to itself alone.
    """

    input_ids: Int32[np.ndarray, "B T"]
    lengths: Int32[np.ndarray, "B"]
    label_positions: Int32[np.ndarray, "B M"]
    label_ids: Int32[np.ndarray, "B M"]
    label_mask: Float32[np.ndarray, "B M"]
    positions: Int32[np.ndarray, "B T"] | None = None


class ClassificationBatch(NamedTuple):
    """The data of one step for an encoder, as NumPy arrays.

    Attributes:
      input_ids: int32 (B, T), padded on the right with the tokenizer's padding token (RoBERTa counts positions by it).
      lengths: int32 (B,), tokens in each row; 0 for empty rows that pad the batch.
      token_types: int32 (B, T), 0 for the first and 1 for the second text of a pair.
      labels: int32 (B,) classes, float32 (B,) numbers for regression, or float32 (B, C) of 0 and 1 where an example may
        have several of C labels.
      label_mask: float32 (B,), the weight of each example, which is 1 without class weights; 0 for padding.
    """

    input_ids: Int32[np.ndarray, "B T"]
    lengths: Int32[np.ndarray, "B"]
    token_types: Int32[np.ndarray, "B T"]
    labels: Num[np.ndarray, "B *C"]
    label_mask: Float32[np.ndarray, "B"]


BatchType = TypeVar("BatchType", Batch, ClassificationBatch)


class AnyBatches(Generic[BatchType]):
    """The batches of every epoch over some examples, with random access, so that a run resumes from (epoch, index) alone.

    Every example is in exactly one batch of an epoch. The last batch is padded with empty rows. Only the order of the most
    recently used epoch is kept in memory.

    Examples are packed into rows once, and an epoch shuffles these rows: every epoch has the same number of steps and the
    same small M. Examples that share a row do so in every epoch; since they do not attend to each other, this affects only
    which gradients are summed in one step.

    Attributes:
      row_count: rows in an epoch: the number of examples, or fewer when packed.
      steps_per_epoch: ceil(row_count / batch_size).
      shapes: the (T, M) that can occur, ascending in T, with one M for each T; an upper bound on compiled steps.
      own_rows: the rows of a batch that this process needs, where several processes share a batch; initially all.
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
        """Compute the rows and shapes; batches are filled on demand.

        Args:
          examples: `Examples` or `LabelledExamples`.
          batch_size: rows in a batch, B.
          seed: of the shuffling.
          buckets: the sequence lengths T to pad to, in any order; None for `default_buckets`.
          group_by_length: put rows of similar length into one batch (less padding); with `shuffle`, in random order.
          shuffle: False keeps the order of the examples (with group_by_length, up to sorting within windows; packed, the
            order of the packed rows).
          packed_length: T of rows that hold several examples each (almost no padding); None for one example a row.

        Raises:
          UserError: batch_size below 1; seed below 0; buckets not positive, or all below the longest row; packed_length
            below the longest example, or together with buckets or group_by_length.
        """
        if batch_size < 1:
            raise UserError(f"batch_size: found {batch_size}, expected at least 1")
        if seed < 0:
            raise UserError(f"seed: found {seed}, expected 0 or more")
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.group_by_length, self.shuffle = group_by_length, shuffle
        self.packed = packed_length is not None
        lengths, counts = examples.lengths, examples.label_counts
        self._rows = np.arange(len(examples))[:, None]  # row -> its examples, padded with -1
        if packed_length is not None:
            if buckets is not None or group_by_length:
                raise UserError("packed_length: packed rows are all of this length, without buckets or group_by_length")
            buckets = [packed_length]
            random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))  # independent of every epoch's
            # Files often come in blocks by subject. Shuffling first lets examples of equal length from all blocks mix.
            order = random.permutation(len(examples)) if shuffle else np.arange(len(examples))
            rows = pack(lengths[order], packed_length)
            self._rows = np.where(rows >= 0, order[rows], -1)
            lengths, counts = (np.where(rows >= 0, each[self._rows], 0).sum(axis=1) for each in (lengths, counts))
        elif buckets is None:
            buckets = default_buckets(lengths, 1 if group_by_length else batch_size)
        self.row_count = len(self._rows)
        self.steps_per_epoch = -(-self.row_count // batch_size)
        self._lengths = lengths
        self.shapes = shapes(buckets, lengths, counts)
        self._sizes = np.array([size for size, _ in self.shapes])
        self.own_rows = slice(0, batch_size)  # the other rows of a batch stay empty, except for their lengths
        # One attribute for both, so that a prefetching thread never combines an epoch with the order of another.
        self._cached: tuple[int, np.ndarray] | None = None

    def batch(self, epoch: int, index: int, shape: tuple[int, int] | None = None) -> BatchType:
        """Return batch `index` (0 to steps_per_epoch - 1) of `epoch` (0, 1, ...).

        Args:
          epoch: from 0.
          index: in the epoch, from 0.
          shape: (T, M) to pad to, at least that of the batch; None: that of the batch.

        Raises:
          IndexError: there is no such batch.
        """
        return self._filled(self._chosen(epoch, index), *(shape or self.shape_of(epoch, index)))

    def shape_of(self, epoch: int, index: int) -> tuple[int, int]:
        """Return the (T, M) of a batch: the first of `shapes` that holds its longest row.

        Raises:
          IndexError: there is no such batch.
        """
        return self.shapes[int(np.searchsorted(self._sizes, self._lengths[self._chosen(epoch, index)].max()))]

    def _filled(self, chosen: Int64[np.ndarray, "b"], length: int, labels: int) -> BatchType:
        """Return a batch of these rows with T = `length` and M = `labels`."""
        raise NotImplementedError

    def row_numbers(self, epoch: int, index: int) -> Int32[np.ndarray, "b"]:
        """Return the data row number of every example in a batch, int32 (b,), in its order; b may exceed B if packed.

        Raises:
          IndexError: there is no such batch.
        """
        numbers = self._rows[self._chosen(epoch, index)]
        return self.examples.row_numbers[numbers[numbers >= 0]]

    def _chosen(self, epoch: int, index: int) -> Int64[np.ndarray, "b"]:
        """Return the numbers of a batch's rows, without empty rows."""
        if epoch < 0 or not 0 <= index < self.steps_per_epoch:
            raise IndexError(f"batch {index} of epoch {epoch}: an epoch has batches 0 to {self.steps_per_epoch - 1}")
        epoch = epoch if self.shuffle else 0  # without shuffling all epochs are the same
        cached = self._cached
        if cached is None or cached[0] != epoch:
            self._cached = cached = (epoch, self._epoch_order(epoch))
        chosen = cached[1][index]
        return chosen[chosen >= 0]

    def _epoch_order(self, epoch: int) -> Int64[np.ndarray, "steps B"]:
        """Return the numbers of each batch's rows, int64 (steps_per_epoch, B); -1 for empty rows at the end of the last."""
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
            complete = count // self.batch_size
            batches[:complete] = batches[random.permutation(complete)]
        return batches


class Batches(AnyBatches[Batch]):
    """Batches of examples with labelled tokens, for a decoder."""

    examples: Examples

    def _filled(self, chosen: Int64[np.ndarray, "b"], length: int, labels: int) -> Batch:
        batch = Batch(
            input_ids=np.zeros((self.batch_size, length), np.int32),
            lengths=np.zeros(self.batch_size, np.int32),
            label_positions=np.zeros((self.batch_size, labels), np.int32),
            label_ids=np.zeros((self.batch_size, labels), np.int32),
            label_mask=np.zeros((self.batch_size, labels), np.float32),
            positions=np.zeros((self.batch_size, length), np.int32) if self.packed else None,
        )
        batch.lengths[: len(chosen)] = self._lengths[chosen]
        for row, numbers in list(enumerate(self._rows[chosen]))[self.own_rows]:
            token = label = 0  # next free places
            for number in numbers[numbers >= 0].tolist():
                ids, is_label = self.examples.example(number)
                where = is_label.nonzero()[0]
                own, labelled = slice(token, token + len(ids)), slice(label, label + len(where))
                batch.input_ids[row, own] = ids
                batch.label_positions[row, labelled] = token + where - 1
                batch.label_ids[row, labelled] = ids[where]
                if batch.positions is not None:
                    batch.positions[row, own] = np.arange(len(ids))
                token, label = own.stop, labelled.stop
            batch.label_mask[row, :label] = 1
        return batch


class ClassificationBatches(AnyBatches[ClassificationBatch]):
    """Batches of examples with one label each, for an encoder; a row is one example, and M is 0: no token is a label."""

    examples: LabelledExamples

    def _filled(self, chosen: Int64[np.ndarray, "b"], length: int, labels: int) -> ClassificationBatch:
        rows, examples = self.batch_size, self.examples
        batch = ClassificationBatch(
            input_ids=np.full((rows, length), examples.pad_id, np.int32),
            lengths=np.zeros(rows, np.int32),
            token_types=np.zeros((rows, length), np.int32),
            labels=np.zeros((rows, *examples.labels.shape[1:]), examples.labels.dtype),
            label_mask=np.zeros(rows, np.float32),
        )
        batch.lengths[: len(chosen)] = self._lengths[chosen]
        for row, number in list(enumerate(chosen.tolist()))[self.own_rows]:
            ids, token_types = examples.example(number)
            batch.input_ids[row, : len(ids)] = ids
            batch.token_types[row, : len(ids)] = token_types
        batch.labels[: len(chosen)] = examples.labels[chosen]
        batch.label_mask[: len(chosen)] = 1 if examples.weights is None else examples.weights[chosen]
        return batch
