"""Writing files so that a reader never meets half of one, and reading them so that errors name them."""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neuroada_jax.errors import UserError


@contextlib.contextmanager
def new_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its name when the block ends well, and vanishes when it does not.

    Raises:
      UserError: the target exists and `replace` is not set, or cannot be written.
    """
    if target.exists() and not replace:
        raise UserError(f"{target} exists already; choose another folder or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from error
    old = temporary.with_name(f"{temporary.name}.old")
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private, and so does safetensors with its files
        for file in temporary.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        if target.exists():
            target.rename(old)  # a whole directory has the name, or for a moment none has it; never half of one
        temporary.rename(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file under a temporary name and renames it; makes the folders above it."""
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
    """Raises UserError where `write_text` could not write this file, as far as can be seen; makes nothing."""
    above = next(folder for folder in path.absolute().parents if os.path.exists(folder))
    if path.is_dir():
        raise UserError(f"{path}: cannot be written (it is a folder)")
    if not above.is_dir():
        raise UserError(f"{path}: cannot be written ({above} is no folder)")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written (no permission in {above})")


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON text; a number that is not finite, for which JSON has no word, is written as null."""
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False, indent=indent)
    except ValueError:
        return json.dumps(finite(content), ensure_ascii=False, allow_nan=False, indent=indent)


def finite(content: Any) -> Any:
    """Dicts and lists with None in the place of numbers that are not finite."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      UserError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # the latter where brackets are nested a thousand deep
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
