"""Names without this machine's paths: what is shared names no folder and no user of the machine that it comes from."""

import os
import re
from pathlib import Path
from typing import Any

from neuroada_jax.pretrained import hub

# A complete text that is a path: absolute, below the home directory, or relative from "." or "..".
_IS_PATH = re.compile(r"(?:file://|\.{1,2}|~[^/\\\s]*|[A-Za-z]:)?[\\/][^\n]*[^\n\\/][\\/]*")
# The same within a text, an absolute one with two parts or more; "and/or", "</s>" and "https://host/path" are none.
_PART = r"[\\/]+[\w.@+-]+"
_PATH_IN_TEXT = re.compile(
    rf"(?:file://|(?<![\w.:/\\<]))(?:(?:\.{{1,2}}|~[\w.-]*|[A-Za-z]:)(?:{_PART})+|{_PART}(?:{_PART})+)"
)


def last_part(name: str) -> str:
    """Return the last part of a path, with slashes of either kind."""
    return re.split(r"[\\/]+", name.rstrip("\\/"))[-1]


def is_on_hub(name: str, near: Path) -> bool:
    """Return whether a name is a hub id (of rows perhaps with ":CONFIGURATION") and not that of a file or folder here.

    Args:
      name: of a model or of rows, as a config has it.
      near: a path in the run; the name may be relative to any folder above it.
    """
    if not hub.is_id(re.sub(r":[\w.-]+$", "", name)):
        return False
    return not any(os.path.exists(folder / name) for folder in (Path.cwd(), *near.absolute().parents))


def without_paths(content: Any) -> Any:
    """Return JSON content in whose texts and keys the last part stands for every absolute path."""
    if isinstance(content, dict):
        return {_without_paths(key): without_paths(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_paths(value) for value in content]
    return _without_paths(content) if isinstance(content, str) else content


def _without_paths(text: str) -> str:
    if _IS_PATH.fullmatch(text):
        return last_part(text)
    return _PATH_IN_TEXT.sub(lambda found: last_part(found[0]), text)
