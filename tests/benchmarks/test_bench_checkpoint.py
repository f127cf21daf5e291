"""benchmarks/checkpoint.py on a tiny model."""

import contract
from helpers import write_model

from benchmarks import checkpoint


def test_a_save_has_rows(tmp_path, capsys):
    model = str(write_model(tmp_path / "model"))
    options = ["--k", "2", "--length", "16", "--repeats", "2", "--steps", "1"]
    checkpoint.main(["--model", model, "--out", str(tmp_path), *options])
    settings, rows = contract.read(tmp_path, "checkpoint")
    *_, written, whole = rows
    assert [(row["method"], row["k"]) for row in rows] == [
        (method, 2) for method in ("step", "save: training waits", "save: until written", "save: in all, beside steps")
    ]
    assert written["bytes"] > 1000 and isinstance(whole["share"], float) and settings["every"] == 100
    assert contract.printed_rows(capsys.readouterr().out) == len(rows)
