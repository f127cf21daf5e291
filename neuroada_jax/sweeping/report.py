"""What a sweep shows: the table of its cells, sweep.json, and the picture of the validation loss over the rate."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from neuroada_jax import console, files
from neuroada_jax.sweeping.choice import DIVERGED, DROPPED, Cell, Spread
from neuroada_jax.sweeping.grid import RATE, SEED, describe, shown
from neuroada_jax.training import report


def print_table(content: dict[str, Any], found: Sequence[Cell]) -> None:
    """Print a line for every cell, and where the files are."""
    fields = [name for name in content["grid"] if name != SEED]
    sets = list(dict.fromkeys(name for record in content["members"] for name in record["scores"]))
    best = content["best"] and content["best"]["cell"]
    lines = []
    for cell in found:
        scores = [_scored(cell, name) for name in sets]
        trained = f"{cell.records[0]['trained']:,}"
        values = [shown(cell.fields[name]) for name in fields]
        note = ", ".join(filter(None, ("best" if cell.records[0]["cell"] == best else "", cell.status)))
        lines.append((*values, trained, str(len(cell.records)), _text(cell.validation, "{:.4f}".format), *scores, note))
    titles = [name.rpartition(".")[2] for name in fields]
    header = (*titles, "trained", "seeds", "validation loss", *sets, "")
    console.table(f"{content['name']}: mean ± standard deviation over seeds (95 % interval of the mean)", header, lines)
    if content["best"]:
        console.say(f"chosen by validation: {describe(content['best']['fields'])}")
    console.say(f"files: {content['directory']}")


def _scored(cell: Cell, name: str) -> str:
    metrics = [record["scores"][name]["metric"] for record in cell.records if name in record["scores"]]
    return _text(cell.scores(name), lambda value: report.shown(metrics[0], value)) if metrics else "-"


def _text(found: Spread, text: Callable[[float], str]) -> str:
    if found.mean is None:
        return "-"
    if found.deviation is None or found.interval is None:
        return text(found.mean)
    low, high = found.interval
    return f"{text(found.mean)} ± {text(found.deviation)} ({text(low)} to {text(high)})"


def draw(path: Path, found: Sequence[Cell], best: Cell | None, name: str) -> None:
    """Write the picture: mean validation loss over the rate, a line for each k and other field; or a point for each cell.

    Without matplotlib it reports its absence.
    """
    figures = console.figures(path.name, "picture")
    if figures is None:
        return
    figure = figures.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    if all(RATE in cell.fields for cell in found):
        _lines(axes, found)
        axes.set_xscale("log")
        rates = sorted({cell.fields[RATE] for cell in found})
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.set_xlabel("learning rate")
        place = best.fields[RATE] if best else 0.0
    else:
        for at, cell in enumerate(found):
            if cell.validation.mean is not None:
                axes.errorbar(
                    at, cell.validation.mean, yerr=cell.validation.deviation or 0.0, color="C0", fmt="o", capsize=3
                )
        axes.set_xticks(range(len(found)), [describe(cell.fields) for cell in found], rotation=20, ha="right")
        place = found.index(best) if best else 0.0
    if best is not None and best.validation.mean is not None:
        label = f"chosen: {describe(best.fields)}"
        axes.plot(place, best.validation.mean, "*", color="C3", markersize=15, label=label, zorder=5)
        axes.legend(frameon=False)
    values = [cell.validation.mean for cell in found if cell.validation.mean is not None]
    if values and max(values) > 10 * min(values) > 0:
        axes.set_yscale("log")
    axes.set_ylabel("validation loss (nats a label)")
    axes.set_title(f"{name}: mean and deviation over seeds", fontsize="medium", wrap=True)
    axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    files.write_bytes(path, picture.getvalue())


def _lines(axes: Any, found: Sequence[Cell]) -> None:
    """Draw a line over the rates for each combination of the other fields; members without a loss as crosses above."""
    groups: dict[str, list[Cell]] = {}
    for cell in found:
        others = {name: value for name, value in cell.fields.items() if name != RATE}
        groups.setdefault(describe(others) if others else "", []).append(cell)
    for number, (label, own) in enumerate(groups.items()):
        points = sorted(
            (cell.fields[RATE], cell.validation.mean, cell.validation.deviation or 0.0)
            for cell in own
            if cell.validation.mean is not None
        )
        colour = f"C{number % 10}"
        if points:
            rates, means, deviations = zip(*points, strict=True)
            axes.errorbar(rates, means, yerr=deviations, color=colour, marker="o", capsize=3, label=label or None)
        for status, marker in ((DIVERGED, "x"), (DROPPED, "v")):
            lost = [cell.fields[RATE] for cell in own if cell.validation.mean is None and cell.status == status]
            if lost:
                where = axes.get_xaxis_transform()
                text = f"{label} {status}".strip()
                axes.plot(lost, [0.97] * len(lost), marker, color=colour, transform=where, linestyle="none", label=text)
