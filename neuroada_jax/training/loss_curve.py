"""The picture of a run's loss, loss.png."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neuroada_jax import console, files

_FEW = 40  # steps that are drawn as points, since a line between so few says little


def loss_curve(
    path: Path, losses: Sequence[float], title: str, validation: Sequence[Mapping[str, Any]] = (), best: int | None = None
) -> None:
    """Write the training loss, and the validation loss if there is one, as a PNG; without matplotlib, report its absence.

    Args:
      path: of the picture.
      losses: mean loss per label of every step, in nats; NaN where it was not finite.
      title: of the picture.
      validation: dicts of "step" and "value", the validation loss.
      best: the step whose state was kept; None for the last.
    """
    figures = console.figures(path.name, "curve")
    if figures is None:
        return
    figure = figures.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    _draw_training(axes, losses)
    points = [(line["step"], line["value"]) for line in validation if line["value"] is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color="C1", linewidth=2, marker="o", markersize=4, label="validation")
        kept = [point for point in points if point[0] == best]
        if kept:
            label = f"kept: step {best}, {kept[0][1]:.4f}"
            axes.plot(*kept[0], color="C3", marker="*", markersize=13, linestyle="none", label=label, zorder=5)
    shown = [loss for loss in [*losses, *(value for _, value in points)] if math.isfinite(loss) and loss > 0]
    if shown and max(shown) > 10 * min(shown):
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss per label (nats)")
    axes.set_title(title, fontsize="medium", wrap=True)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3, which="both" if axes.get_yscale() == "log" else "major")
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    files.write_bytes(path, picture.getvalue())


def _draw_training(axes: Any, losses: Sequence[float]) -> None:
    """Draw the loss of every step, and behind enough steps their running mean."""
    steps = range(1, len(losses) + 1)
    if len(losses) <= _FEW:
        axes.plot(steps, losses, color="C0", linewidth=1.5, marker="o", markersize=4, label="training, each step")
        return
    width = max(2, len(losses) // 20)
    axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=0.8, label="training, each step")
    axes.plot(steps, _running_mean(losses, width), color="C0", linewidth=2, label=f"training, mean of {width} steps")


def _running_mean(losses: Sequence[float], width: int) -> list[float]:
    """Return the mean of the finite ones among each step's last `width` losses, NaN where there is none."""
    means, total, count = [], 0.0, 0
    for i, loss in enumerate(losses):
        if math.isfinite(loss):
            total, count = total + loss, count + 1
        if i >= width and math.isfinite(losses[i - width]):
            total, count = total - losses[i - width], count - 1
        means.append(total / count if count else math.nan)
    return means
