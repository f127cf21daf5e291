"""benchmarks/generation.py on a tiny model."""

import contract
import pytest
from helpers import write_model

from benchmarks import generation


def test_every_phase_has_a_row_for_each_library(tmp_path, capsys):
    model = str(write_model(tmp_path / "model"))
    options = ["--batch-sizes", "1", "3", "--prompt", "5", "--new", "90", "--repeats", "3"]
    generation.main(["--model", model, *options, "--out", str(tmp_path)])
    _, rows = contract.read(tmp_path, "generation")
    assert [(row["batch"], row["phase"], row["method"]) for row in rows] == [
        (batch, phase, method)
        for batch in (1, 3)
        for phase in ("prefill", "decode")
        for method in ("neuroada-jax", "transformers")
    ]
    for row in rows:
        tokens = row["batch"] * (5 if row["phase"] == "prefill" else 90)
        assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])
        assert (row["speedup"] == 1) == (row["method"] == "transformers")
    assert contract.printed_rows(capsys.readouterr().out) == len(rows)
