"""The quickstart's data: problems of reasoning-gym, none of which is both learnt and tested."""

import importlib.util
import json
import shlex
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "train" / "quickstart.py"


@pytest.fixture(scope="module")
def quickstart():
    if importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("reasoning-gym is not installed (make test installs it)")
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_train_and_test_share_no_prompt(quickstart, tmp_path):
    quickstart.write_data(tmp_path)
    train, test = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in ("train", "test")
    )
    assert len(train) == quickstart.TRAIN_ROWS and len(test) >= 200
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert len({row["prompt"] for row in test}) == len(test)
    assert all(row["completion"] == row["answer"] and row["answer"] in row["prompt"] for row in test)


def test_problems_follow_from_the_seed(quickstart):
    assert list(quickstart.problems(5, 1)) == list(quickstart.problems(5, 1)) != list(quickstart.problems(5, 2))


def test_the_question_to_ask_survives_the_shell(quickstart, tmp_path):
    prompt = 'It\'s $5.\nWho "pays"? `Name` only.'
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
    sets = f"evaluation.sets.0.data={tmp_path / 'test.jsonl'}"
    settings = quickstart.config_file.load(
        str(SCRIPT.parents[1] / "configs" / "quickstart.yaml"), ["data.train=unused", sets]
    )
    command = quickstart.next_steps(settings).partition("Ask it")[2].partition("In PyTorch")[0]
    assert shlex.split(command)[-1] == prompt
