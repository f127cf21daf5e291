"""Curves as pictures. Matplotlib is the extra `plots`; without it a run says so and goes on."""

from pathlib import Path

from neuroada_jax import console


def loss_curve(path: Path, losses: list[float], title: str) -> None:
    """The loss of every step and its running mean, as a PNG."""
    try:
        import matplotlib.figure
    except ImportError:
        console.say(f"no {path.name}: install matplotlib (pip install 'neuroada-jax[plots]') to have the curve drawn")
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
