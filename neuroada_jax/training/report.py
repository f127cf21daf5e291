"""What a finished run says: results.json and the tables that end it."""

import sys
from typing import Any

import jax

from neuroada_jax import console
from neuroada_jax.batches import AnyBatches
from neuroada_jax.evaluation import Score
from neuroada_jax.formats import native
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.loop import Report


def results(
    config: RunConfig,
    batches: AnyBatches,
    total_steps: int,
    parameters: tuple[int, int],
    done: Report,
    seconds: float,
    before: dict[str, Score],
    after: dict[str, Score],
) -> dict[str, Any]:
    """The content of results.json.

    Args:
      config: the run.
      batches: what it trained on.
      total_steps: updates of the whole run.
      parameters: (trained values, all parameters of the model).
      done: what the loop reports.
      seconds: of the loop.
      before: scores of the base model by set, empty where they were not asked for.
      after: scores of the merged model by set.
    """
    trainable, total = parameters
    return {
        "name": config.name,
        "directory": str(config.directory),
        "steps": total_steps,
        "epochs": total_steps / batches.steps_per_epoch,
        "targets": config.bypass.targets,
        "trainable": trainable,
        "total_parameters": total,
        "trainable_percent": 100 * trainable / total,
        "train_seconds": seconds,
        "tokens_per_second": done.tokens / seconds,
        "first_loss": done.losses[0],
        "last_loss": done.losses[-1],
        "compiled_steps": done.shapes,
        "possible_steps": len(batches.shapes),
        "examples": len(batches.examples),
        "cut": batches.examples.cut,
        "left_out": batches.examples.left_out,
        "evaluation": {name: _compared(before.get(name), score) for name, score in after.items()},
        **_headline(before, after),
        "backend": jax.default_backend(),
        "versions": native.installed_versions() | {"python": sys.version.split()[0]},
    }


def _compared(before: Score | None, after: Score) -> dict[str, Any]:
    """A set's figures by field: <metric>_before, <metric>_after, the intervals, and <metric>_after of those beside."""
    return {
        "n": after.n,
        "metric": after.metric,
        f"{after.metric}_before": before.value if before else None,
        f"{after.metric}_after": after.value,
        "interval_before": list(before.interval) if before and before.interval else None,
        "interval_after": list(after.interval) if after.interval else None,
        **{f"{name}_after": value for name, value in after.beside.items()},
    }


def _headline(before: dict[str, Score], after: dict[str, Score]) -> dict[str, Any]:
    """The first evaluation set's figures once more, where a script finds them without knowing its name."""
    for name, score in after.items():
        figures = _compared(before.get(name), score)
        return {field: figures[field] for field in (f"{score.metric}_before", f"{score.metric}_after", "n")}
    return {}


def share(value: float | None, interval: list[float] | None) -> str:
    """A score in percent with its interval, if it has one."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + (f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else "")


def print_summary(results: dict[str, Any]) -> None:
    """The tables that end a run: scores, then what was trained and how fast."""

    def cell(score: dict[str, Any], when: str) -> str:
        return share(score[f"{score['metric']}_{when}"], score[f"interval_{when}"])

    if results["evaluation"]:
        scores = [
            (name, score["metric"], str(score["n"]), cell(score, "before"), cell(score, "after"))
            for name, score in results["evaluation"].items()
        ]
        console.table("scores in % (95 % interval)", ("set", "metric", "n", "before", "after"), scores)
    if "best_epoch" in results:
        best = results["best_epoch"]
        console.say(
            f"kept epoch {best['epoch']} of {len(best['epochs'])}: {best['metric']} {best['value']:.4f} on "
            f"{best['split']['choosing_rows']} rows of {best['set']}; the scores above are of the other "
            f"{best['split']['test_rows']}"
        )
    rows = [
        ("trained values", f"{results['trainable']:,}"),
        ("share of the model", f"{results['trainable_percent']:.4f} %"),
        ("steps", str(results["steps"])),
        ("loss, first to last step", f"{results['first_loss']:.4f} to {results['last_loss']:.4f}"),
        ("seconds", f"{results['train_seconds']:.1f}"),
        ("tokens per second", f"{results['tokens_per_second']:.0f}"),
        ("compiled steps", f"{results['compiled_steps']} of at most {results['possible_steps']}"),
        ("files", results["directory"]),
    ]
    console.table(results["name"], ("", ""), rows)
