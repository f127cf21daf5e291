"""The rows, prompt and metric of PEFT's MetaMathQA comparison."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import message_of

from neuroada_jax.data.prompts import render_examples
from neuroada_jax.tasks import TASKS
from neuroada_jax.tasks.metamath import METAMATH, same, stated_answer

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "text, answer",
    [
        ("So it is 16.\nThe answer is: 16", "16"),
        ("The answer is 7.", "7"),
        ("x\n#### 1,080", "1,080"),
        ("The answer is: 5. No, The answer is: 50%!", "50"),
        ("The final answer is: $3/4$\n\nQuestion: another", "3/4"),
        ("#### 12 The answer is: 13", "13"),  # the first kind that the text has
        ("I do not know", ""),
    ],
)
def test_stated_answers(text, answer):
    assert stated_answer(text) == answer


@pytest.mark.parametrize(
    "found, answer, equal",
    [
        ("20/35", "0.5714285714285714", True),
        ("18.0", "18", True),
        ("1,080", "1080", False),  # as there: no number, and another text
        ("x", "x", True),
        ("", "18", False),
        ("1/0", "1/0", True),  # no numbers, the same text
        ("nan", "nan", True),
        ("1/2/3", "0.5", False),
        ("9" * 500, "9" * 500, True),
    ],
)
def test_answers_are_compared_as_numbers(found, answer, equal):
    assert same(found, answer) is equal


def test_training_rows_are_learnt_whole_and_test_rows_are_asked():
    trained = METAMATH.convert({"query": "1 + 1?", "response": "2\nThe answer is: 2", "type": "x"}, "here")
    (rendered,) = render_examples(trained, METAMATH.style, None)
    assert rendered.text == "Question: 1 + 1? Think step by step.\nAnswer:2\nThe answer is: 2"
    assert rendered.spans == [(0, len(rendered.text))]
    asked = TASKS["metamath"].convert({"question": "1 + 1?", "answer": "It is 2.\n#### 2"}, "here")
    assert asked["prompt"] == "Question: 1 + 1? Think step by step.\nAnswer:" and asked["answer"] == "2"
    assert "needs the text fields query and response" in message_of(METAMATH.convert, {"question": "q"}, "here")
    assert "states no number" in message_of(METAMATH.convert, {"question": "q", "answer": "2"}, "here")


def test_the_script_writes_both_files(tmp_path):
    rows = [{"query": "q" * n, "response": "r" * 300} for n in (900, 999, 1000)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "g.jsonl").write_text(json.dumps({"question": "q", "answer": "#### 1"}) + "\n")
    command = [sys.executable, str(ROOT / "train" / "metamath_rows.py"), "--metamath", str(tmp_path / "m.jsonl")]
    command += ["--gsm8k", str(tmp_path / "g.jsonl"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=None, check=False)
    assert done.returncode == 0, done.stderr
    kept = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["query"]) for line in kept] == [900, 999]
    assert (tmp_path / "out" / "test.jsonl").read_text().count("\n") == 1
