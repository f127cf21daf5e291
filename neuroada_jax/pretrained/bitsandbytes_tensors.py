"""Tensors of a Hugging Face directory that bitsandbytes has quantised, nf4 or int8, as their stored codes and scales.

nf4: beside `weight`, the packed codes, stand `weight.absmax`, `weight.quant_map` and, JSON in bytes with shape and blocks,
`weight.quant_state.bitsandbytes__nf4`; with double quantisation also `weight.nested_absmax` and `weight.nested_quant_map`.
int8: beside `weight` stands `SCB`, the scale of every row.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from neuroada_jax.core import quantise
from neuroada_jax.core.quantised_formats import NESTED_BLOCK, NF4, NF4_BLOCK, check_inputs
from neuroada_jax.errors import UserError, shown
from neuroada_jax.pretrained.packed_tensors import Packed, PackedTensors

_STATE, _NF4 = ".quant_state.bitsandbytes__", ".quant_state.bitsandbytes__nf4"
_BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _NF4)
_LONGEST_STATE = 2**16  # bytes of JSON


class BitsandbytesTensors(PackedTensors):
    """The tensors of a directory, of which some are nf4 or int8.

    Raises:
      UserError: arrays beside a weight that are missing or do not fit it, or another type than nf4 and int8.
    """

    def _find(self, section: Mapping[str, Any]) -> tuple[dict[str, Packed], set[str]]:
        del section  # the tensors say it all
        packed: dict[str, Packed] = {}
        beside = set()
        for name in self._directory.names():
            weight = name.partition(_STATE)[0]
            if _STATE in name:
                packed[weight] = self._of_state(weight, name)
                beside |= {weight + end for end in _BESIDE}
            elif name.endswith(".SCB"):
                weight = f"{name.removesuffix('SCB')}weight"
                packed[weight] = self._of_rows(weight, name)
                beside |= {name, f"{weight}_format"}
        for weight in packed:
            if weight not in self._stored:
                raise self._error(weight, "is missing, though arrays beside it say that it is quantised")
        return packed, beside

    def _of_state(self, weight: str, name: str) -> Packed:
        """Return what the JSON of a 4-bit weight says of it."""
        kind = name.partition(_STATE)[2]
        raw = bytes(self._directory.raw(name)) if math.prod(self._directory.shape(name)) < _LONGEST_STATE else b""
        try:
            state = json.loads(raw)
        except ValueError:
            raise self._error(name, "is not the JSON of a quantised weight") from None
        if not isinstance(state, dict) or kind != "nf4" or state.get("quant_type") != "nf4":
            found = state.get("quant_type") if isinstance(state, dict) else None
            raise self._error(weight, f"has quant_type {shown(found)} in {shown(kind)}, expected nf4")
        shape, nested = state.get("shape"), f"{weight}.nested_absmax" in self._directory.names()
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(each) is int and each > 0 for each in shape)):
            raise self._error(weight, f"has shape {shown(shape)} in its quant_state, expected [outputs, inputs]")
        if state.get("blocksize") != NF4_BLOCK:
            raise self._error(weight, f"has blocks of {shown(state.get('blocksize'))}, expected {NF4_BLOCK}")
        if nested and (state.get("nested_blocksize") != NESTED_BLOCK or not _is_finite(state.get("nested_offset"))):
            raise self._error(
                weight,
                f"has nested_blocksize {shown(state.get('nested_blocksize'))} and nested_offset "
                f"{shown(state.get('nested_offset'))}, expected {NESTED_BLOCK} and a number",
            )
        form = "nf4_nested" if nested else "nf4"
        check_inputs(form, shape[1], f"{self._directory.directory}: tensor {weight!r}")
        self._check_beside(weight, math.prod(shape), nested)
        return Packed(form, tuple(shape), state)

    def _check_beside(self, weight: str, entries: int, nested: bool) -> None:
        """Check the bytes and shapes of the arrays of a 4-bit weight."""
        scales = entries // NF4_BLOCK
        expected: dict[str, tuple[str | None, int]] = {  # name -> dtype and size; the codes may be stored as any dtype
            weight: (None, entries // 2),
            f"{weight}.absmax": ("U8" if nested else "F32", scales),
            f"{weight}.quant_map": ("F32", 16),
        }
        if nested:
            expected[f"{weight}.nested_absmax"] = ("F32", -(-scales // NESTED_BLOCK))
            expected[f"{weight}.nested_quant_map"] = ("F32", 256)
        for name, (dtype, size) in expected.items():
            if name not in self._stored:
                raise self._error(name, "is missing")
            count = self._directory.nbytes(name) if dtype is None else math.prod(self._directory.shape(name))
            if count != size or dtype not in (None, self._directory.dtype(name)):
                found = f"{self._directory.dtype(name)} {list(self._directory.shape(name))}"
                raise self._error(name, f"is {found}, expected {size} {'bytes' if dtype is None else dtype}")

    def _of_rows(self, weight: str, name: str) -> Packed:
        """Return the format of an int8 weight."""
        if weight not in self._stored:
            raise self._error(weight, "is missing, though arrays beside it say that it is quantised")
        shape = self._directory.shape(weight)
        if self._directory.dtype(weight) != "I8" or len(shape) != 2:
            raise self._error(weight, f"is {self._directory.dtype(weight)} {list(shape)}, expected I8 codes of a matrix")
        if self._directory.dtype(name) != "F32" or math.prod(self._directory.shape(name)) != shape[0]:
            found = f"{self._directory.dtype(name)} {list(self._directory.shape(name))}"
            raise self._error(name, f"is {found}, expected F32 of {shape[0]} rows")
        return Packed("int8", shape, {})

    def _arrays(self, name: str) -> dict[str, np.ndarray]:
        form, (outputs, inputs), state = self._packed[name]
        codes = np.asarray(self._directory.raw(name))
        if form == "int8":
            scale = self._floats(f"{name.removesuffix('weight')}SCB")
            return {"codes": codes.view(np.int8).reshape(outputs, inputs), "scale": scale.reshape(outputs, 1)}
        if not np.array_equal(self._floats(f"{name}.quant_map", signed=True), NF4):
            raise self._error(f"{name}.quant_map", "holds other numbers than nf4's")
        codes = codes.view(np.uint8).reshape(outputs, inputs // 2)
        if form == "nf4":
            return {"codes": codes, "absmax": self._floats(f"{name}.absmax").reshape(outputs, -1)}
        nested = self._floats(f"{name}.nested_absmax")
        table = self._floats(f"{name}.nested_quant_map", signed=True)
        rows = {part: np.asarray(array) for part, array in quantise.by_row(jnp.asarray(nested), outputs, inputs).items()}
        absmax = np.asarray(self._directory.raw(f"{name}.absmax")).view(np.uint8).reshape(outputs, -1)
        offset = np.full((1, 1), state["nested_offset"], np.float32)
        return {"codes": codes, "absmax": absmax, "offset": offset, "table": table[None], **rows}


def _is_finite(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)


def format_of_config(section: Mapping[str, Any]) -> str:
    """Return the format that a config's `quantization_config` of bitsandbytes names.

    Raises:
      UserError: one that is not read.
    """
    in_4, in_8 = (section.get(f"load_in_{bits}bit") or section.get(f"_load_in_{bits}bit") for bits in (4, 8))
    if in_4 and in_8:
        raise UserError("config.json: quantization_config of bitsandbytes has both load_in_4bit and load_in_8bit")
    if in_4:
        kind = section.get("bnb_4bit_quant_type", "fp4")
        if kind != "nf4":
            raise UserError(f"config.json: quantization_config: bnb_4bit_quant_type {shown(kind)} is not read, only nf4")
        return "nf4_nested" if section.get("bnb_4bit_use_double_quant") else "nf4"
    if in_8:
        return "int8"
    raise UserError("config.json: quantization_config of bitsandbytes has neither load_in_4bit nor load_in_8bit")
