"""What a finished run says: results.json, the tables that end it, and the curve of its loss."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from neuroada_jax import console, files
from neuroada_jax.adapters import native
from neuroada_jax.data.batches import AnyBatches
from neuroada_jax.errors import install_line
from neuroada_jax.evaluation.scoring import Score
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.loop import History


def results(
    config: RunConfig,
    batches: AnyBatches,
    total_steps: int,
    parameters: tuple[int, int],
    done: History,
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
      before: scores of the base model by set, empty where they were not asked for.
      after: scores of the merged model by set.
    """
    trainable, total = parameters
    return {
        "name": config.name,
        "directory": str(config.directory),
        "seed": config.seed,
        "steps": total_steps,
        "epochs": total_steps / batches.steps_per_epoch,
        "targets": config.bypass.targets,
        "trainable": trainable,
        "total_parameters": total,
        "trainable_percent": 100 * trainable / total,
        "train_seconds": done.seconds,
        "tokens_per_second": done.tokens / done.seconds,
        "first_loss": files.finite(done.losses[0]),
        "last_loss": files.finite(done.losses[-1]),
        "compiled_steps": len(done.shapes),
        "possible_steps": len(batches.shapes),
        "examples": len(batches.examples),
        "cut": batches.examples.truncated,
        "dropped": batches.examples.dropped,
        "evaluation": {name: score(before.get(name), scored) for name, scored in after.items()},
        "mean": _mean(before, after),
        **_headline(before, after),
        "backend": jax.default_backend(),
        "versions": native.installed_versions() | {"python": sys.version.split()[0]},
    }


def score(before: Score | None, after: Score) -> dict[str, Any]:
    """The figures of one set. Its parts are those that were scored by a second rule or are not in the training rows."""

    def parts(of: Score) -> dict[str, Any]:
        return {name: {**part._asdict(), "interval": list(part.interval)} for name, part in of.parts.items()}

    def interval(of: tuple[float, float] | None) -> list[float] | None:
        return list(of) if of else None

    return {
        "n": after.n,
        "metric": after.metric,
        f"{after.metric}_before": before.value if before else None,
        f"{after.metric}_after": after.value,
        **{f"{name}_after": value for name, value in after.beside.items()},
        **{f"{name}_interval_after": interval(found) for name, found in after.beside_intervals.items()},
        "beside": list(after.beside),
        "interval_before": interval(before.interval if before else None),
        "interval_after": interval(after.interval),
        "parts_before": parts(before) if before else None,
        "parts_after": parts(after),
        "empty_before": before.empty if before else None,
        "empty_after": after.empty,
        "overlap": after.overlap,
    }


def _mean(before: dict[str, Score], after: dict[str, Score]) -> dict[str, float | None] | None:
    """The plain mean over the sets, as published tables have it; None for less than two sets."""
    if len(after) < 2:
        return None

    def mean(scores: dict[str, Score]) -> float | None:
        return sum(score.value for score in scores.values()) / len(scores) if scores else None

    return {"before": mean(before), "after": mean(after)}


def _headline(before: dict[str, Score], after: dict[str, Score]) -> dict[str, Any]:
    """The first evaluation set's figures once more, where a script finds them without knowing its name."""
    for name, scored in after.items():
        figures = score(before.get(name), scored)
        return {field: figures[field] for field in (f"{scored.metric}_before", f"{scored.metric}_after", "n")}
    return {}


def share(value: float | None, interval: list[float] | None) -> str:
    """A score in percent with its interval, if it has one."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + (f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else "")


_COUNTS = {
    "overlap": "overlap: questions that are among the training rows",
    "empty": "empty: generations without any text, which count as wrong",
}


class Figure(NamedTuple):
    """One figure of a set, with what tables call it; `counts` are those of `_COUNTS`, of the whole set alone."""

    name: str
    metric: str
    n: int
    value: float | None
    interval: list[float] | None
    counts: Mapping[str, int | None] = MappingProxyType({})

    def cells(self, columns: Sequence[str]) -> list[str]:
        """The counts in these columns of a table."""
        return ["" if self.counts.get(column) is None else str(self.counts[column]) for column in columns]


def figures(name: str, score: dict[str, Any], when: str) -> list[Figure]:
    """What results.json says of a set, "before" or "after" the training: its metric, those beside it, and its parts."""
    metric, n = score["metric"], score["n"]
    counts = {"overlap": score["overlap"], "empty": score[f"empty_{when}"]}
    main = Figure(name, metric, n, score[f"{metric}_{when}"], score[f"interval_{when}"], counts)
    beside = (
        Figure(f"  {name}, {each}", each, n, score.get(f"{each}_{when}"), score.get(f"{each}_interval_{when}"))
        for each in score["beside"]
    )
    parts = (
        Figure(f"  {name}, {kind}", metric, part["n"], part["value"], part["interval"])
        for kind, part in (score[f"parts_{when}"] or {}).items()
    )
    return [main, *beside, *parts]


def count_columns(shown: Iterable[Figure]) -> list[str]:
    """The counts that any of these figures has."""
    every = [each.counts for each in shown]
    return [column for column in _COUNTS if any(counts.get(column) is not None for counts in every)]


def print_summary(results: dict[str, Any]) -> None:
    """The tables that end a run: accuracies, then what was trained and how fast."""
    run = f"{results['name']}, seed {results['seed']}"
    if results["evaluation"]:
        print_scores(results["evaluation"], results["mean"], f"{run}: ")
    if "best_epoch" in results:
        best = results["best_epoch"]
        console.say(
            f"kept epoch {best['epoch']} of {len(best['epochs'])}: {best['metric']} {_loss(best['value'])} on "
            f"{best['split']['choosing_rows']} rows of {best['set']}; the score above is of the other "
            f"{best['split']['test_rows']}"
        )
    rows = [
        ("trained values", f"{results['trainable']:,}"),
        ("share of the model", f"{results['trainable_percent']:.4f} %"),
        ("steps", str(results["steps"])),
        ("loss, first to last step", " to ".join(_loss(results[f"{which}_loss"]) for which in ("first", "last"))),
        ("seconds", f"{results['train_seconds']:.1f}"),
        ("tokens per second", f"{results['tokens_per_second']:.0f}"),
        ("compiled steps", f"{results['compiled_steps']} of at most {results['possible_steps']}"),
        ("files", results["directory"]),
    ]
    console.table(run, ("", ""), rows)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def print_scores(sets: dict[str, dict[str, Any]], mean: dict[str, float | None] | None = None, of: str = "") -> None:
    """A row for every set, one for each of its parts, and the mean; below, what the counts are.

    `of` begins the title.
    """
    before, after = (
        [each for name, score in sets.items() for each in figures(name, score, when)] for when in ("before", "after")
    )
    columns, known, rows = count_columns(after), {each.name: each for each in before}, []
    for each in after:
        shown = each.name if each.name not in sets or each.metric == "accuracy" else f"{each.name}, {each.metric}"
        first = share(*known[each.name][3:5]) if each.name in known else "-"
        rows.append((shown, str(each.n), *each.cells(columns), first, share(each.value, each.interval)))
    if mean:
        spare = [""] * len(columns)
        rows.append(("mean of the sets", str(len(sets)), *spare, share(mean["before"], None), share(mean["after"], None)))
    kind = "accuracy" if all(score["metric"] == "accuracy" for score in sets.values()) else "score"
    title = f"{of}{kind} in % (95 % interval)"
    if any(score[f"{score['metric']}_before"] is not None for score in sets.values()):
        console.table(title, ("set", "n", *columns, "before", "after"), rows)
    else:
        console.table(title, ("set", "n", *columns, kind), [(*row[:-2], row[-1]) for row in rows])
    for column in columns:
        console.say(_COUNTS[column])


def loss_curve(path: Path, losses: list[float], title: str) -> None:
    """The loss of every step and its running mean, as a PNG."""
    try:
        import matplotlib.figure
    except ImportError:
        console.say(f"no {path.name}: install matplotlib ({install_line('plots')}) to have the curve drawn")
        return
    steps = range(1, len(losses) + 1)
    width = max(1, len(losses) // 20)
    running = [sum(losses[max(0, i - width) : i]) / min(i, width) for i in steps]
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, alpha=0.35, linewidth=1, label="each step")
    axes.plot(steps, running, linewidth=2, label=f"mean of the last {width}")
    axes.set(xlabel="step", ylabel="loss per target token (nats)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)
