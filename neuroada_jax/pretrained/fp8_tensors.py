"""Tensors of a Hugging Face directory whose weights are float8_e4m3fn, as their stored codes and scales.

Beside `weight` stands `weight_scale_inv` (quant_method fp8, as DeepSeek and Qwen publish) or `weight_scale`
(compressed-tensors): a number for the tensor, for each row, or for each block of 128 inputs and some rows, which is
repeated for every row here. An entry is code * scale. Scales of activations are for arithmetic in 8 bits, and not used.
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from neuroada_jax.core.quantised_formats import FP8_BLOCK, check_inputs
from neuroada_jax.errors import UserError, shown
from neuroada_jax.pretrained.packed_tensors import Packed, PackedTensors

_SCALES = ("weight_scale_inv", "weight_scale")
_OF_ACTIVATIONS = ("input_scale", "activation_scale", "output_scale", "q_scale", "k_scale", "v_scale")
_FLOATS = ("F32", "BF16", "F16")
_NAN = 0x7F  # without the sign
_LARGEST = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max) / 448  # of a scale; codes go up to 448
_STRATEGIES = ("tensor", "channel", "block")


class Fp8Tensors(PackedTensors):
    """The tensors of a directory, of which some are float8_e4m3fn.

    Raises:
      UserError: scales that are missing or do not fit their weight, or codes of another type.
    """

    def _find(self, section: Mapping[str, Any]) -> tuple[dict[str, Packed], set[str]]:
        rows = _rows(section)
        scales = dict[str, str]()
        for name in self._directory.names():
            stem, _, end = name.rpartition(".")
            if end in _SCALES and scales.setdefault(f"{stem}.weight", name) != name:
                raise self._error(name, f"is stored beside {scales[f'{stem}.weight']!r}; expected one of the two")
        packed = {weight: self._of_scale(weight, name, rows) for weight, name in scales.items()}
        if section.get("kv_cache_scheme"):
            self.notes.append(
                f"{self._directory.directory}: kv_cache_scheme is not used: keys and values are not quantised"
            )
        unused = [name for name in self._directory.names() if name.rpartition(".")[2] in _OF_ACTIVATIONS]
        if unused:
            more = f" and {len(unused) - 1} more are" if len(unused) > 1 else " is"
            self.notes.append(
                f"{self._directory.directory}: {unused[0]!r}{more} not used: activations stay in the model's dtype"
            )
        return packed, {*scales.values(), *unused}

    def _of_scale(self, weight: str, name: str, rows: int | None) -> Packed:
        """Return the format of a weight with this scale; `rows` of a block of scales, None where there are no blocks."""
        if weight not in self._stored:
            raise self._error(weight, f"is missing, though {name!r} says that it is quantised")
        dtype, shape = self._directory.dtype(weight), self._directory.shape(weight)
        if dtype != "F8_E4M3" or len(shape) != 2:
            raise self._error(weight, f"is {dtype} {list(shape)}, expected F8_E4M3 codes of a matrix")
        outputs, inputs = shape
        if rows is None:
            self._check(name, _FLOATS, (), (1,), (1, 1), (outputs,), (outputs, 1))
            return Packed("fp8", shape, {"scale": name, "rows": 1})
        check_inputs("fp8_blocks", inputs, f"{self._directory.directory}: tensor {weight!r}")
        self._check(name, _FLOATS, (-(-outputs // rows), inputs // FP8_BLOCK))
        return Packed("fp8_blocks", shape, {"scale": name, "rows": rows})

    def _arrays(self, name: str) -> dict[str, np.ndarray]:
        form, (outputs, inputs), state = self._packed[name]
        codes = np.asarray(self._directory.raw(name)).view(np.uint8).reshape(outputs, inputs)
        if count := int(np.count_nonzero((codes & np.uint8(_NAN)) == _NAN)):
            raise self._error(name, f"holds {count} NaN in {codes.size}, expected finite numbers")
        scale = self._floats(state["scale"], largest=_LARGEST).astype(np.float32)
        if form == "fp8":
            scale = np.broadcast_to(scale.reshape(-1, 1), (outputs, 1))
        else:
            scale = np.repeat(scale, state["rows"], axis=0)[:outputs]
        return {"codes": codes.view(ml_dtypes.float8_e4m3fn), "scale": np.ascontiguousarray(scale)}


def format_of_config(section: Mapping[str, Any]) -> str:
    """Return the format that a config's `quantization_config` names, of fp8 or of compressed-tensors.

    Raises:
      UserError: one that is not read.
    """
    return "fp8" if _rows(section) is None else "fp8_blocks"


def _rows(section: Mapping[str, Any]) -> int | None:
    """Return the rows of a block of scales, None where a row or a tensor has one scale."""
    method = section["quant_method"]
    of = f"config.json: quantization_config of {method}"
    return _rows_of_sizes(section, of) if method == "fp8" else _rows_of_groups(section, of)


def _rows_of_sizes(section: Mapping[str, Any], of: str) -> int | None:
    for field, *expected in (("fmt", "e4m3"), ("expert_dtype", "fp8"), ("activation_scheme", "dynamic", "static")):
        if section.get(field, expected[0]) not in expected:
            raise UserError(f"{of}: {field} {shown(section[field])} is not read, only {' and '.join(map(repr, expected))}")
    block = section.get("weight_block_size")
    return None if block is None else _rows_of_block(block, f"{of}: weight_block_size")


def _rows_of_groups(section: Mapping[str, Any], of: str) -> int | None:
    form, sparsity, groups = section.get("format"), section.get("sparsity_config"), section.get("config_groups")
    if form not in ("float-quantized", "naive-quantized"):
        raise UserError(f"{of}: format {shown(form)} is not read, only 'float-quantized'")
    if sparsity and (not isinstance(sparsity, Mapping) or sparsity.get("format") != "dense"):
        raise UserError(f"{of}: sparsity_config {shown(sparsity)} is not read, only the format 'dense'")
    if section.get("transform_config"):
        raise UserError(f"{of}: transform_config {shown(section['transform_config'])} is not read, only none")
    each = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = [group.get("weights") if isinstance(group, Mapping) else None for group in each]
    if not weights:
        raise UserError(f"{of}: config_groups is {shown(groups)}, expected groups with weights")
    return _rows_of_weights(weights, of)


def _rows_of_weights(groups: list[Any], of: str) -> int | None:
    """Return the rows of a block of scales from the schemes of all groups, which have to agree."""
    schemes = []
    for weights in groups:
        if not isinstance(weights, Mapping):
            raise UserError(f"{of}: weights is {shown(weights)} in a group, expected a scheme")
        found = tuple(weights.get(field) for field in ("num_bits", "type", "strategy"))
        if found[:2] != (8, "float") or found[2] not in _STRATEGIES or weights.get("symmetric") is False:
            raise UserError(
                f"{of}: weights of num_bits, type and strategy {shown(found)} are not read, only symmetric ones of 8, "
                f"'float' and {', '.join(map(repr, _STRATEGIES))}"
            )
        in_blocks = weights["strategy"] == "block"
        schemes.append((in_blocks, weights.get("block_structure") if in_blocks else None))
    if any(scheme != schemes[0] for scheme in schemes):
        raise UserError(f"{of}: groups with and without blocks, or with different ones, are not read")
    in_blocks, block = schemes[0]
    return _rows_of_block(block, f"{of}: block_structure") if in_blocks else None


def _rows_of_block(block: Any, of: str) -> int:
    """Return the rows of a block [rows, inputs] of scales."""
    sound = isinstance(block, list) and len(block) == 2 and all(type(each) is int and each > 0 for each in block)
    if not sound or block[1] != FP8_BLOCK:
        raise UserError(f"{of}: blocks of {shown(block)} are not read, only [rows, {FP8_BLOCK}]")
    return int(block[0])
