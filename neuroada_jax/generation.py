"""Batched greedy decoding with a key/value cache, one jitted program per shape."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array

from neuroada_jax.bypass import Tree
from neuroada_jax.errors import UserError
from neuroada_jax.models import Model
from neuroada_jax.models.llama import empty_cache

PROMPT_MULTIPLE = 32  # prompts are padded to multiples of this, which bounds the number of compiled programs


@functools.partial(jax.jit, static_argnames=("module", "max_new_tokens", "eos_ids"))
def _greedy(
    module: nn.Module, params: Tree, ids: Array, lengths: Array, max_new_tokens: int, eos_ids: tuple[int, ...]
) -> Array:
    """Greedy continuation of left-padded prompts (B, T): int32 (B, max_new_tokens), -1 after an end token."""
    batch, width = ids.shape
    slots = width + max_new_tokens
    slot = jnp.arange(slots, dtype=jnp.int32)
    start = width - lengths  # the first slot of each row that holds a token
    real = slot[None, :] >= start[:, None]
    stops = jnp.asarray(eos_ids, jnp.int32)

    def next_token(hidden: Array) -> Array:
        logits: Any = module.apply({"params": params}, hidden[:, -1, :], method="unembed")
        return jnp.argmax(logits.astype(jnp.float32), axis=-1).astype(jnp.int32)

    def ended(token: Array) -> Array:
        return jnp.any(token[:, None] == stops[None, :], axis=1)

    query = jnp.arange(width, dtype=jnp.int32)
    mask = real[:, None, :] & (slot[None, None, :] <= query[None, :, None])
    positions = jnp.maximum(query[None, :] - start[:, None], 0)
    hidden, cache = module.apply({"params": params}, ids, positions, mask, empty_cache(module.config, batch, slots))
    first = next_token(hidden)
    out = jnp.full((batch, max_new_tokens), -1, jnp.int32)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        number, token, done, out, cache = carry
        out = lax.dynamic_update_slice(out, jnp.where(done, -1, token)[:, None], (0, number))
        done = done | ended(token)
        mask = real[:, None, :] & (slot <= width + number)[None, None, :]
        position = (width + number - start)[:, None]
        hidden, cache = module.apply({"params": params}, token[:, None], position, mask, cache)
        return number + 1, next_token(hidden), done, out, cache

    def unfinished(carry: tuple[Any, ...]) -> Array:
        number, _, done, _, _ = carry
        return (number < max_new_tokens) & ~jnp.all(done)

    # Rows that only fill the batch have no tokens and count as done.
    return lax.while_loop(unfinished, body, (jnp.int32(0), first, lengths == 0, out, cache))[3]


def generate(
    model: Model,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continues every prompt greedily until an end token or `max_new_tokens`.

    Prompts of similar length share a batch; padding is on the left and masked, so a prompt's result does not depend on
    what else is in its batch.

    Args:
      model: architecture and config.
      params: plain parameters, merged where an adapter is wanted.
      prompts: token ids, each at least one.
      max_new_tokens: the longest continuation.
      eos_ids: tokens that end a continuation; they are not part of the result.
      batch_size: prompts decoded together.
      on_progress: called with (prompts done, prompts in all).

    Returns: the new ids of each prompt, in the order given.

    Raises:
      UserError: max_new_tokens below 1, an empty prompt, or one that with its continuation exceeds the model's positions.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {number} has no tokens")
        if len(prompt) + max_new_tokens > model.config.max_positions:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} that exceeds the "
                f"model's {model.config.max_positions} positions"
            )
    batch_size = max(1, min(batch_size, len(prompts)))
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    results: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        longest = max(len(prompts[number]) for number in chosen)
        width = -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
        ids = np.zeros((batch_size, width), np.int32)
        lengths = np.zeros((batch_size,), np.int32)
        for row, number in enumerate(chosen):
            ids[row, width - len(prompts[number]) :] = prompts[number]
            lengths[row] = len(prompts[number])
        out = np.asarray(
            _greedy(model.module(), params, jnp.asarray(ids), jnp.asarray(lengths), max_new_tokens, tuple(eos_ids))
        )
        for row, number in enumerate(chosen):
            results[number] = [int(token) for token in out[row] if token >= 0 and token not in eos_ids]
        if on_progress:
            on_progress(min(first + batch_size, len(order)), len(order))
    return results
