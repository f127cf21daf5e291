"""One border between prompt and completion: the same row has the same tokens in training and in a generation."""

import numpy as np
import pytest
from chat_templates import KINDS, TEMPLATES, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroada_jax.data.examples import encode, encode_prompt
from neuroada_jax.data.prompts import PromptStyle, render_prompt

# What tokens merge at a border: spaces, newlines, full stops, letters, digits, and characters of several bytes.
TEXT = st.lists(
    st.sampled_from(["blue", "red", " ", "  ", "\n", "\n\n", ".", ".\n", "a", "e", "12", "?", ":", "\t", "é", "🙂"]),
    max_size=6,
).map("".join)
# Templates with a marked end, a space before the answer, swallowed white space, and roles that are ordinary text.
CODERS = {
    f"{kind}, {name}": tokenizer(TEMPLATES[name], kind=kind)
    for kind in KINDS
    for name in ("chatml", "mistral", "phi3", "zephyr", "qwen3")
}


@settings(max_examples=400, deadline=None)
@given(
    prompt=TEXT,
    extra=TEXT,
    completion=TEXT,
    style=st.sampled_from(list(PromptStyle)),
    coder=st.sampled_from(sorted(CODERS)),
)
def test_training_and_generation_ask_in_the_same_tokens(prompt, extra, completion, style, coder):
    tokens = CODERS[coder]
    row = {"instruction": f"x{prompt}", "input": extra, "output": f"{completion}b"}
    asked = encode_prompt(row, style, tokens)
    encoded = encode([row], style, tokens, 10_000)
    ids, is_label = encoded.example(0)
    assert list(ids[: len(asked)]) == asked
    assert is_label.tolist() == [False] * len(asked) + [True] * (len(ids) - len(asked))
    if style is not PromptStyle.CHAT:
        # The completion is learnt as it is, whether or not a token would have spanned the border.
        text = tokens.decode(ids[:-1])
        before = tokens.decode(asked)
        assert text.startswith(before) or "\ufffd" in text
        assert text[len(before) :].strip() == row["output"].strip()
        whole = tokens(render_prompt(row, style, tokens) + row["output"])["input_ids"]
        if encoded.crossings:
            assert whole[: len(asked)] != asked
        else:
            assert whole == list(ids[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_ends_in_a_space(kind):
    tokens = tokenizer(TEMPLATES["chatml"], kind=kind)
    row = {"prompt": "red or blue? Answer: ", "completion": "blue"}
    encoded = encode([row], "verbatim", tokens, 100)
    ids, is_label = encoded.example(0)
    assert list(ids[~is_label]) == encode_prompt(row, "verbatim", tokens)
    assert tokens.decode(ids[:-1]) == tokens.decode(ids[~is_label]) + "blue"
    whole = tokens(row["prompt"] + row["completion"])["input_ids"]
    assert encoded.crossings == int(whole[: int(np.count_nonzero(~is_label))] != list(ids[~is_label]))
