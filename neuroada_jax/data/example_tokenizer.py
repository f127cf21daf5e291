"""From rendered text to token ids and labels, with one border between prompt and completion.

The prompt of an example has the very tokens that it has in a generation, where it is tokenised by itself.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from neuroada_jax.data.prompts import Rendered
from neuroada_jax.data.template_facts import TOKEN_LIKE
from neuroada_jax.errors import UserError

# Texts before a completion that is tokenised without its prompt: a SentencePiece tokenizer would put a space before it.
_ANCHORS = ("\n", ".", "a", "1", ":")


class Encoded(NamedTuple):
    """A tokenised example, not truncated.

    Attributes:
      ids: int32 (t,).
      is_label: bool (t,).
      ends: ids of the tokens that end what is learnt.
      crossed: whether a token would have spanned the border, so that prompt and completion were tokenised separately.
      asked: whether the tokens before what is learnt are those of a generation; {% generation %} blocks may differ.
    """

    ids: Int32[np.ndarray, "_"]
    is_label: Bool[np.ndarray, "_"]
    ends: frozenset[int]
    crossed: bool = False
    asked: bool = True


class Coded:
    """The tokens of a text, with the place of each in its characters.

    Nearly all of a chat's places are not asked for, and Python takes longer to make them than the ids.

    Attributes:
      ids: int32 (t,).
    """

    def __init__(self, encoding: Any, start: int = 0, stop: int | None = None, spans: np.ndarray | None = None):
        """Keep tokens `start` to `stop` of the Rust tokenizer's encoding, with their (t, 2) spans if they are known."""
        self._encoding, self._start, self._spans = encoding, start, spans
        self.ids = np.array(encoding.ids, np.int32)[start:stop]

    @property
    def spans(self) -> Int32[np.ndarray, "_ 2"]:
        """The start and end of each token; both are -1 for tokens that the tokenizer added."""
        if self._spans is None:
            flat = np.fromiter(chain.from_iterable(self._encoding.offsets), np.int32)
            self._spans = flat.reshape(-1, 2)[self._start : self._start + len(self.ids)]
        return self._spans

    def span(self, at: int) -> tuple[int, int]:
        """Return the start and end of one token."""
        if self._spans is None and (found := self._encoding.token_to_chars(self._start + at)) is not None:
            return found
        start, end = self.spans[at]
        return int(start), int(end)

    def starting_before(self, place: int) -> int:
        """Return the number of tokens that start before a character; places never decrease from token to token."""
        return bisect_left(range(len(self.ids)), place, key=lambda at: self.span(at)[0])


class ExampleTokenizer:
    """A fast tokenizer with the rules for borders, labels, BOS and EOS."""

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"tokenizer: found {type(tokenizer).__name__}, expected a fast one (made from tokenizer.json), "
                "since character offsets separate completions from prompts"
            )
        self.tokenizer = tokenizer
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        # At the end of an assistant turn, any of these is its end-of-turn token; ordinary text is not. The tokenizer splits
        # a text at them first, so that the tokens after one do not depend on the text before it.
        control = sorted({*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids})
        self._is_control = np.zeros(max([len(tokenizer), *(token + 1 for token in control)]), bool)  # by id
        self._is_control[control] = True
        # Of those, the tokens that may end a turn: <think> and others that are ordinary text for decoding do not.
        texts = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items()}
        special = set(tokenizer.all_special_ids) | {i for i, each in tokenizer.added_tokens_decoder.items() if each.special}
        may_end = [token for token in control if token in special or TOKEN_LIKE.fullmatch(texts.get(token, ""))]
        self._may_end = np.zeros(len(self._is_control), bool)
        self._may_end[may_end] = True
        self._tails: dict[tuple[str, str], np.ndarray] = {}
        self._raw()

    def encode(self, texts: list[str], add_special_tokens: bool) -> list[Coded]:
        """Tokenise texts.

        Returns: the tokens of each text, without EOS of the post-processor.
        """
        return [self._coded(each, add_special_tokens) for each in self._batch(texts, add_special_tokens)]

    def _batch(self, texts: list[str], add_special_tokens: bool) -> list[Any]:
        # Without the lists that `__call__` makes of every encoding, which took a third of the time.
        return list(self._raw().encode_batch(texts, add_special_tokens=add_special_tokens))

    def _coded(self, encoding: Any, add_special_tokens: bool) -> Coded:
        found = Coded(encoding)
        if not add_special_tokens:
            return found
        ids, spans = found.ids, found.spans
        spans[np.array(encoding.special_tokens_mask, bool)] = -1
        start, stop = 0, len(ids)
        while stop and spans[stop - 1, 1] < 0 and not (stop == 1 and ids[0] == self.bos):
            stop -= 1  # EOS of the post-processor: a prompt has none, and `_finish` adds an example's
        if stop > 1 and spans[0, 1] < 0 and ids[0] == ids[1] == self.bos:
            start = 1  # the text has its own BOS
        return Coded(encoding, start, stop, spans[start:stop])

    def _raw(self) -> Any:
        """Return the Rust tokenizer with its options set; not set again, which would fail while another thread uses it."""
        raw, split = self.tokenizer.backend_tokenizer, self.tokenizer.split_special_tokens
        if raw.truncation is not None:
            raw.no_truncation()
        if raw.padding is not None:
            raw.no_padding()
        if raw.encode_special_tokens != split:
            raw.encode_special_tokens = split
        return raw

    def tokenised(self, rendered: Sequence[Rendered]) -> list[tuple[Any, Any]]:
        """Return the Rust tokenizer's encodings of each text, and of its prompt where that is no chat's; None for others.

        Nearly all of the time is the tokenizer's, which is not Python, so that another thread can work meanwhile.
        """
        result: list[tuple[Any, Any]] = [(None, None)] * len(rendered)
        for templated in (False, True):
            chosen = [i for i, one in enumerate(rendered) if one.templated is templated]
            if not chosen:
                continue
            texts = self._batch([rendered[i].text for i in chosen], not templated)
            prompts: Sequence[Any] = [None] * len(chosen)
            if not templated:
                prompts = self._batch([rendered[i].text[: rendered[i].spans[0][0]] for i in chosen], True)
            for i, text, prompt in zip(chosen, texts, prompts, strict=True):
                result[i] = (text, prompt)
        return result

    def examples(
        self, rendered: Sequence[Rendered], tokenised: Sequence[tuple[Any, Any]], where: Sequence[str]
    ) -> list[list[Encoded]]:
        """Label tokenised examples and end each with EOS or its end-of-turn token.

        Args:
          rendered: the examples.
          tokenised: from `tokenised`.
          where: their rows' places for error messages.

        Returns: for each the tokenised example; several where a chat had a token across the border of a later turn, or a
          turn without an end-of-turn token, so that every turn becomes an example of its own.
        """
        result = []
        for one, (text, prompt), place in zip(rendered, tokenised, where, strict=True):
            asked = None if prompt is None else self._coded(prompt, True).ids
            result.append(self._example(one, self._coded(text, not one.templated), asked, place))
        return result

    def _example(self, one: Rendered, coded: Coded, prompt: np.ndarray | None, where: str) -> list[Encoded]:
        """Label the tokens of one example; `prompt`: the tokens of its prompt by itself, where they are known."""
        if one.masked:
            return [self._masked(one, coded)]
        borders = [self._border(one.text, start, coded, prompt) for start, _ in one.spans]
        if None not in borders:
            found = self._labelled(one, coded, [border for border in borders if border is not None], where)
            if found is not None:
                return [found]
        if len(one.spans) > 1:
            turns = [Rendered(one.text[:stop], [(start, stop)], one.templated) for start, stop in one.spans]
            return list(chain.from_iterable(self.examples(turns, self.tokenised(turns), [where] * len(turns))))
        (start, stop), *_ = one.spans
        if prompt is None:
            prompt = self.encode([one.text[:start]], add_special_tokens=not one.templated)[0].ids
        completion = self._alone(one.text[start:stop])
        ids = np.concatenate([prompt, completion])
        is_label = np.arange(len(ids)) >= len(prompt)
        return [self._finish(one, ids, is_label, where)._replace(crossed=True)]

    def _border(self, text: str, start: int, coded: Coded, prompt: np.ndarray | None) -> int | None:
        """Return the number of tokens before character `start`; None if the text's tokens are not those of its prompt."""
        ids = coded.ids
        if prompt is None:
            for at in np.flatnonzero(self._is_control[ids])[::-1].tolist():
                first, end = coded.span(at)
                if first >= 0 and end <= start:
                    tail = self._tail(text[first:end], text[end:start])
                    if np.array_equal(ids[at : at + len(tail)], tail):
                        return at + len(tail)
                    break
            prompt = self.encode([text[:start]], add_special_tokens=False)[0].ids
        return len(prompt) if np.array_equal(ids[: len(prompt)], prompt) else None

    def _tail(self, control: str, text: str) -> np.ndarray:
        """Return the tokens of a control token and the text after it; most prompts of a file end with the same one."""
        if (control, text) not in self._tails:
            if len(self._tails) > 10_000:
                self._tails.clear()
            self._tails[control, text] = self.encode([control + text], add_special_tokens=False)[0].ids
        return self._tails[control, text]

    def _alone(self, text: str) -> np.ndarray:
        """Return the tokens of a completion that is tokenised by itself, but not as a beginning of text."""
        for anchor in _ANCHORS:
            before, ids = (each.ids for each in self.encode([anchor, anchor + text], add_special_tokens=False))
            if np.array_equal(ids[: len(before)], before):
                return ids[len(before) :]
        return self.encode([text], add_special_tokens=False)[0].ids

    def _labelled(self, one: Rendered, coded: Coded, borders: list[int], where: str) -> Encoded | None:
        """Label the tokens from each border to its span's end; None if a turn before the last has no end-of-turn token."""
        ids, is_label, ends = coded.ids, np.zeros(len(coded.ids), bool), set()
        for border, (_, stop) in zip(borders, one.spans, strict=True):
            # A byte-level tokenizer may trim the offsets of white space to an empty range at its end, so that the last
            # token starts where the text ends: only spans before a later turn are bounded from above.
            after = coded.starting_before(stop) if stop < len(one.text) else len(ids)
            is_label[border:after] = True
            if stop < len(one.text):
                if after <= border or not self._may_end[ids[after - 1]]:
                    return None
                ends.add(int(ids[after - 1]))
        found = self._finish(one, ids, is_label, where)
        return found._replace(ends=found.ends | ends)

    def _masked(self, one: Rendered, coded: Coded) -> Encoded:
        """Label exactly the tokens in the spans, as transformers' `return_assistant_tokens_mask` does from 5.24 on.

        A character may be several tokens, which all have its place: before, transformers left out all but the first at a
        span's end.
        """
        ids, (starts, ends) = coded.ids, coded.spans.T
        order, is_label, ending = np.arange(len(ids)), np.zeros(len(ids), bool), set()
        for start, stop in one.spans:
            first, last = (np.flatnonzero((starts <= at) & (at < ends)) for at in (start, stop - 1))
            part = (
                (order >= first[0]) & (order <= last[-1]) if len(first) and len(last) else (ends > start) & (starts < stop)
            )
            is_label |= part
            control = np.flatnonzero(part & self._may_end[ids])
            if len(control) and not one.text[ends[control[-1]] : stop].strip():
                ending.add(int(ids[control[-1]]))
        asked = one.asked and all(self._border(one.text, start, coded, None) is not None for start, _ in one.spans)
        return Encoded(ids, is_label & (order > 0), frozenset(ending), asked=asked)

    def _finish(self, one: Rendered, ids: np.ndarray, is_label: np.ndarray, where: str) -> Encoded:
        """End an example with its end-of-turn token or EOS, a label too."""
        if self.bos != self.eos:
            is_label = is_label & (ids != self.bos)
        last = is_label.nonzero()[0]
        if one.templated and len(last) and self._may_end[ids[last[-1]]]:
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
        return Encoded(ids, is_label, frozenset({int(ids[-1])}))

    def text_of(self, token: int) -> str:
        """Return the text of a control token."""
        return str(self.tokenizer.convert_ids_to_tokens(int(token)))
