"""Tensors of a Hugging Face directory that GPTQ or AWQ has quantised to integers, as their stored codes.

In the place of `weight` stand `qweight`, int32 with 8 codes of 4 bits (4 of 8) in each, `qzeros`, the zero points packed
in outputs, and `scales` (groups, outputs); an entry is (code - zero point) * scale. GPTQ packs inputs, from the low bits
up, and has `g_idx`, the group of each input; AWQ packs outputs, 0, 2, 4, 6, 1, 3, 5, 7 from the low bits up. Codes are kept
as they are, in rows of outputs.
"""

import abc
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from neuroada_jax.core.quantised_formats import GROUPS, check_inputs, integers
from neuroada_jax.errors import UserError, shown
from neuroada_jax.pretrained.packed_tensors import Packed, PackedTensors

_BESIDE = ("qweight", "qzeros", "scales", "g_idx")
_FLOATS = ("F16", "BF16", "F32")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs in an int32, from the low bits up


class _Scheme(NamedTuple):
    """What a config says of the codes.

    Attributes:
      bits: of a code.
      group: inputs of a scale; None: all.
      any_order: the inputs of a group are anywhere (`desc_act`).
      offset: what is added to stored zero points; the first format of GPTQ stores them less one.
      symmetric: all zero points are the middle of the codes.
    """

    bits: int
    group: int | None
    any_order: bool
    offset: int
    symmetric: bool


class IntegerTensors(PackedTensors):
    """The tensors of a directory, of which some are integers with a scale and a zero point for each group.

    Raises:
      UserError: arrays that are missing or do not fit each other or the config.
    """

    def _find(self, section: Mapping[str, Any]) -> tuple[dict[str, Packed], set[str]]:
        self._scheme = _scheme(section)
        stems = [name.removesuffix(".qweight") for name in self._directory.names() if name.endswith(".qweight")]
        for name in self._directory.names():
            stem, _, end = name.rpartition(".")
            if end in ("qzeros", "g_idx") and f"{stem}.qweight" not in self._stored:
                raise self._error(f"{stem}.qweight", f"is missing, though {name!r} says that there are codes")
            if end == "g_idx" and self.method == "awq":
                raise self._error(name, "is of GPTQ, and quantization_config is of awq")
        packed = {f"{stem}.weight": self._of_stem(stem) for stem in stems}
        for name in packed.keys() & self._stored:
            raise self._error(name, "is stored beside its codes in qweight; expected one of the two")
        return packed, {f"{stem}.{end}" for stem in stems for end in _BESIDE}

    def _of_stem(self, stem: str) -> Packed:
        """Return the format of the weight of a map with codes."""
        scheme, name = self._scheme, f"{stem}.qweight"
        each = 32 // scheme.bits
        shape = self._directory.shape(name)
        if self._directory.dtype(name) != "I32" or len(shape) != 2:
            raise self._error(name, f"is {self._directory.dtype(name)} {list(shape)}, expected I32 codes of a matrix")
        inputs, outputs = self._size(shape, each)
        form = integers(scheme.bits, scheme.group, any_order=scheme.any_order)
        check_inputs(form, inputs, f"{self._directory.directory}: tensor {name!r}")
        if outputs % each:
            raise self._error(name, f"has {outputs} outputs, expected a multiple of {each}")
        groups = inputs // scheme.group if scheme.group else 1
        self._check(f"{stem}.scales", _FLOATS, (groups, outputs))
        self._check(f"{stem}.qzeros", ("I32",), (groups, outputs // each))
        if scheme.any_order or f"{stem}.g_idx" in self._stored:
            self._check(f"{stem}.g_idx", ("I32",), (inputs,))
        return Packed(form, (outputs, inputs), {"stem": stem})

    @abc.abstractmethod
    def _size(self, shape: tuple[int, ...], each: int) -> tuple[int, int]:
        """Return the inputs and outputs of codes of this shape, `each` in an int32."""

    @abc.abstractmethod
    def _codes(self, stored: np.ndarray) -> np.ndarray:
        """Return the stored codes as the format has them, (outputs, bytes)."""

    @abc.abstractmethod
    def _zeros(self, stored: np.ndarray) -> np.ndarray:
        """Return the stored zero points as uint8 (groups, outputs)."""

    def _int32(self, name: str) -> np.ndarray:
        return np.asarray(self._directory.raw(name)).view("<i4").reshape(self._directory.shape(name))

    def _arrays(self, name: str) -> dict[str, np.ndarray]:
        stem, inputs = self._packed[name].state["stem"], self._packed[name].shape[1]
        return {
            "codes": self._codes(self._int32(f"{stem}.qweight")),
            "scale": self._scale(f"{stem}.scales"),
            "zero": self._zero(f"{stem}.qzeros"),
            **self._group(f"{stem}.g_idx", inputs),
        }

    def _scale(self, name: str) -> np.ndarray:
        stored = self._floats(name, signed=True)  # AutoRound gives a scale the sign of its largest entry
        with np.errstate(over="ignore"):
            scale = stored.astype(np.float16)
        if not np.array_equal(scale.astype(np.float32), stored.astype(np.float32)):
            raise self._error(name, "holds numbers that float16 does not have")
        return np.ascontiguousarray(scale.T)

    def _zero(self, name: str) -> np.ndarray:
        bits, middle = self._scheme.bits, 2 ** (self._scheme.bits - 1)
        # 15 and an offset of 1 are the zero point 0, which 4 bits have, and not 16, which they have not.
        zeros = (self._zeros(self._int32(name)) + np.uint8(self._scheme.offset)) & np.uint8(2**bits - 1)
        if self._scheme.symmetric and (other := zeros[zeros != middle]).size:
            raise self._error(name, f"has the zero point {other[0]}, and sym of config.json is true; expected {middle}")
        return np.ascontiguousarray(zeros.T)

    def _group(self, name: str, inputs: int) -> dict[str, np.ndarray]:
        """Return the list of the inputs' groups if a format has it, after checking it."""
        if name not in self._stored:
            return {}
        found, in_order = self._int32(name), np.arange(inputs) // (self._scheme.group or inputs or 1)
        if not self._scheme.any_order:
            if not np.array_equal(found, in_order):
                raise self._error(name, "has groups in another order, and desc_act of config.json is not true")
            return {}
        if (found < 0).any() or (found > in_order.max(initial=0)).any():
            raise self._error(name, f"has groups {found.min()} to {found.max()}, expected 0 to {in_order.max()}")
        counts = np.bincount(found, minlength=int(in_order.max(initial=0)) + 1)
        if (counts != self._scheme.group).any():
            other = int(np.argmax(counts != self._scheme.group))
            raise self._error(name, f"has {counts[other]} inputs in group {other}, expected {self._scheme.group} in each")
        return {"group": found.reshape(1, inputs)}


class GptqTensors(IntegerTensors):
    """The tensors of a directory, of which GPTQ has quantised some."""

    def _size(self, shape: tuple[int, ...], each: int) -> tuple[int, int]:
        return shape[0] * each, shape[1]

    def _codes(self, stored: np.ndarray) -> np.ndarray:
        rows = np.ascontiguousarray(stored).view(np.uint8).reshape(*stored.shape, 4).transpose(1, 0, 2)
        found = rows.reshape(stored.shape[1], -1)  # the first of two codes in the low half of a byte
        return (found << 4 | found >> 4) if self._scheme.bits == 4 else found

    def _zeros(self, stored: np.ndarray) -> np.ndarray:
        return _unpacked(stored, self._scheme.bits)


class AwqTensors(IntegerTensors):
    """The tensors of a directory, of which AWQ has quantised some."""

    def _size(self, shape: tuple[int, ...], each: int) -> tuple[int, int]:
        return shape[0], shape[1] * each

    def _codes(self, stored: np.ndarray) -> np.ndarray:
        codes = self._zeros(stored).T
        return codes[:, ::2] << 4 | codes[:, 1::2]

    def _zeros(self, stored: np.ndarray) -> np.ndarray:
        words = _unpacked(stored, self._scheme.bits).reshape(*stored.shape, len(_AWQ_ORDER))
        return words[..., np.argsort(_AWQ_ORDER)].reshape(stored.shape[0], -1)


def _unpacked(stored: np.ndarray, bits: int) -> np.ndarray:
    """Return the codes of a matrix of int32 in their order from the low bits up, uint8."""
    found = np.ascontiguousarray(stored).view(np.uint8)
    if bits == 8:
        return found
    return np.stack([found & np.uint8(15), found >> 4], axis=-1).reshape(stored.shape[0], -1)


def format_of_config(section: Mapping[str, Any]) -> str:
    """Return the format that a config's `quantization_config` names, of GPTQ or of AWQ.

    Raises:
      UserError: one that is not read.
    """
    scheme = _scheme(section)
    return integers(scheme.bits, scheme.group, any_order=scheme.any_order)


def _scheme(section: Mapping[str, Any]) -> _Scheme:
    return _gptq(section) if section["quant_method"] == "gptq" else _awq(section)


def _one_of(section: Mapping[str, Any], field: str, default: Any, expected: tuple[Any, ...]) -> Any:
    """Return a field of a config, which has to be one of some values; 1 is not true."""
    found = section.get(field, default)
    if not any(found == each and type(found) is type(each) for each in expected):
        allowed = " or ".join(map(str, expected))
        raise UserError(
            f"config.json: quantization_config of {section['quant_method']}: {field} {shown(found)} is not read, only "
            f"{allowed}"
        )
    return found


def _group(section: Mapping[str, Any]) -> int | None:
    found = _one_of(section, "group_size", 128, (*GROUPS, -1))
    return None if found == -1 else int(found)


def _gptq(section: Mapping[str, Any]) -> _Scheme:
    bits, group = _one_of(section, "bits", None, (4, 8)), _group(section)
    own = "checkpoint_format" if section.get("checkpoint_format") is not None else "format"
    version = _one_of(section, own, "gptq", ("gptq", "gptq_v2"))
    _one_of(section, "pack_dtype", "int32", ("int32",))
    _one_of(section, "is_marlin_format", False, (False,))
    overrides = section.get("dynamic") or {}
    if not isinstance(overrides, Mapping) or not all(str(pattern).startswith("-:") for pattern in overrides):
        raise UserError(
            f"config.json: quantization_config of gptq: dynamic {shown(overrides)} is not read, only skipped maps (-:)"
        )
    any_order = _one_of(section, "desc_act", False, (False, True))
    symmetric = _one_of(section, "sym", False, (False, True))
    return _Scheme(bits, group, bool(any_order and group), int(version == "gptq"), symmetric)


def _awq(section: Mapping[str, Any]) -> _Scheme:
    version = section.get("version") or section.get("format") or "gemm"
    lower = {**section, "version": version.lower() if isinstance(version, str) else version}
    _one_of(lower, "version", "gemm", ("gemm",))
    _one_of(section, "zero_point", True, (True,))
    for own, other, default in (("w_bit", "bits", 4), ("q_group_size", "group_size", 128)):  # in AutoAWQ's own file
        found, expected = section.get(own), section.get(other, default)
        if found not in (None, expected):
            raise UserError(
                f"config.json: quantization_config of awq: {own} is {shown(found)}, and {other} is {shown(expected)}"
            )
    return _Scheme(_one_of(section, "bits", 4, (4,)), _group(section), False, 0, False)
