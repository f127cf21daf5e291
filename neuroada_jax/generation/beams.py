"""Beam search as in transformers; the result of a prompt does not depend on the rest of its batch."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from neuroada_jax.core.trees import Tree
from neuroada_jax.generation.decoder import Caches, Decoder, is_end, prefill, present, reorder_sequences, repeat_sequences
from neuroada_jax.generation.sampling import Decoding, process

_NEVER = -1e9  # score of an excluded candidate, as in transformers; finite, so that sums with it stay finite


class Search(NamedTuple):
    """State of a beam search after `number` tokens, with W hypotheses (beams) for each of B prompts and S slots.

    Attributes:
      number: new tokens of the running hypotheses, int32.
      tokens: the running hypotheses, prompts included, int32 (B, W, S); -1 where there is no token yet.
      scores: their log-probabilities, float32 (B, W), best first.
      ended: the best hypotheses that have ended, int32 (B, W, S).
      ended_scores: their scores, with the length penalty, float32 (B, W), best first.
      full: which entries of `ended` hold a hypothesis, bool (B, W).
      improvable: whether a running hypothesis may still beat one that has ended, bool (B,).
      open: whether the search of a prompt goes on, bool (B,).
      caches: the caches of the running hypotheses, B * W sequences.
    """

    number: Array
    tokens: Array
    scores: Array
    ended: Array
    ended_scores: Array
    full: Array
    improvable: Array
    open: Array
    caches: Caches


@functools.partial(jax.jit, static_argnames=("module", "slots", "decoding", "eos_ids"))
def search(
    module: nn.Module,
    params: Tree,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    limit: Int[Array, ""],
    *,
    slots: int,
    decoding: Decoding,
    eos_ids: tuple[int, ...],
) -> Int[Array, "B S"]:
    """Search for the best continuation of every left-padded prompt.

    Args:
      module: the decoder.
      params: its parameters.
      ids: int32 prompts, padded on the left.
      lengths: tokens of each prompt; 0 for a sequence that only pads the batch.
      limit: tokens of the longest continuation.
      slots: slots for prompt and continuation, at least T + limit.
      decoding: settings with `beams` above 1.
      eos_ids: tokens that end a hypothesis.

    Returns: int32 (B, slots), prompt and continuation with the end token, and -1 from there on.
    """
    batch, width = ids.shape
    beams = decoding.beams
    logits, caches = prefill(module, params, ids, lengths, slots)
    decoder = Decoder.make(module, params, jnp.repeat(width - lengths, beams))
    tokens = jnp.full((batch, beams, slots), -1, jnp.int32).at[:, :, :width].set(ids[:, None, :])
    never = jnp.full((batch, beams), _NEVER, jnp.float32)
    state = Search(
        number=jnp.int32(0),
        tokens=tokens,
        scores=never.at[:, 0].set(0.0),  # all beams of a prompt start equal, so only one takes part
        ended=tokens,
        ended_scores=never,
        full=jnp.zeros((batch, beams), bool),
        improvable=jnp.ones((batch,), bool),
        open=lengths > 0,
        caches=repeat_sequences(caches, beams),
    )
    state = _advance(state, jnp.repeat(logits, beams, axis=0), decoder.start, width, limit, decoding, eos_ids)

    def body(state: Search) -> Search:
        end = width + state.number
        last = lax.dynamic_slice_in_dim(state.tokens, end - 1, 1, axis=2).reshape(-1)
        logits, caches = decoder.step(last, end, state.caches)
        return _advance(state._replace(caches=caches), logits, decoder.start, width, limit, decoding, eos_ids)

    return lax.while_loop(lambda state: jnp.any(state.open), body, state).ended[:, 0]


def _advance(
    state: Search,
    logits: Float[Array, "R V"],
    start: Int[Array, "R"],
    width: int,
    limit: Int[Array, ""],
    decoding: Decoding,
    eos_ids: tuple[int, ...],
) -> Search:
    """Extend the search by one token, given the logits of all B * W hypotheses."""
    batch, beams, slots = state.tokens.shape
    end = width + state.number
    flat = state.tokens.reshape(batch * beams, slots)
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    log_probabilities = process(log_probabilities, flat, present(start, slots, end), end, decoding)
    vocabulary = logits.shape[1]
    total = log_probabilities.reshape(batch, beams, vocabulary) + state.scores[:, :, None]
    # Enough candidates for `beams` running ones even if every end token ranks first in each beam.
    kept = max(2, 1 + len(eos_ids)) * beams
    scores, chosen = lax.top_k(total.reshape(batch, beams * vocabulary), kept)
    parents, token = chosen // vocabulary, (chosen % vocabulary).astype(jnp.int32)
    tokens = _take(state.tokens, parents).at[:, :, end].set(token)
    ends = is_end(token, eos_ids) | (state.number + 1 >= limit)

    running, best = lax.top_k(scores + jnp.where(ends, _NEVER, 0.0), beams)
    ended, ended_scores, full = _with_newly_ended(state, tokens, scores, ends, decoding)
    number = state.number + 1
    improvable = state.improvable & _may_improve(running[:, 0], ended_scores, full, number, limit, decoding)
    going_on = improvable & ~jnp.all(ends, axis=1)
    if decoding.early_stopping is True:
        going_on &= ~jnp.all(full, axis=1)
    sources = jnp.arange(batch)[:, None] * beams + jnp.take_along_axis(parents, best, axis=1)
    was_open = state.open[:, None]
    return Search(
        number=number,
        tokens=_take(tokens, best),
        scores=running,
        ended=jnp.where(was_open[:, :, None], ended, state.ended),
        ended_scores=jnp.where(was_open, ended_scores, state.ended_scores),
        full=jnp.where(was_open, full, state.full),
        improvable=improvable,
        open=state.open & going_on,
        caches=reorder_sequences(state.caches, sources.reshape(-1), width),
    )


def _with_newly_ended(
    state: Search, tokens: Array, scores: Array, ends: Array, decoding: Decoding
) -> tuple[Int[Array, "B W S"], Float[Array, "B W"], Bool[Array, "B W"]]:
    """Return `ended`, `ended_scores` and `full` with the candidates that just ended and rank among the best."""
    beams = state.scores.shape[1]
    # Only the first `beams` candidates may end; the others only replace those that do.
    ends = ends & (jnp.arange(scores.shape[1]) < beams)[None, :]
    length = (state.number + 1).astype(jnp.float32)
    scores = scores / length**decoding.length_penalty
    if decoding.early_stopping is True:
        scores = scores + jnp.where(jnp.all(state.full, axis=1), _NEVER, 0.0)[:, None]
    scores = scores + jnp.where(state.improvable, 0.0, _NEVER)[:, None] + jnp.where(ends, 0.0, _NEVER)
    merged = jnp.concatenate([state.ended_scores, scores], axis=1)
    ended_scores, best = lax.top_k(merged, beams)
    ended = _take(jnp.concatenate([state.ended, tokens], axis=1), best)
    full = jnp.take_along_axis(jnp.concatenate([state.full, ends], axis=1), best, axis=1)
    return ended, ended_scores, full


def _may_improve(
    best: Float[Array, "B"],
    ended_scores: Float[Array, "B W"],
    full: Bool[Array, "B W"],
    number: Array,
    limit: Array,
    decoding: Decoding,
) -> Bool[Array, "B"]:
    """Return whether, by transformers' estimate, the best running hypothesis can still beat the worst that has ended."""
    longest = decoding.early_stopping == "never" and decoding.length_penalty > 0
    length = (limit if longest else number).astype(jnp.float32)
    possible = best / length**decoding.length_penalty
    worst = jnp.where(full, jnp.min(ended_scores, axis=1, keepdims=True), _NEVER)
    return jnp.any(possible[:, None] > worst, axis=1)


def _take(tokens: Int[Array, "B W S"], beams: Int[Array, "B C"]) -> Int[Array, "B C S"]:
    return jnp.take_along_axis(tokens, beams[:, :, None], axis=1)
