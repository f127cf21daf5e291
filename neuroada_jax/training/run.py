"""One run from config to adapter: load, select, evaluate, train, evaluate, save. The loop itself is in loop.py."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from neuroada_jax import console, files
from neuroada_jax.adapters import native
from neuroada_jax.core import bypass
from neuroada_jax.core.trees import Tree
from neuroada_jax.data.rows import Rows
from neuroada_jax.errors import UserError
from neuroada_jax.evaluation import scoring
from neuroada_jax.models import dense_modules
from neuroada_jax.pretrained import save
from neuroada_jax.pretrained.load import OpenedModel, load_with_progress, open_with_tokenizer
from neuroada_jax.training import (
    best_epoch,
    checkpoint,
    connections,
    loop,
    modules,
    objectives,
    optimizer,
    parallel,
    report,
    resuming,
    step,
    trackers,
    watchdog,
)
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.config_file import to_yaml
from neuroada_jax.training.objectives import Objective
from neuroada_jax.training.signals import Stop


def evaluation_rows(config: RunConfig, objective: Objective, base_model: OpenedModel, tokenizer: Any) -> dict[str, Rows]:
    """The rows of every evaluation set, read and checked. Needs no weights.

    Raises:
      UserError: a file that is missing, or rows that do not fit their task or the model's positions.
    """
    return {each.name: objective.rows(each, base_model, tokenizer) for each in config.evaluation.sets}


def evaluate_sets(
    config: RunConfig,
    objective: Objective,
    rows: dict[str, Rows],
    base_model: OpenedModel,
    params: Tree,
    tokenizer: Any,
    when: str,
) -> dict[str, scoring.Score]:
    """Scores every evaluation set of a config; predictions go to predictions-<set>-<when>.jsonl in its folder."""
    scores = {}
    for each in config.evaluation.sets:
        with console.bar(f"evaluating {each.name}") as shown:
            progress = console.reporter(shown)
            score = objective.score(each, rows[each.name], base_model, params, tokenizer, progress)
        scores[each.name] = score
        console.say(f"{each.name}: {score.metric} {score.value:.4f} of {score.n}")
        scoring.write_predictions(config.directory / f"predictions-{each.name}-{when}.jsonl", score)
    return scores


def _check_output(config: RunConfig, overwrite: bool, resume: bool, force_resume: bool) -> None:
    """Refuses a folder that holds a run, unless it is to be replaced or resumed."""
    if force_resume and not resume:
        raise UserError("--force-resume: only together with --resume")
    written = config.directory / "config.yaml"
    if overwrite and resume:
        raise UserError("give --overwrite or --resume, not both")
    if any(config.directory.glob("seed-*/config.yaml")):
        raise UserError(f"{config.directory} holds runs of several seeds; use another name, or remove them")
    if not written.exists():
        if resume:
            raise UserError(f"{config.directory} holds no run to resume")
        return
    if not overwrite and not resume:
        raise UserError(
            f"{config.directory} holds a run already; use --overwrite to replace it, --resume to go on, or another name"
        )


def _newest(checkpoints: checkpoint.Checkpoints, directory: Path) -> checkpoint.Found | None:
    """The checkpoint to go on from; None for a run that was interrupted before its first one.

    Raises:
      UserError: there was one but it is damaged, or the run has ended without any.
    """
    found = checkpoints.newest
    if found is None:
        if checkpoints.damaged or any((directory / each).exists() for each in ("results.json", "adapter")):
            raise UserError(f"{directory}: no checkpoint to resume from; --overwrite starts again")
        console.say("no checkpoint yet: starting from the beginning")
    return found


def _prepare(directory: Path, config: RunConfig, resumed: bool) -> None:
    """Makes the run's folder, writes its config, and removes what earlier work left there.

    Of a run that is resumed that is what it had not finished writing; else all under the names of this one's results.
    """
    folders = ("adapter", "merged", "checkpoints", "epochs", "tensorboard", "wandb")
    written = (trackers.WANDB_ID, "results.json", "metrics.jsonl", "epochs.jsonl", "loss.png", "predictions-*.jsonl")
    stale = [f".{name}*" for name in (*folders, *written, "config.yaml")] + ([] if resumed else [*folders, *written])
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path in [path for pattern in stale for path in directory.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror})") from error
    files.write_text(directory / "config.yaml", to_yaml(config))


def train(
    config: RunConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    force_resume: bool = False,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Runs a config from start to end and leaves a run's files (docs/design.md) in its directory.

    Args:
      config: the run.
      overwrite: replace a run that is already in the output directory.
      resume: go on with that run from its newest checkpoint, or from the start if it was interrupted before the first.
      force_resume: go on although the config, the training rows or the base have changed in what the result depends on.
      stop: by which somebody may ask for an early end, with a checkpoint.

    Returns: the content of results.json.

    Raises:
      UserError: anything wrong with config, model, data or output folder; a loss that becomes NaN or infinite (the
        adapter of the last good step is kept).
      Stopped: on request.
    """
    # What is cheap to check comes before the weights are read, and the folder is touched when all of it is right.
    stop = stop or Stop()
    directory = config.directory
    _check_output(config, overwrite, resume, force_resume)
    trackers.check(config.tracking)
    devices = parallel.resolve(config.parallel)
    devices.check(config)
    checkpoints = checkpoint.Checkpoints(directory / "checkpoints", config.training.keep_last, config.training.keep_best)
    found = _newest(checkpoints, directory) if resume else None
    opened, tokenizer = open_with_tokenizer(config.model.path, config.model.dtype)
    config = modules.resolved(config, opened.model)
    if found:
        resuming.check_config(found.about, config, force_resume)
    objective, opened = objectives.objective(config, opened)
    modules.check_length(config, opened.model)
    paths = modules.target_paths(config, opened.model)
    held_out = evaluation_rows(config, objective, opened, tokenizer)
    batches, rows = objective.batches(tokenizer, held_out)
    if found:
        resuming.check_data(found.about, directory, batches, force_resume)
    chooser = config.evaluation.best_epoch
    if chooser is not None:
        parts = best_epoch.split(len(held_out[chooser]), config.seed)
        choosing, held_out[chooser] = (best_epoch.part(held_out[chooser], numbers) for numbers in parts)
    loaded = load_with_progress(opened, config.seed, devices.weights(opened.model.abstract_params()))
    classifier = modules.dense_paths(config, loaded, paths)
    if found:  # the columns of its checkpoint will take the place of these
        magnitude = dataclasses.replace(config, bypass=dataclasses.replace(config.bypass, score="magnitude"))
        built = connections.choose(magnitude, loaded.model, loaded.params, paths, by_neuron=devices.by_neuron)
    else:
        first_epoch = (batches.batch(0, index) for index in range(batches.steps_per_epoch))
        built = connections.choose(
            config, loaded.model, loaded.params, paths, first_epoch, objective.losses, devices.by_neuron
        )
    _prepare(directory, config, resumed=found is not None)

    total_steps = config.training.steps or (config.training.epochs or 0) * batches.steps_per_epoch
    in_classifier = bypass.count(dense_modules.split(loaded.params, classifier)[1])
    trainable = bypass.count(built.values) + in_classifier
    total = bypass.count(loaded.params)
    console.say(f"training {trainable:,} of {total:,} parameters ({100 * trainable / total:.4f} %) for {total_steps} steps")

    before: dict[str, scoring.Score] = {}
    if found:
        before = resuming.scores_before(found.about)
    elif config.evaluation.before:
        before = evaluate_sets(config, objective, held_out, loaded, loaded.params, tokenizer, "before")

    transformation = optimizer.build(config.optimizer, total_steps, config.classifier)
    state = devices.place(
        step.initial_state(loaded.params, built, transformation, classifier, config.watchdog.nonfinite == "skip")
    )
    base_model = loaded.without_params()  # the state owns the weights now: its buffers are donated step by step
    del loaded

    def save_adapter(path: Path, state: step.TrainState) -> None:
        values, trained_classifier = devices.whole((state.bypass, state.classifier))
        native.save(
            path,
            values,
            base_model,
            k=config.bypass.k,
            targets=config.bypass.targets or [],
            seed=config.seed,
            rule=config.bypass.score,
            classifier=trained_classifier,
            replace=True,
        )

    def score_epoch(state: step.TrainState) -> scoring.Score:
        each = next(found for found in config.evaluation.sets if found.name == chooser)
        with console.bar(f"evaluating {each.name}") as shown:
            merged = devices.local(state.merged)
            return objective.score(each, choosing, base_model, merged, tokenizer, console.reporter(shown))

    module = base_model.model.module(config.training.remat_policy)
    batches.own_rows = devices.own_rows(config.training)
    run_step = devices.make_step(module, transformation, config.training, objective.losses, objective.dropout_seed)
    rates = optimizer.schedule(config.optimizer, total_steps)
    log = None
    try:
        with checkpoints:
            if found:
                state = devices.place(checkpoints.restore(state))
                resuming.check_base(found.about, directory, state, force_resume)
                console.say(f"resuming after step {found.step}")
            log = trackers.Log(config, int(state.step))
            done = resuming.report(found, log.lines)
            best = best_epoch.BestEpoch(directory, score_epoch, save_adapter, int(state.step)) if chooser else None
            about = resuming.describe(config, batches, objective.dropout_seed, state, before)
            watching = watchdog.Watchdog(config.watchdog, done.warnings, log.lines)
            saver = resuming.Saver(checkpoints, about, batches, done, best.value if best else None)
            state = loop.run(
                state,
                run_step,
                batches,
                total_steps,
                rates,
                done,
                log,
                watching,
                stop,
                log_every=config.training.log_every,
                save=saver,
                save_every=config.training.save_every,
                after_epoch=best,
            )
            with saver.on_stop(state):
                if best:
                    state = best.restore(state, base_model)
                save_adapter(directory / "adapter", state)
                merged = devices.local(state.merged)
                after = evaluate_sets(config, objective, held_out, base_model, merged, tokenizer, "after")
                if config.merge:
                    save.save(directory / "merged", base_model, merged, tokenizer, replace=True)
    except loop.NotFinite as failure:
        save_adapter(directory / "adapter", failure.state)
        places = ", ".join(rows.where(int(row)) for row in failure.rows[:8])
        more = ", ..." if len(failure.rows) > 8 else ""
        raise UserError(
            f"{failure} (rows {places}{more}); the adapter of the last good step is in {directory / 'adapter'}"
        ) from failure
    finally:
        if log:
            log.close()

    results = report.results(config, batches, total_steps, (trainable, total), done, before, after)
    results["trainable_in_classifier"] = in_classifier  # published shares leave the head out
    results["watchdog"] = done.warnings
    if best:
        results["best_epoch"] = {"set": chooser, **best.best, "split": parts.describe(), "epochs": best.epochs}
    results = files.finite(results)
    files.write_text(directory / "results.json", files.to_json(results, indent=2) + "\n")
    report.loss_curve(directory / "loss.png", done.losses, config.name)
    if not config.training.save_every:  # else the run may be resumed once more, and need the adapters of its epochs
        for each in ("epochs", "checkpoints"):
            shutil.rmtree(directory / each, ignore_errors=True)
    return results
