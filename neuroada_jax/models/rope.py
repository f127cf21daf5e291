"""Rotary position embedding of the LLaMA family: default, linear, dynamic, llama3 and yarn, as in transformers.

Frequencies are (N / 2,) for an attention head of width N, in radians per position. They are computed on the host in
float32, as in transformers, so that angles agree to the last bits at long positions too.
"""

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neuroada_jax.errors import UserError
from neuroada_jax.models.config_fields import LARGEST_POSITION, Fields, shown


class RopeType(enum.StrEnum):
    """Scaling rules, under the names that Hugging Face configs use."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    LLAMA3 = "llama3"
    YARN = "yarn"


@dataclasses.dataclass(frozen=True)
class Rope:
    """Static description of a rotary embedding, after the `rope_parameters` of a Hugging Face config."""

    rope_type: RopeType = RopeType.DEFAULT
    theta: float = 10000.0
    factor: float = 1.0
    original_max_positions: int = 2048
    max_positions: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @classmethod
    def from_hf(cls, fields: Fields, head_dim: int, max_positions: int) -> "Rope":
        """Read `rope_scaling` or, where it is missing or empty, `rope_parameters`, as transformers does.

        Args:
          fields: of the config.json.
          head_dim: N.
          max_positions: the config's `max_position_embeddings`.

        Raises:
          UserError: a rope type that is not in RopeType, lacks a field it needs or has one that is not supported, or rope
            parameters that differ by layer.
        """
        rope = _parameters(fields)
        known = [member.value for member in RopeType]
        name = rope.get("rope_type", rope.get("type", RopeType.DEFAULT.value))
        if name not in known:
            raise UserError(f"config.json: rope type {shown(name)} is not supported; supported: {', '.join(known)}")
        kind = RopeType(name)
        where = rope if "rope_theta" in rope.content else fields
        theta = where.number("rope_theta", 10000.0, positive=True)
        if kind is RopeType.DEFAULT:
            return cls(theta=theta, original_max_positions=max_positions, max_positions=max_positions)
        for field in _NEEDED[kind]:
            if field not in rope.content:
                raise UserError(f"config.json: rope type {name!r} needs the field {field!r}, which is missing")
        _check_width(kind, theta, rope, fields, head_dim)
        original = max_positions
        if kind in (RopeType.LLAMA3, RopeType.YARN):
            # A field of the config itself comes before one of the rope parameters.
            where = fields if "original_max_position_embeddings" in fields.content else rope
            original = where.integer("original_max_position_embeddings", max_positions, most=LARGEST_POSITION)
        given: dict[str, Any] = {}
        if kind is RopeType.LLAMA3:
            given = {field: rope.number(field, positive=True) for field in ("low_freq_factor", "high_freq_factor")}
        if kind is RopeType.YARN:
            given = _yarn_fields(rope)
        if kind is RopeType.YARN and rope.get("factor") is None:
            factor = max_positions / original
        else:
            factor = rope.number("factor", positive=True)
        return cls(kind, theta, factor, original, max_positions, **given)


_NEEDED = {
    RopeType.LINEAR: ["factor"],
    RopeType.DYNAMIC: ["factor"],
    RopeType.YARN: ["factor"],
    RopeType.LLAMA3: ["factor", "low_freq_factor", "high_freq_factor"],
}


def _parameters(fields: Fields) -> Fields:
    """Return the fields of the rope parameters that count, none where the config has none."""
    for name in ("rope_scaling", "rope_parameters"):
        found = fields.get(name)
        if found is None or found == {}:
            continue
        if not isinstance(found, Mapping):
            raise fields.wrong(name, "an object")
        if nested := [key for key, value in found.items() if isinstance(value, Mapping)]:
            raise UserError(f"config.json: {name} differ between layers ({', '.join(nested)}), not supported")
        return Fields(found, f"config.json: {name}.")
    return Fields({})


def _check_width(kind: RopeType, theta: float, rope: Fields, fields: Fields, head_dim: int) -> None:
    """Refuse what leaves a part of a head without rotation, which the default rope never does, or has no frequencies."""
    where = rope if "partial_rotary_factor" in rope.content else fields
    partial = where is rope or fields.get("partial_rotary_factor") is not None
    if partial and where.number("partial_rotary_factor") != 1.0:
        raise where.wrong("partial_rotary_factor", f"1.0 with rope type {kind.value!r}")
    if kind is RopeType.DYNAMIC and head_dim == 2:
        raise UserError("config.json: rope type 'dynamic' needs a head_dim above 2")
    if kind is RopeType.YARN and theta == 1.0:
        raise UserError("config.json: rope type 'yarn' needs a rope_theta other than 1")


def _yarn_fields(rope: Fields) -> dict[str, Any]:
    """Return the optional fields of YaRN; as in transformers, 0 is no value but for `attention_factor`."""
    given: dict[str, Any] = {}
    for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if rope.get(name) is not None and rope.number(name):
            given[name] = rope.number(name)
    if rope.get("attention_factor") is not None:
        given["attention_factor"] = rope.number("attention_factor")
    if "truncate" in rope.content:  # null is false
        given["truncate"] = rope.get("truncate") is not None and rope.flag("truncate", True)
    return given


def _plain_frequencies(theta: float, head_dim: int) -> np.ndarray:
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (1.0 / np.power(np.float32(theta), exponents)).astype(np.float32)


def _llama3_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    plain = _plain_frequencies(rope.theta, head_dim)
    wavelength = 2 * math.pi / plain
    low_wavelength = rope.original_max_positions / rope.low_freq_factor
    high_wavelength = rope.original_max_positions / rope.high_freq_factor
    slowed = np.where(wavelength > low_wavelength, plain / rope.factor, plain)
    smooth = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smoothed = (1 - smooth) * slowed / rope.factor + smooth * slowed
    medium = (wavelength >= high_wavelength) & (wavelength <= low_wavelength)
    return np.where(medium, smoothed, slowed).astype(np.float32)


def _yarn_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    plain = _plain_frequencies(rope.theta, head_dim)

    def dimension_of(rotations: float) -> float:
        ratio = rope.original_max_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as transformers does, against a division by zero
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return (plain / rope.factor * ramp + plain * (1 - ramp)).astype(np.float32)


def _yarn_attention_factor(rope: Rope) -> float:
    def mscale(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.factor, rope.mscale) / mscale(rope.factor, rope.mscale_all_dim)
    return mscale(rope.factor)


def rotations(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the cosines and sines of every position.

    Args:
      rope: static description.
      head_dim: N, even.
      positions: int32 (B, T).

    Returns: two float32 arrays (B, T, N), the second half repeating the first.
    """
    scale = 1.0
    frequencies: jax.Array
    match rope.rope_type:
        case RopeType.DEFAULT:
            frequencies = jnp.asarray(_plain_frequencies(rope.theta, head_dim))
        case RopeType.LINEAR:
            frequencies = jnp.asarray(_plain_frequencies(rope.theta, head_dim) / np.float32(rope.factor))
        case RopeType.LLAMA3:
            frequencies = jnp.asarray(_llama3_frequencies(rope, head_dim))
        case RopeType.YARN:
            frequencies = jnp.asarray(_yarn_frequencies(rope, head_dim))
            scale = _yarn_attention_factor(rope)
        case RopeType.DYNAMIC:
            # NTK scaling: beyond the pretraining length, theta grows with the longest position of the batch.
            length = jnp.maximum(jnp.max(positions) + 1, rope.max_positions).astype(jnp.float32)
            growth = rope.factor * length / rope.max_positions - (rope.factor - 1)
            theta = rope.theta * growth ** (head_dim / (head_dim - 2))
            frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate queries or keys x (B, T, H, N) by the angles of `rotations`, in the dtype of x."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    cos, sin = (a.astype(x.dtype)[:, :, None, :] for a in (cos, sin))
    return x * cos + turned * sin
