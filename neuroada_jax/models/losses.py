"""Losses: cross-entropy of labelled tokens for decoders, classification or regression losses for encoders."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from neuroada_jax.core.trees import Tree
from neuroada_jax.data.batches import Batch, ClassificationBatch
from neuroada_jax.models import attention

# Upper bound in bytes of the float32 logits that exist at one time.
LOGIT_BYTES = 1 << 27


def label_losses(module: nn.Module, variables: Tree, batch: Batch, *, output_trains: bool = False) -> Float[Array, "B M"]:
    """Return the cross-entropy of every label in float32, 0 where the mask is 0.

    The hidden states of the labelled positions are gathered first, and the vocabulary matmul runs over a chunk of them at a
    time: logits of unlabelled positions are never formed, and those of labelled ones never all at once.

    The output layer counts as frozen unless it carries a bypass or `output_trains` is set: the gradient with respect to
    its weights is zero.
    """
    states, ids, chunk = _gather_labels(module, variables, batch)

    def losses(states: Array, ids: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(_logits(module, variables, states), ids)

    if output_trains or any("lm_head" in variables.get(form, {}) for form in ("bypass", "resident")):
        nll = _in_chunks(jax.checkpoint(losses), states, ids, chunk)
    else:
        nll = _with_gradient_at_once(losses, states, ids, chunk)
    return nll.reshape(batch.label_ids.shape) * batch.label_mask


def label_scores(
    module: nn.Module, variables: Tree, batch: Batch, seen: Array | None = None
) -> tuple[Float[Array, "B M"], Bool[Array, "B M"]]:
    """Return the losses of `label_losses` and whether each label is the likeliest token; (0, True) where the mask is 0.

    This is for scoring: hidden states are gathered and chunked in the same way, but there is no gradient.

    Args:
      module: the decoder.
      variables: its collections.
      batch: input and labels.
      seen: the slots that each token attends to, bool (B, T, T); None: as `batch.positions` implies.
    """
    states, ids, chunk = _gather_labels(module, variables, batch, seen)

    def scores(states: Array, ids: Array) -> tuple[Array, Array]:
        logits = _logits(module, variables, states)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
        return losses, jnp.argmax(logits, axis=-1).astype(ids.dtype) == ids

    losses, likeliest = _in_chunks(scores, states, ids, chunk)
    shape = batch.label_ids.shape
    return losses.reshape(shape) * batch.label_mask, likeliest.reshape(shape) | (jnp.asarray(batch.label_mask) == 0)


def _gather_labels(
    module: nn.Module, variables: Tree, batch: Batch, seen: Array | None = None
) -> tuple[Float[Array, "n D"], Int[Array, "n"], int]:
    """Return the hidden states and ids of all labels, and the number of labels in a chunk."""
    if seen is None and batch.positions is not None:
        seen = attention.packed_mask(jnp.asarray(batch.positions))
    hidden, _ = module.apply(variables, batch.input_ids, batch.positions, seen)
    picked = jnp.take_along_axis(hidden, batch.label_positions[:, :, None], axis=1, mode="clip")
    states, ids = picked.reshape(-1, picked.shape[-1]), jnp.asarray(batch.label_ids).reshape(-1)
    vocabulary = jax.eval_shape(lambda states: _logits(module, variables, states), states).shape[-1]
    return states, ids, max(LOGIT_BYTES // (4 * vocabulary), 1)


def _logits(module: nn.Module, variables: Tree, states: Float[Array, "n D"]) -> Float[Array, "n V"]:
    logits: Any = module.apply(variables, states, method="unembed")
    return logits.astype(jnp.float32)


def _with_gradient_at_once(losses: Any, states: Float[Array, "n D"], ids: Int[Array, "n"], chunk: int) -> Float[Array, "n"]:
    """Return losses(states, ids), whose gradient for `states` is computed together with the losses of each chunk.

    This takes two vocabulary matmuls and keeps no logits; recomputing them in the backward pass would take three.
    """

    def value_and_gradient(states: Array, ids: Array) -> tuple[Array, Array]:
        nll, pullback = jax.vjp(lambda states: losses(states, ids), states)
        return nll, pullback(jnp.ones_like(nll))[0]

    nll, gradient = lax.stop_gradient(_in_chunks(value_and_gradient, lax.stop_gradient(states), ids, chunk))
    # A sum of zeros whose derivative with respect to `states` is the gradient.
    change = (states - lax.stop_gradient(states)).astype(nll.dtype)
    return nll + jnp.sum(gradient.astype(nll.dtype) * change, axis=-1)


def _in_chunks(function: Any, states: Float[Array, "n D"], ids: Int[Array, "n"], chunk: int) -> Any:
    """Apply function(states, ids), whose results have a leading axis n, to nearly equal chunks of at most `chunk`."""
    count = ids.shape[0]
    chunks = -(-count // chunk)
    if chunks == 1:
        return function(states, ids)
    size = -(-count // chunks)
    padding = chunks * size - count
    states = jnp.pad(states, ((0, padding), (0, 0))).reshape(chunks, size, -1)
    ids = jnp.pad(ids, (0, padding)).reshape(chunks, size)
    results = lax.map(lambda each: function(*each), (states, ids))
    return jax.tree.map(lambda leaf: leaf.reshape(chunks * size, *leaf.shape[2:])[:count], results)


def classification_losses(
    module: nn.Module, variables: Tree, batch: ClassificationBatch, dropout: Array | None = None
) -> Float[Array, "B"]:
    """Return the loss of every example in float32, times its weight, and 0 for padding.

    The loss is that of transformers' classifiers: the cross-entropy of the label; the squared error where there is a single
    output; and where an example may have several labels, the mean over the labels of the cross-entropy of a sigmoid.

    Args:
      module: an encoder with a classifier.
      variables: its collections.
      batch: inputs and labels.
      dropout: PRNG key of the dropout; None for no dropout.
    """
    logits, labels = classification_logits(module, variables, batch, dropout), jnp.asarray(batch.labels)
    if logits.shape[-1] == 1:
        losses = jnp.square(logits[:, 0] - labels.astype(jnp.float32))
    elif labels.ndim == 2:
        losses = jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels), axis=1)
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses * batch.label_mask


def classification_logits(
    module: nn.Module, variables: Tree, batch: ClassificationBatch, dropout: Array | None = None
) -> Float[Array, "B labels"]:
    """Return the classifier's outputs for every example in float32; arguments as in `classification_losses`."""
    ids = jnp.asarray(batch.input_ids)
    mask = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :] < jnp.asarray(batch.lengths)[:, None]
    rngs = None if dropout is None else {"dropout": dropout}
    logits: Any = module.apply(variables, ids, mask, jnp.asarray(batch.token_types), rngs=rngs)
    return logits.astype(jnp.float32)
