"""The prompt form that a model was trained in, on disk: an object in adapter.json and in a merged model's neuroada.json."""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from neuroada_jax import files
from neuroada_jax.data.prompts import PromptForm, PromptStyle
from neuroada_jax.errors import UserError

FILE = "neuroada.json"  # of a merged model: {"prompt": {...}}


def digest(template: str) -> str:
    """Return the digest of a chat template's text."""
    return xxhash.xxh3_128_hexdigest(template.encode("utf-8", "surrogatepass"))


def to_json(form: PromptForm, *, is_decoder: bool = True) -> dict[str, Any]:
    """Return a form, with its template's complete text, as JSON has it; an encoder, which has no prompts, has no style."""
    template = form.chat_template
    return {
        "style": form.style.value if is_decoder else None,
        "template_digest": None if template is None else digest(template),
        "template": template,
        "template_arguments": dict(form.template_arguments),
        "date": form.date,
        "task": form.task,
        "end_tokens": list(form.end_tokens),
        "system": form.system,
        **({"text": list(form.text), "label": form.label, "metric": form.metric} if form.text else {}),
    }


def from_json(content: object, where: str) -> PromptForm | None:
    """Return the form that `to_json` wrote; None for null, where no form is known.

    Args:
      content: the JSON value.
      where: the file and key, for messages.

    Raises:
      UserError: a value of another type, or a template that differs from its digest.
    """
    if content is None:
        return None
    if not isinstance(content, Mapping):
        raise UserError(f"{where}: found {content!r}, expected an object or null")
    styles = [style.value for style in PromptStyle]
    if "style" not in content:
        raise UserError(f"{where}: has no style, expected null or one of {', '.join(styles)}; null where no form is known")
    date, template = content.get("date"), content.get("template")
    arguments, end_tokens = content.get("template_arguments", {}), content.get("end_tokens", [])
    text = content.get("text", [])
    for name, expected, holds in (
        ("style", f"null or one of {', '.join(styles)}", content.get("style") in (None, *styles)),
        ("template", "text or null", isinstance(template, str | None)),
        ("template_arguments", "an object", isinstance(arguments, Mapping)),
        ("date", "null or a date such as 2026-01-31", date is None or _is_date(date)),
        ("system", "text or null", isinstance(content.get("system"), str | None)),
        ("task", "text or null", isinstance(content.get("task"), str | None)),
        ("end_tokens", "a list of texts", isinstance(end_tokens, list) and all(isinstance(t, str) for t in end_tokens)),
        ("text", "a list of one or two texts", text == [] or _are_columns(text)),
        ("label", "text or null", isinstance(content.get("label"), str | None)),
        ("metric", "text or null", isinstance(content.get("metric"), str | None)),
    ):
        if not holds:
            raise UserError(f"{where}.{name}: found {content.get(name)!r}, expected {expected}")
    for name, value in content.items():
        if files.has_half_characters(value):
            raise UserError(f"{where}.{name}: holds half of a surrogate pair, expected complete characters")
    if content.get("template_digest") != (None if template is None else digest(template)):
        raise UserError(f"{where}.template: differs from its template_digest; the file was damaged or changed")
    return PromptForm(
        PromptStyle(content.get("style") or PromptStyle.VERBATIM),
        template,
        dict(arguments),
        date,
        content.get("task"),
        tuple(end_tokens),
        content.get("system"),
        tuple(text),
        content.get("label"),
        content.get("metric"),
    )


def _are_columns(value: object) -> bool:
    return isinstance(value, list) and len(value) in (1, 2) and all(isinstance(each, str) for each in value)


def _is_date(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False


def write(directory: Path, form: PromptForm, *, is_decoder: bool) -> None:
    """Write the file of a merged model's directory."""
    content = {"prompt": to_json(form, is_decoder=is_decoder)}
    (directory / FILE).write_text(files.to_json(content, indent=2) + "\n", encoding="utf-8")


def read(path: str) -> PromptForm | None:
    """Return the form in the neuroada.json of a model's directory; None where there is none.

    Raises:
      UserError: a file that is damaged.
    """
    file = Path(path) / FILE
    return from_json(files.read_json(file).get("prompt"), f"{file}: prompt") if file.is_file() else None


def own_template(tokenizer: Any) -> str | None:
    """Return the chat template of a tokenizer; of several, the default one. None where there is none."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        return None


def given_template(value: str, where: str) -> str:
    """Return the text of a chat template that is given as a file or as text.

    Args:
      value: text, if it holds "{{" or "{%"; else a file.
      where: the option, for messages.

    Raises:
      UserError: no such file, or one that cannot be read.
    """
    if "{{" in value or "{%" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(
            f"{where}: {value!r} cannot be read ({reason}); expected the file of a chat template, or its text, which holds "
            "{{ or {%"
        ) from error


def end_ids(form: PromptForm, tokenizer: Any, where: str) -> list[int]:
    """Return the ids of the form's end tokens.

    Args:
      form: of an adapter or a model.
      tokenizer: of the base model.
      where: the model's name, for messages.

    Raises:
      UserError: a text that is not one token of this tokenizer.
    """
    ids = tokenizer.convert_tokens_to_ids(list(form.end_tokens))
    for text, token_id in zip(form.end_tokens, ids, strict=True):
        if token_id is None or tokenizer.convert_ids_to_tokens(token_id) != text:
            raise UserError(f"{where}: end token {text!r} of the trained prompts is not one token of its tokenizer")
    return list(ids)


def describe(form: PromptForm, origin: str) -> str:
    """Return a form in one line.

    Args:
      form: with its template's complete text, if it has a template.
      origin: where the template comes from, such as "the tokenizer".
    """
    parts: list[str] = [form.style.value]
    if form.chat_template is not None:
        parts.append(f"template {digest(form.chat_template)[:8]} of {origin}")
        parts += [f"{name}={value!r}" for name, value in form.template_arguments.items()]
        if form.system is not None:
            parts.append("with a system prompt")
        if form.date is not None and "strftime_now" in form.chat_template:
            parts.append(f"date {form.date}")
    ends = " or ".join(form.end_tokens)
    what = "a turn" if form.chat_template is not None else "an answer"
    return f"prompts: {', '.join(parts)}" + (f"; {what} ends at {ends}" if ends else "")
