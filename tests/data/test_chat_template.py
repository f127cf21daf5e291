"""Every template with every kind of tokenizer: what is trained is what a generation is asked, and turns learn to end."""

import copy
import dataclasses
import datetime

import numpy as np
import pytest
from chat_templates import KINDS, TEMPLATES, TOOL_CHAT, TOOLS, chat, tokenizer
from data_helpers import message_of
from transformers.utils import chat_template_utils

from neuroada_jax.data import sandbox
from neuroada_jax.data.examples import encode, encode_prompt
from neuroada_jax.data.prompts import PromptForm, answer_text, render_prompt

CHATS = {
    "one turn": chat("red or blue?", "blue"),
    "spaces": chat("red or blue?", " blue \n"),
    "newlines": chat("red\nor\n\nblue?\n", "\n\nblue.\n\nfox."),
    "three turns": chat("red?", "blue", "fox?", "the lazy dog.\n", "count to three", "one two\n\nthree"),
    "system": chat("red?", "blue", "fox?", "dog", system="You help.\n\nBe brief."),
    # Texts that are also part of tokens or of what templates write around an answer.
    "short": chat("end", "end", "s", "s", "assistant", "final", "of", "sentence"),
    "thoughts": chat("red?", "<think>\nIs it blue?\n</think>\n\nblue", "fox?", "<think>\nhm\n</think>\n\ndog"),
}
REFUSED = {"other_prompt": "cannot be found"}
ENDS = {"no_end": "</s>", "smollm3": "<|im_end|>"}
FORM = PromptForm.of("chat")


def examples_of(messages, template, kind="byte_level", form=FORM, learn="all", **row):
    encoded = encode([{"messages": messages} | row], form, tokenizer(template, kind=kind), 10_000, learn=learn)
    return encoded, [encoded.example(i) for i in range(len(encoded))]


def visible(text: str) -> str:
    """Return a text as templates may keep it: without the white space around it, and without thoughts."""
    return text.rpartition("</think>")[2].strip()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name, each in TEMPLATES.items() if not each.masks and name not in REFUSED])
def test_a_trained_turn_is_asked_and_answered_as_in_a_generation(name, kind):
    template, coder = TEMPLATES[name], tokenizer(TEMPLATES[name], kind=kind)
    end = template.end or template.eos
    for label, messages in CHATS.items():
        if label == "system" and template.system != "read":
            continue
        encoded, examples = examples_of(messages, template, kind)
        assert encoded.end_tokens == (end,), label
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        found = set()
        for ids, is_label in examples:
            # Runs of labels: each starts right after the very tokens of a generation's prompt.
            starts = [t for t in range(1, len(ids)) if is_label[t] and not is_label[t - 1]]
            for start in starts:
                prompts = {i: encode_prompt({"messages": messages[:i]}, FORM, coder) for i in turns}
                match = [i for i, prompt in prompts.items() if list(ids[:start]) == prompt]
                assert match, (label, coder.decode(ids[:start]))
                found.add(match[0])
                stop = next((t for t in range(start, len(ids)) if not is_label[t]), len(ids))
                assert ids[stop - 1] == coder.convert_tokens_to_ids(end)
                learnt = coder.decode(ids[start:stop])
                assert visible(messages[match[0]]["content"]) in learnt, (label, learnt)
                answer = answer_text(ids[start : stop - 1].tolist(), coder).strip()
                assert answer.endswith(visible(messages[match[0]]["content"]))
        assert found == set(turns), label


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(TEMPLATES))
def test_a_generation_is_asked_in_transformers_own_tokens(name, kind):
    template, coder = TEMPLATES[name], tokenizer(TEMPLATES[name], kind=kind)
    for label, messages in CHATS.items():
        if label == "system" and template.system != "read":
            continue
        for asked in (messages[:-1], [*messages, {"role": "user", "content": "and red?"}]):
            theirs = coder.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
            assert encode_prompt({"messages": asked}, FORM, coder) == theirs, label


@pytest.mark.parametrize("name", [name for name, each in TEMPLATES.items() if not each.masks and name not in REFUSED])
def test_a_stable_template_makes_one_example_of_a_chat(name):
    template = TEMPLATES[name]
    encoded, _ = examples_of(CHATS["three turns"], template, "llama3_split")
    # Thoughts go from earlier turns, Harmony changes their end token, and without an end token each turn needs an EOS.
    split = template.end is None or name in ("qwen3", "qwen3_thinking", "r1", "harmony")
    assert len(encoded) == (3 if split else 1)
    assert encoded.split_rows == int(split)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name, each in TEMPLATES.items() if each.masks])
def test_generation_blocks_are_the_labels_as_in_transformers(name, kind):
    coder = tokenizer(TEMPLATES[name], kind=kind)
    for label, messages in CHATS.items():
        encoded, [(ids, is_label)] = examples_of(messages, TEMPLATES[name], kind)
        both = coder.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        mask, places, length = both["assistant_masks"], both.encodings[0].offsets, len(ids)
        for at in range(1, len(mask)):  # transformers below 5.24 leaves out the other tokens of a character at the end
            mask[at] = mask[at] or (mask[at - 1] and places[at] == places[at - 1])
        assert list(ids) == both["input_ids"][:length], label
        assert list(is_label) == [bool(each) for each in mask[:length]], label
        assert not any(mask[length:])
        assert encoded.end_tokens == ("<|im_end|>",)
        assert encoded.unended == 0


@pytest.mark.parametrize("answer", ["blue", "blue \N{FOX FACE}"])  # the fox is several tokens
def test_blocks_without_the_end_of_the_turn_are_kept_and_counted(answer):
    template = TEMPLATES["masked"]
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %}"
        "{% generation %}{{ m.content }}{% endgeneration %}!{% endif %}{% endfor %}"
    )
    encoded, [(ids, is_label)] = examples_of(
        chat("a", answer), template, form=dataclasses.replace(FORM, chat_template=source)
    )
    assert tokenizer(template).decode(ids[is_label]) == answer
    assert (encoded.unended, encoded.end_tokens) == (1, ())


@pytest.mark.parametrize("name", ["chatml", "masked", "qwen3", "mistral"])
def test_turns_that_are_not_learnt(name):
    template, messages = TEMPLATES[name], copy.deepcopy(CHATS["three turns"])
    coder = tokenizer(template)

    def learnt(**options):
        _, examples = examples_of(messages, template, **options)
        return [coder.decode(ids[is_label]) for ids, is_label in examples]

    last = learnt(learn="last")
    assert len(last) == 1
    assert "three" in last[0]
    assert "blue" not in last[0]
    messages[1]["weight"] = 0
    messages[3]["weight"] = 1
    text = "".join(learnt())
    assert "blue" not in text
    assert "lazy" in text
    assert "three" in text
    for message in messages[1::2]:
        message["weight"] = 0
    assert "no assistant turn of a weight other than 0" in message_of(examples_of, messages, template)


@pytest.mark.parametrize("name", [name for name, each in TEMPLATES.items() if each.has_tools])
def test_tools_and_calls_are_written_as_in_transformers(name):
    template = TEMPLATES[name]
    coder = tokenizer(template)
    _, examples = examples_of(TOOL_CHAT, template, tools=TOOLS)
    asked = render_prompt({"messages": TOOL_CHAT, "tools": TOOLS}, FORM, coder)
    assert asked == coder.apply_chat_template(TOOL_CHAT[:3], TOOLS, tokenize=False, add_generation_prompt=True)
    learnt = "".join(coder.decode(ids[is_label]) for ids, is_label in examples)
    assert '"add"' in learnt
    assert "It is 3." in learnt


@pytest.mark.parametrize("name", [name for name, each in TEMPLATES.items() if not each.has_tools])
def test_what_a_template_does_not_read_is_named(name):
    if name == "other_prompt":
        return
    assert "'tools'" in message_of(examples_of, CHATS["one turn"], TEMPLATES[name], tools=TOOLS)
    calls = [dict(TOOL_CHAT[0]), dict(TOOL_CHAT[1]), {"role": "user", "content": "3"}, TOOL_CHAT[3]]
    assert "'tool_calls' of message 1" in message_of(examples_of, calls, TEMPLATES[name])


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_system_messages_are_written_or_refused(name):
    template = TEMPLATES[name]
    if template.system == "refused":
        assert "refuses this chat (no system role here)" in message_of(examples_of, CHATS["system"], template)
    elif template.system == "ignored":
        assert "writes nothing of message 0 (role 'system')" in message_of(examples_of, CHATS["system"], template)
    elif name not in REFUSED:
        coder = tokenizer(template)
        for ids, _ in examples_of(CHATS["system"], template)[1]:
            assert "You help." in coder.decode(ids)


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_template_that_asks_in_another_form_than_it_stores_is_refused(name):
    message = message_of(examples_of, CHATS["one turn"], TEMPLATES[name])
    assert REFUSED[name] in message
    assert message.startswith("rows: row 0: ")


def test_enable_thinking_moves_the_empty_block_into_the_prompt():
    template, coder = TEMPLATES["qwen3"], tokenizer(TEMPLATES["qwen3"])
    form = dataclasses.replace(FORM, template_arguments={"enable_thinking": False})
    for arguments, learnt in ((FORM, "<think>\n\n</think>\n\nblue<|im_end|>"), (form, "blue<|im_end|>")):
        _, [(ids, is_label)] = examples_of(CHATS["one turn"], template, form=arguments)
        assert coder.decode(ids[is_label]) == learnt
        assert answer_text(ids[is_label].tolist(), coder) == "blue"


def test_a_date_is_that_of_the_form():
    template = TEMPLATES["llama3.2"]
    form = dataclasses.replace(FORM, date="2024-02-29")
    assert "29 Feb 2024" in render_prompt({"messages": CHATS["one turn"]}, form, tokenizer(template))
    assert f"{datetime.date.today():%d %b %Y}" in render_prompt({"messages": CHATS["one turn"]}, FORM, tokenizer(template))
    given = dataclasses.replace(form, template_arguments={"date_string": "1 May 2020"})
    assert "1 May 2020" in render_prompt({"messages": CHATS["one turn"]}, given, tokenizer(template))
    smol = TEMPLATES["smollm3"]
    assert "29 February 2024" in render_prompt({"messages": CHATS["one turn"]}, form, tokenizer(smol))


@pytest.mark.parametrize(
    ("source", "arguments", "says"),
    [
        ("{{ 1/0 }}", {}, "division by zero"),
        ("{% break %}", {}, "refuses this chat ('break' outside loop"),
        ("{{ messages[7].content }}", {}, "refuses this chat"),
        ("{% for m in messages %}", {}, "not valid"),
        ("{{ '\\ud83d' }}{{ messages[0].content }}", {}, "refuses this chat (it writes half of a surrogate pair"),
        ("{{ raise_exception('odd roles\nhere') }}", {}, "refuses this chat (odd roles)"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", {}, "nothing of message"),
        ("", {}, "writes nothing of message 1"),
        (None, {"enable_thinking": True}, "does not read 'enable_thinking'; it reads none"),
        ("{% set n = strftime_now %}{{ n('%d') }}", {}, "its date cannot be kept"),
        ("{{ strftime_now('%d' ~ '%m') }}", {}, "its date cannot be kept"),
        (None, {"tokenize": True}, "'tokenize' is set by the library itself"),
        (None, {"messages": []}, "'messages' is set by the library itself"),
    ],
)
def test_templates_and_arguments_that_do_not_fit(source, arguments, says):
    form = dataclasses.replace(FORM, chat_template=source, template_arguments=arguments)
    assert says in message_of(examples_of, CHATS["one turn"], TEMPLATES["chatml"], form=form)


OPTIONS = {
    "llama3.1": "builtin_tools, custom_tools, date_string, tools_in_user_message",
    "qwen3": "enable_thinking",
    "smollm3": "enable_thinking, xml_tools",
    "harmony": "reasoning_effort",
}


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name in OPTIONS or name in ("mistral", "phi3", "gemma")])
def test_an_unknown_argument_names_those_that_a_caller_can_give(name):
    """Not the variables that a template sets for itself, such as the separators in a loop."""
    form = dataclasses.replace(FORM, template_arguments={"nothing_like_it": 1})
    message = message_of(examples_of, CHATS["one turn"], TEMPLATES[name], form=form)
    assert message.endswith(f"does not read 'nothing_like_it'; it reads {OPTIONS.get(name, 'none')}")


def test_a_tokenizer_without_the_templates_tokens():
    form = dataclasses.replace(FORM, chat_template=TEMPLATES["chatml"].text)
    message = message_of(examples_of, CHATS["one turn"], TEMPLATES["vicuna"], form=form)
    assert "ends a turn with '<|im_end|>', which this tokenizer splits into" in message
    # Roles that are ordinary text work, as they do in Zephyr's own models, but are reported.
    encoded, _ = examples_of(CHATS["one turn"], TEMPLATES["zephyr"])
    assert encoded.foreign_tokens == ("<|assistant|>", "<|system|>", "<|user|>")[: len(encoded.foreign_tokens)]
    assert encoded.foreign_tokens
    assert examples_of(CHATS["one turn"], TEMPLATES["chatml"])[0].foreign_tokens == ()


EACH = "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
ALWAYS = EACH + "{{ '<|im_start|>assistant\n\n' }}"
NOTE = "{% if messages[-1].role == 'assistant' %}<|im_start|>note\nend of turn<|im_end|>{% endif %}"
NOTED = TEMPLATES["chatml"].text + NOTE
EOS = "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
JOINED = TEMPLATES["chatml"].text.replace("m.content", "m.content.split()|join(' ')") + EOS
NO_END = (
    "{% for m in messages %}<|im_start|>{{ m.content }}"
    "{% if not (loop.last and m.role == 'assistant') %}<|im_end|>{% endif %}{% endfor %}"
    + "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


@pytest.mark.parametrize(
    ("source", "answer", "learnt"),
    [
        *((ALWAYS, answer, f"{answer}<|im_end|>") for answer in ("t", "assistant", "blue")),
        *((NOTED, answer, f"{answer}<|im_end|>") for answer in ("turn", "end", "blue")),
        (JOINED, "a" + " " * 9 + "b", "a b<|im_end|>"),
        (NO_END, "<think>b</think>", "<think>b</think><|endoftext|>"),
        (NO_END, "b", "b<|endoftext|>"),
    ],
)
def test_an_answer_ends_where_its_text_does(source, answer, learnt):
    template = dataclasses.replace(TEMPLATES["chatml"], plain_tokens=("<think>", "</think>"))
    form = dataclasses.replace(FORM, chat_template=source)
    encoded, [(ids, is_label)] = examples_of(chat("hi", answer), template, form=form)
    assert tokenizer(template).decode(ids[is_label]) == learnt
    assert encoded.end_tokens == ("<|endoftext|>" if learnt.endswith("<|endoftext|>") else "<|im_end|>",)


def test_blocks_that_are_asked_otherwise_or_cross_a_token_are_counted():
    turn = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    body = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|im_end|>{% else %}A: "
        + turn
        + "{% endif %}{% endfor %}"
    )
    for opening in ("A: ", "A:", "<|im_start|>"):
        source = body + "{% if add_generation_prompt %}" + opening + "{% endif %}"
        encoded, _ = examples_of(
            chat("a", "blue"), TEMPLATES["chatml"], form=dataclasses.replace(FORM, chat_template=source)
        )
        assert (encoded.crossings, encoded.unasked) == (0, 1), opening
    assert examples_of(chat("a", "blue"), TEMPLATES["masked"])[0].unasked == 0


def test_a_system_text_that_also_stands_elsewhere_is_missed():
    message = message_of(examples_of, chat("say hi", "yo", system="hi"), TEMPLATES["ignores_system"])
    assert "writes nothing of message 0 (role 'system')" in message


def test_fields_around_a_prompt_are_part_of_its_chat():
    coder = tokenizer(TEMPLATES["qwen3"])
    row = {"prompt": "add 1 2", "completion": "3", "tools": TOOLS, "system": "You help."}
    text = render_prompt(row, FORM, coder)
    messages = chat("add 1 2", system="You help.")
    assert text == coder.apply_chat_template(messages, TOOLS, tokenize=False, add_generation_prompt=True)
    assert "field 'system' is for chats" in message_of(encode, [row], "plain", coder, 100)
    for field in ("chat_template_kwargs", "documents", "functions"):
        assert f"field {field!r} is not read here" in message_of(encode, [{**row, field: {"a": 1}}], FORM, coder, 100)
    assert "half of a surrogate pair" in message_of(encode_prompt, {"prompt": "a \ud83d"}, "plain", coder)


def test_the_format_of_a_date_is_read_as_text():
    form = dataclasses.replace(
        FORM, date="2024-02-29", chat_template="{{ strftime_now ('%d\\n%b') }}{{ messages[0].content }}"
    )
    assert render_prompt({"messages": CHATS["one turn"]}, form, tokenizer(TEMPLATES["chatml"])).startswith("29\nFeb")


def test_templates_see_the_data_that_transformers_gives_them():
    class Name(str):
        pass

    values = ["a", Name("b"), None, True, 3, 2.5, np.float32(1.5), np.bool_(False), (1, [2]), {"x": [Name("z")]}, object()]
    for value in [*values, values, {"all": values, Name("k"): 1}]:
        found, expected = sandbox._plain_data(value), chat_template_utils._plain_template_data(value)
        assert repr(found) == repr(expected) and type(found) is type(expected)
    assert type(sandbox._plain_data({"a": Name("b")})["a"]) is str
