"""Texts in, texts out: end tokens, styles and lengths."""

import pytest
from data_helpers import CHAT, message_of
from helpers import write_model

from neuroada_jax.generation import texts
from neuroada_jax.generation.sampling import Decoding
from neuroada_jax.pretrained.load import load_model, open_model


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    return load_model(str(write_model(tmp_path_factory.mktemp("model") / "m", seed=3)))


def continued(base_model, *prompts, **options):
    return texts.continue_texts(base_model, base_model.params, CHAT, prompts, max_new_tokens=6, **options)


def test_end_tokens_come_from_everywhere(base_model, tmp_path):
    directory = write_model(tmp_path / "m", eos_token_id=[5, 6])
    (directory / "generation_config.json").write_text('{"eos_token_id": 7}')
    other = open_model(str(directory))
    assert texts.end_tokens(other, CHAT) == sorted({5, 6, 7, CHAT.eos_token_id})
    assert texts.end_tokens(base_model, CHAT) == [CHAT.eos_token_id]


def test_a_style_is_a_prompt_of_that_form(base_model):
    plain, verbatim, written = (
        *continued(base_model, "the answer", form="plain"),
        *continued(base_model, "the answer", "the answer\n"),
    )
    assert plain == written != verbatim and 0 < plain.tokens <= 6


def test_stop_strings_are_no_part_of_a_text(base_model):
    (free,) = continued(base_model, "the answer")
    middle = free.text[len(free.text) // 2]
    (stopped,) = continued(base_model, "the answer", decoding=Decoding(stop=(middle,)))
    assert stopped.text == free.text.partition(middle)[0]


def test_bad_input_names_the_prompt(base_model):
    assert message_of(continued, base_model, "the", "") == (
        "prompt 1: the prompt has no tokens, expected at least one to generate from"
    )
    assert message_of(continued, base_model, "the" * 500).startswith("prompt 0")
