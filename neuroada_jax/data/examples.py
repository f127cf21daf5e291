"""From rows to examples: token ids with either some of the tokens as labels, or one label for each example."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, Num

from neuroada_jax.data.prompts import PromptStyle, Rendered, is_templated, render_example, render_prompt
from neuroada_jax.data.rows import Rows, rows_from_list
from neuroada_jax.errors import UserError

# Rows tokenised in one call: enough to keep the tokenizer's threads busy, few enough that a progress bar moves.
CHUNK = 1000

Example = tuple[Int32[np.ndarray, "_"], Bool[np.ndarray, "_"]]  # input_ids, is_label
Coded = tuple[Int32[np.ndarray, "_"], Int32[np.ndarray, "_"], Int32[np.ndarray, "_"]]  # ids, starts, ends
Texts = tuple[str, ...]  # one text, or a pair


@dataclass(frozen=True)
class Examples:
    """n tokenised examples, concatenated; N tokens in total.

    Attributes:
      token_ids: int32 (N,).
      is_label: bool (N,), whether the model learns to predict the token; False for the first token of an example, which
        has no predecessor to predict it from, and for BOS.
      row_numbers: int32 (n,), the row that each example came from, ascending.
      offsets: int64 (n + 1,); example i is tokens offsets[i] to offsets[i + 1].
      truncated: number of examples that were truncated on the right to max_length and kept a label.
      dropped: number of rows of which no label is within max_length; they are not among the examples, nor in `truncated`.
    """

    token_ids: Int32[np.ndarray, "N"]
    is_label: Bool[np.ndarray, "N"]
    row_numbers: Int32[np.ndarray, "n"]
    offsets: Int64[np.ndarray, "n+1"]
    truncated: int
    dropped: int

    def __len__(self) -> int:
        return len(self.row_numbers)

    @property
    def lengths(self) -> Int32[np.ndarray, "n"]:
        """int32 (n,): tokens per example."""
        return np.diff(self.offsets).astype(np.int32)

    @property
    def label_counts(self) -> Int32[np.ndarray, "n"]:
        """int32 (n,): labels per example, at least 1."""
        return np.add.reduceat(self.is_label, self.offsets[:-1], dtype=np.int32)

    def example(self, index: int) -> Example:
        """Return example `index` as (input_ids int32 (t,), is_label bool (t,))."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.token_ids[part], self.is_label[part]


def encode(
    rows: Rows | Sequence[Mapping],
    style: PromptStyle | str,
    tokenizer: Any,
    max_length: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Examples:
    """Tokenise every row, prompt and completion as one text, in row order.

    A token is a label if it ends after the prompt's text. An example ends with one EOS, which is a label too; a chat ends
    with the end-of-turn token of its last assistant turn instead, where the template has one. Tokens after the last label
    are dropped, since nothing is learnt from them. Then the example is truncated on the right to max_length tokens.

    Args:
      rows: to tokenise.
      style: prompt style.
      tokenizer: a fast Hugging Face tokenizer.
      max_length: the largest number of tokens in an example, at least 2.
      on_progress: called with (rows done, rows in total).

    Raises:
      UserError: as `render_example`; also for a slow tokenizer, one without EOS, max_length below 2, or no example left.
    """
    if max_length < 2:
        raise UserError(f"max_length: found {max_length}, expected at least 2 (the first token is never a label)")
    if not isinstance(rows, Rows):
        rows = rows_from_list([dict(row) for row in rows])
    style, example_tokenizer = PromptStyle(style), _ExampleTokenizer(tokenizer)
    ids, labels, numbers, truncated = [], [], [], 0
    for first in range(0, len(rows), CHUNK):
        chunk = range(first, min(first + CHUNK, len(rows)))
        rendered = [render_example(rows.rows[i], style, tokenizer, rows.where(i)) for i in chunk]
        coded = example_tokenizer.examples(rendered, [rows.where(i) for i in chunk])
        for number, (row_ids, is_label) in zip(chunk, coded, strict=True):
            kept = is_label[:max_length].nonzero()[0]
            if not len(kept):
                continue
            truncated += len(row_ids) > max_length
            ids.append(row_ids[: kept[-1] + 1])
            labels.append(is_label[: kept[-1] + 1])
            numbers.append(number)
        if on_progress is not None:
            on_progress(chunk.stop, len(rows))
    if not ids:
        raise UserError(
            f"{rows.source}: none of {len(rows)} rows has a completion token within max_length {max_length}; "
            "expected a larger max_length or shorter prompts"
        )
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in ids])]).astype(np.int64)
    return Examples(
        token_ids=np.concatenate(ids),
        is_label=np.concatenate(labels),
        row_numbers=np.array(numbers, np.int32),
        offsets=offsets,
        truncated=truncated,
        dropped=len(rows) - len(numbers),
    )


def encode_prompt(row: Mapping, style: PromptStyle | str, tokenizer: Any, where: str = "row") -> list[int]:
    """Return the token ids of a prompt to continue: with BOS at most once, without an EOS added by the tokenizer.

    Raises:
      UserError: as `render_prompt`, and for a prompt without tokens.
    """
    text = render_prompt(row, style, tokenizer, where)
    ids, *_ = _ExampleTokenizer(tokenizer).encode([text], add_special_tokens=not is_templated(row, style))[0]
    if not len(ids):
        raise UserError(f"{where}: the prompt has no tokens, expected at least one to generate from")
    return ids.tolist()


class _ExampleTokenizer:
    """A fast tokenizer with the rules for labels, BOS and EOS."""

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"tokenizer: found {type(tokenizer).__name__}, expected a fast one (made from tokenizer.json), "
                "since character offsets separate completions from prompts"
            )
        self.tokenizer = tokenizer
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        # At the end of an assistant turn, any of these is its end-of-turn token; ordinary text is not.
        self.control = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}

    def encode(self, texts: list[str], add_special_tokens: bool) -> list[Coded]:
        """Tokenise texts.

        Returns:
          For each text: ids, and the start and end of each token in characters, all int32 (t,); both are -1 for tokens
          that the tokenizer added.
        """
        coded = self.tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            padding=False,
            truncation=False,
            verbose=False,
        )
        result = []
        fields = (coded[name] for name in ("input_ids", "offset_mapping", "special_tokens_mask"))
        for ids, pairs, added in zip(*fields, strict=True):
            spans = np.fromiter(chain.from_iterable(pairs), np.int32, 2 * len(ids)).reshape(-1, 2)
            ids = np.array(ids, np.int32)
            spans[np.array(added, bool)] = -1
            start, stop = 0, len(ids)
            while stop and spans[stop - 1, 1] < 0 and not (stop == 1 and ids[0] == self.bos):
                stop -= 1  # EOS of the post-processor: a prompt has none, and `_finish` adds an example's
            if stop > 1 and spans[0, 1] < 0 and ids[0] == ids[1] == self.bos:
                start = 1  # the text has its own BOS
            result.append((ids[start:stop], spans[start:stop, 0], spans[start:stop, 1]))
        return result

    def examples(self, rendered: list[Rendered], where: list[str]) -> list[Example]:
        """Tokenise rendered examples and end each with EOS or its end-of-turn token; does not truncate."""
        result: list = [None] * len(rendered)
        for templated in (False, True):
            chosen = [i for i, one in enumerate(rendered) if one.templated is templated]
            if chosen:
                coded = self.encode([rendered[i].text for i in chosen], add_special_tokens=not templated)
                for i, part in zip(chosen, coded, strict=True):
                    result[i] = self._finish(rendered[i], part, where[i])
        return result

    def _finish(self, one: Rendered, coded: Coded, where: str) -> Example:
        """Find the labels among the tokens of an example, and end it."""
        ids, starts, ends = coded
        is_label = np.zeros(len(ids), bool)
        for start, stop in one.spans:
            # A byte-level tokenizer may trim the offsets of white space to an empty range at its end, so that the last
            # token starts where the text ends: only spans before a later turn are bounded from above.
            bounded = starts < stop if stop < len(one.text) else True
            is_label |= (ends > start) & bounded
        if self.bos != self.eos:
            is_label &= ids != self.bos
        last = is_label.nonzero()[0]
        if one.templated and len(last) and int(ids[last[-1]]) in self.control:
            ids, is_label = ids[: last[-1] + 1], is_label[: last[-1] + 1]
        else:
            if self.eos is None:
                raise UserError(f"{where}: the tokenizer has no EOS token, expected one to end the completion with")
            stop = last[-1] + 1 if len(last) else len(ids)
            while stop and is_label[stop - 1] and ids[stop - 1] == self.eos:
                stop -= 1  # a completion with an EOS of its own still ends with one
            ids = np.append(ids[:stop], np.int32(self.eos))
            is_label = np.append(is_label[:stop], True)
        is_label[:1] = False
        return ids, is_label


@dataclass(frozen=True)
class LabelledExamples:
    """n tokenised examples with one label each, concatenated; N tokens in total; example i is row i.

    Attributes:
      token_ids: int32 (N,).
      token_types: int32 (N,), 0 for the first and 1 for the second text of a pair.
      labels: (n,), int32 classes, or float32 numbers for regression.
      offsets: int64 (n + 1,); example i is tokens offsets[i] to offsets[i + 1].
      truncated: number of examples that were truncated to max_length.
      pad_id: the tokenizer's padding token.
      dropped: always 0, since a label needs no tokens of its own.
    """

    token_ids: Int32[np.ndarray, "N"]
    token_types: Int32[np.ndarray, "N"]
    labels: Num[np.ndarray, "n"]
    offsets: Int64[np.ndarray, "n+1"]
    truncated: int
    pad_id: int
    dropped: int = 0

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
    def label_counts(self) -> Int32[np.ndarray, "n"]:
        """int32 (n,): zeros, since no token is a label."""
        return np.zeros(len(self), np.int32)

    def example(self, index: int) -> tuple[Int32[np.ndarray, "_"], Int32[np.ndarray, "_"]]:
        """Return example `index` as (input_ids int32 (t,), token_types int32 (t,))."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.token_ids[part], self.token_types[part]


def encode_labelled(
    texts: Sequence[Texts],
    labels: Num[np.ndarray, "n"],
    tokenizer: Any,
    max_length: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> LabelledExamples:
    """Tokenise texts or pairs with the tokenizer's special tokens and token types.

    Examples are truncated to max_length; of a pair, the longer text loses tokens first.

    Args:
      texts: one text or a pair for each example.
      labels: (n,), int32 classes, or float32 numbers for regression.
      tokenizer: a Hugging Face tokenizer.
      max_length: the largest number of tokens in an example, special tokens included.
      on_progress: called with (examples done, examples in total).

    Raises:
      UserError: a tokenizer without a padding token, or max_length too small for the special tokens and one of each text.
    """
    if tokenizer.pad_token_id is None:
        raise UserError(f"tokenizer: {type(tokenizer).__name__} has no padding token, expected one to pad batches with")
    shortest = tokenizer.num_special_tokens_to_add(pair=len(texts[0]) > 1) + len(texts[0])
    if max_length < shortest:
        raise UserError(
            f"max_length: found {max_length}, expected at least {shortest} (the special tokens, and one token of each text)"
        )
    # As in transformers: a model without token types (RoBERTa) gets zeros.
    has_types = "token_type_ids" in tokenizer.model_input_names
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    truncated = 0
    for first in range(0, len(texts), CHUNK):
        chunk = texts[first : first + CHUNK]
        coded = _tokenise(tokenizer, chunk, None)
        long = [i for i, one in enumerate(coded["input_ids"]) if len(one) > max_length]
        if long:
            shortened = _tokenise(tokenizer, [chunk[i] for i in long], max_length)
            for field, sequences in coded.items():
                for i, one in zip(long, shortened[field], strict=True):
                    sequences[i] = one
        truncated += len(long)
        ids += [np.array(one, np.int32) for one in coded["input_ids"]]
        types += [np.array(one, np.int32) * has_types for one in coded["token_type_ids"]]
        if on_progress is not None:
            on_progress(first + len(chunk), len(texts))
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in ids])]).astype(np.int64)
    return LabelledExamples(np.concatenate(ids), np.concatenate(types), labels, offsets, truncated, tokenizer.pad_token_id)


def _tokenise(tokenizer: Any, texts: Sequence[Texts], max_length: int | None) -> dict[str, list[list[int]]]:
    coded = tokenizer(
        *(list(side) for side in zip(*texts, strict=True)),
        truncation="longest_first" if max_length else False,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=True,
        verbose=False,
    )
    return {field: list(coded[field]) for field in ("input_ids", "token_type_ids")}
