"""The form of the prompts that a model is asked: that of its training, as its files record it, and options in its place."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from neuroada_jax import console
from neuroada_jax.adapters import native
from neuroada_jax.adapters.native import Adapter
from neuroada_jax.data.prompts import PromptForm, PromptStyle, chat_template
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained import prompt_form
from neuroada_jax.pretrained.load import OpenedModel


class Recorded(NamedTuple):
    """What the files of a model say about the prompts that it was trained on.

    Attributes:
      form: the form; None where no file records one.
      where: the file that does, for messages; else the adapter.json that does not, "" for a model without adapter.
    """

    form: PromptForm | None
    where: str


class Options(NamedTuple):
    """Options in place of what was recorded; None leaves it.

    Attributes:
      style: prompt style.
      chat_template: a file, or the text of a template.
      template_arguments: all of them.
    """

    style: PromptStyle | str | None = None
    chat_template: str | Path | None = None
    template_arguments: Mapping[str, Any] | None = None


class Asked(NamedTuple):
    """The form that a model is asked in, and where its chat template is from, for messages."""

    form: PromptForm
    origin: str


def recorded(opened: OpenedModel, adapter: Adapter | None = None, directory: str | None = None) -> Recorded:
    """Return what adapter.json records, else what neuroada.json in the model's directory does.

    Args:
      opened: the model.
      adapter: an adapter of it.
      directory: of the adapter, for messages.

    Raises:
      UserError: a neuroada.json that is damaged.
    """
    where = "" if adapter is None else f"adapter.json of {directory}"
    form = None if adapter is None else native.form_of(adapter)
    if form is not None:
        return Recorded(form, where)
    form = prompt_form.read(opened.path)
    return Recorded(form, where if form is None else f"{prompt_form.FILE} of {opened.source}")


def resolve(
    found: Recorded,
    options: Options,
    opened: OpenedModel,
    tokenizer: Any,
    *,
    default: PromptStyle = PromptStyle.VERBATIM,
    spell: Callable[[str], str] = str,
) -> Asked:
    """Return the form to ask in: the recorded one with the options in its place.

    Args:
      found: the recorded form.
      options: options that were given.
      opened: the model.
      tokenizer: of the model.
      default: style where none is recorded.
      spell: name of an option -> how the user writes it.

    Raises:
      UserError: an option of a wrong type or value, or an end token that is not one token of the tokenizer.
    """
    form, origin = found.form or PromptForm(default), found.where
    if form.chat_template is None or form.chat_template == prompt_form.own_template(tokenizer):
        form, origin = dataclasses.replace(form, chat_template=None), "the tokenizer"
    if options.style is not None:
        form = dataclasses.replace(form, style=PromptStyle(options.style))
    if options.chat_template is not None:
        name = spell("chat_template")
        if not isinstance(options.chat_template, str | Path):
            raise UserError(f"{name}: expected a file or text, found {type(options.chat_template).__name__}")
        template = prompt_form.given_template(str(options.chat_template), name)
        form, origin = dataclasses.replace(form, chat_template=template), name
    if options.template_arguments is not None:
        given = options.template_arguments
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise UserError(f"{spell('template_arguments')}: expected values by the names of variables, found {given!r}")
        form = dataclasses.replace(form, template_arguments=dict(given))
    prompt_form.end_ids(form, tokenizer, opened.source)
    return Asked(form, origin)


def without_chats(asked: Asked, options: Options, tokenizer: Any, spell: Callable[[str], str] = str) -> Asked:
    """Return the form for rows that are no chats: in a style other than chat without its template.

    Raises:
      UserError: an option for the template that would have no effect, or a template that is missing or not valid.
    """
    form = asked.form
    if form.style is PromptStyle.CHAT:
        chat_template(form, tokenizer, "prompts")
        return asked
    for name in ("chat_template", "template_arguments"):
        if getattr(options, name):
            raise UserError(
                f"{spell(name)}: prompts in style {form.style.value} use no chat template; remove it, or give "
                f"{spell('style')} chat"
            )
    return asked._replace(form=dataclasses.replace(form, chat_template=None, template_arguments={}, system=None))


def say(asked: Asked, found: Recorded, options: Options, tokenizer: Any, spell: Callable[[str], str] = str) -> None:
    """Print in one line how the model is asked, where it was trained in a known form or options say how.

    An adapter that records no form is named, and a template other than the tokenizer's own.
    """
    form, own = asked.form, prompt_form.own_template(tokenizer)
    if found.form is None and found.where and options.style is None:
        console.say(
            f"{found.where} does not record its prompts (written by 0.1 or imported): style {form.style.value} is used; "
            f"{spell('style')} chooses another"
        )
    elif found.form is not None or any(each is not None for each in options):
        used = form.chat_template or (own if form.style is PromptStyle.CHAT else None)
        console.say(prompt_form.describe(dataclasses.replace(form, chat_template=used), asked.origin))
    if form.chat_template is not None and own is not None and options.chat_template is None:
        console.warn(
            f"{asked.origin} has chat template {prompt_form.digest(form.chat_template)[:8]} and the tokenizer "
            f"{prompt_form.digest(own)[:8]}; that of the training is used"
        )
