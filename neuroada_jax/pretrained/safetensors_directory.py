"""Tensors of a Hugging Face directory, read one by one from its safetensors files."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from neuroada_jax.errors import UserError
from neuroada_jax.files import read_json

_DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}  # by their safetensors names


def read_all(path: Path) -> dict[str, np.ndarray]:
    """Read all tensors of a small safetensors file, after checking its header against the file's length.

    Raises:
      UserError: the file is missing, truncated or not a safetensors file.
    """
    try:
        with safetensors.safe_open(str(path), framework="numpy") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    # The last three types stand for a dtype or shape that numpy does not have.
    except (OSError, safetensors.SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error})") from error


class _Stored(NamedTuple):
    """Place of a tensor in a safetensors file: dtype by its safetensors name, first byte, number of bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SAVED = "save_pretrained of transformers writes model.safetensors"
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".ckpt")  # of any library
_LONGEST_NAME = 255  # bytes, of file systems
_CHUNK = 2**22  # elements that are compared at a time


class SafetensorsDirectory:
    """Tensors of one or several safetensors files in a Hugging Face directory.

    They are read, not memory-mapped: mapped pages count as memory of this process, like a second copy of the model.

    Attributes:
      notes: a line for each choice between files, or between tensors of one name in several files.
    """

    def __init__(self, directory: str, file: str | None = None) -> None:
        """Read the headers of the files that transformers would load.

        Args:
          directory: the Hugging Face directory.
          file: the file or index that its config names (`transformers_weights`); None: model.safetensors if there is one,
            else its index.

        Raises:
          UserError: no such file, or one that is damaged or lacks a tensor that the index places there.
        """
        self.directory = Path(directory)
        first = _first(self.directory, file)
        weight_map = _weight_map(first) if first.suffix == ".json" else {}
        files = sorted(set(weight_map.values())) or [first.name]
        headers = {file: self._header(self.directory / file) for file in files}
        self.notes: list[str] = []
        if file is None and first.name == SINGLE and (self.directory / INDEX).is_file():
            self.notes.append(f"{directory}: {SINGLE} is read, as in transformers, and not the shards of {INDEX} beside it")
        self._tensors: dict[str, _Stored] = {}
        for shard in files:  # as in transformers, all tensors of the shards count, whatever the index says of them
            if repeated := [name for name in headers[shard] if name in self._tensors]:
                more = f" and {len(repeated) - 1} more" if len(repeated) > 1 else ""
                self.notes.append(
                    f"{directory}: {repeated[0]!r}{more} in several shards; that of {shard} is used, as in transformers"
                )
            self._tensors |= headers[shard]
        for name, file in weight_map.items():
            if name not in self._tensors:
                raise UserError(f"{self.directory / file}: tensor {name!r} is missing, though the index places it there")

    def _header(self, path: Path) -> dict[str, _Stored]:
        _check_inside(path, self.directory)
        if not os.path.isfile(path):
            raise UserError(f"{path}: this shard is missing, though the index names it")
        try:
            with safetensors.safe_open(str(path), framework="numpy"):  # checks the header and the file's length
                pass
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a complete safetensors file ({error})") from error
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        return {
            name: _Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
            for name, entry in entries.items()
            for begin, end in [entry["data_offsets"]]
        }

    def rename(self, own: Callable[[str], str | None]) -> None:
        """Give the tensors other names, and leave out those without one; a line of `notes` counts these."""
        named = [(own(name), stored) for name, stored in self._tensors.items()]
        kept = {name: stored for name, stored in named if name is not None}
        left = [stored for name, stored in named if name is None]
        self.notes.append(
            f"{self.directory}: the text part alone is used and saved, without the {len(left)} tensors that read images "
            f"({sum(stored.nbytes for stored in left) / 1e6:,.1f} MB)"
        )
        self._tensors = kept

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the header."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor by its safetensors name."""
        return self._tensors[name].dtype

    def nbytes(self, name: str) -> int:
        """Return the number of bytes of a tensor."""
        return self._tensors[name].nbytes

    def read(self, name: str, raw: Any = None) -> np.ndarray:
        """Read a tensor.

        Args:
          name: of the tensor.
          raw: its stored bytes, where they are read already; the tensor is a view of them.

        Raises:
          UserError: its dtype is not supported.
        """
        stored = self._checked(name)
        found = self._bytes(stored) if raw is None else np.asarray(raw)
        return found.view(_DTYPES[stored.dtype]).reshape(stored.shape)

    def raw(self, name: str) -> Any:
        """Return the stored bytes of a tensor."""
        return self._bytes(self._tensors[name]).data

    def same_values(self, first: str, second: str) -> bool:
        """Return whether two tensors have the same shape and, whatever they are stored as, the same values."""
        one, other = self._checked(first), self._checked(second)
        if one.shape != other.shape:
            return False
        count = math.prod(one.shape)
        parts = ((start, min(_CHUNK, count - start)) for start in range(0, count, _CHUNK))
        return all(np.array_equal(_elements(one, *part), _elements(other, *part)) for part in parts)

    def _checked(self, name: str) -> _Stored:
        stored = self._tensors[name]
        if stored.dtype not in _DTYPES:
            expected = ", ".join(_DTYPES)
            raise UserError(f"{stored.file}: tensor {name!r} is stored as {stored.dtype}, expected one of {expected}")
        return stored

    def _bytes(self, stored: _Stored) -> np.ndarray:
        return np.fromfile(stored.file, np.uint8, stored.nbytes, offset=stored.start)


def _check_inside(path: Path, directory: Path) -> None:
    """Check that a file of an index lies in its folder, or where the hub's cache keeps the files of its folders.

    Raises:
      UserError: it is elsewhere, also by a link, or its name is none that a file can have.
    """
    name = path.name
    too_long = len(name) > _LONGEST_NAME // 4 and len(name.encode("utf-8", "replace")) > _LONGEST_NAME
    if path.parent != directory or "\0" in name or too_long:
        raise UserError(f"{directory}: the index names a file outside the directory: {str(path)[:200]}")
    if os.path.islink(path):
        kept = [directory.resolve(), directory.parent.parent.resolve() / "blobs"]
        if path.resolve().parent not in kept:
            raise UserError(
                f"{path}: a link that leaves the directory, which the index of a model may not name; copy the file"
            )


def _elements(stored: _Stored, start: int, count: int) -> np.ndarray:
    """Read a part of a flattened tensor as float32."""
    dtype = np.dtype(_DTYPES[stored.dtype])
    offset = stored.start + start * dtype.itemsize
    part = np.fromfile(stored.file, np.uint8, count * dtype.itemsize, offset=offset)
    return part.view(dtype).astype(np.float32)


def _first(directory: Path, file: str | None) -> Path:
    """Return the file of the weights, or the index of several."""
    if file is not None:
        if Path(file).name != file or not (directory / file).is_file():
            raise UserError(f"{directory / 'config.json'}: transformers_weights names {file!r}, expected a file beside it")
        return directory / file
    for name in (SINGLE, INDEX):
        if (directory / name).is_file():
            return directory / name
    raise UserError(f"{directory}: found neither {SINGLE} nor {INDEX}{_others(directory)}")


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise UserError(f"{index}: has no 'weight_map' from tensor names to file names")
    return found


def _others(directory: Path) -> str:
    """Return the end of the message that there are no weights: the weights of other kinds that are there."""
    found = sorted(path.name for path in directory.glob("*") if path.suffix in _WEIGHTS)
    if not found:  # also after a download, which leaves other kinds out
        return f" (where a repository has other weights alone, {_SAVED})"
    names = ", ".join(found[:4] + ["..."] * (len(found) > 4))
    return f", only {names} ({_SAVED})"
