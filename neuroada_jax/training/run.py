"""One run from config to adapter: load, select, evaluate, train, evaluate, save. The loop itself is in loop.py."""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

from neuroada_jax import bypass, checkpoint, console, evaluation, files
from neuroada_jax.bypass import Tree
from neuroada_jax.errors import UserError
from neuroada_jax.formats import huggingface, native
from neuroada_jax.models import heads
from neuroada_jax.rows import Rows
from neuroada_jax.training import (
    best_epoch,
    connections,
    loop,
    modules,
    objectives,
    optimizer,
    parallel,
    plots,
    report,
    step,
)
from neuroada_jax.training.config import RunConfig, flatten_config, to_yaml
from neuroada_jax.training.config import load as load_config
from neuroada_jax.training.objectives import Objective
from neuroada_jax.weights import LoadedModel, open_base, with_weights


def evaluation_rows(config: RunConfig, objective: Objective) -> dict[str, Rows]:
    """The rows of every evaluation set, read and checked.

    Raises:
      UserError: a file that is missing, or rows that do not fit their task.
    """
    return {each.name: objective.rows(each) for each in config.evaluation.sets}


def evaluate_sets(
    config: RunConfig,
    objective: Objective,
    rows: dict[str, Rows],
    base: LoadedModel,
    params: Tree,
    tokenizer: Any,
    when: str,
) -> dict[str, evaluation.Score]:
    """Scores every evaluation set of a config; predictions go to predictions-<set>-<when>.jsonl in its folder."""
    scores = {}
    for each in config.evaluation.sets:
        with console.bar(f"evaluating {each.name}") as shown:
            progress = console.reporter(shown)
            score = objective.score(each, rows[each.name], base, params, tokenizer, progress)
        scores[each.name] = score
        console.say(f"{each.name}: {score.metric} {score.value:.4f} of {score.n}")
        evaluation.write_predictions(config.directory / f"predictions-{each.name}-{when}.jsonl", score)
    return scores


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
        for stale in ("adapter", "merged", "checkpoints", "epochs"):
            shutil.rmtree(directory / stale, ignore_errors=True)
        for stale in ("results.json", "metrics.jsonl", "epochs.jsonl", "loss.png", "predictions-*.jsonl"):
            for file in directory.glob(stale):
                file.unlink()
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror})") from error


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
    devices = parallel.resolve(config.parallel)
    devices.check(config)
    base, tokenizer = open_base(config.model.path, config.model.dtype)
    config = modules.resolved(config, base.model)
    if resume:
        _check_unchanged(config)
    objective, base = objectives.objective(config, base)
    modules.check_length(config, base.model)
    paths = modules.target_paths(config, base.model)
    held_out = evaluation_rows(config, objective)
    batches, rows = objective.batches(tokenizer, held_out)
    chooser = config.evaluation.best_epoch
    if chooser is not None:
        parts = best_epoch.split(len(held_out[chooser]), config.seed)
        choosing, held_out[chooser] = (best_epoch.part(held_out[chooser], numbers) for numbers in parts)
    base = with_weights(base, config.seed, devices.weights(base.model.abstract_params()))
    head = modules.head_paths(config, base, paths)
    if resume:  # the columns of its checkpoint will take the place of these
        magnitude = dataclasses.replace(config, bypass=dataclasses.replace(config.bypass, score="magnitude"))
        built = connections.choose(magnitude, base.model, base.params, paths, by_neuron=devices.by_neuron)
    else:
        first_epoch = (batches.batch(0, index) for index in range(batches.steps_per_epoch))
        built = connections.choose(config, base.model, base.params, paths, first_epoch, objective.losses, devices.by_neuron)
    if not resume:
        _clear_output(directory)
        files.write_text(directory / "config.yaml", to_yaml(config))

    total_steps = config.training.steps or (config.training.epochs or 0) * batches.steps_per_epoch
    in_head = bypass.count(heads.split(base.params, head)[1])
    trainable = bypass.count(built.values) + in_head
    total = bypass.count(base.params)
    console.say(f"training {trainable:,} of {total:,} parameters ({100 * trainable / total:.4f} %) for {total_steps} steps")

    before: dict[str, evaluation.Score] = {}
    if config.evaluation.before and not resume:
        before = evaluate_sets(config, objective, held_out, base, base.params, tokenizer, "before")

    transformation = optimizer.build(config.optimizer, total_steps, config.head)
    state = devices.place(step.initial_state(base.params, built, transformation, head))
    base = base._replace(params={})  # the state owns the weights now: its buffers are donated step by step

    def save_adapter(path: Path, state: step.TrainState) -> None:
        values, trained_head = devices.whole((state.bypass, state.head))
        native.save(
            path,
            values,
            base,
            k=config.bypass.k,
            targets=config.bypass.targets or [],
            seed=config.seed,
            rule=config.bypass.score,
            head=trained_head,
            replace=True,
        )

    def score_epoch(state: step.TrainState) -> evaluation.Score:
        each = next(found for found in config.evaluation.sets if found.name == chooser)
        with console.bar(f"evaluating {each.name}") as shown:
            merged = devices.local(state.merged)
            return objective.score(each, choosing, base, merged, tokenizer, console.reporter(shown))

    module = base.model.module(config.training.remat_policy)
    batches.own_rows = devices.own_rows(config.training)
    run_step = devices.make_step(module, transformation, config.training, objective.losses, objective.dropout_seed)
    rates = optimizer.schedule(config.optimizer, total_steps)
    began = time.perf_counter()
    try:
        with checkpoint.Checkpoints(directory / "checkpoints") as checkpoints:
            if resume:
                state = devices.place(checkpoints.restore(state))
                console.say(f"resuming after step {int(state.step)}")
            best = best_epoch.BestEpoch(directory, score_epoch, save_adapter, int(state.step)) if chooser else None
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
                best,
            )
    except loop.NotFinite as failure:
        save_adapter(directory / "adapter", failure.state)
        places = ", ".join(rows.where(int(row)) for row in failure.rows[:8])
        raise UserError(
            f"the loss or its gradient became NaN or infinite at step {failure.step} (rows {places}"
            f"{', ...' if len(failure.rows) > 8 else ''}); the adapter of the last good step is in {directory / 'adapter'}"
        ) from failure
    seconds = time.perf_counter() - began - (best.seconds if best else 0)
    if best:
        state = best.restore(state, base)
    save_adapter(directory / "adapter", state)
    if not config.training.save_every:  # else a resumed run may need those of other epochs
        shutil.rmtree(directory / "epochs", ignore_errors=True)
    merged = devices.local(state.merged)
    after = evaluate_sets(config, objective, held_out, base, merged, tokenizer, "after")
    if config.merge:
        huggingface.save(directory / "merged", base, merged, tokenizer, replace=True)

    results = report.results(config, batches, total_steps, (trainable, total), done, seconds, before, after)
    results["trainable_in_head"] = in_head  # published shares leave the head out
    if best:
        results["best_epoch"] = {"set": chooser, **best.best, "split": parts.describe(), "epochs": best.epochs}
    files.write_text(directory / "results.json", json.dumps(results, indent=2) + "\n")
    plots.loss_curve(directory / "loss.png", done.losses, config.name)
    return results
