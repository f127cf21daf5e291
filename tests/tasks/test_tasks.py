"""Tasks: rows in both forms, the published rules for answers, sources, overlap, and rows that do not fit."""

import pytest
from data_helpers import message_of

from neuroada_jax.data.prompts import render_examples, render_prompt
from neuroada_jax.tasks import GLUE, OWN, SUITES, TASKS, Source, listing, overlap
from neuroada_jax.tasks.arithmetic import first_letter, last_number, stated_letter

EXAM = {"text": ["a rock", "the sun", "ice"], "label": ["A", "B", "C"]}
# task, a row as the hub has it, the instruction that LLM-Adapters makes of it, the answer
ORIGINAL = [
    (
        "boolq",
        {"question": "is ice water", "answer": True, "passage": "Ice is."},
        "Please answer the following question with true or false, question: is ice water?\n\nAnswer format: true/false",
        "true",
    ),
    (
        "piqa",
        {"goal": "melt ice", "sol1": "cool it", "sol2": "warm it", "label": 1},
        "Please choose the correct solution to the question: melt ice\n\nSolution1: cool it\n\nSolution2: warm it\n\n"
        "Answer format: solution1/solution2",
        "solution2",
    ),
    (
        "siqa",
        {"context": "Ann ran.", "question": "Why?", "answerA": "fun", "answerB": "fear", "answerC": "rain", "label": "3"},
        "Please choose the correct answer to the question: Ann ran. Why?\n\nAnswer1: fun Answer2: fear Answer3: rain\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
    ),
    (
        "hellaswag",
        {"activity_label": "Skating", "ctx": "A man", "endings": ["falls.", "flies.", "eats.", "sits."], "label": "0"},
        "Please choose the correct ending to complete the given sentence: Skating: A man\n\n"
        "Ending1: falls. Ending2: flies. Ending3: eats. Ending4: sits.\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending1",
    ),
    (
        "winogrande",
        {"sentence": "Ice is _ than fire.", "option1": "colder", "option2": "hotter", "answer": "1"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: Ice is _ than fire.\n\n"
        "Option1: colder Option2: hotter Answer format: option1/option2",
        "option1",
    ),
    *(
        (
            task,
            {column: "What is hot?", "choices": EXAM, "answerKey": "B"},
            "Please choose the correct answer to the question: What is hot?\n\n"
            "Answer1: a rock Answer2: the sun Answer3: ice\n\nAnswer format: answer1/answer2/answer3",
            "answer2",
        )
        for task, column in (("arc_easy", "question"), ("arc_challenge", "question"), ("openbookqa", "question_stem"))
    ),
    ("gsm8k", {"question": "2 + 1000?", "answer": "It is 1,002.\n#### 1,002"}, "2 + 1000?", "1002"),
    (
        "aqua",
        {"question": "1 + 1?", "options": ["A)2", "B)1 or 3"], "rationale": "Count.", "correct": "A"},
        "1 + 1? Answer Choices: (A) 2 (B) 1 or 3",
        "A",
    ),
]


@pytest.mark.parametrize(
    ("task", "row", "instruction", "answer"),
    ORIGINAL,
    ids=lambda value: value if isinstance(value, str) and value in TASKS else "",
)
def test_rows_of_the_hub_become_those_of_the_published_files(task, row, instruction, answer):
    converted = TASKS[task].convert(row, "here")
    assert (converted["instruction"], converted["answer"]) == (instruction, answer)
    published = {"instruction": instruction, "input": "", "output": "a guess", "answer": answer}
    assert TASKS[task].convert(published, "here")["instruction"] == instruction


def test_prompts_and_targets():
    row = TASKS["boolq"].convert({"instruction": "Is it?", "output": "no", "answer": "false"}, "here")
    assert render_prompt(row, TASKS["boolq"].style, None) == "Is it?\n"
    assert row["output"] == "the correct answer is false"
    row = TASKS["aqua"].convert({"instruction": "1 + 1?", "input": "", "output": "It is (A).", "answer": "A"}, "here")
    assert render_prompt(row, TASKS["aqua"].style, None) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n1 + 1?\n\n### Response:\n"
    )
    assert row["output"] == "It is (A)."
    assert {TASKS[name].max_new_tokens for name in SUITES["commonsense"]} == {32}
    assert {TASKS[name].max_new_tokens for name in SUITES["arithmetic"]} == {512}


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("5 apples and 3,000 pears make 3,005.", "3005.0", True),
        ("the answer is -4", "-4", True),
        ("the answer is 4", "-4.0", False),
        ("1.83", "1.8333333333333335", False),
        ("1.833", "1.8333333333333335", True),
        ("the answer is 7. (Step 2)", "7", False),
        ("9" * 400, "9", False),
        ("none", "0", False),
        ("", "0", False),
    ],
)
def test_the_last_number_counts(text, answer, right):
    task = TASKS["gsm8k"]
    found = task.extract(text, answer)
    assert found == last_number(text) and task.matches(found, answer) is right


@pytest.mark.parametrize(
    ("text", "published", "strict"),
    [
        ("The answer is B.", "B", "B"),
        ("A train goes 5 km. The answer is (C).", "A", "C"),
        ("Because B) is 4, it is D)2.", "B", "D"),
        ("Each option is checked. The correct option is: E", "E", "E"),
        ("The answer is A. No, the answer is B", "A", "B"),
        ("Denote it by x. So x = 5.", "D", ""),
        ("the answer is Ecuador", "E", ""),
        ("12", "", ""),
    ],
)
def test_the_published_rule_for_letters_is_weak(text, published, strict):
    task = TASKS["aqua"]
    assert task.extract(text, "A") == published == first_letter(text)
    assert task.strict(text, "A") == strict == stated_letter(text)


def test_the_training_rows_of_a_suite_take_either_answer():
    task = TASKS["arithmetic"]
    assert task.extract("A is 3", "A") == "A" and task.extract("A is 3", "4") == "3"
    for answer, found in (
        ("C", "C"),
        ("2.5", "2.5"),
        (" -1 ", "-1"),
        (-1, "-1"),
        (2.5, "2.5"),
        ("1,234,567.5", "1234567.5"),
    ):
        row = {"instruction": "i", "output": "o", "answer": answer}
        assert task.convert(row, "here") == {**row, "answer": found}
    scored = {"instruction": "i", "answer": "1"}  # without a rationale, which only training needs
    assert task.convert(scored, "here") == task.convert({**scored, "output": None}, "here") == scored
    assert message_of(render_examples, task.convert(scored, "here"), task.style, None, "here").startswith(
        "here: no field 'output', found fields instruction, answer; expected "
    )


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (
            "boolq",
            {"sentence": "s"},
            "here: task 'boolq' needs the text fields instruction and answer (or question, answer, as on the hub), "
            "found sentence",
        ),
        ("boolq", {"instruction": "i", "answer": "yes"}, "here: answer 'yes', expected one of task 'boolq': true, false"),
        ("boolq", {"question": "q", "answer": "yes"}, "here: not a row of 'boolq' as the hub has it (KeyError: 'yes')"),
        (
            "piqa",
            {"goal": "g", "sol1": "a", "sol2": "b", "label": -1},
            "here: not a row of 'piqa' as the hub has it (ValueError: label -1 of 2 options)",
        ),
        (
            "svamp",
            {"instruction": "i", "output": 3, "answer": "3"},
            "here: task 'svamp' needs a text field instruction and a field answer, and to train on them a text field "
            "output, found instruction, output, answer",
        ),
        (
            "aqua",
            {"instruction": "i", "output": "o", "answer": None},
            "here: task 'aqua' needs a text field instruction and a field answer (or question, options, rationale, "
            "correct, as on the hub), and to train on them a text field output, found instruction, output, answer",
        ),
        ("svamp", {"instruction": "i", "answer": True}, "here: answer True, expected a text or a number (task 'svamp')"),
        ("svamp", {"instruction": "i", "answer": "1,50"}, "here: answer '1,50', expected a number (task 'svamp')"),
        (
            "svamp",
            {"instruction": "i", "answer": float("inf")},
            "here: answer 'inf', expected a number (task 'svamp')",
        ),
        (
            "svamp",
            {"instruction": "i", "output": "o", "answer": "C"},
            "here: answer 'C', expected a number (task 'svamp')",
        ),
        ("gsm8k", {"question": "q", "answer": "5"}, None),
        (
            "aqua",
            {"instruction": "i", "output": "o", "answer": "5"},
            "here: answer '5', expected a letter A to E (task 'aqua')",
        ),
        (
            "arithmetic",
            {"instruction": "i", "output": "o", "answer": "inf"},
            "here: answer 'inf', expected a number, or a letter A to E (task 'arithmetic')",
        ),
        (
            "arc_easy",
            {"question": "q", "choices": {"text": ["a"], "label": 1}, "answerKey": "A"},
            "here: not a row of 'arc_easy' as the hub has it (AttributeError: 'int' object has no attribute 'index')",
        ),
        (
            "piqa",
            {"goal": "g", "sol1": "a", "sol2": "b", "label": float("inf")},
            "here: not a row of 'piqa' as the hub has it (OverflowError: cannot convert float infinity to integer)",
        ),
        *(
            (
                "sst2",
                {"sentence": "s", "label": label},
                "here: task 'sst2' needs a text field sentence and a label 0 or 1, found fields sentence, label and "
                f"label {label}",
            )
            for label in (1.0, True, 2)
        ),
        (
            "alpaca",
            {"prompt": "p"},
            "here: task 'alpaca' needs the text fields instruction and output (and perhaps input), found prompt",
        ),
    ],
)
def test_rows_that_do_not_fit(task, row, message):
    if message is None:  # no "####": the whole is the answer
        assert TASKS[task].convert(row, "here")["answer"] == "5"
    else:
        assert message_of(TASKS[task].convert, row, "here") == message


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": "p", "completion": "c", "answer": None}, "c"),
        ({"instruction": "i", "output": "o", "answer": None, "completion": None}, "o"),
        ({"instruction": "i", "output": "o", "answer": "a"}, "a"),
        ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "c"}]}, "c"),
        ({"messages": [{"role": "user", "content": "u"}]}, None),
        ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "<think>2</think>\n\nc"}]}, "c"),
        ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "c"}]}, "c"),
        ({"prompt": [{"role": "user", "content": "u"}], "completion": [{"role": "assistant", "content": "c"}]}, "c"),
    ],
)
def test_the_answer_of_a_row_of_any_kind(row, answer):
    assert TASKS["instruct"].convert(row, "here") == {**row, "answer": answer}


def test_a_task_finds_its_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    boolq = TASKS["boolq"]
    assert boolq.source() == Source("google/boolq", "validation")
    for file in ("data/eval/commonsense/boolq.jsonl.gz", "data/LLM-Adapters/dataset/boolq/test.json"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
        assert boolq.source() == Source(file)
    assert message_of(TASKS["addsub"].source) == (
        "task 'addsub': no rows found (data/LLM-Adapters/dataset/AddSub/test.json, data/eval/arithmetic/AddSub.jsonl.gz); "
        "name them in `data`"
    )
    assert "it has no data of its own" in message_of(TASKS["instruct"].source)


def test_the_same_words_are_the_same_question():
    known = overlap.questions([{"instruction": "Ann has 3 pens , and\n 2 more?\n"}, {"prompt": "?!"}])
    assert len(known) == 1  # what asks nothing equals nothing
    for row in (
        {"instruction": "ann has 3 PENS, and 2 more", "input": ""},
        {"prompt": "Ann has 3 pens and 2 more.", "completion": "5"},
        {"messages": [{"role": "user", "content": "Ann has 3 pens and 2 more."}, {"role": "assistant", "content": "5"}]},
    ):
        assert overlap.question(row) in known
    for row in ({"instruction": "Ann has 3 pens and 4 more"}, {"prompt": "..."}, {"messages": None, "prompt": "Ann"}):
        assert overlap.question(row) not in known


def test_sets_that_are_known_to_overlap():
    assert overlap.known("multiarith").startswith(
        "multiarith: 569 of the 600 published questions (95 %) are also in math_10k"
    )
    assert set(overlap.IN_MATH_10K) <= set(SUITES["arithmetic"]) and overlap.known("gsm8k") is None


def test_the_listing_has_every_task():
    found = {each["task"]: each for each in listing() if each["model"] == "decoder"}
    assert list(found) == list(TASKS)
    encoders = {each["task"]: each for each in listing() if each["model"] == "encoder"}
    assert list(encoders) == [*OWN, *GLUE] and encoders["stsb"]["metric"] == "pearson"
    assert encoders["mnli"]["prompt"] == "premise + hypothesis" and encoders["mnli"]["data"][-1] == "nyu-mll/glue:mnli"
    assert found["boolq"]["answers"] == ["true", "false"] and found["boolq"]["data"][-1] == "google/boolq"
    assert [len(names) for names in SUITES.values()] == [8, 7]
    assert all(found[name]["suite"] == suite for suite, names in SUITES.items() for name in names)
