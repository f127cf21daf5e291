"""What reading a foreign adapter gives."""

from typing import NamedTuple

import numpy as np


class Imported(NamedTuple):
    """A foreign adapter's arrays under Hugging Face names, checked and ready for `native.assemble`.

    Attributes:
      values: module path -> float32 (O, k).
      columns: module path -> int32 (O, k), ascending and distinct within a row.
      heads: parameter name -> float32 array of any shape; what was trained densely, whole.
      notes: lines that say what was removed or converted.
    """

    values: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]
    heads: dict[str, np.ndarray]
    notes: list[str]
