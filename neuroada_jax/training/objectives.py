"""What a run trains a model for. Decoders and encoders differ here, in data, losses and scores, and nowhere else."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array

from neuroada_jax import classification, console, data, evaluation
from neuroada_jax.batches import AnyBatches, Batches, ClassificationBatches
from neuroada_jax.bypass import Tree
from neuroada_jax.evaluation import Progress, Score
from neuroada_jax.losses import classification_losses, target_losses
from neuroada_jax.prompts import PromptStyle
from neuroada_jax.rows import Rows, load_rows
from neuroada_jax.tasks import GLUE, TASKS
from neuroada_jax.training import modules
from neuroada_jax.training.config import EvaluationSet, RunConfig
from neuroada_jax.weights import LoadedModel, with_labels


@runtime_checkable
class Objective(Protocol):
    """How rows become batches, what is lost on a batch, and how a set of rows is scored.

    Attributes:
      losses: as `step.make_step` takes them.
      dropout_seed: as `step.make_step` takes it.
    """

    losses: Callable[..., Array]
    dropout_seed: int | None

    def batches(self, tokenizer: Any) -> tuple[AnyBatches, Rows]:
        """The training data, and the rows that a batch's numbers mean.

        Raises:
          UserError: rows that do not fit the task.
        """

    def rows(self, each: EvaluationSet) -> Rows:
        """The rows of an evaluation set, read and checked.

        Raises:
          UserError: a file that is missing, or rows that do not fit their task.
        """

    def score(
        self, each: EvaluationSet, rows: Rows, base: LoadedModel, params: Tree, tokenizer: Any, progress: Progress
    ) -> Score:
        """Scores rows of an evaluation set with the parameters of the whole model."""


def objective(config: RunConfig, base: LoadedModel) -> tuple[Objective, LoadedModel]:
    """The run's objective, and the opened model with the head that it asks for.

    Raises:
      UserError: the config asks of a decoder what only an encoder does, or the reverse.
    """
    modules.check_kind(config, base.model)
    if base.model.architecture.is_decoder:
        return Continuation(config), base
    return Classification(config), with_labels(base, GLUE[config.data.task].labels)


class Continuation:
    """A decoder learns to continue prompts, and is scored by what it generates."""

    losses = staticmethod(target_losses)
    dropout_seed = None

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def batches(self, tokenizer: Any) -> tuple[AnyBatches, Rows]:
        """See `Objective`."""
        config = self._config
        task = TASKS[config.data.task]
        rows = evaluation.convert(load_rows(config.data.train, config.data.split, config.data.limit), task)
        style = PromptStyle(config.data.style or task.style)
        with console.bar("tokenising") as shown:
            examples = data.encode(rows, style, tokenizer, config.data.max_length, console.reporter(shown))
        console.say(
            f"{len(examples)} examples of {len(rows)} rows, {int(examples.lengths.sum())} tokens, "
            f"{int(examples.target_counts.sum())} of them targets; {examples.cut} cut to {config.data.max_length} tokens, "
            f"{examples.left_out} left out since nothing of their target was left"
        )
        batches = Batches(
            examples,
            config.training.batch_size,
            config.seed,
            config.data.buckets,
            config.data.group_by_length,
            packed_length=config.data.max_length if config.data.packing else None,
        )
        if config.data.packing:
            filled = int(examples.lengths.sum()) / (batches.row_count * config.data.max_length)
            console.say(
                f"packed into {batches.row_count} rows of {config.data.max_length} tokens: "
                f"{len(examples) / batches.row_count:.1f} examples a row, {100 * filled:.1f} % of it tokens"
            )
        return batches, rows

    def rows(self, each: EvaluationSet) -> Rows:
        """See `Objective`."""
        rows = load_rows(each.data, each.split, each.limit)
        evaluation.check_rows(rows, TASKS[each.task or self._config.data.task], each.method)
        return rows

    def score(
        self, each: EvaluationSet, rows: Rows, base: LoadedModel, params: Tree, tokenizer: Any, progress: Progress
    ) -> Score:
        """See `Objective`."""
        return evaluation.evaluate(
            base,
            params,
            tokenizer,
            rows,
            TASKS[each.task or self._config.data.task],
            style=self._style(each),
            method=each.method,
            max_new_tokens=each.max_new_tokens,
            batch_size=self._config.evaluation.batch_size,
            on_progress=progress,
        )

    def _style(self, each: EvaluationSet) -> PromptStyle:
        """The set's own style, else the training data's where the task is the same, else the task's."""
        section = self._config.data
        same_task = each.task in (None, section.task)
        named = each.style or (section.style if same_task else None)
        return PromptStyle(named or TASKS[each.task or section.task].style)


class Classification:
    """An encoder learns the labels of one GLUE task, with dropout, and is scored by the task's metric."""

    losses = staticmethod(classification_losses)

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._task = GLUE[config.data.task]
        self.dropout_seed = config.seed

    def batches(self, tokenizer: Any) -> tuple[AnyBatches, Rows]:
        """See `Objective`."""
        section = self._config.data
        rows = load_rows(section.train, section.split, section.limit)
        with console.bar("tokenising") as shown:
            examples = classification.encode(rows, self._task, tokenizer, section.max_length, console.reporter(shown))
        console.say(
            f"{len(examples)} examples, {int(examples.lengths.sum())} tokens; "
            f"{examples.cut} cut to {section.max_length} tokens"
        )
        config = self._config
        batches = ClassificationBatches(
            examples, config.training.batch_size, config.seed, section.buckets, section.group_by_length
        )
        return batches, rows

    def rows(self, each: EvaluationSet) -> Rows:
        """See `Objective`."""
        rows = load_rows(each.data, each.split, each.limit)
        for i, row in enumerate(rows.rows):
            self._task.convert(row, rows.where(i))
        return rows

    def score(
        self, each: EvaluationSet, rows: Rows, base: LoadedModel, params: Tree, tokenizer: Any, progress: Progress
    ) -> Score:
        """See `Objective`."""
        return classification.evaluate(
            base,
            params,
            tokenizer,
            rows,
            self._task,
            max_length=self._config.data.max_length,
            batch_size=self._config.evaluation.batch_size,
            on_progress=progress,
        )
