"""Rows become prompts: styles, chat templates, BOS, and messages about rows that do not fit."""

import pytest
from data_helpers import BYTES, CHAT, LLAMA, byte_level, decoded, message_of, write_lines

from neuroada_jax.data.examples import encode, encode_prompt
from neuroada_jax.data.prompts import PromptStyle, render_prompt
from neuroada_jax.data.rows import load_rows


def test_styles():
    row = {"instruction": "do {input} it", "input": "", "output": "done"}
    with_input = {**row, "input": "x {instruction}"}
    assert render_prompt(row, "plain", BYTES) == "do {input} it\n"
    assert render_prompt(with_input, PromptStyle.PLAIN, BYTES) == "do {input} it\nx {instruction}\n"
    assert render_prompt({**row, "input": None}, "plain", BYTES) == "do {input} it\n"
    assert render_prompt(row, "verbatim", BYTES) == "do {input} it"
    assert render_prompt({"prompt": " p", "completion": "c"}, "verbatim", BYTES) == " p"
    assert render_prompt({"prompt": "p"}, "plain", BYTES) == "p\n"  # a target is not needed to generate
    assert render_prompt(row, "alpaca", BYTES) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\ndo {input} it\n\n### Response:\n"
    )
    assert render_prompt(with_input, "alpaca", BYTES) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\ndo {input} it\n\n### Input:\n"
        "x {instruction}\n\n### Response:\n"
    )
    assert render_prompt(with_input, "chat", CHAT) == (
        "<|im_start|>user\ndo {input} it\nx {instruction}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "expected one of plain, alpaca, chat, verbatim" in message_of(render_prompt, row, "poem", BYTES)


def test_chat_prompt_stops_before_the_last_answer():
    user, assistant = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
    opening = "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    for messages in ([user, assistant], [user]):
        assert render_prompt({"messages": messages}, "plain", CHAT) == opening
    longer = render_prompt({"messages": [user, assistant, user]}, "alpaca", CHAT)
    assert longer == opening + "a<|im_end|>\n" + opening


def test_prompt_ids_have_one_bos_and_no_eos():
    row = {"instruction": "the answer", "output": "x"}
    both = byte_level(single="<s> $A </s>")
    for tokenizer in (BYTES, both, LLAMA):
        ids = encode_prompt(row, "plain", tokenizer)
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id not in ids
        assert decoded(tokenizer, ids[1:]).strip() == "the answer"
    assert encode_prompt({"prompt": ""}, "verbatim", both) == [both.bos_token_id]
    assert encode_prompt({"prompt": "<s>the"}, "verbatim", BYTES) == encode_prompt({"prompt": "the"}, "verbatim", BYTES)
    kept = encode_prompt({"prompt": "a</s>"}, "verbatim", both)  # the user's own EOS is the user's
    assert kept.count(both.eos_token_id) == 1
    chat = encode_prompt(row, "chat", LLAMA)
    assert chat.count(LLAMA.bos_token_id) == 1
    assert decoded(LLAMA, chat).startswith("<s>")
    assert "no tokens" in message_of(encode_prompt, {"prompt": ""}, "verbatim", CHAT)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"body": "x", "id": 3}, ["found fields body, id", "'messages'", "'prompt'", "'instruction'", "'text'"]),
        ({"text": None}, ["field 'text' is null"]),
        ({"text": ["x"], "id": 3}, ["field 'text' is a list"]),
        ({}, ["found fields none"]),
        ({"instruction": "x", "answer": "y"}, ["no field 'output'", "instruction, answer"]),
        ({"instruction": 3, "output": "y"}, ["field 'instruction' is a number"]),
        ({"instruction": "x", "output": None}, ["field 'output' is null"]),
        ({"instruction": "x", "input": ["z"], "output": "y"}, ["field 'input' is a list"]),
        ({"prompt": "x"}, ["no field 'completion'"]),
        ({"prompt": "x", "completion": 1.5}, ["field 'completion' is a number"]),
        ({"messages": []}, ["'messages' is an empty list"]),
        ({"messages": "hi"}, ["'messages' is a string"]),
        ({"messages": ["hi"]}, ["messages[0] is a string"]),
        ({"messages": [{"role": "user", "content": None}]}, ["messages[0].content is null"]),
        ({"messages": [{"content": "x"}]}, ["messages[0].role is missing"]),
        ({"messages": [{"role": "user", "content": "x"}]}, ["no assistant turn", "found user"]),
        ({"messages": [{"role": "assistant", "content": "x"}]}, ["messages[0].role is 'assistant'"]),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, row, says):
    good = {"prompt": "p", "completion": "c"}
    path = write_lines(tmp_path / "x.jsonl", [good, "\n", row])
    message = message_of(encode, load_rows(str(path)), "plain", CHAT, 100)
    assert message.startswith(f"{path}:3: ")
    assert all(part in message for part in says), message


def test_tokenizers_that_do_not_fit():
    row = {"instruction": "x", "output": "y"}
    assert message_of(encode, [row], "chat", BYTES, 100).startswith("rows: row 0: ")
    assert "no chat template" in message_of(encode, [row], "chat", BYTES, 100)
    refusing = byte_level(template="{{ raise_exception('roles must alternate') }}")
    assert "roles must alternate" in message_of(encode, [row], "chat", refusing, 100)
    assert "no EOS token" in message_of(encode, [row], "plain", byte_level(eos=None), 100)
    assert "expected a fast one" in message_of(encode, [row], "plain", object(), 100)
    assert "max_length: found 1" in message_of(encode, [row], "plain", BYTES, 1)
