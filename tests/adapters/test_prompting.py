"""The form that a model is asked in: recorded in adapter.json or neuroada.json, or none, and options in its place."""

import json

import numpy as np
import pytest
from data_helpers import BYTES, CHAT, CHATML, message_of
from helpers import write_model

from neuroada_jax.adapters import native, on_base, prompting
from neuroada_jax.adapters.prompting import Options
from neuroada_jax.data.prompts import PromptForm, PromptStyle
from neuroada_jax.errors import NeuroadaWarning
from neuroada_jax.pretrained import prompt_form
from neuroada_jax.pretrained.load import load_model

OTHER = CHATML + "{# another #}"
FORM = PromptForm(PromptStyle.CHAT, CHATML, {}, "2026-01-31", "instruct", ("<|im_end|>",))
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_model(str(write_model(tmp_path_factory.mktemp("model") / "m")))


def adapter(base, form):
    columns = np.zeros((16, 1), np.int32)
    return on_base.assemble(base, {Q: columns}, {Q: columns}, native.Selection(1, ["q_proj"]), form=form)


def asked(base, form=FORM, tokenizer=CHAT, **options):
    found = prompting.recorded(base, adapter(base, form), "a")
    return prompting.resolve(found, Options(**options), base, tokenizer, default=PromptStyle.PLAIN)


def test_adapter_json_comes_before_neuroada_json(base, tmp_path):
    merged = PromptForm(PromptStyle.ALPACA, task="alpaca")
    directory = write_model(tmp_path / "merged")
    prompt_form.write(directory, merged, is_decoder=True)
    opened = load_model(str(directory))
    assert prompting.recorded(opened, adapter(opened, FORM), "a") == (FORM, "adapter.json of a")
    assert prompting.recorded(opened, adapter(opened, None), "a") == (merged, f"neuroada.json of {directory}")
    assert prompting.recorded(opened) == (merged, f"neuroada.json of {directory}")
    assert prompting.recorded(base) == (None, "") and prompting.recorded(base, adapter(base, None), "a")[0] is None


def test_what_was_recorded_is_the_default_and_options_override_it(base, tmp_path):
    own = PromptForm(PromptStyle.CHAT, None, {}, "2026-01-31", "instruct", ("<|im_end|>",))
    assert asked(base) == (own, "the tokenizer")  # by its own name, since a tokenizer may have one for tools besides
    other = PromptForm(PromptStyle.CHAT, OTHER, {"a": 1}, "2026-01-31", "instruct", ("<|im_end|>",))
    assert asked(base, other) == (other, "adapter.json of a")
    assert asked(base, other, style="plain").form.style is PromptStyle.PLAIN
    assert asked(base, other, template_arguments={"b": 2}).form.template_arguments == {"b": 2}
    assert asked(base, other, template_arguments={}).form.template_arguments == {}
    (tmp_path / "t.jinja").write_text(OTHER + " ")
    given = asked(base, other, chat_template=tmp_path / "t.jinja")
    assert given.form.chat_template == OTHER + " " and given.origin == "chat_template"
    assert asked(base, None) == (PromptForm(PromptStyle.PLAIN), "the tokenizer")
    message = message_of(asked, base, PromptForm(end_tokens=("<|eot_id|>",)))
    assert message.endswith("end token '<|eot_id|>' of the trained prompts is not one token of its tokenizer")


def test_options_without_effect_are_refused(base):
    for options in ({"chat_template": OTHER}, {"template_arguments": {"a": 1}}):
        form = asked(base, PromptForm(PromptStyle.PLAIN), **options)
        message = message_of(prompting.without_chats, form, Options(**options), CHAT, "--{}".format)
        name = next(iter(options))
        assert message == f"--{name}: prompts in style plain use no chat template; remove it, or give --style chat"
    plain = asked(base, style="plain")
    assert prompting.without_chats(plain, Options("plain"), CHAT).form.chat_template is None
    chat = asked(base, PromptForm(PromptStyle.CHAT), BYTES)
    assert "has no chat template" in message_of(prompting.without_chats, chat, Options(), BYTES)


def said(base, capsys, form, tokenizer=CHAT, **options):
    found, given = prompting.recorded(base, adapter(base, form), "a"), Options(**options)
    capsys.readouterr()
    prompting.say(prompting.resolve(found, given, base, tokenizer), found, given, tokenizer, "--{}".format)
    return capsys.readouterr().err


def test_it_is_said_in_one_line(base, capsys):
    digests = [prompt_form.digest(text)[:8] for text in (CHATML, OTHER)]
    assert said(base, capsys, FORM) == f"prompts: chat, template {digests[0]} of the tokenizer; a turn ends at <|im_end|>\n"
    assert said(base, capsys, PromptForm(PromptStyle.PLAIN)) == "prompts: plain\n"
    assert said(base, capsys, None) == (
        "adapter.json of a does not record its prompts (written by 0.1 or imported): style verbatim is used; "
        "--style chooses another\n"
    )
    assert said(base, capsys, None, style="plain") == "prompts: plain\n"
    found = prompting.recorded(base)
    prompting.say(prompting.resolve(found, Options(), base, CHAT), found, Options(), CHAT)
    assert capsys.readouterr().err == ""  # a base model


def test_a_template_that_is_not_the_tokenizers_is_warned_of(base, capsys):
    other = PromptForm(PromptStyle.CHAT, OTHER)
    digests = [prompt_form.digest(text)[:8] for text in (OTHER, CHATML)]
    with pytest.warns(NeuroadaWarning) as caught:
        line = said(base, capsys, other)
    assert line == f"prompts: chat, template {digests[0]} of adapter.json of a\n"
    assert str(caught[0].message) == (
        f"adapter.json of a has chat template {digests[0]} and the tokenizer {digests[1]}; that of the training is used"
    )
    assert said(base, capsys, other, BYTES) == line  # a tokenizer without one


def test_a_damaged_neuroada_json(tmp_path):
    directory = write_model(tmp_path / "m")
    (directory / "neuroada.json").write_text(json.dumps({"prompt": {"style": 3}}))
    message = message_of(prompting.recorded, load_model(str(directory)))
    assert message.startswith(f"{directory / 'neuroada.json'}: prompt.style: found 3, expected")
