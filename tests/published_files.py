"""Quantised checkpoints as hubs publish them: written here, and read by their formulas in NumPy alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from helpers import random_tensors
from quantised_files import SIZES

# Blocks of 128 need these widths; the 192 outputs of k_proj and v_proj are a block and a half.
WIDE: dict[str, Any] = {**SIZES, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 48}
WIDE |= {"num_key_value_heads": 4}
EXPERTS: dict[str, Any] = {**WIDE, "model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "int32": "I32",
    "uint8": "U8",
}
Tensors = dict[str, np.ndarray]


class Published(NamedTuple):
    """A way in which checkpoints are quantised.

    Attributes:
      section: `quantization_config`.
      format: in which the kernels are held here.
      pack: (name of the weight, weight) -> stored tensors.
      formula: (name of the weight, stored tensors) -> the weight in float32, as the library that wrote it computes it.
    """

    section: dict[str, Any]
    format: str
    pack: Callable[[str, np.ndarray], Tensors]
    formula: Callable[[str, Tensors], np.ndarray]


def e4m3(codes: np.ndarray) -> np.ndarray:
    """The numbers of float8_e4m3fn, from sign, exponent (bias 7) and mantissa."""
    bits = codes.view(np.uint8).astype(np.int64)
    exponent, mantissa = (bits >> 3) & 15, (bits & 7) / 8
    size = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    return np.where(bits >> 7, -size, size).astype(np.float32)


def _over_blocks(scale: np.ndarray, rows: int, columns: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.repeat(np.repeat(scale, rows, 0), columns, 1)[: shape[0], : shape[1]]


def fp8(of_scale: str, rows: int | None, columns: int | None, dtype: Any = np.float32, shape: Any = None) -> dict[str, Any]:
    """Blocks of rows x columns (None: all) with a scale each, of this dtype, stored with this shape."""

    def pack(name: str, weight: np.ndarray) -> Tensors:
        height, width = rows or weight.shape[0], columns or weight.shape[1]
        padded = np.pad(np.abs(weight), [(0, -weight.shape[0] % height), (0, -weight.shape[1] % width)])
        blocks = padded.reshape(padded.shape[0] // height, height, -1, width)
        scale = (blocks.max((1, 3)) / 448).astype(dtype)
        codes = weight / _over_blocks(scale.astype(np.float32), height, width, weight.shape)
        codes = np.clip(codes, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        return {
            name: codes,
            f"{name.removesuffix('weight')}{of_scale}": scale.reshape(scale.shape if shape is None else shape),
        }

    def formula(name: str, tensors: Tensors) -> np.ndarray:
        codes = tensors[name]
        height, width = rows or codes.shape[0], columns or codes.shape[1]
        scale = tensors[f"{name.removesuffix('weight')}{of_scale}"].astype(np.float32)
        scale = scale.reshape(-(-codes.shape[0] // height), -1)
        return e4m3(codes) * _over_blocks(scale, height, width, codes.shape)

    return {"pack": pack, "formula": formula}


def _shifts(bits: int) -> np.ndarray:
    return np.arange(0, 32, bits, dtype=np.int32)


def _packed(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Codes in int32, from the low bits up, along an axis."""
    rows = np.moveaxis(codes, axis, 0).astype(np.uint32)
    words = np.zeros((rows.shape[0] * bits // 32, *rows.shape[1:]), np.uint32)
    for place, shift in enumerate(_shifts(bits).astype(np.uint32)):
        words |= rows[place :: 32 // bits] << shift
    return np.ascontiguousarray(np.moveaxis(words.view(np.int32), 0, axis))


def _integers(weight: np.ndarray, bits: int, g_idx: np.ndarray, middle: bool) -> tuple[np.ndarray, ...]:
    """Codes (inputs, outputs), float16 scales and zero points (groups, outputs) of a weight."""
    largest, columns = 2**bits - 1, weight.T
    codes = np.zeros(columns.shape, np.int64)
    scales, zeros = [], []
    for group in range(g_idx.max() + 1):
        own = columns[g_idx == group]
        low, high = own.min(0), own.max(0)
        scale = ((2 * np.abs(own).max(0) if middle else high - low) / largest).astype(np.float16)
        scale[1] = -scale[1]  # a sign is no fault
        zero = np.full(low.shape, (largest + 1) // 2) if middle else np.clip(np.round(-low / scale), 0, largest)
        zero[0] = zero[0] if middle else 0  # which the first format of GPTQ stores as the largest code
        codes[g_idx == group] = np.clip(np.round(own / scale.astype(np.float32)) + zero, 0, largest)
        scales, zeros = [*scales, scale], [*zeros, zero.astype(np.int64)]
    return codes, np.stack(scales), np.stack(zeros)


def gptq(bits: int, group: int, sym: bool = False, desc_act: bool = False, version: str = "gptq") -> Published:
    """The form that AutoGPTQ and GPTQModel write."""
    offset, mask = int(version == "gptq"), 2**bits - 1

    def pack(name: str, weight: np.ndarray) -> Tensors:
        inputs = weight.shape[1]
        g_idx = np.arange(inputs, dtype=np.int32) // (inputs if group == -1 else group)
        if desc_act:
            g_idx = np.random.default_rng(0).permutation(g_idx)
        codes, scales, zeros = _integers(weight, bits, g_idx, sym)
        stem = name.removesuffix(".weight")
        return {
            f"{stem}.qweight": _packed(codes, bits, 0),
            f"{stem}.qzeros": _packed((zeros - offset) & mask, bits, 1),
            f"{stem}.scales": scales,
            f"{stem}.g_idx": g_idx,
        }

    def formula(name: str, tensors: Tensors) -> np.ndarray:
        qweight, qzeros, scales, g_idx = (
            tensors[f"{name.removesuffix('.weight')}.{end}"] for end in ("qweight", "qzeros", "scales", "g_idx")
        )
        codes = ((qweight[:, None, :] >> _shifts(bits)[None, :, None]) & mask).reshape(-1, qweight.shape[1])
        zeros = (((qzeros[:, :, None] >> _shifts(bits)) + offset) & mask).reshape(qzeros.shape[0], -1)
        return (scales.astype(np.float32)[g_idx] * (codes - zeros[g_idx])).T.astype(np.float32)

    section = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": desc_act}
    form = f"int{bits}_{'row' if group == -1 else group}{'_any_order' if desc_act else ''}"
    return Published({**section, "checkpoint_format": version, "damp_percent": 0.1}, form, pack, formula)


def awq(group: int) -> Published:
    """The form "gemm" that AutoAWQ writes."""
    order, back = [0, 2, 4, 6, 1, 3, 5, 7], [0, 4, 1, 5, 2, 6, 3, 7]

    def reordered(codes: np.ndarray, places: list[int]) -> np.ndarray:
        return codes.reshape(codes.shape[0], -1, 8)[:, :, places].reshape(codes.shape)

    def pack(name: str, weight: np.ndarray) -> Tensors:
        codes, scales, zeros = _integers(weight, 4, np.arange(weight.shape[1]) // group, False)
        stem = name.removesuffix(".weight")
        return {
            f"{stem}.qweight": _packed(reordered(codes, order), 4, 1),
            f"{stem}.qzeros": _packed(reordered(zeros, order), 4, 1),
            f"{stem}.scales": scales,
        }

    def formula(name: str, tensors: Tensors) -> np.ndarray:
        stem = name.removesuffix(".weight")
        codes, zeros = (
            reordered(((words[:, :, None] >> _shifts(4)) & 15).reshape(words.shape[0], -1), back)
            for words in (tensors[f"{stem}.qweight"], tensors[f"{stem}.qzeros"])
        )
        scales = tensors[f"{stem}.scales"].astype(np.float32)
        return ((codes - np.repeat(zeros, group, 0)) * np.repeat(scales, group, 0)).T.astype(np.float32)

    section = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Published({**section, "modules_to_not_convert": None}, f"int4_{group}", pack, formula)


def groups(strategy: str, **weights: Any) -> dict[str, Any]:
    """A `quantization_config` of compressed-tensors."""
    scheme = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False, **weights}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": {"num_bits": 8, "dynamic": True}}
    section = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    return {**section, "ignore": ["lm_head"], "quantization_status": "compressed", "kv_cache_scheme": None}


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
_BLOCKS = {**_FP8, "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
FORMS = {
    "fp8 blocks": Published(_BLOCKS, "fp8_blocks", **fp8("weight_scale_inv", 128, 128)),
    "fp8 blocks, bfloat16 scales": Published(
        _BLOCKS, "fp8_blocks", **fp8("weight_scale_inv", 128, 128, ml_dtypes.bfloat16)
    ),
    "fp8 tensors": Published({**_FP8, "weight_block_size": None}, "fp8", **fp8("weight_scale_inv", None, None, shape=())),
    "compressed-tensors tensors": Published(groups("tensor"), "fp8", **fp8("weight_scale", None, None, shape=(1,))),
    "compressed-tensors rows": Published(groups("channel"), "fp8", **fp8("weight_scale", 1, None, ml_dtypes.bfloat16)),
    "compressed-tensors blocks": Published(
        groups("block", block_structure=[128, 128]), "fp8_blocks", **fp8("weight_scale", 128, 128)
    ),
    "gptq": gptq(4, 128, sym=True),
    "gptq of 32": gptq(4, 32),
    "gptq of 64, version 2": gptq(4, 64, version="gptq_v2"),
    "gptq by row": gptq(4, -1, sym=True),
    "gptq with desc_act": gptq(4, 32, desc_act=True),
    "gptq of 8 bits": gptq(8, 128),
    "awq": awq(128),
    "awq of 32": awq(32),
}


def is_kernel(name: str) -> bool:
    """Whether a tensor is the weight of a linear map of a layer."""
    return name.endswith("_proj.weight") or ".experts." in name


def published_tensors(form: str, sizes: dict[str, Any] = WIDE) -> Tensors:
    """The tensors of a checkpoint; norms, embedding and output layer are bfloat16."""
    tensors: Tensors = {}
    for name, weight in random_tensors(sizes).items():
        packed = FORMS[form].pack(name, weight) if is_kernel(name) else {name: weight.astype(ml_dtypes.bfloat16)}
        tensors |= packed
    return tensors


def write_tensors(file: Path, tensors: Tensors) -> None:
    """A safetensors file with dtypes that the library's NumPy door does not have."""
    header, start = {}, 0
    for name, tensor in tensors.items():
        stop = start + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    data = b"".join(np.ascontiguousarray(tensor).tobytes() for tensor in tensors.values())
    file.write_bytes(len(head).to_bytes(8, "little") + head + data)


def write_published(
    directory: Path,
    form: str,
    tokenizer: Any = None,
    sizes: dict[str, Any] = WIDE,
    section: dict[str, Any] | None = None,
    **changes: np.ndarray | None,
) -> Path:
    """A directory whose layers are quantised; `changes` replaces stored tensors by name, None removes one."""
    tensors = {name: tensor for name, tensor in (published_tensors(form, sizes) | changes).items() if tensor is not None}
    directory.mkdir()
    write_tensors(directory / "model.safetensors", tensors)
    own = FORMS[form].section if section is None else section
    (directory / "config.json").write_text(json.dumps({**sizes, "quantization_config": own}))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory))
    return directory
