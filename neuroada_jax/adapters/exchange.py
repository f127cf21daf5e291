"""Adapters to and from other libraries: which module reads or writes which format, and whether the result holds."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from neuroada_jax import console
from neuroada_jax.adapters import native, official, on_base, peft, verification
from neuroada_jax.core import trees
from neuroada_jax.core.trees import Tree
from neuroada_jax.errors import UserError
from neuroada_jax.models import names
from neuroada_jax.pretrained import save
from neuroada_jax.pretrained.load import LoadedModel, load_with_progress, open_model, open_with_tokenizer

_PEFT = {"peft-supertuning": peft.Kind.SUPERTUNING, "peft-shira": peft.Kind.SHIRA}


def export_adapter(
    source: str, target: str, out: str, *, model: str | None = None, dtype: str | None = None, verify: bool = False
) -> dict[str, Any]:
    """Writes a native adapter for another library, and loads it there if asked.

    Args:
      source: directory of a native adapter.
      target: "official", "peft-supertuning", "peft-shira", or "huggingface" for the merged model.
      out: the directory to make.
      model: the base, where the adapter's own note of it is out of date.
      dtype: "float32", "bfloat16" or "auto", of the base (so of a merged model); by default as it was in training.
      verify: compare with our merged model, see `verification.verify`.

    Returns: `out`, `files`, `notes`, and what verifying found.

    Raises:
      UserError: what cannot be read or written, what the format cannot hold, or an export that fails its check.
    """
    directory = Path(out)
    if directory.exists():
        raise UserError(f"--out: {out} exists already; choose another folder or remove it")
    if verify:
        verification.require_torch()
    adapter = native.read(source)
    trained_on = adapter.metadata["base"]
    where = model or trained_on.get("source")
    if not where:
        raise UserError(f"{source}: adapter.json names no base; give --model")
    merges = verify or target == "huggingface"
    labels = trained_on.get("labels")
    opened = open_model(where, dtype or trained_on.get("dtype") or "auto", config_only=not merges, labels=labels)
    merged_dtype = jnp.dtype(opened.model.config.dtype)
    tokenizer = None
    if target == "huggingface":
        stored = opened.model.hf_config.get("dtype") or opened.model.hf_config.get("torch_dtype")
        # Nothing is rounded before the merge: bfloat16 weights are loaded as such only where they are stored so.
        opened, tokenizer = open_with_tokenizer(where, merged_dtype.name if stored == "bfloat16" else "float32", labels)
    base_model = load_with_progress(opened) if merges else None

    # The official code and SuperTuning round the values to the weights' dtype before they add; SHiRA and we add in float32.
    round_first = merged_dtype if target in ("official", "peft-supertuning") else jnp.float32
    params: Tree = {}
    if base_model:
        merged = on_base.merge(adapter, base_model, round_first)
        params = jax.tree.map(lambda leaf: leaf.astype(merged_dtype), merged)

    reload: Callable[[LoadedModel], verification.Reloaded]
    if target == "huggingface":
        save.save(directory, opened, params, tokenizer)
        notes = [f"merged in float32, saved as {merged_dtype.name}"]
        reload = lambda base: verification.reload_huggingface(base, directory, merged_dtype)  # noqa: E731
    elif target in _PEFT:
        notes = peft.export(adapter, directory, _PEFT[target], opened)
        reload = lambda base: verification.reload_peft(base, directory)  # noqa: E731
    else:
        notes = official.export(adapter, directory, merged_dtype.name)
        read = functools.partial(official.read, directory, opened.model)
        reload = lambda base: verification.reload_official(base, read())  # noqa: E731

    result: dict[str, Any] = {"out": out, "files": _files(directory), "notes": notes}
    if not verify or base_model is None:
        return result
    result |= verification.verify(base_model, params, functools.partial(reload, base_model))
    if not (result["merged_bit_equal"] and result["max_logit_difference"] <= result["logit_tolerance"]):
        raise UserError(
            f"{out} does not hold what the adapter holds: logits differ by up to {result['max_logit_difference']:.3g} "
            f"(at most {result['logit_tolerance']:.3g} is right), merged weights are "
            f"{'equal' if result['merged_bit_equal'] else 'different'}"
        )
    return result


def import_adapter(
    directory: str, source_format: str, base_model: str, out: str, *, dtype: str | None = None
) -> dict[str, Any]:
    """Writes an adapter of another library as a native adapter of `base`.

    Args:
      directory: the adapter.
      source_format: "official", "peft-supertuning" or "peft-shira".
      base_model: the model it belongs to.
      out: the directory to make.
      dtype: "float32", "bfloat16" or "auto" (the default), in which the adapter's base is loaded from then on.

    Returns: `out`, `values`, `k`, and `notes` that say what was removed or converted.

    Raises:
      UserError: what cannot be read or written, is no such adapter, or does not fit the base.
    """
    if Path(out).exists():
        raise UserError(f"--out: {out} exists already; choose another folder or remove it")
    opened = open_model(base_model, dtype or "auto")
    if source_format in _PEFT:
        imported = peft.read(Path(directory), opened.model, _PEFT[source_format])
    else:
        imported = official.read(Path(directory), opened.model)
    loaded = load_with_progress(opened)
    model = loaded.model
    targets = [
        names.within_layer(path, model.layers_path)
        for path, kernel in trees.kernels(model.abstract_params())
        if set(names.module_names(path, kernel, model.layers_path)) & set(imported.columns)
    ]
    k = max(columns.shape[1] for columns in imported.columns.values())
    selection = native.Selection(k, targets, rule=None)
    adapter = on_base.assemble(loaded, imported.values, imported.columns, selection, imported.dense_parameters)
    on_base.stack_layers(adapter, loaded)  # this and the next refuse what does not fit
    on_base.classifier(adapter, loaded)
    native.write(Path(out), adapter)
    total = sum(values.size for values in imported.values.values())
    summary = f"{len(imported.values)} modules, {len(imported.dense_parameters)} head tensors, k={k}, {total:,} values"
    return {"out": out, "values": total, "k": k, "notes": [summary, *imported.notes]}


def _files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def print_result(result: dict[str, Any]) -> None:
    """What an export or import did, for a person."""
    for note in result["notes"]:
        console.say(note)
    if "max_logit_difference" in result:
        console.say(
            f"verified: merged weights equal bit for bit, logits differ by at most {result['max_logit_difference']:.3g}"
        )
    console.say(f"wrote {result['out']}")
