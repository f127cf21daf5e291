"""From rows to examples: token ids with either some of the tokens as labels, or one label for each example."""

import array
import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Num

from neuroada_jax import files
from neuroada_jax.data import prompts
from neuroada_jax.data.chat_template import ChatTemplate
from neuroada_jax.data.example_tokenizer import Encoded, ExampleTokenizer
from neuroada_jax.data.prompts import PromptForm, PromptStyle, Rendered, chat_template, is_templated
from neuroada_jax.data.rows import Rows, rows_from_list
from neuroada_jax.errors import UserError

# Rows tokenised in one call: enough to keep the tokenizer's threads busy, few enough that a progress bar moves.
CHUNK = 1000

Example = tuple[Int32[np.ndarray, "_"], Bool[np.ndarray, "_"]]  # input_ids, is_label
Texts = tuple[str, ...]  # one text, or a pair
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Examples:
    """n tokenised examples, concatenated; N tokens in total.

    Attributes:
      token_ids: int32 (N,).
      is_label: bool (N,), whether the model learns to predict the token; False for the first token of an example, which
        has no predecessor to predict it from, and for BOS.
      row_numbers: int32 (n,), the row that each example came from, ascending; a chat may have become several examples.
      offsets: int64 (n + 1,); example i is tokens offsets[i] to offsets[i + 1].
      truncated: number of examples that were truncated on the right to max_length and kept a label.
      dropped: number of rows of which no label is within max_length; they are not among the examples, nor in `truncated`.
      end_tokens: the tokens that end learnt turns or completions; a generation has to end at them too.
      split_rows: number of chats that became one example for each learnt turn, since their template or tokenizer writes a
        turn differently once later text follows.
      crossings: number of rows in which a token would have spanned the border between prompt and completion.
      unended: number of chats whose {% generation %} blocks leave out the end of a turn, so that it is not learnt.
      unasked: number of chats whose {% generation %} blocks follow other tokens than those of a generation's prompt.
      foreign_tokens: texts that the chat template means as one token and that the tokenizer splits, as it does with the
        roles of Zephyr's template.
    """

    token_ids: Int32[np.ndarray, "N"]
    is_label: Bool[np.ndarray, "N"]
    row_numbers: Int32[np.ndarray, "n"]
    offsets: Int64[np.ndarray, "n+1"]
    truncated: int
    dropped: int
    end_tokens: tuple[str, ...] = ()
    split_rows: int = 0
    crossings: int = 0
    unended: int = 0
    unasked: int = 0
    foreign_tokens: tuple[str, ...] = ()

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
    form: PromptForm | PromptStyle | str,
    tokenizer: Any,
    max_length: int,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    learn: Literal["all", "last"] = "all",
) -> Examples:
    """Tokenise every row, prompt and completion, in row order.

    The tokens of a prompt are those of `encode_prompt`, and all tokens after them are labels: where a token of the complete
    text would span the border, prompt and completion are tokenised separately. An example ends with one EOS, which is a
    label too; a chat ends with the end-of-turn token of its last learnt turn instead, where the template has one. Tokens
    after the last label are dropped. Then the example is truncated on the right to max_length tokens.

    Args:
      rows: to tokenise.
      form: prompt form, or a style.
      tokenizer: a fast Hugging Face tokenizer.
      max_length: the largest number of tokens in an example, at least 2.
      on_progress: called with (rows done, rows in total).
      learn: "all" assistant turns of a chat, or the "last".

    Raises:
      UserError: as `render_examples`; also for a slow tokenizer, one without EOS, max_length below 2, or no example left.
    """
    if max_length < 2:
        raise UserError(f"max_length: found {max_length}, expected at least 2 (the first token is never a label)")
    if not isinstance(rows, Rows):
        rows = rows_from_list([dict(row) for row in rows])
    form, example_tokenizer, done = PromptForm.of(form), ExampleTokenizer(tokenizer), _Collected(max_length)
    template: ChatTemplate | None = None

    def render(chunk: range) -> tuple[range, list[int], list[Rendered]]:
        nonlocal template
        if template is None:
            chats = (i for i in chunk if is_templated(rows.rows[i], form))
            template = next((chat_template(form, tokenizer, rows.where(i)) for i in chats), None)
        found = [
            (i, each)
            for i in chunk
            for each in prompts.render_examples(rows.rows[i], form, tokenizer, rows.where(i), learn, template)
        ]
        return chunk, [i for i, _ in found], [each for _, each in found]

    def tokenise(part: tuple[range, list[int], list[Rendered]]) -> tuple[range, list[int], list[Rendered], list[Any]]:
        return *part, example_tokenizer.tokenised(part[2])

    chunks = (range(first, min(first + CHUNK, len(rows))) for first in range(0, len(rows), CHUNK))
    with _rare_collection():
        for chunk, places, rendered, tokenised in _ahead(tokenise, _ahead(render, chunks)):
            encoded = example_tokenizer.examples(rendered, tokenised, [rows.where(i) for i in places])
            for i, parts in groupby(zip(places, encoded, strict=True), key=lambda pair: pair[0]):
                done.add(i, [each for _, examples in parts for each in examples])
            done.close_chunk()
            if on_progress is not None:
                on_progress(chunk.stop, len(rows))
    if not done.numbers:
        raise UserError(
            f"{rows.source}: none of {len(rows)} rows has a completion token within max_length {max_length}; "
            "expected a larger max_length or shorter prompts"
        )
    numbers = np.array(done.numbers, np.int32)
    return Examples(
        token_ids=_joined(done.ids),
        is_label=_joined(done.labels),
        row_numbers=numbers,
        offsets=np.concatenate([[0], np.cumsum(done.lengths, dtype=np.int64)]),
        truncated=done.count["truncated"],
        dropped=len(rows) - len(np.unique(numbers)),
        end_tokens=tuple(example_tokenizer.text_of(each) for each in sorted(done.ends)),
        split_rows=done.count["split"],
        crossings=done.count["crossed"],
        unended=done.count["unended"],
        unasked=done.count["unasked"],
        foreign_tokens=template.foreign_tokens if template else (),
    )


def _ahead(work: Callable[[Item], Result], items: Iterator[Item]) -> Iterator[Result]:
    """Yield what some work makes of each item, while a thread works on the next one.

    Of three stages, rendering and labelling are Python, and the tokenizer between them is not: it computes meanwhile.

    Raises:
      Exception: what the work on an item raises, or its making, after those before it were yielded.
    """
    with ThreadPoolExecutor(1, "encoding") as pool:
        coming = [pool.submit(work, item) for item in islice(items, 1)]
        while coming:
            result, failed = coming.pop().result(), None
            try:
                coming = [pool.submit(work, item) for item in islice(items, 1)]
            except Exception as error:  # of a later row: this one may be wrong too
                failed = error
            yield result
            if failed is not None:
                raise failed


@contextlib.contextmanager
def _rare_collection() -> Iterator[None]:
    """Let Python look for cycles rarely: the offsets of tokens are many small tuples, and none is part of one."""
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], 100_000) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


class _Collected:
    """Tokenised examples, truncated; those of finished chunks are one array each, which needs less memory than many.

    Attributes:
      ids: of the examples with labels.
      labels: whether each of these is one.
      lengths: of each example.
      numbers: the row of each example.
      ends: tokens that end what is learnt.
      count: of the rows that `Examples` counts.
    """

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self.ids: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.lengths, self.numbers = array.array("i"), array.array("i")
        self.ends: set[int] = set()
        self.count: Counter[str] = Counter()
        self._chunk: list[Example] = []

    def add(self, number: int, encoded: Sequence[Encoded]) -> None:
        """Add the examples of a row."""
        self.count["split"] += len(encoded) > 1
        self.count["crossed"] += any(each.crossed for each in encoded)
        self.count["unended"] += not all(each.ends for each in encoded)
        self.count["unasked"] += not all(each.asked for each in encoded)
        for each in encoded:
            self.ends |= each.ends
            kept = each.is_label[: self._max_length].nonzero()[0]
            if not len(kept):
                continue
            length = int(kept[-1]) + 1
            self.count["truncated"] += len(each.ids) > self._max_length
            self._chunk.append((each.ids[:length], each.is_label[:length]))
            self.lengths.append(length)
            self.numbers.append(number)

    def close_chunk(self) -> None:
        """Join the examples since the last call."""
        if self._chunk:
            ids, labels = zip(*self._chunk, strict=True)
            self.ids.append(np.concatenate(ids))
            self.labels.append(np.concatenate(labels))
            self._chunk = []


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Join arrays and free each as soon as it is copied, so that they are not in memory twice."""
    parts.reverse()
    result, at = np.empty(sum(map(len, parts)), parts[0].dtype), 0
    while parts:
        part = parts.pop()
        result[at : at + len(part)] = part
        at += len(part)
    return result


def encode_prompt(row: Mapping, form: PromptForm | PromptStyle | str, tokenizer: Any, where: str = "row") -> list[int]:
    """Return the token ids of a prompt to continue: with BOS at most once, without an EOS added by the tokenizer.

    Raises:
      UserError: as `render_prompt`, and for a prompt without tokens.
    """
    text = prompts.render_prompt(row, form, tokenizer, where)
    if files.has_half_characters(text):
        raise UserError(
            f"{where}: the prompt holds half of a surrogate pair (such as \\ud83d), expected complete characters"
        )
    ids = ExampleTokenizer(tokenizer).encode([text], add_special_tokens=not is_templated(row, form))[0].ids
    if not len(ids):
        raise UserError(f"{where}: the prompt has no tokens, expected at least one to generate from")
    return ids.tolist()


@dataclass(frozen=True)
class LabelledExamples:
    """n tokenised examples with one label each, concatenated; N tokens in total; example i is row i.

    Attributes:
      token_ids: int32 (N,).
      token_types: int32 (N,), 0 for the first and 1 for the second text of a pair.
      labels: int32 (n,) classes, float32 (n,) numbers for regression, or of C labels, any of which an example may have,
        float32 (n, C): 1 for those that it has, 0 for the others.
      offsets: int64 (n + 1,); example i is tokens offsets[i] to offsets[i + 1].
      truncated: number of examples that were truncated to max_length.
      pad_id: the tokenizer's padding token.
      dropped: always 0, since a label needs no tokens of its own.
      weights: float32 (n,), the weights of the examples in the mean loss of a step; None where all are 1.
    """

    token_ids: Int32[np.ndarray, "N"]
    token_types: Int32[np.ndarray, "N"]
    labels: Num[np.ndarray, "n *C"]
    offsets: Int64[np.ndarray, "n+1"]
    truncated: int
    pad_id: int
    dropped: int = 0
    weights: Float32[np.ndarray, "n"] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, numbers: Sequence[int]) -> "LabelledExamples":
        """Return the examples with these numbers, in the order given."""
        chosen = np.asarray(numbers)
        tokens = np.concatenate([np.arange(self.offsets[i], self.offsets[i + 1]) for i in chosen])
        return replace(
            self,
            token_ids=self.token_ids[tokens],
            token_types=self.token_types[tokens],
            labels=self.labels[chosen],
            offsets=np.concatenate([[0], np.cumsum(np.diff(self.offsets)[chosen])]),
            weights=None if self.weights is None else self.weights[chosen],
        )

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
    labels: Num[np.ndarray, "n *C"],
    tokenizer: Any,
    max_length: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> LabelledExamples:
    """Tokenise texts or pairs with the tokenizer's special tokens and token types.

    Examples are truncated to max_length; of a pair, the longer text loses tokens first.

    Args:
      texts: one text or a pair for each example.
      labels: see `LabelledExamples`.
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
