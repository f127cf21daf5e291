"""What a task is."""

import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from neuroada_jax.data.prompts import PromptStyle
from neuroada_jax.errors import UserError


class Source(NamedTuple):
    """Where rows are: a file below the working directory or a hub name, and the split of the latter."""

    data: str
    split: str = "test"


class Task(NamedTuple):
    """A task on rows of text.

    Attributes:
      name: how configs call it.
      style: the prompt style where the config does not name one.
      convert: (row, where) -> a chat, prompt/completion or instruction row with an `answer` column, and with `choices`
        where it names the answers there are; raises UserError for rows that do not fit.
      extract: (generated text, right answer) -> the answer in the text, "" where there is none. The right answer only says
        of what kind to look for one.
      matches: (extracted answer, right answer) -> whether they are the same; "" never is.
      strict: a second rule like `extract`, where the published one is known to be weak; both are reported.
      choices: the answers there are, where they are few and fixed: these can be scored by likelihood.
      target: answer -> the text that the model is trained to produce, for `choices`.
      max_new_tokens: the longest generation where the config does not say.
      suite: the group that it is published with; its tasks share prompts.
      sources: where its rows may be, the best first; see `source`.
    """

    name: str
    style: PromptStyle
    convert: Callable[[Mapping[str, Any], str], dict[str, Any]]
    extract: Callable[[str, str], str]
    matches: Callable[[str, str], bool] = operator.eq
    strict: Callable[[str, str], str] | None = None
    choices: tuple[str, ...] = ()
    target: Callable[[str], str] = str
    max_new_tokens: int = 32
    suite: str | None = None
    sources: tuple[Source, ...] = ()

    def source(self) -> Source:
        """The first of the sources that is a file here, or else a hub name.

        Raises:
          UserError: none is here and none is on the hub; names where they were looked for.
        """
        for each in self.sources:
            if _is_hub_name(each.data) or Path(each.data).exists():
                return each
        looked = ", ".join(each.data for each in self.sources) or "it has no data of its own"
        raise UserError(f"task {self.name!r}: no rows found ({looked}); name them in `data`")


def _is_hub_name(data: str) -> bool:
    return not data.startswith("data/")


def published_sources(suite: str, folder: str, *hub: Source) -> tuple[Source, ...]:
    """A test set as LLM-Adapters publishes it, cloned into data/; the same rows as one file; then the hub.

    Args:
      suite: folder below data/eval.
      folder: in LLM-Adapters' dataset directory; also what the one file is called.
      hub: names there, if any.
    """
    return (Source(f"data/LLM-Adapters/dataset/{folder}/test.json"), Source(f"data/eval/{suite}/{folder}.jsonl.gz"), *hub)
