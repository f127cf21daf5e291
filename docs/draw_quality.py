"""Draw docs/quality.png: accuracy over the learning rate after 400 steps, NeuroAda and LoRA at two budgets, on two models.

Usage: python docs/draw_quality.py [FILE.png]. Needs the extra `plots`. Reads sst2-400-steps.json and quality.json of
benchmarks/results.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import pyplot as plt

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
COLOURS = {"NeuroAda": "#d9480f", "LoRA": "#2b6cb0"}
METHODS = {
    "neuroada-1": "NeuroAda, k = 1",
    "lora-1": "LoRA, r = 1",
    "neuroada-20": "NeuroAda, k = 20",
    "lora-10": "LoRA, r = 10",
}
ON_CPU = "on a CPU"


class Point(NamedTuple):
    """A method at a rate: mean and deviation over three to five seeds, in %; the deviation of a single seed is None."""

    method: str
    trained: int
    rate: float
    mean: float
    deviation: float | None


def main(target: Path) -> None:
    """Draw a panel for each model and in it a line for each method, solid for the large budget."""
    panels = {
        "SmolLM2-135M, SST-2 as an instruction": [
            Point(row["method"], row["trained"], row["learning_rate"], row["accuracy_mean"], row["accuracy_deviation"])
            for row in _rows("sst2-400-steps.json")
        ]
        + [
            Point(f"{METHODS[row['method']]}, {ON_CPU}", row["trained"], row["rate"], row["mean"], row["deviation"])
            for row in _rows("quality.json")
            if (row["task"], row["base"]) == ("sst2", "float32")
        ],
        "MiniLM, SST-2 with a classifier": [
            Point(METHODS[row["method"]], row["trained"], row["rate"], row["mean"], row["deviation"])
            for row in _rows("quality.json")
            if row["method"] in METHODS and (row["task"], row["base"]) == ("sst2-encoder", "float32")
            if row["mean"] > 60  # the others: chance
        ],
    }
    figure, both = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axes, (title, points) in zip(both, panels.items(), strict=True):
        most = max(point.trained for point in points)
        for method in dict.fromkeys(point.method for point in points):
            own = sorted((point for point in points if point.method == method), key=lambda point: point.rate)
            axes.errorbar(
                [point.rate for point in own],
                [point.mean for point in own],
                yerr=[point.deviation or 0.0 for point in own],
                color=COLOURS[method.split(",")[0]],
                linestyle="-" if own[0].trained > most / 2 else "--",
                marker="s" if method.endswith(ON_CPU) else "o",
                markerfacecolor="white" if method.endswith(ON_CPU) else None,
                capsize=3,
                label=f"{method}: {own[0].trained:,} values",
            )
        means = [point.mean for point in points]
        axes.set_ylim(min(means) - 1, max(means) + 1)  # the bar of a rate at which some seeds fall to chance runs out of it
        axes.set_xscale("log")
        axes.set_xlabel("peak learning rate")
        axes.set_ylabel("accuracy in %, n = 872")
        axes.set_title(f"{title}, 400 steps of 16 rows", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2)
    figure.savefig(target, dpi=100)


def _rows(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / name).read_text(encoding="utf-8"))["rows"]
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("quality.png"))
