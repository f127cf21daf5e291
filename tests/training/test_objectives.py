"""The form of a run's prompts: what a config says of it, what adapters record, what is refused, which day is kept."""

import dataclasses
import datetime
import json

import numpy as np
import pytest
from chat_templates import TEMPLATES, tokenizer
from data_helpers import CHATML, byte_level, message_of
from helpers import run_config, write_bert, write_model, write_rows

from neuroada_jax.adapters import native
from neuroada_jax.data.prompts import PromptForm, PromptStyle
from neuroada_jax.errors import NeuroadaWarning
from neuroada_jax.pretrained import prompt_form
from neuroada_jax.training import config_file, objectives, run

BASE = byte_level(single="$A", eos="</s>", template=CHATML)  # its EOS ends no turn
THINKS = tokenizer(TEMPLATES["qwen3"])
DATED = "{{ strftime_now('%Y-%m-%d') }}\n" + CHATML


def chat(*turns):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}


CHATS = [chat("a?", "b"), chat("c?", "d", "e?", "f")]
PAIRS = [{"prompt": "a?", "completion": "b"}]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "base": write_model(folder / "base", BASE),
        "thinks": write_model(folder / "thinks", THINKS, vocab_size=len(THINKS)),
        "bert": write_bert(folder / "bert"),
    }


@pytest.fixture
def prepared(models, tmp_path):
    def prepare(rows, model="base", sets=(), **data):
        """The run of rows, with sets of (rows, fields), as far as it goes without weights."""
        evaluation = {
            "sets": [
                {"name": f"s{n}", "data": str(write_lines(tmp_path / f"s{n}.jsonl", each)), **fields}
                for n, (each, fields) in enumerate(sets)
            ]
        }
        train = write_lines(tmp_path / "rows.jsonl", rows)
        content = run_config(tmp_path, models[model], train, data=data, evaluation=evaluation)
        return run.prepare(config_file.from_dict(content, "test"))

    return prepare


def test_rows_that_lose_all_labels_are_said(prepared):
    long = {"prompt": "a" * 99, "completion": "b"}
    with pytest.warns(NeuroadaWarning, match=r"2 of 3 rows are dropped, since no label is within data.max_length 64"):
        assert prepared([*PAIRS, long, long]).batches.examples.dropped == 2
    assert prepared([*PAIRS, long]).batches.examples.dropped == 1
    assert "none of 2 rows has a completion token" in message_of(prepared, [long, long])


def test_what_adapters_record(prepared, tmp_path):
    form, today = prepared(CHATS).objective.form, datetime.date.today().isoformat()
    assert form == PromptForm(PromptStyle.CHAT, CHATML, {}, today, "instruct", ("<|im_end|>",))
    assert prepared(PAIRS).objective.form == PromptForm(PromptStyle.PLAIN, task="instruct", end_tokens=("</s>",))
    assert prepared(PAIRS, style="chat").objective.form == form
    sharegpt = [{"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]}]
    assert prepared(sharegpt).objective.form == form
    files = [str(write_lines(tmp_path / f"{len(rows)}.jsonl", rows)) for rows in (CHATS, PAIRS)]
    mixed = prepared([], train=files, style="alpaca").objective.form  # chats have the template in any style
    assert mixed == dataclasses.replace(form, style=PromptStyle.ALPACA, end_tokens=mixed.end_tokens)
    assert set(mixed.end_tokens) == {"<|im_end|>", "</s>"}


def test_an_encoder_has_a_task_alone(prepared):
    rows = [{"sentence1": "a", "sentence2": "b", "label": 1}]
    assert prepared(rows, "bert", task="mrpc", max_length=32).objective.form == PromptForm(task="mrpc")


@pytest.mark.parametrize("as_file", [True, False])
def test_a_template_and_its_arguments_hold_for_training_and_all_sets(prepared, tmp_path, as_file, capfd):
    text = CHATML + "{% if add_generation_prompt and short %}short: {% endif %}"
    text = text.replace(
        "{{ m['content'] }}", "{% if m.role == 'assistant' and short %}short: {% endif %}{{ m['content'] }}"
    )
    (tmp_path / "own.jinja").write_text(text)
    given = str(tmp_path / "own.jinja") if as_file else text
    sets = [(CHATS, {}), (PAIRS, {}), (PAIRS, {"style": "verbatim"})]
    made = prepared(CHATS, sets=sets, chat_template=given, template_arguments={"short": True})
    form = made.objective.form
    assert (form.chat_template, form.template_arguments) == (text, {"short": True})
    asked = [BASE.decode(made.scorers[f"s{n}"].prompts[0]) for n in range(3)]
    assert asked == [*["<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nshort: "] * 2, "a?"]
    ids, is_label = made.batches.examples.example(0)
    assert BASE.decode(ids) == asked[0] + "b<|im_end|>" and BASE.decode(ids[is_label]) == "b<|im_end|>"
    ends = {BASE.convert_tokens_to_ids(token) for token in ("</s>", "<|im_end|>")}
    assert all(set(scorer.ending.eos_ids) == ends for scorer in made.scorers.values())
    said = capfd.readouterr().err
    name = prompt_form.digest(text)[:8]
    assert f"prompts: chat, template {name} of data.chat_template, short=True; a turn ends at <|im_end|>\n" in said


def test_chats_that_become_several_examples_are_reported(prepared, capfd):
    made = prepared(CHATS, "thinks")
    assert len(made.batches.examples) == 3
    assert "\n1 chats became one example a learnt turn" in capfd.readouterr().err
    assert prepared(CHATS, "thinks", learn="last").batches.examples.split_rows == 0
    assert "became" not in capfd.readouterr().err


def test_the_last_turn_alone_is_learnt(prepared):
    labels = [int(prepared(CHATS, learn=learn).batches.examples.label_counts.sum()) for learn in ("all", "last")]
    assert labels == [6, 4]


def test_a_set_is_asked_in_the_style_of_related_training_rows(prepared):
    gsm = [{"instruction": "1 + 1?", "answer": "2"}]
    sets = [(PAIRS, {}), (PAIRS, {"style": "plain"}), (gsm, {"task": "gsm8k", "max_new_tokens": 2})]
    styles = [prepared(rows, sets=sets, **data).scorers for rows, data in ((CHATS, {}), (PAIRS, {"style": "verbatim"}))]
    assert [[str(each[f"s{n}"].form.style) for n in range(3)] for each in styles] == [
        ["chat", "plain", "alpaca"],
        ["verbatim", "plain", "alpaca"],
    ]
    assert styles[0]["s2"].form.task == "gsm8k"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"chat_template": CHATML},
            "data.chat_template: no row is a chat and no style is chat, so no chat template is used",
        ),
        ({"template_arguments": {"a": 1}}, "data.template_arguments: no row is a chat and no style is chat"),
        ({"learn": "last"}, "data.learn: 'last' is for chats, and none of the 1 rows is one; remove it"),
        ({"chat_template": "none.jinja"}, "data.chat_template: 'none.jinja' cannot be read"),
        ({"style": "chat", "template_arguments": {"a": 1}}, "the chat template does not read 'a'"),
        ({"style": "chat", "learn": "last"}, "data.learn: 'last' is for chats"),
    ],
)
def test_options_without_effect(prepared, data, message):
    assert message in message_of(prepared, PAIRS, **data)


def test_a_set_of_chats_uses_the_template(prepared):
    text = CHATML + "\n"
    for sets in ([(CHATS, {})], [(PAIRS, {"style": "chat"})]):
        made = prepared(PAIRS, sets=sets, chat_template=text)
        assert made.objective.form.chat_template is None and made.scorers["s0"].form.chat_template == text


@pytest.mark.parametrize("field", ["style", "chat_template", "template_arguments", "learn"])
def test_an_encoder_has_no_prompts(prepared, field):
    value = {"style": "chat", "chat_template": CHATML, "template_arguments": {"a": 1}, "learn": "last"}[field]
    message = message_of(prepared, [], "bert", task="mrpc", **{field: value})
    assert message == f"data.{field}: bert is an encoder, which has no prompts; remove it"


class Later(datetime.date):
    """A day after the run began."""

    @classmethod
    def today(cls):
        return cls(2031, 2, 3)


def test_a_resumed_run_keeps_its_day(models, tmp_path, monkeypatch):
    content = run_config(
        tmp_path,
        models["base"],
        write_lines(tmp_path / "rows.jsonl", CHATS),
        data={"chat_template": DATED},
        bypass={"targets": ["q_proj"]},
        training={"steps": 2, "save_every": 1},
    )
    config, adapter, today = (
        config_file.from_dict(content, "test"),
        tmp_path / "out" / "adapter",
        str(datetime.date.today()),
    )
    run.train(config)
    first = native.read(str(adapter))
    assert first.metadata["prompt"]["date"] == today
    monkeypatch.setattr(objectives.datetime, "date", Later)
    assert run.prepare(config, overwrite=True).objective.form.date == "2031-02-03"
    run.train(config, resume=True)
    again = native.read(str(adapter))
    assert again.metadata["prompt"] == first.metadata["prompt"]
    assert all(np.array_equal(values, again.values[name]) for name, values in first.values.items())
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["prompt"].items() <= first.metadata["prompt"].items() and results["crossings"] == 0


def test_every_adapter_and_the_merged_model_have_the_form(models, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    sets = [{"name": "s", "data": str(rows), "limit": 4, "max_new_tokens": 1}]
    content = run_config(
        tmp_path,
        models["base"],
        rows,
        bypass={"targets": ["q_proj"]},
        evaluation={"sets": sets, "best_epoch": "s", "before": False},
        training={"steps": None, "epochs": 1, "save_every": 2},
        merge=True,
    )
    run.train(config_file.from_dict(content, "test"))
    found = [native.form_of(native.read(str(path.parent))) for path in (tmp_path / "out").rglob("adapter.json")]
    want = PromptForm(PromptStyle.PLAIN, task="instruct", end_tokens=("</s>",))
    assert found == [want]  # the best epoch's own is gone with the end of the run
    assert prompt_form.read(str(tmp_path / "out" / "merged")) == want
