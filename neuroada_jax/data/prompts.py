"""From rows to text: the prompt, and the characters that the model learns to produce."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jinja2

from neuroada_jax.errors import UserError

EXPECTED_FIELDS = "'messages', or 'prompt' and 'completion', or 'instruction' and 'output' (and perhaps 'input')"

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
    """Way in which instruction and prompt/completion rows become prompts.

    Rows with `messages` use the chat template in any style. A prompt/completion row is read as an instruction without
    input, so `verbatim` leaves its prompt unchanged.

    Attributes:
      PLAIN: the instruction, a newline and the input if there is one, a newline (the commonsense prompt of NeuroAda and
        LoReFT).
      ALPACA: the Stanford Alpaca templates, with or without input.
      CHAT: the tokenizer's chat template with one user and one assistant message.
      VERBATIM: the prompt as in the row (the instruction, and a newline and the input if there is one).
    """

    PLAIN = "plain"
    ALPACA = "alpaca"
    CHAT = "chat"
    VERBATIM = "verbatim"

    @classmethod
    def _missing_(cls, value: object) -> "PromptStyle":
        raise UserError(f"prompt style: found {value!r}, expected one of {', '.join(style.value for style in cls)}")


@dataclass(frozen=True)
class PromptForm:
    """The text that stands around rows, in training, evaluation and generation alike.

    Attributes:
      style: prompt style.
      chat_template: text of the chat template; None: the tokenizer's own.
      template_arguments: values of the variables that the chat template reads, such as {"enable_thinking": False}.
      date: "YYYY-MM-DD", the day that a dated chat template writes; None: today.
      task: name of the task that the rows belong to; None if unknown.
      end_tokens: the texts of the tokens that end what was learnt, each one token; a generation ends at any of them too.
    """

    style: PromptStyle = PromptStyle.VERBATIM
    chat_template: str | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    task: str | None = None
    end_tokens: tuple[str, ...] = ()

    @classmethod
    def of(cls, form: "PromptForm | PromptStyle | str") -> "PromptForm":
        """Return the form, or the form of a style.

        Raises:
          UserError: an unknown style.
        """
        return form if isinstance(form, PromptForm) else cls(PromptStyle(form))


class Rendered(NamedTuple):
    """A complete example as text.

    Attributes:
      text: prompt and completion.
      spans: [start, end) character ranges of the completions, whose tokens become labels; ascending.
      templated: whether the text came from a chat template, which has written its special tokens already.
    """

    text: str
    spans: list[tuple[int, int]]
    templated: bool


def render_prompt(row: Mapping, style: PromptStyle | str, tokenizer: Any, where: str = "row") -> str:
    """Return the text that a model continues. The row needs no completion.

    For a chat, this is every message except a final one of the assistant, and then the opening of an assistant turn.

    Args:
      row: with the fields of a chat, a prompt or an instruction.
      style: prompt style.
      tokenizer: for its chat template.
      where: the row's place for error messages, such as `Rows.where(i)`.

    Raises:
      UserError: no known fields, a field that is missing or not a string, no chat template, or one that fails.
    """
    if "messages" in row:
        messages = _messages(row, where)
        return _apply(tokenizer, messages[:-1] if messages[-1]["role"] == "assistant" else messages, True, where)
    prompt = _prompt(row, style, where)
    if PromptStyle(style) is PromptStyle.CHAT:
        return _apply(tokenizer, [{"role": "user", "content": prompt}], True, where)
    return prompt


def is_templated(row: Mapping, style: PromptStyle | str) -> bool:
    """Return whether the row's text comes from the tokenizer's chat template."""
    return "messages" in row or PromptStyle(style) is PromptStyle.CHAT


def render_example(row: Mapping, style: PromptStyle | str, tokenizer: Any, where: str = "row") -> Rendered:
    """Return prompt and completion as one text.

    Raises:
      UserError: as `render_prompt`, and for a missing completion.
    """
    if "messages" in row:
        return _render_chat(tokenizer, _messages(row, where), where)
    prompt = _prompt(row, style, where)
    completion = _string(row, "output" if _is_instruction(row) else "completion", where)
    if PromptStyle(style) is PromptStyle.CHAT:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _render_chat(tokenizer, turns, where)
    return Rendered(prompt + completion, [(len(prompt), len(prompt) + len(completion))], False)


def _render_chat(tokenizer: Any, messages: list[dict], where: str) -> Rendered:
    """Render a chat and find its assistant turns.

    Turn i lies between the end of the chat before it, with the assistant's turn opened, and the end of the chat with it.
    White space that the template writes after the end-of-turn token is formatting and not part of the turn.
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
                "later text follows), so the assistant's tokens cannot be found; use another template or style"
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
    """Return the prompt text; for the chat style, the user's message."""
    if _is_instruction(row):
        instruction = _string(row, "instruction", where)
        # `datasets` stores a field that a row lacks as null.
        extra = "" if row.get("input") is None else _string(row, "input", where)
    elif "prompt" in row:
        instruction, extra = _string(row, "prompt", where), ""
    else:
        raise UserError(f"{where}: found fields {_fields(row)}; expected {EXPECTED_FIELDS}")
    style = PromptStyle(style)
    if style is PromptStyle.ALPACA:
        # replace, not format: braces in the row's own text are no placeholders
        template = ALPACA_WITH_INPUT if extra else ALPACA_NO_INPUT
        head, tail = template.split("{instruction}")
        return head + instruction + tail.replace("{input}", extra)
    body = instruction + ("\n" + extra if extra else "")
    return body + "\n" if style is PromptStyle.PLAIN else body


def _string(row: Mapping, field: str, where: str) -> str:
    if field not in row:
        raise UserError(f"{where}: no field {field!r}, found fields {_fields(row)}; expected {EXPECTED_FIELDS}")
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
        # Its prompt would be a chat without messages, for which chat templates are not defined.
        raise UserError(f"{where}: messages[0].role is 'assistant', expected a system or user message first")
    return messages


def _fields(row: Mapping) -> str:
    return ", ".join(map(str, row)) or "none"


def _kind(value: object) -> str:
    known = {int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object", str: "a string"}
    return "null" if value is None else known.get(type(value), f"a {type(value).__name__}")
