"""Examples become batches: pure in (seed, epoch, index), complete, and of few shapes."""

import numpy as np
import pytest
from data_helpers import byte_level, message_of
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroada_jax.data.batches import Batches, ClassificationBatches
from neuroada_jax.data.examples import Examples, LabelledExamples, encode


def examples_of(lengths, targets=None) -> Examples:
    """Example i has lengths[i] tokens with the id i + 1, the last targets[i] of them targets, from row 2 * i."""
    lengths = np.asarray(lengths)
    targets = np.minimum(3, lengths - 1) if targets is None else np.asarray(targets)
    is_label = [np.arange(n) >= n - m for n, m in zip(lengths, targets, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
    return Examples(ids, np.concatenate(is_label), np.arange(len(lengths), dtype=np.int32) * 2, offsets, 0, 0)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(2, 70), min_size=1, max_size=300),
    batch_size=st.integers(1, 9),
    group=st.booleans(),
    shuffle=st.booleans(),
    buckets=st.sampled_from([None, [70], [80, 16, 33], [8, 16, 24, 32, 72]]),
)
def test_an_epoch_has_every_example_once_in_few_shapes(lengths, batch_size, group, shuffle, buckets):
    examples = examples_of(lengths)
    batches = Batches(examples, batch_size, 3, buckets, group, shuffle)
    assert batches.steps_per_epoch == -(-len(lengths) // batch_size)
    assert len({time for time, _ in batches.shapes}) == len(batches.shapes)
    seen = []
    for index in range(batches.steps_per_epoch):
        batch, rows = batches.batch(1, index), batches.row_numbers(1, index)
        shape = batch.input_ids.shape[1], batch.label_ids.shape[1]
        assert shape in batches.shapes
        assert batch.positions is None
        assert {len(part) for part in batch[:5]} == {batch_size}
        assert [part.dtype for part in batch[:5]] == [np.int32] * 4 + [np.float32]
        longest = batch.lengths.max()
        assert not any(longest <= time < shape[0] for time, _ in batches.shapes)  # the smallest that holds it
        full = index < batches.steps_per_epoch - 1
        assert len(rows) == (batch_size if full else len(lengths) - index * batch_size)
        assert (batch.lengths > 0).sum() == len(rows)
        assert not batch.lengths[len(rows) :].any()
        for b in range(batch_size):
            n = batch.lengths[b]
            assert not batch.input_ids[b, n:].any()
            real = batch.label_mask[b] == 1
            assert np.array_equal(real, np.arange(shape[1]) < real.sum())
            assert not batch.label_positions[b, ~real].any()
            assert not batch.label_ids[b, ~real].any()
            if n:
                ids, is_label = examples.example(int(rows[b]) // 2)
                assert np.array_equal(batch.input_ids[b, :n], ids)
                assert np.array_equal(batch.label_positions[b, real] + 1, is_label.nonzero()[0])
                assert np.array_equal(batch.label_ids[b, real], ids[is_label])
            else:
                assert not real.any()
        seen.extend(rows)
    assert sorted(seen) == [2 * i for i in range(len(lengths))]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(2, 70), min_size=1, max_size=200),
    batch_size=st.integers(1, 5),
    shuffle=st.booleans(),
    length=st.sampled_from([70, 75, 200]),
)
def test_a_packed_epoch_has_every_example_once(lengths, batch_size, shuffle, length):
    examples = examples_of(lengths, np.random.default_rng(len(lengths)).integers(1, lengths))
    batches = Batches(examples, batch_size, 3, shuffle=shuffle, packed_length=length)
    assert batches.steps_per_epoch == -(-batches.row_count // batch_size)
    ((time, most),) = batches.shapes  # one shape, so one compiled step
    assert time == length
    seen, rows_seen, fullest = [], 0, 0
    for index in range(batches.steps_per_epoch):
        batch, numbers = batches.batch(2, index), batches.row_numbers(2, index) // 2
        assert batch.input_ids.shape == batch.positions.shape == (batch_size, length)
        assert batch.label_ids.shape == (batch_size, most)
        assert batch.positions.dtype == np.int32
        rows_seen += np.count_nonzero(batch.lengths)
        fullest = max(fullest, batch.label_mask.sum(axis=1).max())
        expected = iter(numbers.tolist())
        for b in range(batch_size):
            slot = target = 0
            while slot < batch.lengths[b]:
                number = next(expected)
                ids, is_label = examples.example(number)
                own = slice(slot, slot + len(ids))
                assert np.array_equal(batch.input_ids[b, own], ids)  # whole: examples never share an id here
                assert np.array_equal(batch.positions[b, own], np.arange(len(ids)))
                count = is_label.sum()
                labelled = slice(target, target + count)
                assert np.array_equal(batch.label_positions[b, labelled], slot + is_label.nonzero()[0] - 1)
                assert np.array_equal(batch.label_ids[b, labelled], ids[is_label])
                slot, target = own.stop, labelled.stop
            assert slot == batch.lengths[b] <= length
            assert not batch.input_ids[b, slot:].any()
            assert not batch.positions[b, slot:].any()
            assert np.array_equal(batch.label_mask[b], np.arange(most) < target)
            assert not batch.label_positions[b, target:].any()
            assert not batch.label_ids[b, target:].any()
        assert next(expected, None) is None
        seen.extend(numbers)
    assert sorted(seen) == list(range(len(lengths)))
    assert rows_seen == batches.row_count
    assert most - 8 < fullest <= most


def test_packing_mixes_a_file_that_comes_in_blocks():
    blocks = examples_of([16] * 400)
    kinds = [set((Batches(blocks, 1, 0, packed_length=64).row_numbers(0, i) // 400).tolist()) for i in range(100)]
    assert sum(len(kind) > 1 for kind in kinds) > 50
    unshuffled = Batches(blocks, 1, 0, shuffle=False, packed_length=64)
    assert np.concatenate([unshuffled.row_numbers(7, i) for i in range(100)]).tolist() == list(range(0, 800, 2))


def test_packing_refuses_what_it_cannot_do():
    examples = examples_of([10, 30])
    assert "packed_length: found 29, expected at least the longest example, 30" in message_of(
        Batches, examples, 2, 0, packed_length=29
    )
    for other in ({"buckets": [64]}, {"group_by_length": True}):
        assert message_of(Batches, examples, 2, 0, packed_length=64, **other).startswith("packed_length: ")


@pytest.mark.parametrize("options", [{}, {"group_by_length": True}, {"packed_length": 96}])
def test_batches_are_pure_and_may_be_asked_for_in_any_order(options):
    examples = examples_of(np.random.default_rng(0).integers(2, 90, 203))
    forward = Batches(examples, 8, 5, **options)
    wanted = [(epoch, index) for epoch in range(3) for index in range(forward.steps_per_epoch)]
    first = {key: forward.batch(*key) for key in wanted}
    for key in np.random.default_rng(1).permutation(wanted)[:40]:
        epoch, index = key.tolist()
        again = Batches(examples, 8, 5, **options).batch(epoch, index)
        for a, b, c in zip(first[epoch, index], again, forward.batch(epoch, index), strict=True):
            assert np.array_equal(a, b)  # of None and None too
            assert np.array_equal(a, c)
    orders = [np.concatenate([forward.row_numbers(e, i) for i in range(forward.steps_per_epoch)]) for e in range(2)]
    assert not np.array_equal(*orders)  # epochs differ
    other = Batches(examples, 8, 6, **options)
    assert not np.array_equal(orders[0][:8], other.row_numbers(0, 0))  # seeds differ


def test_order_is_kept_without_shuffling():
    batches = Batches(examples_of([5] * 10), 4, 0, None, shuffle=False)
    for epoch in (0, 3):
        order = np.concatenate([batches.row_numbers(epoch, i) for i in range(3)])
        assert order.tolist() == list(range(0, 20, 2))


def test_grouping_by_length_pads_less():
    examples = examples_of(np.random.default_rng(0).integers(2, 257, 1000))
    buckets = [32, 64, 96, 128, 160, 192, 224, 256]
    padded = {
        group: sum(
            batch.input_ids.size for batch in map(Batches(examples, 8, 0, buckets, group).batch, [0] * 125, range(125))
        )
        for group in (False, True)
    }
    assert padded[True] < 0.7 * padded[False]
    spans = [np.ptp(Batches(examples, 8, 0, buckets, True).batch(0, i).lengths) for i in range(20)]
    assert max(spans) < 40
    # The batches themselves are shuffled.
    longest = [Batches(examples, 8, 0, buckets, True).batch(0, i).lengths.max() for i in range(20)]
    assert longest != sorted(longest)


def test_one_shape_for_each_bucket():
    examples = examples_of([10, 20, 30, 64, 6], [2, 9, 3, 30, 5])
    assert Batches(examples, 2, 0, [128, 4, 16, 32, 64]).shapes == [(16, 8), (32, 16), (64, 32)]
    assert Batches(examples_of([3, 4], [2, 3]), 2, 0, [4, 5]).shapes == [(4, 4)]  # M is no larger than T
    message = message_of(Batches, examples, 2, 0, [16, 32])
    assert "[16, 32]" in message
    assert "64" in message
    assert "buckets" in message_of(Batches, examples, 2, 0, [])
    assert "batch_size: found 0" in message_of(Batches, examples, 0, 0, None)
    assert "seed: found -1" in message_of(Batches, examples, 1, -1, None)
    with pytest.raises(IndexError):
        Batches(examples, 2, 0).batch(0, 3)


def test_masks_come_from_lengths_not_from_the_pad_token():
    tokenizer = byte_level()
    tokenizer.pad_token = "</s>"
    row = {"prompt": "a</s>b", "completion": "c"}
    batch = Batches(encode([row], "verbatim", tokenizer, 100), 2, 0).batch(0, 0)
    eos = tokenizer.eos_token_id
    assert batch.lengths.tolist() == [6, 0]
    assert batch.input_ids[0, :6].tolist().count(eos) == 2
    assert batch.label_ids[0, :2].tolist()[-1] == eos
    assert batch.label_mask.sum() == 2
    assert batch.label_positions[0, :2].tolist() == [3, 4]
    # id 0 is "<s>" here: a real token may also equal the filling
    assert tokenizer.bos_token_id == 0
    assert batch.input_ids[0, 0] == 0


# Batches of labels share the order and the buckets; what is their own is how a batch is filled.


def test_classification_batches_have_every_example_once_and_pad_with_the_tokenizers_own():
    lengths = np.array([3, 9, 14, 4, 5, 6, 21])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.repeat(np.arange(10, 17, dtype=np.int32), lengths)
    labels = np.array([0, 1, 2, 0, 1, 2, 1], np.int32)
    examples = LabelledExamples(ids, (ids % 2).astype(np.int32), labels, offsets, 0, pad_id=1)
    batches = ClassificationBatches(examples, 3, seed=5, buckets=[8, 24], group_by_length=True)
    order = Batches(examples_of(lengths), 3, seed=5, buckets=[8, 24], group_by_length=True)
    assert batches.shapes == [(8, 0), (24, 0)] and batches.steps_per_epoch == 3
    seen = []
    for index in range(3):
        batch, rows = batches.batch(2, index), batches.row_numbers(2, index)
        assert (rows * 2 == order.row_numbers(2, index)).all()
        count = len(rows)
        seen += rows.tolist()
        assert batch.label_mask.tolist() == [1.0] * count + [0.0] * (3 - count)
        assert batch.lengths.tolist() == [*lengths[rows], *[0] * (3 - count)]
        assert batch.labels.tolist() == [*labels[rows], *[0] * (3 - count)]
        for b, row in enumerate(rows):
            n = lengths[row]
            assert (batch.input_ids[b, :n] == 10 + row).all() and (batch.input_ids[b, n:] == 1).all()
            assert (batch.token_types[b, :n] == row % 2).all() and not batch.token_types[b, n:].any()
        assert (batch.input_ids[count:] == 1).all()
    assert sorted(seen) == list(range(7))
