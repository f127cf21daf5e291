"""Labels as they stand in rows: names, integers, booleans, lists of names, columns of 0 and 1, or numbers."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from neuroada_jax import console
from neuroada_jax.data.rows import Rows
from neuroada_jax.errors import UserError

MOST_FOUND = 1000  # labels that are found in rows; more must be listed
_FEW_ROWS = 20  # of which each may well have a label of its own
_LARGEST = 10**18  # integers beyond have no place as labels, and Python writes some of them only on request
_SHOWN = 60  # characters of a value in a message
_FLOAT_LIMIT = float(np.finfo(np.float32).max)


def plain(value: Any) -> Any:
    """Return a value of NumPy as Python's own."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def shown(value: Any) -> str:
    """Return a value for a message, cut where it is long."""
    if value is None:
        return "null"
    if isinstance(value, int) and abs(value) > _LARGEST:
        return "an integer of more than 18 digits"
    text = repr(value[: 2 * _SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def listed(names: Sequence[str], most: int = 12) -> str:
    """Return names for a message, the first few where there are many."""
    first = ", ".join(shown(name)[1:-1] for name in names[:most])
    return first if len(names) <= most else f"{first}, ... ({len(names)} in all)"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" where a known name is near, else ""."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1) or [each for each in names if each.lower() == name.lower()]
    return f"; did you mean {close[0]!r}?" if close else ""


def check_column(row: Mapping[str, Any], column: str, field: str, where: str) -> None:
    """Raise UserError where a row lacks the column that a field of the config names."""
    if column not in row:
        raise UserError(
            f"{where}: no column {column!r}, which {field} names; found {listed(list(row)) or 'none'}{nearest(column, row)}"
        )


def name_of(value: Any, where: str) -> str:
    """Return the name of a label: text as it is, 3 as "3", true as "true".

    Raises:
      UserError: the value is no label: null, empty, a number with a decimal point, a list or an object.
    """
    value = plain(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) <= _LARGEST:
        return str(value)
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, float) and math.isfinite(value):
        raise UserError(
            f"{where}: label {shown(value)} has a decimal point, expected a name, an integer or a boolean; to predict "
            f'numbers set data.task: regression, else write the label as text: "{value}"'
        )
    raise UserError(f"{where}: label {shown(value)}, expected a name, an integer or a boolean")


def number_of_label(value: Any) -> int | None:
    """Return an integer from 0 on, also as the text that tables have, else None."""
    value = plain(value)
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"\d{1,9}", value) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST else None


def names_in(value: Any, where: str) -> list[str]:
    """Return the names of a list of labels.

    Raises:
      UserError: the value is no list, an item is no label, or one is given twice.
    """
    value = plain(value)
    if not isinstance(value, list | tuple):
        raise UserError(
            f'{where}: label {shown(value)}, expected a list of names such as ["a", "b"]; a table has a column of 0 and 1 '
            "for each label: leave out data.label, and list the columns in data.labels"
        )
    names = [name_of(each, where) for each in value]
    if len(set(names)) < len(names):
        raise UserError(f"{where}: label {shown(value)} has a name twice, expected each once")
    return names


def number_of(value: Any, where: str) -> float:
    """Return a number that a regression learns; text that is a number counts, since tables have nothing else.

    Raises:
      UserError: the value is no finite number.
    """
    value = plain(value)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise UserError(f"{where}: label {shown(value)}, expected a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: label {shown(value)}, expected a number")
    if not abs(value) <= _FLOAT_LIMIT:  # an integer of any size can be compared; NaN compares as false
        raise UserError(f"{where}: label {shown(value)}, expected a finite number")
    return float(value)


def is_set(value: Any, column: str, where: str) -> bool:
    """Return whether a column of 0 and 1 says that a row has its label.

    Raises:
      UserError: the value is neither 0 nor 1.
    """
    value = plain(value)
    if isinstance(value, str) and value.strip() in ("0", "1"):
        return value.strip() == "1"
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise UserError(f"{where}: column {column!r} is {shown(value)}, expected 0 or 1")


def check_types(rows: Rows, column: str) -> None:
    """Check that the labels of a column, or of its lists, have one type: 1 and "1" are different labels to a reader.

    Raises:
      UserError: two types; names the row where the second is found.
    """
    first: tuple[type, str, Any] | None = None
    for number, row in enumerate(rows.rows):
        value = plain(row[column])
        for each in value if isinstance(value, list | tuple) else [value]:
            if first is None:
                first = type(each), rows.where(number), each
            elif type(each) is not first[0]:
                other = f"{shown(first[2])} of {first[1]} is {_TYPES[first[0]]}"
                raise UserError(
                    f"{rows.where(number)}: label {shown(each)} is {_TYPES[type(each)]}, and {other}; expected one type"
                )


_TYPES = {str: "text", int: "an integer", bool: "a boolean", float: "a number"}


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return each name once: in the order of the numbers where all are integers, else of the characters."""
    found = set(names)
    numeric = all(re.fullmatch(r"-?\d{1,18}", name) for name in found)
    return tuple(sorted(found, key=(lambda name: (int(name), name)) if numeric else None))


def warn_of_variants(names: Sequence[str], rows: Rows) -> None:
    """Warn of labels that differ in nothing but case or white space, which are two classes all the same."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(" ".join(name.casefold().split()), name)
        if other != name:
            console.warn(
                f"{rows.source}: {shown(other)} and {shown(name)} are two labels, though only case or white space differs"
            )
            return


def check_found(names: Sequence[str], rows: Rows, column: str) -> None:
    """Refuse labels found in rows that are numbers to predict, or texts of which hardly two are the same.

    Args:
      names: of the labels, each once.
      rows: that they were found in.
      column: of the labels.

    Raises:
      UserError: see above.
    """
    point = next((name for name in names if not re.fullmatch(r"[-+]?\d+", name)), None)
    if point is not None and all(map(_is_number, names)):
        first = next(i for i, row in enumerate(rows.rows) if row[column] == point)
        raise UserError(
            f"{rows.where(first)}: label {shown(point)} in {column!r} is a number and no integer; to predict numbers set "
            f"data.task: regression, or for classes list their names: data.labels: {_as_list(names)}"
        )
    alone = len(names) == len(rows) > _FEW_ROWS
    if len(names) > MOST_FOUND or alone:
        what = "each row has a label of its own" if alone else f"found {len(names)} labels"
        raise UserError(
            f"{rows.source}: {what} in {column!r} ({listed(names, 4)}), expected at most {MOST_FOUND} that recur; if they "
            "are right, list them in data.labels"
        )


def _as_list(names: Sequence[str], most: int = 8) -> str:
    """Return names as YAML has them in a config; the first few where there are many."""
    return f"[{', '.join([*(json.dumps(name) for name in names[:most]), *(['...'] if len(names) > most else [])])}]"


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False
