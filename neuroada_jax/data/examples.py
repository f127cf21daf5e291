"""Rows become examples: token ids, and what is learnt from them, which is some of the tokens or a label of the whole."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, Num

from neuroada_jax.data.prompts import PromptStyle, Rendered, is_templated, render_example, render_prompt
from neuroada_jax.data.rows import Rows, rows_from_list
from neuroada_jax.errors import UserError

# Rows handed to the tokenizer at once: enough to keep its threads busy, few enough for lively progress.
CHUNK = 1000

Example = tuple[Int32[np.ndarray, "_"], Bool[np.ndarray, "_"]]  # input_ids, is_label
Coded = tuple[Int32[np.ndarray, "_"], Int32[np.ndarray, "_"], Int32[np.ndarray, "_"]]  # ids, starts, ends
Texts = tuple[str, ...]  # one text, or a pair


@dataclass(frozen=True)
class Examples:
    """n tokenised examples end to end, N tokens in all.

    token_ids: int32 (N,).
    is_label: bool (N,); never true for an example's first token, which nothing predicts, nor for a BOS.
    row_numbers: int32 (n,), the row each example came from, ascending.
    offsets: int64 (n + 1,); example i is tokens offsets[i] to offsets[i + 1].
    cut: how many examples lost tokens at the right end to max_length but kept a target.
    dropped: how many rows are not here because no target was left (not counted in `cut`).
    """

    token_ids: Int32[np.ndarray, "N"]
    is_label: Bool[np.ndarray, "N"]
    row_numbers: Int32[np.ndarray, "n"]
    offsets: Int64[np.ndarray, "n+1"]
    cut: int
    dropped: int

    def __len__(self) -> int:
        return len(self.row_numbers)

    @property
    def lengths(self) -> Int32[np.ndarray, "n"]:
        """int32 (n,): tokens per example."""
        return np.diff(self.offsets).astype(np.int32)

    @property
    def label_counts(self) -> Int32[np.ndarray, "n"]:
        """int32 (n,): targets per example, at least 1."""
        return np.add.reduceat(self.is_label, self.offsets[:-1], dtype=np.int32)

    def example(self, index: int) -> Example:
        """Example `index` as (input_ids int32 (t,), is_label bool (t,))."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.token_ids[part], self.is_label[part]


def encode(
    rows: Rows | Sequence[Mapping],
    style: PromptStyle | str,
    tokenizer: Any,
    max_length: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Examples:
    """Tokenise every row, prompt and target as one text, in row order.

    A token is a target if it ends beyond the prompt's text. The example ends with one EOS, itself a target; a chat ends
    with its last assistant turn's end-of-turn token instead where the template has one, and what follows the last
    target is dropped, since nothing is learnt from it. Then the right end is cut to max_length tokens.
    tokenizer: a fast Hugging Face tokenizer. on_progress: called with (rows done, rows in all).

    Raises UserError: everything `render_prompt` raises, a missing target, no fast tokenizer, no EOS token,
    max_length below 2, no example left.
    """
    if max_length < 2:
        raise UserError(f"max_length: found {max_length}, expected at least 2 (the first token is never a target)")
    if not isinstance(rows, Rows):
        rows = rows_from_list([dict(row) for row in rows])
    style, tokens = PromptStyle(style), _Tokens(tokenizer)
    ids, targets, numbers, cut = [], [], [], 0
    for first in range(0, len(rows), CHUNK):
        chunk = range(first, min(first + CHUNK, len(rows)))
        rendered = [render_example(rows.rows[i], style, tokenizer, rows.where(i)) for i in chunk]
        coded = tokens.examples(rendered, [rows.where(i) for i in chunk])
        for number, (row_ids, is_label) in zip(chunk, coded, strict=True):
            kept = is_label[:max_length].nonzero()[0]
            if not len(kept):
                continue
            cut += len(row_ids) > max_length
            ids.append(row_ids[: kept[-1] + 1])
            targets.append(is_label[: kept[-1] + 1])
            numbers.append(number)
        if on_progress is not None:
            on_progress(chunk.stop, len(rows))
    if not ids:
        raise UserError(
            f"{rows.source}: no example is left, in none of {len(rows)} rows is a target token within "
            f"max_length {max_length}; expected a larger max_length or shorter prompts"
        )
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in ids])]).astype(np.int64)
    return Examples(
        token_ids=np.concatenate(ids),
        is_label=np.concatenate(targets),
        row_numbers=np.array(numbers, np.int32),
        offsets=offsets,
        cut=cut,
        dropped=len(rows) - len(numbers),
    )


def encode_prompt(row: Mapping, style: PromptStyle | str, tokenizer: Any, where: str = "row") -> list[int]:
    """The ids to generate from: BOS at most once, no EOS that the tokenizer added. Raises as `render_prompt` does."""
    text = render_prompt(row, style, tokenizer, where)
    ids, *_ = _Tokens(tokenizer).encode([text], add_special_tokens=not is_templated(row, style))[0]
    if not len(ids):
        raise UserError(f"{where}: the prompt has no tokens, expected at least one to generate from")
    return ids.tolist()


class _Tokens:
    """What has to be known about a tokenizer, and the rules for BOS and EOS, in one place."""

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"tokenizer: found {type(tokenizer).__name__}, expected a fast one (made from tokenizer.json), "
                "since targets are told from prompts by character offsets"
            )
        self.tokenizer = tokenizer
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        # Any of these at the end of an assistant turn ends that turn; text would not.
        self.control = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}

    def encode(self, texts: list[str], add_special_tokens: bool) -> list[Coded]:
        """Per text: ids int32 (t,), start and end int32 (t,) in characters, both -1 for what the tokenizer added."""
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
        columns = (coded[name] for name in ("input_ids", "offset_mapping", "special_tokens_mask"))
        for ids, pairs, added in zip(*columns, strict=True):
            spans = np.fromiter(chain.from_iterable(pairs), np.int32, 2 * len(ids)).reshape(-1, 2)
            ids = np.array(ids, np.int32)
            spans[np.array(added, bool)] = -1
            start, stop = 0, len(ids)
            while stop and spans[stop - 1, 1] < 0 and not (stop == 1 and ids[0] == self.bos):
                stop -= 1  # the post-processor's EOS: a prompt goes on, and an example gets its own
            if stop > 1 and spans[0, 1] < 0 and ids[0] == ids[1] == self.bos:
                start = 1  # the text brought its own BOS
            result.append((ids[start:stop], spans[start:stop, 0], spans[start:stop, 1]))
        return result

    def examples(self, rendered: list[Rendered], where: list[str]) -> list[Example]:
        """Per text: ids int32 (t,) and is_label bool (t,), ended but not cut."""
        result: list = [None] * len(rendered)
        for templated in (False, True):
            chosen = [i for i, one in enumerate(rendered) if one.templated is templated]
            if chosen:
                coded = self.encode([rendered[i].text for i in chosen], add_special_tokens=not templated)
                for i, part in zip(chosen, coded, strict=True):
                    result[i] = self._finish(rendered[i], part, where[i])
        return result

    def _finish(self, one: Rendered, coded: Coded, where: str) -> Example:
        ids, starts, ends = coded
        is_label = np.zeros(len(ids), bool)
        for start, stop in one.spans:
            # A byte-level tokenizer may shrink a white-space token to nothing at its end, so a last token
            # can start where the text stops: only what lies before a later turn is bounded from above.
            bounded = starts < stop if stop < len(one.text) else True
            is_label |= (ends > start) & bounded
        if self.bos != self.eos:
            is_label &= ids != self.bos
        last = is_label.nonzero()[0]
        if one.templated and len(last) and int(ids[last[-1]]) in self.control:
            ids, is_label = ids[: last[-1] + 1], is_label[: last[-1] + 1]
        else:
            if self.eos is None:
                raise UserError(f"{where}: the tokenizer has no EOS token, expected one to end the target with")
            stop = last[-1] + 1 if len(last) else len(ids)
            while stop and is_label[stop - 1] and ids[stop - 1] == self.eos:
                stop -= 1  # targets that bring their own EOS still end with one
            ids = np.append(ids[:stop], np.int32(self.eos))
            is_label = np.append(is_label[:stop], True)
        is_label[:1] = False
        return ids, is_label


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
    dropped: int = 0  # a label needs no tokens, so that every row is an example

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
