"""benchmarks/instruct.py on a tiny LLaMA: ours and PEFT's LoRA see the same rows, and both are scored by us."""

import json

import numpy as np
import pytest
from data_helpers import write_lines
from helpers import needs_peft, write_config, write_model

from benchmarks import instruct

METHODS = ["neuroada-2", "lora-1"]


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """(model, config)."""
    monkeypatch.setattr(instruct, "CHOOSING", 4)
    words = ["good", "bad", "fine", "poor"]
    rows = [{"sentence": f"{words[i % 4]} {words[i % 3]}", "label": i % 2} for i in range(24)]
    content = {
        "name": "sst2",
        "model": {"path": "anything"},
        "data": {"train": str(write_lines(tmp_path / "train.jsonl", rows)), "task": "sst2", "max_length": 128},
        "optimizer": {"learning_rate": 1e-2},
        "training": {"steps": 2, "batch_size": 8, "remat": "none"},
        "evaluation": {
            "sets": [{"name": "sst2", "data": str(write_lines(tmp_path / "held.jsonl", rows[:6])), "method": "choices"}]
        },
    }
    return write_model(tmp_path / "model"), write_config(tmp_path / "sst2.yaml", content)


@pytest.mark.slow  # a benchmark in full
def test_methods_share_rows_and_scoring(inputs, tmp_path, capsys):
    model, file = inputs
    arguments = ["--tasks", "sst2", "--methods", *METHODS, "--rates", "neuroada-2=1e-3,1e-2", "lora-1=1e-3"]
    arguments += ["--seeds", "1", "2", "--steps", "3", "--model", str(model), "--config", f"sst2={file}"]
    instruct.main([*arguments, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "instruct.json").read_text())["rows"]
    assert [(row["method"], row["seed"]) for row in rows].count(("neuroada-2", 1)) == 2  # both rates, with the first seed
    assert len(rows) == 5 and all(row["n"] == 6 and row["values"].keys() == {"sst2"} for row in rows)
    assert all(np.isfinite(row["last_loss"]) and 0 <= row["choosing_value"] <= 1 for row in rows)
    assert "lora-1" in capsys.readouterr().out


@needs_peft
def test_both_lose_the_same_before_they_train(inputs, tmp_path):
    """At a rate of nearly 0 the last loss is that of the base, on the same batch."""
    model, file = inputs
    arguments = ["--tasks", "sst2", "--methods", *METHODS, "--rates", "neuroada-2=1e-12", "lora-1=1e-12"]
    arguments += ["--seeds", "1", "--steps", "2", "--model", str(model), "--config", f"sst2={file}"]
    instruct.main([*arguments, "--out", str(tmp_path)])
    ours, theirs = (row["last_loss"] for row in json.loads((tmp_path / "instruct.json").read_text())["rows"])
    assert ours == pytest.approx(theirs, rel=1e-5)
