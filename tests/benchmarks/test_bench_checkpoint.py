"""benchmarks/checkpoint.py on a tiny model."""

import contract
from helpers import write_model

from benchmarks import checkpoint


def test_a_save_has_rows(tmp_path, capsys):
    model = str(write_model(tmp_path / "model"))
    options = ["--k", "2", "--length", "16", "--repeats", "2", "--steps", "1"]
    checkpoint.main(["--model", model, "--out", str(tmp_path), *options])
    settings, rows = contract.read(tmp_path, "checkpoint")
    step, waits, written, whole = rows
    assert waits["seconds"] <= written["seconds"] and written["bytes"] > 1000
    assert abs(whole["share"]) < 100 and settings["every"] == 100 and step["k"] == 2
    assert contract.printed_rows(capsys.readouterr().out) == len(rows) == 4
