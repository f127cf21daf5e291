"""Model families: the supported architectures, and Flax modules from Hugging Face configs."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from neuroada_jax.core.trees import ModulePath, Tree, kernels, matching
from neuroada_jax.errors import UserError, shown
from neuroada_jax.models import (
    config_fields,
    deberta,
    distilbert,
    encoder,
    gemma,
    llama,
    mixtral,
    modernbert,
    mpnet,
    names,
    phi,
)
from neuroada_jax.models.decoder import DecoderForCausalLM
from neuroada_jax.models.encoder import ENCODER_TARGETS
from neuroada_jax.models.labels import Labels
from neuroada_jax.models.llama import LLAMA_TARGETS
from neuroada_jax.models.remat import Remat

__all__ = [
    "ARCHITECTURES",
    "ENCODER_TARGETS",
    "LLAMA_TARGETS",
    "Architecture",
    "Labels",
    "Model",
    "Remat",
    "from_hf_config",
    "match_targets",
]


class Architecture(NamedTuple):
    """Architecture of one `model_type` of config.json.

    Attributes:
      read_config: (fields of a Hugging Face config, dtype) -> static config.
      module: (static config, remat policy) -> Flax module.
      layers_path: the path of the layer scan in the parameter tree.
      targets: the default bypass targets.
      transformers_class: the class whose checkpoints have this parameter tree.
      prefix: the prefix that tensor names lack in a checkpoint of the bare model.
      classifier: the modules that depend on the task and train densely, empty for a decoder.
      optional: the modules that a checkpoint may lack; they are initialised from a seed.
    """

    read_config: Callable[..., Any]
    module: Callable[..., nn.Module]
    layers_path: ModulePath
    targets: tuple[str, ...]
    transformers_class: str
    prefix: str
    classifier: tuple[ModulePath, ...] = ()
    optional: tuple[ModulePath, ...] = ()

    @property
    def is_decoder(self) -> bool:
        """Whether the model continues texts; otherwise it classifies them."""
        return not self.classifier


def _decoder(
    read_config: Callable[..., Any], transformers_class: str, targets: tuple[str, ...] = LLAMA_TARGETS
) -> Architecture:
    return Architecture(read_config, DecoderForCausalLM, ("model", "layers"), targets, transformers_class, prefix="model.")


def _encoder(
    name: str,
    transformers_class: str,
    read_config: Callable[..., Any] = encoder.read_config,
    module: Any = encoder.RobertaForSequenceClassification,
    targets: tuple[str, ...] = ENCODER_TARGETS,
    *,
    layers: tuple[str, ...] = ("encoder", "layer"),
    classifier: tuple[ModulePath, ...] = (("classifier",),),
    pooler: tuple[ModulePath, ...] = (),
) -> Architecture:
    """Return the architecture of an encoder below `name`; `pooler`: modules of its own that a bare model may lack."""
    optional = (*classifier, *pooler)
    return Architecture(read_config, module, (name, *layers), targets, transformers_class, f"{name}.", classifier, optional)


# By the `model_type` of config.json, which is "llama" for SmolLM2 and LLaMA 1 to 3.x.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _decoder(llama.llama, "LlamaForCausalLM"),
    "mistral": _decoder(llama.mistral, "MistralForCausalLM"),
    "ministral": _decoder(llama.mistral, "MinistralForCausalLM"),
    "qwen2": _decoder(llama.qwen, "Qwen2ForCausalLM"),
    "qwen3": _decoder(llama.qwen, "Qwen3ForCausalLM"),
    "smollm3": _decoder(llama.smollm3, "SmolLM3ForCausalLM"),
    "granite": _decoder(llama.granite, "GraniteForCausalLM"),
    "olmo2": _decoder(llama.olmo2, "Olmo2ForCausalLM"),
    "phi3": _decoder(phi.phi3, "Phi3ForCausalLM", phi.PHI_TARGETS),
    "mixtral": _decoder(mixtral.mixtral, "MixtralForCausalLM", mixtral.MIXTRAL_TARGETS),
    "qwen3_moe": _decoder(mixtral.qwen3_moe, "Qwen3MoeForCausalLM"),
    "gemma2": _decoder(gemma.gemma2, "Gemma2ForCausalLM"),
    "gemma3_text": _decoder(gemma.gemma3, "Gemma3ForCausalLM"),
    "bert": _encoder(
        "bert",
        "BertForSequenceClassification",
        module=encoder.BertForSequenceClassification,
        pooler=(("bert", "pooler"),),
    ),
    "roberta": _encoder("roberta", "RobertaForSequenceClassification"),
    "electra": _encoder("electra", "ElectraForSequenceClassification", module=encoder.ElectraForSequenceClassification),
    "deberta-v2": _encoder(
        "deberta",
        "DebertaV2ForSequenceClassification",
        deberta.read_config,
        deberta.DebertaForSequenceClassification,
        deberta.DEBERTA_TARGETS,
        pooler=(("pooler",),),
    ),
    "distilbert": _encoder(
        "distilbert",
        "DistilBertForSequenceClassification",
        distilbert.read_config,
        distilbert.DistilBertForSequenceClassification,
        distilbert.DISTILBERT_TARGETS,
        layers=("transformer", "layer"),
        classifier=(("pre_classifier",), ("classifier",)),
    ),
    "modernbert": _encoder(
        "model",
        "ModernBertForSequenceClassification",
        modernbert.read_config,
        modernbert.ModernBertForSequenceClassification,
        modernbert.MODERNBERT_TARGETS,
        layers=("layers",),
        classifier=(("head",), ("classifier",)),
    ),
    "mpnet": _encoder(
        "mpnet",
        "MPNetForSequenceClassification",
        mpnet.read_config,
        mpnet.MPNetForSequenceClassification,
        mpnet.MPNET_TARGETS,
    ),
    "xlm-roberta": _encoder("roberta", "XLMRobertaForSequenceClassification"),
}


class Model(NamedTuple):
    """A model without weights: the architecture, its static config and the Hugging Face config that it was read from.

    `ignored` has the fields of that config that look as if they changed the result and do not: see `config_fields.ignored`.
    `quantization` says how its kernels are held: see pretrained/quantization.py.
    """

    architecture: Architecture
    config: Any
    hf_config: dict[str, Any]
    ignored: tuple[str, ...] = ()
    quantization: str = "none"

    @property
    def layers_path(self) -> ModulePath:
        """The path of the layer scan in the parameter tree."""
        return self.architecture.layers_path

    def module(self, remat: Remat = Remat.NONE) -> nn.Module:
        """Return the Flax module; the remat policy matters for training only."""
        return self.architecture.module(self.config, remat)

    def abstract_params(self) -> Tree:
        """Return the parameter tree as shapes and dtypes; nothing is allocated."""
        return _abstract_params(self.architecture, self.config)

    def linear_maps(self) -> dict[str, tuple[int, int]]:
        """Return the shape (O, I) of every linear map by its Hugging Face module path, layer by layer."""
        return {
            module: kernel.shape[-2:]
            for path, kernel in kernels(self.abstract_params())
            for module in names.module_names(path, kernel, self.layers_path)
        }


@functools.lru_cache(maxsize=16)  # tracing a model takes a tenth of a second, and it has half a dozen callers
def _abstract_params(architecture: Architecture, config: Any) -> Tree:
    module = architecture.module(config, Remat.NONE)
    init = lambda ids: module.init(jax.random.key(0), ids, method="initialise")  # noqa: E731
    return jax.eval_shape(init, jax.ShapeDtypeStruct((1, 2), jnp.int32))["params"]


def from_hf_config(
    config: Mapping[str, Any], dtype: Any = jnp.float32, labels: Labels | Sequence[str] | None = None
) -> Model:
    """Return the model that a Hugging Face config.json describes, with weights and activations in `dtype`.

    Args:
      config: the content of config.json.
      dtype: float32 or bfloat16.
      labels: of an encoder's classifier, or their names; None: those of the config.

    Raises:
      UserError: the architecture or a setting of its config is not supported, or labels were given for a decoder.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        if kind == "gemma3":
            raise UserError("config.json: model_type 'gemma3' reads images; expected its text_config, 'gemma3_text'")
        supported = ", ".join(sorted(ARCHITECTURES))
        raise UserError(f"config.json: model_type {shown(kind)} is not supported; supported: {supported}")
    if config.get("quantization_config"):
        raise UserError(
            "config.json: quantization_config is set; only unquantised checkpoints (or GGUF files) are supported"
        )
    architecture = ARCHITECTURES[kind]
    if labels is not None:
        if architecture.is_decoder:
            raise UserError(f"config.json: model_type {kind!r} is a decoder, which has no classifier for labels")
        config = Labels.of(labels).written_into(config)
    fields = config_fields.Fields(config)
    static = architecture.read_config(fields, dtype)
    config_fields.check(fields)
    return Model(architecture, static, dict(config), tuple(config_fields.ignored(fields)))


def match_targets(
    params: Mapping[str, Any], targets: list[str], layers_path: ModulePath, field: str = "bypass.targets"
) -> list[ModulePath]:
    """Return the module paths that the names in `targets` select, in the tree's order.

    A target is a module's exact path within its layer ("self_attn.q_proj"; "lm_head" outside the layers) or, where no
    module has that path, the last component of one ("q_proj"). It is never a substring. `field` is its name in messages.

    Raises:
      UserError: a target that matches no linear map, such as a tied output layer; lists those that exist.
    """
    modules = {names.within_layer(path, layers_path): path for path, _ in kernels(params)}
    return [modules[name] for name in matching(modules, targets, field)]
