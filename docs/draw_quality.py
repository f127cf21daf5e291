"""Draw docs/quality.png: accuracy over the learning rate after 400 steps, NeuroAda and LoRA at two budgets.

Usage: python docs/draw_quality.py [FILE.png]. Needs the extra `plots`. Reads benchmarks/results/sst2-400-steps.json.
"""

import json
import sys
from pathlib import Path

from matplotlib import pyplot as plt

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "sst2-400-steps.json"
COLOURS = {"NeuroAda": "#d9480f", "LoRA": "#2b6cb0"}


def main(target: Path) -> None:
    """Draw a line for each method, solid for the large budget."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    figure, axes = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        values = own[0]["trained"]
        rates, means = [row["learning_rate"] for row in own], [row["accuracy_mean"] for row in own]
        axes.errorbar(
            rates,
            means,
            yerr=[row["accuracy_deviation"] for row in own],
            color=COLOURS[method.split(",")[0]],
            linestyle="-" if values > 1e6 else "--",
            marker="o",
            capsize=3,
            label=f"{method}: {values:,} values",
        )
    axes.set_xscale("log")
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("accuracy in %, n = 872")
    axes.set_title(
        "SmolLM2-135M, SST-2 as an instruction, 400 steps of 16 rows; mean and deviation, 3 seeds", fontsize="small"
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small", loc="lower left")
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("quality.png"))
