"""The section of a config about the base model."""

from typing import Literal

from pydantic.dataclasses import dataclass

from neuroada_jax.pretrained.quantization import EMBEDDINGS
from neuroada_jax.training.config_execution import STRICT


@dataclass(frozen=True, config=STRICT)
class ModelSection:
    """The frozen base model.

    Attributes:
      path: a Hugging Face directory, a hub id, a .gguf file or package:NAME/FILE.
      dtype: of the weights; "auto" (the default) is the checkpoint's own, bfloat16 for a float16 checkpoint.
      quantization: of the layers' kernels (docs/quantised.md): "nf4", "int8" or "fp8", made while the weights are read;
        "auto", as the checkpoint is: codes of bitsandbytes, fp8, GPTQ, AWQ or a GGUF file; "none", dequantised. None (the
        default): "none" for a GGUF file, else "auto".
      double_quantization: quantise the scales of nf4, too. Default false.
      quantize_embeddings: of a decoder, hold the embedding and the output layer quantised, too: in the blocks of a GGUF
        file, or in the format of `quantization`. Default false.
    """

    path: str
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    quantization: Literal["auto", "none", "nf4", "int8", "fp8"] | None = None
    double_quantization: bool = False
    quantize_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.double_quantization and self.quantization != "nf4":
            raise ValueError(f"model.double_quantization: needs model.quantization nf4, found {self.quantization!r}")
        if self.quantize_embeddings and self.quantization in (None, "none"):
            raise ValueError(
                f"model.quantize_embeddings: needs model.quantization auto, nf4, int8 or fp8, found {self.quantization!r}"
            )

    @property
    def held(self) -> str | None:
        """How the kernels are held, as `pretrained.quantization.resolve` takes it."""
        kernels = "nf4_nested" if self.double_quantization else self.quantization
        return f"{kernels}{EMBEDDINGS}" if self.quantize_embeddings else kernels
