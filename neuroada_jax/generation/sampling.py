"""Choice of the next token: decoding settings, processors of the logits, and the choice itself.

The functions on logits compute the same as the logits processors of transformers and are applied in its order. Letters: R
sequences, S slots, V vocabulary entries.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from neuroada_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Decoding settings; the default is greedy decoding, which takes the likeliest token each time.

    Any of `temperature`, `top_k` and `top_p` turns on random sampling. `beams` above 1 turns on beam search, which looks
    for the likeliest complete continuation. Each setting means the same as in transformers' generation config.

    Attributes:
      temperature: divides the logits, above 0.
      top_k: samples from this many likeliest tokens only.
      top_p: samples from the fewest likeliest tokens whose total probability reaches this, above 0 and at most 1.
      seed: seed of the sampling; None means 0.
      beams: number of hypotheses of a prompt.
      length_penalty: a hypothesis's log-probability is divided by its length to this power; above 0 favours longer ones.
      early_stopping: True ends the search of a prompt as soon as `beams` hypotheses have ended; False continues while a
        better one is likely, "never" while one is possible.
      repetition_penalty: above 1, makes tokens that have occurred, in the prompt too, less likely; 1 has no effect.
      no_repeat_ngram: no sequence of this many tokens occurs twice; 0 allows all.
      stop: texts that end a continuation; they are not part of it.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
          UserError: a value out of range, or settings that contradict each other.
        """
        self._check_ranges()
        if self.samples and self.beams > 1:
            raise UserError(
                f"beams: a search with {self.beams} beams samples nothing; omit beams, or temperature, top_k and top_p"
            )
        if self.seed is not None and not self.samples:
            raise UserError("seed: nothing is sampled; give temperature, top_k or top_p too")
        if self.beams == 1 and (self.length_penalty != 1.0 or self.early_stopping is not False):
            raise UserError("length_penalty, early_stopping: they are for a beam search; give beams above 1 too")

    def _check_ranges(self) -> None:
        if self.temperature is not None and not self.temperature > 0:
            raise UserError(f"temperature: expected above 0, found {self.temperature}; omit it for greedy decoding")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k: expected at least 1, found {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p: expected above 0 and at most 1, found {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise UserError(f"seed: expected at least 0 and below 2^32, found {self.seed}")
        if self.beams < 1:
            raise UserError(f"beams: expected at least 1, found {self.beams}")
        if not self.repetition_penalty > 0:
            raise UserError(f"repetition_penalty: expected above 0, found {self.repetition_penalty}")
        if self.no_repeat_ngram < 0:
            raise UserError(f"no_repeat_ngram: expected at least 0, found {self.no_repeat_ngram}")
        if "" in self.stop:
            raise UserError("stop: found an empty text, which would end every continuation at once")

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled at random."""
        return any(value is not None for value in (self.temperature, self.top_k, self.top_p))

    def compiled(self) -> "Decoding":
        """Return the settings that a compiled program depends on, without seed and stop strings."""
        return dataclasses.replace(self, seed=None, stop=())


GREEDY = Decoding()


def penalise_repetition(
    logits: Float[Array, "R V"], tokens: Int[Array, "R S"], present: Bool[Array, "R S"], penalty: float
) -> Float[Array, "R V"]:
    """Divide positive logits of the tokens that are present by `penalty`, and multiply negative ones by it."""
    sequences = jnp.arange(logits.shape[0])[:, None]
    vocabulary = logits.shape[1]
    seen = jnp.zeros(logits.shape, bool).at[sequences, jnp.where(present, tokens, vocabulary)].set(True, mode="drop")
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def forbid_repeated_ngrams(
    logits: Float[Array, "R V"], tokens: Int[Array, "R S"], present: Bool[Array, "R S"], end: Int[Array, ""], size: int
) -> Float[Array, "R V"]:
    """Set the logit of every token that would repeat an n-gram of `size` tokens to minus infinity.

    Args:
      logits: logits of the next token.
      tokens: tokens of each sequence; the slots that hold one are consecutive.
      present: the slots that hold a token.
      end: the slot after the last token, the same for all sequences.
      size: tokens of an n-gram, above 0.
    """
    sequences, slots = tokens.shape
    windows = max(slots - size + 1, 0)  # the last token of a matching window is forbidden
    matches = present[:, :windows] & (jnp.arange(windows)[None, :] + size <= end)
    for offset in range(size - 1):
        suffix = jnp.take(tokens, end - (size - 1) + offset, axis=1, mode="clip")
        matches &= tokens[:, offset : offset + windows] == suffix[:, None]
    completing = jnp.where(matches, tokens[:, size - 1 :][:, :windows], logits.shape[1])
    forbidden = jnp.zeros(logits.shape, bool).at[jnp.arange(sequences)[:, None], completing].set(True, mode="drop")
    return jnp.where(forbidden, -jnp.inf, logits)


def process(
    logits: Float[Array, "R V"],
    tokens: Int[Array, "R S"],
    present: Bool[Array, "R S"],
    end: Int[Array, ""],
    decoding: Decoding,
) -> Float[Array, "R V"]:
    """Apply the repetition penalty and the n-gram ban to logits, or to the log-probabilities of a beam search."""
    if decoding.repetition_penalty != 1.0:
        logits = penalise_repetition(logits, tokens, present, decoding.repetition_penalty)
    if decoding.no_repeat_ngram:
        logits = forbid_repeated_ngrams(logits, tokens, present, end, decoding.no_repeat_ngram)
    return logits


def keep_top_k(logits: Float[Array, "R V"], k: int) -> Float[Array, "R V"]:
    """Set all but the k largest logits, and those equal to the smallest of them, to minus infinity."""
    smallest = jax.lax.top_k(logits, min(k, logits.shape[1]))[0][:, -1:]
    return jnp.where(logits < smallest, -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "R V"], p: float) -> Float[Array, "R V"]:
    """Set the least likely tokens, of total probability at most 1 - p, to minus infinity; the likeliest stays."""
    order = jnp.argsort(logits, axis=1)
    ascending = jnp.take_along_axis(logits, order, axis=1)
    removed = jnp.cumsum(jax.nn.softmax(ascending, axis=1), axis=1) <= 1 - p
    removed = removed.at[:, -1].set(False)
    sequences = jnp.arange(logits.shape[0])[:, None]
    return jnp.where(jnp.zeros(logits.shape, bool).at[sequences, order].set(removed), -jnp.inf, logits)


def warp(logits: Float[Array, "R V"], decoding: Decoding) -> Float[Array, "R V"]:
    """Return the logits to sample from: divided by the temperature, then restricted to top_k, then to top_p."""
    if decoding.temperature is not None:
        logits = logits / decoding.temperature
    if decoding.top_k is not None:
        logits = keep_top_k(logits, decoding.top_k)
    if decoding.top_p is not None and decoding.top_p < 1:
        logits = keep_top_p(logits, decoding.top_p)
    return logits


def choose(
    logits: Float[Array, "R V"], decoding: Decoding, keys: Key[Array, "R"], numbers: Int[Array, "R"]
) -> Int[Array, "R"]:
    """Choose the next token of every sequence, int32.

    Args:
      logits: the result of `process`.
      decoding: greedy or sampling.
      keys: a random key for each sequence, so that sequences do not depend on one another.
      numbers: position of the token in its sequence, folded into the key.
    """
    if not decoding.samples:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(jax.random.fold_in)(keys, numbers)
    return jax.vmap(jax.random.categorical)(keys, warp(logits, decoding)).astype(jnp.int32)
