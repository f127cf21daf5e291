"""Batched decoding with a key/value cache: greedy, sampling or beam search, a bounded number of jitted programs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Int, UInt

from neuroada_jax.core.trees import Tree
from neuroada_jax.errors import UserError
from neuroada_jax.generation import beams
from neuroada_jax.generation.decoder import Caches, Decoder, is_end, prefill, present
from neuroada_jax.generation.sampling import GREEDY, Decoding, choose, process
from neuroada_jax.models import Model

_STOP_EVERY = 16  # tokens between two looks for stop strings, which need the text and so the host


class State(NamedTuple):
    """A batch (B rows, S slots) in the middle of its work.

    Attributes:
      tokens: prompts, padded on the left, and what follows, int32 (B, S); -1 from a row's end on.
      start: the slot with which each row's prompt begins, int32 (B,).
      end: the slot of the next token, int32.
      done: whether a row has ended, bool (B,).
      keys: what each row draws with (B,).
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
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    prompts: Int[Array, "B"],
    seed: UInt[Array, ""],
    *,
    slots: int,
    decoding: Decoding,
    eos_ids: tuple[int, ...],
) -> State:
    """Reads left-padded prompts and chooses the first token; `prompts` numbers them, for their random keys."""
    batch, width = ids.shape
    logits, caches = prefill(module, params, ids, lengths, slots)
    tokens = jnp.full((batch, slots), -1, jnp.int32).at[:, :width].set(ids)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), prompts)
    # Rows that only fill the batch have no tokens and count as done.
    state = State(tokens, width - lengths, jnp.int32(width), lengths == 0, keys, caches)
    return _advance(state, logits, decoding, eos_ids)


@functools.partial(jax.jit, static_argnames=("module", "decoding", "eos_ids"), donate_argnames="state")
def _continue(
    module: nn.Module, params: Tree, state: State, until: Int[Array, ""], *, decoding: Decoding, eos_ids: tuple[int, ...]
) -> State:
    """Goes on until slot `until` is next or every row has ended."""
    decoder = Decoder.make(module, params, state.start)

    def body(state: State) -> State:
        last = lax.dynamic_slice_in_dim(state.tokens, state.end - 1, 1, axis=1)[:, 0]
        logits, caches = decoder.step(last, state.end, state.caches)
        return _advance(state._replace(caches=caches), logits, decoding, eos_ids)

    return lax.while_loop(lambda state: (state.end < until) & ~jnp.all(state.done), body, state)


def _advance(state: State, logits: Array, decoding: Decoding, eos_ids: tuple[int, ...]) -> State:
    seen = present(state.start, state.tokens.shape[1], state.end)
    number = state.end - state.start  # of the token in its row, so that padding does not matter
    token = choose(process(logits, state.tokens, seen, state.end, decoding), decoding, state.keys, number)
    tokens = lax.dynamic_update_slice(state.tokens, jnp.where(state.done, -1, token)[:, None], (0, state.end))
    return state._replace(tokens=tokens, end=state.end + 1, done=state.done | is_end(token, eos_ids))


def bucket(length: int) -> int:
    """The padded length: the next of 32, 48, 64, 96, 128, 192 and so on, which bounds the number of programs."""
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
    """Raises UserError, which calls a prompt by `name`, where one is empty or too long with its continuation."""
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"{name(number)} has no tokens")
        if len(prompt) + max_new_tokens > model.config.max_positions:
            raise UserError(
                f"{name(number)} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} that exceeds the "
                f"model's {model.config.max_positions} positions"
            )


def generate(
    model: Model,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    decoding: Decoding = GREEDY,
    decode: Callable[[list[int]], str] | None = None,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continues every prompt until an end token, a stop string or `max_new_tokens`.

    Prompts of similar length share a batch; padding is on the left and masked, so a prompt's result does not depend on
    what else is in its batch. What a prompt draws at random depends on the seed and its place in `prompts`.

    Args:
      model: architecture and config.
      params: plain parameters, merged where an adapter is wanted.
      prompts: token ids, each at least one.
      max_new_tokens: the longest continuation.
      eos_ids: tokens that end a continuation; they are not part of the result.
      decoding: greedy, sampling or beams, and the rest of the settings.
      decode: the text of token ids, for stop strings.
      batch_size: prompts decoded together.
      on_progress: called with (prompts done, prompts in all).

    Returns: the new ids of each prompt, in the order given. Where a stop string ended one, the last id is the one that
      completed it, and `before_stop` of its text is what comes before. A beam search looks for it when it is done.

    Raises:
      UserError: max_new_tokens below 1, an empty prompt, or one that with its continuation exceeds the model's positions.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
    if decoding.stop and decode is None:
        raise UserError("stop: texts that end a continuation need the tokenizer (decode)")
    check_lengths(model, prompts, max_new_tokens)
    stops = _Stops(decoding.stop, decode, frozenset(eos_ids))
    batch_size = max(1, min(batch_size, len(prompts)))
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    results: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        width = bucket(max(len(prompts[number]) for number in chosen))
        ids = np.zeros((batch_size, width), np.int32)
        lengths = np.zeros((batch_size,), np.int32)
        for row, number in enumerate(chosen):
            ids[row, width - len(prompts[number]) :] = prompts[number]
            lengths[row] = len(prompts[number])
        out = _decode(model, params, ids, lengths, chosen, max_new_tokens, tuple(sorted(set(eos_ids))), decoding, stops)
        for row, number in enumerate(chosen):
            results[number] = stops.cut(out[row])
        if on_progress:
            on_progress(min(first + batch_size, len(order)), len(order))
    return results


def _decode(
    model: Model,
    params: Tree,
    ids: np.ndarray,
    lengths: np.ndarray,
    chosen: list[int],
    limit: int,
    eos_ids: tuple[int, ...],
    decoding: Decoding,
    stops: "_Stops",
) -> np.ndarray:
    """One batch: the new tokens, int32 (B, N) with -1 from each row's end on."""
    module, width = model.module(), ids.shape[1]
    settings: dict[str, Any] = {"decoding": decoding.compiled(), "eos_ids": eos_ids}
    slots = bucket(width + limit)
    if decoding.beams > 1:
        return np.asarray(beams.search(module, params, ids, lengths, np.int32(limit), slots=slots, **settings))[:, width:]
    numbers = np.zeros(lengths.shape, np.int32)
    numbers[: len(chosen)] = chosen
    seed = np.uint32(decoding.seed or 0)
    state = _start(module, params, ids, lengths, numbers, seed, slots=slots, **settings)
    if limit == 1:
        return np.asarray(state.tokens)[:, width:]
    for until in [*range(_STOP_EVERY, limit, _STOP_EVERY), limit] if decoding.stop else [limit]:
        state = _continue(module, params, state, np.int32(width + until), **settings)
        if decoding.stop and until < limit:
            done, tokens = np.array(state.done), np.array(state.tokens)[:, width:]  # copies: the state is donated
            for row in np.flatnonzero(~done):
                done[row] = stops.found(tokens[row])
            if done.all():
                break
            state = state._replace(done=jnp.asarray(done))
    return np.asarray(state.tokens)[:, width:]


class _Stops(NamedTuple):
    """Where continuations end: at end tokens, and at texts."""

    texts: tuple[str, ...]
    decode: Callable[[list[int]], str] | None
    eos_ids: frozenset[int]

    def found(self, row: np.ndarray) -> bool:
        """Whether a text occurs in a row of new tokens, -1 where there is none."""
        return self._ended([int(token) for token in row if token >= 0])

    def cut(self, row: np.ndarray) -> list[int]:
        """The tokens before the end token, and up to the one with which the first stop text is complete."""
        ids = [int(token) for token in row if token >= 0 and token not in self.eos_ids]
        if not self._ended(ids):
            return ids
        return next(ids[:length] for length in range(1, len(ids) + 1) if self._ended(ids[:length]))

    def _ended(self, ids: list[int]) -> bool:
        if not self.texts or self.decode is None:
            return False
        text = self.decode(ids)
        return any(stop in text for stop in self.texts)


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the stop texts in it."""
    return text[: min((text.index(each) for each in stop if each in text), default=len(text))]
