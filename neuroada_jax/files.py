"""Atomic writes of files and directories, JSON whose errors name the file, and text that can be written as UTF-8."""

import contextlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from neuroada_jax.errors import UserError

_SURROGATE = re.compile("[\ud800-\udfff]")


@contextlib.contextmanager
def new_directory(destination: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that becomes `destination` if the block succeeds, and is removed if it fails.

    Args:
      destination: the directory to create.
      replace: replace it where it exists.

    Raises:
      UserError: the destination exists and `replace` is not set, or it cannot be written.
    """
    if destination.exists() and not replace:
        raise UserError(f"{destination} exists already; choose another folder or remove it")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    except OSError as error:
        raise UserError(f"{destination}: cannot be written ({error.strerror})") from error
    old = temporary.with_name(f"{temporary.name}.old")
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes directories private, and safetensors its files
        for file in temporary.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        if destination.exists():
            destination.rename(old)  # for a moment no directory has the name, but never an incomplete one
        temporary.rename(destination)
    except OSError as error:
        raise UserError(f"{destination}: cannot be written ({error.strerror or error})") from error
    finally:
        if old.exists() and not destination.exists():
            old.rename(destination)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it; create its parent directories.

    Raises:
      UserError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def check_writable(path: Path) -> None:
    """Raise UserError if `write_text` would foreseeably fail to write this file; create nothing."""
    above = next(folder for folder in path.absolute().parents if os.path.exists(folder))
    if path.is_dir():
        raise UserError(f"{path}: cannot be written (it is a folder)")
    if not above.is_dir():
        raise UserError(f"{path}: cannot be written ({above} is no folder)")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written (no permission in {above})")


def to_json(content: Any, indent: int | None = None) -> str:
    """Return JSON text; numbers that are not finite, which JSON cannot express, become null."""
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False, indent=indent)
    except ValueError:
        return json.dumps(finite(content), ensure_ascii=False, allow_nan=False, indent=indent)


def finite(content: Any) -> Any:
    """Return the content with None in place of numbers that are not finite."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def has_half_characters(value: object) -> bool:
    """Return whether a text, or one inside a value of JSON, holds half of a surrogate pair."""
    if isinstance(value, str):
        return not value.isascii() and _SURROGATE.search(value) is not None
    if isinstance(value, Mapping):
        return any(has_half_characters(each) for pair in value.items() for each in pair)
    return isinstance(value, list | tuple) and any(map(has_half_characters, value))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
      UserError: the file is missing, is not JSON, or is not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested a thousand deep
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
