"""The native adapter format: adapter.safetensors and adapter.json. It never contains base weights.

Tensors are unstacked and named by Hugging Face module path:

    "<path>.values"   float32 (O, k)
    "<path>.columns"  int32 (O, k), ascending within each neuron
    "<path>.lora_a"   float32 (r, I), in the place of values and columns: the weight is W + alpha / r B A
    "<path>.lora_b"   float32 (O, r); adapter.json has r and alpha in `lora`
    "<parameter>"     float32, a densely trained parameter; adapter.json lists their names in `dense_parameters`
"""

import datetime
import functools
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import xxhash

from neuroada_jax import console, files
from neuroada_jax.adapters import factors
from neuroada_jax.adapters.factors import Factors, LoraOptions
from neuroada_jax.data.prompts import PromptForm
from neuroada_jax.errors import UserError
from neuroada_jax.models.labels import MULTILABEL, PROBLEM_TYPES, Labels
from neuroada_jax.pretrained import prompt_form
from neuroada_jax.pretrained.safetensors_directory import read_all

FORMAT = "neuroada-adapter"
VERSION = 1
WITH_FACTORS = 2  # the version of adapters with low-rank factors, which earlier releases cannot read
_FIELDS_DIGEST = "fields_digest"  # the field of adapter.json with the digest of all others
_PACKAGES = ("neuroada-jax", "jax", "flax", "optax", "safetensors")


class Adapter(NamedTuple):
    """An adapter as it is stored.

    Attributes:
      metadata: the content of adapter.json.
      values: Hugging Face module path -> float32 (O, k).
      columns: Hugging Face module path -> int32 (O, k).
      dense_parameters: Hugging Face parameter name -> float32 array of any shape: the complete trained parameter, not a
        difference.
      factors: Hugging Face module path -> low-rank factors; empty where values train.
    """

    metadata: dict[str, Any]
    values: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]
    dense_parameters: dict[str, np.ndarray]
    factors: Mapping[str, Factors] = {}

    @property
    def modules(self) -> list[str]:
        """The linear maps that the adapter changes."""
        return [*self.values, *self.factors]

    @property
    def size(self) -> int:
        """The number of trained values and entries of factors; without dense parameters."""
        return sum(map(self.trained, self.values)) + sum(a.size + b.size for a, b in self.factors.values())

    def trained(self, module: str) -> int:
        """Return how many values of a linear map were trained: of random positions over more, those that are not zero."""
        values, options = self.values[module], options_of(self.metadata)
        if options.random_over != "neuron":
            return int(np.count_nonzero(values))
        layer = re.search(r"\.(\d+)(?=\.|$)", module)
        if options.layers is not None and layer and int(layer[1]) not in options.layers:
            return 0
        return max(1, round(options.neurons * len(values))) * int(values.shape[1])


class SelectionOptions(NamedTuple):
    """The settings beside k, targets and rule, in adapter.json where they differ from these defaults.

    Attributes:
      shared_columns: whether all neurons of a map have the same columns. The file has them for every neuron.
      neurons: the share of the neurons of each map that was trained. The others have zeros.
      layers: the numbers of the layers that were trained; None: all. The others have zeros.
      rank: of the approximation by which the columns were selected; None: they were not.
      random_over: what random positions were drawn from: "neuron", "map", "block" or "model". But for "neuron" k is their
        mean number in a neuron, and the file has zeros beyond a neuron's own.
    """

    shared_columns: bool = False
    neurons: float = 1.0
    layers: list[int] | None = None
    rank: int | None = None
    random_over: str = "neuron"


class Selection(NamedTuple):
    """The settings by which an adapter's connections were selected, for its metadata.

    Attributes:
      k: the connections per neuron that were requested; a linear map with fewer inputs has fewer. None of low rank.
      targets: the names of the linear maps that were requested.
      rule: the scoring rule of the columns; None if unknown.
      seed: the seed of the run; None if unknown.
      options: the other settings.
      lora: of low-rank factors; None for connections.
    """

    k: int | None
    targets: Sequence[str]
    rule: str | None = "magnitude"
    seed: int | None = None
    options: SelectionOptions = SelectionOptions()
    lora: LoraOptions | None = None


def installed_versions() -> dict[str, str]:
    """Return the installed versions of this package and of its main dependencies."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def new_metadata(
    base_model: Mapping[str, Any],
    inputs: Mapping[str, int],
    selection: Selection,
    dense_parameters: Sequence[str] = (),
    prompt: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of adapter.json.

    Args:
      base_model: its `source`, its `digests` (tensor -> digest), and other facts about it.
      inputs: module path -> its number of inputs I.
      selection: how the connections were selected.
      dense_parameters: the names of the densely trained parameters.
      prompt: the form of the prompts that it was trained on (`prompt_form.to_json`); None if unknown.
    """
    return {
        "format": FORMAT,
        "version": VERSION if selection.lora is None else WITH_FACTORS,
        "base": base_model,
        "inputs": inputs,
        "k": selection.k,
        "targets": list(selection.targets),
        "rule": selection.rule,
        "seed": selection.seed,
        "selection": {
            name: value
            for name, value in selection.options._asdict().items()
            if value != SelectionOptions._field_defaults[name]
        },
        **({} if selection.lora is None else {"lora": selection.lora._asdict()}),
        "dense_parameters": list(dense_parameters),
        "prompt": prompt,
        "versions": installed_versions(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write(directory: Path, adapter: Adapter, *, replace: bool = False) -> None:
    """Write an adapter directory, complete or not at all.

    Raises:
      UserError: the directory exists (unless `replace`) or cannot be written.
    """
    tensors = {f"{module}.values": leaf for module, leaf in adapter.values.items()}
    tensors |= {f"{module}.columns": leaf for module, leaf in adapter.columns.items()}
    for module, pair in adapter.factors.items():
        tensors |= {f"{module}.lora_a": pair.a, f"{module}.lora_b": pair.b}
    tensors |= adapter.dense_parameters
    with files.new_directory(directory, replace=replace) as temporary:
        path = temporary / "adapter.safetensors"
        safetensors.numpy.save_file(tensors, str(path), metadata={"format": FORMAT})
        metadata = adapter.metadata | {"base": _relative_to(directory, adapter.metadata["base"]), "digest": _digest(path)}
        metadata[_FIELDS_DIGEST] = _digest_of_fields(json.loads(json.dumps(metadata)))
        (temporary / "adapter.json").write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")


def _relative_to(directory: Path, base_model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a base model's metadata with the path of a local one as seen from the adapter: both may move together."""
    kept = {key: value for key, value in base_model.items() if key != "relative"}
    if not os.path.exists(kept.get("absolute", "")):
        return kept
    return kept | {"relative": os.path.relpath(os.path.realpath(kept["absolute"]), os.path.realpath(directory))}


def _digest(path: Path) -> str:
    """Return the digest of a file's bytes, which detects damage but not somebody who changes both files."""
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def _digest_of_fields(metadata: Mapping[str, Any]) -> str:
    """Return the digest of all other fields of an adapter.json, in any order."""
    return files.digest({name: value for name, value in metadata.items() if name != _FIELDS_DIGEST})


@functools.cache
def _say_without_digest(path: str) -> None:
    console.say(f"{path}: has no {_FIELDS_DIGEST}, as adapters of 0.1: a damaged field in it would not be noticed")


def is_adapter(path: str) -> bool:
    """Return whether a directory looks like a native adapter."""
    return (Path(path) / "adapter.json").is_file()


def read(directory: str) -> Adapter:
    """Read and check an adapter directory; the base model is not needed.

    Raises:
      UserError: a missing, damaged or truncated file, another format or version, or tensors that form no adapter.
    """
    root = Path(directory)
    if not is_adapter(directory):
        raise UserError(f"{directory}: no adapter here (adapter.json is missing)")
    metadata = files.read_json(root / "adapter.json")
    if metadata.get("format") != FORMAT:
        raise UserError(f"{root / 'adapter.json'}: format {metadata.get('format')!r}, expected {FORMAT!r}")
    if metadata.get("version") != (WITH_FACTORS if "lora" in metadata else VERSION):
        raise UserError(
            f"{root / 'adapter.json'}: version {metadata.get('version')!r}, this release reads {VERSION}, and with "
            f"low-rank factors {WITH_FACTORS}"
        )
    stored = dict(metadata)
    if "heads" in metadata:  # the name of this key in neuroada-jax 0.1
        metadata["dense_parameters"] = metadata.pop("heads")
    _check_metadata(root / "adapter.json", metadata)
    if _FIELDS_DIGEST not in stored:
        _say_without_digest(str(root / "adapter.json"))
    elif stored[_FIELDS_DIGEST] != _digest_of_fields(stored):
        raise UserError(
            f"{root / 'adapter.json'}: its fields differ from its {_FIELDS_DIGEST}; it was damaged, or changed by hand ("
            f"then remove {_FIELDS_DIGEST} from it)"
        )
    path = root / "adapter.safetensors"
    tensors = read_all(path)
    dense_parameters = _pop_dense_parameters(path, tensors, metadata.get("dense_parameters", []))
    lora = factors.options_of(metadata)
    first, second = ("values", "columns") if lora is None else ("lora_a", "lora_b")
    firsts, seconds = _named(tensors, first), _named(tensors, second)
    if not firsts or len(firsts) + len(seconds) != len(tensors) or set(firsts) != set(seconds):
        raise UserError(f"{path}: expected pairs of .{first} and .{second}, found {', '.join(sorted(tensors)[:4])} ...")
    for module in firsts:
        if lora is None:
            _check_pair(path, module, firsts[module], seconds[module])
        else:
            factors.check(f"{path}: {module}", Factors(firsts[module], seconds[module]), lora.r)
    if metadata.get("digest") not in (None, _digest(path)):  # adapters of the first releases have none
        raise UserError(f"{path}: its digest differs from the one in adapter.json; the file was damaged or changed")
    if lora is None:
        return Adapter(metadata, firsts, seconds, dense_parameters)
    pairs = {module: Factors(leaf, seconds[module]) for module, leaf in firsts.items()}
    return Adapter(metadata, {}, {}, dense_parameters, pairs)


def _named(tensors: Mapping[str, np.ndarray], last: str) -> dict[str, np.ndarray]:
    """Return the tensors with this last part of their name, by the rest of it."""
    return {name.removesuffix(f".{last}"): leaf for name, leaf in tensors.items() if name.endswith(f".{last}")}


def _check_metadata(path: Path, metadata: dict[str, Any]) -> None:
    """Refuse fields that later code could not use; fields that the first releases did not write may be absent."""
    base_model, inputs = metadata.get("base"), metadata.get("inputs", {})
    if not isinstance(base_model, dict) or not isinstance(base_model.get("digests"), dict) or not isinstance(inputs, dict):
        raise UserError(f"{path}: 'base', its 'digests' or 'inputs' is missing or not an object")
    source, dtype = base_model.get("source", ""), base_model.get("dtype", "float32")
    if not isinstance(source, str) or dtype not in ("float32", "bfloat16"):
        raise UserError(f"{path}: base has source {source!r} and dtype {dtype!r}, expected text, and float32 or bfloat16")
    for name in ("absolute", "relative", "quantization"):  # absent where the base is not local or quantised, and in 0.1
        if not isinstance(base_model.get(name, ""), str):
            expected = "text" if name == "quantization" else "a path"
            raise UserError(f"{path}: base.{name}: expected {expected}, found {base_model[name]!r}")
    for name, number in {"base.parameters": base_model.get("parameters", 1), **inputs}.items():
        if type(number) is not int or number < 1:
            raise UserError(f"{path}: {name} is {number!r}, expected a positive integer")
    for name, kinds in (("k", int), ("targets", list), ("rule", str), ("seed", int), ("versions", dict), ("created", str)):
        if not isinstance(metadata.get(name), kinds | None):
            raise UserError(f"{path}: {name} is {metadata[name]!r}, expected {kinds.__name__} or null")
    labels = base_model.get("labels")
    if labels is not None and not (isinstance(labels, list) and labels and all(isinstance(each, str) for each in labels)):
        raise UserError(f"{path}: 'labels' of the base must be a list of names, found {labels!r}")
    problem = base_model.get("problem_type")
    if problem not in (None, *PROBLEM_TYPES):
        raise UserError(
            f"{path}: 'problem_type' of the base is {problem!r}, expected null or one of {', '.join(PROBLEM_TYPES)}"
        )
    options_of(metadata, path)
    factors.options_of(metadata, path)
    dense_parameters = metadata.get("dense_parameters", [])
    if not isinstance(dense_parameters, list) or not all(isinstance(name, str) for name in dense_parameters):
        raise UserError(f"{path}: dense_parameters is {dense_parameters!r}, expected a list of names")
    prompt_form.from_json(metadata.get("prompt"), f"{path}: prompt")  # absent in 0.1


_FITS: dict[str, Callable[[Any], bool]] = {
    "shared_columns": lambda value: isinstance(value, bool),
    "neurons": lambda value: isinstance(value, float | int) and not isinstance(value, bool) and 0 < value <= 1,
    "layers": lambda value: isinstance(value, list) and all(type(each) is int and each >= 0 for each in value),
    "rank": lambda value: type(value) is int and value > 0,
    "random_over": lambda value: value in ("neuron", "map", "block", "model"),
}


def options_of(metadata: Mapping[str, Any], path: str | Path = "adapter.json") -> SelectionOptions:
    """Return how the connections were selected, from an adapter's metadata; those of 0.1 have the defaults.

    Raises:
      UserError: a setting that this release does not know, or a wrong value.
    """
    found = metadata.get("selection", {})
    if not isinstance(found, dict) or not all(name in _FITS and _FITS[name](value) for name, value in found.items()):
        raise UserError(f"{path}: selection is {found!r}, expected an object with any of {', '.join(_FITS)}")
    return SelectionOptions(**found)


def labels_of(base_model: Mapping[str, Any]) -> Labels | None:
    """Return the labels of a classifier from an adapter's metadata of its base model; None for a decoder."""
    names = base_model.get("labels")
    return Labels(tuple(names), base_model.get("problem_type") == MULTILABEL) if names else None


def form_of(adapter: Adapter) -> PromptForm | None:
    """Return the form of the prompts that an adapter was trained on; None where it is not recorded (0.1, imports)."""
    return prompt_form.from_json(adapter.metadata.get("prompt"), "adapter.json: prompt")


def _pop_dense_parameters(path: Path, tensors: dict[str, np.ndarray], listed: list[str]) -> dict[str, np.ndarray]:
    """Take the listed tensors out of `tensors` and return them, checked."""
    if not set(listed) <= set(tensors):
        raise UserError(f"{path}: adapter.json lists dense_parameters {listed}, some of which are missing")
    dense_parameters = {name: tensors.pop(name) for name in listed}
    for name, leaf in dense_parameters.items():
        if leaf.dtype != np.float32 or not np.isfinite(leaf).all():
            raise UserError(f"{path}: {name!r} is {leaf.dtype}, or not finite; expected finite float32")
    return dense_parameters


def _check_pair(path: Path, module: str, values: np.ndarray, columns: np.ndarray) -> None:
    if values.ndim != 2 or values.shape != columns.shape or not values.size:
        raise UserError(f"{path}: {module} has values {values.shape} and columns {columns.shape}, expected (O, k) for both")
    if values.dtype != np.float32 or columns.dtype != np.int32:
        raise UserError(
            f"{path}: {module} has values {values.dtype} and columns {columns.dtype}, expected float32 and int32"
        )
    if not np.isfinite(values).all():
        raise UserError(f"{path}: {module}.values holds NaN or infinite entries")
    if columns.min() < 0 or (np.diff(columns, axis=1) <= 0).any():
        raise UserError(f"{path}: {module}.columns must be ascending and distinct within each neuron, from 0 on")


def without_digests(adapter: Adapter) -> Adapter:
    """Return the adapter without the digests of its base model, so that it is used on any that it fits (--force)."""
    base_model = {**adapter.metadata["base"], "digests": {}}
    return adapter._replace(metadata={**adapter.metadata, "base": base_model})


def check_base(adapter: Adapter, digests: Mapping[str, str], source: str) -> None:
    """Refuse a base model other than the one that the adapter was trained on.

    Args:
      adapter: its metadata has the expected digests.
      digests: tensor name -> digest, of the base model at hand.
      source: the name of the base model at hand, for the message.

    Raises:
      UserError: a tensor is missing or differs; names the first.
    """
    expected = adapter.metadata.get("base", {}).get("digests", {})
    trained_on = adapter.metadata.get("base", {}).get("source", "own parameters")
    for name, digest in expected.items():
        if digests.get(name) != digest:
            found = "is missing" if name not in digests else "differs"
            raise UserError(f"{source} is not the base model of this adapter ({trained_on}): tensor {name!r} {found}")
