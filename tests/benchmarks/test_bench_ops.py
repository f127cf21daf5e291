"""benchmarks/ops.py on one small shape."""

import contract
import pytest

from benchmarks import ops


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ops")
    ops.main(["--shapes", "tiny", "--k", "2", "--dtype", "bfloat16", "--repeats", "2", "--out", str(folder)])
    return contract.read(folder, "ops")[1]


def test_every_method_has_a_row(result):
    expected = {"frozen floor", "bypass", "autodiff scatter", "LoRA", "dense gradient"}
    no_gpu = [algorithm.value for algorithm in ops.GradientAlgorithm if algorithm != "cuda"]
    expected |= {f"bypass, {algorithm}" for algorithm in no_gpu}
    assert {row["method"] for row in result} == expected
    assert len(result) == len(expected)
    assert all(row["shape"] == [16, 24, 8] and row["dtype"] == "bfloat16" for row in result)


def test_ratios_are_to_the_floor_and_budgets_are_equal(result):
    rows = {row["method"]: row for row in result}
    assert rows["frozen floor"]["ratio_to_floor"] == 1
    assert rows["bypass"]["trained"] == 2 * 24
    assert rows["LoRA"]["trained"] == 2 * (24 + 8)  # the nearest rank
    assert rows["dense gradient"]["trained"] == 24 * 8
