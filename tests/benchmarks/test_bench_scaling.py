"""benchmarks/scaling.py on tiny shapes."""

import sys

import contract
import pytest
from helpers import CONFIG

from benchmarks import scaling

BASE = ["--base", "2", "16", "16", "--length", "8", "--repeats", "2"]
SWEEPS = ["--k", "1", "3", "--layers", "1", "2", "--width", "16", "--tokens", "16"]


def test_every_sweep_has_its_rows_and_its_curves(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scaling, "LLAMA_7B", CONFIG)
    monkeypatch.setattr(scaling, "COMPILED_TOKENS", (1, 8))
    scaling.main([*BASE, *SWEEPS, "--compiled-layers", "3", "--out", str(tmp_path)])
    _, rows = contract.read(tmp_path, "scaling")
    *measured, compiled = rows
    found = [(row["layers"], row["width"], row["tokens"], row["k"]) for row in measured]
    assert found == [*((2, 16, 16, k) for k in (None, 1, 3)), *((1, 16, 16, k) for k in (None, 1))]
    assert all(row["ratio_to_floor"] == 1 for row in rows if row["k"] is None)
    assert all(row["compile_seconds"] > 0 and row["peak_bytes"] > 0 for row in rows)
    neurons = 5 * 16 + 2 * 64  # of a layer: q k v o down, gate up
    assert [row["trained"] for row in measured] == [0, 2 * neurons, 3 * 2 * neurons, 0, neurons]
    assert (compiled["method"], compiled["layers"], compiled["tokens"]) == (scaling.COMPILED, 3, 8)
    assert contract.printed_rows(capsys.readouterr().out) == len(rows)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_no_picture_is_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    scaling._draw(tmp_path / "scaling.png", [], scaling.Shape(2, 16, 16), 1)
    assert "install matplotlib (pip install 'neuroada-jax[plots]')" in capsys.readouterr().err
    assert not (tmp_path / "scaling.png").exists()


def test_tokens_fill_whole_rows(capsys):
    with pytest.raises(SystemExit):
        scaling.main(["--tokens", "100"])
    assert "--tokens: 100 is no multiple of --length 256" in capsys.readouterr().err
