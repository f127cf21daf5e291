"""Header of a GGUF file: its metadata and the place of each tensor.

It is parsed here instead of with `gguf.GGUFReader`, which makes several numpy arrays for each vocabulary entry (2 s for 49k
tokens, 10 s for 128k) and reports a truncated file as a numpy error about shapes. One pass over the memory map takes a
tenth of that time, and its errors name the field at which the file ends.
"""

import math
import mmap
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
_DIMENSIONS = 4  # of a tensor, in GGML
_LARGEST = 2**31 - 1  # size of one of them
_ALIGNMENTS = [2**power for power in range(3, 17)]


class TensorInfo(NamedTuple):
    """One tensor of the file: shape with the slowest axis first, storage type, first byte and number of bytes."""

    shape: tuple[int, ...]
    qtype: GGMLQuantizationType
    start: int
    nbytes: int


class Header(NamedTuple):
    """Metadata and tensor table of a GGUF file, and the memory map (uint8) of the complete file."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: np.ndarray

    def raw(self, info: TensorInfo) -> memoryview:
        """Return the stored bytes of one tensor, a read-only view of the file."""
        return self.data[info.start : info.start + info.nbytes].data

    def release(self, info: TensorInfo) -> None:
        """Let the system take back the memory of a tensor's part of the file; it is read again where it is needed."""
        mapped = getattr(self.data, "_mmap", None)
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            first = info.start // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, first, info.start + info.nbytes - first)


def read_header(path: str | Path) -> Header:
    """Parse metadata and tensor table of a GGUF file (version 2 or 3, little-endian); no tensor data is read.

    Metadata strings become `str`, numbers Python numbers, arrays lists of `str` or numpy arrays.

    Raises:
      UserError: the file is missing, is not GGUF, or ends before its last tensor.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file, expected a GGUF file")
    data = np.memmap(path, mode="r", dtype=np.uint8) if Path(path).stat().st_size else np.empty(0, np.uint8)
    if bytes(data[:4]) != b"GGUF":
        raise UserError(f"{path}: not a GGUF file, starts with {bytes(data[:4])!r}, expected b'GGUF'")
    try:
        metadata, table, end = _Parser(data.data, path).parse()
    # A length or a string ran past the end, is no number of this machine, or is not UTF-8.
    except (struct.error, ValueError, OverflowError) as error:
        raise UserError(f"{path}: truncated or damaged GGUF header in {data.size} bytes ({error})") from error
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment not in _ALIGNMENTS:
        raise UserError(f"{path}: general.alignment is {alignment!r}, expected a power of two up to {_ALIGNMENTS[-1]}")
    origin = -(-end // alignment) * alignment
    tensors = {}
    for name, shape, type_id, offset in table:
        try:
            qtype = GGMLQuantizationType(type_id)
        except ValueError:
            raise UserError(f"{path}: tensor {name} has unknown GGML type {type_id}") from None
        if len(shape) > _DIMENSIONS or not all(0 < size <= _LARGEST for size in shape):
            raise UserError(f"{path}: tensor {name} has shape {str(list(shape))[:80]}, expected 1 to 4 positive sizes")
        block, block_bytes = GGML_QUANT_SIZES[qtype]
        if shape and shape[-1] % block:
            raise UserError(f"{path}: tensor {name} has rows of {shape[-1]} in blocks of {block} ({qtype.name})")
        info = TensorInfo(shape, qtype, origin + offset, math.prod(shape) // block * block_bytes)
        if info.start + info.nbytes > data.size:
            raise UserError(
                f"{path}: truncated GGUF, {data.size} bytes found, tensor {name} ends at byte {info.start + info.nbytes}"
            )
        tensors[name] = info
    return Header(metadata, tensors, data)


_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class _Parser:
    """Reader of the fields of a header, one after the other; struct.error or ValueError where the bytes run out."""

    def __init__(self, view: memoryview, path: str | Path) -> None:
        self._view, self._path, self._position = view, path, 0

    def parse(self) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], int, int]], int]:
        """Return (metadata, [(name, shape, type id, offset)], end of the table)."""
        version, tensor_count, entry_count = struct.unpack_from("<IQQ", self._view, 4)
        if version not in (2, 3):
            hint = " (big-endian)" if version & 0xFFFF == 0 else ""
            raise UserError(f"{self._path}: GGUF version {version}{hint}, expected little-endian version 2 or 3")
        self._position = 24
        metadata = {}
        for _ in range(entry_count):
            (key,) = self._strings(1)
            metadata[key] = self._value(self._number(_U32))
        table = []
        for _ in range(tensor_count):
            (name,) = self._strings(1)
            dimensions = self._numbers("<u8", self._number(_U32)).tolist()
            table.append((name, tuple(reversed(dimensions)), self._number(_U32), self._number(_U64)))
        return metadata, table, self._position

    def _number(self, layout: struct.Struct) -> int:
        self._position += layout.size
        return layout.unpack_from(self._view, self._position - layout.size)[0]

    def _strings(self, count: int) -> list[str]:
        view, length_at, position = self._view, _U64.unpack_from, self._position  # locals: a vocabulary has 128k strings
        found = []
        for _ in range(count):
            start = position + 8
            position = start + length_at(view, position)[0]
            if position > len(view):
                raise ValueError(f"a string ends at byte {position}")
            found.append(str(view[start:position], "utf-8"))
        self._position = position
        return found

    def _numbers(self, dtype: str, count: int) -> np.ndarray:
        found = np.frombuffer(self._view, dtype, count, self._position) if count else np.empty(0, dtype)
        self._position += found.nbytes
        return found

    def _value(self, kind: int) -> Any:
        """Return a metadata value of one of GGUF's types."""
        if kind == _STRING:
            return self._strings(1)[0]
        if kind == _ARRAY:
            kind, count = self._number(_U32), self._number(_U64)
            if kind == _STRING:
                return self._strings(count)
            if kind in _NUMBERS:
                return self._numbers(_NUMBERS[kind], count)
        elif kind in _NUMBERS:
            return self._numbers(_NUMBERS[kind], 1)[0].item()
        raise ValueError(f"metadata value type {kind} at byte {self._position}")
