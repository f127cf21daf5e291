"""The prompt form on disk: there and back, values that are refused, templates as files or text, end tokens."""

import json

import pytest
from data_helpers import BYTES, CHAT, CHATML, LLAMA, message_of

from neuroada_jax.data.prompts import PromptForm, PromptStyle
from neuroada_jax.pretrained import prompt_form

FORM = PromptForm(PromptStyle.CHAT, CHATML, {"enable_thinking": False}, "2026-01-31", "instruct", ("<|im_end|>",))
FORMS = [FORM, PromptForm(), PromptForm(PromptStyle.PLAIN, task="gsm8k", end_tokens=("</s>", "<|im_end|>"))]


@pytest.mark.parametrize("form", FORMS, ids=["chat", "default", "plain"])
def test_there_and_back(form, tmp_path):
    content = json.loads(json.dumps(prompt_form.to_json(form)))
    assert list(content) == [
        "style",
        "template_digest",
        "template",
        "template_arguments",
        "date",
        "task",
        "end_tokens",
        "system",
    ]
    assert prompt_form.from_json(content, "here") == form
    prompt_form.write(tmp_path, form, is_decoder=True)
    assert prompt_form.read(str(tmp_path)) == form


def test_an_encoder_has_a_task_and_no_style():
    content = prompt_form.to_json(PromptForm(task="mrpc"), is_decoder=False)
    assert content == dict.fromkeys(content, None) | {"template_arguments": {}, "task": "mrpc", "end_tokens": []}
    assert prompt_form.from_json(content, "here").task == "mrpc"


def test_nothing_recorded_is_no_form(tmp_path):
    message = message_of(prompt_form.from_json, {}, "here")
    assert (
        message.startswith("here: has no style, expected null or one of plain, ")
        and "null where no form is known" in message
    )
    assert prompt_form.from_json(None, "here") is None and prompt_form.read(str(tmp_path)) is None
    assert prompt_form.read(str(tmp_path / "model.gguf")) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("text", "here: found 'text', expected an object or null"),
        ({"style": "poem"}, "here.style: found 'poem', expected null or one of plain, alpaca, chat, verbatim"),
        ({"style": []}, "here.style: found [], expected null or one of plain, alpaca, chat, verbatim"),
        ({"template": 3}, "here.template: found 3, expected text or null"),
        ({"template_arguments": []}, "here.template_arguments: found [], expected an object"),
        ({"date": "31.1.2026"}, "here.date: found '31.1.2026', expected null or a date such as 2026-01-31"),
        ({"date": 20260131}, "here.date: found 20260131, expected null or a date such as 2026-01-31"),
        ({"task": 1}, "here.task: found 1, expected text or null"),
        ({"end_tokens": "</s>"}, "here.end_tokens: found '</s>', expected a list of texts"),
        ({"end_tokens": [3]}, "here.end_tokens: found [3], expected a list of texts"),
        ({"template": CHATML + " "}, "here.template: differs from its template_digest; the file was damaged or changed"),
        ({"end_tokens": ["\ud83d"]}, "here.end_tokens: holds half of a surrogate pair, expected complete characters"),
        ({"system": "\ud83d"}, "here.system: holds half of a surrogate pair, expected complete characters"),
        ({"template": None}, "here.template: differs from its template_digest; the file was damaged or changed"),
        ({"template_digest": 7}, "here.template: differs from its template_digest; the file was damaged or changed"),
    ],
)
def test_values_that_are_refused(fields, message, tmp_path):
    content = {**prompt_form.to_json(FORM), **fields} if isinstance(fields, dict) else fields
    assert message_of(prompt_form.from_json, content, "here") == message
    (tmp_path / "neuroada.json").write_text(json.dumps({"prompt": content}))
    assert message_of(prompt_form.read, str(tmp_path)) == message.replace("here", f"{tmp_path / 'neuroada.json'}: prompt")


def test_a_template_is_a_file_or_text(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(CHATML)
    assert prompt_form.given_template(str(file), "x") == CHATML == prompt_form.given_template(CHATML, "x")
    expected = "; expected the file of a chat template, or its text, which holds {{ or {%"
    file.write_bytes(b"\xff{{ x }}")
    for value, reason in (
        ("no.jinja", "No such file or directory"),
        (str(file), "not a text file"),
        ("", "Is a directory"),
    ):
        message = message_of(prompt_form.given_template, value, "data.chat_template")
        assert message == f"data.chat_template: {value!r} cannot be read ({reason}){expected}"


def test_the_tokenizers_own_template():
    assert prompt_form.own_template(CHAT) == CHATML and prompt_form.own_template(BYTES) is None


def test_end_tokens_are_single_tokens():
    ids = prompt_form.end_ids(PromptForm(end_tokens=("<|im_end|>", "</s>")), CHAT, "m")
    assert CHAT.convert_ids_to_tokens(ids) == ["<|im_end|>", "</s>"]
    for tokenizer in (LLAMA, CHAT):  # one with an unknown token, one without
        for text in ("<|eot_id|>", "two words"):
            message = message_of(prompt_form.end_ids, PromptForm(end_tokens=(text,)), tokenizer, "m")
            assert message == f"m: end token {text!r} of the trained prompts is not one token of its tokenizer"


def test_a_line_says_it():
    name = f"template {prompt_form.digest(CHATML)[:8]} of the tokenizer"
    line = f"prompts: chat, {name}, enable_thinking=False; a turn ends at <|im_end|>"
    assert prompt_form.describe(FORM, "the tokenizer") == line
    dated = PromptForm(PromptStyle.CHAT, "{{ strftime_now('%d') }}", date="2026-01-31")
    assert prompt_form.describe(dated, "adapter.json").endswith(" of adapter.json, date 2026-01-31")
    assert prompt_form.describe(FORMS[2], "") == "prompts: plain; an answer ends at </s> or <|im_end|>"
    assert prompt_form.describe(PromptForm(), "") == "prompts: verbatim"
