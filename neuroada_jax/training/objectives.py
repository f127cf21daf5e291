"""Objectives of decoders and encoders: their data, losses and scorers."""

import dataclasses
import datetime
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array

from neuroada_jax import console
from neuroada_jax.data.batches import AnyBatches, Batches
from neuroada_jax.data.chats import is_chat
from neuroada_jax.data.examples import Examples, encode
from neuroada_jax.data.prompts import PromptForm, PromptStyle, is_templated, is_text
from neuroada_jax.data.rows import Rows, load_rows
from neuroada_jax.errors import UserError
from neuroada_jax.evaluation import continuation
from neuroada_jax.evaluation.scoring import Scorer
from neuroada_jax.models.losses import label_losses
from neuroada_jax.pretrained import prompt_form
from neuroada_jax.pretrained.load import OpenedModel
from neuroada_jax.tasks import TASKS, Task, overlap, read_rows
from neuroada_jax.training import classification_objective, modules
from neuroada_jax.training.config import DataSection, EvaluationSet, RunConfig


@runtime_checkable
class Objective(Protocol):
    """The data, the loss and the scorers of a run.

    Attributes:
      losses: as `step.make_step` takes them.
      dropout_seed: as `step.make_step` takes it.
      form: of the prompts that are trained, as adapters record it; complete after `batches`.
    """

    @property
    def losses(self) -> Callable[..., Array]: ...

    @property
    def dropout_seed(self) -> int | None: ...

    @property
    def form(self) -> PromptForm: ...

    def evaluation_rows(self, each: EvaluationSet) -> Rows:
        """Read the rows of an evaluation set.

        Raises:
          UserError: see `tasks.read_rows`.
        """

    def training_rows(self, held_out: Mapping[str, Rows], rows: Rows | None = None) -> Rows:
        """Return the training rows.

        Args:
          held_out: the rows of every evaluation set, for `data.drop_overlap`.
          rows: training rows in memory; None: read those of `data.train`.

        Raises:
          UserError: rows that do not fit the task, or none left; an option for chats where there are none.
        """

    def scorer(self, each: EvaluationSet, rows: Rows, base_model: OpenedModel, tokenizer: Any) -> Scorer:
        """Validate and tokenise rows of an evaluation set, so that none can stop the scoring after the training.

        To be called after `training_rows` and `batches`: a set's prompts have the form of the trained ones.

        Raises:
          UserError: rows that do not fit their task or the model's positions.
        """

    def batches(self, rows: Rows, tokenizer: Any) -> AnyBatches:
        """Tokenise the training rows.

        Raises:
          UserError: rows that do not fit the task, or none with a label within `data.max_length`.
        """

    def converted(self, rows: Rows) -> Rows:
        """Return rows of a file in the form that `training_rows` returns.

        Raises:
          UserError: a row that does not fit the task.
        """

    def classes(self, rows: Rows) -> list[int] | None:
        """Return the class of each row, so that a share of the rows has all of them; None where rows have no single class.

        Raises:
          UserError: a row without a label of the task.
        """

    def validation_batches(self, rows: Rows, tokenizer: Any) -> AnyBatches:
        """Tokenise the validation rows as `batches` did the training rows; the batches are not shuffled.

        Raises:
          UserError: as `batches`.
        """


def objective(
    config: RunConfig, base_model: OpenedModel, date: str | None = None, rows: Rows | None = None
) -> tuple[Objective, OpenedModel]:
    """Return the run's objective, and the opened model with the classifier that it needs.

    Args:
      config: the run.
      base_model: the opened model.
      date: "YYYY-MM-DD", the day that dated chat templates write; None: today.
      rows: training rows in memory, in which labels are found; None: those of `data.train`.

    Raises:
      UserError: the config asks a decoder for a feature of encoders, or the reverse, or its chat template cannot be read,
        or the training rows have no labels.
    """
    modules.check_kind(config, base_model.model)
    if base_model.model.architecture.is_decoder:
        return Continuation(config, date), base_model
    read = functools.partial(_training_rows, config.data, rows)
    return classification_objective.objective(config, base_model, read)


def _training_rows(section: DataSection, rows: Rows | None) -> Rows:
    """Return the first `data.limit` of the rows in memory, or of those of `data.train`."""
    if rows is None:
        return load_rows(section.train, section.split, section.limit, section.columns)
    if not rows.rows:
        raise UserError(f"{rows.source}: no rows, expected at least one")
    rows = rows if section.limit is None else rows.part(range(min(section.limit, len(rows))))
    return rows.renamed(section.columns) if section.columns else rows


class Continuation:
    """The objective of a decoder: it learns to continue prompts, and is scored by its answers."""

    losses = staticmethod(label_losses)
    dropout_seed = None

    def __init__(self, config: RunConfig, date: str | None = None) -> None:
        """`date`: "YYYY-MM-DD", the day that dated chat templates write; None: today."""
        section = config.data
        self._config = config
        self._trained_on: frozenset[str] = frozenset()  # the questions of the training rows
        self._chats, self._only_chats, self._only_texts = 0, False, False  # of the training rows
        # As the rows are encoded; `form` is what an adapter records of it.
        self._form = self.form = PromptForm(
            style=PromptStyle(section.style or TASKS[section.task].style),
            chat_template=section.chat_template and prompt_form.given_template(section.chat_template, "data.chat_template"),
            template_arguments=section.template_arguments,
            system=section.system,
            date=date or datetime.date.today().isoformat(),
            task=section.task,
        )

    def batches(self, rows: Rows, tokenizer: Any) -> AnyBatches:
        """See `Objective`."""
        config = self._config
        if config.evaluation.sets:
            self._trained_on = overlap.questions(rows.rows)
        with console.bar("tokenising") as shown:
            report = console.reporter(shown)
            examples = encode(rows, self._form, tokenizer, config.data.max_length, report, learn=config.data.learn)
        self._form = dataclasses.replace(self._form, end_tokens=examples.end_tokens)
        self.form = self._recorded(tokenizer)
        _say_prompts(self.form, examples, "data.chat_template" if config.data.chat_template else "the tokenizer")
        console.say(
            f"{len(examples)} examples of {len(rows)} rows, {int(examples.lengths.sum())} tokens, "
            f"{int(examples.label_counts.sum())} of them labels; {examples.truncated} truncated to "
            f"{config.data.max_length} tokens, {examples.dropped} dropped since they lost all labels"
        )
        if 2 * examples.dropped > len(rows):
            console.warn(
                f"{examples.dropped} of {len(rows)} rows are dropped, since no label is within data.max_length "
                f"{config.data.max_length}: expected a larger one, or shorter prompts"
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
        return batches

    def converted(self, rows: Rows) -> Rows:
        """See `Objective`."""
        return continuation.convert(rows, TASKS[self._config.data.task])

    def classes(self, rows: Rows) -> None:
        """See `Objective`."""

    def validation_batches(self, rows: Rows, tokenizer: Any) -> AnyBatches:
        """See `Objective`."""
        section, size = self._config.data, self._config.training.batch_size
        examples = encode(rows, self._form, tokenizer, section.max_length, learn=section.learn)
        return Batches(examples, size, self._config.seed, group_by_length=True, shuffle=False)

    def _recorded(self, tokenizer: Any) -> PromptForm:
        """Return the form for adapters: style chat where all rows are chats, and the template's text if it was used."""
        form = self._form
        if not self._chats and (form.style is not PromptStyle.CHAT or self._only_texts):
            style = PromptStyle.VERBATIM if self._only_texts else form.style
            return dataclasses.replace(form, style=style, chat_template=None, template_arguments={}, date=None, system=None)
        return dataclasses.replace(
            form,
            style=PromptStyle.CHAT if self._only_chats else form.style,
            chat_template=form.chat_template or prompt_form.own_template(tokenizer),
        )

    def training_rows(self, held_out: Mapping[str, Rows], rows: Rows | None = None) -> Rows:
        """Return the rows in their task's form, without those that `data.drop_overlap` drops; see `Objective`."""
        rows = self._without_overlap(held_out, rows)
        self._chats = sum(is_chat(row) for row in rows.rows)
        self._only_chats = self._chats == len(rows)
        self._only_texts = all(map(is_text, rows.rows))
        self._check_chat_options(held_out, rows)
        return rows

    def _check_chat_options(self, held_out: Mapping[str, Rows], rows: Rows) -> None:
        """Refuse options for chats that would have no effect."""
        section = self._config.data
        if section.system is not None:
            other = next((i for i, row in enumerate(rows.rows) if not is_templated(row, self._form)), None)
            if other is not None:
                raise UserError(
                    f"data.system: {rows.where(other)} is no chat, and style {self._form.style.value!r} has no system "
                    "prompt; expected chats, or data.style: chat"
                )
        if section.style is not None and self._only_texts:
            raise UserError("data.style: the rows are texts, which are learnt as they are; remove it")
        if section.learn != "all" and not self._chats:
            raise UserError(
                f"data.learn: {section.learn!r} is for chats, and none of the {len(rows)} rows is one; remove it"
            )
        given = {"chat_template": section.chat_template, "template_arguments": section.template_arguments}
        name = next((name for name, value in given.items() if value), None)
        if name is None or self._chats or self._form.style is PromptStyle.CHAT:
            return
        styles = {each.name: self._style(each) for each in self._config.evaluation.sets}
        if not any(is_templated(row, styles[each]) for each, asked in held_out.items() for row in asked.rows):
            raise UserError(f"data.{name}: no row is a chat and no style is chat, so no chat template is used; remove it")

    def _without_overlap(self, held_out: Mapping[str, Rows], rows: Rows | None) -> Rows:
        section = self._config.data
        rows = self.converted(_training_rows(section, rows))
        if not section.drop_overlap:
            return rows
        asked: set[str] = set()
        for each in self._config.evaluation.sets:
            asked |= overlap.questions(continuation.convert(held_out[each.name], self._task(each)).rows)
        kept = [i for i, row in enumerate(rows.rows) if overlap.question(row) not in asked]
        if not kept:
            raise UserError(
                f"{rows.source}: every row's question is in an evaluation set, so that data.drop_overlap leaves none"
            )
        console.say(f"dropped {len(rows) - len(kept)} of {len(rows)} rows, whose question is in an evaluation set")
        return rows.part(kept)

    def _task(self, each: EvaluationSet) -> Task:
        return TASKS[each.task or self._config.data.task]

    def evaluation_rows(self, each: EvaluationSet) -> Rows:
        """See `Objective`."""
        return read_rows(self._task(each), each.data, each.split, each.limit, self._config.columns_of(each))

    def scorer(self, each: EvaluationSet, rows: Rows, base_model: OpenedModel, tokenizer: Any) -> Scorer:
        """See `Objective`; the questions of `training_rows` are scored separately."""
        options = continuation.Options(
            dataclasses.replace(self._form, style=self._style(each), task=self._task(each).name),
            each.method,
            each.max_new_tokens,
            each.generation,
            self._config.evaluation.batch_size,
            self._trained_on,
        )
        return continuation.ContinuationScorer.prepare(base_model, tokenizer, rows, self._task(each), options)

    def _style(self, each: EvaluationSet) -> PromptStyle:
        """Return the set's own style, else the training data's if the tasks are related, else the task's."""
        section, task = self._config.data, self._task(each)
        trained = PromptStyle.CHAT if self._only_chats else section.style
        return PromptStyle(each.style or (trained if task.is_related(TASKS[section.task]) else None) or task.style)


def _say_prompts(form: PromptForm, examples: Examples, origin: str) -> None:
    """Print the form of the trained prompts, and what tokenising had to do to keep it."""
    console.say(prompt_form.describe(form, origin))
    if examples.foreign_tokens:
        names = ", ".join(examples.foreign_tokens)
        console.say(f"the chat template means these as one token, and the tokenizer splits them: {names}")
    if examples.split_rows:
        console.say(
            f"{examples.split_rows} chats became one example a learnt turn: their template or tokenizer writes a turn "
            "differently once later text follows"
        )
    if examples.crossings:
        console.say(
            f"in {examples.crossings} rows a token would span the border between prompt and completion: both are tokenised "
            "by themselves, as in a generation"
        )
    if examples.unasked:
        console.say(
            f"in {examples.unasked} chats the template's generation blocks follow other tokens than a generation's prompt "
            "has: they are trained in another form than they are asked"
        )
    if examples.unended:
        console.say(
            f"in {examples.unended} chats the template's generation blocks leave out the end of a turn, which is not learnt"
        )
