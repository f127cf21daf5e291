"""The low-rank factors of an adapter (LoRA), and their settings in adapter.json."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from neuroada_jax.errors import UserError


class Factors(NamedTuple):
    """The low-rank factors of one linear map: float32 `a` (r, I) and `b` (O, r)."""

    a: np.ndarray
    b: np.ndarray


class LoraOptions(NamedTuple):
    """The settings of low-rank factors: the weights are W + alpha / r B A."""

    r: int
    alpha: float

    @property
    def scale(self) -> float:
        """The number of times that the product B A counts."""
        return self.alpha / self.r


def options_of(metadata: Mapping[str, Any], path: str | Path = "adapter.json") -> LoraOptions | None:
    """Return the settings of low-rank factors from an adapter's metadata; None for an adapter of connections.

    Raises:
      UserError: wrong ones.
    """
    if "lora" not in metadata:
        return None
    found: Any = metadata["lora"]
    fits = isinstance(found, dict) and found.keys() == {"r", "alpha"} and type(found["r"]) is int and found["r"] >= 1
    if not fits or type(found["alpha"]) not in (int, float) or not 0 < found["alpha"] < math.inf:
        raise UserError(f"{path}: lora is {found!r}, expected an object with r, an integer from 1, and alpha, above 0")
    return LoraOptions(found["r"], float(found["alpha"]))


def check(where: str, pair: Factors, rank: int) -> None:
    """Check the low-rank factors of a linear map.

    Raises:
      UserError: they are no finite float32 (r, I) and (O, r).
    """
    a, b = pair
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank or not (a.size and b.size):
        raise UserError(f"{where} has factors {a.shape} and {b.shape}, expected ({rank}, I) and (O, {rank})")
    if a.dtype != np.float32 or b.dtype != np.float32:
        raise UserError(f"{where} has factors that are {a.dtype} and {b.dtype}, expected float32")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError(f"{where} has factors with NaN or infinite numbers")
