"""Scoring a set of rows: generate or choose answers, compare by the task's rule, and say how sure the figure is."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import transformers

from neuroada_jax import files
from neuroada_jax.core.trees import Tree
from neuroada_jax.data.examples import Example, encode, encode_prompt
from neuroada_jax.data.prompts import PromptStyle, render_prompt
from neuroada_jax.data.rows import Rows, rows_from_list
from neuroada_jax.errors import UserError
from neuroada_jax.evaluation import choices
from neuroada_jax.generation.generate import before_stop, check_lengths, generate
from neuroada_jax.generation.sampling import GREEDY, Decoding
from neuroada_jax.generation.texts import end_tokens
from neuroada_jax.pretrained.load import OpenedModel
from neuroada_jax.tasks import Task, overlap

Progress = Callable[[int, int], None]


class Part(NamedTuple):
    """Accuracy over some of the rows, or by another rule, with its 95 % Wilson interval."""

    value: float
    n: int
    interval: tuple[float, float]


class Score(NamedTuple):
    """A metric over n rows, and every prediction.

    Attributes:
      value: of the metric: accuracy by the task's rule, or what a GLUE task is scored by.
      n: rows.
      interval: the 95 % interval: Wilson's of an accuracy, by resampling of other metrics (`metrics.interval`).
      predictions: a dict for each row.
      metric: its name.
      beside: further metrics of the same predictions, by name.
      empty: generations without any text, which count as wrong; None where nothing is generated.
      overlap: rows whose question is among the training rows; None where those are not known.
      parts: the accuracy of the rows that are not ("clean"), that by the task's strict rule ("strict"), and both.
      beside_intervals: the 95 % intervals of those beside, by name.
    """

    value: float
    n: int
    interval: tuple[float, float] | None
    predictions: list[dict[str, Any]]
    metric: str = "accuracy"
    beside: Mapping[str, float] = MappingProxyType({})
    empty: int | None = None
    overlap: int | None = None
    parts: Mapping[str, Part] = MappingProxyType({})
    beside_intervals: Mapping[str, tuple[float, float] | None] = MappingProxyType({})


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion."""
    z = 1.959964
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low = 0.0 if correct == 0 else centre - half  # exactly, where rounding would leave 1e-19
    high = 1.0 if correct == n else centre + half
    return low, high


def convert(rows: Rows, task: Task) -> Rows:
    """The rows in the task's own form, each with an `answer`.

    Raises:
      UserError: a row that does not fit the task; names file and line.
    """
    return Rows([task.convert(row, rows.where(i)) for i, row in enumerate(rows.rows)], rows.source, rows.places)


def check_rows(rows: Rows, task: Task, method: str) -> Rows:
    """The rows in the task's own form, each with its answer.

    Raises:
      UserError: rows that do not fit the task or have no answer, or "choices" for a task without fixed answers.
    """
    if method == "choices" and not task.choices:
        raise UserError(f"evaluation method 'choices': task {task.name!r} has no fixed answers; use 'generate'")
    converted = convert(rows, task)
    for i, row in enumerate(converted.rows):
        if not isinstance(row["answer"], str):
            raise UserError(f"{converted.where(i)}: no answer to compare with (columns {', '.join(rows.rows[i])})")
    return converted


class Prepared(NamedTuple):
    """Rows that are checked and tokenised, so that nothing of them stops the scoring any more.

    Attributes:
      rows: in the task's own form, each with its answer.
      task: how to prompt and how to read answers.
      style: prompt style.
      method: "generate" continues the prompt and extracts the answer; "choices" takes the likeliest of the task's answers.
      max_new_tokens: of a generation.
      prompts: the token ids of each row's prompt, for "generate".
      options: the answers to choose from, of each row, for "choices".
      choices: each row with each of its answers behind it, for "choices".
    """

    rows: Rows
    task: Task
    style: PromptStyle
    method: str
    max_new_tokens: int
    prompts: list[list[int]]
    options: list[Sequence[str]]
    choices: list[list[Example]]


def prepare(
    base_model: OpenedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    rows: Rows,
    task: Task,
    *,
    style: PromptStyle,
    method: str = "generate",
    max_new_tokens: int | None = None,
) -> Prepared:
    """The rows as `score` needs them. Needs no weights.

    Args:
      base_model: architecture and config.
      tokenizer: of the base.
      rows: raw rows of the task.
      task: see `Prepared`, as for style and method.
      style: prompt style.
      method: "generate" or "choices".
      max_new_tokens: for "generate"; None for the task's own.

    Raises:
      UserError: see `check_rows`; also prompts that with their generation or answers exceed the model's positions.
    """
    converted = check_rows(rows, task, method)
    length = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    prompts, options, answers = [], [], []
    if method == "choices":
        options = [row.get("choices", task.choices) for row in converted.rows]
        answers = _with_answers(base_model, tokenizer, converted, task, style, options)
    else:
        prompts = [encode_prompt(row, style, tokenizer, converted.where(i)) for i, row in enumerate(converted.rows)]
        check_lengths(base_model.model, prompts, length, lambda i: f"{converted.where(i)}: the prompt")
    return Prepared(converted, task, style, method, length, prompts, options, answers)


def score(
    base_model: OpenedModel,
    params: Tree,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prepared: Prepared,
    *,
    decoding: Decoding = GREEDY,
    batch_size: int = 16,
    trained_on: Set[str] | None = None,
    on_progress: Progress | None = None,
) -> Score:
    """Scores rows with plain (base or merged) parameters.

    Args:
      base_model: architecture and config.
      params: what to score.
      tokenizer: of the base.
      prepared: the rows, from `prepare`.
      decoding: for "generate"; greedy by default.
      batch_size: prompts, or (row, choice) pairs, at a time.
      trained_on: the questions of the training rows (`tasks.overlap.questions`), to tell which rows are among them.
      on_progress: called with (done, in all).
    """
    rows, task, style, method = prepared.rows, prepared.task, prepared.style, prepared.method
    if method == "choices":
        best = choices.losses(base_model.model, params, prepared.choices, batch_size, on_progress).argmin(axis=1)
        predictions: list[dict[str, Any]] = [
            {"prediction": own[choice]} for own, choice in zip(prepared.options, best, strict=True)
        ]
    else:
        outputs = generate(
            base_model.model,
            params,
            prepared.prompts,
            max_new_tokens=prepared.max_new_tokens,
            eos_ids=end_tokens(base_model, tokenizer),
            decoding=decoding,
            decode=lambda ids: str(tokenizer.decode(ids)),
            batch_size=batch_size,
            on_progress=on_progress,
        )
        texts = [before_stop(str(tokenizer.decode(ids, skip_special_tokens=True)), decoding.stop) for ids in outputs]
        predictions = [{"generation": text} for text in texts]
    for i, prediction in enumerate(predictions):
        row = rows.rows[i]
        answer = row["answer"].strip()
        if method == "generate":
            prediction["prediction"] = task.extract(prediction["generation"], answer)
        prediction |= {"answer": answer, "correct": _matches(task, prediction["prediction"], answer)}
        if task.strict and method == "generate":
            strict = task.strict(prediction["generation"], answer)
            prediction |= {"strict_prediction": strict, "strict_correct": _matches(task, strict, answer)}
        if trained_on is not None:
            prediction["in_training"] = overlap.question(row) in trained_on
        prediction["prompt"] = render_prompt(row, style, tokenizer, rows.where(i))
    return summarise(predictions)


def _matches(task: Task, found: str, answer: str) -> bool:
    return found != "" and task.matches(found, answer)


def _part(correct: Iterable[bool]) -> Part:
    each = list(correct)
    return Part(sum(each) / len(each), len(each), wilson_interval(sum(each), len(each)))


def summarise(predictions: list[dict[str, Any]]) -> Score:
    """The score of all predictions, and of the parts that they allow to tell apart."""
    value, n, interval = _part(each["correct"] for each in predictions)
    clean = [each for each in predictions if not each.get("in_training")]
    parts = {}
    if "strict_correct" in predictions[0]:
        parts["strict"] = _part(each["strict_correct"] for each in predictions)
    if 0 < len(clean) < n:
        parts["clean"] = _part(each["correct"] for each in clean)
        if "strict" in parts:
            parts["clean, strict"] = _part(each["strict_correct"] for each in clean)
    return Score(
        value,
        n,
        interval,
        predictions,
        empty=sum(not each["generation"].strip() for each in predictions) if "generation" in predictions[0] else None,
        overlap=n - len(clean) if "in_training" in predictions[0] else None,
        parts=parts,
    )


def _with_answers(
    base_model: OpenedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    rows: Rows,
    task: Task,
    style: PromptStyle,
    options: Sequence[Sequence[str]],
) -> list[list[Example]]:
    """Every row with each of its answers as its target."""
    pairs = [(row, each) for row, own in zip(rows.rows, options, strict=True) for each in own]
    candidates = [{**row, "output": task.target(each)} for row, each in pairs]
    examples = encode(rows_from_list(candidates, rows.source), style, tokenizer, base_model.model.config.max_positions)
    if examples.cut or examples.dropped:  # part of an answer would be compared with the whole of another
        raise UserError(
            f"{rows.source}: a prompt is longer than the model's {base_model.model.config.max_positions} positions"
        )
    numbers = iter(range(len(candidates)))
    return [[examples.example(next(numbers)) for _ in own] for own in options]


def write_predictions(path: Path, score: Score) -> None:
    """Every prediction as a line of JSON that a person can read."""
    lines = [files.to_json(prediction) for prediction in score.predictions]
    files.write_text(path, "\n".join(lines) + "\n")
