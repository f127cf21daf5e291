"""Rotary frequencies against transformers' functions, and the rotation itself. Whole models: test_llama.py."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from neuroada_jax.errors import UserError
from neuroada_jax.models.config_fields import Fields
from neuroada_jax.models.rope import Rope, RopeType, rotate, rotations

logging.set_verbosity_error()

N, MAX_POSITIONS = 64, 8192
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
YARN = {"factor": 8.0, "original_max_position_embeddings": 1024}
LONGROPE = {
    "factor": 8.0,
    "original_max_position_embeddings": 1024,
    "short_factor": np.linspace(1.0, 2.0, N // 2).tolist(),
    "long_factor": np.linspace(1.0, 30.0, N // 2).tolist(),
}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "llama3_other_factors": {"rope_type": "llama3", **LLAMA3, "factor": 32.0, "low_freq_factor": 2.0},
    "yarn": {"rope_type": "yarn", **YARN},
    "yarn_not_truncated": {"rope_type": "yarn", **YARN, "truncate": False},
    "yarn_betas": {"rope_type": "yarn", **YARN, "beta_fast": 8.0, "beta_slow": 2.0},
    "yarn_one_dimension": {"rope_type": "yarn", **YARN, "beta_fast": 2.0, "beta_slow": 2.0, "truncate": False},
    "yarn_mscale": {"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn_mscale_alone": {"rope_type": "yarn", **YARN, "mscale": 0.7},
    "yarn_attention_factor": {"rope_type": "yarn", **YARN, "attention_factor": 1.5},
    "longrope": {"rope_type": "longrope", **LONGROPE},
    "longrope_without_factor": {"rope_type": "longrope", **LONGROPE, "factor": None},
    "longrope_attention_factor": {"rope_type": "longrope", **LONGROPE, "attention_factor": 0.7},
}


def config(**fields):
    return {"max_position_embeddings": MAX_POSITIONS, "rope_theta": 500000.0, **fields}


def read(fields):
    return Rope.from_hf(Fields(fields), N, fields.get("max_position_embeddings", 2048))


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [100, 3 * MAX_POSITIONS])
def test_angles_equal_transformers(name, length):
    scaling = SCALINGS[name]
    reference = LlamaConfig(hidden_size=2 * N, num_attention_heads=2, **config(rope_scaling=dict(scaling)))
    seq_len = torch.tensor(length) if name == "dynamic" or "longrope" in name else None
    frequencies, scale = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](reference, device="cpu", seq_len=seq_len)
    positions = torch.tensor([0, 1, 7, length // 2, length - 1])
    angles = positions[:, None].float() * frequencies
    cos, sin = rotations(read(config(rope_scaling=scaling)), N, jnp.asarray(positions.numpy(), jnp.int32)[None])
    # One unit in the last place of a frequency is that many radians at the last position.
    tolerance = max(2e-6, 2e-7 * length)
    for got, want in ((cos, torch.cos(angles) * scale), (sin, torch.sin(angles) * scale)):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got[0], torch.cat([want, want], dim=1).numpy(), rtol=0, atol=tolerance)


def test_dynamic_is_the_default_up_to_the_pretraining_length():
    positions = jnp.arange(MAX_POSITIONS, dtype=jnp.int32)[None, -50:]
    dynamic = rotations(read(config(rope_scaling=SCALINGS["dynamic"])), N, positions)
    default = rotations(read(config()), N, positions)
    np.testing.assert_allclose(dynamic[0], default[0], rtol=0, atol=5e-3)
    longer = rotations(read(config(rope_scaling=SCALINGS["dynamic"])), N, positions + 1)
    assert not np.array_equal(longer[0][:, :-1], dynamic[0][:, 1:])


def test_default_angles_by_hand():
    cos, sin = rotations(Rope(theta=100.0), 4, jnp.asarray([[0, 3]], jnp.int32))
    np.testing.assert_allclose(cos[0], np.cos([[0, 0, 0, 0], [3, 0.3, 3, 0.3]]), rtol=0, atol=1e-6)
    np.testing.assert_allclose(sin[0], np.sin([[0, 0, 0, 0], [3, 0.3, 3, 0.3]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotate_turns_each_pair_by_its_angle(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 8)), dtype)
    positions = jnp.asarray([[0, 1, 2], [5, 9, 4]], jnp.int32)
    cos, sin = rotations(Rope(), 8, positions)
    y = rotate(x, cos, sin)
    assert y.dtype == dtype
    angle = np.arctan2(sin, cos)[..., :4][:, :, None]  # (B, T, 1, N/2)
    pair = np.asarray(x[..., :4], np.float64) + 1j * np.asarray(x[..., 4:], np.float64)
    turned = pair * np.exp(1j * angle)
    want = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=0, atol=1e-5 if dtype == jnp.float32 else 5e-2)
    np.testing.assert_array_equal(y[0, 0], x[0, 0])  # position 0


def test_scores_depend_on_the_distance_alone():
    rng = np.random.default_rng(1)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, N)), jnp.float32) for _ in range(2))

    def score(query_position, key_position):
        at = lambda x, position: rotate(x, *rotations(Rope(), N, jnp.full((1, 1), position, jnp.int32)))  # noqa: E731
        return float(jnp.sum(at(query, query_position) * at(key, key_position)))

    assert score(12, 5) == pytest.approx(score(107, 100), abs=1e-3)
    assert score(12, 5) != pytest.approx(score(12, 6), abs=1e-2)


def test_new_and_old_style_configs_give_the_same_rope():
    new = config(rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3})
    del new["rope_theta"]
    old = config(rope_scaling={"type": "llama3", **LLAMA3})
    assert read(new) == read(old) == read(config(rope_scaling=SCALINGS["llama3"]))


def test_what_a_config_leaves_out():
    plain = read({})
    assert (plain.rope_type, plain.theta) == (RopeType.DEFAULT, 10000.0)
    assert read(config(rope_scaling=None)).theta == 500000.0
    yarn = read(config(rope_scaling={"type": "yarn", "factor": 2.0, "beta_fast": None}))
    assert (yarn.original_max_positions, yarn.beta_fast, yarn.beta_slow) == (MAX_POSITIONS, 32, 1)
    outside = config(original_max_position_embeddings=77, rope_scaling={"rope_type": "yarn", **YARN})
    assert read(outside).original_max_positions == 77  # transformers prefers the config's own field


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 32}},
            r"rope_scaling.short_factor must be a list of 32 positive numbers, found \[1.0\]",
        ),
        ({"rope_scaling": {"type": "su"}}, "rope type 'su' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear' needs the field 'factor', which is missing"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' needs the field 'low_freq_factor'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, r"differ between layers \(full_attention\)"),
    ],
)
def test_what_is_not_supported_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        read(config(**fields))
