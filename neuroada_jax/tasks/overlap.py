"""Which questions of a test set are also among the training rows, in the same words."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

_OTHER = re.compile(r"[^a-z0-9]+")


def question(row: Mapping[str, Any]) -> str:
    """What a converted row asks, in lower-case letters and digits alone: equal for the same words."""
    if isinstance(row.get("messages"), list):
        turns = [message for message in row["messages"] if isinstance(message, Mapping)]
        asked = [turn.get("content") for turn in turns if turn.get("role") == "user"]
    elif "instruction" in row:
        asked = [row["instruction"], row.get("input") or ""]
    else:
        asked = [row.get("prompt", "")]
    return _OTHER.sub("", " ".join(map(str, asked)).lower())


def questions(rows: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """The questions of all rows that ask any."""
    return frozenset(map(question, rows)) - {""}
