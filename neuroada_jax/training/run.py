"""One run from config to adapter: load, select, evaluate, train, evaluate, save. The loop itself is in loop.py."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from neuroada_jax import bypass, checkpoint, console, data, evaluation, files
from neuroada_jax.batches import Batches
from neuroada_jax.bypass import Tree
from neuroada_jax.errors import UserError
from neuroada_jax.formats import huggingface, native
from neuroada_jax.models import heads
from neuroada_jax.prompts import PromptStyle
from neuroada_jax.rows import Rows, load_rows
from neuroada_jax.tasks import TASKS, Source, overlap
from neuroada_jax.training import connections, loop, modules, optimizer, plots, report, step
from neuroada_jax.training.config import EvaluationSet, RunConfig, flatten_config, to_yaml
from neuroada_jax.training.config import load as load_config
from neuroada_jax.weights import LoadedModel, open_base, with_weights


def evaluation_rows(config: RunConfig) -> dict[str, Rows]:
    """The rows of every evaluation set, read and checked.

    Raises:
      UserError: a file that is missing, or rows that do not fit their task.
    """
    found = {}
    for each in config.evaluation.sets:
        task = TASKS[each.task or config.data.task]
        source = Source(each.data, each.split) if each.data else task.source()
        found[each.name] = load_rows(source.data, source.split, each.limit)
        evaluation.check_rows(found[each.name], task, each.method)
    return found


def training_rows(config: RunConfig, held_out: dict[str, Rows]) -> Rows:
    """The rows to train on in their task's form, without those that `data.drop_overlap` leaves out.

    Raises:
      UserError: rows that do not fit the task, or none left.
    """
    rows = evaluation.convert(load_rows(config.data.train, config.data.split, config.data.limit), TASKS[config.data.task])
    if not config.data.drop_overlap:
        return rows
    asked: set[str] = set()
    for each in config.evaluation.sets:
        asked |= overlap.questions(evaluation.convert(held_out[each.name], TASKS[each.task or config.data.task]).rows)
    kept = [i for i, row in enumerate(rows.rows) if overlap.question(row) not in asked]
    if not kept:
        raise UserError(
            f"{rows.source}: every row's question is in an evaluation set, so that data.drop_overlap leaves none"
        )
    console.say(f"left out {len(rows) - len(kept)} of {len(rows)} rows, whose question is in an evaluation set")
    return Rows([rows.rows[i] for i in kept], rows.source, [rows.places[i] for i in kept])


def evaluate_sets(
    config: RunConfig,
    rows: dict[str, Rows],
    trained_on: frozenset[str],
    base: LoadedModel,
    params: Tree,
    tokenizer: Any,
    when: str,
) -> dict[str, evaluation.Score]:
    """Scores every evaluation set of a config; predictions go to predictions-<set>-<when>.jsonl in its folder.

    trained_on: the questions of the training rows.
    """
    scores = {}
    for each in config.evaluation.sets:
        task = TASKS[each.task or config.data.task]
        with console.bar(f"evaluating {each.name}") as shown:
            scores[each.name] = evaluation.evaluate(
                base,
                params,
                tokenizer,
                rows[each.name],
                task,
                style=_style(each, config),
                method=each.method,
                max_new_tokens=each.max_new_tokens,
                decoding=each.generation,
                batch_size=config.evaluation.batch_size,
                trained_on=trained_on,
                on_progress=console.reporter(shown),
            )
        score = scores[each.name]
        console.say(f"{each.name}: accuracy {score.accuracy:.4f} of {score.n}")
        evaluation.write_predictions(config.directory / f"predictions-{each.name}-{when}.jsonl", score)
    return scores


def _style(each: EvaluationSet, config: RunConfig) -> PromptStyle:
    """The set's own style, else the training data's where the task or its suite is the same, else the task's."""
    task, trained = TASKS[each.task or config.data.task], TASKS[config.data.task]
    related = task is trained or (task.suite is not None and task.suite == trained.suite)
    return PromptStyle(each.style or (config.data.style if related else None) or task.style)


def _check_output(config: RunConfig, overwrite: bool, resume: bool) -> None:
    """Refuses a folder that holds a run, unless it is to be replaced or resumed."""
    written = config.directory / "config.yaml"
    if overwrite and resume:
        raise UserError("give --overwrite or --resume, not both")
    if not written.exists():
        if resume:
            raise UserError(f"{config.directory} holds no run to resume")
        return
    if not overwrite and not resume:
        raise UserError(
            f"{config.directory} holds a run already; use --overwrite to replace it, --resume to go on, or another name"
        )


def _check_unchanged(config: RunConfig) -> None:
    """Refuses to resume a run with another config than it began with."""
    old, new = flatten_config(load_config(str(config.directory / "config.yaml"))), flatten_config(config)
    changed = [f"{key} ({old.get(key)} then, {new.get(key)} now)" for key in new if old.get(key) != new[key]]
    if changed:
        raise UserError(f"{config.directory}: cannot resume with another config; changed: {', '.join(changed)}")


def _clear_output(directory: Path) -> None:
    """Makes the run's folder and removes what an earlier run left there under the names of this one's results."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for stale in ("adapter", "merged", "checkpoints"):
            shutil.rmtree(directory / stale, ignore_errors=True)
        for stale in ("results.json", "metrics.jsonl", "loss.png", "predictions-*.jsonl"):
            for file in directory.glob(stale):
                file.unlink()
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror})") from error


def _encode(config: RunConfig, tokenizer: Any, rows: Rows) -> tuple[Batches, list[str]]:
    style = PromptStyle(config.data.style or TASKS[config.data.task].style)
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
    return batches, [rows.where(i) for i in range(len(rows))]


def train(config: RunConfig, *, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
    """Runs a config from start to end and leaves a run's files (docs/design.md) in its directory.

    Args:
      config: the run.
      overwrite: replace a run that is already in the output directory.
      resume: go on with that run from its newest checkpoint.

    Returns: the content of results.json.

    Raises:
      UserError: anything wrong with config, model, data or output folder; a loss that becomes NaN or infinite (the
        adapter of the last good step is kept).
    """
    # What is cheap to check comes before the weights are read, and the folder is touched when all of it is right.
    directory = config.directory
    _check_output(config, overwrite, resume)
    base, tokenizer = open_base(config.model.path, config.model.dtype)
    config = modules.resolved(config, base.model)
    if resume:
        _check_unchanged(config)
    modules.check_kind(config, base.model)
    modules.check_length(config, base.model)
    paths = modules.target_paths(config, base.model)
    held_out = evaluation_rows(config)
    rows = training_rows(config, held_out)
    batches, places = _encode(config, tokenizer, rows)
    trained_on = overlap.questions(rows.rows)
    base = with_weights(base, config.seed)
    head = modules.head_paths(config, base, paths)
    if resume:  # the columns of its checkpoint will take the place of these
        built = bypass.build(base.params, paths, config.bypass.k, dtype=connections.value_dtype(config, base.model))
    else:
        first_epoch = (batches.batch(0, index) for index in range(batches.steps_per_epoch))
        built = connections.choose(config, base.model, base.params, paths, first_epoch)
    if not resume:
        _clear_output(directory)
        files.write_text(directory / "config.yaml", to_yaml(config))

    total_steps = config.training.steps or (config.training.epochs or 0) * batches.steps_per_epoch
    trainable = bypass.count(built.values) + bypass.count(heads.split(base.params, head)[1])
    total = bypass.count(base.params)
    console.say(f"training {trainable:,} of {total:,} parameters ({100 * trainable / total:.4f} %) for {total_steps} steps")

    before: dict[str, evaluation.Score] = {}
    if config.evaluation.before and not resume:
        before = evaluate_sets(config, held_out, trained_on, base, base.params, tokenizer, "before")

    transformation = optimizer.build(config.optimizer, total_steps, config.head)
    state = step.initial_state(base.params, built, transformation, head)
    base = base._replace(params={})  # the state owns the weights now: its buffers are donated step by step

    def save_adapter(state: step.TrainState) -> None:
        native.save(
            directory / "adapter",
            state.bypass,
            base,
            k=config.bypass.k,
            targets=config.bypass.targets or [],
            seed=config.seed,
            rule=config.bypass.score,
            head=state.head,
            replace=True,
        )

    run_step = step.make_step(base.model.module(config.training.remat_policy), transformation, config.training.accumulation)
    rates = optimizer.schedule(config.optimizer, total_steps)
    began = time.perf_counter()
    try:
        with checkpoint.Checkpoints(directory / "checkpoints") as checkpoints:
            if resume:
                state = checkpoints.restore(state)
                console.say(f"resuming after step {int(state.step)}")
            state, done = loop.run(
                state,
                run_step,
                batches,
                total_steps,
                rates,
                config.training.log_every,
                directory / "metrics.jsonl",
                checkpoints.save,
                config.training.save_every,
            )
    except loop.NotFinite as failure:
        save_adapter(failure.state)
        named = ", ".join(places[row] for row in failure.rows[:8])
        raise UserError(
            f"the loss or its gradient became NaN or infinite at step {failure.step} (rows {named}"
            f"{', ...' if len(failure.rows) > 8 else ''}); the adapter of the last good step is in {directory / 'adapter'}"
        ) from failure
    seconds = time.perf_counter() - began
    save_adapter(state)
    after = evaluate_sets(config, held_out, trained_on, base, state.merged, tokenizer, "after")
    if config.merge:
        huggingface.save(directory / "merged", base, state.merged, tokenizer, replace=True)

    results = report.results(config, batches, total_steps, (trainable, total), done, seconds, before, after)
    files.write_text(directory / "results.json", json.dumps(results, indent=2) + "\n")
    plots.loss_curve(directory / "loss.png", done.losses, config.name)
    return results
