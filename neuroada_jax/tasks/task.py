"""What a task is."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from neuroada_jax.prompts import PromptStyle


class Task(NamedTuple):
    """A task on rows of text.

    Attributes:
      name: how configs call it.
      style: the prompt style where the config does not name one.
      convert: (row, where) -> a chat, prompt/completion or instruction row with an `answer` column; raises UserError for
        rows that do not fit.
      extract: generated text -> the answer in it, "" where there is none.
      choices: the answers there are, where they are few and fixed: these can be scored by likelihood.
      target: answer -> the text that the model is trained to produce, for `choices`.
    """

    name: str
    style: PromptStyle
    convert: Callable[[Mapping[str, Any], str], dict[str, Any]]
    extract: Callable[[str], str]
    choices: tuple[str, ...] = ()
    target: Callable[[str], str] = str
