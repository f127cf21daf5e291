"""Instruction tuning: rows of any kind, Alpaca's rows, and three of GLUE's tasks as instructions."""

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


def _labelled(
    name: str, texts: tuple[str, ...], labels: tuple[str, ...], instruction: str, sources: tuple[Source, ...]
) -> Task:
    """Return a task of GLUE as an instruction; its instruction is written with the texts and ends with the answers."""

    def convert(row: Mapping[str, Any], where: str) -> dict[str, Any]:
        found, label = [row.get(text) for text in texts], row.get("label")
        if not all(isinstance(text, str) for text in found) or type(label) is not int or not 0 <= label < len(labels):
            fields = " and ".join(texts)
            numbers = " or ".join(map(str, range(len(labels))))
            raise UserError(
                f"{where}: task {name!r} needs {'text fields' if len(texts) > 1 else 'a text field'} {fields} and a label "
                f"{numbers}, found fields {', '.join(row)} and label {label!r}"
            )
        parts = {text: value.strip() for text, value in zip(texts, found, strict=True) if isinstance(value, str)}
        answer = labels[label]
        asked = f"{instruction.format(**parts)}\n\nAnswer format: {'/'.join(labels)}"
        return {"instruction": asked, "output": TRIGGER + answer, "answer": answer}

    return Task(
        name,
        PromptStyle.PLAIN,
        convert,
        after_trigger,
        choices=labels,
        completion=lambda answer: TRIGGER + answer,
        fields=(*texts, "label"),
        sources=sources,
    )


def _glue(name: str, split: str = "validation") -> tuple[Source, ...]:
    return Source(f"data/glue/{name}/validation.jsonl.gz"), Source(f"nyu-mll/glue:{name}", split)


SST2 = _labelled(
    "sst2",
    ("sentence",),
    ("negative", "positive"),
    "Please choose the sentiment of the sentence: {sentence}",
    _glue("sst2"),
)
QNLI = _labelled(
    "qnli",
    ("question", "sentence"),
    ("yes", "no"),
    "Does the sentence answer the question?\nQuestion: {question}\nSentence: {sentence}",
    _glue("qnli"),
)
MNLI = _labelled(
    "mnli",
    ("premise", "hypothesis"),
    ("true", "neutral", "false"),
    "Is the hypothesis true, given the premise?\nPremise: {premise}\nHypothesis: {hypothesis}",
    _glue("mnli", "validation_matched"),
)
