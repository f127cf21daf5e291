"""Fields of a config that name rows: their types and checks."""

from typing import Annotated, Any

import pydantic


def _sources(value: Any) -> Any:
    """Check the files of rows before pydantic does, whose messages about two types are two."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(each, str) for each in value)):
        return value
    raise ValueError(f"expected a file, directory or hub name, or a list of them, found {value!r}")


def _validation(value: Any) -> Any:
    """Check the validation rows in the same way."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1):
        return value
    try:
        return _sources(value)
    except ValueError:
        expected = "a share between 0 and 1, a file, directory or hub name, or a list of them"
        raise ValueError(f"expected {expected}, found {value!r}") from None


Sources = Annotated[str | list[str], pydantic.BeforeValidator(_sources)]
Validation = Annotated[float | str | list[str] | None, pydantic.BeforeValidator(_validation)]
