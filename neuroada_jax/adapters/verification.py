"""Verification of an export: load it in PyTorch, PEFT or transformers and compare weights and logits with ours.

Whether an adapter's own files are sound and fit a base model is checked in native.py and on_base.py.
"""

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from neuroada_jax import models
from neuroada_jax.adapters.foreign import Imported
from neuroada_jax.core import trees
from neuroada_jax.core.trees import Tree
from neuroada_jax.errors import UserError, install_line
from neuroada_jax.models import names
from neuroada_jax.pretrained import save
from neuroada_jax.pretrained.load import LoadedModel, OpenedModel

TOLERANCE = 1e-4  # of logits, relative to the largest one, or to 1 where all are smaller
_TOKENS = (2, 24)  # batch size and length of the compared tokens


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
    """Load a Hugging Face directory in transformers, with weights in `dtype`."""
    import torch

    # The class's name is from our code, not from the file.
    load = getattr(transformers, model.architecture.transformers_class).from_pretrained
    return load(directory, dtype=getattr(torch, jnp.dtype(dtype).name)).eval()


def _torch_base(base_model: LoadedModel) -> Any:
    if Path(base_model.path).is_dir() and not base_model.initialised:
        return load_torch(base_model.model, base_model.path, base_model.model.config.dtype)
    # A GGUF file, which transformers reads differently, or an encoder whose classifier it would initialise differently.
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "base"
        save.save(directory, base_model, base_model.params, None)
        return load_torch(base_model.model, str(directory), base_model.model.config.dtype)


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


def verify(base_model: OpenedModel, params: Tree, reload: Callable[[], Reloaded]) -> dict[str, Any]:
    """Compare an export with our own merged model.

    The merged weights are compared bit for bit. In float32, the logits of the reloaded model and of its merged form are
    compared with ours. In bfloat16, where the roundings of two libraries differ in every layer, the logits of the merged
    weights are compared in float32 arithmetic.

    Args:
      base_model: the model's architecture and config.
      params: our merged parameters, in the dtype of the export.
      reload: called without arguments, loads the export.

    Returns: `max_logit_difference`, `merged_bit_equal`, `logit_tolerance` (1e-4 of the largest logit, or 1e-4) and
      `compared_in`, the name of the weights' dtype.

    Raises:
      UserError: PyTorch or PEFT is not installed.
    """
    require_torch()
    import torch

    vocabulary = base_model.model.config.vocab_size
    ids = np.random.default_rng(0).integers(min(8, vocabulary - 1), vocabulary, _TOKENS)  # above the usual special tokens
    leaves = dict(trees.flatten(params))
    as_stored = next(iter(leaves.values())).dtype

    def theirs(model: Any) -> np.ndarray:
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(ids)).logits.numpy()

    with _quiet():
        reloaded = reload()
        found = [theirs(reloaded.model)] if as_stored == jnp.float32 else []
        merged = reloaded.merge()
        state = merged.state_dict()
        slots = names.checkpoint_names(params, base_model.model.layers_path)
        equal = all(
            _same_bits(state[name], leaves[slot.path] if slot.layer is None else leaves[slot.path][slot.layer])
            for name, slot in slots.items()
        )
        found.append(theirs(merged.float()))
    ours = _logits(base_model, params, ids)
    return {
        "max_logit_difference": max(float(np.abs(each - ours).max()) for each in found),
        "merged_bit_equal": equal,
        "logit_tolerance": TOLERANCE * max(1.0, float(np.abs(ours).max())),
        "compared_in": jnp.dtype(as_stored).name,
    }


def _same_bits(theirs: Any, ours: jax.Array) -> bool:
    import torch

    host = np.asarray(ours)
    bits = {2: (torch.int16, np.int16), 4: (torch.int32, np.int32)}
    if theirs.element_size() != host.dtype.itemsize:
        return False
    for_torch, for_numpy = bits[host.dtype.itemsize]
    return np.array_equal(theirs.contiguous().view(for_torch).numpy(), host.view(for_numpy))


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
