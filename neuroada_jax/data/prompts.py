"""A row becomes text: what the model is given, and which characters of it the model has to produce."""

import enum
from collections.abc import Mapping
from typing import Any, NamedTuple

import jinja2

from neuroada_jax.errors import UserError

EXPECTED_COLUMNS = "'messages', or 'prompt' and 'completion', or 'instruction' and 'output' (and perhaps 'input')"

ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


class PromptStyle(enum.StrEnum):
    """How instruction and prompt/completion rows become prompts; `messages` rows use the chat template in any style.

    A prompt/completion row is read as an instruction without input, so `verbatim` is the style that leaves it alone.

    plain: instruction, a newline and the input if there is one, a newline (NeuroAda's and LoReFT's commonsense prompt).
    alpaca: the Stanford Alpaca templates, with or without input.
    chat: the tokenizer's chat template around one user and one assistant message.
    verbatim: the prompt as it is in the row (instruction, and newline and input if there is one).
    """

    PLAIN = "plain"
    ALPACA = "alpaca"
    CHAT = "chat"
    VERBATIM = "verbatim"

    @classmethod
    def _missing_(cls, value: object) -> "PromptStyle":
        raise UserError(f"prompt style: found {value!r}, expected one of {', '.join(style.value for style in cls)}")


class Rendered(NamedTuple):
    """A whole example as text.

    spans: [start, end) character ranges of the targets, ascending.
    templated: the text came from a chat template, so its special tokens are already written out in it.
    """

    text: str
    spans: list[tuple[int, int]]
    templated: bool


def render_prompt(row: Mapping, style: PromptStyle | str, tokenizer: Any, where: str = "row") -> str:
    """The text a model is given to generate from; the target columns need not be there.

    A chat is given up to its last message if that is the assistant's, else whole, and then the opening of the
    assistant's turn. where: how messages name the row, such as `Rows.where(i)`.

    Raises UserError: no known columns, a field missing or not a string, no chat template or one that fails.
    """
    if "messages" in row:
        messages = _messages(row, where)
        return _apply(tokenizer, messages[:-1] if messages[-1]["role"] == "assistant" else messages, True, where)
    prompt = _prompt(row, style, where)
    if PromptStyle(style) is PromptStyle.CHAT:
        return _apply(tokenizer, [{"role": "user", "content": prompt}], True, where)
    return prompt


def is_templated(row: Mapping, style: PromptStyle | str) -> bool:
    """True if the row's text comes from the tokenizer's chat template."""
    return "messages" in row or PromptStyle(style) is PromptStyle.CHAT


def render_example(row: Mapping, style: PromptStyle | str, tokenizer: Any, where: str = "row") -> Rendered:
    """Prompt and target as one text. Raises UserError as `render_prompt` does, and for missing targets."""
    if "messages" in row:
        return _render_chat(tokenizer, _messages(row, where), where)
    prompt = _prompt(row, style, where)
    target = _string(row, "output" if _is_instruction(row) else "completion", where)
    if PromptStyle(style) is PromptStyle.CHAT:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": target}]
        return _render_chat(tokenizer, turns, where)
    return Rendered(prompt + target, [(len(prompt), len(prompt) + len(target))], False)


def _render_chat(tokenizer: Any, messages: list[dict], where: str) -> Rendered:
    """Assistant turn i lies between the chat before it, opened for the assistant, and the chat including it.

    White space that the template puts after the end-of-turn token belongs to the layout and is no target.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"{where}: 'messages' has no assistant turn, found {roles}; expected at least one to learn from")
    text = _apply(tokenizer, messages, False, where)
    spans = []
    for i in turns:
        before = _apply(tokenizer, messages[:i], True, where)
        upto = text if i + 1 == len(messages) else _apply(tokenizer, messages[: i + 1], False, where)
        if not (upto.startswith(before) and text.startswith(upto)):
            raise UserError(
                f"{where}: the tokenizer's chat template is not prefix-stable (it writes message {i} differently once "
                "later text follows), so the assistant's tokens cannot be told apart; use another template or style"
            )
        spans.append((len(before), max(len(before), len(upto.rstrip()))))
    return Rendered(text, spans, True)


def _apply(tokenizer: Any, messages: list[dict], add_generation_prompt: bool, where: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where}: the row or style asks for chat, but the tokenizer has no chat template; "
            "expected one, or another prompt style on rows without 'messages'"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{where}: the tokenizer's chat template refuses this chat ({reason})") from error


def _is_instruction(row: Mapping) -> bool:
    return "instruction" in row and not ("prompt" in row and "completion" in row)


def _prompt(row: Mapping, style: PromptStyle | str, where: str) -> str:
    """The prompt text; for the chat style, the user's message."""
    if _is_instruction(row):
        instruction = _string(row, "instruction", where)
        # `datasets` writes a column that a row lacks as null.
        extra = "" if row.get("input") is None else _string(row, "input", where)
    elif "prompt" in row:
        instruction, extra = _string(row, "prompt", where), ""
    else:
        raise UserError(f"{where}: found columns {_columns(row)}; expected {EXPECTED_COLUMNS}")
    style = PromptStyle(style)
    if style is PromptStyle.ALPACA:
        # replace, not format: nothing in the row's own text is a placeholder
        template = ALPACA_WITH_INPUT if extra else ALPACA_NO_INPUT
        head, tail = template.split("{instruction}")
        return head + instruction + tail.replace("{input}", extra)
    body = instruction + ("\n" + extra if extra else "")
    return body + "\n" if style is PromptStyle.PLAIN else body


def _string(row: Mapping, field: str, where: str) -> str:
    if field not in row:
        raise UserError(f"{where}: no field {field!r}, found columns {_columns(row)}; expected {EXPECTED_COLUMNS}")
    if not isinstance(row[field], str):
        raise UserError(f"{where}: field {field!r} is {_kind(row[field])}, expected a string")
    return row[field]


def _messages(row: Mapping, where: str) -> list[dict]:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else _kind(messages)
        raise UserError(f"{where}: field 'messages' is {found}, expected a list of objects with 'role' and 'content'")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"{where}: messages[{i}] is {_kind(message)}, expected an object with 'role' and 'content'")
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                found = _kind(message[field]) if field in message else "missing"
                raise UserError(f"{where}: messages[{i}].{field} is {found}, expected a string")
    if messages[0]["role"] == "assistant":
        # Nothing to render before it: chat templates are not defined for a chat of no messages.
        raise UserError(f"{where}: messages[0].role is 'assistant', expected a system or user message first")
    return messages


def _columns(row: Mapping) -> str:
    return ", ".join(map(str, row)) or "none"


def _kind(value: object) -> str:
    known = {int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object", str: "a string"}
    return "null" if value is None else known.get(type(value), f"a {type(value).__name__}")
