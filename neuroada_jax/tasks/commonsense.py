"""The eight commonsense tasks, prompted as in LLM-Adapters and scored as by LoReFT and NeuroAda.

Rows are either LLM-Adapters' own (instruction, answer) or those of the benchmark on the hub, which are converted to the
same wording. The model learns to write "the correct answer is <answer>"; the text after these words is compared exactly.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from neuroada_jax.data.prompts import PromptStyle
from neuroada_jax.errors import UserError
from neuroada_jax.tasks.instruct import TRIGGER, after_trigger
from neuroada_jax.tasks.task import Source, Task, published_sources

SUITE = "commonsense"


class _Original(NamedTuple):
    """The format of the benchmark's own rows: their fields, and the function from a row to (instruction, answer)."""

    fields: tuple[str, ...]
    render: Callable[[Mapping[str, Any]], tuple[str, str]]


def _convert(
    name: str, choices: tuple[str, ...], original: _Original | None, row: Mapping[str, Any], where: str
) -> dict[str, Any]:
    instruction, answer = row.get("instruction"), row.get("answer")
    if original and "instruction" not in row and all(field in row for field in original.fields):
        try:
            instruction, answer = original.render(row)
        except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{where}: not a row of {name!r} as the hub has it ({reason})") from error
    if not isinstance(instruction, str) or not isinstance(answer, str):
        also = f" (or {', '.join(original.fields)}, as on the hub)" if original else ""
        found = ", ".join(row)
        raise UserError(f"{where}: task {name!r} needs the text fields instruction and answer{also}, found {found}")
    if choices and answer.strip() not in choices:
        raise UserError(f"{where}: answer {answer!r}, expected one of task {name!r}: {', '.join(choices)}")
    converted = {"instruction": instruction, "output": TRIGGER + answer, "answer": answer}
    return {**converted, "choices": _named(instruction, answer.strip(), choices)} if choices else converted


def _named(instruction: str, answer: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    """Return the answers that an instruction lists at its end (ARC's questions have three to five), else the task's."""
    named = tuple(instruction.rpartition("Answer format: ")[2].strip().split("/"))
    return named if answer in named and set(named) <= set(choices) else choices


def _task(
    name: str, choices: tuple[str, ...] = (), original: _Original | None = None, sources: tuple[Source, ...] = ()
) -> Task:
    return Task(
        name,
        PromptStyle.PLAIN,
        functools.partial(_convert, name, choices, original),
        after_trigger,
        choices=choices,
        completion=lambda answer: TRIGGER + answer,
        suite=SUITE,
        sources=sources,
    )


def _labels(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{number}" for number in range(1, count + 1))


def _choose(
    kind: str, task: str, question: str, options: list[str], correct: int, gap: str = " ", end: str = "\n\n"
) -> tuple[str, str]:
    """Return (instruction, answer) of a question with numbered options; `correct` is the index of the correct one."""
    labels = _labels(kind, len(options))
    listed = gap.join(f"{label.capitalize()}: {option}" for label, option in zip(labels, options, strict=True))
    instruction = f"Please choose the correct {task}: {question}\n\n{listed}{end}Answer format: {'/'.join(labels)}"
    if not 0 <= correct < len(options):
        raise ValueError(f"label {correct} of {len(options)} options")
    return instruction, labels[correct]


def _boolq(row: Mapping[str, Any]) -> tuple[str, str]:
    question = f"Please answer the following question with true or false, question: {row['question']}?"
    return f"{question}\n\nAnswer format: true/false", {True: "true", False: "false"}[row["answer"]]


def _piqa(row: Mapping[str, Any]) -> tuple[str, str]:
    solutions = [row["sol1"], row["sol2"]]
    return _choose("solution", "solution to the question", row["goal"], solutions, int(row["label"]), gap="\n\n")


def _siqa(row: Mapping[str, Any]) -> tuple[str, str]:
    options = [row["answerA"], row["answerB"], row["answerC"]]
    question = f"{row['context']} {row['question']}"
    return _choose("answer", "answer to the question", question, options, int(row["label"]) - 1)


def _hellaswag(row: Mapping[str, Any]) -> tuple[str, str]:
    begin = f"{row['activity_label']}: {row['ctx']}"
    return _choose("ending", "ending to complete the given sentence", begin, row["endings"], int(row["label"]))


def _winogrande(row: Mapping[str, Any]) -> tuple[str, str]:
    fill = "answer to fill in the blank to complete the given sentence"
    return _choose("option", fill, row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1, end=" ")


def _exam(question: str, row: Mapping[str, Any]) -> tuple[str, str]:
    """Convert a row of ARC or OpenBookQA, whose options are named A, B, ... or 1, 2, ..."""
    correct = row["choices"]["label"].index(row["answerKey"])
    return _choose("answer", "answer to the question", row[question], row["choices"]["text"], correct)


_ARC = _Original(("question", "choices", "answerKey"), functools.partial(_exam, "question"))

COMMONSENSE = _task("commonsense")
TASKS = (
    _task(
        "boolq",
        ("true", "false"),
        _Original(("question", "answer"), _boolq),
        published_sources(SUITE, "boolq", Source("google/boolq", "validation")),
    ),
    _task(
        "piqa",
        _labels("solution", 2),
        _Original(("goal", "sol1", "sol2", "label"), _piqa),
        published_sources(SUITE, "piqa", Source("baber/piqa", "validation")),
    ),
    _task(
        "siqa",
        _labels("answer", 3),
        _Original(("context", "question", "answerA", "answerB", "answerC", "label"), _siqa),
        published_sources(SUITE, "social_i_qa", Source("lighteval/siqa", "validation")),
    ),
    _task(
        "hellaswag",
        _labels("ending", 4),
        _Original(("activity_label", "ctx", "endings", "label"), _hellaswag),
        published_sources(SUITE, "hellaswag", Source("Rowan/hellaswag", "validation")),
    ),
    _task(
        "winogrande",
        _labels("option", 2),
        _Original(("sentence", "option1", "option2", "answer"), _winogrande),
        published_sources(SUITE, "winogrande", Source("allenai/winogrande:winogrande_xl", "validation")),
    ),
    _task(
        "arc_easy",
        _labels("answer", 5),
        _ARC,
        published_sources(SUITE, "ARC-Easy", Source("allenai/ai2_arc:ARC-Easy")),
    ),
    _task(
        "arc_challenge",
        _labels("answer", 5),
        _ARC,
        published_sources(SUITE, "ARC-Challenge", Source("allenai/ai2_arc:ARC-Challenge")),
    ),
    _task(
        "openbookqa",
        _labels("answer", 4),
        _Original(("question_stem", "choices", "answerKey"), functools.partial(_exam, "question_stem")),
        published_sources(SUITE, "openbookqa", Source("allenai/openbookqa:main")),
    ),
)
