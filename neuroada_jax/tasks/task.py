"""Tasks on rows of text, and where their rows are."""

import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from neuroada_jax.data.prompts import PromptStyle
from neuroada_jax.errors import UserError


class Source(NamedTuple):
    """A file or directory below the working directory, or a hub name, and the split to read."""

    data: str
    split: str = "test"


class Task(NamedTuple):
    """A task on rows of text.

    Attributes:
      name: its name in configs.
      style: default prompt style.
      convert: (row, where) -> a chat, prompt/completion or instruction row with a field `answer`, and with `choices` where
        the row has fewer answers than the task; raises UserError for rows that do not fit.
      extract: (generated text, correct answer) -> the answer in the text, or "". The correct answer only determines which
        kind of answer to look for.
      matches: (extracted answer, correct answer) -> whether they are the same; "" never matches.
      strict: a second rule like `extract`, where the published one is known to be weak; both are reported.
      choices: all possible answers, where they are few and fixed; these can be scored by likelihood.
      completion: answer -> the text that the model learns to produce, for `choices`.
      max_new_tokens: default for the largest number of generated tokens.
      suite: the group of tasks that it is published with; they share prompts.
      fields: the fields of rows that it reads; empty where they differ among its rows.
      kind: row -> what kind of row it is, where rows of several kinds are read but not of two kinds in one file.
      sources: where its rows may be, best first; see `source`.
    """

    name: str
    style: PromptStyle
    convert: Callable[[Mapping[str, Any], str], dict[str, Any]]
    extract: Callable[[str, str], str]
    matches: Callable[[str, str], bool] = operator.eq
    strict: Callable[[str, str], str] | None = None
    choices: tuple[str, ...] = ()
    completion: Callable[[str], str] = str
    max_new_tokens: int = 32
    suite: str | None = None
    sources: tuple[Source, ...] = ()
    fields: tuple[str, ...] = ()
    kind: Callable[[Mapping[str, Any]], str] | None = None

    def is_related(self, other: "Task") -> bool:
        """Return whether it is the other task or one of its suite: they share prompts."""
        return self is other or (self.suite is not None and self.suite == other.suite)

    def source(self) -> Source:
        """Return the first source that is on the hub or exists as a file.

        Raises:
          UserError: there is none; names the places that were tried.
        """
        for each in self.sources:
            if _is_hub_name(each.data) or Path(each.data).exists():
                return each
        looked = ", ".join(each.data for each in self.sources) or "it has no data of its own"
        raise UserError(f"task {self.name!r}: no rows found ({looked}); name them in `data`")


def _is_hub_name(data: str) -> bool:
    return not data.startswith("data/")


def published_sources(suite: str, folder: str, *hub: Source) -> tuple[Source, ...]:
    """Return the sources of a test set: LLM-Adapters cloned into data/, the same rows in one file, then the hub.

    Args:
      suite: folder below data/eval.
      folder: folder in LLM-Adapters' dataset directory, and the name of the one file.
      hub: sources on the hub, if any.
    """
    return (Source(f"data/LLM-Adapters/dataset/{folder}/test.json"), Source(f"data/eval/{suite}/{folder}.jsonl.gz"), *hub)
