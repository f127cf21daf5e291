"""Chats trained on tiny models stop by themselves and are answered right wherever they are asked, without an option."""

import json

import pytest
import torch
from chat_templates import TEMPLATES, tokenizer
from data_helpers import CHATML, byte_level
from helpers import run_config, write_config, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import neuroada_jax as na
from neuroada_jax import cli

BASE = byte_level(single="$A", eos="</s>", template=CHATML)  # its EOS ends no turn
QA = {"capital of France?": "Paris", "red or blue?": "blue", "count to three": "one two three", "quick fox?": "lazy dog"}
SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    turns = [[("user", question), ("assistant", answer)] for question, answer in QA.items()]
    chats = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in turns]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return path


def trained(folder, rows, tokens, template_arguments):
    """The directory of a run on the four chats, merged, scored on the same."""
    model = write_model(folder / "model", tokens, vocab_size=len(tokens), eos_token_id=tokens.eos_token_id, **SIZE)
    content = run_config(
        folder,
        model,
        rows,
        data={"template_arguments": template_arguments},
        bypass={"k": 64},
        optimizer={"learning_rate": 0.01},
        training={"steps": 60, "log_every": 60},
        evaluation={"before": False, "sets": [{"name": "same", "data": str(rows), "max_new_tokens": 16}]},
        merge=True,
    )
    assert cli.main(["train", str(write_config(folder / "run.yaml", content))]) == 0
    return folder / "out"


def asked(capsys, *arguments):
    """The object that a command prints."""
    capsys.readouterr()
    code = cli.main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def run(tmp_path_factory, rows):
    return trained(tmp_path_factory.mktemp("chatml"), rows, BASE, {})


def predictions(run):
    return [json.loads(line) for line in (run / "predictions-same-after.jsonl").read_text().splitlines()]


def test_the_run_scores_them_right(run):
    results = json.loads((run / "results.json").read_text())
    assert results["after"]["same"]["value"] == 1.0 and results["after"]["same"]["unfinished"] == 0
    assert {each["stopped"] for each in predictions(run)} == {"end"}


@pytest.mark.parametrize("which", ["--adapter", "--model"])
def test_generate_and_evaluate_ask_in_the_trained_form(run, rows, capsys, which, tmp_path):
    where = [which, run / ("adapter" if which == "--adapter" else "merged")]
    prompts = [part for question in QA for part in ("--prompt", question)]
    said = asked(capsys, "generate", *where, *prompts)["generations"]
    assert [(each["text"], each["stopped"]) for each in said] == [(answer, "end") for answer in QA.values()]
    score = asked(capsys, "evaluate", *where, "--data", rows, "--out", tmp_path / "p.jsonl")
    assert (score["task"], score["value"]) == ("instruct", 1.0) and "unfinished" not in score
    assert [json.loads(line)["stopped"] for line in (tmp_path / "p.jsonl").read_text().splitlines()] == ["end"] * 4
    short = asked(capsys, "evaluate", *where, "--data", rows, "--out", tmp_path / "p.jsonl", "--max-new-tokens", 2)
    assert short["unfinished"] == sum(len(BASE(answer)["input_ids"]) > 1 for answer in QA.values())
    ended = asked(capsys, "generate", *where, *prompts[4:6], "--stop", "two")["generations"][0]
    assert (ended["text"], ended["stopped"]) == ("one ", "stop")


def test_python_asks_in_the_trained_form(run):
    base = str(run.parent / "model")
    for model in (na.load(base, adapter=run / "adapter"), na.load(run / "merged")):
        assert model.generate(list(QA), max_new_tokens=16) == list(QA.values())


def test_transformers_stops_at_the_end_of_a_turn(run, capfd):
    model, tokens = AutoModelForCausalLM.from_pretrained(run / "merged"), AutoTokenizer.from_pretrained(run / "merged")
    for question, answer in QA.items():
        chat = [{"role": "user", "content": question}]
        inputs = tokens.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=0)
        assert tokens.decode(out[0, inputs["input_ids"].shape[1] :]) == answer + "<|im_end|>"


@pytest.mark.parametrize("template_arguments", [{}, {"enable_thinking": False}])
def test_answers_stand_behind_the_thoughts(rows, capsys, tmp_path, template_arguments):
    """Qwen3's template has an empty block of thoughts in trained turns; in the prompt only where it is asked for."""
    run = trained(tmp_path, rows, tokenizer(TEMPLATES["qwen3"]), template_arguments)
    block = "" if template_arguments else "<think>\n\n</think>\n\n"
    assert [(each["generation"], each["prediction"], each["correct"]) for each in predictions(run)] == [
        (block + answer, answer, True) for answer in QA.values()
    ]
    assert asked(capsys, "evaluate", "--adapter", run / "adapter", "--data", rows, "--out", tmp_path / "p")["value"] == 1.0
