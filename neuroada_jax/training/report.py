"""Tables of a finished run."""

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from neuroada_jax import console, files
from neuroada_jax.evaluation.class_report import ClassReport
from neuroada_jax.evaluation.scoring import Score
from neuroada_jax.tasks import GLUE
from neuroada_jax.training.config import RunConfig

_WRITTEN = (
    "adapter",
    "merged",
    "checkpoints",
    "config.yaml",
    "results.json",
    "metrics.jsonl",
    "loss.png",
    "predictions-*",
    "validation.jsonl",
    "confusion-*",
)


def percent(value: float | None, interval: Sequence[float] | None = None) -> str:
    """Return a score in percent with its interval, if it has one; "-" where it is missing or not finite."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{100 * value:.1f}" + (f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else "")


def shown(metric: str, value: float | None, interval: Sequence[float] | None = None) -> str:
    """Return a score in percent with its interval, but a mean of squares as it is; "-" where it is missing."""
    if metric != "mse" or value is None or not math.isfinite(value):
        return percent(value, interval)
    return f"{value:.4g}" + (f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else "")


_MOST_CLASSES = 30  # that are printed
_COUNTS = {
    "overlap": "overlap: questions that are among the training rows",
    "empty": "empty: generations without any text, which count as wrong",
    "unfinished": "unfinished: generations that ran to max_new_tokens without an end",
}


class Figure(NamedTuple):
    """One row of a table of scores: a set, or below it a further metric or a subset of its rows.

    Attributes:
      name: in the table.
      metric: name of the metric.
      n: number of rows.
      value: of the metric.
      interval: its 95 % interval.
      counts: those of `_COUNTS`; of the complete set alone.
    """

    name: str
    metric: str
    n: int
    value: float
    interval: tuple[float, float] | None
    counts: Mapping[str, int | None] = MappingProxyType({})

    @property
    def shown(self) -> str:
        """The value with its interval: in percent, but a mean of squares as it is."""
        return shown(self.metric, self.value, self.interval)

    def cells(self, fields: Sequence[str]) -> list[str]:
        """Return the counts in these fields of a table."""
        return ["" if self.counts.get(field) is None else str(self.counts[field]) for field in fields]


def figures(name: str, score: Score) -> list[Figure]:
    """Return the rows of a set: its metric, the metrics beside it, and its parts."""
    counts = {"overlap": score.overlap, "empty": score.empty, "unfinished": score.unfinished or None}
    main = Figure(name, score.metric, score.n, score.value, score.interval, counts)
    beside = (
        Figure(f"  {name}, {each}", each, score.n, value, score.beside_intervals.get(each))
        for each, value in score.beside.items()
    )
    parts = (
        Figure(f"  {name}, {kind}", score.metric, part.n, part.value, part.interval) for kind, part in score.parts.items()
    )
    return [main, *beside, *parts]


def count_fields(figures: Iterable[Figure]) -> list[str]:
    """Return the counts that any of these figures has."""
    every = [each.counts for each in figures]
    return [field for field in _COUNTS if any(counts.get(field) is not None for counts in every)]


def scores(content: Mapping[str, Any], when: str) -> dict[str, Score]:
    """Return the scores by evaluation set that results.json holds, "before" or "after" the training."""
    return {name: Score.from_json(score) for name, score in content[when].items()}


def print_summary(content: dict[str, Any]) -> None:
    """Print the tables of a finished run: scores, then sizes, losses and speed.

    Args:
      content: of results.json.
    """
    run = f"{content['name']}, seed {content['seed']}"
    before, after = scores(content, "before"), scores(content, "after")
    if after:
        print_scores(before, after, content["mean"], f"{run}: ")
    if "best_epoch" in content:
        best = content["best_epoch"]
        console.say(
            f"kept epoch {best['epoch']} of {len(best['epochs'])}: {best['metric']} {_loss(best['value'])} on "
            f"{best['split']['choosing_rows']} rows of {best['set']}; the score above is of the other "
            f"{best['split']['test_rows']}"
        )
    if "validation" in content:
        kept = content["validation"]
        early = ", which ended early" if kept["stopped_early"] else ""
        compared = "" if kept.get("start_loss") is None else f", {_loss(kept['start_loss'])} before the training"
        console.say(
            f"kept the state after step {kept['best_step']} of {content['steps']}{early}: validation loss "
            f"{_loss(kept['best_loss'])}{compared}"
        )
    rows = [
        ("trained values", f"{content['trainable']:,}"),
        ("share of the model", f"{content['trainable_percent']:.4f} %"),
        ("steps", str(content["steps"])),
        ("loss, first to last step", " to ".join(_loss(content[f"{which}_loss"]) for which in ("first", "last"))),
        ("seconds", f"{content['train_seconds']:.1f}"),
        ("tokens per second", f"{content['tokens_per_second']:.0f}"),
        ("compiled steps", f"{content['compiled_steps']} of at most {content['possible_steps']}"),
        ("files", content["directory"]),
    ]
    console.table(run, ("", ""), rows)


def print_next_steps(config: RunConfig) -> None:
    """Print on standard error what a finished run has written, and commands that use it, as a shell takes them."""
    directory = config.directory
    runs = [directory / f"seed-{seed}" for seed in config.seeds] if config.seeds else [directory]
    for run in runs:
        names = sorted(path.name for pattern in _WRITTEN for path in run.glob(pattern))
        console.say(f"wrote {run}: {', '.join(names)}")
    if config.seeds:
        console.say(f"wrote {directory}: results.json")
    adapter = str(runs[0] / "adapter")
    steps = [["evaluate", "--adapter", adapter, *_evaluation_rows(config)]]
    labels = files.read_json(Path(adapter) / "adapter.json")["base"].get("labels")
    if labels is None:  # a decoder, which sst2 alone does not tell
        steps.insert(0, ["generate", "--adapter", adapter, "--prompt", "..."])
    else:
        texts = GLUE[config.data.task].texts if config.data.task in GLUE else config.data.text
        pair = ["--text-pair", "..."] if not isinstance(texts, str | None) and len(texts) == 2 else []
        steps.insert(0, ["classify", "--adapter", adapter, "--text", "...", *pair])
    if config.merge:
        to = "peft-lora" if config.method == "lora" else "peft-shira"
        steps.append(["export", adapter, "--to", to, "--out", str(runs[0] / "peft")])
    else:
        steps.append(["merge", "--adapter", adapter, "--out", str(runs[0] / "merged")])
    console.say("next:")
    for each in steps:
        console.say(f"  {shlex.join(['neuroada', *each])}")


def _evaluation_rows(config: RunConfig) -> list[str]:
    """Return the options of `neuroada evaluate` for the rows of the first set, else of validation or training."""
    if config.evaluation.sets:
        first = config.evaluation.sets[0]
        task, data, split, columns = first.task, first.data, first.split, config.columns_of(first)
    else:
        given = config.data.validation
        data, split = (config.data.train, config.data.split) if isinstance(given, float | None) else (given, "validation")
        task, columns = None, config.data.columns
    sources = [data] if isinstance(data, str) else data or []
    if not config.evaluation.sets and split in ("train", "validation") and all(Path(each).is_file() for each in sources):
        split = None
    renamed = [f"{field}={column}" for field, column in columns.items()]
    found = {"--task": [task or config.data.task], "--data": sources, "--split": [split] if split else []}
    return [word for name, values in {**found, "--columns": renamed}.items() if values for word in (name, *values)]


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def print_scores(
    before: Mapping[str, Score],
    after: Mapping[str, Score],
    mean: Mapping[str, float | None] | None = None,
    heading: str = "",
) -> None:
    """Print a row for every set, its further metrics and its parts, and the mean; below the table, explain the counts.

    Args:
      before: scores of the base model by set; empty where there are none.
      after: scores by set.
      mean: of the sets, "before" and "after".
      heading: beginning of the title.
    """
    known = {each.name: each for name, score in before.items() for each in figures(name, score)}
    shown = [each for name, score in after.items() for each in figures(name, score)]
    fields, rows = count_fields(shown), []
    for each in shown:
        label = each.name if each.name not in after or each.metric == "accuracy" else f"{each.name}, {each.metric}"
        first = known[each.name].shown if each.name in known else "-"
        rows.append((label, str(each.n), *each.cells(fields), first, each.shown))
    if mean:
        spare = [""] * len(fields)
        rows.append(("mean of the sets", str(len(after)), *spare, percent(mean["before"]), percent(mean["after"])))
    kind = "accuracy" if all(score.metric == "accuracy" for score in after.values()) else "score"
    title = f"{heading}{kind} in % (95 % interval)"
    if before:
        console.table(title, ("set", "n", *fields, "before", "after"), rows)
    else:
        console.table(title, ("set", "n", *fields, kind), [(*row[:-2], row[-1]) for row in rows])
    for field in fields:
        console.say(_COUNTS[field])
    for name, score in after.items():
        if score.classes is not None:
            _print_classes(name, score.classes)


def _print_classes(name: str, report: ClassReport) -> None:
    """Print the figures of every class; of many classes the worst, since the others are in results.json."""
    worst = sorted(report.classes, key=lambda each: each.f1)[:_MOST_CLASSES]
    chosen = report.classes if len(report.classes) <= _MOST_CLASSES else worst
    rows = [(each.label, str(each.support), *(percent(value) for value in each[1:4])) for each in chosen]
    title = (
        "labels" if chosen is report.classes else f"the {len(chosen)} labels with the lowest F1 of {len(report.classes)}"
    )
    console.table(f"{name}: {title}, in %", ("label", "n", "precision", "recall", "F1"), rows)
