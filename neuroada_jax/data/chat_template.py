"""Chat templates: rendering, and the exact texts that are asked and answered for every turn of a chat."""

import ast
import contextlib
import datetime
import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from neuroada_jax import files
from neuroada_jax.data import sandbox
from neuroada_jax.data.chats import Chat
from neuroada_jax.data.template_facts import TOKEN_LIKE, parsed
from neuroada_jax.errors import UserError

# The date that a template writes, with its format as a constant.
_NOW = re.compile(r"""strftime_now\s*\(\s*(?:format\s*=\s*)?("[^"]*"|'[^']*')\s*\)""")
_ENDED = re.compile(rf"\s*(?:\Z|{TOKEN_LIKE.pattern})")
_STAND_IN = "neuroada stand-in 7f3a"
_OPENED_THOUGHTS = re.compile(r"<([a-z_]+)>\s*\Z")


class Turn(NamedTuple):
    """An assistant turn: the text before it, exactly as a generation is asked, and the text to learn, with its end."""

    prompt: str
    answer: str


@functools.cache
def _reserved() -> frozenset[str]:
    """Return the names that `template_arguments` cannot set, since transformers or this module does."""
    from transformers import PreTrainedTokenizerBase

    return frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"kwargs"} | {"messages"}


class ChatTemplate:
    """The chat template of a tokenizer, or another one in its place, with its arguments and its date.

    Attributes:
      source: the template's text, with the date in it where it writes one.
      masked: whether it marks what is learnt with {% generation %} blocks.
    """

    def __init__(self, tokenizer: Any, source: str | None, arguments: Mapping[str, Any], date: str | None) -> None:
        """Take a template.

        Args:
          tokenizer: writes its special tokens, and has a template of its own.
          source: text of the template; None: the tokenizer's own.
          arguments: values of the template's variables.
          date: "YYYY-MM-DD" for templates that write the date; None: today.

        Raises:
          UserError: no template, one that cannot be parsed, or arguments that it does not read.
        """
        self._tokenizer = tokenizer
        self._values = {**tokenizer.special_tokens_map, **arguments}
        self._rendered: dict[tuple[int, bool], str] = {}  # of the chat that `turns` is at
        self._given = source
        self._refused: sandbox.TooMuch | None = None
        self._date = datetime.date.fromisoformat(date) if date else datetime.date.today()
        default = self.source
        self._facts = parsed(default)
        # Not later, when another thread tokenises while this one renders.
        pieces = {
            token: len(tokenizer(token, add_special_tokens=False)["input_ids"]) for token in sorted(self._facts.tokens)
        }
        self._foreign = {token: count for token, count in pieces.items() if count > 1}
        self.masked = bool(sandbox.GENERATION.search(default))
        for name in arguments:
            if name in _reserved():
                raise UserError(f"template_arguments: {name!r} is set by the library itself; remove it")
            if name not in self._facts.variables:
                read = sorted(self._facts.options - _reserved() - set(tokenizer.special_tokens_map))
                raise UserError(
                    f"template_arguments: the chat template does not read {name!r}; it reads {', '.join(read) or 'none'}"
                )

    @functools.cached_property
    def source(self) -> str:
        """The template's text with its date."""
        return self._dated(None)

    @functools.cached_property
    def _for_tools(self) -> str:
        """The same for chats with tools, for which some tokenizers have another template."""
        return self._dated([])

    def _source(self, chat: Chat) -> str:
        return self.source if chat.tools is None else self._for_tools

    def _dated(self, tools: list[Any] | None) -> str:
        """Return a template with the date as text in it.

        Raises:
          UserError: there is no template, or it writes the date in a format that is no constant.
        """
        try:
            source = self._tokenizer.get_chat_template(self._given, tools)
        except ValueError as error:  # no template, or several of which none is the default
            raise UserError(
                "the row or style asks for chat, but the tokenizer has no chat template; expected one, data.chat_template, "
                "or another prompt style on rows without 'messages'"
            ) from error
        dated = _NOW.sub(lambda found: repr(self._date.strftime(ast.literal_eval(found[1]))), source)
        left = re.sub(r"strftime_now\s+is\s+(not\s+)?defined", "", _without_comments(dated))
        if "strftime_now" in left:
            raise UserError("the chat template calls strftime_now without a constant format: its date cannot be kept")
        return dated

    def render(self, chat: Chat, messages: list[dict[str, Any]], where: str, *, opened: bool) -> str:
        """Return the text of some messages of a chat, with or without the opening of an assistant turn.

        Raises:
          UserError: the template refuses or fails; in one line, with its own message.
        """
        return self._apply(chat, messages, where, opened, False)[0]

    def _apply(
        self, chat: Chat, messages: list[dict[str, Any]], where: str, opened: bool, masked: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and the character ranges of its {% generation %} blocks if they are asked for."""
        plain = _without_nulls(messages)
        for attempt in (plain, [{"content": "", **each} for each in plain]):
            try:
                rendered = self._call(chat, [attempt], opened=opened, masked=masked)
            except Exception as error:  # a template can divide by zero, add text to numbers, recurse, break outside a loop
                reason, cause = (str(error) or type(error).__name__).splitlines()[0], error
                continue
            return rendered[0][0], rendered[1][0] if masked else []
        raise UserError(f"{where}: the chat template refuses this chat ({reason})") from cause

    def _call(self, chat: Chat, attempts: list[list[dict[str, Any]]], *, opened: bool, masked: bool = False) -> Any:
        """Return (texts, ranges) of several beginnings of a chat, as transformers renders them."""
        if self._refused:
            raise self._refused
        try:
            rendered = self._within_bounds(chat, attempts, opened, masked)
        except sandbox.TooMuch as error:
            self._refused = error  # another try takes as long
            raise
        if files.has_half_characters(rendered[0]):
            raise ValueError("it writes half of a surrogate pair, such as \\ud83d")
        return rendered

    def _within_bounds(self, chat: Chat, attempts: list[list[dict[str, Any]]], opened: bool, masked: bool) -> Any:
        return sandbox.render(
            attempts,
            tools=chat.tools,
            chat_template=self._source(chat),
            return_assistant_tokens_mask=masked,
            add_generation_prompt=opened,
            **self._values,
        )

    def check(self, chat: Chat, where: str) -> None:
        """Refuse what the template would leave out in silence.

        Raises:
          UserError: tools, tool calls or thoughts that the template does not read; names the field.
        """
        words = parsed(self._source(chat)).words
        if chat.tools is not None and "tools" not in words:
            raise UserError(f"{where}: the chat template does not read the row's field 'tools'; expected one that does")
        for i, message in enumerate(chat.messages):
            for fields in (("tool_calls",), ("reasoning_content", "thinking", "reasoning")):
                found = next((field for field in fields if message.get(field)), None)
                if found and not words.intersection(fields):
                    raise UserError(
                        f"{where}: the chat template does not read {found!r} of message {i}; expected one that does"
                    )

    def check_text(self, chat: Chat, text: str, where: str, *, opened: bool) -> None:
        """Refuse a text in which a message is missing.

        Args:
          chat: whose messages the text has.
          text: from `render` with these messages.
          where: the row's place for error messages.
          opened: as in `render`.

        Raises:
          UserError: names the message.
        """
        contents = [(each.get("content") or "").strip() for each in chat.messages]
        for i, message in enumerate(chat.messages):
            content = contents[i]
            expected = sum(each.count(content) for each in contents) if content else 0
            if message["role"] == "assistant" or text.count(content) >= expected:
                continue
            other = [*chat.messages]
            other[i] = {**message, "content": "another text"}
            if self.render(chat, other, where, opened=opened) == text:
                raise UserError(
                    f"{where}: the chat template writes nothing of message {i} (role {message['role']!r}); "
                    "expected a template with this role, or rows without it"
                )

    @property
    def foreign_tokens(self) -> tuple[str, ...]:
        """Texts in the template that are meant as one token and that the tokenizer splits."""
        return tuple(self._foreign)

    def turns(self, chat: Chat, learnt: tuple[int, ...], where: str) -> list[Turn]:
        """Return `turn` of several messages; their texts are rendered together, which takes less time.

        Raises:
          UserError: as `turn`.
        """
        self._rendered = {}
        plain = sandbox.plain(_without_nulls(chat.messages))
        with contextlib.suppress(Exception):  # of the template; `turn` renders what is not here, and names the reason
            for opened, ends in ((True, learnt), (False, tuple(i + 1 for i in learnt))):
                texts = self._call(chat, [sandbox.Plain(plain[:end]) for end in ends], opened=opened)[0]
                self._rendered |= {(end, opened): text for end, text in zip(ends, texts, strict=True)}
        try:
            return [self.turn(chat, i, where) for i in learnt]
        finally:
            self._rendered = {}

    def _beginning(self, chat: Chat, end: int, where: str, *, opened: bool) -> str:
        """Return the text of the messages before `end`."""
        found = self._rendered.get((end, opened))
        return self.render(chat, chat.messages[:end], where, opened=opened) if found is None else found

    def turn(self, chat: Chat, i: int, where: str) -> Turn:
        """Return what is asked before the assistant's message `i`, and what is answered.

        The prompt is exactly what a generation at this place is given. White space that the template writes after the end
        of the turn is formatting and belongs to neither.

        Raises:
          UserError: the template refuses, writes nothing for the message, or stores it in another form than it asks for it.
        """
        before = self._beginning(chat, i, where, opened=True)
        stored = self._beginning(chat, i + 1, where, opened=False)
        content = chat.messages[i].get("content") or ""
        content = (content.rpartition("</think>")[2].strip() or content).strip()
        if stored.startswith(before):
            answer = stored[len(before) :]
        else:
            found = _with_thoughts(chat.messages[i], before, stored) or self._resumed(
                chat, i, before, stored, content, where
            )
            if found is None:
                at = _common(before, stored)
                raise UserError(
                    f"{where}: the chat template asks for message {i} with {before[at:][:40]!r} and stores it with "
                    f"{stored[at:][:40]!r} in its place, so what to learn cannot be found; expected a template with "
                    "{% generation %} blocks, template_arguments, or another template (data.chat_template)"
                )
            answer = found
        if not answer.strip() or (content not in answer and _squeezed(content) not in _squeezed(answer)):
            raise UserError(
                f"{where}: the chat template writes nothing of message {i} (role 'assistant'); expected its text"
            )
        return Turn(before, self._ended(chat, i, answer, content, where))

    def _resumed(self, chat: Chat, i: int, before: str, stored: str, content: str, where: str) -> str | None:
        """Return the stored text of turn `i` after the end of the prompt, whose beginning is stored in another form.

        Mistral's templates, for instance, leave the system text out of a chat that ends with an answer.
        """
        opening = before[_common(before, self.render(chat, chat.messages[:i], where, opened=False)) :]
        at = _place(stored, content) if content else len(stored)
        for length in range(min(len(before), at), max(len(opening), 3), -1):
            found = stored.rfind(before[-length:], 0, at)
            if found >= 0:
                return stored[found + length :]
        return None

    def _ended(self, chat: Chat, i: int, answer: str, content: str, where: str) -> str:
        """Return the answer of turn `i` up to its end, the first token after its text.

        Some templates write more after the last turn of a stored chat: EOS (Phi-3), or the next prompt (the first Llama 3).

        Raises:
          UserError: the turn ends with a text that is meant as one token and that the tokenizer splits.
        """
        after = self._after(chat, i, answer, content, where)
        ends = [found.end() for found in TOKEN_LIKE.finditer(answer, after)]
        if chat.messages[i].get("tool_calls"):  # tokens may introduce calls, so the end is where longer chats go on
            stored = self.render(chat, chat.messages[: i + 1], where, opened=False)
            longer = self.render(chat, chat.messages[: i + 1], where, opened=True)
            same = _common(stored, longer) - (len(stored) - len(answer))
            ends = [end for end in ends if end <= same] if same < len(answer.rstrip()) else []
            ends.reverse()
        ended = answer[: ends[0]] if ends else answer.rstrip()
        for token, count in self._foreign.items():
            if ended.endswith(token):
                raise UserError(
                    f"{where}: the chat template ends a turn with {token!r}, which this tokenizer splits into "
                    f"{count} tokens; expected a template whose turns end with one token (data.chat_template)"
                )
        return ended

    def _after(self, chat: Chat, i: int, answer: str, content: str, where: str) -> int:
        """Return where the content of turn `i` ends in its answer.

        A short content may also be part of what the template writes around it, and a template may change it: then another
        text in its place shows what follows it.
        """
        places = _places(answer, content)
        if not content or len(places) == 1:
            return places[0] + len(content) if content else 0
        other = [*chat.messages[:i], {**chat.messages[i], "content": _STAND_IN}]
        text = self.render(chat, other, where, opened=False)
        at = text.rfind(_STAND_IN)
        if at < 0:
            return max(answer.rfind(content), 0) + len(content)
        return max(len(answer) - (len(text) - at - len(_STAND_IN)), 0)

    def masks(self, chat: Chat, where: str) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of the complete chat and the character ranges of its {% generation %} blocks."""
        return self._apply(chat, chat.messages, where, False, True)


def _without_comments(source: str) -> str:
    """Return a template without its {# comments #}; a regular expression would take quadratic time on many open ones."""
    parts, at = [], 0
    while (start := source.find("{#", at)) >= 0 and (end := source.find("#}", start + 2)) >= 0:
        parts.append(source[at:start])
        at = end + 2
    return "".join([*parts, source[at:]])


def _without_nulls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages as transformers gives them to templates: many fail on null, or write "None", but not without it."""
    return [{key: value for key, value in each.items() if value is not None} for each in messages]


def _common(one: str, other: str) -> int:
    """Return the length of the common beginning."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _places(text: str, content: str) -> list[int]:
    """Return where a content stands before a token or the end of a text, with white space or without."""
    places, start = [], text.find(content) if content else -1
    while start >= 0:
        end = start + len(content)
        if _ENDED.match(text, end):
            places.append(start)
        start = text.find(content, end)
    return places


def _place(text: str, content: str) -> int:
    """Return where a content stands last, if possible before a token or the end; -1 if nowhere, 0 for none."""
    return (_places(text, content) or [text.rfind(content) if content else 0])[-1]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _with_thoughts(message: Mapping[str, Any], before: str, stored: str) -> str | None:
    """Return the answer to a prompt that opens a block of thoughts, from a stored turn that has lost it (R1-Distill).

    A turn without thoughts closes the block at once.
    """
    found = _OPENED_THOUGHTS.search(before)
    if found is None or not stored.startswith(before[: found.start()]):
        return None
    closing = f"</{found[1]}>"
    content, answer = message.get("content") or "", stored[found.start() :]
    thoughts = next((message[each] for each in ("reasoning_content", "thinking", "reasoning") if message.get(each)), None)
    if thoughts is None:
        thoughts, separator, last = content.rpartition(closing)
        if separator:
            thoughts, content = thoughts.strip().removeprefix(f"<{found[1]}>"), last
    at = _place(answer, content.strip())
    if at < 0:
        return None
    # The text of the stored turn without what it kept of the thoughts.
    return f"{thoughts.strip()}\n{closing}\n\n{answer[at:]}"
