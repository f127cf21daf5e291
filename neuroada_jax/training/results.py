"""What a run leaves when it ends: pictures and results.json; and reading one that neuroada-jax 0.1 wrote."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from neuroada_jax import files
from neuroada_jax.adapters import native
from neuroada_jax.data.examples import Examples
from neuroada_jax.evaluation import class_report
from neuroada_jax.evaluation.scoring import Score
from neuroada_jax.pretrained import prompt_form
from neuroada_jax.training import resuming, validation
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.kept_states import KeptStates
from neuroada_jax.training.loop import History
from neuroada_jax.training.preparation import Prepared

_FORMER_KEYS = {
    "cut": "truncated",
    "left_out": "dropped",
    "trainable_in_head": "trainable_in_classifier",
}  # of neuroada-jax 0.1

Scores = dict[str, Score]  # by evaluation set


class Sizes(NamedTuple):
    """Numbers of parameters: all that train, those of the classifier among them, and all of the model."""

    trainable: int
    in_classifier: int
    total: int


def results(
    prepared: Prepared,
    sizes: Sizes,
    history: History,
    best: KeptStates | None,
    before: Scores,
    after: Scores,
    rounded_to_nothing: float | None,
) -> dict[str, Any]:
    """Return the content of results.json.

    Args:
      prepared: the run.
      sizes: numbers of parameters.
      history: of all steps.
      best: the scores of the epochs or validations; None where the last state is kept.
      before: scores of the base model, empty where `evaluation.before` is off.
      after: scores of the merged model.
      rounded_to_nothing: share of the values that leave their weight as it was; None for a base of 32 bits or more.

    Returns: JSON. A number that is not finite is null. `before` and `after` hold, by evaluation set, `Score.to_json`.
    """
    config, batches = prepared.config, prepared.batches
    content = {
        "name": config.name,
        "directory": str(config.directory),
        "seed": config.seed,
        "steps": len(history.losses),
        "epochs": len(history.losses) / batches.steps_per_epoch,
        "method": config.method,
        "targets": config.trained.targets,
        "trainable": sizes.trainable,
        "trainable_in_classifier": sizes.in_classifier,  # published shares exclude the classifier
        "total_parameters": sizes.total,
        "trainable_percent": 100 * sizes.trainable / sizes.total,
        "rounded_to_nothing": rounded_to_nothing,
        "train_seconds": history.seconds,
        "tokens_per_second": history.tokens / history.seconds,
        "first_loss": history.losses[0],
        "last_loss": history.losses[-1],
        "compiled_steps": len(history.shapes),
        "possible_steps": len(batches.shapes),
        "examples": len(batches.examples),
        "truncated": batches.examples.truncated,
        "dropped": batches.examples.dropped,
        **_prompts(prepared),
        "rows": resuming.digests_of_rows(prepared),
        "before": {name: score.to_json() for name, score in before.items()},
        "after": {name: score.to_json() for name, score in after.items()},
        "mean": _mean(before, after),
        "watchdog": history.warnings,
        "backend": jax.default_backend(),
        "versions": native.installed_versions() | {"python": sys.version.split()[0]},
    }
    if best and prepared.split:
        content["best_epoch"] = {
            "set": config.evaluation.best_epoch,
            **best.best,
            "split": prepared.split.describe(),
            "epochs": best.lines,
        }
    elif best:
        content["validation"] = {
            "best_step": best.best["step"],
            "best_loss": best.best["value"],
            "start_loss": best.start and best.start["value"],
            "examples": len(prepared.validation.batches.examples) if prepared.validation else None,
            "stopped_early": len(history.losses) < prepared.total_steps,
            # Without the samples, which are texts of the rows: results are shared with an adapter.
            "steps": [{"step": line["step"], "value": line["value"]} for line in best.lines],
        }
    return files.finite(content)


def write(
    config: RunConfig, content: dict[str, Any], losses: Sequence[float], best: KeptStates | None, after: Scores
) -> None:
    """Draw the pictures of a run and then write its results.json, by which it counts as finished.

    Args:
      config: of the run.
      content: from `results`.
      losses: of all steps.
      best: as in `results`.
      after: as in `results`.

    Raises:
      UserError: a file that cannot be written.
    """
    validation.draw_losses(config, losses, best)
    for name, score in after.items():
        if score.classes is not None:
            title = f"{config.name}: {name}, {score.n} rows"
            class_report.confusion_picture(config.directory / f"confusion-{name}.png", score.classes, title)
    files.write_text(config.directory / "results.json", files.to_json(content, indent=2) + "\n")


def _prompts(prepared: Prepared) -> dict[str, Any]:
    """Return the form of the trained prompts without its template's text, and of a decoder what it did to the rows."""
    form, examples = prepared.objective.form, prepared.batches.examples
    prompt = prompt_form.to_json(form, is_decoder=prepared.opened.model.architecture.is_decoder)
    del prompt["template"]
    if not isinstance(examples, Examples):
        return {"prompt": prompt}
    return {"prompt": prompt, "split_rows": examples.split_rows, "crossings": examples.crossings}


def _mean(before: Scores, after: Scores) -> dict[str, float | None] | None:
    """Return the unweighted mean over the sets, as published tables have it; None for fewer than two sets."""
    if len(after) < 2:
        return None

    def mean(scores: Scores) -> float | None:
        return sum(score.value for score in scores.values()) / len(scores) if scores else None

    return {"before": mean(before), "after": mean(after)}


def read(path: Path) -> dict[str, Any]:
    """Read the results.json of a run.

    Raises:
      UserError: a file that is missing or is not JSON.
    """
    content = files.read_json(path)
    return _from_0_1(content) if "evaluation" in content else content


def _from_0_1(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a results.json of neuroada-jax 0.1 in today's form.

    There both scores of a set were one object, whose keys held the metric's name: accuracy_before, accuracy_after. The
    figures of the first set stood at the top once more.
    """
    scores: dict[str, dict[str, Any]] = {"before": {}, "after": {}}
    for name, figures in content["evaluation"].items():
        metric, beside = figures["metric"], figures["beside"]
        for when in ("before", "after"):
            if figures[f"parts_{when}"] is None:  # the base model was not scored
                continue
            scores[when][name] = {
                "value": figures[f"{metric}_{when}"],
                "n": figures["n"],
                "interval": figures[f"interval_{when}"],
                "metric": metric,
                "beside": {each: figures[f"{each}_{when}"] for each in beside if f"{each}_{when}" in figures},
                "beside_intervals": {
                    each: figures[f"{each}_interval_{when}"] for each in beside if f"{each}_interval_{when}" in figures
                },
                "empty": figures[f"empty_{when}"],
                "overlap": figures["overlap"],
                "parts": figures[f"parts_{when}"],
            }
    kept = {_FORMER_KEYS.get(key, key): value for key, value in content.items() if key not in ("evaluation", "n")}
    return {key: value for key, value in kept.items() if not key.endswith(("_before", "_after"))} | scores
