"""The exception and the warning whose messages are written for the user."""

from typing import Any


class UserError(Exception):
    """An error whose one-line message is for the user; the command line prints it and exits with 2."""


class NeuroadaWarning(UserWarning):
    """A warning for the user; work continues."""


def install_line(extra: str) -> str:
    """Return the command that installs an extra from a clone, since the package is on no index yet."""
    return f'pip install -e ".[{extra}]"'


def shown(value: Any) -> str:
    """Return a value as messages show it: short, on one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
