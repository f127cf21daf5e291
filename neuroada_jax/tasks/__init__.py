"""Registry of tasks: how a row becomes a prompt and a completion, and how an answer is extracted from generated text."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from neuroada_jax.data.rows import Rows, load_rows
from neuroada_jax.tasks import arithmetic, commonsense
from neuroada_jax.tasks.classification import LABEL, OWN, OWN_METRICS, TEXT, ClassificationTask, Problem
from neuroada_jax.tasks.glue import GLUE
from neuroada_jax.tasks.instruct import ALPACA, INSTRUCT, MNLI, QNLI, SST2
from neuroada_jax.tasks.metamath import METAMATH
from neuroada_jax.tasks.task import Source, Task

__all__ = [
    "ENCODER_TASKS",
    "GLUE",
    "OWN",
    "SUITES",
    "TASKS",
    "ClassificationTask",
    "Source",
    "Task",
    "listing",
    "read_rows",
    "unknown",
    "wrong_columns",
]

# Tasks of decoders. Those of encoders are in GLUE, three of them in both, and OWN names those on rows of one's own.
# The tasks "commonsense" and "arithmetic" read the training rows that their suites share.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        INSTRUCT,
        ALPACA,
        SST2,
        QNLI,
        MNLI,
        METAMATH,
        commonsense.COMMONSENSE,
        *commonsense.TASKS,
        arithmetic.ARITHMETIC,
        *arithmetic.TASKS,
    )
}
ENCODER_TASKS: tuple[str, ...] = (*OWN, *GLUE)
# Tasks that are published in one table, in its order.
SUITES: dict[str, tuple[str, ...]] = {
    module.SUITE: tuple(task.name for task in module.TASKS) for module in (commonsense, arithmetic)
}


def read_rows(
    task: Task | ClassificationTask,
    data: str | Sequence[str] | None,
    split: str | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> Rows:
    """Read the first `limit` rows of `data`, or of the task's own source where `data` is None.

    Args:
      task: the rows' task.
      data: see `rows.load_rows`.
      split: split of `data`, "test" by default; ignored for the task's own source, which names its split.
      limit: None for all rows.
      columns: see `rows.load_rows`; for `data` alone.

    Raises:
      UserError: see `Task.source` and `rows.load_rows`.
    """
    if data:
        return load_rows(data, split or "test", limit, columns)
    source = task.source()
    return load_rows(source.data, source.split, limit)


def wrong_columns(task: str, columns: Mapping[str, str], own: Sequence[str] | None = None) -> str | None:
    """Return the error message for renamed columns that no field of the task gets, or that two fields get; else None.

    Args:
      task: its name.
      columns: field -> column.
      own: the fields of a task on own rows; None where its config names the columns itself.
    """
    if task in OWN and own is None:
        return f"task {task!r} has data.text and data.label to name its columns; remove it"
    fields = tuple(own or ()) or (TASKS[task].fields if task in TASKS else (*GLUE[task].texts, LABEL))
    for field, column in columns.items():
        if fields and field not in fields:
            near = "".join(f"did you mean {each!r}? " for each in difflib.get_close_matches(field, fields, n=1))
            return f"task {task!r} reads no field {field!r}; {near}It reads {', '.join(fields)} (field: column)"
        if list(columns.values()).count(column) > 1:
            return f"column {column!r} is given twice, expected one field for each column"
    return None


def unknown(name: str) -> str:
    """Return the error message for a name that no task has, with the nearest name and all names."""
    known = list(dict.fromkeys([*TASKS, *ENCODER_TASKS]))
    near = "".join(f"did you mean {each!r}? " for each in difflib.get_close_matches(name, known, n=1))
    return f"unknown task {name!r}; {near}known: {', '.join(known)}"


def listing() -> list[dict[str, Any]]:
    """Return a dict for every task: name, suite, kind of model, metric, prompt, answers and the sources of its rows."""
    decoders = [
        {
            "task": task.name,
            "suite": task.suite,
            "model": "decoder",
            "metric": "accuracy",
            "prompt": task.style.value,
            "max_new_tokens": task.max_new_tokens,
            "answers": list(task.choices),
            "data": [each.data for each in task.sources],
        }
        for task in TASKS.values()
    ]
    encoders = [
        {
            "task": task.name,
            "suite": "glue",
            "model": "encoder",
            "metric": task.metric,
            "prompt": " + ".join(task.texts),
            "max_new_tokens": None,
            "answers": list(task.labels),
            "data": [each.data for each in task.sources],
        }
        for task in GLUE.values()
    ]
    own: list[dict[str, Any]] = [
        {
            "task": problem.value,
            "suite": None,
            "model": "encoder",
            "metric": OWN_METRICS[problem][0],
            "prompt": f"{TEXT}, {LABEL} (data.text, data.label)",
            "max_new_tokens": None,
            "answers": [],
            "data": [],
        }
        for problem in Problem
    ]
    return decoders + own + encoders
