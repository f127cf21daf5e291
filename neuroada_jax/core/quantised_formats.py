"""Formats of quantised kernels: the arrays of each, and their entries in float32.

Every array of a kernel (*L, O, I) is (*L, O, width), so that it can be stacked by layer and split by neuron, or (*L, 1,
width), where all neurons share it. A row of a
kernel with many inputs takes, besides its codes,

    nf4         one of 16 numbers for each entry, two codes in a byte with the first in the high half, as bitsandbytes has
                them; a float32 scale ("absmax") for every 64 entries
    nf4_nested  the same with "double quantisation": the scales are codes too, of 8 bits, with a float32 scale for every
                256 of them, and one offset and one table of the 256 numbers that the codes stand for. These 256 do not end
                with a row: a row has the scales that it touches, and `phase`, the place of its first scale among 256
    int8        an integer for each entry, a float32 scale for the row (bitsandbytes' CB and SCB: entry = code scale / 127)
    fp8         a float8_e4m3fn for each entry; a float32 scale for the row, or for every 128 entries
    int4_128, ...  an integer of 4 or 8 bits for each entry, two of 4 bits in a byte as in nf4; for every 32, 64 or 128
                entries, or for the row, a float16 scale and an integer as the zero point: entry = (code - zero) scale, as
                GPTQ and AWQ have it. With "_any_order" neurons share a list of the group of each input
    Q4_1, ...   GGUF's blocks (core/gguf_blocks.py)
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from neuroada_jax.core import gguf_blocks
from neuroada_jax.core.gguf_blocks import BLOCKS, Parts
from neuroada_jax.errors import UserError

NF4_BLOCK = 64  # entries of a scale
NESTED_BLOCK = 256  # scales of a scale of scales
FP8_BLOCK = 128
GROUPS = (32, 64, 128)  # entries of a scale of an integer format; or those of a row
ANY_ORDER = "_any_order"
_INT8_STEP = 7.874015718698502e-3  # 1 / 127, as bitsandbytes has it

# The quantiles of a normal distribution that QLoRA (arXiv 2305.14314) defines as NF4.
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


class Part(NamedTuple):
    """An array of a format: its dtype, its width for a number of inputs, and whether all neurons share it."""

    dtype: Any
    width: Callable[[int], int]
    shared: bool = False


class Format(NamedTuple):
    """A format of quantised kernels.

    Attributes:
      block: the inputs of a scale, which must divide those of a kernel.
      parts: its arrays by name.
      decode: arrays -> float32 (*L, O, I).
    """

    block: int
    parts: dict[str, Part]
    decode: Callable[[Parts], Array]


@functools.cache
def dynamic_map() -> np.ndarray:
    """Return the 256 numbers of bitsandbytes' signed dynamic 8-bit type, ascending, float32."""
    numbers = [0.0, 1.0]
    for exponent in range(7):
        bounds = np.linspace(0.1, 1, 2**exponent + 1, dtype=np.float32)
        scaled = np.float32(10.0 ** (exponent - 6)) * ((bounds[:-1] + bounds[1:]) / np.float32(2))
        numbers += [*scaled.tolist(), *(-scaled).tolist()]
    return np.sort(np.array(numbers, np.float32))


def nested_width(inputs: int) -> int:
    """Return how many scales of scales the scales of one row touch at most."""
    own = inputs // NF4_BLOCK
    return -(-(NESTED_BLOCK - math.gcd(own, NESTED_BLOCK) + own) // NESTED_BLOCK)


def _rounded(product: Array) -> Array:
    """Return a finite product such that it is rounded before anything else is done with it, as bitsandbytes does.

    Otherwise XLA fuses it with a sum into one operation, or multiplies two factors first.
    """
    largest = jnp.finfo(jnp.float32).max
    return lax.clamp(-largest, product, largest)


def _halves(codes: Array) -> Array:
    """Return two codes of 4 bits for each byte, the one in the high half first, as (..., 2)."""
    return jnp.stack([codes >> jnp.uint8(4), codes & jnp.uint8(15)], axis=-1)


def _nf4_entries(codes: Array, absmax: Array) -> Array:
    numbers = jnp.take(jnp.asarray(NF4), _halves(codes), mode="clip")
    return (numbers.reshape(*absmax.shape, -1) * absmax[..., None]).reshape(*codes.shape[:-1], -1)


def _nf4(parts: Parts) -> Array:
    return _nf4_entries(parts["codes"], parts["absmax"])


def nested_absmax(parts: Parts) -> Float[Array, "*L O _"]:
    """Return the scales of an nf4_nested kernel in float32."""
    codes, nested = parts["absmax"], parts["nested"]
    place = parts["phase"].astype(jnp.int32) + lax.broadcasted_iota(jnp.int32, codes.shape, codes.ndim - 1)
    scales = jnp.take_along_axis(nested, place // NESTED_BLOCK, axis=-1, mode="clip")
    table, flat = parts["table"], codes.reshape(*codes.shape[:-2], 1, -1).astype(jnp.int32)
    product = jnp.take_along_axis(table, flat, axis=-1, mode="clip").reshape(codes.shape) * scales
    return _rounded(product) + parts["offset"]


def _nf4_nested(parts: Parts) -> Array:
    return _nf4_entries(parts["codes"], nested_absmax(parts))


def _int8(parts: Parts) -> Array:
    return _rounded(parts["codes"].astype(jnp.float32) * parts["scale"]) * jnp.float32(_INT8_STEP)


def _fp8(parts: Parts) -> Array:
    codes, scale = parts["codes"], parts["scale"]
    blocks = codes.astype(jnp.float32).reshape(*scale.shape, -1)
    return (blocks * scale[..., None]).reshape(codes.shape)


def _of_integers(parts: Parts, width: int) -> Array:
    """Return the entries of integers of which a byte holds `width`."""
    codes = parts["codes"]
    numbers = (_halves(codes) if width == 2 else codes).reshape(*codes.shape[:-1], -1).astype(jnp.float32)
    scale, zero = (parts[name].astype(jnp.float32) for name in ("scale", "zero"))
    if "group" in parts:
        own = [jnp.take_along_axis(each, parts["group"], axis=-1, mode="clip") for each in (scale, zero)]
        return (numbers - own[1]) * own[0]
    groups = numbers.reshape(*scale.shape, -1)
    return ((groups - zero[..., None]) * scale[..., None]).reshape(numbers.shape)


def integers(bits: int, group: int | None, *, any_order: bool = False) -> str:
    """Return the name of the format of integers with a scale and a zero point for each group of entries; None: the row."""
    return f"int{bits}_{group or 'row'}{ANY_ORDER if any_order else ''}"


def _integer_format(bits: int, group: int | None, any_order: bool) -> Format:
    width = 8 // bits
    of_groups = lambda inputs: inputs // group if group else 1  # noqa: E731
    parts = {
        "codes": Part(jnp.uint8, lambda inputs: inputs // width),
        "scale": Part(jnp.float16, of_groups),
        "zero": Part(jnp.uint8, of_groups),
    }
    if any_order:
        parts["group"] = Part(jnp.int32, lambda inputs: inputs, shared=True)
    return Format(group or width, parts, functools.partial(_of_integers, width=width))


# By name: bits, entries of a group (None: those of a row), whether the inputs of a group are anywhere in the row.
_INTEGERS = {
    integers(bits, group, any_order=any_order): (bits, group, any_order)
    for bits in (4, 8)
    for group, any_order in ((None, False), *itertools.product(GROUPS, (False, True)))
}


def _of_blocks(name: str) -> Format:
    block = BLOCKS[name]
    parts = {
        field: Part(dtype, functools.partial(lambda count, inputs: inputs // block.entries * count, count))
        for field, (dtype, count) in block.fields.items()
    }
    return Format(block.entries, parts, lambda parts: gguf_blocks.decode(parts, block))


_CODES = Part(jnp.uint8, lambda inputs: inputs // 2)
FORMATS: dict[str, Format] = {
    "nf4": Format(NF4_BLOCK, {"codes": _CODES, "absmax": Part(jnp.float32, lambda inputs: inputs // NF4_BLOCK)}, _nf4),
    "nf4_nested": Format(
        NF4_BLOCK,
        {
            "codes": _CODES,
            "absmax": Part(jnp.uint8, lambda inputs: inputs // NF4_BLOCK),
            "nested": Part(jnp.float32, nested_width),
            "phase": Part(jnp.uint8, lambda _: 1),
            "offset": Part(jnp.float32, lambda _: 1, shared=True),
            "table": Part(jnp.float32, lambda _: 256, shared=True),
        },
        _nf4_nested,
    ),
    "int8": Format(1, {"codes": Part(jnp.int8, lambda inputs: inputs), "scale": Part(jnp.float32, lambda _: 1)}, _int8),
    "fp8": Format(
        1, {"codes": Part(jnp.float8_e4m3fn, lambda inputs: inputs), "scale": Part(jnp.float32, lambda _: 1)}, _fp8
    ),
    "fp8_blocks": Format(
        FP8_BLOCK,
        {
            "codes": Part(jnp.float8_e4m3fn, lambda inputs: inputs),
            "scale": Part(jnp.float32, lambda inputs: inputs // FP8_BLOCK),
        },
        _fp8,
    ),
    **{name: _integer_format(*fields) for name, fields in _INTEGERS.items()},
    **{name: _of_blocks(name) for name in BLOCKS},
}
# By the name of the array that has as many numbers as a format's inputs, or a fixed part of them: (array, inputs of each).
_INPUTS = {
    "nf4": ("codes", 2),
    "nf4_nested": ("codes", 2),
    "int8": ("codes", 1),
    "fp8": ("codes", 1),
    "fp8_blocks": ("codes", 1),
    **{name: ("codes", 8 // bits) for name, (bits, _, _) in _INTEGERS.items()},
    **{name: ("scale", block.entries) for name, block in BLOCKS.items()},
}


def shape_of(parts: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Return the shape (*L, O, I) of the kernel with these arrays."""
    array, each = _INPUTS[name]
    *leading, width = parts[array].shape
    return (*leading, width * each)


def bits(name: str, inputs: int) -> float:
    """Return the bits that an entry takes; arrays that all neurons share are not counted."""
    own = (part for part in FORMATS[name].parts.values() if not part.shared)
    sizes = (jnp.dtype(part.dtype).itemsize * part.width(inputs) for part in own)
    return 8 * sum(sizes) / inputs


def check_inputs(name: str, inputs: int, of: str) -> None:
    """Check that the blocks of a format divide the inputs of a map.

    Raises:
      UserError: they do not; names the map.
    """
    block = FORMATS[name].block
    if inputs % block:
        raise UserError(f"{of}: {name} has blocks of {block} inputs, which do not divide its {inputs} inputs")
