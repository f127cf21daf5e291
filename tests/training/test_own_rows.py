"""Rows of one's own in a config: columns of a csv, several files, texts, a system prompt; and what is refused of them."""

import json

import pytest
from data_helpers import CHATML, byte_level, message_of
from helpers import run_config, write_bert, write_model

from neuroada_jax.adapters import native
from neuroada_jax.data.prompts import PromptStyle
from neuroada_jax.data.rows import load_rows, rows_from_list
from neuroada_jax.training import config_file, run

BASE = byte_level(single="<s> $A", eos="</s>", template=CHATML)
CHAT = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}
OWN_SYSTEM = {"messages": [{"role": "system", "content": "own"}, *CHAT["messages"]]}
PAIR = {"prompt": "a?", "completion": "b"}
INSTRUCTION = {"instruction": "a?", "output": "b"}
TEXT = {"text": "all of it"}


def write(path, rows):
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"base": write_model(folder / "base", BASE), "bert": write_bert(folder / "bert")}


@pytest.fixture
def config(models, tmp_path):
    def make(train, sets=(), model="base", **data):
        content = run_config(
            tmp_path, models[model], "none", data={"train": train, **data}, evaluation={"sets": list(sets)}
        )
        return config_file.from_dict(content, "test")

    return make


def texts(prepared):
    """The texts of all examples, and of their labels."""
    examples = prepared.batches.examples
    pairs = [examples.example(i) for i in range(len(examples))]
    return [BASE.decode(ids) for ids, _ in pairs], [BASE.decode(ids[labels]) for ids, labels in pairs]


def test_columns_of_a_csv_in_training_and_evaluation(config, tmp_path):
    train = write(tmp_path / "train.csv", 'id,question,answer\n1,a?,b\n2,"c, d?",e\n')
    test = write(tmp_path / "test.tsv", "question\tanswer\nc?\td\n")
    other = write(tmp_path / "other.jsonl", [{"prompt": "e?", "reply": "f"}])
    columns = {"prompt": "question", "completion": "answer"}
    sets = [
        {"name": "same", "data": test},
        {"name": "own", "data": other, "columns": {"completion": "reply"}},
        {"name": "none", "data": write(tmp_path / "plain.jsonl", [PAIR]), "columns": {}},
    ]
    prepared = run.prepare(config(train, sets, columns=columns, style="verbatim"))
    assert texts(prepared) == (["<s>a?b</s>", "<s>c, d?e</s>"], ["b</s>", "e</s>"])
    scorers = prepared.scorers.values()
    assert [(BASE.decode(s.prompts[0]), s.rows.rows[0]["answer"]) for s in scorers] == [
        ("<s>c?", "d"),
        ("<s>e?", "f"),
        ("<s>a?", "b"),
    ]
    message = message_of(run.prepare, config(train, columns={"prompt": "qestion", "completion": "answer"}))
    assert message.startswith(f"{train}: columns.prompt: no column 'qestion', found id, question, answer; did you mean ")


def test_columns_of_rows_in_memory(config):
    rows = rows_from_list([{"q": "a?", "completion": "b"}] * 3, "rows in memory")
    prepared = run.prepare(config("none", columns={"prompt": "q"}, style="verbatim", limit=2), rows=rows)
    assert texts(prepared)[0] == ["<s>a?b</s>"] * 2
    message = message_of(lambda: run.prepare(config("none", columns={"prompt": "question"}), rows=rows))
    assert message.startswith("rows in memory: columns.prompt: no column 'question', found q, completion")


def test_columns_of_an_encoders_rows(config, tmp_path):
    train = write(tmp_path / "x.jsonl", [{"a": "x", "b": "y", "class": 1}, {"a": "z", "b": "y", "class": 0}])
    columns = {"sentence1": "a", "sentence2": "b", "label": "class"}
    prepared = run.prepare(config(train, model="bert", task="mrpc", max_length=32, columns=columns))
    assert prepared.batches.examples.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    "data, message",
    [
        (
            {"columns": {"promt": "q"}},
            "data.columns: task 'instruct' reads no field 'promt'; did you mean 'prompt'? It reads",
        ),
        ({"columns": {"prompt": "q", "system": "q"}}, "data.columns: column 'q' is given twice, expected one field"),
        ({"columns": {"prompt": 3}}, "data.columns.prompt: input should be a valid string, found 3"),
        ({"task": "mrpc", "columns": {"label": "a", "text": "b"}}, "data.columns: task 'mrpc' reads no field 'text'"),
        ({"train": []}, "data.train: expected a file, directory or hub name, or a list of them, found []"),
        ({"train": ["a", 3]}, "data.train: expected a file, directory or hub name, or a list of them, found ['a', 3]"),
        ({"train": {"a": "b"}}, "data.train: expected a file, directory or hub name"),
        ({"system": ""}, "data.system: "),
    ],
)
def test_what_a_config_cannot_say(config, data, message):
    assert message in message_of(lambda: config(**{"train": "x.csv", **data}))


def test_columns_of_a_set_need_data(config):
    sets = [{"task": "gsm8k", "columns": {"question": "q"}}]
    assert "evaluation.sets.0: columns: they need data" in message_of(config, "x.csv", sets)


def test_several_files(config, tmp_path):
    files = [write(tmp_path / "a.jsonl", [CHAT]), write(tmp_path / "b.csv", "prompt,completion\nc?,d\n")]
    prepared = run.prepare(config(files, style="verbatim"))
    assert texts(prepared)[1] == ["b<|im_end|>", "d</s>"]
    assert prepared.rows.where(1) == f"{files[1]}:2"
    assert len(run.prepare(config(str(tmp_path / "*"), limit=1)).rows) == 1


KINDS = {"a chat": CHAT, "a prompt": PAIR, "an instruction": INSTRUCTION, "a text": TEXT}


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_rows_of_two_kinds_in_a_file_are_refused(config, tmp_path, first, second):
    path = write(tmp_path / "x.jsonl", [KINDS[first], KINDS[first], KINDS[second]])
    if first == second:
        assert len(run.prepare(config(path)).batches.examples) == 3
        return
    message = message_of(run.prepare, config(path))
    assert message == f"{path}:3: found {second}, but {path}:1 is {first}; expected one kind in a file"


@pytest.mark.parametrize("packing", [False, True])
def test_texts_are_learnt_whole(config, tmp_path, packing, capfd):
    rows = [{"text": "one two", "id": 7}, {"text": ""}, {"text": "x" * 100}, {"text": "three"}]
    prepared = run.prepare(config(write(tmp_path / "x.jsonl", rows), max_length=24, packing=packing))
    examples = prepared.batches.examples
    assert texts(prepared)[0] == ["<s>one two</s>", "<s>" + "x" * 23, "<s>three</s>"]
    assert all(example[1][1:].all() and not example[1][0] for example in map(examples.example, range(3)))
    assert (examples.truncated, examples.dropped) == (1, 1) and examples.row_numbers.tolist() == [0, 2, 3]
    assert "1 truncated to 24 tokens, 1 dropped" in capfd.readouterr().err
    form = prepared.objective.form
    assert (form.style, form.chat_template, form.end_tokens) == (PromptStyle.VERBATIM, None, ("</s>",))


def test_texts_without_a_bos(tmp_path):
    from neuroada_jax.data.examples import encode

    for style in ("plain", "chat", "verbatim"):
        examples = encode([TEXT], style, byte_level(single="$A", eos="</s>", template=CHATML), 30)
        assert examples.is_label.tolist() == [False] + [True] * (len(examples.is_label) - 1)


@pytest.mark.parametrize("fields", [{"style": "chat"}, {"style": "plain"}, {"learn": "last"}, {"system": "s"}])
def test_options_that_texts_have_no_use_for(config, tmp_path, fields):
    path = write(tmp_path / "x.jsonl", [TEXT])
    assert message_of(run.prepare, config(path, **fields)).startswith(f"data.{next(iter(fields))}: ")


def test_texts_have_no_prompt_to_score(config, tmp_path):
    path = write(tmp_path / "x.jsonl", [TEXT])
    message = message_of(run.prepare, config(path, [{"name": "same", "data": path}]))
    assert message == f"{path}:1: no answer to compare with (fields text)"


def test_a_system_prompt_for_all_chats_in_training_evaluation_and_the_adapter(config, tmp_path, capfd):
    train = write(tmp_path / "x.jsonl", [CHAT, OWN_SYSTEM])
    sets = [{"name": "pairs", "data": write(tmp_path / "s.jsonl", [PAIR])}]
    sets += [{"name": "plain", "style": "plain", "data": sets[0]["data"]}]
    settings = config(train, sets, system="Be brief.")
    prepared = run.prepare(settings)
    head = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n"
    assert texts(prepared)[0] == [head + "b<|im_end|>", head.replace("Be brief.", "own") + "b<|im_end|>"]
    assert texts(prepared)[1] == ["b<|im_end|>"] * 2
    asked = [BASE.decode(prepared.scorers[name].prompts[0]) for name in ("pairs", "plain")]
    assert asked == [head, "<s>a?\n"]
    run.finish(run.fit(prepared))
    assert ", with a system prompt" in capfd.readouterr().err
    form = native.form_of(native.read(str(settings.directory / "adapter")))
    assert form.system == "Be brief." and form == prepared.objective.form


def test_a_system_prompt_where_there_is_no_place_for_one(config, tmp_path):
    path = write(tmp_path / "x.jsonl", [PAIR])
    message = message_of(run.prepare, config(path, system="s"))
    assert (
        message
        == f"data.system: {path}:1 is no chat, and style 'plain' has no system prompt; expected chats, or data.style: chat"
    )
    assert len(run.prepare(config(path, system="s", style="chat")).batches.examples) == 1
    mrpc = [{"sentence1": "x", "sentence2": "y", "label": 1}]
    message = message_of(
        run.prepare, config(write(tmp_path / "m.jsonl", mrpc), model="bert", task="mrpc", max_length=32, system="s")
    )
    assert message.startswith("data.system: bert is an encoder, which has no prompts")


FAULTS = [
    ({"prompt": "a", "completion": 3}, "field 'completion' is a number, expected a string"),
    ({"prompt": "a", "completion": None}, "field 'completion' is null, expected a string"),
    ({"prompt": "a"}, "no field 'completion'"),
    ({"prompt": {"a": 1}, "completion": "b"}, "field 'prompt' is an object, expected a string"),
    (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]},
        "of a weight other",
    ),
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("row, says", FAULTS)
def test_missing_and_mistyped_fields_are_named_by_their_row(config, tmp_path, kind, row, says):
    good = CHAT if "messages" in row else PAIR
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":  # a column has one type, so that a wrong one is that of all its rows
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
        place = f"{path}: row 0: "
    else:
        rows = [good, good, row]
        path.write_text(json.dumps(rows, indent=1) if kind == "json" else "".join(json.dumps(r) + "\n" for r in rows))
        place = f"{load_rows(str(path)).where(2)}: "
    message = message_of(run.prepare, config(str(path)))
    assert message.startswith(place) and says in message
