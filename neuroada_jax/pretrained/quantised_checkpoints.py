"""The methods by which a checkpoint may be quantised, by `quant_method` of its config: their formats and their readers."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from neuroada_jax.errors import UserError, shown
from neuroada_jax.pretrained import bitsandbytes_tensors, fp8_tensors, integer_tensors
from neuroada_jax.pretrained.bitsandbytes_tensors import BitsandbytesTensors
from neuroada_jax.pretrained.fp8_tensors import Fp8Tensors
from neuroada_jax.pretrained.integer_tensors import AwqTensors, GptqTensors
from neuroada_jax.pretrained.packed_tensors import PackedTensors
from neuroada_jax.pretrained.safetensors_directory import SafetensorsDirectory


class Method(NamedTuple):
    """A way to quantise a checkpoint.

    Attributes:
      format_of_config: `quantization_config` -> the format of the kernels; refuses one that is not read.
      tensors: the reader.
    """

    format_of_config: Callable[[Mapping[str, Any]], str]
    tensors: type[PackedTensors]


METHODS = {
    "bitsandbytes": Method(bitsandbytes_tensors.format_of_config, BitsandbytesTensors),
    "fp8": Method(fp8_tensors.format_of_config, Fp8Tensors),
    "compressed-tensors": Method(fp8_tensors.format_of_config, Fp8Tensors),
    "gptq": Method(integer_tensors.format_of_config, GptqTensors),
    "awq": Method(integer_tensors.format_of_config, AwqTensors),
}


def declared(section: Any) -> tuple[str, str]:
    """Return the method and the format of a config's `quantization_config`.

    Raises:
      UserError: one that is not read.
    """
    if not isinstance(section, Mapping):
        raise UserError(f"config.json: quantization_config is {shown(section)}, expected an object")
    method = section.get("quant_method")
    if method is None and any("load_in_" in key for key in section):
        method = "bitsandbytes"
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(
            f"config.json: quantization_config: checkpoints of {shown(method)} are not read; expected "
            f"{', '.join(METHODS)}, a GGUF file, or an unquantised checkpoint with model.quantization"
        )
    return method, METHODS[method].format_of_config(section)


def open_packed(directory: SafetensorsDirectory, section: Any) -> PackedTensors:
    """Open the tensors of a directory whose config has a `quantization_config`.

    Raises:
      UserError: one that is not read, or arrays that are missing or do not fit.
    """
    method, _ = declared(section)
    return METHODS[method].tensors(directory, section, method)
