"""Draw docs/method.png: the entries that NeuroAda trains in a weight matrix, beside the two factors of LoRA.

Usage: python docs/draw_method.py [FILE.png]. Needs the extra `plots`. The library itself selects the marked entries.
"""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyBboxPatch, Rectangle

import neuroada_jax as na

O, I, K, RANK = 8, 12, 2, 1
INK, FAINT, RULE, FROZEN, TRAINED = "#1f2933", "#5b6770", "#cbd2d9", "#9fb3c8", "#d9480f"
TINT = 0.18  # how much of the trained colour LoRA's W takes on: all of its entries change
SIDE = 0.3  # of a cell
WIDTH, HEIGHT = 13.2, 5.5
INCHES = 0.62  # of one unit


def cells(axes: Axes, colours: np.ndarray, left: float, top: float) -> None:
    """Draw a matrix of cells, whose colours are (rows, columns, 3), from its upper left corner."""
    for row, column in np.ndindex(colours.shape[:2]):
        place = (left + column * SIDE, top - (row + 1) * SIDE)
        axes.add_patch(Rectangle(place, SIDE, SIDE, facecolor=colours[row, column], edgecolor="white", linewidth=1.0))


def shades(weights: np.ndarray) -> np.ndarray:
    """Return a shade of the frozen colour for every weight, darker where |w| is larger."""
    strength = (0.15 + 0.85 * np.abs(weights) / np.abs(weights).max())[..., None]
    return 1 - strength * (1 - np.array(to_rgb(FROZEN)))


def trained(*shape: int) -> np.ndarray:
    """Return the colour of trained values for a matrix of cells."""
    return np.broadcast_to(np.array(to_rgb(TRAINED)), (*shape, 3))


def text(axes: Axes, x: float, y: float, words: str, size: float = 9.5, colour: str = FAINT, **options: str) -> None:
    """Write centred words."""
    axes.text(x, y, words, fontsize=size, color=colour, **{"ha": "center", "va": "center", **options})


def neuroada(axes: Axes, weights: np.ndarray, left: float, top: float) -> None:
    """Draw W with the K selected entries of each row marked, and the table of their values."""
    columns = np.asarray(na.select(weights, K))  # (O, K)
    colours = shades(weights)
    np.put_along_axis(colours, columns[..., None], trained(O, K), axis=1)
    cells(axes, colours, left, top)
    cells(axes, trained(O, K), left + 4.45, top)
    text(axes, left + I * SIDE / 2, top + 0.2, f"W (O × I): {O} neurons, {I} inputs")
    text(axes, left + 4.03, top - O * SIDE / 2, r"$\rightarrow$", 16, INK)
    text(axes, left + 4.45 + K * SIDE / 2, top + 0.2, "values (O × k)")
    text(axes, left + 2.5, top + 0.76, f"NeuroAda, k = {K}", 13, INK, weight="bold")
    text(axes, left + 2.5, top - 2.9, f"trained: k · O = {K * O} values", 11.5, TRAINED, weight="bold")
    text(axes, left + 2.5, top - 3.28, "added to the k largest |w| of each neuron", 10, INK)


def lora(axes: Axes, weights: np.ndarray, left: float, top: float) -> None:
    """Draw W with B beside its rows and A above its columns: entry (o, i) changes by B[o] · A[i]."""
    cells(axes, (1 - TINT) * shades(weights) + TINT * trained(O, I), left, top)
    cells(axes, trained(O, RANK), left + I * SIDE + 0.12, top)
    cells(axes, trained(RANK, I), left, top + SIDE + 0.12)
    text(axes, left + I * SIDE + 1.05, top - O * SIDE / 2, "B (O × r)")
    text(axes, left + I * SIDE + 0.75, top + 0.3, "A (r × I)")
    text(axes, left + 2.2, top + 0.76, f"LoRA, r = {RANK}", 13, INK, weight="bold")
    text(axes, left + 2.2, top - 2.9, f"trained: r · (O + I) = {RANK * (O + I)} values", 11.5, TRAINED, weight="bold")
    text(axes, left + 2.2, top - 3.28, "all of W changes, by the product B A of rank r", 10, INK)


def main(path: str) -> None:
    """Write the picture to `path`."""
    mpl.use("Agg")
    weights = np.random.default_rng(7).normal(size=(O, I)).astype(np.float32)
    figure = plt.figure(figsize=(WIDTH * INCHES, HEIGHT * INCHES))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
    axes.axis("off")
    # A card with a background of its own, so that the picture reads the same on a light and on a dark page.
    card = {"boxstyle": "round,pad=0,rounding_size=0.2", "facecolor": "white", "edgecolor": RULE}
    axes.add_patch(FancyBboxPatch((0.1, 0.1), WIDTH - 0.2, HEIGHT - 0.2, **card))
    axes.plot([6.6, 6.6], [0.75, HEIGHT - 0.4], color=RULE, linewidth=1)
    neuroada(axes, weights, 0.75, 4.2)
    lora(axes, weights, 7.6, 4.2)
    text(
        axes, WIDTH / 2, 0.42, "Both can be merged into W after training: the model keeps its shape and its inference cost."
    )
    figure.savefig(path, dpi=150, transparent=True, metadata={"Software": None})


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).with_name("method.png")))
