"""Texts with labels become examples for an encoder: token ids, token types, and the label of the whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, Num

from neuroada_jax.errors import UserError

# Rows handed to the tokenizer at once, as in data.py.
CHUNK = 1000

Texts = tuple[str, ...]  # one text, or a pair


@dataclass(frozen=True)
class LabelledExamples:
    """n tokenised examples end to end, N tokens in all; example i is row i.

    token_ids, token_types: int32 (N,).
    labels: (n,), int32 classes, or float32 numbers for regression.
    offsets: int64 (n + 1,); example i is tokens offsets[i] to offsets[i + 1].
    cut: how many examples lost tokens to max_length.
    pad_id: what fills a batch's rows, the tokenizer's own.
    """

    token_ids: Int32[np.ndarray, "N"]
    token_types: Int32[np.ndarray, "N"]
    labels: Num[np.ndarray, "n"]
    offsets: Int64[np.ndarray, "n+1"]
    cut: int
    pad_id: int
    left_out: int = 0  # a label needs no tokens, so that every row is an example

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def row_numbers(self) -> Int32[np.ndarray, "n"]:
        """int32 (n,): the row of each example."""
        return np.arange(len(self), dtype=np.int32)

    @property
    def lengths(self) -> Int32[np.ndarray, "n"]:
        """int32 (n,): tokens per example."""
        return np.diff(self.offsets).astype(np.int32)

    @property
    def target_counts(self) -> Int32[np.ndarray, "n"]:
        """int32 (n,): 0, since no token is a target."""
        return np.zeros(len(self), np.int32)

    def example(self, index: int) -> tuple[Int32[np.ndarray, "_"], Int32[np.ndarray, "_"]]:
        """Example `index` as (input_ids int32 (t,), token_types int32 (t,))."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.token_ids[part], self.token_types[part]


def encode_labelled(
    texts: Sequence[Texts],
    labels: Num[np.ndarray, "n"],
    tokenizer: Any,
    max_length: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> LabelledExamples:
    """Tokenises every text or pair as the tokenizer joins them, with its special tokens and token types.

    An example longer than max_length is cut to it, tokens of the longer text of a pair first.

    Raises:
      UserError: a tokenizer without a padding token, or max_length too short for the special tokens.
    """
    if tokenizer.pad_token_id is None:
        raise UserError(f"tokenizer: {type(tokenizer).__name__} has no padding token, expected one to fill batches with")
    shortest = tokenizer.num_special_tokens_to_add(pair=len(texts[0]) > 1) + len(texts[0])
    if max_length < shortest:
        raise UserError(f"max_length: found {max_length}, expected at least {shortest} (special tokens, and one of a text)")
    # As transformers' own calls do: a model without a second segment (RoBERTa) is given none.
    has_types = "token_type_ids" in tokenizer.model_input_names
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    cut = 0
    for first in range(0, len(texts), CHUNK):
        chunk = texts[first : first + CHUNK]
        whole = _tokenise(tokenizer, chunk, None)
        long = [i for i, row in enumerate(whole["input_ids"]) if len(row) > max_length]
        if long:
            shortened = _tokenise(tokenizer, [chunk[i] for i in long], max_length)
            for field, columns in whole.items():
                for i, row in zip(long, shortened[field], strict=True):
                    columns[i] = row
        cut += len(long)
        ids += [np.array(row, np.int32) for row in whole["input_ids"]]
        types += [np.array(row, np.int32) * has_types for row in whole["token_type_ids"]]
        if on_progress is not None:
            on_progress(first + len(chunk), len(texts))
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    return LabelledExamples(np.concatenate(ids), np.concatenate(types), labels, offsets, cut, tokenizer.pad_token_id)


def _tokenise(tokenizer: Any, texts: Sequence[Texts], max_length: int | None) -> dict[str, list[list[int]]]:
    coded = tokenizer(
        *(list(column) for column in zip(*texts, strict=True)),
        truncation="longest_first" if max_length else False,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=True,
        verbose=False,
    )
    return {field: list(coded[field]) for field in ("input_ids", "token_type_ids")}
