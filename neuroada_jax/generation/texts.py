"""Generation from text to text: prompts are rendered in a style and tokenised, continuations decoded and truncated."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import transformers

from neuroada_jax import files
from neuroada_jax.core.trees import Tree
from neuroada_jax.data.examples import encode_prompt
from neuroada_jax.data.prompts import PromptForm, PromptStyle
from neuroada_jax.generation.generate import Ending, before_stop, check_lengths, generate
from neuroada_jax.generation.sampling import GREEDY, Decoding
from neuroada_jax.models import config_fields
from neuroada_jax.pretrained import prompt_form
from neuroada_jax.pretrained.load import OpenedModel


class Continuation(NamedTuple):
    """Continuation of a prompt.

    Attributes:
      text: without stop strings and special tokens.
      tokens: number of generated tokens, without an end token.
      stopped: why it ended: at an "end" token, at a "stop" string, or at the largest "length".
    """

    text: str
    tokens: int
    stopped: str


def end_tokens(
    base_model: OpenedModel, tokenizer: transformers.PreTrainedTokenizerBase, form: PromptForm | None = None
) -> list[int]:
    """Return the ids that end a generation.

    They are those of generation_config.json and of config.json, the tokenizer's EOS, and the tokens that the trained turns
    or completions end with.

    Raises:
      UserError: an end token of the form that is not one token of the tokenizer.
    """
    found: list[int] = []
    generation = Path(base_model.path) / "generation_config.json"
    if generation.is_file():
        found += config_fields.token_ids(files.read_json(generation), f"{generation}: ")["eos_token_id"]
    found += config_fields.token_ids(base_model.model.hf_config, "config.json: ")["eos_token_id"]
    found += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if form is not None:
        found += prompt_form.end_ids(form, tokenizer, base_model.source)
    return sorted(set(found))


def ending(
    base_model: OpenedModel, tokenizer: transformers.PreTrainedTokenizerBase, form: PromptForm | None = None
) -> Ending:
    """Return what ends a continuation: the end tokens, and stop strings in text that keeps its special tokens."""
    return Ending(tuple(end_tokens(base_model, tokenizer, form)), lambda ids: str(tokenizer.decode(ids)))


def continue_texts(
    base_model: OpenedModel,
    params: Tree,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    form: PromptForm | PromptStyle | str = PromptStyle.VERBATIM,
    max_new_tokens: int = 256,
    decoding: Decoding = GREEDY,
) -> list[Continuation]:
    """Continue prompts with plain (base or merged) parameters of a decoder.

    Args:
      base_model: architecture, config and the path of its generation_config.json.
      params: the parameters to generate with.
      tokenizer: the tokenizer of the model.
      prompts: the texts, each read as the `prompt` of a row.
      form: prompt form around each text, or a style.
      max_new_tokens: the largest number of tokens in a continuation.
      decoding: greedy, sampling or beam search.

    Raises:
      UserError: an unknown style, an empty prompt, one that exceeds the model's positions with its continuation, or an end
        token that the tokenizer lacks.
    """
    form = PromptForm.of(form)
    ids = [encode_prompt({"prompt": prompt}, form, tokenizer, f"prompt {i}") for i, prompt in enumerate(prompts)]
    check_lengths(base_model.model, ids, max_new_tokens, lambda i: f"prompt {i}")
    outputs = generate(
        base_model.model,
        params,
        ids,
        ending(base_model, tokenizer, form),
        max_new_tokens=max_new_tokens,
        decoding=decoding,
    )
    return [
        Continuation(
            before_stop(str(tokenizer.decode(each.ids, skip_special_tokens=True)), decoding.stop),
            len(each.ids),
            each.stopped,
        )
        for each in outputs
    ]
