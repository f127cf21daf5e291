"""Verification of an export: load it in PyTorch, PEFT or transformers and compare weights and logits with ours.

The other side of the comparison begins with the original checkpoint as transformers loads it, to which the adapter is
added in PyTorch, so that a base model that is read wrongly here cannot verify itself.

Whether an adapter's own files are sound and fit a base model is checked in native.py and on_base.py.
"""

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from neuroada_jax import models
from neuroada_jax.adapters import factors, torch_weights
from neuroada_jax.adapters.foreign import Imported
from neuroada_jax.adapters.native import Adapter
from neuroada_jax.core import trees
from neuroada_jax.core.trees import Tree
from neuroada_jax.errors import UserError, install_line
from neuroada_jax.models import names
from neuroada_jax.pretrained import save
from neuroada_jax.pretrained.load import LoadedModel, OpenedModel
from neuroada_jax.pretrained.source import has_other_parts

TOLERANCE = 1e-4  # of logits, relative to the largest one, or to 1 where all are smaller
_TOKENS = (2, 64)  # batch size and least length of the compared tokens
_SHORT = 1000  # positions up to which a window or context is exceeded


class Merge(NamedTuple):
    """Dtypes of the sum W + values, which is taken in float32: of the values before it, and of its result."""

    values: Any
    result: Any


class Reloaded(NamedTuple):
    """An export in PyTorch: the model as its users call it, and a function that merges its weights in place."""

    model: Any
    merge: Callable[[], Any]


def require_torch() -> None:
    """Raise UserError if PyTorch or PEFT is not installed."""
    try:
        import peft  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise UserError(f"--verify needs PyTorch and PEFT ({error}): {install_line('torch')}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence other libraries' progress bars and warnings."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def load_torch(model: models.Model, directory: str, dtype: Any) -> Any:
    """Load a Hugging Face directory in the class that transformers chooses for it, with weights in `dtype`."""
    import torch

    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)  # never code from the directory
    decodes = model.architecture.is_decoder
    if not decodes:
        config.num_labels = model.config.num_labels  # a bare encoder gets the classifier of its adapter
    auto = transformers.AutoModelForCausalLM if decodes else transformers.AutoModelForSequenceClassification
    torch_dtype = getattr(torch, jnp.dtype(dtype).name)
    options = {"config": config, "dtype": torch_dtype, "use_safetensors": True, "trust_remote_code": False}
    try:
        return auto.from_pretrained(directory, **options).eval()
    except Exception as error:  # of any type: what the file holds decides where it fails
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{directory}: transformers cannot load it ({reason})") from error


def reads_original(base_model: OpenedModel) -> bool:
    """Return whether transformers loads the same base model, rather than a GGUF file, quantised weights or a text part."""
    path = base_model.path
    return Path(path).is_dir() and base_model.model.quantization == "none" and not has_other_parts(path)


def _torch_base(base_model: LoadedModel) -> Any:
    """Load the base model in transformers; tensors that its checkpoint lacks have arbitrary values."""
    if reads_original(base_model):
        return load_torch(base_model.model, base_model.path, base_model.model.config.dtype)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "base"
        save.save(directory, base_model, base_model.params, None)
        return load_torch(base_model.model, str(directory), base_model.model.config.dtype)


def _original_with(base_model: LoadedModel, adapter: Adapter, merge: Merge) -> Any:
    """Load the base model in transformers and add an adapter to its weights, in float32 and rounded once."""
    import torch

    def rounded(tensor: Any, dtype: Any) -> Any:
        return tensor.to(getattr(torch, jnp.dtype(dtype).name)).float()

    model = _torch_base(base_model).float()
    weights = torch_weights.by_name(model.state_dict(), base_model.model)
    with torch.no_grad():
        for module, columns in adapter.columns.items():
            weight, rows = weights[f"{module}.weight"], torch.arange(len(columns))[:, None]
            weight[rows, torch.from_numpy(columns).long()] += rounded(
                torch.from_numpy(adapter.values[module]), merge.values
            )
        lora = factors.options_of(adapter.metadata)
        for module, (a, b) in adapter.factors.items():
            assert lora is not None
            weights[f"{module}.weight"] += lora.scale * (torch.from_numpy(b) @ torch.from_numpy(a))
        for name, array in adapter.dense_parameters.items():
            weights[name].copy_(torch.from_numpy(array))
        for parameter in model.parameters():
            parameter.copy_(rounded(parameter, merge.result))
    return model


def reload_huggingface(base_model: OpenedModel, directory: Path, dtype: Any) -> Reloaded:
    """Load a merged model."""
    model = load_torch(base_model.model, str(directory), dtype)
    return Reloaded(model, lambda: model)


def reload_peft(base_model: LoadedModel, directory: Path) -> Reloaded:
    """Load the base model with a PEFT adapter attached."""
    import peft

    model = peft.PeftModel.from_pretrained(_torch_base(base_model), directory)
    return Reloaded(model, model.merge_and_unload)


def reload_official(base_model: LoadedModel, adapter: Imported) -> Reloaded:
    """Load the base model and add an official adapter by the official formula, a scatter-add on the flat weight."""
    import torch

    model = _torch_base(base_model)
    with torch.no_grad():
        for module, columns in adapter.columns.items():
            weight = model.get_submodule(module).weight
            flat = np.arange(columns.shape[0], dtype=np.int64)[:, None] * weight.shape[1] + columns
            values = torch.from_numpy(adapter.values[module]).reshape(-1).to(weight.dtype)
            merged = weight.flatten().scatter_add(0, torch.from_numpy(flat).reshape(-1), values)
            weight.copy_(merged.reshape(weight.shape))
        for name, array in adapter.dense_parameters.items():
            model.get_parameter(name).copy_(torch.from_numpy(array))
    return Reloaded(model, lambda: model)


def verify(
    base_model: LoadedModel, adapter: Adapter, merge: Merge, params: Tree, reload: Callable[[], Reloaded]
) -> dict[str, Any]:
    """Compare our merged model with the original base model plus the adapter, and an export with both.

    The merged weights are compared bit for bit; those of low-rank factors, whose products are summed in another order, up
    to rounding. In float32, the logits of the reloaded model and of its merged form are
    compared with ours. In bfloat16, where the roundings of two libraries differ in every layer, the logits of the merged
    weights are compared in float32 arithmetic.

    Args:
      base_model: the base model as it was read here.
      adapter: the native adapter that was exported.
      merge: the dtypes of the export's sum.
      params: our merged parameters, in the dtype of the export.
      reload: called without arguments, loads the export.

    Returns: `max_logit_difference`, `merged_equal`, `merged_bit_equal`, `logit_tolerance` (1e-4 of the largest logit, or
      1e-4), `compared_in`, the name of the weights' dtype, and `original`, the directory that transformers loaded, None for
      a GGUF file.

    Raises:
      UserError: PyTorch or PEFT is not installed, or transformers loads another base model from the original directory
        than the one here.
    """
    require_torch()
    import torch

    ids, same = _tokens(base_model.model), _same_up_to_rounding if adapter.factors else _same_bits

    def theirs(model: Any) -> np.ndarray:
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(ids)).logits.numpy()

    ours = _logits(base_model, params, ids)
    tolerance = TOLERANCE * max(1.0, float(np.abs(ours).max()))
    with _quiet():
        original = _original_with(base_model, adapter, merge)
        wanted = theirs(original)
        stored_as = getattr(torch, jnp.dtype(merge.result).name)
        # float32 holds what was rounded to the stored dtype, so that this rounds nothing.
        original = original.to(stored_as)
        other = _differing(base_model, original.state_dict(), params, same)
        del original
    difference = float(np.abs(wanted - ours).max())
    if not difference <= tolerance or other is not None:
        raise UserError(
            f"{base_model.path} with the adapter differs from what transformers makes of it: logits differ by up to "
            f"{difference:.3g} (expected at most {tolerance:.3g}), "
            + ("merged weights are equal" if other is None else f"{other} is different")
        )
    with _quiet():
        reloaded = reload()
        found = [theirs(reloaded.model)] if merge.result == jnp.float32 else []
        merged = reloaded.merge()
        other = _differing(base_model, merged.state_dict(), params, same)
        bit_equal = _differing(base_model, merged.state_dict(), params, _same_bits) is None
        found.append(theirs(merged.float()))
    return {
        "max_logit_difference": max(difference, *(float(np.abs(a - b).max()) for a in found for b in (ours, wanted))),
        "merged_equal": other is None,
        "merged_bit_equal": bit_equal,
        "logit_tolerance": tolerance,
        "compared_in": jnp.dtype(merge.result).name,
        "original": base_model.path if reads_original(base_model) else None,
    }


def _tokens(model: models.Model) -> np.ndarray:
    """Return random tokens (B, T), above the usual special ones; long enough to leave a short window or context."""
    length = _TOKENS[1]
    if model.architecture.is_decoder:
        limits = [model.hf_config.get(field) for field in ("sliding_window", "max_position_embeddings")]
        length = max([length, *(limit + 8 for limit in limits if isinstance(limit, int) and limit <= _SHORT)])
    else:
        length = min(length, model.config.max_positions)
    vocabulary = model.config.vocab_size
    return np.random.default_rng(0).integers(min(8, vocabulary - 1), vocabulary, (_TOKENS[0], length))


def _differing(
    base_model: OpenedModel, state: Mapping[str, Any], params: Tree, same: Callable[[Any, jax.Array], bool]
) -> str | None:
    """Return the name of a tensor that is not the same in PyTorch and here, None where there is none."""
    leaves, state = dict(trees.flatten(params)), torch_weights.by_name(state, base_model.model)
    for name, slot in names.checkpoint_names(params, base_model.model.layers_path).items():
        ours = slot.of(leaves[slot.path])
        if name not in state or not same(state[name], ours):
            return name
    return None


def _same_bits(theirs: Any, ours: jax.Array) -> bool:
    import torch

    host = np.asarray(ours)
    bits = {2: (torch.int16, np.int16), 4: (torch.int32, np.int32)}
    if theirs.element_size() != host.dtype.itemsize or tuple(theirs.shape) != host.shape:
        return False
    for_torch, for_numpy = bits[host.dtype.itemsize]
    return np.array_equal(theirs.contiguous().view(for_torch).numpy(), host.view(for_numpy))


def _same_up_to_rounding(theirs: Any, ours: jax.Array) -> bool:
    """Return whether entries differ by no more than two roundings of the largest one."""
    import torch

    here, there = np.asarray(ours.astype(jnp.float32)), theirs.detach().to(torch.float32).numpy()
    tolerance = 2 * float(jnp.finfo(ours.dtype).eps) * max(1.0, float(np.abs(here).max(initial=0)))
    return here.shape == there.shape and bool(np.abs(here - there).max(initial=0) <= tolerance)


def _logits(base_model: OpenedModel, params: Tree, ids: np.ndarray) -> np.ndarray:
    """Return logits in float32 arithmetic, for parameters of any dtype: (B, T, V), of an encoder (B, labels)."""
    module = models.from_hf_config(base_model.model.hf_config, jnp.float32).module()
    is_decoder = base_model.model.architecture.is_decoder

    @jax.jit
    def forward(params: Tree, ids: jax.Array) -> jax.Array:
        variables = {"params": jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)}
        if not is_decoder:
            scores: Any = module.apply(variables, ids)
            return scores
        hidden: Any = module.apply(variables, ids)[0]
        logits: Any = module.apply(variables, hidden, method="unembed")
        return logits

    with jax.default_matmul_precision("highest"):
        return np.asarray(forward(params, jnp.asarray(ids, jnp.int32)))
