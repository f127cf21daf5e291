"""What readers of quantised Hugging Face directories share: tensors of which some are codes with arrays beside them."""

import abc
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from neuroada_jax.core.quantised_formats import FORMATS
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained.safetensors_directory import SafetensorsDirectory

_CODES = ("U8", "I8", "I32", "F8_E4M3", "F8_E5M2")
_FLOATS: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class Packed(NamedTuple):
    """A quantised tensor: its format, the shape of its kernel, and what else its reader knows of it."""

    format: str
    shape: tuple[int, ...]
    state: Mapping[str, Any]


class PackedTensors(abc.ABC):
    """The tensors of a directory, of which some are quantised; reads them one by one.

    A quantised tensor has the name that it has in the unquantised model, and the arrays of `quantised_formats.FORMATS`.

    Attributes:
      method: `quant_method` of the config.
      notes: the lines of the directory, and of arrays that are not used.
    """

    def __init__(self, directory: SafetensorsDirectory, section: Mapping[str, Any], method: str) -> None:
        """Find the quantised tensors.

        Args:
          directory: the stored tensors.
          section: the config's `quantization_config`, which has been checked.
          method: its `quant_method`.

        Raises:
          UserError: arrays of a quantised tensor that are missing or do not fit it.
        """
        self._directory, self.method = directory, method
        self._stored = set(directory.names())
        self.notes = list(directory.notes)
        self._packed, beside = self._find(section)
        plain = [name for name in directory.names() if name not in beside]
        self._names = [*plain, *(name for name in self._packed if name not in self._stored)]
        for name in plain:
            if name not in self._packed and directory.dtype(name) in _CODES:
                raise self._error(name, f"holds {directory.dtype(name)} codes, and no scales are stored beside it")

    @abc.abstractmethod
    def _find(self, section: Mapping[str, Any]) -> tuple[dict[str, Packed], set[str]]:
        """Return the quantised tensors by name, and the names of the arrays beside them."""

    @abc.abstractmethod
    def _arrays(self, name: str) -> dict[str, np.ndarray]:
        """Return the arrays of a quantised tensor."""

    def _error(self, name: str, problem: str) -> UserError:
        return UserError(f"{self._directory.directory}: tensor {name!r} {problem}")

    def _check(self, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> None:
        """Check that an array is stored with one of these dtypes and shapes."""
        if name not in self._stored:
            raise self._error(name, f"is missing; expected {' or '.join(dtypes)} {_listed(shapes)}")
        dtype, shape = self._directory.dtype(name), self._directory.shape(name)
        if dtype not in dtypes or shape not in shapes:
            raise self._error(name, f"is {dtype} {list(shape)}, expected {' or '.join(dtypes)} {_listed(shapes)}")

    def _floats(self, name: str, *, signed: bool = False, largest: float | None = None) -> np.ndarray:
        """Return an array of floating-point numbers as it is stored; scales are finite, and most have no sign."""
        found = np.asarray(self._directory.raw(name)).view(_FLOATS[self._directory.dtype(name)])
        found = found.reshape(self._directory.shape(name))
        wide = found.astype(np.float32)
        if not np.isfinite(wide).all() or (not signed and (wide < 0).any()):
            raise self._error(name, f"holds {'NaN or infinities' if signed else 'NaN, infinities or negative scales'}")
        if largest is not None and (wide > largest).any():
            raise self._error(name, f"holds scales above {largest:.3g}, with which weights are infinite")
        return found

    def names(self) -> list[str]:
        """Return the names of all tensors, without the arrays beside quantised ones."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; of a quantised one, that of the kernel."""
        return self._packed[name].shape if name in self._packed else self._directory.shape(name)

    def format_of(self, name: str) -> str | None:
        """Return the format of a quantised tensor, None for others."""
        return self._packed[name].format if name in self._packed else None

    def raw(self, name: str) -> Any:
        """Return the stored bytes of a tensor; of a quantised one, its arrays by name."""
        return self._arrays(name) if name in self._packed else self._directory.raw(name)

    def packed(self, name: str, raw: Any = None) -> dict[str, np.ndarray]:
        """Return the arrays of a quantised tensor; `raw` is what `raw` returned."""
        return self._arrays(name) if raw is None else raw

    def read(self, name: str, raw: Any = None) -> np.ndarray:
        """Read a tensor; a quantised one is dequantised to float32."""
        if name not in self._packed:
            return self._directory.read(name, raw)
        return np.asarray(jax.jit(FORMATS[self._packed[name].format].decode)(self.packed(name, raw)))

    def same_values(self, first: str, second: str) -> bool:
        """Return whether two tensors have the same shape and values."""
        if first in self._packed or second in self._packed:
            return self.shape(first) == self.shape(second) and np.array_equal(self.read(first), self.read(second))
        return self._directory.same_values(first, second)


def _listed(shapes: tuple[tuple[int, ...], ...]) -> str:
    return " or ".join(str(list(shape)) for shape in shapes)
