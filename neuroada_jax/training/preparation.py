"""The first stage of a run: everything that can be checked without weights, and before a file is written."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from neuroada_jax import console
from neuroada_jax.core import scores
from neuroada_jax.core.trees import ModulePath, Tree
from neuroada_jax.data.batches import AnyBatches
from neuroada_jax.data.examples import encode_prompt
from neuroada_jax.data.prompts import render_prompt
from neuroada_jax.data.rows import Rows, load_rows
from neuroada_jax.errors import UserError
from neuroada_jax.evaluation import scoring
from neuroada_jax.evaluation.scoring import Score, Scorer
from neuroada_jax.generation.generate import check_lengths
from neuroada_jax.pretrained.load import OpenedModel, open_with_tokenizer
from neuroada_jax.tasks import TASKS
from neuroada_jax.training import (
    best_epoch,
    checkpoint,
    modules,
    objectives,
    one_job,
    parallel,
    peers,
    processes,
    resuming,
    run_directory,
    starting_rate,
    trackers,
    validation,
)
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.objectives import Objective
from neuroada_jax.training.shared_checkpoint import SharedCheckpoints
from neuroada_jax.training.step import TrainState

MOST_STEPS = 2**31  # which a schedule counts in 32 bits


@dataclasses.dataclass(frozen=True)
class PreparedRows:
    """The rows of a run, read, checked and tokenised, with everything else of it that depends on model and config alone.

    Attributes:
      config: the run, with the defaults that depend on the model filled in.
      opened: the model, whose weights have not been read, with the classifier that the task needs.
      tokenizer: of the model.
      objective: data, loss and scorers of the task.
      target_paths: the linear maps that carry a bypass.
      scorers: of every evaluation set by name; of the set that chooses the epoch, its test part.
      choosing: scorer of the rows that choose the epoch; None where the last epoch is kept.
      split: the row numbers of the two parts of that set.
      batches: the training data.
      rows: the rows that the numbers in a batch refer to, for messages.
      validation: the validation rows; None where there are none.
    """

    config: RunConfig
    opened: OpenedModel
    tokenizer: Any
    objective: Objective
    target_paths: list[ModulePath]
    scorers: dict[str, Scorer]
    choosing: Scorer | None
    split: best_epoch.Split | None
    batches: AnyBatches
    rows: Rows
    validation: validation.ValidationRows | None

    @property
    def total_steps(self) -> int:
        """Updates of the complete run."""
        training = self.config.training
        return training.steps or (training.epochs or 0) * self.batches.steps_per_epoch


@dataclasses.dataclass(frozen=True)
class Prepared(PreparedRows):
    """A run that has passed every check that needs no weights; nothing is written yet.

    Attributes:
      devices: that the run uses.
      checkpoints: of the run's directory.
      resumed_from: the checkpoint to resume from; None to start at step 0.
      force_resume: resume although the base weights differ from those that the run began with.
      seen: what was in the run's directory when it was checked.
      score: the caller's own score of connections, for `bypass.score: custom`.
      replaced: files and folders of former runs that are removed when this one begins, beside its own.
    """

    devices: parallel.Parallel
    checkpoints: checkpoint.Checkpoints
    resumed_from: checkpoint.CheckpointInfo | None
    force_resume: bool
    seen: run_directory.Seen
    score: scores.Score | None = None
    replaced: Sequence[Path] = ()

    def score_sets(self, base_model: OpenedModel, params: Tree, when: str) -> dict[str, Score]:
        """Score every evaluation set and write its predictions to predictions-<set>-<when>.jsonl in the run's directory.

        Args:
          base_model: architecture and config.
          params: the complete parameters to score.
          when: "before" or "after".
        """
        scores = {}
        for name, scorer in self.scorers.items():
            scores[name] = score = self._score(name, scorer, base_model, params)
            console.say(f"{name}: {score.metric} {score.value:.4f} of {score.n}")
            if peers.current().is_first:
                scoring.write_predictions(self.config.directory / f"predictions-{name}-{when}.jsonl", score)
        return scores

    def score_epoch(self, base_model: OpenedModel, poll: Callable[[], None], state: TrainState) -> Score:
        """Score a state on the rows that choose the epoch; what `poll` raises ends the scoring."""
        chooser = self.config.evaluation.best_epoch
        assert chooser is not None and self.choosing is not None
        return self._score(chooser, self.choosing, base_model, self.devices.local(state).tuned, poll)

    def _score(
        self, name: str, scorer: Scorer, base_model: OpenedModel, params: Tree, poll: Callable[[], None] = lambda: None
    ) -> Score:
        """Score the rows of a set.

        Each of several processes makes the predictions of its share of the rows if it has all weights, else all make all.
        """
        apart = not self.devices.shares_weights
        with console.bar(f"evaluating {name}") as bar:
            report = console.reporter(bar)

            def progress(done: int, steps: int) -> None:
                report(done, steps)
                if apart:  # otherwise the others would wait for this process in a batch
                    poll()

            if apart:
                return processes.score(name, scorer, base_model, params, progress, poll)
            return scoring.score(scorer, base_model, params, progress)


def prepare(
    config: RunConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    force_resume: bool = False,
    model: tuple[OpenedModel, Any] | None = None,
    rows: Rows | None = None,
    validation_rows: Rows | None = None,
    score: scores.Score | None = None,
) -> Prepared:
    """Check everything that can be checked without weights. Touches no file.

    Args:
      config: the run.
      overwrite: replace a run that is already in the output directory.
      resume: continue that run from its newest checkpoint, or from the start if it was interrupted before the first.
      force_resume: resume although the config, the training rows or the base weights have changed in a way that changes
        the result.
      model: a model and its tokenizer that are already in memory; None: open those of `config.model`.
      rows: training rows that are already in memory; None: read those of `config.data`.
      validation_rows: validation rows that are already in memory; None: those that `config.data.validation` names.
      score: the caller's own score of connections; required, and read, with `bypass.score: custom`.

    Raises:
      UserError: anything wrong with config, model, data or output directory.
    """
    one_job.check_config(config, overwrite=overwrite, resume=resume, force_resume=force_resume)
    run_directory.check(config, overwrite, resume, force_resume)
    seen = run_directory.look(config)
    trackers.check(config.tracking)
    devices = parallel.resolve(config.parallel)
    devices.check(config)
    directory, training = config.directory, config.training
    folder, keep = directory / "checkpoints", (training.keep_last, training.keep_best)
    alone = peers.current().count == 1
    checkpoints = checkpoint.Checkpoints(folder, *keep) if alone else SharedCheckpoints(folder, *keep, devices)
    resumed_from = run_directory.newest_checkpoint(checkpoints, directory) if resume else None
    opened, tokenizer = model or open_with_tokenizer(
        config.model.path, config.model.dtype, quantization_of=config.model.held
    )
    opened = OpenedModel(opened.model, opened.path, opened.source)  # a caller's own weights are given to `fit`
    config = modules.resolved(config, opened.model)
    if resumed_from and peers.current().is_first:  # the others have the same config, but for paths
        resuming.check_config(resumed_from.about, config, force_resume)
    custom = config.method == "neuroada" and config.bypass.score == "custom"
    if custom and score is None and not resumed_from:
        raise UserError(
            "bypass.score: 'custom' stands for a Python function, which neuroada_jax.fine_tune(score=function) takes; give "
            "another score in a config file"
        )
    starting_rate.check(config, opened.model)
    date = resumed_from.about.get("date") if resumed_from else None  # checkpoints of 0.1 have none
    found = prepare_rows(config, (opened, tokenizer), date=date, rows=rows, validation_rows=validation_rows)
    one_job.check_data(found)
    if resumed_from:
        resuming.check_data(resumed_from.about, directory, found, force_resume)
    return Prepared(
        **vars(found),
        devices=devices,
        checkpoints=checkpoints,
        resumed_from=resumed_from,
        force_resume=force_resume,
        seen=seen,
        score=score,
    )


def prepare_rows(
    config: RunConfig,
    model: tuple[OpenedModel, Any],
    *,
    date: str | None = None,
    rows: Rows | None = None,
    validation_rows: Rows | None = None,
) -> PreparedRows:
    """Read, check and tokenise the rows of a run; needs neither weights nor devices nor an output directory.

    Args:
      config: the run.
      model: the opened model and its tokenizer.
      date: "YYYY-MM-DD", the day that dated chat templates write; None: today.
      rows: see `prepare`.
      validation_rows: see `prepare`.

    Raises:
      UserError: anything wrong with rows, or with what the config asks of the model.
    """
    opened, tokenizer = model
    config = modules.resolved(config, opened.model)
    objective, opened = objectives.objective(config, opened, date, rows)
    modules.check_length(config, opened.model)
    modules.say_dropout(opened.model)
    modules.say_unused(config)
    target_paths = modules.checked_targets(config, opened.model)
    sets, chooser = {each.name: each for each in config.evaluation.sets}, config.evaluation.best_epoch
    held_out = {name: objective.evaluation_rows(each) for name, each in sets.items()}
    rows = objective.training_rows(held_out, rows)
    rows, held_back = _validation_rows(config, objective, rows, validation_rows)
    batches = objective.batches(rows, tokenizer)  # before the scorers, which end at the tokens that trained turns end with
    choosing, split = None, None
    if chooser is not None:
        split = best_epoch.split(len(held_out[chooser]), config.seed)
        part, held_out[chooser] = (held_out[chooser].part(numbers.tolist()) for numbers in split)
        choosing = objective.scorer(sets[chooser], part, opened, tokenizer)
    scorers = {name: objective.scorer(each, held_out[name], opened, tokenizer) for name, each in sets.items()}
    if config.training.epochs is not None and config.training.epochs * batches.steps_per_epoch >= MOST_STEPS:
        raise UserError(
            f"training.epochs: {config.training.epochs} times {batches.steps_per_epoch} steps are too many, expected below "
            "2^31 in all"
        )
    validating = None if held_back is None else _tokenised(config, objective, held_back, opened, tokenizer)
    return PreparedRows(
        config=config,
        opened=opened,
        tokenizer=tokenizer,
        objective=objective,
        target_paths=target_paths,
        scorers=scorers,
        choosing=choosing,
        split=split,
        batches=batches,
        rows=rows,
        validation=validating,
    )


def _validation_rows(config: RunConfig, objective: Objective, rows: Rows, given: Rows | None) -> tuple[Rows, Rows | None]:
    """Return the training rows and the validation rows, None where the config asks for none."""
    source = config.data.validation
    if given is not None:
        return rows, objective.converted(given.renamed(config.data.columns) if config.data.columns else given)
    if source is None:
        return rows, None
    if isinstance(source, float):
        return validation.split(rows, source, config.seed, objective.classes(rows))
    return rows, objective.converted(load_rows(source, "validation", None, config.data.columns))


def _tokenised(
    config: RunConfig, objective: Objective, rows: Rows, opened: OpenedModel, tokenizer: Any
) -> validation.ValidationRows:
    """Return the validation rows in batches, and the prompts of those whose continuations are shown."""
    batches = objective.validation_batches(rows, tokenizer)
    console.say(f"{len(batches.examples)} examples of {len(rows)} rows are for validation")
    count, prompts = config.training.validation_samples, []
    if count and not opened.model.architecture.is_decoder:
        kind = opened.model.hf_config["model_type"]
        raise UserError(f"training.validation_samples: {kind} is an encoder, which continues no prompts; set it to 0")
    for i, row in enumerate(rows.rows[:count]):
        where, form = rows.where(i), objective.form
        prompts.append((render_prompt(row, form, tokenizer, where), encode_prompt(row, form, tokenizer, where)))
    longest = TASKS[config.data.task].max_new_tokens if count else 0
    check_lengths(opened.model, [ids for _, ids in prompts], longest, lambda i: f"{rows.where(i)}: the prompt")
    return validation.ValidationRows(batches, prompts)
