"""A run from config to adapter in three stages: `prepare` checks, `fit` trains, `finish` saves and scores.

`prepare` is in preparation.py, the training loop in loop.py, the run's directory in run_directory.py.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from neuroada_jax import console
from neuroada_jax.adapters import on_base
from neuroada_jax.core import bypass
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.errors import UserError
from neuroada_jax.evaluation.scoring import Score
from neuroada_jax.generation.generate import generate
from neuroada_jax.generation.texts import ending
from neuroada_jax.locks import Lock
from neuroada_jax.models import dense_modules
from neuroada_jax.pretrained import save
from neuroada_jax.pretrained.load import IdentifiedModel, LoadedModel
from neuroada_jax.tasks import TASKS
from neuroada_jax.training import (
    best_epoch,
    checkpoint,
    connections,
    loop,
    modules,
    one_job,
    optimizer,
    peers,
    results,
    resuming,
    rounding,
    run_directory,
    step,
    trackers,
    validation,
    watchdog,
    weights,
)
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.kept_states import KeptStates
from neuroada_jax.training.preparation import Prepared, prepare
from neuroada_jax.training.signals import Stop, Stopped
from neuroada_jax.training.step import RunStep, TrainState
from neuroada_jax.training.trackers import Line

OnLines = Callable[[Sequence[Line]], None]


class _Started(NamedTuple):
    """A run before its first step. The model is without parameters: the state owns them."""

    base_model: IdentifiedModel
    run_step: RunStep
    sizes: results.Sizes
    before: dict[str, Score]
    lock: Lock


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A trained run. `finish` releases its checkpoint manager; without `finish`, call `close`.

    Attributes:
      prepared: the run.
      base_model: the model with its digests, without parameters: `state` owns them.
      state: the final state, that of the best epoch or validation where one was chosen. Its `params` are resident (base +
        values).
      history: losses, learning rates, tokens and times.
      sizes: numbers of parameters.
      before: scores of the base model by evaluation set; empty where `evaluation.before` is off.
      best: the scores of the epochs or validations; None where the last state is kept.
      saver: saves a checkpoint of the last step where `finish` is interrupted.
      last: the state of the last step without weights, for `saver`.
      resources: context managers that are open until `finish` or `close`.
      lock: of the run's directory.
    """

    prepared: Prepared
    base_model: IdentifiedModel
    state: TrainState
    history: loop.History
    sizes: results.Sizes
    before: dict[str, Score]
    best: KeptStates | None
    saver: resuming.Saver
    last: TrainState
    resources: contextlib.ExitStack
    lock: Lock

    @property
    def config(self) -> RunConfig:
        """The run, with the defaults that depend on the model filled in."""
        return self.prepared.config

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.prepared.tokenizer

    def save_adapter(self, directory: Path) -> None:
        """Write the trained values and the classifier, replacing an adapter that is there."""
        _save_adapter(self.prepared, self.base_model, directory, self.state)

    def close(self) -> None:
        """Wait for a checkpoint under way, and release the checkpoint manager and the directory."""
        with self.lock:
            self.resources.close()


def fit(
    prepared: Prepared,
    *,
    loaded: LoadedModel | None = None,
    stop: Stop | None = None,
    on_lines: OnLines | None = None,
) -> Fitted:
    """Read the weights, choose the connections, score the base model, and train.

    Args:
      prepared: the run.
      loaded: the model with its weights, where they are in memory. They are donated: its arrays are deleted. A
        classifier that its checkpoint lacks is initialised anew from the run's seed.
      stop: by which an early end, with a checkpoint, is requested.
      on_lines: called with the log lines of finished steps, in order: dicts of "step" (from 1), "loss" (mean over the
        step's labels, in nats; NaN where it was not finite), "learning_rate", "gradient_norm", "labels" and "tokens".

    Raises:
      UserError: weights that do not fit; a directory that cannot be written; a loss that becomes NaN or infinite (the
        adapter of the last good step is kept).
      Stopped: on request.
    """
    with contextlib.ExitStack() as locked:  # released here unless the run gets to `Fitted`
        fitted = _fit(prepared, *_start(prepared, loaded, locked), stop, on_lines)
        locked.pop_all()
        return fitted


def _fit(prepared: Prepared, started: _Started, state: TrainState, stop: Stop | None, on_lines: OnLines | None) -> Fitted:
    """Restore the checkpoint to resume from, if there is one, and train; keep the last good state where that fails."""
    config, resumed_from = prepared.config, prepared.resumed_from
    try:
        with contextlib.ExitStack() as resources:
            resources.enter_context(prepared.checkpoints)
            if resumed_from:
                restored = prepared.checkpoints.restore(state)
                if config.method == "lora":  # its scale is the config's, where a change of alpha was forced
                    restored = restored._replace(columns=state.columns)
                state = prepared.devices.place(restored)
                base = resuming.digest_of_base(prepared.devices, state, started.base_model.digests)
                resuming.check_base(resumed_from.about, config.directory, base, prepared.force_resume)
                console.say(f"resuming after step {resumed_from.step}")
            return _train(prepared, started, state, stop or Stop(), on_lines, resources)
    except loop.NotFinite as failure:
        adapter = config.directory / "adapter"
        _save_adapter(prepared, started.base_model, adapter, failure.state)
        peers.current().share("saved", None)  # the others' errors would end the first process
        places = ", ".join(prepared.rows.where(int(row)) for row in failure.rows[:8])
        more = ", ..." if len(failure.rows) > 8 else ""
        raise UserError(f"{failure} (rows {places}{more}); the adapter of the last good step is in {adapter}") from failure


def _start(prepared: Prepared, loaded: LoadedModel | None, locked: contextlib.ExitStack) -> tuple[_Started, TrainState]:
    """Read the weights, choose the connections, score the base model, and initialise the state; lock the directory."""
    config, devices, objective = prepared.config, prepared.devices, prepared.objective
    loaded, original = weights.load(prepared, loaded)
    one_job.check_weights(loaded.digests)
    classifier = modules.dense_paths(config, loaded, loaded.initialised, prepared.target_paths)
    built = _connections(prepared, loaded)
    built = built if original is None else original.put_into(built)
    begun = run_directory.start(config, prepared.seen, resumed=bool(prepared.resumed_from), replaced=prepared.replaced)
    lock = locked.enter_context(begun)

    dense = bypass.count(dense_modules.split(loaded.params, classifier)[1])
    trained = dense + modules.count_trained(config, loaded.model, built.values)
    sizes = results.Sizes(trained, dense, bypass.count(loaded.params))
    console.say(
        f"training {sizes.trainable:,} of {sizes.total:,} parameters ({100 * sizes.trainable / sizes.total:.4f} %) for "
        f"{prepared.total_steps} steps"
    )
    before: dict[str, Score] = {}
    if prepared.resumed_from:
        before = resuming.scores_before(prepared.resumed_from.about)
    elif config.evaluation.before:
        before = prepared.score_sets(loaded, loaded.params, "before")

    transformation = optimizer.build(config.optimizer, prepared.total_steps, config.classifier)
    params = devices.layers_apart(loaded.params, loaded.model.layers_path)
    skip = config.watchdog.nonfinite == "skip"
    state = devices.place(step.initial_state(params, built, transformation, classifier, skip))
    base_model = loaded.without_params()  # the state owns the weights now: its buffers are donated step by step
    module = base_model.model.module(config.training.remat_policy)
    prepared.batches.own_rows = devices.slice_of_process(config.training)
    run_step = devices.make_step(module, transformation, config.training, objective.losses, objective.dropout_seed)
    return _Started(base_model, run_step, sizes, before, lock), state


def _connections(prepared: Prepared, loaded: LoadedModel) -> Bypass:
    """Choose the connections of a new run; for a resumed one, placeholders of the right shapes."""
    config, batches, devices = prepared.config, prepared.batches, prepared.devices
    # The columns of a checkpoint will take the place of these; those of random positions need nothing and have own shapes.
    if prepared.resumed_from and config.bypass.random_over == "neuron":
        config = dataclasses.replace(config, bypass=dataclasses.replace(config.bypass, score="magnitude"))
    return connections.choose(
        config,
        loaded.model,
        loaded.params,
        prepared.target_paths,
        (batches.batch(0, index) for index in range(batches.steps_per_epoch)),
        prepared.objective.losses,
        devices.by_neuron,
        None if prepared.resumed_from else prepared.score,
    )


def _train(
    prepared: Prepared,
    started: _Started,
    state: TrainState,
    stop: Stop,
    on_lines: OnLines | None,
    resources: contextlib.ExitStack,
) -> Fitted:
    """Take the remaining steps from a placed state; `resources` passes to the result."""
    config, batches, devices = prepared.config, prepared.batches, prepared.devices
    base = resuming.digest_of_base(devices, state, started.base_model.digests)
    about = resuming.describe(prepared, base, started.before)
    written = int(state.step) if peers.current().is_first else 0  # lines of metrics.jsonl that there should be
    with contextlib.ExitStack() as logs:
        log = logs.enter_context(contextlib.closing(trackers.Log(config, written)))
        history = resuming.history(prepared.resumed_from, log.lines)
        best, evaluations = _evaluations(prepared, started.base_model, int(state.step), stop)
        saver = resuming.Saver(prepared.checkpoints, about, batches, history, best.score if best else None)

        def write(lines: Sequence[Line]) -> None:
            log.write(lines)
            if on_lines:
                on_lines(lines)

        state = loop.run(
            state,
            started.run_step,
            batches,
            loop.Settings(
                prepared.total_steps,
                optimizer.schedule(config.optimizer, prepared.total_steps),
                config.training.log_every,
                config.training.save_every,
            ),
            history,
            watchdog.Watchdog(config.watchdog, history.warnings, log.lines, prepared.total_steps),
            stop,
            loop.Hooks(write, saver, evaluations, log.add),
        )
        last = state._replace(params={}, base_entries={})  # so that the weights are not held twice
        last = last._replace(**devices.unsharded(checkpoint.saved(last)))  # for the first process to save alone
        with saver.on_stop(last):
            stop.check()
            logs.close()  # wandb may have much to send
            if best:
                state = best.restore(state, started.base_model, devices)
    if int(last.step) < prepared.total_steps:
        console.say(
            f"stopped early, after step {int(last.step)}: no lower loss in {config.training.early_stopping} validations"
        )
    return Fitted(
        prepared=prepared,
        base_model=started.base_model,
        state=state,
        history=history,
        sizes=started.sizes,
        before=started.before,
        best=best,
        saver=saver,
        last=last,
        resources=resources.pop_all(),
        lock=started.lock,
    )


def _evaluations(
    prepared: Prepared, base_model: IdentifiedModel, done: int, stop: Stop
) -> tuple[KeptStates | None, validation.Evaluations]:
    """Return what keeps the best state, None where the last one is kept, and all scores of states during the run."""
    config, rows = prepared.config, prepared.validation
    save_adapter = functools.partial(_save_adapter, prepared, base_model)
    epochs = validated = None
    if config.evaluation.best_epoch is not None:
        score = functools.partial(prepared.score_epoch, base_model, stop.poll)
        epochs = best_epoch.BestEpoch(config.directory, score, save_adapter, done)
    if rows is not None:
        module, losses, devices = base_model.model.module(), prepared.objective.losses, prepared.devices
        validated = validation.Validation(
            config.directory,
            lambda state: validation.mean_loss(module, losses, state, rows.batches, devices, stop.poll),
            save_adapter,
            done,
            perplexity=base_model.model.architecture.is_decoder,
            patience=config.training.early_stopping,
            samples=functools.partial(_samples, prepared, base_model) if rows.prompts else None,
        )
    evaluations = validation.Evaluations(
        prepared.batches.steps_per_epoch, prepared.total_steps, epochs, validated, config.training.validate_every
    )
    return epochs or validated, evaluations


def _samples(prepared: Prepared, base_model: IdentifiedModel, state: TrainState) -> list[dict[str, str]]:
    """Return continuations of the first validation prompts by a state, which one process makes if it has all weights."""
    assert prepared.validation is not None
    devices = prepared.devices
    if not (peers.current().is_first or devices.shares_weights):
        return []
    prompts, tokenizer = prepared.validation.prompts, prepared.tokenizer
    outputs = generate(
        base_model.model,
        devices.local(state).tuned,
        [ids for _, ids in prompts],
        ending(base_model, tokenizer, prepared.objective.form),
        max_new_tokens=TASKS[prepared.config.data.task].max_new_tokens,
    )
    texts = [str(tokenizer.decode(each.ids, skip_special_tokens=True)) for each in outputs]
    return [{"prompt": prompt, "generation": text} for (prompt, _), text in zip(prompts, texts, strict=True)]


def _save_adapter(prepared: Prepared, base_model: IdentifiedModel, directory: Path, state: TrainState) -> None:
    values, classifier = prepared.devices.unsharded((state.bypass, state.classifier))
    chosen, form = connections.selection_of(prepared.config, base_model.model, prepared.score), prepared.objective.form
    if peers.current().is_first:
        on_base.save(directory, values, base_model, chosen, classifier=classifier, form=form, replace=True)


def finish(fitted: Fitted) -> dict[str, Any]:
    """Save the adapter, score it, write the merged model if the config asks for it, results.json and loss.png.

    Returns: the content of results.json; empty in all but the first of several processes.

    Raises:
      UserError: a file that cannot be written.
      Stopped: on request; the last step is saved as a checkpoint.
    """
    with fitted.lock:
        return _finish(fitted)


def _finish(fitted: Fitted) -> dict[str, Any]:
    prepared, config, directory = fitted.prepared, fitted.config, fitted.config.directory
    with fitted.resources, fitted.saver.on_stop(fitted.last):
        fitted.save_adapter(directory / "adapter")
        after = prepared.score_sets(fitted.base_model, prepared.devices.local(fitted.state).tuned, "after")
        if config.merge:
            _save_merged(fitted)
        rounded = rounding.share(fitted.state, prepared.devices)
        if not peers.current().is_first:
            return {}
        if isinstance(fitted.best, validation.Validation):
            fitted.history.warnings["validation_frozen"] = int(validation.is_frozen(fitted.best))
            validation.warn_without_gain(fitted.best)
        content = results.results(prepared, fitted.sizes, fitted.history, fitted.best, fitted.before, after, rounded)
        results.write(config, content, fitted.history.losses, fitted.best, after)
    try:
        run_directory.tidy(config)
    except Stopped:  # results.json is there: nothing is left to go on with
        run_directory.tidy(config)
    if rounded is not None:
        rounding.report(rounded, fitted.base_model.model.config.dtype)
    return content


def _save_merged(fitted: Fitted) -> None:
    tuned, form = fitted.prepared.devices.gathered(fitted.state.tuned), fitted.prepared.objective.form
    if peers.current().is_first:
        directory = fitted.config.directory / "merged"
        save.save(directory, fitted.base_model, tuned, fitted.tokenizer, form=form, replace=True)
    peers.current().share("merged", None)  # the others would wait for this process in what comes next


def train(
    config: RunConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    force_resume: bool = False,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Run a config from start to end: `prepare`, `fit` and `finish`, whose arguments and errors these are.

    Returns: the content of results.json.
    """
    prepared = prepare(config, overwrite=overwrite, resume=resume, force_resume=force_resume)
    return finish(fit(prepared, stop=stop))
