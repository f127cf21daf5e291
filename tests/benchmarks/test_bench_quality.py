"""benchmarks/quality.py on a tiny LLaMA: a row for each rate, the chosen ones in the table, nothing run twice."""

import json
from pathlib import Path

import contract
import pytest
from data_helpers import write_lines
from helpers import write_model

from benchmarks import quality
from neuroada_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::neuroada_jax.errors.NeuroadaWarning")


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "CHOOSING", 6)
    words = ["good", "bad", "fine", "poor"]
    rows = [{"sentence": f"{words[i % 4]} {words[i % 3]}", "label": i % 2} for i in range(24)]
    (tmp_path / "glue" / "sst2").mkdir(parents=True)
    write_lines(tmp_path / "glue" / "sst2" / "train.jsonl", rows)
    write_lines(tmp_path / "glue" / "sst2" / "validation.jsonl", rows[:6])
    given = ["--task", "sst2", "--steps", "2", "--seeds", "1", "2", "--model", str(write_model(tmp_path / "model"))]
    return [*given, "--data", str(tmp_path / "glue"), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]


@pytest.mark.slow  # a benchmark in full
def test_each_method_at_its_chosen_rate(arguments, tmp_path, capsys):
    methods = [
        "--methods",
        "neuroada-1",
        "neuroada-2-reverse",
        "--rates",
        "neuroada-1=1e-3,1e-2",
        "neuroada-2-reverse=1e-2",
    ]
    quality.main([*arguments, *methods])
    _, rows = contract.read(tmp_path / "out", "quality", timed=False)
    assert [row["method"] for row in rows if row["chosen"]] == ["neuroada-1", "neuroada-2-reverse"]
    assert all(len(row["values"]) == 2 and row["n"] == 6 and row["trained"] for row in rows)
    assert (tmp_path / "out" / "quality.png").stat().st_size > 10_000
    before = (tmp_path / "work" / "sst2-neuroada-1-float32-2" / "sweep.json").stat().st_mtime
    quality.main([*arguments, *methods])
    assert "have finished before" in capsys.readouterr().err
    assert before < (tmp_path / "work" / "sst2-neuroada-1-float32-2" / "sweep.json").stat().st_mtime


def test_differences_are_seed_by_seed():
    row = {"task": "t", "dtype": "float32", "quantization": "none", "model": "m", "steps": 1, "seeds": [1, 2, 3]}
    row["chosen"] = True
    theirs = {**row, "method": "lora-1", "values": [80.0, 81.0, 82.0]}
    ours = {**row, "method": "neuroada-1", "values": [81.0, 82.0, 83.0]}
    assert quality._difference(ours, [ours, theirs]) == [1.0, 1.0, 1.0]
    assert quality._difference(theirs, [ours, theirs]) is None
    assert quality._difference({**ours, "steps": 2}, [ours, theirs]) is None
    more = {**ours, "seeds": [3, 1, 5], "values": [85.0, 81.0, 0.0]}
    assert quality._difference(more, [more, theirs])[0] == 2.0  # of the seeds that both have


def _stored(rate, seeds, values, chosen=False, method="lora-1"):
    same = {"task": "t", "dtype": "float32", "quantization": "none", "model": "m", "steps": 1}
    figures = {"mean": None, "deviation": None, "interval": None, "validation": rate, "seconds": 1.0}
    return {**same, "method": method, "rate": rate, "seeds": seeds, "values": values, "chosen": chosen, **figures}


def test_other_seeds_are_added_and_choose_anew():
    other = _stored(0.1, [1, 2], [1.0, 2.0], chosen=True, method="lora-10")
    before = [other, *(_stored(rate, [1, 2], [70.0, 80.0], chosen=rate == 0.1) for rate in (0.1, 0.2, 0.3))]
    more = [{**_stored(0.1, [0, 4, 5], [9.0, 72.0, 82.0]), "validation": 0.3}]
    for _ in range(2):  # a second time changes nothing
        before = quality._joined(before, more)
        found = {row["rate"]: row for row in before if row["method"] == "lora-1"}
        assert other in before
        assert (found[0.1]["seeds"], found[0.1]["values"]) == ([0, 1, 2, 4, 5], [9.0, 70.0, 80.0, 72.0, 82.0])
        assert (found[0.1]["mean"], found[0.1]["validation"]) == (62.6, pytest.approx((2 * 0.1 + 3 * 0.3) / 5))
        assert [rate for rate, row in found.items() if row["chosen"]] == [0.2]
        assert not any(row["at_edge"] for row in found.values())
        assert found[0.2]["seeds"] == [1, 2]
    assert quality._joined(before, [_stored(0.05, [7], [1.0])])[1]["chosen"]  # a further rate takes part
    with pytest.raises(UserError, match=r"--seeds: \[2\] are stored for lora-1 at 0.2"):
        quality._joined(before, [_stored(0.2, [2, 3], [1.0, 1.0])])
    again = {**_stored(0.2, [1, 2], [3.0, 4.0], chosen=True), "at_edge": False}
    assert again in quality._joined(before, [again])  # the same seeds take the place of the old ones


@pytest.mark.parametrize("method", ["lora", "lora-1-reverse", "neuroada-x", "neuroada-1-nearest"])
def test_unknown_methods_are_one_line(method):
    with pytest.raises(UserError, match="--methods: found"):
        quality._named(method)


@pytest.mark.parametrize("given", ["lora-1", "lora-1=", "lora-1=1e-3,fast"])
def test_grids_of_other_forms_are_one_line(given):
    with pytest.raises(UserError, match="--rates: found"):
        quality._grid(given)


def test_a_method_is_a_section_of_the_config():
    assert quality._grid("lora-1=1e-3,3e-3") == ("lora-1", (1e-3, 3e-3))
    assert quality._changes("lora-4") == {"method": "lora", "lora": {"r": 4, "alpha": 8}}
    assert quality._changes("neuroada-2-random") == {"bypass": {"k": 2, "score": "random"}}
    over_a_map = {"bypass": {"k": 1, "score": "random", "random_over": "map"}}
    assert quality._changes("neuroada-1-random_map") == over_a_map
    assert quality._changes("neuroada-2-shared") == {"bypass": {"k": 2, "shared_columns": True}}


def test_training_rows_that_choose_are_kept_apart(arguments, tmp_path):
    made = quality._content(
        quality._settings(arguments),
        quality.KINDS["decoder"],
    )
    parts = [Path(made["data"][name]).read_text().splitlines() for name in ("train", "validation")]
    assert [len(part) for part in parts] == [18, 6]
    together = sorted(parts[0] + parts[1])
    original = (tmp_path / "glue" / "sst2" / "train.jsonl").read_text().splitlines()
    assert together == sorted(json.dumps(json.loads(line)) for line in original)
