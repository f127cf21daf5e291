"""Texts with labels as an encoder reads them: as the tokenizer joins them, truncated and counted."""

import numpy as np
import pytest
from data_helpers import BYTES, message_of, sentence_pairs

from neuroada_jax.data.examples import encode_labelled

TEXTS = [("ab", "cde"), ("a" * 20, "b" * 9), ("x", "y")]
LABELS = np.array([1, 0, 1], np.int32)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("max_length", [100, 12])
def test_the_same_ids_as_the_tokenizer_itself(kind, max_length):
    tokenizer = sentence_pairs(kind)
    examples = encode_labelled(TEXTS, LABELS, tokenizer, max_length)
    assert len(examples) == 3 and examples.pad_id == tokenizer.pad_token_id == 1
    for number, (first, second) in enumerate(TEXTS):
        want = tokenizer(first, second, truncation="longest_first", max_length=max_length)
        ids, token_types = examples.example(number)
        assert ids.tolist() == want["input_ids"]
        assert token_types.tolist() == want.get("token_type_ids", [0] * len(ids))
    assert examples.truncated == (max_length == 12)
    assert examples.lengths.max() == (12 if max_length == 12 else 29 + (3 if kind == "bert" else 4))
    assert bool(examples.token_types.any()) is (kind == "bert")
    np.testing.assert_array_equal(examples.labels, LABELS)


def test_single_texts_and_progress():
    tokenizer, seen = sentence_pairs(), []
    examples = encode_labelled([("ab",), ("c",)], LABELS[:2], tokenizer, 10, lambda *done: seen.append(done))
    assert [examples.example(i)[0].tolist() for i in (0, 1)] == [tokenizer("ab")["input_ids"], tokenizer("c")["input_ids"]]
    assert seen == [(2, 2)] and not examples.token_types.any()


def test_a_tokenizer_without_padding_and_too_short_rows():
    message = message_of(encode_labelled, TEXTS, LABELS, BYTES, 10)
    assert "has no padding token, expected one to pad batches with" in message
    assert message_of(encode_labelled, TEXTS, LABELS, sentence_pairs(), 4).startswith(
        "max_length: found 4, expected at least 5"
    )
