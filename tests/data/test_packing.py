"""Packing is best fit decreasing, and default buckets pad least."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroada_jax.data.packing import default_buckets, pack


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), room=st.integers(0, 60))
def test_packing_is_best_fit_decreasing(lengths, room):
    capacity = max(lengths) + room
    rows: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        free = [(capacity - sum(lengths[i] for i in row), at) for at, row in enumerate(rows)]
        fits = [(space, at) for space, at in free if space >= lengths[number]]
        if fits:
            rows[min(fits)[1]].append(number)
        else:
            rows.append([number])
    packed = pack(np.array(lengths), capacity)
    assert [[i for i in row if i >= 0] for row in packed.tolist()] == rows
    assert packed.shape[1] == max(map(len, rows))


def test_packing_fills_nearly_all_slots():
    lengths = np.random.default_rng(0).integers(20, 200, 2000)
    rows = pack(lengths, 512)
    assert lengths.sum() / (len(rows) * 512) > 0.98


def test_default_buckets():
    lengths = np.arange(1, 601)
    assert default_buckets(lengths) == [96, 192, 296, 392, 496, 600]
    assert default_buckets(np.full(9, 17)) == [24]
    few = default_buckets(lengths, 16)  # random batches of 16 are nearly always long
    assert few[-1] == 600
    assert few[0] > 400
    spread = default_buckets(np.random.default_rng(0).integers(1, 100_000, 5000))  # more sizes than candidates
    assert len(spread) == 6
    assert spread[-1] >= 99_900


@settings(max_examples=50)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=30), draws=st.integers(1, 4))
def test_default_buckets_pad_least(lengths, draws):
    lengths = np.array(lengths)

    def expected(buckets):
        within = [0.0, *((lengths <= size).mean() ** draws for size in buckets)]
        return sum(size * (b - a) for size, a, b in zip(buckets, within, within[1:], strict=False))

    *shorter, longest = sorted({-(-int(length) // 8) * 8 for length in lengths})
    choices = itertools.combinations(shorter, min(5, len(shorter)))
    found = default_buckets(lengths, draws)
    assert found == sorted(set(found))
    assert expected(found) == pytest.approx(min(expected((*some, longest)) for some in choices))
