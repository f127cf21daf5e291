"""A merged model's kernels as bitsandbytes stores them, nf4 or int8, and what they lose when they are quantised."""

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neuroada_jax import models
from neuroada_jax.core import quantise, quantised, trees
from neuroada_jax.core.quantised_formats import FORMATS, NF4, NF4_BLOCK, bits, check_inputs
from neuroada_jax.core.trees import Tree
from neuroada_jax.errors import UserError
from neuroada_jax.models import names

FORMS = ("nf4", "int8")


def stored(name: str, parts: Mapping[str, Any], form: str, shape: tuple[int, ...], dtype: str) -> dict[str, np.ndarray]:
    """Return the tensors that bitsandbytes stores for a weight.

    Args:
      name: of the weight, ".weight" at its end.
      parts: its arrays, from `quantise.quantise`.
      form: one of `FORMS`.
      shape: of the weight.
      dtype: into which bitsandbytes dequantises it.
    """
    arrays = {part: np.asarray(array) for part, array in parts.items()}
    if form == "int8":
        beside = name.removesuffix("weight")
        scale = arrays["scale"].reshape(-1)
        return {name: arrays["codes"], f"{beside}SCB": scale, f"{beside}weight_format": np.zeros((), np.uint8)}
    state = {"quant_type": "nf4", "blocksize": NF4_BLOCK, "dtype": dtype, "shape": list(shape)}
    return {
        name: arrays["codes"].reshape(-1, 1),
        f"{name}.absmax": arrays["absmax"].reshape(-1),
        f"{name}.quant_map": NF4,
        f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }


def check(form: str, model: models.Model) -> None:
    """Check that a model's kernels can be quantised.

    Raises:
      UserError: kernels of experts, or inputs that the blocks do not divide.
    """
    for path, kernel in trees.kernels(model.abstract_params()):
        if names.EXPERTS in path:
            raise UserError(
                "--requantise: transformers stacks the kernels of experts, and bitsandbytes quantises single maps; "
                "leave it out"
            )
        if names.is_stacked(path, model.layers_path):
            check_inputs(form, kernel.shape[-1], f"--requantise: {'.'.join(path)}")


def _outside(model: models.Model) -> list[str]:
    """Return the linear maps outside the layers, which are not quantised."""
    maps = trees.kernels(model.abstract_params())
    found = [".".join(path) for path, _ in maps if not names.is_stacked(path, model.layers_path)]
    tied = model.architecture.is_decoder and "lm_head" not in found  # in transformers a module of its own all the same
    return [*found, "lm_head"] if tied else found


class Requantiser:
    """Quantises the kernels of a merged model one by one, and sums up what it costs.

    Only linear maps of the layers are quantised, as on load.
    """

    def __init__(self, form: str, model: models.Model, base: Tree, merged: Tree, dtype: Any) -> None:
        """Take the parameters of the base model and those with the adapter merged in.

        Args:
          form: one of `FORMS`.
          model: architecture and config.
          base: parameters without the adapter; kernels may be quantised.
          merged: parameters with it.
          dtype: of the merged weights.
        """
        self._form, self._layers_path, self._dtype = form, model.layers_path, np.dtype(dtype)
        self._base, self._merged = dict(trees.flatten(base)), dict(trees.flatten(merged))
        self._outside = _outside(model)
        self._sums = np.zeros(7)

    @property
    def section(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        is_nf4, dtype = self._form == "nf4", "bfloat16" if self._dtype == jnp.bfloat16 else str(self._dtype)
        return {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": is_nf4,
            "_load_in_8bit": not is_nf4,
            "load_in_4bit": is_nf4,
            "load_in_8bit": not is_nf4,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "nf4" if is_nf4 else "fp4",
            "bnb_4bit_use_double_quant": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": self._outside,
            "llm_int8_threshold": 6.0,
        }

    def takes(self, slot: names.Slot) -> bool:
        """Return whether a tensor is quantised."""
        return slot.path[-1] == "kernel" and names.is_stacked(slot.path, self._layers_path)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a quantised tensor, nearly."""
        return math.ceil(math.prod(shape) * bits(self._form, shape[-1]) / 8)

    def tensors(self, name: str, slot: names.Slot) -> dict[str, np.ndarray]:
        """Return the tensors that are stored for a weight, and count its loss."""
        base, merged = (slot.of(leaves[slot.path]) for leaves in (self._base, self._merged))
        parts, sums = _quantised(base, merged, self._form, self._dtype)
        self._sums += np.asarray(sums, np.float64)
        dtype = "bfloat16" if self._dtype == jnp.bfloat16 else str(self._dtype)
        return stored(name, parts, self._form, tuple(merged.shape), dtype)

    def report(self) -> dict[str, Any]:
        """Return the format and, over all tensors so far, what is lost; None where the adapter changes nothing.

        relative_error     ||Q(M) - M|| / ||M|| of the merged weights M
        error_over_change  ||Q(M) - M|| / ||M - W|| in the entries where M differs from the base model's weights W
        change_kept        the part of M - W that is in Q(M) - Q(W), 1 where all of it is
        unchanged          the share of these entries which are the same in Q(M) and Q(W)
        """
        error, size, error_there, change, along, same, changed = map(float, self._sums)
        return {
            "format": self._form,
            "relative_error": math.sqrt(error / size) if size else None,
            "error_over_change": math.sqrt(error_there / change) if change else None,
            "change_kept": along / change if change else None,
            "unchanged": same / changed if changed else None,
        }


def _quantised(base: Any, merged: Any, form: str, dtype: Any) -> tuple[dict[str, jax.Array], list[jax.Array]]:
    """Return the arrays of a merged weight, and the sums that `Requantiser.report` divides."""
    wide = [quantised.dense(kernel).astype(dtype).astype(jnp.float32) for kernel in (base, merged)]
    parts = [quantise.quantise(kernel, form) for kernel in wide]
    return parts[1], _sums(*wide, *parts, form=form)


@functools.partial(jax.jit, static_argnames="form")
def _sums(base: Any, merged: Any, parts_base: Any, parts_merged: Any, form: str) -> list[jax.Array]:
    decode = FORMATS[form].decode
    before, after = decode(parts_base), decode(parts_merged)
    change, squared = merged - base, jnp.square(after - merged)
    there = change != 0
    total = lambda each: jnp.sum(each, dtype=jnp.float32)  # noqa: E731
    return [
        total(squared),
        total(jnp.square(merged)),
        total(jnp.where(there, squared, 0)),
        total(jnp.square(change)),
        total(change * (after - before)),
        total(there & (after == before)),
        total(there),
    ]


def line(report: Mapping[str, Any]) -> str:
    """Return a report of `Requantiser` in a sentence."""
    found = f"quantised to {report['format']}: the weights' relative error is {report['relative_error']:.3g}"
    if report["change_kept"] is None:
        return found
    return (
        f"{found}; of the change that the adapter makes {100 * report['change_kept']:.0f} % is kept, the error in the "
        f"changed entries is {report['error_over_change']:.3g} times as large, and "
        f"{100 * (report['unchanged'] or 0):.0f} % of these are as they were without it"
    )
