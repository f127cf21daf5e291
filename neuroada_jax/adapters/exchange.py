"""Conversion of native adapters to the formats of other libraries and back, with verification of the result."""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from neuroada_jax import console, models
from neuroada_jax.adapters import hub, native, official, on_base, peft, peft_lora, verification
from neuroada_jax.adapters.base_model import open_base
from neuroada_jax.adapters.native import Adapter
from neuroada_jax.core import quantised, trees
from neuroada_jax.core.trees import Tree
from neuroada_jax.data.prompts import PromptForm
from neuroada_jax.errors import UserError
from neuroada_jax.models import Labels, names
from neuroada_jax.pretrained import prompt_form, quantization, save
from neuroada_jax.pretrained import requantise as requantising
from neuroada_jax.pretrained.load import LoadedModel, OpenedModel, load_with_progress, open_model, open_with_tokenizer
from neuroada_jax.pretrained.requantise import Requantiser
from neuroada_jax.pretrained.source import has_other_parts, read_config

_SPARSE = ("official", "peft-supertuning", "peft-shira")
_LORA = "peft-lora"
# Of the published code, which has been compared for these.
_OFFICIAL = ("llama", "mistral", "qwen2", "qwen3", "bert", "roberta", "xlm-roberta")
_PEFT = {"peft-supertuning": peft.Kind.SUPERTUNING, "peft-shira": peft.Kind.SHIRA}


class Base(NamedTuple):
    """The base model of an export, and how it is read.

    Attributes:
      model: directory, hub id or GGUF file; None: the one that the adapter names.
      dtype: "float32", "bfloat16" or "auto", of the base model and of a merged one; None: that of the training.
      held: how its kernels are held, see `quantization.resolve`; None: as in the training.
      force: use the adapter on a base model whose weights differ from those it was trained on.
    """

    model: str | None = None
    dtype: str | None = None
    held: str | None = None
    force: bool = False


def export_adapter(
    source: str,
    to_format: str,
    out: str,
    base: Base = Base(),  # noqa: B008
    *,
    verify: bool = False,
    requantise: str | None = None,
) -> dict[str, Any]:
    """Write a native adapter in another library's format, and verify the export on request.

    Args:
      source: directory or hub id of a native adapter.
      to_format: "official", "peft-supertuning", "peft-shira", "peft-lora", or "huggingface" for the merged model.
      out: the directory to create.
      base: the base model.
      verify: load the export in its library and compare it with our merged model, see `verification.verify`.
      requantise: of the merged model: "nf4" or "int8", as bitsandbytes stores them; None: not quantised.

    Returns: `out`, `files`, `notes`, and the results of the verification; with `requantise` also what it loses.

    Raises:
      UserError: a file that cannot be read or written, an adapter that the format cannot hold, or an export that differs
        from our merged model.
    """
    directory = Path(out)
    if directory.exists():
        raise UserError(f"--out: {out} exists already; choose another folder or remove it")
    if verify and requantise:
        raise UserError(
            "--verify: compares with the merged weights, from which requantised ones differ; leave it or --requantise out"
        )
    if verify:
        verification.require_torch()
    adapter = native.without_digests(hub.read(source)) if base.force else hub.read(source)
    _check_format(source, adapter, to_format)
    _check_names(source, adapter, to_format)
    trained_on = adapter.metadata["base"]
    merges = verify or to_format == "huggingface"
    labels = native.labels_of(trained_on)
    chosen = base.dtype or trained_on.get("dtype") or "auto"
    held = base.held or quantization.of_adapter(trained_on)
    open_source = functools.partial(open_model, dtype=chosen, config_only=not merges, labels=labels, quantization_of=held)
    opened = open_base(adapter, source, base.model, open_source)
    _check_method(to_format, opened)
    merged_dtype = jnp.dtype(opened.model.config.dtype)
    if requantise:
        requantising.check(requantise, opened.model)
    tokenizer = None
    if to_format == "huggingface":
        opened, tokenizer = _open_to_merge(opened, labels, native.form_of(adapter), held)
    base_model = load_with_progress(opened, replaced=True) if merges else None

    # The official code and SuperTuning round the values to the dtype of the weights before the sum; SHiRA and we add in
    # float32.
    round_first = merged_dtype if to_format in ("official", "peft-supertuning") else jnp.dtype(jnp.float32)
    params: Tree = {}
    if base_model:
        params = _cast(on_base.merge(adapter, base_model, round_first), merged_dtype)

    requantiser = None
    if to_format == "huggingface":
        if requantise and base_model:
            requantiser = Requantiser(requantise, opened.model, base_model.params, params, merged_dtype)
        save.save(directory, opened, params, tokenizer, form=native.form_of(adapter), requantiser=requantiser)
        notes = [f"merged in float32, saved as {merged_dtype.name}"]
        reload: Reload = lambda base: verification.reload_huggingface(base, directory, merged_dtype)  # noqa: E731
    else:
        notes, reload = _write(adapter, to_format, directory, opened)

    result: dict[str, Any] = {"out": out, "files": _files(directory), "notes": notes}
    if requantiser is not None:
        result["requantised"] = requantiser.report()
        notes.append(requantising.line(result["requantised"]))
    if not verify or base_model is None:
        return result
    dtypes = verification.Merge(round_first, merged_dtype)
    return _verified(adapter, base_model, params, dtypes, reload, result)


def _verified(
    adapter: Adapter, base_model: LoadedModel, params: Tree, dtypes: Any, reload: "Reload", result: dict[str, Any]
) -> dict[str, Any]:
    """Return the result of an export with that of its verification; one that differs is an error, and is removed."""
    base_model, params = _dequantised(base_model), quantised.map_quantised(quantised.dequantise, params)
    try:
        found = result | verification.verify(base_model, adapter, dtypes, params, functools.partial(reload, base_model))
        _check_equal(result["out"], found)
    except BaseException:  # what was not compared to its end does not look like an export
        shutil.rmtree(result["out"], ignore_errors=True)
        raise
    if found["original"] is None:
        found["notes"].append(
            f"compared with this library's own reading of {_read_from(base_model)}: transformers has no directory to load"
        )
    return found


Reload = Callable[[LoadedModel], verification.Reloaded]


def _write(adapter: Adapter, to_format: str, directory: Path, opened: OpenedModel) -> tuple[list[str], Reload]:
    """Write an adapter for another library; return notes, and the function that loads it there."""
    if to_format in (*_PEFT, _LORA) and has_other_parts(opened.path):
        raise UserError(f"--to {to_format}: PEFT would load {opened.source} with what reads images; use huggingface")
    if to_format in _PEFT:
        notes = peft.export(adapter, directory, _PEFT[to_format], opened)
        return notes, lambda base: verification.reload_peft(base, directory)
    if to_format == _LORA:
        return peft_lora.export(adapter, directory, opened), lambda base: verification.reload_peft(base, directory)
    notes = official.export(adapter, directory, jnp.dtype(opened.model.config.dtype).name)
    read = functools.partial(official.read, directory, opened.model)
    return notes, lambda base: verification.reload_official(base, read())


def _check_format(source: str, adapter: Adapter, to_format: str) -> None:
    """Raise UserError if a format cannot hold an adapter of its kind."""
    if to_format == "huggingface":
        return
    expert = next((module for module in adapter.modules if f".{names.EXPERTS}." in module), None)
    if expert and not (adapter.factors and to_format == _LORA):
        raise UserError(
            f"{source}: --to {to_format} has no name for {expert}, which belongs to experts (transformers stacks them); "
            "use huggingface"
        )
    if bool(adapter.factors) == (to_format == _LORA):
        return
    if adapter.factors:
        raise UserError(f"{source}: --to {to_format} has no low-rank factors, which LoRA adapters are made of; use {_LORA}")
    others = ", ".join(_SPARSE)
    raise UserError(f"{source}: --to {_LORA} has low-rank factors alone, and this adapter has connections; use {others}")


def _check_names(source: str, adapter: Adapter, to_format: str) -> None:
    """Raise UserError if the modules of an adapter have no names in a format."""
    kind = adapter.metadata["base"].get("model_type")
    if to_format == "official" and kind in models.ARCHITECTURES and kind not in _OFFICIAL:
        raise UserError(
            f"{source}: --to official has names for {', '.join(_OFFICIAL)}, found model_type {kind!r}; use huggingface"
        )


def _check_method(to_format: str, opened: OpenedModel) -> None:
    """Raise UserError where another library would add sparse values to codes in a way that has not been verified.

    PEFT's LoRA is added to the output of a map, whatever its weight is.
    """
    if to_format in ("huggingface", _LORA) or not quantization.is_stored(opened.model):
        return
    method, _, _ = (quantization.declared(opened.path, read_config(opened.path)) or "").partition(" ")
    if method not in ("GGUF", "bitsandbytes"):
        raise UserError(
            f"--to {to_format}: not verified on the weights of a {method} checkpoint; use huggingface, or an unquantised "
            "base model with --model and --force"
        )


def _cast(params: Tree, dtype: Any) -> Tree:
    """Return merged parameters in a dtype; quantised kernels are dequantised one by one while they are saved."""
    cast = lambda leaf: leaf if quantised.is_quantised(leaf) else leaf.astype(dtype)  # noqa: E731
    found: Tree = jax.tree.map(cast, params, is_leaf=quantised.is_quantised)
    return found


def _dequantised(base_model: LoadedModel) -> LoadedModel:
    """Return the model with the weights that PyTorch gets: the dequantised ones."""
    return dataclasses.replace(base_model, params=quantised.map_quantised(quantised.dequantise, base_model.params))


def _read_from(opened: OpenedModel) -> str:
    if has_other_parts(opened.path):
        return "the text part"
    return "the quantised weights" if opened.model.quantization != "none" else "the GGUF file"


def _check_equal(out: str, result: dict[str, Any]) -> None:
    """Raise UserError if an export was found to differ from the adapter."""
    if not (result["merged_equal"] and result["max_logit_difference"] <= result["logit_tolerance"]):
        raise UserError(
            f"{out} differs from the adapter: logits differ by up to {result['max_logit_difference']:.3g} "
            f"(expected at most {result['logit_tolerance']:.3g}), merged weights are "
            f"{'equal' if result['merged_equal'] else 'different'}"
        )


def _open_to_merge(
    opened: OpenedModel, labels: Labels | None, form: PromptForm | None, held: str | None
) -> tuple[OpenedModel, Any]:
    """Return the model as it is merged, and its tokenizer, which has the end tokens of the form.

    Nothing is rounded before the merge: weights are loaded as bfloat16 only if they are stored in it. Quantised ones are
    dequantised to the dtype of the training, in which they were trained.
    """
    stored = opened.model.hf_config.get("dtype") or opened.model.hf_config.get("torch_dtype")
    wanted = jnp.dtype(opened.model.config.dtype).name
    exact = stored == "bfloat16" or opened.model.quantization != quantization.NONE
    found, tokenizer = open_with_tokenizer(opened.source, wanted if exact else "float32", labels, quantization_of=held)
    if form is not None:  # before the weights, which take longer
        prompt_form.end_ids(form, tokenizer, found.source)
    return found, tokenizer


def import_adapter(
    directory: str, from_format: str, base_model: str, out: str, *, dtype: str | None = None
) -> dict[str, Any]:
    """Write another library's adapter as a native adapter of a base model.

    Args:
      directory: the other library's adapter.
      from_format: "official", "peft-supertuning", "peft-shira" or "peft-lora".
      base_model: directory, hub id or .gguf file of the base model.
      out: the directory to create.
      dtype: "float32", "bfloat16" or "auto" (the default), the base dtype that the native adapter records.

    Returns: `out`, `values`, `k` (None of LoRA), and `notes` that report what was removed or converted.

    Raises:
      UserError: a file that cannot be read or written, that holds no such adapter, or an adapter of another base model.
    """
    if Path(out).exists():
        raise UserError(f"--out: {out} exists already; choose another folder or remove it")
    opened = open_model(base_model, dtype or "auto")
    if from_format == _LORA:
        return _import_lora(Path(directory), opened, out)
    if from_format in _PEFT:
        imported = peft.read(Path(directory), opened.model, _PEFT[from_format])
    else:
        imported = official.read(Path(directory), opened.model)
    loaded = load_with_progress(opened, replaced=True)
    targets = _targets(opened, imported.columns)
    k = max(columns.shape[1] for columns in imported.columns.values())
    selection = native.Selection(k, targets, rule=None)
    adapter = on_base.assemble(loaded, imported.values, imported.columns, selection, imported.dense_parameters)
    return _written(adapter, loaded, out, f"k={k}", imported.notes)


def _import_lora(directory: Path, opened: OpenedModel, out: str) -> dict[str, Any]:
    stored = peft_lora.read(directory, opened.model)
    loaded = load_with_progress(opened, replaced=True)
    selection = native.Selection(None, _targets(opened, stored.pairs), rule=None, lora=stored.options)
    adapter = on_base.assemble(loaded, {}, {}, selection, stored.dense_parameters, pairs=stored.pairs)
    return _written(adapter, loaded, out, f"LoRA r={stored.options.r}", [])


def _targets(opened: OpenedModel, modules: Collection[str]) -> list[str]:
    """Return the names of the linear maps that some of the modules belong to."""
    layers_path = opened.model.layers_path
    return [
        names.within_layer(path, layers_path)
        for path, kernel in trees.kernels(opened.model.abstract_params())
        if set(names.module_names(path, kernel, layers_path)) & set(modules)
    ]


def _written(adapter: Adapter, loaded: LoadedModel, out: str, kind: str, notes: list[str]) -> dict[str, Any]:
    """Write an imported adapter, and return the result of the import; an adapter that does not fit is refused."""
    on_base.stack_layers(adapter, loaded)
    on_base.classifier(adapter, loaded)
    native.write(Path(out), adapter)
    dense = f"{len(adapter.dense_parameters)} dense parameters"
    summary = f"{len(adapter.modules)} modules, {dense}, {kind}, {adapter.size:,} values"
    return {"out": out, "values": adapter.size, "k": adapter.metadata["k"], "notes": [summary, *notes]}


def _files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def print_result(result: dict[str, Any]) -> None:
    """Print the result of an export or import as text."""
    for note in result["notes"]:
        console.say(note)
    if "max_logit_difference" in result:
        how = "bit for bit" if result["merged_bit_equal"] else "up to rounding"
        console.say(f"verified: merged weights equal {how}, logits differ by at most {result['max_logit_difference']:.3g}")
    console.say(f"wrote {result['out']}")
