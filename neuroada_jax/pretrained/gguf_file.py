"""Weights of a GGUF file, under Hugging Face names and in Hugging Face layout.

Blocks are dequantised by `gguf.quants.dequantize`, one tensor at a time, from the memory map.
"""

from pathlib import Path

import ml_dtypes
import numpy as np
from gguf.quants import dequantize

from neuroada_jax.core.gguf_blocks import BLOCKS, split_fields
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained.gguf_architectures import GGUFModel
from neuroada_jax.pretrained.gguf_header import TensorInfo

_PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}


class GGUFTensors:
    """Tensors of one GGUF file under Hugging Face names, decoded one at a time from the memory map.

    Attributes:
      packs_layers_only: whether blocks of the embedding and the output layer are always dequantised.

    Raises:
      UserError: the file is truncated or not supported.
    """

    packs_layers_only = True

    def __init__(self, path: str | Path):
        self.path = path
        model = GGUFModel(path)
        self._header, self._architecture = model.header, model.architecture
        heads = model.required("attention.head_count")
        self._heads = {"q_proj": heads, "k_proj": model.number("attention.head_count_kv", heads)}
        count = model.number("expert_count", 0)
        self._tensors: dict[str, TensorInfo] = {}
        for tensor, info in self._header.tensors.items():
            name = self._architecture.name_of(tensor)
            if name is None:
                if not self._architecture.is_table(tensor):
                    self._tensors[f"{tensor} (GGUF)"] = info  # a name that no tensor of the model can have
            elif "{}" in name:
                self._tensors |= {name.format(expert): own for expert, own in enumerate(_each(path, tensor, info, count))}
            else:
                self._tensors[name] = info

    def names(self) -> list[str]:
        """Return the Hugging Face names in file order, without tables of the rope, which belong to the config.

        A tensor that no model of the architecture has is marked "(GGUF)" and keeps its name in the file.
        """
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the decoded shape: (O, I) of a linear map, (V, D) of an embedding, (O,) of a norm or bias."""
        return self._info(name).shape

    def raw(self, name: str) -> memoryview:
        """Return the stored bytes, read-only: still quantised, q and k still in llama.cpp's order of neurons."""
        return self._header.raw(self._info(name))

    def release(self, name: str) -> None:
        """Let the system take back the memory of a tensor that has been read."""
        self._header.release(self._info(name))

    def read(self, name: str, raw: memoryview | None = None) -> np.ndarray:
        """Read one tensor in Hugging Face layout: f32, f16, bf16 as stored (maybe a read-only view), blocks as f32.

        Args:
          name: of the tensor.
          raw: its stored bytes, where they are read already.

        Raises:
          UserError: the tensor's block format has no decoder.
        """
        array = decode(self.path, name, self.raw(name) if raw is None else raw, self._info(name))
        if self._architecture.norm_offset and name.endswith("norm.weight"):
            return array - np.asarray(self._architecture.norm_offset, array.dtype)
        return self._in_order(name, array)

    def format_of(self, name: str) -> str | None:
        """Return the format of blocks that can be kept packed, None for other tensors."""
        kind = self._info(name).qtype.name
        return kind if kind in BLOCKS else None

    def packed(self, name: str, raw: memoryview | None = None) -> dict[str, np.ndarray]:
        """Return the fields of a packed tensor's blocks, q and k in Hugging Face's order; arguments of `read`."""
        info = self._info(name)
        stored = np.frombuffer(self.raw(name) if raw is None else raw, np.uint8).reshape(*info.shape[:-1], -1)
        fields = split_fields(stored, BLOCKS[info.qtype.name])
        return {field: self._in_order(name, part) for field, part in fields.items()}

    def _in_order(self, name: str, array: np.ndarray) -> np.ndarray:
        """Return an array (O, ...) of a tensor with its neurons in Hugging Face's order."""
        heads = self._heads.get(name.rpartition(".")[0].rpartition(".")[2])
        if not self._architecture.permuted or not heads:
            return array
        if heads < 0 or array.shape[0] % (2 * heads):
            raise UserError(
                f"{self.path}: tensor {name} has {array.shape[0]} neurons, expected {heads} heads of an even width"
            )
        return _unpermute(array, heads)

    def _info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise UserError(f"{self.path}: no tensor {name}, expected one of {len(self._tensors)} Hugging Face names")
        return self._tensors[name]


def decode(path: str | Path, name: str, raw: memoryview, info: TensorInfo) -> np.ndarray:
    """Return stored bytes as an array of the tensor's shape: plain types as they are, blocks as f32."""
    stored = np.frombuffer(raw, np.uint8)
    if info.qtype.name in _PLAIN:
        return stored.view(_PLAIN[info.qtype.name]).reshape(info.shape)
    try:
        return dequantize(stored.reshape(*info.shape[:-1], -1), info.qtype)
    except NotImplementedError:
        raise UserError(f"{path}: tensor {name} is stored as {info.qtype.name}, which has no decoder") from None


def _each(path: str | Path, tensor: str, info: TensorInfo, count: int) -> list[TensorInfo]:
    """Return the tensors of the experts that are stacked in one."""
    if len(info.shape) != 3 or info.shape[0] != count:
        raise UserError(f"{path}: tensor {tensor} has shape {list(info.shape)}, expected {count} experts of 2 dimensions")
    nbytes = info.nbytes // count
    return [TensorInfo(info.shape[1:], info.qtype, info.start + own * nbytes, nbytes) for own in range(count)]


def _unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the neurons (O, ...) of q or k as Hugging Face has them.

    llama.cpp rotates neurons (2i, 2i+1) of an attention head together, Hugging Face neurons (i, i+N/2): the converter to
    GGUF therefore interleaves the two halves of each head, where the architecture is one of LLaMA's.
    """
    half = array.shape[0] // heads // 2
    return array.reshape(heads, half, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
