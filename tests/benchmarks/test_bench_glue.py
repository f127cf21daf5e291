"""benchmarks/glue.py on a tiny BERT: every method a row, the rates by the choosing rows, nothing run twice."""

import json
import random

import numpy as np
import pytest
from data_helpers import write_lines
from helpers import write_bert

from benchmarks import glue
from neuroada_jax.errors import UserError

METHODS = ["neuroada-2", "lora-2", "full"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(model, folder of data)."""
    folder = tmp_path_factory.mktemp("glue")
    draw = random.Random(0)
    (folder / "data" / "cola").mkdir(parents=True)
    for name, count in (("train", 16), ("validation", 10)):
        rows = [{"sentence": draw.choice("abcd") * draw.randint(1, 5), "label": draw.randint(0, 1)} for _ in range(count)]
        write_lines(folder / "data" / "cola" / f"{name}.jsonl", rows)
    return write_bert(folder / "bert"), folder / "data"


def call(inputs, out, *more):
    model, data = inputs
    arguments = ["--model", model, "--data", data, "--tasks", "cola", "--epochs", 2, "--batch-size", 8, "--out", out]
    rates = ["neuroada-2=1e-2", "lora-2=1e-2,1e-3", "full=1e-3"]
    glue.main([str(each) for each in (*arguments, "--methods", *METHODS, "--rates", *rates, *more)])
    return json.loads((out / "glue.json").read_text())


@pytest.mark.slow  # a benchmark in full
def test_methods_share_rows_splits_and_classifiers(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(glue, "MAX_LENGTH", 40)
    content = call(inputs, tmp_path, "--seeds", "1", "2")
    rows = content["rows"]
    assert {"date", "machine", "versions"} <= content["settings"].keys()
    assert [(row["method"], row["seed"]) for row in rows].count(("lora-2", 1)) == 2  # both rates, with the first seed
    assert len(rows) == 7 and all(row["n"] == 5 and row["metric"] == "matthews" for row in rows)
    by_seed = {seed: {row["split"] for row in rows if row["seed"] == seed} for seed in (1, 2)}
    assert all(len(splits) == 1 for splits in by_seed.values()) and by_seed[1] != by_seed[2]
    tried = {row["rate"]: row["choosing_value"] for row in rows if row["method"] == "lora-2" and row["seed"] == 1}
    used = next(row["rate"] for row in rows if row["method"] == "lora-2" and row["seed"] == 2)
    assert tried[used] == max(tried.values())
    assert all(np.isfinite(row["last_loss"]) and len(row["epoch_values"]) == 2 for row in rows)
    trained = {row["method"]: row["trained"] for row in rows}
    classifier = 16 * 2 + 2
    assert trained["neuroada-2"] == 2 * 2 * (5 * 16 + 24) + classifier
    assert trained["lora-2"] == 2 * 2 * (4 * 32 + 2 * 40) + classifier
    assert "lora-2" in capsys.readouterr().out

    monkeypatch.setattr(glue, "_run", None)  # all rows are there
    assert call(inputs, tmp_path, "--seeds", "1", "2")["rows"] == rows


def test_rates_are_checked(inputs, tmp_path):
    with pytest.raises(UserError, match="--rates: no learning rate for neuroada-3"):
        glue.main(["--methods", "neuroada-3", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="found 'full', expected METHOD=RATE"):
        glue.main(["--rates", "full", "--out", str(tmp_path)])
