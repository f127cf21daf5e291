"""Rows become examples: which tokens are targets, BOS and EOS, cutting and counting."""

from pathlib import Path

import numpy as np
import pytest
from data_helpers import BYTES, CHAT, LLAMA, byte_level, decoded, message_of
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroada_jax.data import examples
from neuroada_jax.data.examples import encode, encode_prompt
from neuroada_jax.data.rows import load_rows

COMMONSENSE = Path(__file__).parents[3] / "shared" / "data" / "train" / "commonsense_15k.jsonl.gz"


def one(row, style="plain", tokenizer=BYTES, max_length=10_000):
    return encode([row], style, tokenizer, max_length).example(0)


TEXT = st.text(st.sampled_from("ab ct\nhe🙂é."), max_size=12)


@settings(max_examples=100)
@given(prompt=TEXT, target=TEXT, tokenizer=st.sampled_from([BYTES, CHAT, LLAMA, byte_level("<s> $A </s>")]))
def test_labels_are_the_completion_and_one_eos(prompt, target, tokenizer):
    row = {"prompt": "a" + prompt, "completion": target}
    ids, is_label = one(row, "verbatim", tokenizer)
    assert ids.dtype == np.int32
    assert is_label.dtype == bool
    assert ids.shape == is_label.shape
    assert ids[-1] == tokenizer.eos_token_id
    assert is_label[-1]
    assert not is_label[0]
    assert np.count_nonzero(ids == tokenizer.eos_token_id) == 1
    assert np.count_nonzero(ids == tokenizer.bos_token_id) == (0 if tokenizer is CHAT else 1)
    first = int(is_label.argmax())
    assert is_label[first:].all()  # one run to the end
    # The prompt has the tokens that it has in a generation, and all of the target and nothing else follows.
    asked = encode_prompt(row, "verbatim", tokenizer)
    assert list(ids[:first]) == asked
    text = tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False)
    assert text == tokenizer.decode(asked, clean_up_tokenization_spaces=False) + target
    # Where no token spans the border, the tokens are those of the complete text.
    begin = 0 if tokenizer is CHAT else 1
    together = tokenizer(row["prompt"] + target, add_special_tokens=False)["input_ids"]
    if together[: len(asked) - begin] == asked[begin:]:
        assert list(ids[begin:-1]) == together


def test_bos_is_never_doubled_and_eos_comes_once():
    bos, eos = BYTES.bos_token_id, BYTES.eos_token_id
    for prompt, target in [("<s>a", "b</s>"), ("a", "b</s></s>"), ("a", "b")]:
        ids, is_label = one({"prompt": prompt, "completion": target}, "verbatim")
        assert decoded(BYTES, ids) == "<s>ab</s>"
        assert is_label.tolist() == [False, False, True, True]
    ids, is_label = one({"prompt": "a", "completion": "<s>b"}, "verbatim")
    assert ids.tolist().count(bos) == 2
    assert not is_label[ids == bos].any()
    ids, is_label = one({"prompt": "a</s>", "completion": ""}, "verbatim")  # the prompt's EOS is not the target's
    assert ids[-2:].tolist() == [eos, eos]
    assert is_label.tolist() == [False, False, False, True]
    ids, is_label = one({"prompt": "", "completion": "ab"}, "verbatim", CHAT)
    assert is_label.tolist() == [False, True, True]  # nothing predicts the first token


def test_a_space_at_the_end_of_the_target_is_a_target():
    ids, is_label = one({"prompt": "a", "completion": "b "}, "verbatim")
    assert decoded(BYTES, ids[is_label]) == "b </s>"


def test_bos_and_eos_may_be_the_same_token():
    tokenizer = byte_level()
    tokenizer.eos_token = "<s>"
    ids, is_label = one({"prompt": "a", "completion": "b"}, "verbatim", tokenizer)
    assert decoded(tokenizer, ids) == "<s>ab<s>"
    assert is_label.tolist() == [False, False, True, True]


def test_chat_targets_are_every_answer_with_its_end_of_turn():
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": " the answer\n"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "option2"},
        {"role": "user", "content": "never answered"},
    ]
    ids, is_label = one({"messages": messages}, "plain", CHAT)
    assert decoded(CHAT, ids[is_label]) == " the answer\n<|im_end|>option2<|im_end|>"
    # What comes before is as the template writes it; what follows the last target is not kept.
    whole = CHAT.apply_chat_template(messages, tokenize=False)
    assert decoded(CHAT, ids) == whole[: whole.index("option2<|im_end|>") + len("option2<|im_end|>")]

    ids, is_label = one({"messages": messages[1:5]}, "plain", LLAMA)
    assert decoded(LLAMA, ids[is_label]).replace("  ", " ") == " the answer\n </s> option2 </s>"
    assert ids.tolist().count(LLAMA.bos_token_id) == 2
    assert not is_label[ids == LLAMA.bos_token_id].any()


def test_chat_without_an_end_of_turn_token_gets_an_eos():
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template = turns + "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = byte_level(template=template)
    ids, is_label = one({"instruction": "a", "output": "b"}, "chat", tokenizer)
    assert decoded(tokenizer, ids) == "user: a\nassistant: b</s>"
    assert decoded(tokenizer, ids[is_label]) == "b</s>"


def test_mixed_rows_keep_their_order():
    chat = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}
    examples = encode(
        [chat, {"instruction": "q", "output": "a"}, chat, {"prompt": "p", "completion": "c"}], "plain", CHAT, 100
    )
    starts = [decoded(CHAT, examples.example(i)[0])[:12] for i in range(4)]
    assert [s == "<|im_start|>" for s in starts] == [True, False, True, False]
    assert examples.row_numbers.tolist() == [0, 1, 2, 3]
    assert len(examples) == 4


def chats(count):
    messages = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "that"}]
    return [{"messages": [*messages, *messages][: 4 if i % 3 else 2]} for i in range(count)]


def test_chunks_do_not_show(monkeypatch):
    rows = [{"prompt": "a", "completion": "b"}] * 5 + chats(6)  # the template is made while others are tokenised
    whole = encode(rows, "plain", CHAT, 100)
    monkeypatch.setattr(examples, "CHUNK", 2)
    done = []
    apart = encode(rows, "plain", CHAT, 100, lambda *counts: done.append(counts))
    assert done == [(2, 11), (4, 11), (6, 11), (8, 11), (10, 11), (11, 11)]
    for name in ("token_ids", "is_label", "row_numbers", "offsets"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(apart, name))
    assert apart.end_tokens == whole.end_tokens


def test_the_first_wrong_row_is_named_whichever_thread_meets_it(monkeypatch):
    monkeypatch.setattr(examples, "CHUNK", 1)
    rows = [{"prompt": "a", "completion": "b"}, {"messages": [{"role": "user", "content": ""}]}]
    assert "row 1: messages[0]" in message_of(encode, rows, "plain", CHAT, 100)
    tokenizer = byte_level(template="{{ messages }}")
    tokenizer.eos_token = None  # which is missed when the second row has been rendered
    assert "row 0: the tokenizer has no EOS token" in message_of(encode, rows, "plain", tokenizer, 100)


def test_truncated_and_dropped_are_counted():
    rows = [{"prompt": "x" * n, "completion": "y" * m} for n, m in [(2, 3), (2, 9), (8, 1), (6, 2), (7, 0), (5, 1)]]
    # With BOS and EOS: 7, 13, 11, 10, 9 and 8 tokens. At 8, rows 2 (labels at 9, 10) and 4 (at 8) lose every label.
    tokenizer = byte_level()
    calls = []
    examples = encode(rows, "verbatim", tokenizer, 8, lambda done, total: calls.append((done, total)))
    assert examples.row_numbers.tolist() == [0, 1, 3, 5]
    assert (examples.truncated, examples.dropped) == (2, 2)
    assert examples.lengths.tolist() == [7, 8, 8, 8]
    assert examples.lengths.dtype == np.int32
    assert examples.label_counts.tolist() == [4, 5, 1, 2]
    assert examples.label_counts.dtype == np.int32
    assert calls == [(6, 6)]
    assert tokenizer.eos_token_id not in examples.example(1)[0]  # a truncated completion does not end
    message = message_of(encode, rows[2:3], "verbatim", tokenizer, 8)
    assert "has a completion token within max_length" in message
    assert "max_length 8" in message
    assert "has a completion token within max_length" in message_of(encode, [], "verbatim", tokenizer, 8)


@pytest.mark.skipif(not COMMONSENSE.exists(), reason=f"{COMMONSENSE} is not on this machine")
def test_commonsense_15k():
    rows = load_rows(str(COMMONSENSE))
    assert len(rows) == 15_119
    assert rows.where(15_118).endswith("commonsense_15k.jsonl.gz:15119")
    some = load_rows(str(COMMONSENSE), limit=1500)
    assert some.rows == rows.rows[:1500]
    examples = encode(some, "plain", BYTES, 4096)
    assert len(examples) == 1500
    assert examples.truncated == examples.dropped == 0
    for i in (0, 700, 1499):
        ids, is_label = examples.example(i)
        row = some.rows[i]
        assert decoded(BYTES, ids) == "<s>" + row["instruction"] + "\n" + row["output"] + "</s>"
        assert decoded(BYTES, ids[is_label]) == f"the correct answer is {row['answer']}</s>"
        assert list(ids[~is_label]) == encode_prompt(row, "plain", BYTES)
