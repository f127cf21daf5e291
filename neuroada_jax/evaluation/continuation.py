"""Scoring a decoder: generate or choose an answer for every row, and compare it by the task's rule."""

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import transformers

from neuroada_jax.core.trees import Tree
from neuroada_jax.data.examples import Example, encode, encode_prompt
from neuroada_jax.data.prompts import PromptForm, PromptStyle, answer_text, is_templated, render_prompt
from neuroada_jax.data.rows import Rows, rows_from_list
from neuroada_jax.errors import UserError
from neuroada_jax.evaluation import choices, metrics
from neuroada_jax.evaluation.scoring import Part, Progress, Score
from neuroada_jax.generation.generate import Ending, before_stop, check_lengths, generate
from neuroada_jax.generation.sampling import GREEDY, Decoding
from neuroada_jax.generation.texts import ending
from neuroada_jax.pretrained.load import OpenedModel
from neuroada_jax.tasks import Task, overlap


class Options(NamedTuple):
    """How a decoder is prompted and how its answers are found.

    Attributes:
      form: prompt form, or a style.
      method: "generate" continues the prompt and extracts the answer; "choices" takes the most likely of the task's
        answers.
      max_new_tokens: longest generation; None for the task's own limit.
      decoding: how "generate" picks tokens.
      batch_size: prompts, or rows with all their choices, at a time.
      trained_on: questions of the training rows (`tasks.overlap.questions`), to score the rows that are among them
        separately; None where the training rows are not known.
    """

    form: PromptForm | PromptStyle | str
    method: str = "generate"
    max_new_tokens: int | None = None
    decoding: Decoding = GREEDY
    batch_size: int = 16
    trained_on: Set[str] | None = None


@dataclass(frozen=True)
class ContinuationScorer:
    """Validated and tokenised rows of a task (see `scoring.Scorer`).

    Attributes:
      rows: in the task's own form, each with its answer.
      task: how answers are extracted and compared.
      options: see `Options`.
      form: of the prompts.
      tokenizer: the base model's.
      ending: what ends a generation.
      max_new_tokens: longest generation.
      prompts: token ids of every row's prompt, for "generate".
      answers: the answers to choose from, for every row, for "choices".
      candidates: every row with each of these answers as its completion, for "choices".
    """

    rows: Rows
    task: Task
    options: Options
    form: PromptForm
    tokenizer: transformers.PreTrainedTokenizerBase
    ending: Ending
    max_new_tokens: int
    prompts: list[list[int]]
    answers: list[Sequence[str]]
    candidates: list[list[Example]]

    @classmethod
    def prepare(
        cls,
        base_model: OpenedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        rows: Rows,
        task: Task,
        options: Options,
    ) -> "ContinuationScorer":
        """Validate and tokenise raw rows of a task. Needs no weights.

        Raises:
          UserError: rows that do not fit the task or have no answer, "choices" for a task without fixed answers, prompts
            that with their generation or answers exceed the model's positions, or an end token that the tokenizer lacks.
        """
        form, converted = PromptForm.of(options.form), _check_rows(rows, task, options.method)
        length = task.max_new_tokens if options.max_new_tokens is None else options.max_new_tokens
        prompts, answers, candidates = [], [], []
        if options.method == "choices":
            answers = [row.get("choices", task.choices) for row in converted.rows]
            candidates = _candidates(base_model, tokenizer, converted, task, form, answers)
        else:
            prompts = [encode_prompt(row, form, tokenizer, converted.where(i)) for i, row in enumerate(converted.rows)]
            check_lengths(base_model.model, prompts, length, lambda i: f"{converted.where(i)}: the prompt")
        ends = ending(base_model, tokenizer, form)
        return cls(converted, task, options, form, tokenizer, ends, length, prompts, answers, candidates)

    def predict(
        self, base_model: OpenedModel, params: Tree, numbers: Sequence[int], on_progress: Progress | None = None
    ) -> list[Any]:
        """Return the predictions of some rows; see `Scorer.predict`."""
        if not numbers:
            return []
        if self.options.method == "choices":
            return self._choose(base_model, params, numbers, on_progress)
        return self._generate(base_model, params, numbers, on_progress)

    def judge(self, found: list[Any]) -> Score:
        """Return the score of all predictions; see `Scorer.judge`."""
        for i, (row, prediction) in enumerate(zip(self.rows.rows, found, strict=True)):
            self._compare(row, prediction)
            prediction["prompt"] = render_prompt(row, self.form, self.tokenizer, self.rows.where(i))
        return summarise(found)

    def _choose(
        self, base_model: OpenedModel, params: Tree, numbers: Sequence[int], on_progress: Progress | None
    ) -> list[dict[str, Any]]:
        """Return the most likely of every row's answers as its prediction."""
        candidates = [self.candidates[i] for i in numbers]
        losses = choices.losses(base_model.model, params, candidates, self.options.batch_size, on_progress)
        best = losses.argmin(axis=1)
        return [{"prediction": self.answers[i][choice]} for i, choice in zip(numbers, best, strict=True)]

    def _generate(
        self, base_model: OpenedModel, params: Tree, numbers: Sequence[int], on_progress: Progress | None
    ) -> list[dict[str, Any]]:
        """Return the continuation of every row's prompt, and the text that its answer is looked for in."""
        stop, tokenizer = self.options.decoding.stop, self.tokenizer
        outputs = generate(
            base_model.model,
            params,
            [self.prompts[i] for i in numbers],
            self.ending,
            max_new_tokens=self.max_new_tokens,
            decoding=self.options.decoding,
            batch_size=self.options.batch_size,
            on_progress=on_progress,
        )
        predictions = []
        for i, each in zip(numbers, outputs, strict=True):
            templated = is_templated(self.rows.rows[i], self.form)
            text = before_stop(str(tokenizer.decode(each.ids, skip_special_tokens=True)), stop)
            # Of a chat without the thoughts before it.
            answer = before_stop(answer_text(each.ids, tokenizer), stop) if templated else text
            predictions.append({"generation": text, "stopped": each.stopped, "answered": answer})
        return predictions

    def _compare(self, row: dict[str, Any], prediction: dict[str, Any]) -> None:
        """Extract the answers of a prediction and add whether they are correct."""
        task, answer = self.task, row["answer"].strip()
        text = prediction.pop("answered", None)
        if text is not None:
            prediction["prediction"] = task.extract(text, answer)
        prediction |= {"answer": answer, "correct": _matches(task, prediction["prediction"], answer)}
        if task.strict and text is not None:
            strict = task.strict(text, answer)
            prediction |= {"strict_prediction": strict, "strict_correct": _matches(task, strict, answer)}
        if self.options.trained_on is not None:
            prediction["in_training"] = overlap.question(row) in self.options.trained_on


def convert(rows: Rows, task: Task) -> Rows:
    """Return the rows in the task's own form, each with an `answer`.

    Raises:
      UserError: a row that does not fit the task, or rows of two kinds in one file; names file and line.
    """
    converted = rows.converted(task.convert)
    first: dict[str, tuple[str, int]] = {}  # file -> the kind of its first row, and the row's number
    for i, row in enumerate(converted.rows if task.kind else []):
        assert task.kind is not None
        kind = task.kind(row)
        expected, number = first.setdefault(rows.places[i][0], (kind, i))
        if kind != expected:
            raise UserError(
                f"{rows.where(i)}: found {kind}, but {rows.where(number)} is {expected}; expected one kind in a file"
            )
    return converted


def _check_rows(rows: Rows, task: Task, method: str) -> Rows:
    """Return the rows in the task's own form; every one has an answer, and the task allows the method."""
    if method == "choices" and not task.choices:
        raise UserError(f"evaluation method 'choices': task {task.name!r} has no fixed answers; use 'generate'")
    converted = convert(rows, task)
    for i, row in enumerate(converted.rows):
        if not isinstance(row["answer"], str):
            raise UserError(f"{converted.where(i)}: no answer to compare with (fields {', '.join(rows.rows[i])})")
    return converted


def _candidates(
    base_model: OpenedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    rows: Rows,
    task: Task,
    form: PromptForm,
    answers: Sequence[Sequence[str]],
) -> list[list[Example]]:
    """Return every row with each of its answers as its completion."""
    pairs = [(row, each) for row, own in zip(rows.rows, answers, strict=True) for each in own]
    candidates = [{**row, "output": task.completion(each)} for row, each in pairs]
    positions = base_model.model.config.max_positions
    examples = encode(rows_from_list(candidates, rows.source), form, tokenizer, positions, learn="last")
    if examples.truncated or examples.dropped:  # part of an answer would be compared with another answer in full
        raise UserError(f"{rows.source}: a prompt is longer than the model's {positions} positions")
    numbers = iter(range(len(candidates)))
    return [[examples.example(next(numbers)) for _ in own] for own in answers]


def _matches(task: Task, found: str, answer: str) -> bool:
    return found != "" and task.matches(found, answer)


def _part(correct: Iterable[bool]) -> Part:
    each = list(correct)
    return Part(sum(each) / len(each), len(each), metrics.wilson_interval(sum(each), len(each)))


def summarise(predictions: list[dict[str, Any]]) -> Score:
    """Return the score of all predictions, and of the subsets that their fields define."""
    value, n, interval = _part(each["correct"] for each in predictions)
    clean = [each for each in predictions if not each.get("in_training")]
    parts, generated = {}, "generation" in predictions[0]
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
        empty=sum(not each["generation"].strip() for each in predictions) if generated else None,
        unfinished=sum(each["stopped"] == "length" for each in predictions) if generated else None,
        overlap=n - len(clean) if "in_training" in predictions[0] else None,
        parts=parts,
    )
