"""The header of a GGUF file: metadata and where each tensor lies.

Parsed here instead of with ``gguf.GGUFReader``: that class makes several numpy arrays per vocabulary entry, which
takes 2 s for 49k tokens and 10 s for 128k, and a short file surfaces as a numpy error about shapes.  One pass over
the memory map takes a tenth of that and knows what it was reading when the bytes ran out.
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from neuroada_jax.errors import UserError

# GGUF metadata value types, by id; 8 (string) and 9 (array) have no fixed size.
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9


class TensorInfo(NamedTuple):
    """Where one tensor lies: shape with the slowest axis first, storage type, bytes in the file."""

    shape: tuple[int, ...]
    qtype: GGMLQuantizationType
    start: int
    nbytes: int


class Header(NamedTuple):
    """Everything in front of the tensor data, and the memory map (uint8) of the whole file."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: np.ndarray

    def raw(self, info: TensorInfo) -> memoryview:
        """The stored bytes of one tensor, a read-only view of the file."""
        return self.data[info.start : info.start + info.nbytes].data


def read_header(path: str | Path) -> Header:
    """Parse metadata and tensor table of a GGUF file (version 2 or 3, little-endian); no tensor data is read.

    Strings come as ``str``, numbers as Python numbers, arrays as lists of ``str`` or numpy arrays.
    Raises UserError, naming the file, if it is missing, is not GGUF, or ends before its own last tensor.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file, expected a GGUF file")
    data = np.memmap(path, mode="r", dtype=np.uint8) if Path(path).stat().st_size else np.empty(0, np.uint8)
    if bytes(data[:4]) != b"GGUF":
        raise UserError(f"{path}: not a GGUF file, starts with {bytes(data[:4])!r}, expected b'GGUF'")
    try:
        metadata, table, end = _parse(data.data, path)
    except (struct.error, ValueError) as error:  # a length or a string ran past the end, or is not UTF-8
        raise UserError(f"{path}: truncated or damaged GGUF header in {data.size} bytes ({error})") from error
    alignment = metadata.get("general.alignment", 32)
    origin = -(-end // alignment) * alignment
    tensors = {}
    for name, shape, type_id, offset in table:
        try:
            qtype = GGMLQuantizationType(type_id)
        except ValueError:
            raise UserError(f"{path}: tensor {name} has unknown GGML type {type_id}") from None
        block, block_bytes = GGML_QUANT_SIZES[qtype]
        info = TensorInfo(shape, qtype, origin + offset, math.prod(shape) // block * block_bytes)
        if info.start + info.nbytes > data.size:
            raise UserError(
                f"{path}: truncated GGUF, {data.size} bytes found, tensor {name} ends at byte {info.start + info.nbytes}"
            )
        tensors[name] = info
    return Header(metadata, tensors, data)


def _parse(view: memoryview, path) -> tuple[dict, list, int]:
    """``(metadata, [(name, shape, type id, offset)], end of the table)``; struct.error or ValueError if short."""
    version, tensor_count, kv_count = struct.unpack_from("<IQQ", view, 4)
    if version not in (2, 3):
        hint = " (big-endian)" if version & 0xFFFF == 0 else ""
        raise UserError(f"{path}: GGUF version {version}{hint}, expected little-endian version 2 or 3")
    u32, u64 = struct.Struct("<I").unpack_from, struct.Struct("<Q").unpack_from
    pos = 24

    def number(unpack, size):
        nonlocal pos
        pos += size
        return unpack(view, pos - size)[0]

    def strings(count):
        nonlocal pos
        out = []
        for _ in range(count):
            start = pos + 8
            pos = start + u64(view, pos)[0]
            if pos > len(view):
                raise ValueError(f"a string ends at byte {pos}")
            out.append(str(view[start:pos], "utf-8"))
        return out

    def numbers(dtype, count):
        nonlocal pos
        out = np.frombuffer(view, dtype, count, pos) if count else np.empty(0, dtype)
        pos += out.nbytes
        return out

    def value(kind):
        if kind == _STRING:
            return strings(1)[0]
        if kind == _ARRAY:
            kind, count = number(u32, 4), number(u64, 8)
            if kind == _STRING:
                return strings(count)
            if kind in _NUMBERS:
                return numbers(_NUMBERS[kind], count)
        elif kind in _NUMBERS:
            return numbers(_NUMBERS[kind], 1)[0].item()
        raise ValueError(f"metadata value type {kind} at byte {pos}")

    metadata = {}
    for _ in range(kv_count):
        key = strings(1)[0]
        metadata[key] = value(number(u32, 4))
    table = []
    for _ in range(tensor_count):
        name = strings(1)[0]
        dims = numbers("<u8", number(u32, 4)).tolist()
        table.append((name, tuple(reversed(dims)), number(u32, 4), number(u64, 8)))
    return metadata, table, pos
