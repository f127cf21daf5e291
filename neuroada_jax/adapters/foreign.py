"""Foreign adapters in memory, and the conversion of entries at any positions of a weight into k per neuron."""

from typing import NamedTuple

import numpy as np

from neuroada_jax.errors import UserError


class Imported(NamedTuple):
    """A foreign adapter's arrays under Hugging Face names, checked and ready for `on_base.assemble`.

    Attributes:
      values: module path -> float32 (O, k).
      columns: module path -> int32 (O, k), ascending and distinct within each neuron.
      dense_parameters: parameter name -> float32 array of any shape: the complete trained parameter.
      notes: lines that report what was removed or converted.
    """

    values: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]
    dense_parameters: dict[str, np.ndarray]
    notes: list[str]


class Entries(NamedTuple):
    """The entries of one weight matrix in any order: values (n,) at flat positions `row * I + column` (n,) of (O, I)."""

    values: np.ndarray
    positions: np.ndarray
    shape: tuple[int, int]


def per_neuron(entries: dict[str, Entries]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[str]]:
    """Return entries with the same k for every neuron, by module: values (O, k), columns (O, k) ascending, and notes.

    k is the largest number of entries that any neuron has, one k for all modules (min(k, I) where there are fewer inputs).
    Neurons with fewer get zeros at their lowest free columns, which changes no weight.

    Raises:
      UserError: positions outside the matrix, or one position twice.
    """
    counts = {module: _count(module, each.positions, each.shape) for module, each in entries.items()}
    k = max(int(count.max()) for count in counts.values())
    values, columns = {}, {}
    padded = 0
    for module, (found, positions, (outputs, inputs)) in entries.items():
        width = min(k, inputs)
        # Among its first `width` columns, a neuron has at least as many free ones as it lacks entries.
        free = np.ones((outputs, width), bool)
        rows, taken = np.divmod(positions, inputs)
        low = taken < width
        free[rows[low], taken[low]] = False
        lacks = (width - counts[module])[:, None]
        spare_rows, spare = np.nonzero(free & (np.cumsum(free, axis=1) <= lacks))
        padded += len(spare)
        everywhere = np.concatenate([positions, spare_rows * inputs + spare])
        order = np.argsort(everywhere)
        with_zeros = np.concatenate([found, np.zeros(len(spare), np.float32)])
        values[module] = with_zeros[order].reshape(outputs, width)
        columns[module] = (everywhere[order] % inputs).astype(np.int32).reshape(outputs, width)
    if not padded:
        return values, columns, []
    fewest = min(int(count.min()) for count in counts.values())
    total = sum(leaf.size for leaf in values.values())
    share = 100 * padded / total
    note = f"neurons have {fewest} to {k} entries: filled up to {k} with zero values ({share:.1f} % of the result)"
    return values, columns, [note]


def _count(module: str, positions: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Check the positions and return the number of entries of every neuron (O,)."""
    outputs, inputs = shape
    if len(positions) and (positions.min() < 0 or positions.max() >= outputs * inputs):
        raise UserError(f"{module} has entries outside its weight ({outputs}, {inputs})")
    ordered = np.sort(positions)
    twice = ordered[1:][np.diff(ordered) == 0]
    if len(twice):
        row, column = divmod(int(twice[0]), inputs)
        raise UserError(f"{module} has several entries at row {row}, column {column}; expected one at most")
    return np.bincount(positions // inputs, minlength=outputs)
