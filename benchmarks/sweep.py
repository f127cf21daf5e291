"""Sweeps of the quality benchmarks: each method at its best learning rate, over several seeds, in one table of means.

A job is a dict of the fields that identify a training run: task, method, rate, seed and what the benchmark adds. Where a
method has several learning rates, the first seed tries all of them; the one with the best value on held-out rows that are
not reported is used for the other seeds. Rows are saved as they come, and finished runs are not repeated.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Column, Row
from neuroada_jax import console
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained import save
from neuroada_jax.pretrained.load import load_with_progress
from neuroada_jax.training import optimizer
from neuroada_jax.training.config import OptimizerSection
from neuroada_jax.training.preparation import Prepared

Job = dict[str, Any]
COLUMNS = (
    Column("task", "task"),
    Column("method", "method"),
    Column("trained", "trained", "{:,}".format),
    Column("rate", "rate", "{:.0e}".format),
    Column("metric", "metric"),
    Column("n", "n"),
    Column("seeds", "seeds"),
    Column("mean", "mean", "{:.1f}".format),
    Column("deviation", "deviation", "{:.1f}".format),
    Column("minutes a run", "minutes", "{:.1f}".format),
)


def parser(doc: str | None, tasks: Sequence[str], methods: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser with the options of both benchmarks."""
    made = common.parser(doc, repeats=None)
    made.add_argument("--tasks", nargs="+", default=list(tasks), choices=tasks)
    made.add_argument("--methods", nargs="+", default=list(methods), help="neuroada-<k>, lora-<r>, full")
    made.add_argument("--rates", nargs="*", default=[], metavar="METHOD=RATE,...", help="learning rates to try")
    made.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    return made


def parse(made: argparse.ArgumentParser, rates: Mapping[str, Sequence[float]], arguments: Sequence[str] | None) -> Any:
    """Return the settings, with the learning rates of every method and without the methods that lack PyTorch.

    Raises:
      UserError: if a method has no learning rate.
    """
    settings = made.parse_args(arguments)
    settings.rates = dict(rates) | dict(map(parts, settings.rates))
    unknown = [method for method in settings.methods if method not in settings.rates]
    if unknown:
        raise UserError(f"--rates: no learning rate for {unknown[0]}; give --rates {unknown[0]}=1e-3")
    if any(not is_ours(method) for method in settings.methods) and common.missing("torch", "peft"):
        settings.methods = [method for method in settings.methods if is_ours(method)]
    return settings


def parts(text: str) -> tuple[str, list[float]]:
    """Return a method and its learning rates, from METHOD=RATE,RATE."""
    name, equals, rates = text.partition("=")
    if not equals:
        raise UserError(f"--rates: found {text!r}, expected METHOD=RATE,RATE")
    return name, [float(rate) for rate in rates.split(",")]


def is_ours(method: str) -> bool:
    """Return whether this library trains the method; PyTorch trains the others."""
    return method.startswith("neuroada-")


def number(method: str) -> int | None:
    """Return the k or the rank in a method's name."""
    text = method.partition("-")[2]
    return int(text) if text else None


def torch_start(prepared: Prepared, folder: Path, auto: str) -> Any:
    """Return transformers' model with the weights and the classifier that our run starts from.

    Args:
      prepared: our run.
      folder: where the weights are exchanged.
      auto: name of transformers' class.
    """
    import transformers

    base = load_with_progress(prepared.opened, prepared.config.seed)
    save.save(folder / "start", base, base.params, prepared.tokenizer)
    return getattr(transformers, auto).from_pretrained(folder / "start", dtype="float32").to(common.torch_device())


def torch_lora(model: Any, rank: int, targets: Any, task_type: str) -> Any:
    """Add PEFT's LoRA, with alpha = 2 r and no dropout, to the linear maps that have a bypass in our runs."""
    import peft

    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type=task_type)
    with warnings.catch_warnings():  # peft 0.21 on transformers 5.23, whenever it wraps a model
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.get_peft_model(model, settings)


def torch_step(
    groups: Sequence[tuple[float, Sequence[Any]]], section: OptimizerSection, total: int
) -> Callable[[int, Any], float]:
    """Return the update of our runs in PyTorch, (step, loss) -> the loss as a number: AdamW without decay, clipping at 1.

    Args:
      groups: pairs of a peak learning rate and its parameters.
      section: the learning rate schedule.
      total: number of steps.
    """
    import torch

    update = torch.optim.AdamW([{"params": parameters} for _, parameters in groups], weight_decay=0.0)
    schedules = [optimizer.schedule(section, total, rate) for rate, _ in groups]
    trained = [parameter for _, parameters in groups for parameter in parameters]

    def run(step: int, loss: Any) -> float:
        for group, rates in zip(update.param_groups, schedules, strict=True):
            group["lr"] = float(rates(step))
        update.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        update.step()
        return float(loss.item())

    return run


def run(name: str, title: str, settings: Any, fields: Mapping[str, Any], train: Callable[[Job], Row]) -> None:
    """Run the jobs that are not finished, print the table of means and save `name`.json.

    Args:
      name: name of the JSON file.
      title: title of the table.
      settings: result of `parse`.
      fields: further fields that identify a run, the same for all runs.
      train: trains a job and returns its row, with `value`, `choosing_value` (the higher the better) and `seconds`.
    """
    rows = _finished(name, settings)

    def value_of(job: Job) -> float:
        found = next((row for row in rows if all(row.get(key) == value for key, value in job.items())), None)
        if found is None:
            console.say(f"{job['task']}, {job['method']}, rate {job['rate']:g}, seed {job['seed']}")
            found = {"dtype": "float32", **job, "k": number(job["method"]), "peak_bytes": None, **train(job)}
            rows.append(found)
            common.save(name, rows, settings)  # in case the rest is interrupted
        return float(found["choosing_value"])

    first, table = settings.seeds[0], []
    for task in settings.tasks:
        for method in settings.methods:
            jobs = [
                {"task": task, "method": method, "rate": rate, "seed": first, **fields} for rate in settings.rates[method]
            ]
            best = max(jobs, key=value_of)
            for seed in settings.seeds[1:]:
                value_of({**best, "seed": seed})
            table.append(_mean(rows, best, settings.seeds))
    common.table(f"{title}, mean and standard deviation over seeds {settings.seeds}", COLUMNS, table)
    console.say(f"written to {common.save(name, rows, settings)}")


def _finished(name: str, settings: Any) -> list[Row]:
    """Return the rows of earlier calls with the same model; others are replaced."""
    path = settings.out / f"{name}.json"
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    return list(content["rows"]) if content["settings"]["model"] == settings.model else []


def _mean(rows: Sequence[Row], job: Job, seeds: Sequence[int]) -> Row:
    same = {key: value for key, value in job.items() if key != "seed"}
    chosen = [row for row in rows if row["seed"] in seeds and all(row.get(key) == value for key, value in same.items())]
    values = [100 * row["value"] for row in chosen]
    return chosen[0] | {
        "seeds": len(chosen),
        "mean": statistics.mean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "minutes": statistics.mean(row["seconds"] for row in chosen) / 60,
    }
