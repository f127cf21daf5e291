"""Secrets of the user, which no file, message or log may hold: hub tokens, keys of trackers, passwords in addresses."""

import os
import re

_NAMES = re.compile(r"(TOKEN|API_KEY|SECRET|PASSWORD)$")  # of environment variables
_SHORTEST = 8  # characters of a secret; a shorter value of such a variable is a word that texts may hold
# A token of the hub, and the password of an address such as https://user:password@host.
_LIKE_ONE = re.compile(r"\bhf_[A-Za-z0-9]{30,}|(?<=://)[^\s/:@]+:[^\s/@]+(?=@)")


def _of_environment() -> list[str]:
    return [value for name, value in os.environ.items() if _NAMES.search(name) and len(value) >= _SHORTEST]


def is_in(text: str) -> bool:
    """Return whether a text holds a secret."""
    return _LIKE_ONE.search(text) is not None or any(secret in text for secret in _of_environment())


def hidden(text: str) -> str:
    """Return a text with *** in the place of each secret."""
    for secret in _of_environment():
        text = text.replace(secret, "***")
    return _LIKE_ONE.sub("***", text)
