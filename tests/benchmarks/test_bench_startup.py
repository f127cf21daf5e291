"""benchmarks/startup.py on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import contract
import pytest
from helpers import NEURONS, write_model

from benchmarks import process_memory, startup


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("startup") / "model"))


def test_stages_and_selections_have_rows(model, tmp_path, capsys):
    shape = ["--k", "1", "3", "--kernel", "16", "32", "--length", "16", "--repeats", "2", "--no-memory"]
    startup.main(["--model", model, "--out", str(tmp_path), *shape])
    _, rows = contract.read(tmp_path, "startup")
    stages = [row["method"] for row in rows[:5]]
    assert stages == ["load", "select and its compilation", "compile the step", "first step", "second step"]
    assert [(row["method"], row["k"], row["dtype"]) for row in rows[5:]] == [
        (method, k, dtype)
        for dtype in ("float32", "float32", "bfloat16")
        for method, k in (("plain read", None), ("select", 1), ("select", 3))
    ]
    assert all(row["gigabytes_per_second"] > 0 for row in rows[5:])
    assert [row["ratio_to_floor"] for row in rows if row["method"] == "plain read"] == [1, 1, 1]
    assert contract.printed_rows(capsys.readouterr().out) == len(rows)


@pytest.mark.skipif(not process_memory.available(), reason="resident memory is read from Linux's /proc")
def test_the_peak_holds_the_result(model):
    # A process of its own, as in the benchmark: what this one frees meanwhile would count as much.
    command = [sys.executable, "-m", "benchmarks.startup", "--model", model, "--peak-of", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(startup.__file__).parents[1], check=True)
    peak = json.loads(done.stdout.splitlines()[-1])
    assert peak["result_bytes"] == 2 * NEURONS * 3 * 8  # float32 values and int32 columns
    # The peaks of a tiny selection are a few pages.
    assert peak["peak_bytes_with_compilation"] + 2**20 >= peak["peak_bytes"] >= 0
