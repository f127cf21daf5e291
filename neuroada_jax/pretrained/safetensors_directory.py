"""Tensors of a Hugging Face directory, read one by one from its safetensors files."""

import json
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


class SafetensorsDirectory:
    """Tensors of one or several safetensors files in a Hugging Face directory.

    They are read, not memory-mapped: mapped pages count as memory of this process, like a second copy of the model.
    """

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        index = self.directory / "model.safetensors.index.json"
        single = self.directory / "model.safetensors"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise UserError(f"{index}: has no 'weight_map' from tensor names to file names")
            files = sorted(set(weight_map.values()))
        elif single.exists():
            weight_map, files = None, [single.name]
        else:
            raise UserError(f"{directory}: found neither model.safetensors nor model.safetensors.index.json")
        headers = {file: self._header(self.directory / file) for file in files}
        if weight_map is None:
            weight_map = dict.fromkeys(headers[single.name], single.name)
        for name, file in weight_map.items():
            if name not in headers[file]:
                raise UserError(f"{self.directory / file}: tensor {name!r} is missing, though the index places it there")
        self._tensors = {name: headers[file][name] for name, file in weight_map.items()}

    def _header(self, path: Path) -> dict[str, _Stored]:
        if path.parent != self.directory:
            raise UserError(f"{self.directory}: the index names a file outside the directory: {path}")
        if not path.exists():
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

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the header."""
        return self._tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        """Read a tensor.

        Raises:
          UserError: its dtype is not supported.
        """
        stored = self._tensors[name]
        if stored.dtype not in _DTYPES:
            expected = ", ".join(_DTYPES)
            raise UserError(f"{stored.file}: tensor {name!r} is stored as {stored.dtype}, expected one of {expected}")
        return self._bytes(stored).view(_DTYPES[stored.dtype]).reshape(stored.shape)

    def raw(self, name: str) -> Any:
        """Return the stored bytes of a tensor."""
        return self._bytes(self._tensors[name]).data

    def _bytes(self, stored: _Stored) -> np.ndarray:
        return np.fromfile(stored.file, np.uint8, stored.nbytes, offset=stored.start)
