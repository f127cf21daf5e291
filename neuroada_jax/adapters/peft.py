"""The formats of Hugging Face PEFT's sparse tuners: SuperTuning (peft 0.21 or later) and SHiRA.

An adapter is a directory of adapter_config.json and adapter_model.safetensors. Tensors are named
`base_model.model.<module>.<name>`:

    SuperTuning   supertuning_values   float32 (n,),  n = int(O * I * (1 - sparsity)), one sparsity for all modules
                  supertuning_indices  int32 (n,),    row * I + column
    SHiRA         shira_weight         float32 (n,),  n = r * (I + O), one r for all modules
                  shira_indices        int32 (2, n),  rows and columns

PEFT fixes n, so entries that the adapter does not need are padding: value -0.0 at row 0, column 0, after the real entries.
Both tuners add their values to the weight, and adding -0.0 changes no float, not even -0.0.

This module does not import peft, and imports nothing that a config names.
"""

import enum
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy

from neuroada_jax import files, models
from neuroada_jax.adapters.foreign import Entries, Imported, per_neuron
from neuroada_jax.adapters.native import Adapter
from neuroada_jax.adapters.on_base import dense_slots
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained.load import OpenedModel
from neuroada_jax.pretrained.safetensors_directory import read_all

PREFIX = "base_model.model."
_MODULE = re.compile(r"\w+(\.\w+)*", re.ASCII)
_LAST = 2**31 - 1  # positions are int32


class Kind(enum.Enum):
    """The tuners, by their names in adapter_config.json."""

    SUPERTUNING = "SUPERTUNING"
    SHIRA = "SHIRA"


_VALUES = {Kind.SUPERTUNING: "supertuning_values", Kind.SHIRA: "shira_weight"}
_INDICES = {Kind.SUPERTUNING: "supertuning_indices", Kind.SHIRA: "shira_indices"}


class Stored(NamedTuple):
    """A PEFT adapter, read and checked as far as possible without its base model.

    Attributes:
      kind: the tuner.
      config: the content of adapter_config.json.
      values: module path -> float32 (n,), padding included.
      indices: module path -> int64 (n,) for SuperTuning, (2, n) for SHiRA.
      entries: module path -> the number of the n entries that are not padding.
      dense_parameters: parameter name -> float32 array, from `modules_to_save`.
    """

    kind: Kind
    config: dict[str, Any]
    values: dict[str, np.ndarray]
    indices: dict[str, np.ndarray]
    entries: dict[str, int]
    dense_parameters: dict[str, np.ndarray]


def supertuning_length(outputs: int, inputs: int, sparsity: float) -> int:
    """Return the number of entries that SuperTuning has on a weight (O, I), by the float expression that PEFT evaluates."""
    return int(outputs * inputs * (1 - sparsity))


def _sparsity(shapes: dict[str, tuple[int, int, int]]) -> float:
    """Return the largest sparsity in [0, 1) that gives every weight (O, I) with its k at least k * O entries."""
    sparsity = max(0.0, 1 - max(k / inputs for _, inputs, k in shapes.values()))
    while any(supertuning_length(outputs, inputs, sparsity) < outputs * k for outputs, inputs, k in shapes.values()):
        sparsity = math.nextafter(sparsity, 0.0)  # the quotient was rounded; one or two steps correct it
    return sparsity


def _rank(shapes: dict[str, tuple[int, int, int]]) -> int:
    """Return the smallest r of SHiRA that gives every weight (O, I) with its k at least k * O entries."""
    rank = max(math.ceil(outputs * k / (inputs + outputs)) for outputs, inputs, k in shapes.values())
    for module, (outputs, inputs, _) in shapes.items():
        if rank * (inputs + outputs) > outputs * inputs:
            raise UserError(
                f"PEFT SHiRA cannot hold this adapter: it needs r={rank}, which is more entries than {module} has "
                f"weights ({outputs}, {inputs}); peft-supertuning can"
            )
    return rank


def export(adapter: Adapter, directory: Path, kind: Kind, base_model: OpenedModel) -> list[str]:
    """Write a directory that `PeftModel.from_pretrained` loads.

    Args:
      adapter: the adapter to write.
      directory: the destination; must not exist.
      kind: the tuner that will read it.
      base_model: the adapter's base model; its weights are not needed.

    Returns: lines that report the padding.

    Raises:
      UserError: the adapter does not fit the base model or the format, or the directory exists or cannot be written.
    """
    shapes = {}
    for module, (outputs, inputs) in shapes_of(base_model.model, list(adapter.values)).items():
        columns = adapter.columns[module]
        if len(columns) != outputs or columns.max() >= inputs:
            raise UserError(
                f"adapter: {module} has {len(columns)} neurons or columns that do not fit ({outputs}, {inputs})"
            )
        if outputs * inputs > _LAST:
            raise UserError(f"{module} has {outputs * inputs:,} weights; PEFT's positions end at {_LAST:,}")
        shapes[module] = (outputs, inputs, columns.shape[1])
    sparsity = _sparsity(shapes) if kind is Kind.SUPERTUNING else 0.0
    rank = _rank(shapes) if kind is Kind.SHIRA else 0
    tensors: dict[str, np.ndarray] = {f"{PREFIX}{name}": leaf for name, leaf in adapter.dense_parameters.items()}
    padding = 0
    for module, (outputs, inputs, k) in shapes.items():
        length = supertuning_length(outputs, inputs, sparsity) if kind is Kind.SUPERTUNING else rank * (inputs + outputs)
        padding += length - outputs * k
        values = np.full(length, -0.0, np.float32)
        values[: outputs * k] = adapter.values[module].reshape(-1)
        indices = np.zeros((2, length), np.int32)
        indices[0, : outputs * k] = np.repeat(np.arange(outputs, dtype=np.int32), k)
        indices[1, : outputs * k] = adapter.columns[module].reshape(-1)
        tensors[f"{PREFIX}{module}.{_VALUES[kind]}"] = values
        tensors[f"{PREFIX}{module}.{_INDICES[kind]}"] = (
            indices[0] * np.int32(inputs) + indices[1] if kind is Kind.SUPERTUNING else indices
        )
    config = shared_config(kind.value, adapter, base_model)
    if kind is Kind.SUPERTUNING:
        config |= {"sparsity": sparsity, "save_precomputed_indices": True}
    else:
        # Any mask_type but "random", for which PEFT would replace the saved indices by a mask of its own.
        config |= {"r": rank, "mask_type": "neuroada"}
    with files.new_directory(directory) as temporary:
        safetensors.numpy.save_file(tensors, str(temporary / "adapter_model.safetensors"), metadata={"format": "pt"})
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    total = sum(outputs * k for outputs, _, k in shapes.values())
    setting = f"sparsity {sparsity!r}" if kind is Kind.SUPERTUNING else f"r={rank}"
    return [f"{setting}: {total:,} values, and {padding:,} of padding (value -0.0 at row 0, column 0)"]


def shared_config(peft_type: str, adapter: Adapter, base_model: OpenedModel) -> dict[str, Any]:
    """Return the fields of adapter_config.json that all tuners have."""
    return {
        "peft_type": peft_type,
        # PEFT's class for sequence classification would save RoBERTa's classifier as one module, and its merge_and_unload
        # fails on a saved module that has submodules: dense modules are listed one by one, without a task.
        "task_type": "CAUSAL_LM" if base_model.model.architecture.is_decoder else None,
        "base_model_name_or_path": base_model.source,
        "target_modules": sorted(adapter.modules),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in adapter.dense_parameters}) or None,
        "inference_mode": True,
    }


def shapes_of(base_model: models.Model, modules: list[str]) -> dict[str, tuple[int, int]]:
    """Return the (O, I) of modules of the base model."""
    known = base_model.linear_maps()
    for module in modules:
        if module not in known:
            raise UserError(f"the base model has no linear map {module!r}")
    return {module: known[module] for module in modules}


def is_adapter(path: str) -> bool:
    """Return whether a directory looks like a PEFT adapter."""
    return (Path(path) / "adapter_config.json").is_file()


def open_stored(directory: Path) -> Stored:
    """Read a PEFT adapter of either kind and check all that can be checked without its base model.

    Raises:
      UserError: a missing or truncated file, another tuner, or tensors that form no such adapter.
    """
    config, tensors, path = read_files(directory)
    kind = _check_config(directory / "adapter_config.json", config)
    values, indices, dense_parameters = _split_tensors(path, kind, tensors)
    check_targets(directory / "adapter_config.json", config, values)
    check_dense_parameters(path, config.get("modules_to_save") or [], dense_parameters)
    for module, leaf in values.items():
        _check_tensors(f"{path}: {module}", kind, leaf, indices[module])
    indices = {module: leaf.astype(np.int64) for module, leaf in indices.items()}
    entries = {module: _without_padding(values[module], indices[module]) for module in values}
    return Stored(kind, config, values, indices, entries, dense_parameters)


_Arrays = dict[str, np.ndarray]


def read_files(directory: Path) -> tuple[dict[str, Any], _Arrays, Path]:
    """Return the content of adapter_config.json, the tensors of adapter_model.safetensors, and the path of these.

    Tensors in bfloat16 and float16 are widened to float32, which is exact.

    Raises:
      UserError: a missing or truncated file, or a pickle in the place of the tensors.
    """
    where, path = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    if not where.is_file():
        raise UserError(f"{directory}: no PEFT adapter here (adapter_config.json is missing)")
    config = files.read_json(where)
    if not path.is_file() and (directory / "adapter_model.bin").is_file():
        raise UserError(f"{directory}: adapter_model.bin is a pickle and is not read; save it again as safetensors")
    narrow = (np.float16, ml_dtypes.bfloat16)
    tensors = {name: leaf.astype(np.float32) if leaf.dtype in narrow else leaf for name, leaf in read_all(path).items()}
    return config, tensors, path


def own_name(path: Path, name: str, expected: str) -> str:
    """Return the name of a tensor without PEFT's prefix; `expected` is the rest of a right one, for the message."""
    if not name.startswith(PREFIX) or not _MODULE.fullmatch(name):
        raise UserError(f"{path}: tensor {name!r}, expected names like {PREFIX}{expected}")
    return name.removeprefix(PREFIX)


def check_targets(where: Path, config: dict[str, Any], modules: Iterable[str]) -> None:
    """Refuse a config whose list of targets lacks one of the modules, which PEFT would skip."""
    targets = config.get("target_modules")
    if isinstance(targets, list):  # otherwise a regular expression, which is not evaluated
        for module in modules:
            if not any(f".{module}".endswith(f".{target}") for target in targets):
                raise UserError(f"{where}: target_modules does not name {module}, which has values")


def _split_tensors(path: Path, kind: Kind, tensors: _Arrays) -> tuple[_Arrays, _Arrays, _Arrays]:
    """Return values and indices by module path, and all other tensors by parameter name."""
    values, indices, dense_parameters = {}, {}, {}
    for name, leaf in tensors.items():
        module, _, last = own_name(path, name, f"<module>.{_VALUES[kind]}").rpartition(".")
        if last == _VALUES[kind]:
            values[module] = leaf
        elif last == _INDICES[kind]:
            indices[module] = leaf
        else:
            dense_parameters[f"{module}.{last}"] = leaf
    if not values or set(values) != set(indices):
        raise UserError(f"{path}: expected pairs of {_VALUES[kind]} and {_INDICES[kind]}")
    return values, indices, dense_parameters


def check_dense_parameters(path: Path, saved: list[str], dense_parameters: _Arrays) -> None:
    """Refuse tensors that belong to none of modules_to_save, which PEFT compares with the ends of paths, or wrong ones."""
    for name, leaf in dense_parameters.items():
        if not any(f"{module}." in name for module in saved):
            raise UserError(f"{path}: tensor {name!r} belongs to no tuner and to none of modules_to_save {saved}")
        if leaf.dtype != np.float32:
            raise UserError(f"{path}: dense parameter {name!r} is {leaf.dtype}, expected float32")
        if not np.isfinite(leaf).all():
            raise UserError(f"{path}: dense parameter {name!r} has NaN or infinite numbers")


def check_embedding(directory: Path, base_model: models.Model, stored: Any) -> None:
    """Refuse a trained embedding whose weights are the output layer's, too, unless PEFT was told to train them as one."""
    tied = base_model.architecture.is_decoder and base_model.config.tied
    if not tied or stored.config.get("ensure_weight_tying"):
        return
    for name in stored.dense_parameters:
        if name.endswith("embed_tokens.weight"):
            raise UserError(
                f"{directory}: {name!r} is trained, but the base model's output layer has the same weights and PEFT leaves "
                "it as it was; no merged model can hold both"
            )


def _check_config(where: Path, config: dict[str, Any]) -> Kind:
    kinds = [kind.value for kind in Kind]
    if config.get("peft_type") not in kinds:
        raise UserError(f"{where}: peft_type {config.get('peft_type')!r}, expected {' or '.join(kinds)}")
    kind = Kind(config["peft_type"])
    sparsity, rank = config.get("sparsity"), config.get("r")
    if kind is Kind.SUPERTUNING:
        if rank is not None:
            raise UserError(f"{where}: r is {rank!r}: SuperTuning's low-rank part is not supported")
        if not isinstance(sparsity, float | int) or not 0 <= sparsity < 1:
            raise UserError(f"{where}: sparsity {sparsity!r}, expected a number from 0 to below 1")
    elif not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UserError(f"{where}: r {rank!r}, expected a positive integer")
    if config.get("fan_in_fan_out"):
        raise UserError(f"{where}: fan_in_fan_out is set; only weights of (outputs, inputs) are supported")
    check_saved(where, config)
    return kind


def check_saved(where: Path, config: dict[str, Any]) -> None:
    """Refuse modules_to_save that is no list of names."""
    saved = config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise UserError(f"{where}: modules_to_save {saved!r}, expected a list of names or null")


def _check_tensors(where: str, kind: Kind, values: np.ndarray, indices: np.ndarray) -> None:
    expected = (2, values.size) if kind is Kind.SHIRA else (values.size,)
    if values.ndim != 1 or indices.shape != expected or not values.size:
        raise UserError(f"{where} has values {values.shape} and indices {indices.shape}, expected (n,) and {expected}")
    if values.dtype != np.float32 or indices.dtype not in (np.int32, np.int64):
        raise UserError(f"{where} has values {values.dtype} and indices {indices.dtype}, expected float32 and int32")
    if not np.isfinite(values).all():
        raise UserError(f"{where} holds NaN or infinite values")
    if indices.min() < 0 or indices.max() > _LAST:
        raise UserError(f"{where} has indices outside 0 to {_LAST}")


def _without_padding(values: np.ndarray, indices: np.ndarray) -> int:
    """Return the number of entries without the trailing zeros at row 0, column 0; at least one."""
    pads = (values == 0) & (np.atleast_2d(indices) == 0).all(axis=0)
    real = np.flatnonzero(~pads)
    return int(real[-1]) + 1 if len(real) else 1


def read(directory: Path, base_model: models.Model, kind: Kind) -> Imported:
    """Read a PEFT adapter of `base_model`, without its padding. Nothing in it is executed.

    Entries may lie at any positions, as PEFT's own training leaves them; see `foreign.per_neuron`.

    Raises:
      UserError: see `open_stored`; also another tuner than `kind`, a module that the base model does not have, a number of
        entries that differs from the config's, or positions outside the weight or twice.
    """
    stored = open_stored(directory)
    if stored.kind is not kind:
        raise UserError(f"{directory}: this is a {stored.kind.value} adapter, not {kind.value}")
    entries = {}
    shapes = shapes_of(base_model, list(stored.values))
    for module, (outputs, inputs) in shapes.items():
        found = len(stored.values[module])
        if kind is Kind.SUPERTUNING:
            expected = supertuning_length(outputs, inputs, float(stored.config["sparsity"]))
        else:
            expected = stored.config["r"] * (inputs + outputs)
        if found != expected:
            raise UserError(
                f"{directory}: {module} has {found:,} entries, but the config gives {expected:,} on ({outputs}, {inputs})"
            )
        indices = stored.indices[module][..., : stored.entries[module]]
        if kind is Kind.SHIRA and indices[1].max() >= inputs:  # otherwise it would wrap into the next row
            raise UserError(f"{directory}: {module} has a column {indices[1].max()}, but {inputs} inputs")
        flat = indices[0] * inputs + indices[1] if kind is Kind.SHIRA else indices
        entries[module] = Entries(stored.values[module][: stored.entries[module]], flat, (outputs, inputs))
    check_embedding(directory, base_model, stored)
    try:
        dense_slots(base_model, stored.dense_parameters, stored.values)
        values, columns, notes = per_neuron(entries)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from error
    padding = sum(leaf.size for leaf in stored.values.values()) - sum(stored.entries.values())
    if padding:
        notes = [f"removed {padding:,} padding entries (value 0 at row 0, column 0, after the others)", *notes]
    return Imported(values, columns, stored.dense_parameters, notes)
