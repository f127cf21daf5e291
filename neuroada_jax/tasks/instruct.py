"""Instruction tuning: rows of any kind, Alpaca's rows, and SST-2 put as an instruction."""

from collections.abc import Mapping
from typing import Any

from neuroada_jax.data.prompts import EXPECTED_COLUMNS, PromptStyle
from neuroada_jax.errors import UserError
from neuroada_jax.tasks.task import Source, Task

TRIGGER = "the correct answer is "


def after_trigger(text: str, answer: str) -> str:
    """The text after the first trigger phrase; the rule of the official code."""
    _, found, rest = text.partition(TRIGGER)
    return rest.strip() if found else ""


def _as_is(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row itself; its answer is the `answer` column or else the whole target. `datasets` writes null where none is.

    Raises:
      UserError: no column that a prompt can be made of.
    """
    if not row.keys() & {"messages", "prompt", "instruction"}:
        raise UserError(f"{where}: found columns {', '.join(row) or 'none'}; expected {EXPECTED_COLUMNS}")
    given = (row.get(column) for column in ("answer", "completion", "output"))
    answer = next((value for value in given if value is not None), None)
    messages = row.get("messages")
    if answer is None and isinstance(messages, list) and messages:
        last = messages[-1]
        answer = last.get("content") if isinstance(last, Mapping) and last.get("role") == "assistant" else None
    return {**row, "answer": answer}


def _whole(text: str, answer: str) -> str:
    return text.strip()


INSTRUCT = Task("instruct", PromptStyle.PLAIN, _as_is, _whole)


def _alpaca(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    for column in ("instruction", "output"):
        if not isinstance(row.get(column), str):
            raise UserError(
                f"{where}: task 'alpaca' needs the text columns instruction and output (and perhaps input), "
                f"found {', '.join(row)}"
            )
    return {**row, "answer": row["output"]}


ALPACA = Task(
    "alpaca", PromptStyle.ALPACA, _alpaca, _whole, max_new_tokens=512, sources=(Source("tatsu-lab/alpaca", "train"),)
)

_SST2_LABELS = ("negative", "positive")


def _sst2(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    sentence, label = row.get("sentence"), row.get("label")
    if not isinstance(sentence, str) or not isinstance(label, int) or isinstance(label, bool) or label not in (0, 1):
        raise UserError(
            f"{where}: task 'sst2' needs a text column sentence and a label 0 or 1, found columns {', '.join(row)} "
            f"and label {label!r}"
        )
    answer = _SST2_LABELS[label]
    instruction = f"Please choose the sentiment of the sentence: {sentence.strip()}\n\nAnswer format: positive/negative"
    return {"instruction": instruction, "output": TRIGGER + answer, "answer": answer}


SST2 = Task(
    "sst2",
    PromptStyle.PLAIN,
    _sst2,
    after_trigger,
    choices=_SST2_LABELS,
    target=lambda answer: TRIGGER + answer,
    sources=(Source("data/glue/sst2/validation.jsonl.gz"), Source("nyu-mll/glue:sst2", "validation")),
)
