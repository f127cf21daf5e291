"""The templates of chat_templates.py do what they say, by transformers' own rendering."""

import datetime
import re

import jinja2
import jinja2.meta
import pytest
from chat_templates import KINDS, TEMPLATES, TOOL_CHAT, TOOLS, Template, chat, text_of, tokenizer

every = pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
GIVEN = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"}
GLOBALS = {"raise_exception", "strftime_now", "namespace", "joiner"}
LOCALS = {
    "call",
    "sep",
    "thought",
}  # set in a branch and read in a loop, which jinja2.meta takes for variables from outside
PLAIN = chat("red or blue?", "blue", "count to three", "one two three")


def opens(template: Template, messages: list[dict]) -> bool:
    return text_of(template, messages).startswith(text_of(template, messages[:-1], prompt=True))


def grows(template: Template, messages: list[dict]) -> bool:
    return text_of(template, messages).startswith(text_of(template, messages[:-2]))


@every
def test_prompts_and_shorter_chats_are_beginnings_where_it_is_said(template):
    assert (opens(template, PLAIN[:2]), grows(template, PLAIN)) == (template.opens, template.grows)
    if template.system != "refused":
        system = {"role": "system", "content": "Say little."}
        stable = opens(template, [system, *PLAIN[:2]]) and grows(template, [system, *PLAIN])
        assert stable == template.stable_with_system


@every
def test_a_last_turn_is_prompt_insert_content_and_end(template):
    text = text_of(template, PLAIN[:2])
    before, after = text.rsplit("blue", 1)
    assert after.strip().startswith(template.end) if template.end else not after.strip()
    if template.opens:
        assert before == text_of(template, PLAIN[:1], prompt=True) + template.inserts


@every
def test_arguments_are_the_variables_that_the_template_reads(template):
    text = re.sub(r"\{%-? *(end)?generation *-?%\}", "", template.text)
    found = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(text))
    assert found - GIVEN - GLOBALS - LOCALS == set(template.arguments)
    assert (text != template.text) == template.masks


@every
def test_white_space_is_trimmed_where_it_is_said(template):
    asked = text_of(template, chat("  blue "), prompt=True)
    assert ("  blue " not in asked) == template.trims


@every
def test_system_messages(template):
    if template.system == "refused":
        with pytest.raises(jinja2.TemplateError, match="system"):
            text_of(template, chat("hi", system="Say little."))
    else:
        assert ("Say little." in text_of(template, chat("hi", system="Say little."), prompt=True)) == (
            template.system == "read"
        )


@every
def test_two_user_turns_in_a_row(template):
    messages = [*chat("red"), *chat("blue")]
    if template.alternates:
        with pytest.raises(jinja2.TemplateError, match="alternate"):
            text_of(template, messages)
    else:
        assert text_of(template, messages).count("red") == 1


@every
def test_tools(template):
    if template.has_tools:
        text = text_of(template, TOOL_CHAT, tools=TOOLS)
        assert "Add two numbers." in text and '"a": "1"' in text and text.count("3") >= 2
    else:
        assert text_of(template, PLAIN, tools=TOOLS) == text_of(template, PLAIN)


@every
def test_dates(template):
    shapes = "%d %b %Y", "%d %B %Y", "%Y-%m-%d"
    days = [datetime.date.today()]
    text = text_of(template, PLAIN)
    days.append(datetime.date.today())  # midnight may pass
    assert any(day.strftime(shape) in text for day in days for shape in shapes) == template.dated


def test_date_string():
    for name in ("llama3.1", "llama3.2"):
        assert "Today Date: 1 May 2020\n\n<|eot_id|>" in text_of(TEMPLATES[name], PLAIN, date_string="1 May 2020")
    assert "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n" in text_of(TEMPLATES["llama3.1"], PLAIN)


def test_llama_3_1_writes_tools_into_the_first_user_turn_or_the_system_block():
    template = TEMPLATES["llama3.1"]
    text = text_of(template, TOOL_CHAT, tools=TOOLS)
    assert text.index("Add two numbers.") > text.index("user<|end_header_id|>")
    assert text.endswith(
        '{"name": "add", "parameters": {"a": "1", "b": "2"}}<|eot_id|><|start_header_id|>ipython<|end_header_id|>'
        '\n\n"3"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nIt is 3.<|eot_id|>'
    )
    text = text_of(template, TOOL_CHAT, tools=TOOLS, tools_in_user_message=False)
    assert text.index("Add two numbers.") < text.index("user<|end_header_id|>")
    assert '\n\n<|python_tag|>add.call(a="1", b="2")<|eom_id|>' in text_of(template, TOOL_CHAT, builtin_tools=["add"])
    with pytest.raises(jinja2.TemplateError, match="one tool call"):
        text_of(template, [TOOL_CHAT[0], TOOL_CHAT[1] | {"tool_calls": TOOL_CHAT[1]["tool_calls"] * 2}])


def test_mistral_puts_system_text_before_the_last_user_message():
    messages = chat("red", "blue", "a", "b", system="S.")
    for name, answered in (("mistral", "[INST] a[/INST] b</s>"), ("mistral_last_user", "[INST] S.\n\na[/INST] b</s>")):
        earlier = "<s>[INST] red[/INST] blue</s>"
        assert text_of(TEMPLATES[name], messages[:-1], prompt=True) == earlier + "[INST] S.\n\na[/INST]"
        assert text_of(TEMPLATES[name], messages) == earlier + answered
    assert text_of(TEMPLATES["mistral"], TOOL_CHAT[:3], tools=TOOLS).endswith(
        '[/AVAILABLE_TOOLS][INST] add 1 2[/INST][TOOL_CALLS] [{"name": "add", "arguments": {"a": "1", "b": "2"}, '
        '"id": "call12345"}]</s>[TOOL_RESULTS] {"content": 3, "call_id": "call12345"}[/TOOL_RESULTS]'
    )


def test_qwen3_thinks_after_the_last_question_only():
    template = TEMPLATES["qwen3"]
    empty = "<think>\n\n</think>\n\n"
    assert text_of(template, PLAIN).count(empty) == 1
    assert text_of(template, PLAIN).endswith(f"{empty}one two three<|im_end|>\n")
    assert text_of(template, PLAIN[:1], prompt=True, enable_thinking=False).endswith(f"assistant\n{empty}")
    assert text_of(template, PLAIN[:1], prompt=True, enable_thinking=True).endswith("assistant\n")
    stored = text_of(template, chat("a", "<think>\nred\n</think>\n\nb", "c", "<think>\nblue\n</think>\n\nd"))
    assert "red" not in stored and stored.endswith("<think>\nblue\n</think>\n\nd<|im_end|>\n")
    named = [*chat("c"), {"role": "assistant", "content": "d", "reasoning_content": "blue"}]
    assert text_of(template, named).endswith("<think>\nblue\n</think>\n\nd<|im_end|>\n")
    assert text_of(template, TOOL_CHAT, tools=TOOLS).endswith(
        'assistant\n<tool_call>\n{"name": "add", "arguments": {"a": "1", "b": "2"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        f"<|im_start|>assistant\n{empty}It is 3.<|im_end|>\n"
    )


def test_r1_drops_stored_thoughts_and_opens_new_ones():
    text = text_of(TEMPLATES["r1"], chat("a", "<think>\nred\n</think>\n\nb", "c"), prompt=True)
    assert (
        text
        == "<｜begin▁of▁sentence｜><｜User｜>a<｜Assistant｜>\n\nb<｜end▁of▁sentence｜><｜User｜>c<｜Assistant｜><think>\n"
    )


def test_phi_3_ends_the_text_by_eos_unless_it_prompts():
    assert text_of(TEMPLATES["phi3"], PLAIN[:2]).endswith("blue<|end|>\n<|endoftext|>")
    assert text_of(TEMPLATES["phi3"], PLAIN[:1], prompt=True) == "<|user|>\nred or blue?<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize(
    "said, arguments, silent",
    [
        (None, {}, False),
        (None, {"enable_thinking": False}, True),
        ("Be brief. /no_think", {}, True),
        ("Be brief. /think", {"enable_thinking": False}, False),
    ],
)
def test_smollm3_thinks_as_the_system_text_or_the_argument_says(said, arguments, silent):
    text = text_of(TEMPLATES["smollm3"], chat("a", system=said), prompt=True, **arguments)
    assert text.endswith("assistant\n<think>\n\n</think>\n" if silent else "assistant\n")
    assert "Be brief. /" not in text


def test_harmony_ends_the_last_turn_by_another_token():
    text = text_of(TEMPLATES["harmony"], PLAIN)
    assert "<|message|>blue<|end|>" in text and text.endswith("<|message|>one two three<|return|>")


@pytest.mark.parametrize(
    "name, learnt", [("masked", "blue<|im_end|>"), ("smollm3", "<|im_start|>assistant\nblue<|im_end|>\n")]
)
def test_generation_masks(name, learnt):
    made = tokenizer(TEMPLATES[name])
    encoded = made.apply_chat_template(PLAIN[:2], return_dict=True, return_assistant_tokens_mask=True)
    ids = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert made.decode(ids) == learnt


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_hold_the_tokens(kind):
    for template in TEMPLATES.values():
        made = tokenizer(template, kind=kind)
        assert len(made) <= 512
        for token in {*template.tokens, *template.plain_tokens, template.eos, template.bos} - {None}:
            ids = made.encode(f"a{token}b", add_special_tokens=False)
            assert ids.count(made.convert_tokens_to_ids(token)) == 1
            assert (token in made.decode(ids, skip_special_tokens=True)) == (token in template.plain_tokens)
        if kind != "legacy_llama" and not template.rstrip:
            text = text_of(template, PLAIN)
            read = made.decode(made.encode(text, add_special_tokens=False))
            assert read.replace("▁", " ") == text.replace("▁", " ")  # SentencePiece's decoder makes spaces in R1's tokens


@pytest.mark.parametrize(
    "kind, merged",
    [
        ("byte_level", [" blue", "\n\n"]),
        ("llama3_split", [" blue", "\n\n", ".\n"]),
        ("qwen_split", [" blue", "\n\n", ".\n"]),
        ("metaspace", ["blue", "dog.\n"]),
        ("legacy_llama", ["blue"]),
        ("gemma", [" blue", "\n\n", ".\n"]),
    ],
)
def test_pieces_span_the_borders_of_words_and_lines(kind, merged):
    made = tokenizer(TEMPLATES["chatml"], kind=kind)
    for text in merged:
        assert len(made.encode(text)) == 1
