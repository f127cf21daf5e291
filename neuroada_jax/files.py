"""Atomic writes of files and directories, JSON whose errors name the file, and text that can be written as UTF-8.

What is written gets its name only once it is complete. Until then its temporary name has a marker and cannot be guessed,
and an open descriptor locks it: the next writer of the same name removes what a killed process has left behind, which
nobody locks any more, and nothing else.
"""

import contextlib
import fcntl
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from neuroada_jax.errors import UserError
from neuroada_jax.locks import lock_file

TEMPORARY, OLD = ".neuroada-tmp", ".neuroada-old"  # what is being written, and what it replaces
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_SURROGATE = re.compile("[\ud800-\udfff]")
LARGEST_JSON = 256 * 2**20  # bytes; the largest tokenizer.json and index of the hub have about 40 MB
DEEPEST_JSON = 64  # lists and objects inside one another; real ones have ten, and code that walks them recurses


@contextlib.contextmanager
def new_directory(destination: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that becomes `destination` if the block succeeds, and is removed if it fails.

    Args:
      destination: the directory to create.
      replace: replace it where it exists, as it is now.

    Raises:
      UserError: the destination exists and `replace` is not set, it cannot be written, or something appeared there
        meanwhile.
    """
    if os.path.lexists(destination) and not replace:
        raise UserError(f"{destination} exists already; choose another folder or remove it")
    temporary, descriptor = None, None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        sweep(destination)
        before = _names(destination)
        temporary, descriptor = _new(destination, is_directory=True)
        yield temporary
        _set_modes(temporary)
        if _names(destination) != before:
            raise UserError(f"{destination}: something else was put there meanwhile; it is left as it is")
        _swap(temporary, destination)
    except Exception as error:
        if (reason := _why_not_written(error)) is None:
            raise
        raise UserError(f"{destination}: cannot be written ({reason})") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _why_not_written(error: Exception) -> str | None:
    """Return why a library could not write a file, in a few words; None for errors of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if below := _OS_ERROR.search(str(error)):  # of Rust: safetensors, tokenizers
        return os.strerror(int(below[1]))
    if isinstance(error, RuntimeError) and "inline_container" in str(error):  # which does not say why
        return "PyTorch could not write all of a file; is the disk full?"
    return None


def write_text(path: Path, text: str) -> None:
    """Write a text file as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it; create its parent directories.

    Raises:
      UserError: it cannot be written.
    """
    temporary, descriptor = None, None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        temporary, descriptor = _new(path, is_directory=False)
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def scratch(destination: Path) -> Iterator[Path]:
    """Yield a temporary directory beside a destination that nothing is written to; remove it, and what killed ones left."""
    sweep(destination)
    temporary, descriptor = _new(destination, is_directory=True)
    try:
        temporary.chmod(0o700)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


def probe(directory: Path) -> None:
    """Raise the OSError that writing a small file into a directory gives, if any."""
    sweep(directory / "probe")
    path, descriptor = _new(directory / "probe", is_directory=False)
    try:
        os.write(descriptor, bytes(4096))
    finally:
        path.unlink()
        os.close(descriptor)


def sweep(destination: Path) -> None:
    """Remove what killed processes have left of writing a destination; what they were replacing gets its name back."""
    for kind in (OLD, TEMPORARY):
        for path in destination.parent.glob(f".{_escaped(destination.name)}.*{kind}"):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            except OSError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if kind == OLD and not os.path.lexists(destination):
                    path.rename(destination)
                else:
                    remove(path)
            except OSError:  # someone is writing it, or this file system has no locks
                continue
            finally:
                os.close(descriptor)


def _new(destination: Path, *, is_directory: bool) -> tuple[Path, int]:
    """Create the temporary file or directory of a destination, with the permissions of any new one, and lock it."""
    while True:
        path = destination.with_name(f".{destination.name}.{secrets.token_hex(8)}{TEMPORARY}")
        if is_directory:
            path.mkdir()
        try:
            descriptor = os.open(path, os.O_RDONLY if is_directory else os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:
            if is_directory and path.parent.is_dir():  # another process has swept it
                continue
            raise
        if lock_file(descriptor) and os.path.lexists(path):  # not swept before it was locked, nor about to be
            return path, descriptor
        os.close(descriptor)


def _swap(temporary: Path, destination: Path) -> None:
    """Give a complete directory its name, and remove what had it."""
    if not os.path.lexists(destination):
        temporary.rename(destination)
        return
    old = temporary.with_name(temporary.name.removesuffix(TEMPORARY) + OLD)
    descriptor = os.open(destination, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        destination.rename(old)  # for a moment no directory has the name, but never an incomplete one
        try:
            temporary.rename(destination)
        except OSError:
            old.rename(destination)
            raise
        remove(old)
    finally:
        os.close(descriptor)


def _names(path: Path) -> set[str] | None:
    """Return what is at a path, by relative names and the identities of the files; None where nothing is."""
    if not os.path.lexists(path):
        return None
    found = [path, *(Path(folder) / name for folder, names, more in os.walk(path) for name in (*names, *more))]
    return {f"{each.relative_to(path)} {each.lstat().st_ino}" for each in found}


def _set_modes(directory: Path) -> None:
    """Give everything below a directory the permissions of new files, whatever the libraries that wrote them chose."""
    mode = directory.stat().st_mode & 0o777
    for path in directory.rglob("*"):
        if not path.is_symlink():
            path.chmod(mode if path.is_dir() else mode & 0o666)


def remove(path: Path) -> None:
    """Remove a file, a folder with all in it, or a link; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _escaped(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


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


def digest(content: Mapping[str, Any]) -> str:
    """Return the digest of the fields of a JSON object, in any order."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


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


def is_deeper(value: object, depth: int = DEEPEST_JSON) -> bool:
    """Return whether more than `depth` lists and objects of a value stand inside one another."""
    level = [value]
    for _ in range(depth + 1):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def read_bytes(path: Path, *, largest: int | None = LARGEST_JSON, stream: bool = False) -> bytes:
    """Return the content of a file.

    Args:
      path: the file.
      largest: bytes that it may have; None: any number, for a reader that needs all of it.
      stream: whether it may be a pipe, as of a shell's <(...); a pipe or device in a folder of somebody else has no end.

    Raises:
      UserError: it is missing, cannot be read, is no regular file, or is larger.
    """
    try:
        if not stream and not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise UserError(f"{path}: not a regular file, expected one")
        with open(path, "rb") as file:
            content = file.read() if largest is None else file.read(largest + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if largest is not None and len(content) > largest:
        raise UserError(f"{path}: more than {largest:,} bytes, expected at most as many")
    return content


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of each line of a file, None for one that is not JSON or not UTF-8.

    Raises:
      UserError: the file cannot be read.
    """
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError):
            value = None
        yield number, value


def _reason(error: Exception) -> str:
    """Return why a text is no JSON, in a few words."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "an integer of more than 4,300 digits" if "digits" in str(error) else str(error)


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of a JSON text, as `json.loads` takes it for `object_pairs_hook`.

    Raises:
      ValueError: a name stands twice in it, of which `json` would keep the last in silence.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the name {twice[:80]!r} twice")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
      UserError: the file is missing, is not JSON, is not an object, or exceeds `LARGEST_JSON` or `DEEPEST_JSON`.
    """
    data = read_bytes(path)
    try:
        text = data.decode("utf-8")
        content = json.loads(text, object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested a thousand deep
        raise UserError(f"{path}: not JSON ({_reason(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    if text.count("[") + text.count("{") > DEEPEST_JSON and is_deeper(content):
        raise UserError(f"{path}: more than {DEEPEST_JSON} lists and objects stand inside one another")
    return content
