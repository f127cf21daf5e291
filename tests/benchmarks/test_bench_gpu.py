"""benchmarks/gpu.py with a tiny model on this CPU, and benchmarks/gpu.sh, which starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import contract
import jax
import pytest

from benchmarks import gpu
from neuroada_jax.core import value_gradient

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    monkeypatch.setattr(value_gradient, "GPU_KERNELS", value_gradient.GPU_KERNELS)  # which the script sets


def run(folder, *options):
    with jax.numpy_dtype_promotion("standard"):
        gpu.main(["--repeats", "1", "--out", str(folder), *options])
    return json.loads((folder / "gpu.json").read_text())["rows"]


@pytest.mark.parametrize(
    "parts",
    [["gradient"], pytest.param(["step", "decoding", "memory", "dense"], marks=pytest.mark.slow)],
    ids=["first", "others"],
)
def test_every_part_has_its_rows(parts, tmp_path, capsys):
    rows = run(tmp_path, "--tiny", "--parts", *parts)
    assert contract.printed_rows(capsys.readouterr().out) == len(rows)
    found = {row["check"]: row["found"] for row in rows}
    expected = {
        "gradient": [
            "gradient, 24 x 40 x 16 x 20, bfloat16, pallas: error",
            "gradient, 24 x 40 x 16 x 20, bfloat16, cuda: error",
        ],
        "memory": ["memory: 16 x 512, k = 1, full remat, s a step"],
        "step": ["step: frozen floor, s", "step: k = 1 / floor", "step: k = 20, pallas / LoRA"],
        "decoding": ["decoding: batch 1, tokens/s", "decoding: batch 8, of the bandwidth limit"],
        "dense": ["step: k = 20, dense_chunks, s"],
    }
    assert all(check in found for part in parts for check in expected[part])
    errors = [value for check, value in found.items() if check.endswith("error") and value is not None]
    assert all(0 <= error < 1e-5 for error in errors)
    assert all(row["ok"] is None for row in rows)  # the targets are those of an H100


def process(folder, monkeypatch, script):
    """The program that runs a part instead of Python."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


@pytest.mark.parametrize(
    ("script", "note"),
    [("echo 'out of memory' >&2; exit 1", "out of memory"), ("sleep 60", "no time left")],
    ids=["fails", "takes too long"],
)
def test_a_part_that_ends_early_keeps_its_rows(script, note, tmp_path, monkeypatch):
    row = {"check": "a", "found": 1.0, "target": None, "ok": None, "note": ""}
    process(tmp_path, monkeypatch, f"echo '{json.dumps(row)}'\n{script.replace('sleep', 'exec sleep')}")
    rows = run(tmp_path, "--parts", "memory", "--seconds", "1")
    assert rows == [row, {**row, "check": "memory: the rest", "found": None, "note": note}]


def test_the_shell_script_starts_it_from_anywhere(tmp_path):
    environment = {**os.environ, "PYTHON": "echo"}
    command = ["sh", ROOT / "benchmarks" / "gpu.sh", "--parts", "memory"]
    said = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert said == "-m benchmarks.gpu --parts memory\n"
