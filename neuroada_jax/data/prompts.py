"""From rows to text: the prompt, and the characters that the model learns to produce."""

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from neuroada_jax.data.chat_template import ChatTemplate
from neuroada_jax.data.chats import Chat, is_chat, kind_of, read_chat, read_tools, with_system
from neuroada_jax.errors import UserError

EXPECTED_FIELDS = (
    "'messages' or 'conversations', or 'prompt' and 'completion', or 'instruction' and 'output' (and perhaps 'input'), or "
    "'text'"
)
_THOUGHTS_END = "</think>"
# Fields of rows that other libraries read, and that would change a prompt.
_FIELDS_OF_OTHERS = {
    "chat_template_kwargs": "give data.template_arguments, which hold for all rows",
    "documents": "put them into a message",
    "functions": "give 'tools'",
}

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
      system: text of the system message that chats without one get; None: they get none.
      text: of an encoder's task on rows of one's own, the columns of the text, or of the pair of texts.
      label: of such a task, the column of the label; None where every label has a column of its own.
      metric: of such a task, the main metric.
    """

    style: PromptStyle = PromptStyle.VERBATIM
    chat_template: str | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    task: str | None = None
    end_tokens: tuple[str, ...] = ()
    system: str | None = None
    text: tuple[str, ...] = ()
    label: str | None = None
    metric: str | None = None

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
      masked: whether the spans are the {% generation %} blocks of a chat template, to be labelled exactly.
      asked: whether every span begins in or right after the prompt of a generation; only a masked text may differ.
    """

    text: str
    spans: list[tuple[int, int]]
    templated: bool
    masked: bool = False
    asked: bool = True


def render_prompt(row: Mapping, form: PromptForm | PromptStyle | str, tokenizer: Any, where: str = "row") -> str:
    """Return the text that a model continues. The row needs no completion.

    For a chat, this is every message except a final one of the assistant, and then the opening of an assistant turn.

    Args:
      row: with the fields of a chat, a prompt or an instruction.
      form: prompt form, or a style.
      tokenizer: for its chat template.
      where: the row's place for error messages, such as `Rows.where(i)`.

    Raises:
      UserError: no known fields, a field that is missing or not a string, no chat template, or one that fails.
    """
    form = PromptForm.of(form)
    chat = _chat(row, form, where)
    if chat is None:
        return _prompt(row, form.style, where)
    template = chat_template(form, tokenizer, where)
    template.check(chat, where)
    text = template.render(chat, chat.asked, where, opened=True)
    template.check_text(chat._replace(messages=chat.asked), text, where, opened=True)
    return text


def chat_template(form: PromptForm, tokenizer: Any, where: str = "row") -> ChatTemplate:
    """Return the chat template of a form.

    Raises:
      UserError: there is none, it is not valid, or it does not read the form's arguments.
    """
    try:
        return ChatTemplate(tokenizer, form.chat_template, form.template_arguments, form.date)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def is_templated(row: Mapping, form: PromptForm | PromptStyle | str) -> bool:
    """Return whether the row's text comes from the chat template."""
    return is_chat(row) or (PromptForm.of(form).style is PromptStyle.CHAT and not is_text(row))


def is_text(row: Mapping) -> bool:
    """Return whether the row is a text that is learnt as it is; `datasets` stores a field that a row lacks as null."""
    others = ("prompt", "completion", "instruction", "output")
    return "text" in row and not is_chat(row) and all(row.get(field) is None for field in others)


def kind_of_row(row: Mapping) -> str:
    """Return which fields a row has, in words."""
    if is_chat(row):
        return "a chat"
    if is_text(row):
        return "a text"
    return "an instruction" if _is_instruction(row) else "a prompt"


def render_examples(
    row: Mapping,
    form: PromptForm | PromptStyle | str,
    tokenizer: Any,
    where: str = "row",
    learn: Literal["all", "last"] = "all",
    template: ChatTemplate | None = None,
) -> list[Rendered]:
    """Return prompt and completion as one text; for some chats, as one text for each turn.

    A chat is one text with all its learnt turns where that text begins, up to every such turn, exactly as the turn is asked
    in a generation. Where the template writes a turn differently once later text follows (Qwen3 drops the thoughts of
    earlier turns, Mistral moves the system text), every learnt turn becomes a text of its own. A row with a field `text`
    alone is that text, learnt from its first character on, in any style; an empty one is no text.

    Args:
      row: as for `render_prompt`, with a completion.
      form: prompt form, or a style.
      tokenizer: for its chat template.
      where: the row's place for error messages.
      learn: "all" turns of a chat, or the "last".
      template: the form's `chat_template`, where it has been made for other rows; None: it is made for this one.

    Raises:
      UserError: as `render_prompt`, and for a missing completion, or a chat without a turn to learn.
    """
    form = PromptForm.of(form)
    if is_text(row):
        text = _string(row, "text", where)
        return [Rendered(text, [(0, len(text))], False)] if text else []
    if not is_templated(row, form):
        prompt, completion = _prompt(row, form.style, where), _completion(row, where)
        return [Rendered(prompt + completion, [(len(prompt), len(prompt) + len(completion))], False)]
    chat = _chat(row, form, where, _completion)
    assert chat is not None
    if not chat.learnt:
        roles = ", ".join(message["role"] for message in chat.messages)
        reason = "no assistant turn" if "assistant" not in roles else "no assistant turn of a weight other than 0"
        raise UserError(f"{where}: the chat has {reason}, found {roles}; expected at least one to learn from")
    template = template or chat_template(form, tokenizer, where)
    template.check(chat, where)
    if template.masked:
        return [_masked(template, chat, where, learn)]
    learnt = chat.learnt if learn == "all" else chat.learnt[-1:]
    turns = template.turns(chat, learnt, where)
    texts = [turn.prompt + turn.answer for turn in turns]
    asked = chat._replace(messages=chat.messages[: learnt[-1]])
    template.check_text(asked, turns[-1].prompt, where, opened=True)
    if all(texts[-1].startswith(text) for text in texts):
        spans = [(len(turn.prompt), len(text)) for turn, text in zip(turns, texts, strict=True)]
        return [Rendered(texts[-1], spans, True)]
    return [Rendered(text, [(len(turn.prompt), len(text))], True) for turn, text in zip(turns, texts, strict=True)]


def _masked(template: ChatTemplate, chat: Chat, where: str, learn: str) -> Rendered:
    """Return a chat whose template marks what is learnt."""
    text, spans = template.masks(chat, where)
    template.check_text(chat, text, where, opened=False)
    turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if len(spans) != len(turns) and (learn == "last" or len(chat.learnt) < len(turns)):
        raise UserError(
            f"{where}: the chat template marks {len(spans)} {{% generation %}} blocks for {len(turns)} assistant turns; "
            "expected one a turn to choose among them"
        )
    asked = True
    if len(spans) == len(turns):
        chosen = chat.learnt if learn == "all" else chat.learnt[-1:]
        spans = [span for i, span in zip(turns, spans, strict=True) if i in chosen]
        for i, (start, _) in zip(chosen, spans, strict=True):
            prompt = template.render(chat, chat.messages[:i], where, opened=True)
            asked &= text.startswith(prompt) and start <= len(prompt)
    spans = [(start, stop) for start, stop in spans if stop > start]
    if not spans:
        raise UserError(f"{where}: the chat template's {{% generation %}} blocks are empty, expected text to learn")
    return Rendered(text, spans, True, masked=True, asked=asked)


def _chat(
    row: Mapping, form: PromptForm, where: str, completion: Callable[[Mapping, str], str] | None = None
) -> Chat | None:
    """Return the row's chat; in style chat, a prompt or instruction as one. None for other rows."""
    for name, instead in _FIELDS_OF_OTHERS.items():
        if row.get(name):
            raise UserError(f"{where}: field {name!r} is not read here; {instead}")
    chat = read_chat(row, where)
    if chat is None:
        if form.style is not PromptStyle.CHAT:
            return None
        messages = [{"role": "user", "content": _prompt(row, form.style, where)}]
        learnt: tuple[int, ...] = ()
        if completion is not None:
            messages.append({"role": "assistant", "content": completion(row, where)})
            learnt = (1,)
        chat = with_system(row, Chat(messages, read_tools(row, where), learnt), where)
    if form.system is None or chat.messages[0]["role"] in ("system", "developer"):
        return chat
    system = {"role": "system", "content": form.system}
    return chat._replace(messages=[system, *chat.messages], learnt=tuple(i + 1 for i in chat.learnt))


def _completion(row: Mapping, where: str) -> str:
    return _string(row, "output" if _is_instruction(row) else "completion", where)


def answer_text(ids: Sequence[int], tokenizer: Any) -> str:
    """Return the text of a generation after its block of thoughts, if it has one, without special tokens."""
    closing = tokenizer.get_added_vocab().get(_THOUGHTS_END)
    found = list(ids)
    if closing in found:  # where it is a special token, the text would not have it
        found = found[len(found) - found[::-1].index(closing) :]
    return str(tokenizer.decode(found, skip_special_tokens=True)).rpartition(_THOUGHTS_END)[2].lstrip("\n")


def _is_instruction(row: Mapping) -> bool:
    # `datasets` stores a field that a row lacks as null.
    return row.get("instruction") is not None and not (row.get("prompt") is not None and row.get("completion") is not None)


def _prompt(row: Mapping, style: PromptStyle | str, where: str) -> str:
    """Return the prompt text; for the chat style, the user's message."""
    style = PromptStyle(style)
    if row.get("system") and style is not PromptStyle.CHAT:
        raise UserError(
            f"{where}: field 'system' is for chats, and style {style.value!r} would leave it out; use style 'chat'"
        )
    if _is_instruction(row):
        instruction = _string(row, "instruction", where)
        extra = "" if row.get("input") is None else _string(row, "input", where)
    elif "prompt" in row:
        instruction, extra = _string(row, "prompt", where), ""
    elif is_text(row):
        raise UserError(f"{where}: a row of a text alone has no prompt, expected fields with a prompt and its answer")
    else:
        raise UserError(f"{where}: found fields {_fields(row)}; expected {EXPECTED_FIELDS}")
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
        raise UserError(f"{where}: field {field!r} is {kind_of(row[field])}, expected a string")
    return row[field]


def _fields(row: Mapping) -> str:
    return ", ".join(str(name) for name, value in row.items() if value is not None) or "none"
