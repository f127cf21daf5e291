"""Adapters and their base model: from trained arrays to a native adapter, and from an adapter to parameters.

save(directory, trained, base_model, Selection(k, targets))
trained = load(directory, base_model)              # stacked values and columns
params = merge(native.read(directory), base_model)
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neuroada_jax import models
from neuroada_jax.adapters import factors, native
from neuroada_jax.adapters.base_model import place
from neuroada_jax.adapters.factors import Factors
from neuroada_jax.adapters.native import Adapter, Selection
from neuroada_jax.core import bypass, low_rank, trees
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.core.entries import round_to
from neuroada_jax.core.trees import Tree
from neuroada_jax.data.prompts import PromptForm
from neuroada_jax.errors import UserError
from neuroada_jax.models import dense_modules, names
from neuroada_jax.pretrained import hub, prompt_form, quantization
from neuroada_jax.pretrained.load import IdentifiedModel, LoadedModel, OpenedModel
from neuroada_jax.pretrained.tensor_names import EMBEDDING, HEAD


def assemble(
    base_model: IdentifiedModel,
    values: Mapping[str, Any],
    columns: Mapping[str, Any],
    selection: Selection,
    dense_parameters: Mapping[str, Any] | None = None,
    form: PromptForm | None = None,
    pairs: Mapping[str, Factors] | None = None,
) -> Adapter:
    """Return an adapter of `base_model` from arrays that are named by Hugging Face module path.

    Args:
      base_model: the model that the arrays were trained on; its digests go into the metadata.
      values: module path -> (O, k), stored as float32.
      columns: module path -> (O, k), ascending within each neuron, stored as int32.
      selection: how the columns were selected.
      dense_parameters: Hugging Face parameter name -> the complete, densely trained parameter.
      form: of the prompts that it was trained on, with its template's complete text; None if unknown.
      pairs: module path -> low-rank factors, stored as float32, in the place of values and columns.
    """
    shapes = base_model.model.linear_maps()
    is_decoder = base_model.model.architecture.is_decoder
    about = {
        **place(base_model),
        "dtype": jnp.dtype(base_model.model.config.dtype).name,
        "model_type": base_model.model.hf_config["model_type"],
        "labels": classifier_labels(base_model),
        "problem_type": None if is_decoder else base_model.model.hf_config.get("problem_type"),
        "parameters": bypass.count(base_model.model.abstract_params()),
        "digests": base_model.digests,
    }
    if base_model.model.quantization != quantization.NONE:
        about["quantization"] = base_model.model.quantization
    snapshot = hub.snapshot_of(base_model.path)
    if snapshot:
        about["revision"] = snapshot[1]
    pairs = {
        module: Factors(np.asarray(a, np.float32), np.asarray(b, np.float32)) for module, (a, b) in (pairs or {}).items()
    }
    inputs = {module: shapes[module][1] for module in (*values, *pairs)}
    prompt = None if form is None else prompt_form.to_json(form, is_decoder=is_decoder)
    return Adapter(
        native.new_metadata(about, inputs, selection, sorted(dense_parameters or {}), prompt),
        {module: np.asarray(leaf, np.float32) for module, leaf in values.items()},
        {module: np.asarray(leaf, np.int32) for module, leaf in columns.items()},
        {name: np.asarray(leaf, np.float32) for name, leaf in (dense_parameters or {}).items()},
        pairs,
    )


def classifier_labels(base_model: OpenedModel) -> list[str] | None:
    """Return the label names of an encoder's classifier, None for a decoder.

    An adapter stores them, since a bare base model without a classifier does not have them.
    """
    if base_model.model.architecture.is_decoder:
        return None
    named = {str(number): label for number, label in (base_model.model.hf_config.get("id2label") or {}).items()}
    return [named.get(str(number), f"LABEL_{number}") for number in range(base_model.model.config.num_labels)]


def save(
    directory: Path,
    trained: Bypass,
    base_model: IdentifiedModel,
    selection: Selection,
    *,
    classifier: Tree | None = None,
    form: PromptForm | None = None,
    replace: bool = False,
) -> None:
    """Write trained arrays as an adapter directory, complete or not at all.

    Args:
      directory: must not exist unless `replace`.
      trained: stacked values (*L, O, k) and columns, or low-rank factors.
      base_model: the model that they were trained on.
      selection: how the columns were selected.
      classifier: the densely trained modules, as in the training state; None for none.
      form: of the prompts that it was trained on, with its template's complete text; None if unknown.
      replace: overwrite an existing adapter.

    Raises:
      UserError: the directory exists or cannot be written.
    """
    written_out: Tree = {}
    for path, leaf in trees.leaves(trained.columns, "columns"):  # those that neurons share, for every neuron
        shape = trees.get(trained.values, path)["values"].shape
        written_out = trees.put(written_out, path, {"columns": np.ascontiguousarray(np.broadcast_to(leaf, shape))})
    layers_path = base_model.model.layers_path

    def by_module(tree: Tree, leaf: str) -> dict[str, Any]:
        """Return the leaves of one name by module, layer by layer."""
        found = trees.unflatten({(*path, leaf): array for path, array in trees.leaves(tree, leaf)})
        return dict(names.unstacked(found, layers_path))

    values, columns = by_module(trained.values, "values"), by_module(written_out, "columns")
    a, b = (by_module(trained.values, name) for name in low_rank.LEAVES)
    pairs = {module: Factors(leaf, b[module]) for module, leaf in a.items()}
    dense = dense_modules.to_names(classifier or {})
    adapter = assemble(base_model, values, columns, selection, dense, form, pairs)
    native.write(directory, adapter, replace=replace)


def load(directory: str, base_model: IdentifiedModel) -> Bypass:
    """Read an adapter of `base_model` as stacked trees; for errors see `native.read` and `stack_layers`."""
    return stack_layers(native.read(directory), base_model)


def stack_layers(adapter: Adapter, base_model: IdentifiedModel) -> Bypass:
    """Return the adapter's values, or low-rank factors, as trees (*L, O, k), stacked like the layers of `base_model`.

    Raises:
      UserError: another base model, a module that it does not have, or entries that do not fit it.
    """
    _check_base(adapter, base_model)
    _check_tied(adapter, base_model)
    values: Tree = {}
    columns: Tree = {}
    remaining, shared = set(adapter.modules), native.options_of(adapter.metadata).shared_columns
    lora = factors.options_of(adapter.metadata)
    for path, kernel in trees.kernels(base_model.model.abstract_params()):
        modules = names.module_names(path, kernel, base_model.model.layers_path)
        present = [module for module in modules if module in adapter.values or module in adapter.factors]
        if not present:
            continue
        if len(present) != len(modules):
            raise UserError(f"adapter: {present[0]} has values but other layers' {path[-1]} have none")
        remaining -= set(modules)

        def pick(arrays: list[np.ndarray], leading: tuple[int, ...] = kernel.shape[:-2]) -> jax.Array:
            """Return the arrays of all modules of a map as one, (*L, ...)."""
            return jnp.stack(arrays).reshape(*leading, *arrays[0].shape)

        if lora is not None:
            pairs = [_factors_that_fit(adapter, module, *kernel.shape[-2:]) for module in modules]
            node = {name: pick([pair[at] for pair in pairs]) for at, name in enumerate(low_rank.LEAVES)}
            values = trees.put(values, path, node)
            scale = jnp.full(kernel.shape[:-2], lora.scale, jnp.float32)
            columns = trees.put(columns, path, {"scale": scale})
            continue
        _check_fit(adapter, modules, *kernel.shape[-2:])
        values = trees.put(values, path, {"values": pick([adapter.values[module] for module in modules])})
        own = [adapter.columns[module] for module in modules]
        columns = trees.put(columns, path, {"columns": pick([_of_all(each) for each in own] if shared else own)})
    if remaining:
        raise UserError(f"adapter: the base model has no module {min(remaining)!r}")
    return Bypass(values, columns)


def _check_base(adapter: Adapter, base_model: IdentifiedModel) -> None:
    """Refuse another base model; say where it is the same one in another quantisation."""
    try:
        native.check_base(adapter, base_model.digests, base_model.source)
    except UserError as error:
        then = quantization.format_of(adapter.metadata.get("base", {}).get("quantization"))
        now = quantization.format_of(base_model.model.quantization)
        if then == now:
            raise
        raise UserError(
            f"{error}; the adapter was trained on {then} weights, and these are {now}: --quantization says how a base "
            "model is read, and --force uses the adapter on it all the same"
        ) from error


def _of_all(columns: np.ndarray) -> np.ndarray:
    """Return the columns (1, k) that all neurons of a map have, given for every neuron (O, k).

    Raises:
      UserError: they differ between neurons.
    """
    if (columns != columns[:1]).any():
        raise UserError("adapter: adapter.json says that neurons share their columns, and those of a module differ")
    return columns[:1]


def _check_tied(adapter: Adapter, base_model: IdentifiedModel) -> None:
    """Refuse an adapter that was trained as if the output layer were the embedding, although the checkpoint has its own."""
    trained_on = adapter.metadata.get("base", {}).get("digests", {})
    if HEAD in base_model.digests and EMBEDDING in trained_on and HEAD not in trained_on:
        raise UserError(
            f"{base_model.source} has a {HEAD} of its own, which this adapter's training did not use (neuroada-jax 0.1 "
            "tied it to the embedding); train the adapter again"
        )


def _check_fit(adapter: Adapter, modules: list[str], outputs: int, inputs: int) -> None:
    """Refuse modules of stacked layers whose entries do not fit kernels (O, I), or which differ in k."""
    for module in modules:
        shape = adapter.values[module].shape
        if shape[0] != outputs or adapter.columns[module].max() >= inputs:
            raise UserError(f"adapter: {module} has {shape[0]} neurons or columns that do not fit ({outputs}, {inputs})")
        if shape != adapter.values[modules[0]].shape:
            raise UserError(f"adapter: {module} has another k than {modules[0]}")


def _factors_that_fit(adapter: Adapter, module: str, outputs: int, inputs: int) -> Factors:
    """Return a module's low-rank factors, which fit a kernel (O, I), else raise UserError."""
    pair = adapter.factors[module]
    if pair.a.shape[1] != inputs or pair.b.shape[0] != outputs:
        found = f"{pair.a.shape} and {pair.b.shape}"
        raise UserError(f"adapter: {module} has factors {found}, which do not fit ({outputs}, {inputs})")
    return pair


def dense_slots(
    model: models.Model, dense_parameters: Mapping[str, np.ndarray], targets: Collection[str]
) -> dict[str, names.Slot]:
    """Return where densely trained parameters are in the model's parameter tree.

    Args:
      model: the base model's architecture and config.
      dense_parameters: Hugging Face parameter name -> array.
      targets: the modules that carry a bypass.

    Raises:
      UserError: the model has no such parameter outside its layers, it has another shape, or it carries a bypass too.
    """
    shapes = model.abstract_params()
    leaves = dict(trees.flatten(shapes))
    slots = {name: slot for name, slot in names.checkpoint_names(shapes, model.layers_path).items() if slot.layer is None}
    for name, array in dense_parameters.items():
        expected = list(leaves[slots[name].path].shape) if name in slots else "no such tensor"
        if list(array.shape) != expected:
            raise UserError(
                f"adapter: dense parameter {name!r} has shape {list(array.shape)}, the base model has {expected}"
            )
        if name.removesuffix(".weight") in targets:
            raise UserError(f"adapter: {name!r} is both a dense parameter and the weight of a bypass")
    return {name: slots[name] for name in dense_parameters}


def classifier(adapter: Adapter, base_model: IdentifiedModel) -> Tree:
    """Return the densely trained parameters as a tree of float32 leaves, empty where the adapter has none.

    Raises:
      UserError: see `dense_slots`; also a tensor that neither the base model nor the adapter has.
    """
    slots = dense_slots(base_model.model, adapter.dense_parameters, adapter.modules)
    lacking = sorted(set(base_model.initialised) - set(adapter.dense_parameters))
    if lacking:
        raise UserError(f"adapter: neither {base_model.source} nor the adapter has {lacking[0]!r}")
    return trees.unflatten({slots[name].path: jnp.asarray(array) for name, array in adapter.dense_parameters.items()})


def tuned(adapter: Adapter, base_model: LoadedModel) -> Tree:
    """Return the base model's parameters with the adapter in them, to be used; no kernel is copied.

    Connections are merged in place: the parameters of `base_model` are given to this function and end with it. Low-rank
    factors lie beside their kernels, as in training.

    Raises:
      UserError: see `stack_layers` and `classifier`.
    """
    trained, dense = stack_layers(adapter, base_model), classifier(adapter, base_model)
    put_in = low_rank.beside if low_rank.is_in(trained) else _merge_in_place
    return dense_modules.join(put_in(base_model.params, trained), dense)


def _merge_in_place(params: Mapping[str, Any], trained: Bypass) -> Tree:
    """Return `bypass.merge`, one map at a time: XLA's CPU backend scatters into a float32 copy of a bfloat16 kernel."""
    merged = dict(params)
    for path, _ in trees.leaves(trained.columns, "columns"):
        own = Bypass({"map": trees.get(trained.values, path)}, {"map": trees.get(trained.columns, path)})
        merged = trees.put(merged, path, _merge_one({"map": trees.get(params, path)}, own)["map"])
    return merged


_merge_one: Callable[..., Tree] = jax.jit(bypass.merge, donate_argnums=0)


def merge(adapter: Adapter, base_model: LoadedModel, round_first: Any = jnp.float32) -> Tree:
    """Return the base model's parameters with the adapter merged in: W + D or W + alpha / r B A, and its dense parameters.

    The sum is taken in float32 and rounded once, to the dtype of the parameters.

    Args:
      adapter: of this base model.
      base_model: with its weights.
      round_first: the dtype to which values are rounded before the sum; PyTorch libraries that hold values in the base
        dtype do so.

    Raises:
      UserError: see `stack_layers` and `classifier`.
    """
    trained = stack_layers(adapter, base_model)
    values = jax.tree.map(lambda leaf: round_to(leaf, round_first).astype(jnp.float32), trained.values)
    rounded = Bypass(values, trained.columns)
    merge = low_rank.merge if low_rank.is_in(rounded) else bypass.merge
    return dense_modules.join(merge(base_model.params, rounded), classifier(adapter, base_model))
