"""Scoring a set of rows: generate or choose answers, compare exactly, and say how sure the figure is."""

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import linen as nn

from neuroada_jax import data, files
from neuroada_jax.batches import Batch, Batches
from neuroada_jax.bypass import Tree
from neuroada_jax.errors import UserError
from neuroada_jax.generation import generate
from neuroada_jax.losses import target_losses
from neuroada_jax.prompts import PromptStyle
from neuroada_jax.rows import Rows, rows_from_list
from neuroada_jax.tasks import Task
from neuroada_jax.weights import LoadedModel

Progress = Callable[[int, int], None]


class Score(NamedTuple):
    """A metric over n rows, and every prediction.

    Attributes:
      value: of the metric: exact-match accuracy, or what a GLUE task is scored by.
      n: rows.
      interval: the 95 % Wilson interval of an accuracy; None for other metrics.
      predictions: a dict for each row.
      metric: its name.
      beside: further metrics of the same predictions, by name.
    """

    value: float
    n: int
    interval: tuple[float, float] | None
    predictions: list[dict[str, Any]]
    metric: str = "accuracy"
    beside: Mapping[str, float] = MappingProxyType({})

    @property
    def accuracy(self) -> float:
        """The value of a set that is scored by accuracy."""
        return self.value


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion."""
    z = 1.959964
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low = 0.0 if correct == 0 else centre - half  # exactly, where rounding would leave 1e-19
    high = 1.0 if correct == n else centre + half
    return low, high


def end_tokens(base: LoadedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a generation: the checkpoint's generation config, its config, the tokenizer's EOS."""
    found: list[int] = []
    generation = Path(base.path) / "generation_config.json"
    sources = [files.read_json(generation)] if generation.is_file() else []
    for value in [*(source.get("eos_token_id") for source in [*sources, base.model.hf_config]), tokenizer.eos_token_id]:
        found += value if isinstance(value, list) else [] if value is None else [value]
    return sorted(set(found))


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


def evaluate(
    base: LoadedModel,
    params: Tree,
    tokenizer: transformers.PreTrainedTokenizerBase,
    rows: Rows,
    task: Task,
    *,
    style: PromptStyle,
    method: str = "generate",
    max_new_tokens: int = 32,
    batch_size: int = 16,
    on_progress: Progress | None = None,
) -> Score:
    """Scores `rows` with plain (base or merged) parameters.

    Args:
      base: architecture and config.
      params: what to score.
      tokenizer: of the base.
      rows: raw rows of the task.
      task: how to prompt and how to read answers.
      style: prompt style.
      method: "generate" decodes greedily and extracts the answer; "choices" takes the likeliest of the task's answers.
      max_new_tokens: for "generate".
      batch_size: prompts, or (row, choice) pairs, at a time.
      on_progress: called with (done, in all).

    Raises:
      UserError: see `check_rows`; also prompts that do not fit the model.
    """
    converted = check_rows(rows, task, method)
    if method == "choices":
        predictions = _choose(base, params, tokenizer, converted, task, style, batch_size, on_progress)
    else:
        prompts = [data.encode_prompt(row, style, tokenizer, converted.where(i)) for i, row in enumerate(converted.rows)]
        outputs = generate(
            base.model,
            params,
            prompts,
            max_new_tokens=max_new_tokens,
            eos_ids=end_tokens(base, tokenizer),
            batch_size=batch_size,
            on_progress=on_progress,
        )
        texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in outputs]
        predictions = [{"generation": text, "prediction": task.extract(text)} for text in texts]
    for i, prediction in enumerate(predictions):
        answer = converted.rows[i]["answer"].strip()
        prompt = data.render_prompt(converted.rows[i], style, tokenizer, converted.where(i))
        prediction |= {"answer": answer, "correct": prediction["prediction"] == answer, "prompt": prompt}
    correct = sum(prediction["correct"] for prediction in predictions)
    n = len(predictions)
    return Score(correct / n, n, wilson_interval(correct, n), predictions)


@functools.partial(jax.jit, static_argnames="module")
def _row_losses(module: nn.Module, params: Tree, batch: Batch) -> jax.Array:
    return jnp.sum(target_losses(module, {"params": params}, batch), axis=1)


def _choose(
    base: LoadedModel,
    params: Tree,
    tokenizer: transformers.PreTrainedTokenizerBase,
    rows: Rows,
    task: Task,
    style: PromptStyle,
    batch_size: int,
    on_progress: Progress | None,
) -> list[dict[str, Any]]:
    """The answer whose target text has the highest likelihood, for every row."""
    candidates = [{**row, "output": task.target(choice)} for row in rows.rows for choice in task.choices]
    examples = data.encode(rows_from_list(candidates, rows.source), style, tokenizer, base.model.config.max_positions)
    if examples.cut or examples.left_out:  # part of an answer would be compared with the whole of another
        raise UserError(f"{rows.source}: a prompt is longer than the model's {base.model.config.max_positions} positions")
    batches = Batches(examples, batch_size, seed=0, group_by_length=True, shuffle=False)
    module = base.model.module()
    losses = np.zeros(len(candidates))
    for index in range(batches.steps_per_epoch):
        numbers = batches.rows(0, index)
        losses[numbers] = np.asarray(_row_losses(module, params, batches.batch(0, index)))[: len(numbers)]
        if on_progress:
            on_progress(index + 1, batches.steps_per_epoch)
    best = losses.reshape(-1, len(task.choices)).argmin(axis=1)
    return [{"prediction": task.choices[choice]} for choice in best]


def write_predictions(path: Path, score: Score) -> None:
    """Every prediction as a line of JSON that a person can read."""
    lines = [json.dumps(prediction, ensure_ascii=False) for prediction in score.predictions]
    files.write_text(path, "\n".join(lines) + "\n")
