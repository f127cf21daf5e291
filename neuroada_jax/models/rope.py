"""Rotary position embedding: default, linear, dynamic, llama3, yarn and longrope, as in transformers.

Frequencies are (N / 2,) for an attention head of which N entries rotate, in radians per position. They are computed on the
host in float32, as in transformers, so that angles agree to the last bits at long positions too.
"""

import dataclasses
import enum
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neuroada_jax.errors import UserError, shown
from neuroada_jax.models.config_fields import LARGEST_POSITION, Fields


class RopeType(enum.StrEnum):
    """Scaling rules, under the names that Hugging Face configs use."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    LLAMA3 = "llama3"
    YARN = "yarn"
    LONGROPE = "longrope"


_NAMES = {member.value: member for member in RopeType}


class RopeRules(NamedTuple):
    """What rope parameters mean to one family, where families differ.

    Attributes:
      theta: of a config that has none.
      partial: whether the default rope has a `partial_rotary_factor`, too.
      names: the rope types of the family by the names that its configs use.
      original: `original_max_position_embeddings` of a config that has none; None: as long as the model's positions.
    """

    theta: float = 10000.0
    partial: bool = False
    names: Mapping[str, RopeType] = _NAMES
    original: int | None = None


PLAIN_RULES = RopeRules()


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
    fraction: float = 1.0  # of a head's entries, the first ones, that rotate
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @classmethod
    def from_hf(cls, fields: Fields, head_dim: int, max_positions: int, rules: RopeRules = PLAIN_RULES) -> "Rope":
        """Read `rope_scaling` or, where it is missing or empty, `rope_parameters`, as transformers does.

        Args:
          fields: of the config.json.
          head_dim: the width of a head.
          max_positions: the config's `max_position_embeddings`.
          rules: of the family.

        Raises:
          UserError: a rope type that is not in RopeType, lacks a field it needs or has one that is not supported, or rope
            parameters that differ by layer.
        """
        return cls.read(parameters(fields), fields, head_dim, max_positions, rules)

    @classmethod
    def read(cls, rope: Fields, fields: Fields, head_dim: int, max_positions: int, rules: RopeRules) -> "Rope":
        """Read one object of rope parameters; arguments and errors as in `from_hf`."""
        name = rope.get("rope_type", rope.get("type", RopeType.DEFAULT.value))
        if not isinstance(name, str) or name not in rules.names:
            raise UserError(f"config.json: rope type {shown(name)} is not supported; supported: {', '.join(rules.names)}")
        kind = rules.names[name]
        where = rope if "rope_theta" in rope.content else fields
        theta = where.number("rope_theta", rules.theta, positive=True)
        fraction = _fraction(kind, rope, fields, rules)
        if kind is RopeType.DEFAULT:
            return cls(theta=theta, original_max_positions=max_positions, max_positions=max_positions, fraction=fraction)
        for field in _NEEDED[kind]:
            if field not in rope.content:
                raise UserError(f"config.json: rope type {name!r} needs the field {field!r}, which is missing")
        if kind is RopeType.DYNAMIC and head_dim == 2:
            raise UserError("config.json: rope type 'dynamic' needs a head_dim above 2")
        if kind is RopeType.YARN and theta == 1.0:
            raise UserError("config.json: rope type 'yarn' needs a rope_theta other than 1")
        original = max_positions
        if kind in (RopeType.LLAMA3, RopeType.YARN, RopeType.LONGROPE):
            # A field of the config itself, or its default, comes before one of the rope parameters.
            name = "original_max_position_embeddings"
            where = fields if name in fields.content or rules.original else rope
            original = where.integer(name, rules.original or max_positions, most=LARGEST_POSITION)
        given: dict[str, Any] = {}
        if kind is RopeType.LLAMA3:
            given = {field: rope.number(field, positive=True) for field in ("low_freq_factor", "high_freq_factor")}
        if kind is RopeType.YARN:
            given = _yarn_fields(rope)
        if kind is RopeType.LONGROPE:
            given = _longrope_fields(rope, int(head_dim * fraction), original)
        if kind in (RopeType.YARN, RopeType.LONGROPE) and rope.get("factor") is None:
            factor = max_positions / original
        else:
            factor = rope.number("factor", positive=True)
        return cls(kind, theta, factor, original, max_positions, fraction=fraction, **given)


def by_attention(
    fields: Fields, head_dim: int, max_positions: int, thetas: Mapping[str, tuple[str, float]], scaled: Collection[str]
) -> list[Rope]:
    """Read the ropes of a model whose `rope_parameters` have an object for each kind of attention.

    Args:
      fields: of the config.json.
      head_dim: the width of a head.
      max_positions: the config's `max_position_embeddings`.
      thetas: kind of attention -> (the field that counts where its object has no `rope_theta`, its default).
      scaled: the kinds that the older `rope_scaling` changes.

    Raises:
      UserError: see `Rope.from_hf`; or a rope_scaling beside rope_parameters that lack such a kind.
    """
    nested, scaling = fields.get("rope_parameters"), fields.get("rope_scaling")
    for name, found in (("rope_parameters", nested), ("rope_scaling", scaling)):
        if found is not None and not isinstance(found, Mapping):
            raise fields.wrong(name, "an object")
    given, ropes = dict(nested or {}), []
    for name, (base, theta) in thetas.items():
        own = given.get(name) or {}
        if not isinstance(own, Mapping):
            raise UserError(f"config.json: rope_parameters.{name} must be an object, found {shown(own)}")
        if scaling is not None and name in scaled:
            if nested is not None and not own:
                raise UserError(f"config.json: rope_scaling beside rope_parameters without {name} is not supported")
            own = {**own, **scaling}
        default = fields.number(base, theta, positive=True)
        place = Fields(own, f"config.json: rope_parameters.{name}.")
        # No field of the config itself counts for one of several ropes.
        ropes.append(Rope.read(place, Fields({}), head_dim, max_positions, PLAIN_RULES._replace(theta=default)))
    return ropes


_NEEDED = {
    RopeType.LINEAR: ["factor"],
    RopeType.DYNAMIC: ["factor"],
    RopeType.YARN: ["factor"],
    RopeType.LLAMA3: ["factor", "low_freq_factor", "high_freq_factor"],
    RopeType.LONGROPE: ["short_factor", "long_factor"],
}


def parameters(fields: Fields) -> Fields:
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


def _fraction(kind: RopeType, rope: Fields, fields: Fields, rules: RopeRules) -> float:
    """Return the part of a head that rotates; refuse what leaves a part without rotation where that is not supported."""
    where = rope if "partial_rotary_factor" in rope.content else fields
    given = where is rope or fields.get("partial_rotary_factor") is not None
    if rules.partial:
        fields.read.add("partial_rotary_factor")
        return where.number("partial_rotary_factor", positive=True, below=1.0 + 1e-9) if given else 1.0
    if kind is not RopeType.DEFAULT and given and where.number("partial_rotary_factor") != 1.0:
        raise where.wrong("partial_rotary_factor", f"1.0 with rope type {kind.value!r}")
    return 1.0


def _longrope_fields(rope: Fields, width: int, original: int) -> dict[str, Any]:
    """Return the divisors of the frequencies, up to the original length and beyond, and the attention factor."""
    given: dict[str, Any] = {}
    for name, field in (("short_factor", "short_factors"), ("long_factor", "long_factors")):
        found = rope.get(name)
        numbers = found if isinstance(found, list) else []
        usable = all(isinstance(each, int | float) and not isinstance(each, bool) and 0 < each < 1e9 for each in numbers)
        if not usable or len(numbers) != width // 2 or width % 2:
            raise rope.wrong(name, f"a list of {width // 2} positive numbers")
        given[field] = tuple(map(float, numbers))
    if rope.get("attention_factor") is not None:
        given["attention_factor"] = rope.number("attention_factor")
    if original == 1:
        raise UserError("config.json: rope type 'longrope' needs an original_max_position_embeddings above 1")
    return given


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


def _longrope_frequencies(rope: Rope, width: int, positions: jax.Array) -> jax.Array:
    """Return the frequencies of longrope: those for long texts where any position is beyond the original length."""
    powers = np.power(np.float32(rope.theta), np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    short, long = (
        (1.0 / (np.asarray(factors, np.float32) * powers)).astype(np.float32)
        for factors in (rope.short_factors, rope.long_factors)
    )
    return jnp.where(jnp.max(positions) + 1 > rope.original_max_positions, jnp.asarray(long), jnp.asarray(short))


def _longrope_attention_factor(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_positions))


def rotations(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the cosines and sines of every position.

    Args:
      rope: static description.
      head_dim: the width of a head, even.
      positions: int32 (B, T).

    Returns: two float32 arrays (B, T, N), the second half repeating the first; N is the part of the head that rotates.
    """
    scale, head_dim = 1.0, int(head_dim * rope.fraction)
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
        case RopeType.LONGROPE:
            frequencies = _longrope_frequencies(rope, head_dim, positions)
            scale = _longrope_attention_factor(rope)
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
    """Rotate the first entries of queries or keys x (B, T, H, N) by the angles of `rotations`, in the dtype of x."""
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :width], cos, sin), x[..., width:]], axis=-1)
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    cos, sin = (a.astype(x.dtype)[:, :, None, :] for a in (cos, sin))
    return x * cos + turned * sin
