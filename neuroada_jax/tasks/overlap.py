"""Overlap between test and training rows: questions that occur in both in the same words."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from neuroada_jax.data.chats import read_chat

# Published test sets: (questions that are also in LLM-Adapters' math_10k, all questions).
IN_MATH_10K = {"multiarith": (569, 600), "addsub": (331, 395), "singleeq": (449, 508), "mawps": (169, 238)}
_OTHER = re.compile(r"[^a-z0-9]+")


def question(row: Mapping[str, Any]) -> str:
    """Return the question of a converted row, reduced to lower-case letters and digits: equal for the same words."""
    chat = read_chat(row, "row")
    if chat is not None:
        asked = [message["content"] for message in chat.messages if message["role"] == "user"]
    elif "instruction" in row:
        asked = [row["instruction"], row.get("input") or ""]
    else:
        asked = [row.get("prompt", "")]
    return _OTHER.sub("", " ".join(map(str, asked)).lower())


def questions(rows: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """Return the questions of the rows, without empty ones."""
    return frozenset(map(question, rows)) - {""}


def known(task: str) -> str | None:
    """Return the known overlap of a task with math_10k as a note for its score; None where there is none."""
    if task not in IN_MATH_10K:
        return None
    count, total = IN_MATH_10K[task]
    share = f"{count} of the {total} published questions ({100 * count / total:.0f} %)"
    return f"{task}: {share} are also in math_10k; for a model that was trained on it, --trained-on FILE scores them apart"
