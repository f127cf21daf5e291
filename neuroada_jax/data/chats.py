"""Chats of the usual dataset formats as one kind of value: messages, tools, and the turns to learn.

Read are `messages` (OpenAI, transformers), `conversations` (ShareGPT: `from` and `value`, or `role` and `content`), and
`prompt` and `completion` as lists of messages (TRL).
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from neuroada_jax.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# ShareGPT's names, and those of its converters.
_ROLE_OF_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_CALLS = ("function_call", "tool_call")  # ShareGPT's names of an assistant turn whose value is one call or a list of calls
_FORMS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_OWN = {"weight", *(name for form in _FORMS.values() for name in form)}  # `datasets` adds the other form's as null


class Chat(NamedTuple):
    """A chat in the form that chat templates read.

    Attributes:
      messages: dicts with a `role` and mostly a `content`; without `weight`.
      tools: JSON schemas of functions; None where the row has none.
      learnt: indices of the assistant messages that are learnt, ascending: those whose `weight` is not 0.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    learnt: tuple[int, ...]

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The messages before an answer: all but a final one of the assistant."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages


def is_chat(row: Mapping[str, Any]) -> bool:
    """Return whether the row holds a chat, so that its text comes from the chat template in any style."""
    return _field(row) is not None


def _field(row: Mapping[str, Any]) -> str | None:
    """Return the field that holds the row's chat. `datasets` stores a field that a row lacks as null."""
    for field in _FORMS:
        if row.get(field) is not None:
            return field
    if isinstance(row.get("prompt"), list):
        return "prompt"
    return next((field for field in _FORMS if field in row and not row.keys() & {"prompt", "instruction", "text"}), None)


def read_chat(row: Mapping[str, Any], where: str) -> Chat | None:
    """Return the row's chat, None where it holds none.

    Args:
      row: a row of a file; a text field `system` becomes the first message, and `tools` is a list or its JSON.
      where: the row's place for error messages.

    Raises:
      UserError: an empty chat or turn, an unknown role, a field of another type; names the message and what is expected.
    """
    field = _field(row)
    if field is None:
        return None
    found = _list(row, field, where)
    completion: list[Any] = []
    if field == "prompt" and row.get("completion") is not None:
        completion = _list(row, "completion", where)
    messages, learnt = [], []
    for i, each in enumerate([*found, *completion]):
        place = f"{where}: {field}[{i}]" if i < len(found) else f"{where}: completion[{i - len(found)}]"
        message, weight = _message(each, _FORMS.get(field, _FORMS["messages"]), place)
        messages.append(message)
        if message["role"] == "assistant" and weight and (not completion or i >= len(found)):
            learnt.append(i)
    chat = with_system(row, Chat(messages, read_tools(row, where), tuple(learnt)), where)
    if chat.messages[0]["role"] == "assistant":
        # Its prompt would be a chat without messages, for which chat templates are not defined.
        raise UserError(f"{where}: {field}[0].role is 'assistant', expected a system or user message first")
    return chat


def with_system(row: Mapping[str, Any], chat: Chat, where: str) -> Chat:
    """Return the chat with the text of the row's own field `system` as its first message.

    Raises:
      UserError: the field is no text, or the chat has a system message too.
    """
    text = row.get("system")
    if text is None or text == "":
        return chat
    if not isinstance(text, str):
        raise UserError(f"{where}: field 'system' is {kind_of(text)}, expected a string")
    if chat.messages[0]["role"] == "system":
        raise UserError(f"{where}: found a field 'system' and a system message, expected one of them")
    messages = [{"role": "system", "content": text}, *chat.messages]
    return chat._replace(messages=messages, learnt=tuple(i + 1 for i in chat.learnt))


def _list(row: Mapping[str, Any], field: str, where: str) -> list[Any]:
    found, (role, content) = row[field], _FORMS.get(field, _FORMS["messages"])
    if not isinstance(found, list) or not found:
        kind = "an empty list" if found == [] else kind_of(found)
        raise UserError(f"{where}: field {field!r} is {kind}, expected a list of objects with {role!r} and {content!r}")
    return found


def _message(found: Any, names: tuple[str, str], where: str) -> tuple[dict[str, Any], int]:
    """Return a message in the templates' form, and its weight."""
    if not isinstance(found, Mapping):
        raise UserError(f"{where} is {kind_of(found)}, expected an object with {names[0]!r} and {names[1]!r}")
    # ShareGPT's field names also hold the usual ones in some sets.
    role_name, content_name = names if found.get(names[0]) is not None or "role" not in found else _FORMS["messages"]
    rest = {key: value for key, value in found.items() if key not in _OWN}
    role, content, calls = found.get(role_name), found.get(content_name), found.get("tool_calls")
    if found.get("function_call") is not None:
        raise UserError(f"{where}.function_call: found OpenAI's former field, expected a call in 'tool_calls'")
    if not isinstance(role, str):
        raise UserError(f"{where}.{role_name} is {kind_of(role) if role_name in found else 'missing'}, expected a string")
    if role in _CALLS and role_name == "from":
        role, content, calls = "assistant", None, _json(content, f"{where}.{content_name}", "a call as JSON")
    role = _ROLE_OF_SHAREGPT.get(role, role) if role_name == "from" else role
    if role not in ROLES:
        known = ROLES if role_name == "role" else (*ROLES, *_ROLE_OF_SHAREGPT, *_CALLS)
        raise UserError(f"{where}.{role_name} is {role!r}, expected one of {', '.join(known)}")
    message = {
        "role": role,
        "content": _text(content, f"{where}.{content_name}", content_name in found, bool(calls)),
    } | rest
    if calls is not None:
        message["tool_calls"] = _calls(calls, role, f"{where}.tool_calls")
    return message, _weight(found, role, where)


def _weight(message: Mapping[str, Any], role: str, where: str) -> int:
    """Return whether a turn is learnt: 1, or 0 as in OpenAI's format."""
    weight = message.get("weight")
    if weight is None:
        return 1
    if role != "assistant":
        raise UserError(f"{where}.weight: found on a message of role {role!r}, expected on assistant messages alone")
    if type(weight) not in (int, float) or weight not in (0, 1):
        raise UserError(f"{where}.weight is {weight!r}, expected 0 (not learnt) or 1")
    return int(weight)


def _text(content: Any, where: str, given: bool, optional: bool) -> str | None:
    """Return the text of a message; null only beside tool calls."""
    if isinstance(content, list):  # parts, as in the OpenAI format
        content = "".join(_part(part, f"{where}[{i}]") for i, part in enumerate(content))
    if content is None and optional:
        return None
    if not isinstance(content, str):
        raise UserError(f"{where} is {kind_of(content) if given else 'missing'}, expected a string")
    if not content.strip() and not optional:
        raise UserError(f"{where} is empty, expected the text of the turn")
    return content


def _part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = f"of type {part.get('type')!r}" if isinstance(part, Mapping) else kind_of(part)
        raise UserError(f"{where} is {kind}, expected an object of type 'text' with 'text' (models here read text alone)")
    return str(part["text"])


def _calls(found: Any, role: str, where: str) -> list[dict[str, Any]]:
    """Return tool calls with their arguments as objects, which chat templates write in their own form."""
    if role != "assistant":
        raise UserError(f"{where}: found on a message of role {role!r}, expected on assistant messages alone")
    calls = [found] if isinstance(found, Mapping) else found
    if not isinstance(calls, list):
        raise UserError(f"{where} is {kind_of(found)}, expected a list of calls")
    result = []
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}[{i}]: expected an object with 'function', which has 'name' and 'arguments'")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments or "{}", f"{where}[{i}].function.arguments", "an object or its JSON")
        result.append({"type": "function", **call, "function": {**function, "arguments": arguments}})
        if function is call:
            result[-1] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return result


def read_tools(row: Mapping[str, Any], where: str) -> list[Any] | None:
    """Return the row's tools, a list of JSON schemas or its JSON; None where it has none.

    Raises:
      UserError: they are neither.
    """
    found = row.get("tools")
    if isinstance(found, str):  # parquet files and ShareGPT hold the list as JSON
        found = _json(found, f"{where}: field 'tools'", "a list of tools or its JSON") if found.strip() else None
    if found is None or found == []:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        raise UserError(f"{where}: field 'tools' is {kind_of(found)}, expected a list of JSON schemas of functions")
    return found


def _json(text: Any, where: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}), expected {expected}") from error


def kind_of(value: object) -> str:
    """Return what a value of a JSON file is, in words."""
    known = {int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object", str: "a string"}
    return "null" if value is None else known.get(type(value), f"a {type(value).__name__}")
