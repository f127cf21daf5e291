"""Batched decoding with a key/value cache: greedy, sampling or beam search, in a bounded number of jitted programs."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Int, UInt

from neuroada_jax.core.trees import Tree, on_host
from neuroada_jax.errors import UserError
from neuroada_jax.generation import beams
from neuroada_jax.generation.decoder import Caches, Decoder, is_end, prefill, present
from neuroada_jax.generation.sampling import GREEDY, Decoding, choose, process
from neuroada_jax.models import Model
from neuroada_jax.models.rope import RopeType

_STOP_EVERY = 16  # tokens between two searches for stop strings, which need the text and so a transfer to the host


class Ending(NamedTuple):
    """Conditions that end a continuation, as far as they depend on the tokenizer.

    Attributes:
      eos_ids: tokens that end a continuation; they are not part of it.
      decode: token ids -> text, in which stop strings are looked for; None where there are none.
    """

    eos_ids: tuple[int, ...] = ()
    decode: Callable[[list[int]], str] | None = None


class Generation(NamedTuple):
    """The continuation of a prompt.

    Attributes:
      ids: the new tokens, without an end token. Where a stop string ended the continuation, the last one completed it.
      stopped: why it ended: at an "end" token, at a "stop" string, or at the largest "length".
    """

    ids: list[int]
    stopped: Literal["end", "stop", "length"]


class Prompts(NamedTuple):
    """A batch of B prompts, padded on the left to T tokens.

    Attributes:
      ids: int32 (B, T).
      lengths: tokens of each prompt, int32 (B,); 0 for a sequence that only pads the batch.
      numbers: index of each prompt in the caller's list, int32 (B,); its random key depends on it.
    """

    ids: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    numbers: Int[Array, "B"]


class State(NamedTuple):
    """A batch of B sequences with S slots each, in the middle of decoding.

    Attributes:
      tokens: prompts, padded on the left, and continuations, int32 (B, S); -1 from a sequence's end on.
      start: the slot of the first token of each prompt, int32 (B,).
      end: the slot of the next token, int32.
      done: whether a sequence has ended, bool (B,).
      keys: random key of each sequence (B,).
      caches: keys and values of all tokens but the last.
    """

    tokens: Array
    start: Array
    end: Array
    done: Array
    keys: Array
    caches: Caches


@functools.partial(jax.jit, static_argnames=("module", "slots", "decoding", "eos_ids"))
def _start(
    module: nn.Module,
    params: Tree,
    prompts: Prompts,
    seed: UInt[Array, ""],
    *,
    slots: int,
    decoding: Decoding,
    eos_ids: tuple[int, ...],
) -> State:
    """Process the prompts and choose the first token of each continuation."""
    batch, width = prompts.ids.shape
    logits, caches = prefill(module, params, prompts.ids, prompts.lengths, slots)
    tokens = jnp.full((batch, slots), -1, jnp.int32).at[:, :width].set(prompts.ids)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), prompts.numbers)
    # Sequences that only pad the batch have no tokens and count as done.
    state = State(tokens, width - prompts.lengths, jnp.int32(width), prompts.lengths == 0, keys, caches)
    return _advance(state, logits, decoding, eos_ids)


@functools.partial(jax.jit, static_argnames=("module", "decoding", "eos_ids"), donate_argnames="state")
def _continue(
    module: nn.Module, params: Tree, state: State, until: Int[Array, ""], *, decoding: Decoding, eos_ids: tuple[int, ...]
) -> State:
    """Decode until slot `until` is next or every sequence has ended."""
    decoder = Decoder.make(module, params, state.start)

    def body(state: State) -> State:
        last = lax.dynamic_slice_in_dim(state.tokens, state.end - 1, 1, axis=1)[:, 0]
        logits, caches = decoder.step(last, state.end, state.caches)
        return _advance(state._replace(caches=caches), logits, decoding, eos_ids)

    return lax.while_loop(lambda state: (state.end < until) & ~jnp.all(state.done), body, state)


def _advance(state: State, logits: Array, decoding: Decoding, eos_ids: tuple[int, ...]) -> State:
    """Choose the next token of every sequence from its logits and append it."""
    seen = present(state.start, state.tokens.shape[1], state.end)
    number = state.end - state.start  # of the token in its sequence, so that padding does not change the random draw
    token = choose(process(logits, state.tokens, seen, state.end, decoding), decoding, state.keys, number)
    tokens = lax.dynamic_update_slice(state.tokens, jnp.where(state.done, -1, token)[:, None], (0, state.end))
    return state._replace(tokens=tokens, end=state.end + 1, done=state.done | is_end(token, eos_ids))


def bucket(length: int) -> int:
    """Return the padded length: the next of 32, 48, 64, 96, 128, 192 and so on, which bounds the number of programs."""
    size = 32
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def check_lengths(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    name: Callable[[int], str] = "prompt {}".format,
) -> None:
    """Check that every prompt has tokens and that it fits the model's positions together with its continuation.

    Args:
      model: architecture and config.
      prompts: token ids.
      max_new_tokens: the longest continuation.
      name: index of a prompt -> its name in error messages.

    Raises:
      UserError: an empty prompt, or one that is too long.
    """
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"{name(number)} has no tokens")
        if len(prompt) + max_new_tokens > model.config.max_positions:
            raise UserError(
                f"{name(number)} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} that exceeds the "
                f"model's {model.config.max_positions} positions"
            )


def _borders(model: Model) -> list[int]:
    """Return the lengths beyond which a decoder's longropes rotate all tokens of a text in another way."""
    return [rope.original_max_positions for rope in model.config.ropes if rope.rope_type is RopeType.LONGROPE]


def generate(
    model: Model,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    ending: Ending,
    *,
    max_new_tokens: int,
    decoding: Decoding = GREEDY,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Continue every prompt until an end token, a stop string or `max_new_tokens`.

    Prompts of similar length share a batch; padding is on the left and masked, so that the continuation of a prompt does
    not depend on the rest of its batch. Sampling depends on the seed and on the prompt's index in `prompts`.

    Args:
      model: architecture and config.
      params: plain parameters, with an adapter in them if one is wanted.
      prompts: token ids, at least one for each prompt.
      ending: end tokens, and the decoder of stop strings.
      max_new_tokens: the longest continuation.
      decoding: greedy, sampling or beam search, and their settings.
      batch_size: prompts decoded together.
      on_progress: called with (prompts done, prompts in total).

    Returns: the new ids of each prompt and why they end, in the order given. `before_stop` removes a stop string from the
      text. A beam search looks for stop strings in its result only.

    Raises:
      UserError: max_new_tokens below 1, stop strings without `ending.decode`, an empty prompt, or one that exceeds the
        model's positions together with its continuation.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
    if decoding.stop and ending.decode is None:
        raise UserError("stop: stop strings are looked for in the text, which needs ending.decode, found None")
    check_lengths(model, prompts, max_new_tokens)
    stops = _Stops(decoding.stop, ending.decode, frozenset(ending.eos_ids))
    batch_size = max(1, min(batch_size, len(prompts)))
    texts: dict[int, Sequence[int]] = dict(enumerate(prompts))
    results: dict[int, Generation] = {}
    while texts:
        new, ends, numbers = _alike(texts, prompts, max_new_tokens, _borders(model))
        if decoding.beams > 1 and not ends:
            raise UserError(
                f"beams: prompt {numbers[0]} has {len(prompts[numbers[0]])} tokens; with max_new_tokens {max_new_tokens} "
                "it grows beyond original_max_position_embeddings, where longrope changes; expected 1 beam"
            )
        order = sorted(numbers, key=lambda number: len(texts[number]))
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            out = _decode(model, params, _batch(texts, chosen, batch_size), new, decoding, stops)
            for place, number in enumerate(chosen):
                before = texts[number][len(prompts[number]) :]
                found = stops.ended(np.concatenate([np.asarray(before, np.int32), out[place]]))
                if ends or found.stopped != "length":
                    results[number] = found
                    del texts[number]
                else:
                    texts[number] = [*prompts[number], *found.ids]
            if on_progress:
                on_progress(len(results), len(prompts))
    return [results[number] for number in range(len(prompts))]


def _alike(
    texts: dict[int, Sequence[int]], prompts: Sequence[Sequence[int]], limit: int, borders: Sequence[int]
) -> tuple[int, bool, list[int]]:
    """Return texts that go on together: by how many tokens, whether to their ends, and which texts.

    At a border the text so far is processed again, as transformers does for Phi-3: its tokens are rotated in another way.
    Without borders these are all texts.
    """
    groups: dict[tuple[int, bool, int], list[int]] = {}
    for number, text in texts.items():
        left = limit - (len(text) - len(prompts[number]))
        room = [border + 1 - len(text) for border in borders if border >= len(text)]
        new = min([left, *room])
        groups.setdefault((new, new == left, len(room)), []).append(number)
    (new, ends, _), numbers = next(iter(groups.items()))
    return new, ends, numbers


def _batch(prompts: dict[int, Sequence[int]], chosen: Sequence[int], batch_size: int) -> Prompts:
    """Return the chosen prompts as a batch of `batch_size` sequences, padded to one of few lengths."""
    width = bucket(max(len(prompts[number]) for number in chosen))
    ids = np.zeros((batch_size, width), np.int32)
    lengths, numbers = np.zeros((2, batch_size), np.int32)
    numbers[: len(chosen)] = chosen
    for place, number in enumerate(chosen):
        ids[place, width - len(prompts[number]) :] = prompts[number]
        lengths[place] = len(prompts[number])
    filled: Any = (ids, lengths, numbers)  # they go to the devices of the parameters, whichever these are
    return Prompts(*filled)


def _decode(
    model: Model, params: Tree, prompts: Prompts, limit: int, decoding: Decoding, stops: "_Stops"
) -> Int[np.ndarray, "B N"]:
    """Decode one batch: return the new tokens, int32 (B, N), with -1 from each sequence's end on."""
    module, width = model.module(), prompts.ids.shape[1]
    settings = {"decoding": decoding.compiled(), "eos_ids": tuple(sorted(stops.eos_ids))}
    slots = bucket(width + limit)
    if decoding.beams > 1:
        found = beams.search(module, params, prompts.ids, prompts.lengths, np.int32(limit), slots=slots, **settings)
        return on_host(found)[:, width:]
    state = _start(module, params, prompts, np.uint32(decoding.seed or 0), slots=slots, **settings)
    if limit == 1:
        return on_host(state.tokens)[:, width:]
    for until in [*range(_STOP_EVERY, limit, _STOP_EVERY), limit] if decoding.stop else [limit]:
        state = _continue(module, params, state, np.int32(width + until), **settings)
        if decoding.stop and until < limit:
            done, tokens = (
                on_host(state.done).copy(),
                on_host(state.tokens)[:, width:].copy(),
            )  # copies: the state is donated
            for place in np.flatnonzero(~done):
                done[place] = stops.found(tokens[place])
            if done.all():
                break
            state = state._replace(done=jax.device_put(done, state.done.sharding))
    return on_host(state.tokens)[:, width:]


class _Stops(NamedTuple):
    """Where continuations end: at end tokens and at stop strings."""

    texts: tuple[str, ...]
    decode: Callable[[list[int]], str] | None
    eos_ids: frozenset[int]

    def found(self, tokens: Int[np.ndarray, "N"]) -> bool:
        """Return whether a stop string occurs in the new tokens of a sequence, -1 where there is none."""
        return self._occur([int(token) for token in tokens if token >= 0])

    def ended(self, tokens: Int[np.ndarray, "N"]) -> Generation:
        """Return the tokens before the end token, or up to the one that completes the first stop string."""
        new = [int(token) for token in tokens if token >= 0]
        ids = list(itertools.takewhile(lambda token: token not in self.eos_ids, new))
        if self._occur(ids):
            return Generation(next(ids[:size] for size in range(1, len(ids) + 1) if self._occur(ids[:size])), "stop")
        return Generation(ids, "end" if len(ids) < len(new) else "length")

    def _occur(self, ids: list[int]) -> bool:
        if not self.texts or self.decode is None:
            return False
        text = self.decode(ids)
        return any(stop in text for stop in self.texts)


def before_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text up to the first of the stop strings in it."""
    return text[: min((text.index(each) for each in stop if each in text), default=len(text))]
