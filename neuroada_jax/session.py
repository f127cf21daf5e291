"""Models in a Python session: pretrained, tuned and merged, on one copy of the weights (docs/python.md)."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import jax
import numpy as np
import transformers

from neuroada_jax import files
from neuroada_jax.adapters import hub, native, on_base, prompting
from neuroada_jax.core import bypass, low_rank
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.core.trees import Tree
from neuroada_jax.data.examples import encode_labelled
from neuroada_jax.data.prompts import PromptStyle
from neuroada_jax.errors import UserError
from neuroada_jax.evaluation import classification
from neuroada_jax.evaluation.classification import Prediction
from neuroada_jax.generation.texts import continue_texts
from neuroada_jax.models import dense_modules, unrolled
from neuroada_jax.pretrained import save as checkpoint
from neuroada_jax.pretrained.load import LoadedModel, load_with_progress, open_with_tokenizer
from neuroada_jax.pretrained.quantization import of_adapter
from neuroada_jax.training import config_file, unfinished
from neuroada_jax.training.config import GenerationSection


class _Held(NamedTuple):
    """The adapter that is in the weights now, with the columns and base entries that restore the original weights.

    The kernels of a low-rank adapter are not written to: `low_rank` has its factors, which lie beside the kernels in a
    call; None for connections.
    """

    adapter: native.Adapter | None
    columns: Tree
    base_entries: Tree
    low_rank: Bypass | None = None


_NOTHING = _Held(None, {}, {})
_swap = jax.jit(bypass.swap, donate_argnums=0)


class PretrainedModel:
    """A model in memory: its weights, its tokenizer and the digests of its tensors.

    One copy of the weights serves this model and every model tuned from it: a call writes the adapter that it needs into
    them, and the original weights are restored bit for bit. The calls of several threads must therefore be serialised.

    Attributes:
      tokenizer: the model's Hugging Face tokenizer.
    """

    def __init__(self, loaded: LoadedModel, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self._loaded = loaded
        self._recorded = prompting.recorded(loaded)
        self._held = _NOTHING
        self._closed = ""

    def __repr__(self) -> str:
        state = f", closed: {self._closed}" if self._closed else ""
        dtype = np.dtype(self._loaded.model.config.dtype).name
        return f"PretrainedModel({self.source!r}, {self.config['model_type']}, {dtype}{state})"

    def __enter__(self) -> "PretrainedModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def source(self) -> str:
        """The path or hub id that was given to `load`."""
        return self._loaded.source

    @property
    def config(self) -> dict[str, Any]:
        """The content of the model's Hugging Face config.json."""
        return self._loaded.model.hf_config

    @property
    def digests(self) -> dict[str, str]:
        """The digest of every tensor of the checkpoint, by its Hugging Face name."""
        return self._loaded.digests

    @property
    def is_decoder(self) -> bool:
        """Whether the model continues texts (`generate`); otherwise it labels them (`predict`)."""
        return self._loaded.model.architecture.is_decoder

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 256,
        style: PromptStyle | str | None = None,
        chat_template: str | Path | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        **decoding: Any,
    ) -> list[str]:
        """Continue prompts, by greedy decoding unless settings say otherwise.

        Args:
          prompts: a list of texts; the result has their continuations alone, in the same order.
          max_new_tokens: the most tokens of a continuation.
          style: the prompt style around each text: verbatim, plain, alpaca or chat. None: that of the training, which the
            neuroada.json of a merged model records, else verbatim.
          chat_template: a file or the text of a chat template. None: that of the training, else the tokenizer's own.
          template_arguments: values of the variables that it reads. None: those of the training.
          **decoding: fields of `generation.sampling.Decoding`, such as temperature, top_p, seed, beams or stop.

        Raises:
          UserError: an encoder, a closed model, a prompt that is empty or too long, or unknown or contradictory settings.
        """
        options = _options(style, chat_template, template_arguments)
        return _generate(self, None, prompts, max_new_tokens, options, decoding)

    def predict(self, texts: Sequence[str | tuple[str, str]], *, batch_size: int = 32) -> list[Prediction]:
        """Label texts, or pairs of texts, with the classifier of an encoder.

        Args:
          texts: texts, or pairs of texts; longer ones are truncated to the model's positions.
          batch_size: texts at a time.

        Raises:
          UserError: a decoder, a closed model, a checkpoint without a trained classifier, or an empty list.
        """
        if self._loaded.initialised:
            raise UserError(f"{self.source} has no trained {self._loaded.initialised[0]}; fine_tune trains one")
        return _predict(self, None, texts, batch_size)

    def close(self) -> None:
        """Free the memory of the weights; this model and those tuned from it cannot generate or predict afterwards."""
        self._take("close() was called")

    def _check_open(self) -> None:
        if self._closed:
            raise UserError(f"the model {self.source} is closed ({self._closed}); load it again with neuroada_jax.load")

    def _take(self, reason: str) -> LoadedModel:
        """Return the model with its original weights and hold them no longer; until `_give` it is closed."""
        if not self._closed:
            self._params(None)
        loaded = dataclasses.replace(self._loaded, params=unrolled.stacked(self._loaded.params))
        self._loaded = dataclasses.replace(self._loaded, params={})
        self._held, self._closed = _NOTHING, self._closed or reason
        return loaded

    def _give(self, params: Tree) -> None:
        """Take the original weights back."""
        self._loaded, self._closed = dataclasses.replace(self._loaded, params=params), ""

    def _params(self, adapter: native.Adapter | None) -> Tree:
        """Return the parameters with this adapter in them: in place, or with low-rank factors beside their kernels."""
        self._check_open()
        apart = unrolled.apart(self._loaded.params, self._loaded.model.layers_path)
        self._loaded = dataclasses.replace(self._loaded, params=apart)
        if self._held.adapter is not adapter:
            new = Bypass({}, {}) if adapter is None else on_base.stack_layers(adapter, self._loaded)
            beside = new if low_rank.is_in(new) else None
            new = Bypass({}, {}) if beside else new
            params, entries = _swap(self._loaded.params, self._held.columns, self._held.base_entries, new)
            self._loaded = dataclasses.replace(self._loaded, params=params)
            self._held = _Held(adapter, new.columns, entries, beside)
        dense = {} if adapter is None else on_base.classifier(adapter, self._loaded)
        params = self._loaded.params
        if self._held.low_rank is not None:
            params = low_rank.beside(params, self._held.low_rank)
        return dense_modules.join(params, dense)


class MergedModel:
    """A base model with an adapter merged into its weights, from `TunedModel.merged`; for saving."""

    def __init__(self, model: PretrainedModel, adapter: native.Adapter) -> None:
        self._model, self._adapter = model, adapter

    def save(self, directory: str | Path, *, replace: bool = False) -> None:
        """Write a Hugging Face model directory: weights, config, generation config, tokenizer and the form of its prompts.

        Raises:
          UserError: the directory exists and `replace` is False, or it cannot be written.
        """
        model, form = self._model, native.form_of(self._adapter)
        place, params = _directory(directory), model._params(self._adapter)
        checkpoint.save(place, model._loaded, params, model.tokenizer, form=form, replace=replace)


class TunedModel:
    """A base model and the adapter that was trained on it.

    Attributes:
      model: the base model; it can be used and tuned again.
      adapter: the adapter's arrays and metadata, as its files hold them.
      history: a dict for every step of the `fine_tune` call (step, loss, learning_rate, gradient_norm, ...); empty for a
        loaded adapter.
      results: the content of the run's results.json; empty for a loaded adapter.
    """

    def __init__(
        self,
        model: PretrainedModel,
        adapter: native.Adapter,
        history: Sequence[Mapping[str, Any]] = (),
        results: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.adapter = model, adapter
        self.history, self.results = [dict(line) for line in history], dict(results or {})

    def __repr__(self) -> str:
        lora = self.adapter.metadata.get("lora")
        kind = f"k={self.adapter.metadata.get('k')}" if lora is None else f"LoRA r={lora['r']}"
        return f"TunedModel({self.model.source!r}, {kind}, {self.adapter.size:,} values)"

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 256,
        style: PromptStyle | str | None = None,
        chat_template: str | Path | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        **decoding: Any,
    ) -> list[str]:
        """Continue prompts with the adapter; see `PretrainedModel.generate`.

        By default they are asked in the form of the training rows, which the adapter records. Adapters of 0.1 and imported
        ones do not: their default is the style verbatim.
        """
        options = _options(style, chat_template, template_arguments)
        return _generate(self.model, self.adapter, prompts, max_new_tokens, options, decoding)

    def predict(self, texts: Sequence[str | tuple[str, str]], *, batch_size: int = 32) -> list[Prediction]:
        """Label texts with the adapter and its classifier; see `PretrainedModel.predict`."""
        return _predict(self.model, self.adapter, texts, batch_size)

    def save(self, directory: str | Path, *, replace: bool = False) -> None:
        """Write the adapter: adapter.safetensors and adapter.json, without base weights.

        Raises:
          UserError: the directory exists and `replace` is False, or it cannot be written.
        """
        native.write(_directory(directory), self.adapter, replace=replace)

    def merged(self) -> MergedModel:
        """Return the model with the adapter merged into its weights, to be saved as a Hugging Face directory."""
        self.model._check_open()
        return MergedModel(self.model, self.adapter)


@overload
def load(
    source: str | Path, dtype: str = "auto", *, adapter: None = None, quantization: str | None = None
) -> PretrainedModel: ...


@overload
def load(
    source: str | Path, dtype: str = "auto", *, adapter: str | Path, quantization: str | None = None
) -> TunedModel: ...


def load(
    source: str | Path, dtype: Any = "auto", *, adapter: str | Path | None = None, quantization: str | None = None
) -> PretrainedModel | TunedModel:
    """Load a model with its tokenizer, and an adapter of it where one is given.

    Args:
      source: a Hugging Face directory, a hub id, a .gguf file or "package:NAME/FILE".
      dtype: of the weights: "float32", "bfloat16" or "auto", which is the adapter's base dtype, else the checkpoint's own.
      adapter: an adapter that was trained on this model: its directory, or a hub id such as "user/name@revision".
      quantization: of the layers' kernels: "nf4", "int8" or "fp8", "auto" as the checkpoint is, or "none"; None: as the
        adapter's training had them, else "none" for a GGUF file and "auto" for others.

    Returns: a `PretrainedModel`, or with an adapter a `TunedModel` (its base model is the attribute `model`).

    Raises:
      UserError: no such model, an unsupported one, a damaged file, or an adapter of another base model.
    """
    for name, path in (("source", source), *((("adapter", adapter),) if adapter is not None else ())):
        if not isinstance(path, str | Path) or not str(path):
            raise UserError(f"load: {name}: expected a path or a name, found {path!r}")
    dtype = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))  # jnp.float32 and "float32" alike
    if dtype not in ("float32", "bfloat16", "auto"):
        raise UserError(f"load: dtype: expected 'float32', 'bfloat16' or 'auto', found {dtype!r}")
    unfinished.check(str(source), None if adapter is None else str(adapter))
    trained = None if adapter is None else hub.read(str(adapter))
    about = {} if trained is None else trained.metadata["base"]
    chosen = about.get("dtype", "auto") if dtype == "auto" else dtype
    held = quantization or of_adapter(about)
    opened, tokenizer = open_with_tokenizer(str(source), chosen, native.labels_of(about), quantization_of=held)
    found = prompting.recorded(opened, trained, None if adapter is None else str(adapter))
    if opened.model.architecture.is_decoder:  # before the weights, which take longer
        none = prompting.Options()
        prompting.say(prompting.resolve(found, none, opened, tokenizer), found, none, tokenizer)
    model = PretrainedModel(load_with_progress(opened, replaced=trained is not None), tokenizer)
    if trained is None:
        return model
    tuned = TunedModel(model, trained)
    model._params(trained)  # refuses an adapter of another base model now
    return tuned


def _texts(values: object, expected: str) -> list[str]:
    """Return texts as a list.

    Raises:
      UserError: `values` is one text or no iterable, or holds what is not text, or half of a surrogate pair.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UserError(expected)
    found = list(values)
    if not all(isinstance(each, str) for each in found):
        raise UserError(expected)
    for number, text in enumerate(found):
        if files.has_half_characters(text):
            raise UserError(f"{expected}; text {number} holds half of a surrogate pair")
    return found


def _directory(path: object) -> Path:
    if not isinstance(path, str | Path) or not str(path):
        raise UserError(f"expected the path of a directory, found {path!r}")
    return Path(path)


def _options(style: object, chat_template: object, template_arguments: object) -> prompting.Options:
    """Return the options of `generate`, which `prompting.resolve` checks."""
    given: Any = (style, chat_template, template_arguments)
    return prompting.Options(*given)


def _generate(
    model: PretrainedModel,
    adapter: native.Adapter | None,
    prompts: object,
    max_new_tokens: object,
    options: prompting.Options,
    settings: Mapping[str, Any],
) -> list[str]:
    model._check_open()
    if not model.is_decoder:
        raise UserError(f"{model.source}: {model.config['model_type']} is an encoder, which continues no text; use predict")
    texts = _texts(prompts, "generate: prompts: expected a list of texts")
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise UserError(f"generate: max_new_tokens: expected an integer above 0, found {max_new_tokens!r}")
    known = [field.name for field in dataclasses.fields(GenerationSection)]
    for name in settings:
        if name not in known:
            raise UserError(f"generate: unknown option {name!r}{config_file.nearest(name, known)}")
    stop = settings.get("stop") or ()
    fields = {**settings, "stop": [stop] if isinstance(stop, str) else list(stop)}
    decoding = config_file.decode(GenerationSection, fields, "generate")
    form = None if adapter is None else native.form_of(adapter)
    found = model._recorded if form is None else prompting.Recorded(form, "adapter.json")
    asked = prompting.resolve(found, options, model._loaded, model.tokenizer)
    asked = prompting.without_chats(asked, options, model.tokenizer)
    made = continue_texts(
        model._loaded,
        model._params(adapter),
        model.tokenizer,
        texts,
        form=asked.form,
        max_new_tokens=max_new_tokens,
        decoding=decoding,
    )
    return [each.text for each in made]


def _predict(
    model: PretrainedModel,
    adapter: native.Adapter | None,
    texts: object,
    batch_size: object,
) -> list[Prediction]:
    model._check_open()
    if model.is_decoder:
        raise UserError(f"{model.source}: {model.config['model_type']} is a decoder, which has no classifier; use generate")
    expected = "predict: texts: expected a list of texts, or of pairs of texts, with at least one"
    if isinstance(texts, str | Mapping) or not isinstance(texts, Iterable):
        raise UserError(expected)
    pairs = [[text] if isinstance(text, str) else text for text in texts]
    if not pairs or not all(isinstance(each, list | tuple) for each in pairs):
        raise UserError(expected)
    tuples = [tuple(_texts(each, expected)) for each in pairs]
    if type(batch_size) is not int or batch_size < 1:
        raise UserError(f"predict: batch_size: expected an integer above 0, found {batch_size!r}")
    if len({len(each) for each in tuples}) > 1 or len(tuples[0]) not in (1, 2):
        raise UserError("predict: texts: expected single texts or pairs, all of one kind")
    loaded, params = model._loaded, model._params(adapter)
    unknown = np.zeros(len(tuples), np.int32)  # the labels, which predictions do not depend on
    examples = encode_labelled(tuples, unknown, model.tokenizer, loaded.model.config.max_positions)
    return classification.predictions(loaded, classification.predict(loaded, params, examples, batch_size))
