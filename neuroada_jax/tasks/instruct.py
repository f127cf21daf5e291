"""Instruction tuning: rows of any kind, Alpaca's rows, and SST-2 as an instruction."""

from collections.abc import Mapping
from typing import Any

from neuroada_jax.data.chats import read_chat
from neuroada_jax.data.prompts import EXPECTED_FIELDS, PromptStyle, is_text, kind_of_row
from neuroada_jax.errors import UserError
from neuroada_jax.tasks.task import Source, Task

TRIGGER = "the correct answer is "


def after_trigger(text: str, answer: str) -> str:
    """Return the text after the first trigger phrase, by the rule of the official code; "" without one."""
    _, found, rest = text.partition(TRIGGER)
    return rest.strip() if found else ""


def _as_is(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the row with its answer: the field `answer`, or else the complete completion; of a chat, the last answer.

    Raises:
      UserError: no field that a prompt can be made of, or a chat that is none.
    """
    chat = read_chat(row, where)
    if chat is None and not is_text(row) and not row.keys() & {"prompt", "instruction"}:
        raise UserError(f"{where}: found fields {', '.join(row) or 'none'}; expected {EXPECTED_FIELDS}")
    answer = row.get("answer")
    if answer is None and chat is not None:
        last = chat.messages[-1]
        if last["role"] == "assistant" and last.get("content"):
            answer = last["content"].rpartition("</think>")[2].strip()  # as a generation is read, without its thoughts
    elif answer is None:
        given = (row.get(field) for field in ("completion", "output"))
        answer = next((value for value in given if value is not None), None)  # `datasets` stores a missing field as null
    return {**row, "answer": answer}


def _complete_text(text: str, answer: str) -> str:
    return text.strip()


INSTRUCT = Task(
    "instruct",
    PromptStyle.PLAIN,
    _as_is,
    _complete_text,
    fields=(
        *("prompt", "completion", "instruction", "input", "output", "messages", "conversations", "tools", "system", "text"),
        "answer",
    ),
    kind=kind_of_row,
)


def _alpaca(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    for field in ("instruction", "output"):
        if not isinstance(row.get(field), str):
            raise UserError(
                f"{where}: task 'alpaca' needs the text fields instruction and output (and perhaps input), "
                f"found {', '.join(row)}"
            )
    return {**row, "answer": row["output"]}


ALPACA = Task(
    "alpaca",
    PromptStyle.ALPACA,
    _alpaca,
    _complete_text,
    max_new_tokens=512,
    fields=("instruction", "input", "output"),
    sources=(Source("tatsu-lab/alpaca", "train"),),
)

_SST2_LABELS = ("negative", "positive")


def _sst2(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    sentence, label = row.get("sentence"), row.get("label")
    if not isinstance(sentence, str) or not isinstance(label, int) or isinstance(label, bool) or label not in (0, 1):
        raise UserError(
            f"{where}: task 'sst2' needs a text field sentence and a label 0 or 1, found fields {', '.join(row)} "
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
    completion=lambda answer: TRIGGER + answer,
    fields=("sentence", "label"),
    sources=(Source("data/glue/sst2/validation.jsonl.gz"), Source("nyu-mll/glue:sst2", "validation")),
)
