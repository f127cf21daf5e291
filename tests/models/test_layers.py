"""Attention in blocks of queries against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neuroada_jax.models import attention, layers


def dense(query, key, value, seen):
    """Softmax attention with grouped keys; `seen` (B, T, T) says which slots each query sees."""
    group = query.shape[2] // key.shape[2]
    logits = jnp.einsum("bthn,bshn->bhts", query, jnp.repeat(key, group, axis=2)) * query.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshn->bthn", weights, jnp.repeat(value, group, axis=2))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("tokens", "window"), [(5, None), (96, 40), (131, None), (131, 7), (1100, None), (1100, 300)])
def test_causal_attention_and_its_gradient_equal_the_plain_formula(tokens, window, packed):
    keys = jax.random.split(jax.random.key(tokens), 4)
    query, key, value, upstream = (
        jax.random.normal(each, (2, tokens, heads, 4)) for each, heads in zip(keys, (4, 2, 2, 4), strict=True)
    )
    slots = np.arange(tokens)
    distance = slots[:, None] - slots[None, :]
    seen = np.broadcast_to((distance >= 0) & (distance < (window or tokens)), (2, tokens, tokens))
    mask = None
    if packed:  # two examples a row, and a mask that would let queries see later slots of their own example
        example = np.stack([slots >= tokens // 3, slots >= tokens // 2])
        mask = example[:, :, None] == example[:, None, :]
        seen = seen & mask

    def ours(query, key, value):
        wide = None if mask is None else jnp.asarray(mask[:, None])
        return attention.attention(query, key, value, mask=wide, causal=True, window=window)

    def with_gradients(attend):
        @jax.jit
        def both(query, key, value, upstream):
            found, pull_back = jax.vjp(attend, query, key, value)
            return found, pull_back(upstream)

        return both(query, key, value, upstream)

    found, gradients = with_gradients(ours)
    expected, expected_gradients = with_gradients(lambda *inputs: dense(*inputs, jnp.asarray(seen)))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=5e-5)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.999999])
def test_dropout_zeroes_its_share_and_scales_the_rest(rate):
    x = jnp.full((300, 1001), 3.0)  # an odd width: the last pair of draws is used by half
    found = np.asarray(layers.dropout(x, rate, jax.random.key(7)))
    dropped = found == 0
    spread = 5 * np.sqrt(rate * (1 - rate) / x.size) + 2**-16
    assert abs(dropped.mean() - rate) <= spread
    np.testing.assert_allclose(found[~dropped], 3.0 / (1 - rate), rtol=1e-6)
    if rate == 0.5:  # neighbours are drawn apart, and so are rows
        both = (dropped[:, :-1] & dropped[:, 1:]).mean(), (dropped[:-1] & dropped[1:]).mean()
        np.testing.assert_allclose(both, 0.25, atol=0.005)
        assert (dropped != np.asarray(layers.dropout(x, rate, jax.random.key(8)) == 0)).mean() > 0.45
