"""What bfloat16 rounding of the resident weights costs in quality: SST-2 on SmolLM2-135M, trained three ways.

    make bench-rounding        (or: python -m benchmarks.rounding --k 1 20 --steps 60)

The same run (configs/smollm2-135m-sst2-k1.yaml and -k20.yaml: same rows, order, learning rate) with a float32 base, with a
bfloat16 base and the float32 remainder on the activation side, as the library trains, and with a bfloat16 base whose
rounded sum is all that the model sees, as the published code does it. Each is scored as it is exported: merged and rounded
to its base's dtype, and merged in float32. Takes about half an hour on two quiet cores; needs the rows of the configs.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.common import Column, Row
from neuroada_jax.adapters import native
from neuroada_jax.cli import one_line_errors
from neuroada_jax.core import bypass, ops
from neuroada_jax.data.prompts import PromptStyle
from neuroada_jax.evaluation import scoring
from neuroada_jax.pretrained.load import open_base, with_weights
from neuroada_jax.tasks import TASKS
from neuroada_jax.training import config_file, objectives, run
from neuroada_jax.training.config import RunConfig

PLAIN = "bfloat16, rounded sum"
METHODS = {"float32": "float32", "bfloat16, remainder": "bfloat16", PLAIN: "bfloat16"}
COLUMNS = (
    Column("method", "method"),
    Column("k", "k"),
    Column("loss, last 10", "final_loss", "{:.4f}".format),
    Column("accuracy, merged", "accuracy", "{:.3f}".format),
    Column("merged in float32", "accuracy_float32", "{:.3f}".format),
    Column("n", "n"),
    Column("rms of values", "values_rms", "{:.2e}".format),
    Column("lost in bfloat16", "lost", "{:.3f}".format),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and scores, prints the table and saves benchmarks/results/rounding.json."""
    parser = common.parser(__doc__, repeats=None)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 20], help="of configs/smollm2-135m-sst2-k*.yaml")
    parser.add_argument("--config", default="configs/smollm2-135m-sst2-k{k}.yaml", help="of the runs")
    parser.add_argument("--override", nargs="*", default=[], metavar="section.field=value", help="changes to them")
    settings = parser.parse_args(arguments)
    rows = []
    for k in settings.k:
        for method in METHODS:
            rows.append(_train(settings.config.format(k=k), method, settings))
            common.save("rounding", rows, settings)  # in case the rest is interrupted
    common.report("rounding", "rounding of the resident weights", COLUMNS, rows, settings)


def _train(path: str, method: str, settings: argparse.Namespace) -> Row:
    dtype = METHODS[method]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        fixed = [f"model.dtype={dtype}", "evaluation.before=false", "training.log_every=1", f"output={directory}"]
        chosen = config_file.load(path, [*fixed, *settings.override])
        with mock.patch.object(ops, "rounding_remainder", _nothing) if method == PLAIN else contextlib.nullcontext():
            results = run.train(chosen, overwrite=True)
        lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [json.loads(line)["loss"] for line in lines][-10:]
        return {
            "method": method,
            "k": chosen.bypass.k,
            "dtype": dtype,
            "shape": None,
            "peak_bytes": None,
            "learning_rate": chosen.optimizer.learning_rate,
            "steps": results["steps"],
            "seconds": results["train_seconds"],
            "final_loss": statistics.mean(losses),
            "accuracy": results["accuracy_after"],
            "n": results["n"],
            **_in_float32(chosen, str(directory / "adapter")),
        }


def _nothing(base: Any, values: Any) -> Any:
    return jnp.zeros_like(values)


def _in_float32(chosen: RunConfig, adapter: str) -> Row:
    """The accuracy of the same base with the values added and kept in float32, and what bfloat16 would lose of them."""
    opened, tokenizer = open_base(chosen.model.path, chosen.model.dtype)
    base = with_weights(opened)
    trained = native.load(adapter, base)
    values = [np.asarray(leaf) for leaf in jax.tree.leaves(trained.values)]
    # Rounded to bfloat16 whatever the base is, so that the rows of a table can be compared.
    unchanged = [
        _rounded(_rounded(entries) + leaf) == _rounded(entries)
        for entries, leaf in zip(jax.tree.leaves(bypass.read(base.params, trained.columns)), values, strict=True)
    ]
    wide, _ = open_base(chosen.model.path, "float32")
    params = bypass.merge(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base.params), trained)
    (each, rows), *_ = run.evaluation_rows(chosen, objectives.Continuation(chosen), base, tokenizer).items()
    section = next(found for found in chosen.evaluation.sets if found.name == each)
    task = TASKS[section.task or chosen.data.task]
    prepared = scoring.prepare(base, tokenizer, rows, task, style=PromptStyle(task.style), method=section.method)
    batch_size = chosen.evaluation.batch_size
    score = scoring.score(wide._replace(params={}), params, tokenizer, prepared, batch_size=batch_size)
    return {
        "accuracy_float32": score.value,
        "values_rms": float(np.sqrt(np.mean(np.square(flat)))),
        "lost": float(np.mean(np.concatenate([np.asarray(leaf).ravel() for leaf in unchanged]))),
    }


def _rounded(leaf: Any) -> Any:
    """To bfloat16 and back to float32."""
    return jnp.asarray(leaf).astype(jnp.bfloat16).astype(jnp.float32)


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
