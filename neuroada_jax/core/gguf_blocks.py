"""Decoders of GGUF's block formats in JAX, equal to those of the `gguf` package to the last bit.

A row of a weight is a sequence of blocks of 32 or 256 entries. In the file the fields of a block follow one another; here
each field is an array of its own, (*L, O, blocks * width), so that it is aligned and every array is split by neuron.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Parts = Mapping[str, Any]


class Field(NamedTuple):
    """A field of a block: its dtype, and how many of it a block has."""

    dtype: Any
    number: int


class BlockFormat(NamedTuple):
    """A block format.

    Attributes:
      entries: of a block.
      fields: by name, in the order in which the file has them.
      decode: (fields (*L, O, blocks, count)) -> float32 (*L, O, blocks, entries).
    """

    entries: int
    fields: dict[str, Field]
    decode: Callable[[Parts], Array]

    @property
    def nbytes(self) -> int:
        """The bytes of a block."""
        return sum(np.dtype(field.dtype).itemsize * field.number for field in self.fields.values())


def split_fields(blocks: np.ndarray, block: BlockFormat) -> dict[str, np.ndarray]:
    """Return the fields of stored rows, uint8 (*L, O, bytes), as arrays (*L, O, blocks * count)."""
    each = blocks.reshape(*blocks.shape[:-1], -1, block.nbytes)
    parts, start = {}, 0
    for name, (dtype, count) in block.fields.items():
        stop = start + np.dtype(dtype).itemsize * count
        found = np.ascontiguousarray(each[..., start:stop]).view(np.dtype(dtype).newbyteorder("<"))
        parts[name] = found.reshape(*blocks.shape[:-1], -1).astype(dtype, copy=False)
        start = stop
    return parts


def decode(parts: Parts, block: BlockFormat) -> Float[Array, "*L O I"]:
    """Return the entries in float32."""
    fields = {}
    for name, (_, count) in block.fields.items():
        part = jnp.asarray(parts[name])
        fields[name] = part.reshape(*part.shape[:-1], -1, count)
    entries = block.decode(fields)
    return entries.reshape(*entries.shape[:-2], -1)


def _wide(numbers: Array) -> Array:
    return numbers.astype(jnp.float32)


def _parts_of_bytes(packed: Array, bits: int, width: int) -> Array:
    """Return the 8 / bits numbers of every byte, (..., n) -> (..., n / width, 8 / bits, width): lowest bits first."""
    groups = packed.reshape(*packed.shape[:-1], -1, 1, width)
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8).reshape((1,) * (groups.ndim - 2) + (-1, 1))
    return (groups >> shifts) & jnp.uint8(2**bits - 1)


def _nibbles(packed: Array, width: int) -> Array:
    """Return the 4-bit numbers of bytes, (..., n) -> (..., 2n): of every `width` bytes first all low ones."""
    return _parts_of_bytes(packed, 4, width).reshape(*packed.shape[:-1], -1)


def _fifth_bits(high: Array) -> Array:
    """Return the 32 bits of uint32 (..., 1) as uint8 0 or 16, (..., 32)."""
    places = jnp.arange(32, dtype=jnp.uint32).reshape((1,) * (high.ndim - 1) + (-1,))
    bits = (high >> places) & jnp.uint32(1)
    return bits.astype(jnp.uint8) << jnp.uint8(4)


def _q8_0(block: Parts) -> Array:
    return _wide(block["codes"]) * _wide(block["scale"])


def _q4_0(block: Parts) -> Array:
    return _wide(block["scale"]) * (_wide(_nibbles(block["codes"], 16)) - 8.0)


def _q4_1(block: Parts) -> Array:
    return _wide(block["scale"]) * _wide(_nibbles(block["codes"], 16)) + _wide(block["minimum"])


def _q5_0(block: Parts) -> Array:
    codes = _nibbles(block["codes"], 16) | _fifth_bits(block["high"])
    return _wide(block["scale"]) * (_wide(codes) - 16.0)


def _q5_1(block: Parts) -> Array:
    codes = _nibbles(block["codes"], 16) | _fifth_bits(block["high"])
    return _wide(block["scale"]) * _wide(codes) + _wide(block["minimum"])


def _scales_and_minima(block: Parts) -> tuple[Array, Array]:
    """Return the products of the float16 scale and minimum of a K block with the 6-bit ones of its 8 parts, (..., 8, 1)."""
    packed = block["scales"]
    scale, minimum, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    low, high, two = jnp.uint8(0x0F), jnp.uint8(0x30), jnp.uint8(2)
    scales = jnp.concatenate([scale & jnp.uint8(0x3F), (rest & low) | ((scale >> two) & high)], axis=-1)
    minima = jnp.concatenate([minimum & jnp.uint8(0x3F), (rest >> jnp.uint8(4)) | ((minimum >> two) & high)], axis=-1)
    return tuple(
        (_wide(factor) * _wide(each))[..., None] for factor, each in ((block["scale"], scales), (block["minimum"], minima))
    )  # type: ignore[return-value]


def _q4_k(block: Parts) -> Array:
    scales, minima = _scales_and_minima(block)
    codes = _parts_of_bytes(block["codes"], 4, 32)
    return _flat(scales * _wide(codes.reshape(*codes.shape[:-3], 8, 32)) - minima)


def _q5_k(block: Parts) -> Array:
    scales, minima = _scales_and_minima(block)
    low = _parts_of_bytes(block["codes"], 4, 32)
    high = _parts_of_bytes(block["high"], 1, 32)
    codes = low.reshape(*low.shape[:-3], 8, 32) | (high.reshape(*high.shape[:-3], 8, 32) << jnp.uint8(4))
    return _flat(scales * _wide(codes) - minima)


def _q6_k(block: Parts) -> Array:
    low = _parts_of_bytes(block["codes"], 4, 64)
    high = _parts_of_bytes(block["high"], 2, 32)
    codes = low.reshape(*low.shape[:-3], 8, 32) | (high.reshape(*high.shape[:-3], 8, 32) << jnp.uint8(4))
    scales = (_wide(block["scale"]) * _wide(block["scales"]))[..., None]
    return _flat(scales * (_wide(codes.reshape(*codes.shape[:-2], 16, 16)) - 32.0))


def _flat(entries: Array) -> Array:
    return entries.reshape(*entries.shape[:-2], -1)


_HALF, _BYTE = np.float16, np.uint8
BLOCKS: dict[str, BlockFormat] = {
    "Q8_0": BlockFormat(32, {"scale": Field(_HALF, 1), "codes": Field(np.int8, 32)}, _q8_0),
    "Q4_0": BlockFormat(32, {"scale": Field(_HALF, 1), "codes": Field(_BYTE, 16)}, _q4_0),
    "Q4_1": BlockFormat(32, {"scale": Field(_HALF, 1), "minimum": Field(_HALF, 1), "codes": Field(_BYTE, 16)}, _q4_1),
    "Q5_0": BlockFormat(32, {"scale": Field(_HALF, 1), "high": Field(np.uint32, 1), "codes": Field(_BYTE, 16)}, _q5_0),
    "Q5_1": BlockFormat(
        32,
        {"scale": Field(_HALF, 1), "minimum": Field(_HALF, 1), "high": Field(np.uint32, 1), "codes": Field(_BYTE, 16)},
        _q5_1,
    ),
    "Q4_K": BlockFormat(
        256,
        {"scale": Field(_HALF, 1), "minimum": Field(_HALF, 1), "scales": Field(_BYTE, 12), "codes": Field(_BYTE, 128)},
        _q4_k,
    ),
    "Q5_K": BlockFormat(
        256,
        {
            "scale": Field(_HALF, 1),
            "minimum": Field(_HALF, 1),
            "scales": Field(_BYTE, 12),
            "high": Field(_BYTE, 32),
            "codes": Field(_BYTE, 128),
        },
        _q5_k,
    ),
    "Q6_K": BlockFormat(
        256,
        {"codes": Field(_BYTE, 128), "high": Field(_BYTE, 64), "scales": Field(np.int8, 16), "scale": Field(_HALF, 1)},
        _q6_k,
    ),
}
