"""The native adapter: adapter.safetensors and adapter.json. It never contains base weights.

Tensors are unstacked and named by Hugging Face module path:

    "<path>.values"   float32 (O, k)
    "<path>.columns"  int32 (O, k), ascending within a row
    "<parameter>"     float32, a densely trained parameter; adapter.json lists their names in `dense_parameters`
"""

import datetime
import importlib.metadata
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import xxhash

from neuroada_jax import files, models
from neuroada_jax.core import bypass, trees
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.core.trees import Tree
from neuroada_jax.errors import UserError
from neuroada_jax.models import dense_modules as dense_modules
from neuroada_jax.models import names
from neuroada_jax.pretrained.load import IdentifiedModel, LoadedModel, OpenedModel
from neuroada_jax.pretrained.safetensors_directory import read_all

FORMAT = "neuroada-adapter"
VERSION = 1
_PACKAGES = ("neuroada-jax", "jax", "flax", "optax", "safetensors")


class Adapter(NamedTuple):
    """An adapter as it is on disk.

    Attributes:
      metadata: the content of adapter.json.
      values: Hugging Face module path -> float32 (O, k).
      columns: Hugging Face module path -> int32 (O, k).
      dense_parameters: Hugging Face parameter name -> float32 array of any shape; what was trained densely, whole.
    """

    metadata: dict[str, Any]
    values: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]
    dense_parameters: dict[str, np.ndarray]


def installed_versions() -> dict[str, str]:
    """The versions of the libraries that made a file."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def assemble(
    base_model: IdentifiedModel,
    values: Mapping[str, Any],
    columns: Mapping[str, Any],
    *,
    k: int,
    targets: list[str],
    seed: int | None = None,
    rule: str | None = "magnitude",
    dense_parameters: Mapping[str, Any] | None = None,
) -> Adapter:
    """An adapter of `base` from arrays that are named by Hugging Face module path.

    Args:
      base_model: the model that it was trained on; its digests go into the metadata.
      values: module path -> (O, k).
      columns: module path -> (O, k), ascending within a row.
      k: connections per neuron that were asked for; maps with fewer inputs have fewer.
      targets: the target names that were asked for.
      seed: the run's seed, None if it is not known.
      rule: how the columns were chosen, None if it is not known.
      dense_parameters: Hugging Face parameter name -> array, for what was trained densely (whole tensors, no differences).
    """
    shapes = base_model.model.linear_maps()
    about = {
        "source": base_model.source,
        "dtype": jnp.dtype(base_model.model.config.dtype).name,
        "model_type": base_model.model.hf_config["model_type"],
        "labels": classifier_labels(base_model),
        "parameters": bypass.count(base_model.model.abstract_params()),
        "digests": base_model.digests,
    }
    inputs = {module: shapes[module][1] for module in values}
    return Adapter(
        new_metadata(
            about, inputs, k=k, targets=targets, rule=rule, seed=seed, dense_parameters=sorted(dense_parameters or {})
        ),
        {module: np.asarray(leaf, np.float32) for module, leaf in values.items()},
        {module: np.asarray(leaf, np.int32) for module, leaf in columns.items()},
        {name: np.asarray(leaf, np.float32) for name, leaf in (dense_parameters or {}).items()},
    )


def new_metadata(
    base_model: Mapping[str, Any],
    inputs: Mapping[str, int],
    *,
    k: int,
    targets: list[str],
    rule: str | None,
    seed: int | None,
    dense_parameters: list[str],
) -> dict[str, Any]:
    """The content of adapter.json, whatever the base is.

    Args:
      base_model: its `source`, its `digests` (tensor -> digest), and what else is known of it.
      inputs: module -> I.
      k: see `assemble`; so are the others.
      targets: the target names.
      rule: how the columns were chosen.
      seed: the run's seed.
      dense_parameters: names of what was trained densely.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "base": base_model,
        "inputs": inputs,
        "k": k,
        "targets": targets,
        "rule": rule,
        "seed": seed,
        "dense_parameters": dense_parameters,
        "versions": installed_versions(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def classifier_labels(base_model: OpenedModel) -> list[str] | None:
    """What the head of an encoder tells apart; a base without a head cannot say it again."""
    if base_model.model.architecture.is_decoder:
        return None
    named = {str(number): label for number, label in (base_model.model.hf_config.get("id2label") or {}).items()}
    return [named.get(str(number), f"LABEL_{number}") for number in range(base_model.model.config.num_labels)]


def write(directory: Path, adapter: Adapter, *, replace: bool = False) -> None:
    """Writes an adapter directory, whole or not at all.

    Raises:
      UserError: the directory exists (unless `replace`) or cannot be written.
    """
    tensors = {f"{module}.values": leaf for module, leaf in adapter.values.items()}
    tensors |= {f"{module}.columns": leaf for module, leaf in adapter.columns.items()}
    tensors |= adapter.dense_parameters
    with files.new_directory(directory, replace=replace) as temporary:
        path = temporary / "adapter.safetensors"
        safetensors.numpy.save_file(tensors, str(path), metadata={"format": FORMAT})
        metadata = adapter.metadata | {"digest": _digest(path)}
        (temporary / "adapter.json").write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")


def _digest(path: Path) -> str:
    """Of a file's bytes: notices a flipped bit, not somebody who changes both files."""
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def save(
    directory: Path,
    trained: Bypass,
    base_model: IdentifiedModel,
    *,
    k: int,
    targets: list[str],
    seed: int,
    rule: str = "magnitude",
    classifier: Tree | None = None,
    replace: bool = False,
) -> None:
    """Writes what was trained as an adapter directory, whole or not at all.

    Args:
      directory: where; must not exist unless `replace`.
      trained: stacked values (*L, O, k) and columns.
      base_model: the model that it was trained on.
      k: connections per neuron that were asked for.
      targets: the config's target names.
      seed: the run's seed.
      rule: how the columns were chosen.
      classifier: the modules that trained whole, as in the training state; None for none.
      replace: overwrite an adapter that is there.

    Raises:
      UserError: the directory exists or cannot be written.
    """
    stack = base_model.model.layers_path
    values, columns = (dict(names.unstacked(tree, stack)) for tree in trained)
    named = dense_modules.to_names(classifier or {})
    adapter = assemble(base_model, values, columns, k=k, targets=targets, seed=seed, rule=rule, dense_parameters=named)
    write(directory, adapter, replace=replace)


def is_adapter(path: str) -> bool:
    """Whether a directory looks like a native adapter."""
    return (Path(path) / "adapter.json").is_file()


def read(directory: str) -> Adapter:
    """Reads an adapter directory without looking at any base.

    Raises:
      UserError: files missing, of another format or version, truncated, or tensors that are no adapter's.
    """
    root = Path(directory)
    if not is_adapter(directory):
        raise UserError(f"{directory}: no adapter here (adapter.json is missing)")
    metadata = files.read_json(root / "adapter.json")
    if metadata.get("format") != FORMAT:
        raise UserError(f"{root / 'adapter.json'}: format {metadata.get('format')!r}, expected {FORMAT!r}")
    if metadata.get("version") != VERSION:
        raise UserError(f"{root / 'adapter.json'}: version {metadata.get('version')!r}, this release reads {VERSION}")
    if "heads" in metadata:  # the name of this key in neuroada-jax 0.1
        metadata["dense_parameters"] = metadata.pop("heads")
    _check_metadata(root / "adapter.json", metadata)
    path = root / "adapter.safetensors"
    tensors = read_all(path)
    listed = metadata.get("dense_parameters", [])
    if not set(listed) <= set(tensors):
        raise UserError(f"{path}: adapter.json lists dense_parameters {listed}, which are not all there")
    dense_parameters = {name: tensors.pop(name) for name in listed}
    for name, leaf in dense_parameters.items():
        if leaf.dtype != np.float32 or not np.isfinite(leaf).all():
            raise UserError(f"{path}: {name!r} is {leaf.dtype}, or not finite; expected finite float32")
    values = {name.removesuffix(".values"): leaf for name, leaf in tensors.items() if name.endswith(".values")}
    columns = {name.removesuffix(".columns"): leaf for name, leaf in tensors.items() if name.endswith(".columns")}
    if not values or len(values) + len(columns) != len(tensors) or set(values) != set(columns):
        raise UserError(f"{path}: expected pairs of .values and .columns, found {', '.join(sorted(tensors)[:4])} ...")
    for module in values:
        _check(path, module, values[module], columns[module])
    if metadata.get("digest") not in (None, _digest(path)):  # adapters of the first releases have none
        raise UserError(f"{path}: not the file that adapter.json's digest describes; it was damaged or changed")
    return Adapter(metadata, values, columns, dense_parameters)


def _check_metadata(path: Path, metadata: dict[str, Any]) -> None:
    """Refuses fields that later code could not take; what the first releases did not write may be missing."""
    base_model, inputs, dense_parameters = (
        metadata.get("base"),
        metadata.get("inputs", {}),
        metadata.get("dense_parameters", []),
    )
    if not isinstance(base_model, dict) or not isinstance(base_model.get("digests"), dict) or not isinstance(inputs, dict):
        raise UserError(f"{path}: 'base', its 'digests' or 'inputs' is missing or no object")
    if not isinstance(base_model.get("source", ""), str) or base_model.get("dtype", "float32") not in (
        "float32",
        "bfloat16",
    ):
        found = f"source {base_model.get('source')!r} and dtype {base_model.get('dtype')!r}"
        raise UserError(f"{path}: base has {found}, expected text, and float32 or bfloat16")
    for name, number in {"base.parameters": base_model.get("parameters", 1), **inputs}.items():
        if not isinstance(number, int) or number < 1:
            raise UserError(f"{path}: {name} is {number!r}, expected a whole number above 0")
    labels = base_model.get("labels")
    if labels is not None and not (isinstance(labels, list) and labels and all(isinstance(each, str) for each in labels)):
        raise UserError(f"{path}: 'labels' of the base must be a list of names, found {labels!r}")
    if not isinstance(dense_parameters, list) or not all(isinstance(name, str) for name in dense_parameters):
        raise UserError(f"{path}: dense_parameters is {dense_parameters!r}, expected a list of names")


def _check(path: Path, module: str, values: np.ndarray, columns: np.ndarray) -> None:
    if values.ndim != 2 or values.shape != columns.shape or not values.size:
        raise UserError(f"{path}: {module} has values {values.shape} and columns {columns.shape}, expected (O, k) for both")
    if values.dtype != np.float32 or columns.dtype != np.int32:
        raise UserError(
            f"{path}: {module} has values {values.dtype} and columns {columns.dtype}, expected float32 and int32"
        )
    if not np.isfinite(values).all():
        raise UserError(f"{path}: {module}.values holds NaN or infinite entries")
    if columns.min() < 0 or (np.diff(columns, axis=1) <= 0).any():
        raise UserError(f"{path}: {module}.columns must be ascending and distinct within a row, from 0 on")


def check_base(adapter: Adapter, digests: Mapping[str, str], source: str) -> None:
    """Refuses a base that is not the one the adapter was trained on.

    Raises:
      UserError: names the first tensor that differs.
    """
    expected = adapter.metadata.get("base", {}).get("digests", {})
    trained_on = adapter.metadata.get("base", {}).get("source")
    for name, digest in expected.items():
        if digests.get(name) != digest:
            found = "is missing" if name not in digests else "differs"
            raise UserError(f"{source} is not the base of this adapter ({trained_on}): tensor {name!r} {found}")


def stack_layers(adapter: Adapter, base_model: IdentifiedModel) -> Bypass:
    """The adapter's arrays as stacked trees (*L, O, k) for `base`.

    Raises:
      UserError: another base, modules that the base does not have, or entries that do not fit it.
    """
    check_base(adapter, base_model.digests, base_model.source)
    values: Tree = {}
    columns: Tree = {}
    remaining = set(adapter.values)
    for path, kernel in trees.kernels(base_model.model.abstract_params()):
        stacked = names.is_stacked(path, base_model.model.layers_path)
        modules = names.module_names(path, kernel, base_model.model.layers_path)
        present = [module for module in modules if module in adapter.values]
        if not present:
            continue
        if len(present) != len(modules):
            raise UserError(f"adapter: {present[0]} has values but other layers' {path[-1]} have none")
        for module in modules:
            shape, (outputs, inputs) = adapter.values[module].shape, kernel.shape[-2:]
            if shape[0] != outputs or adapter.columns[module].max() >= inputs:
                raise UserError(
                    f"adapter: {module} has {shape[0]} neurons or columns that do not fit ({outputs}, {inputs})"
                )
            if shape != adapter.values[modules[0]].shape:
                raise UserError(f"adapter: {module} has another k than {modules[0]}")
        remaining -= set(modules)
        pick = (lambda arrays: jnp.stack(arrays)) if stacked else (lambda arrays: jnp.asarray(arrays[0]))
        values = trees.put(values, path, {"values": pick([adapter.values[module] for module in modules])})
        columns = trees.put(columns, path, {"columns": pick([adapter.columns[module] for module in modules])})
    if remaining:
        raise UserError(f"adapter: the base has no module {min(remaining)!r}")
    return Bypass(values, columns)


def load(directory: str, base_model: IdentifiedModel) -> Bypass:
    """Reads an adapter for `base`; see `read` and `stack` for what is refused."""
    return stack_layers(read(directory), base_model)


def dense_slots(
    base_model: models.Model, dense_parameters: Mapping[str, np.ndarray], targets: Collection[str]
) -> dict[str, names.Slot]:
    """Where densely trained parameters are in the base's tree.

    Args:
      base_model: the model.
      dense_parameters: Hugging Face parameter name -> array.
      targets: the modules that carry a bypass.

    Raises:
      UserError: the base has no such parameter outside its layers, it has another shape, or it carries a bypass too.
    """
    shapes = base_model.abstract_params()
    leaves = dict(trees.flatten(shapes))
    slots = {
        name: slot for name, slot in names.checkpoint_names(shapes, base_model.layers_path).items() if slot.layer is None
    }
    for name, classifier in dense_parameters.items():
        expected = list(leaves[slots[name].path].shape) if name in slots else "no such tensor"
        if list(classifier.shape) != expected:
            raise UserError(f"adapter: head {name!r} has shape {list(classifier.shape)}, the base has {expected}")
        if name.removesuffix(".weight") in targets:
            raise UserError(f"adapter: {name!r} is both a head and the weight of a bypass")
    return {name: slots[name] for name in dense_parameters}


def classifier(adapter: Adapter, base_model: IdentifiedModel) -> Tree:
    """The densely trained head as a tree of whole float32 parameters, empty where the adapter has none.

    Raises:
      UserError: see `dense_slots`; also a tensor that the base lacks, and the adapter too.
    """
    slots = dense_slots(base_model.model, adapter.dense_parameters, adapter.values)
    lacking = sorted(set(base_model.initialised) - set(adapter.dense_parameters))
    if lacking:
        raise UserError(f"adapter: neither {base_model.source} nor the adapter has {lacking[0]!r}")
    return trees.unflatten({slots[name].path: jnp.asarray(array) for name, array in adapter.dense_parameters.items()})


def merge(adapter: Adapter, base_model: LoadedModel, round_first: Any = jnp.float32) -> Tree:
    """The base's parameters with the adapter merged in: W + values, summed in float32 and rounded once, and its head.

    Args:
      adapter: for this base.
      base_model: the model that the adapter was trained on.
      round_first: round the values to this dtype before they are added; PyTorch's libraries that hold values in the base's
        dtype do so.

    Raises:
      UserError: see `stack` and `classifier`.
    """
    trained = stack_layers(adapter, base_model)
    values = jax.tree.map(lambda leaf: leaf.astype(round_first).astype(jnp.float32), trained.values)
    return dense_modules.join(
        bypass.merge(base_model.params, Bypass(values, trained.columns)), classifier(adapter, base_model)
    )
