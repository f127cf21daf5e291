"""A short form of `make soak` with one kill, during a save; and its comparisons."""

import json
import random

import pytest
import soak


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_run_that_is_killed_ends_as_if_it_was_not(count, tmp_path, capfd):
    assert soak.soak(tmp_path, count, 1, ["save"], random.Random(1)) == {"kills": 1, "resumes": 1, "mismatches": 0}
    err = capfd.readouterr().err
    assert f"{count} process(es), kill 1 of 1: save" in err and "run 1 ends, equal to the undisturbed one" in err


@pytest.mark.parametrize("name", [*soak.COMPARED, "results.json"])
def test_a_difference_is_found(tmp_path, name):
    for run in ("a", "b"):
        for each in soak.COMPARED:
            (tmp_path / run / each).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / run / each).write_text("same")
        results = {"last_loss": 1.5, **dict.fromkeys(soak.TIMES, run)}
        (tmp_path / run / "results.json").write_text(json.dumps(results))
    assert soak.compare(tmp_path / "a", tmp_path / "b") == []
    (tmp_path / "b" / name).write_text(json.dumps({"last_loss": 1.25, **dict.fromkeys(soak.TIMES, "b")}))
    assert soak.compare(tmp_path / "a", tmp_path / "b") == [name]


def test_half_a_line_is_found(tmp_path):
    lines = '{"step": 1}\n{"step": 2}\n'
    for content, found in (
        (lines, None),
        (lines + '{"st', "metrics.jsonl has half a line"),
        (lines + '{"step": 2}\n', "metrics.jsonl repeats or lacks a step"),
    ):
        (tmp_path / "metrics.jsonl").write_text(content)
        assert soak.broken_lines(tmp_path) == found
