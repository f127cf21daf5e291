"""Chats of the usual dataset formats become the same messages; what does not fit is named by message."""

import json

import pytest
from chat_templates import TOOL_CHAT, TOOLS
from data_helpers import message_of

from neuroada_jax.data.chats import Chat, is_chat, read_chat

MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "a"},
]
CALL = {"name": "add", "arguments": {"a": "1", "b": "2"}}


def test_formats_of_the_same_chat():
    chat = Chat(MESSAGES, None, (2,))
    turns = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    assert read_chat({"messages": MESSAGES}, "here") == chat
    assert read_chat({"messages": MESSAGES[1:], "system": "s"}, "here") == chat
    assert read_chat({"conversations": [{"from": "system", "value": "s"}, *turns]}, "here") == chat
    assert read_chat({"conversations": turns, "system": "s", "messages": None}, "here") == chat
    assert read_chat({"conversations": MESSAGES}, "here") == chat
    assert read_chat({"prompt": MESSAGES[:2], "completion": MESSAGES[2:]}, "here") == chat
    parts = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in MESSAGES]
    assert read_chat({"messages": parts}, "here") == chat
    both = [
        {"from": a, "value": b, "role": None, "content": None} for a, b in (("system", "s"), ("human", "u"), ("gpt", "a"))
    ]
    assert read_chat({"conversations": both}, "here") == chat
    other = [{**each, "from": None, "value": None} for each in MESSAGES]
    assert read_chat({"conversations": other}, "here") == chat
    assert read_chat({"messages": None, "text": "hello"}, "here") is None
    assert read_chat({"prompt": "p", "completion": "c", "messages": None}, "here") is None
    assert not is_chat({"instruction": "i", "output": "o", "conversations": None})


def test_turns_that_are_learnt():
    longer = [*MESSAGES, MESSAGES[1], {**MESSAGES[2], "weight": 0}, MESSAGES[1], {**MESSAGES[2], "weight": 1.0}]
    chat = read_chat({"messages": longer}, "here")
    assert chat is not None
    assert chat.learnt == (2, 6)
    assert all("weight" not in message for message in chat.messages)
    asked = read_chat({"prompt": longer[:5], "completion": longer[5:]}, "here")  # the answers of the prompt are given
    assert asked is not None
    assert asked.learnt == (6,)


def test_tools_and_calls_in_their_formats():
    chat = read_chat({"messages": TOOL_CHAT, "tools": TOOLS}, "here")
    assert chat is not None
    assert chat == read_chat({"messages": TOOL_CHAT, "tools": json.dumps(TOOLS)}, "here")
    assert chat.messages[1]["content"] is None
    call = chat.messages[1]["tool_calls"][0]
    assert call["function"]["arguments"] == {"a": "1", "b": "2"}
    text = {
        "id": call["id"],
        "type": "function",
        "function": {"name": "add", "arguments": json.dumps({"a": "1", "b": "2"})},
    }
    as_text = [TOOL_CHAT[0], {**TOOL_CHAT[1], "tool_calls": [text]}, *TOOL_CHAT[2:]]
    assert read_chat({"messages": as_text, "tools": TOOLS}, "here") == chat
    shared = [
        {"from": "human", "value": "add 1 2"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "It is 3."},
    ]
    found = read_chat({"conversations": shared, "tools": json.dumps(TOOLS)}, "here")
    assert found is not None
    assert [message["role"] for message in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1]["tool_calls"] == [{"type": "function", "function": CALL}]
    assert found.learnt == (1, 3)


USER = {"role": "user", "content": "u"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"messages": [{"role": "usr", "content": "u"}]},
            "messages[0].role is 'usr', expected one of system, developer, user",
        ),
        ({"conversations": [{"from": "alien", "value": "u"}]}, "conversations[0].from is 'alien', expected one of system"),
        ({"conversations": [{"from": "human"}]}, "conversations[0].value is missing, expected a string"),
        (
            {"conversations": []},
            "field 'conversations' is an empty list, expected a list of objects with 'from' and 'value'",
        ),
        ({"messages": [{"role": "user", "content": "  "}]}, "messages[0].content is empty, expected the text of the turn"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "messages[1].content is empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1].content is null, expected a string"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content is missing, expected a string"),
        ({"messages": [{**USER, "weight": 0}]}, "messages[0].weight: found on a message of role 'user'"),
        ({"messages": [USER, {**MESSAGES[2], "weight": 0.5}]}, "messages[1].weight is 0.5, expected 0 (not learnt) or 1"),
        ({"messages": [USER, {**MESSAGES[2], "weight": True}]}, "messages[1].weight is True, expected 0"),
        ({"messages": [{**USER, "tool_calls": [CALL]}]}, "messages[0].tool_calls: found on a message of role 'user'"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]},
            "messages[1].tool_calls[0]: expected an object with",
        ),
        ({"messages": [USER, {"role": "assistant", "tool_calls": "add"}]}, "messages[1].tool_calls is a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0] is of type 'image'"),
        ({"messages": [{"role": "user", "content": ["u"]}]}, "messages[0].content[0] is a string"),
        ({"messages": [USER, {**MESSAGES[2], "function_call": CALL}]}, "messages[1].function_call: found OpenAI's former"),
        ({"messages": MESSAGES, "system": "s"}, "found a field 'system' and a system message"),
        ({"messages": MESSAGES, "tools": "add"}, "field 'tools' is not valid JSON"),
        ({"messages": MESSAGES, "tools": {"name": "add"}}, "field 'tools' is an object, expected a list"),
        ({"messages": MESSAGES[2:]}, "messages[0].role is 'assistant', expected a system or user message first"),
        ({"prompt": [USER], "completion": "c"}, "field 'completion' is a string, expected a list"),
        ({"prompt": [], "completion": []}, "field 'prompt' is an empty list"),
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "function_call", "value": "add("}]},
            "not valid JSON",
        ),
    ],
)
def test_what_does_not_fit_is_named(row, says):
    message = message_of(read_chat, row, "rows.jsonl:3")
    assert message.startswith("rows.jsonl:3: ")
    assert says in message
