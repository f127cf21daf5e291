"""Names, models, tokens and parameter budgets that the benchmarks share."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from neuroada_jax import models
from neuroada_jax.core.trees import ModulePath, kernels
from neuroada_jax.data.examples import encode
from neuroada_jax.data.rows import load_rows
from neuroada_jax.errors import UserError
from neuroada_jax.models import Model
from neuroada_jax.tasks import TASKS

LEARNING_RATE = 1e-4

# The names that other rows are compared with.
OURS = "neuroada-jax"
FLOOR = "frozen floor"  # forward and input gradient
SCATTER = "autodiff scatter"  # the published formulation in JAX
RELEASED = "released NeuroAda"
MASKED = "mask-based NeuroAda"
FULL = "full fine-tuning"
PEFT_LORA = "PEFT LoRA"  # at equal budget, as every method with a k

# Hugging Face configs of models that are measured without their weights.
LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}
LLAMA_3_8B = LLAMA_7B | {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
# A decoder of each kind, as wide as SmolLM2-135M and six layers deep.
SMALL = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": 151936,
}
MODELS: dict[str, dict[str, Any]] = {
    "small-llama": SMALL | {"model_type": "llama"},
    "small-gemma2": SMALL | {"model_type": "gemma2", "sliding_window": 64, "query_pre_attn_scalar": 64},
    "small-phi3": SMALL | {"model_type": "phi3"},
    "small-mixtral": SMALL | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama-7b": LLAMA_7B,
    "llama-13b": LLAMA_7B
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "llama-3-8b": LLAMA_3_8B,
    "llama-3-70b": LLAMA_3_8B
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "qwen3-30b-a3b": QWEN3_30B_A3B,
}


class Tokens(NamedTuple):
    """A batch for both frameworks; `labelled` marks the labels, which a row's first token never is."""

    ids: Int32[np.ndarray, "B T"]
    labelled: Bool[np.ndarray, "B T"]


class Running(NamedTuple):
    """A method on a loaded model: `step` does one training step and returns the mean loss before it.

    Attributes:
      step: of all runs.
      trained: parameters that the step changes in each run; 0 for a floor.
      runs: that a step takes further, such as the members of a sweep. Times are divided by it.
    """

    step: Callable[[Tokens], float]
    trained: int
    runs: int = 1


class Method(NamedTuple):
    """One row of the step benchmark.

    Attributes:
      framework: "JAX" or "PyTorch".
      name: of the method.
      k: connections per neuron, or the budget of a method without connections.
      build: starts the method on a loaded model of the framework (`load` in jax_methods.py and torch_methods.py).
      owns_weights: whether `build` takes the weights over, because the method writes to them.
      core: whether the method is also timed with only the answers labelled.
    """

    framework: str
    name: str
    k: int | None
    build: Callable[[Any], Running]
    owns_weights: bool = False
    core: bool = True

    @property
    def label(self) -> str:
        """The method in one line."""
        return label_of(self.framework, self.name, self.k)


def label_of(framework: str, name: str, k: int | None) -> str:
    """Return a method in one line, for progress bars and for the choice of methods on the command line."""
    return f"{framework}: {name}" + ("" if k is None else f", k={k}")


def targets(params: Mapping[str, Any], model: Model) -> list[ModulePath]:
    """Return the paths of the linear maps that every method adapts: those of a layer, in LLaMA q k v o gate up down."""
    return models.match_targets(params, list(model.architecture.targets), model.layers_path)


def target_shapes(model: Model) -> Iterator[tuple[int, int, int]]:
    """Yield the (layers, O, I) of every target."""
    params = model.abstract_params()
    chosen = set(targets(params, model))
    for path, kernel in kernels(params):
        if path in chosen:
            layers, outputs, inputs = kernel.shape
            yield layers, outputs, inputs


def lora_rank(model: Model, k: int) -> int:
    """Return the rank at which LoRA trains about as many parameters as k connections per neuron."""
    shapes = list(target_shapes(model))
    budget = sum(layers * outputs * min(k, inputs) for layers, outputs, inputs in shapes)
    return max(1, round(budget / sum(layers * (outputs + inputs) for layers, outputs, inputs in shapes)))


def random_tokens(batch: int, length: int, vocabulary: int) -> Tokens:
    """Return random ids with every possible label."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (batch, length), dtype=np.int32)
    return Tokens(ids, _every(ids))


def real_tokens(source: str, tokenizer: Any, batch: int, length: int) -> tuple[Tokens, Tokens]:
    """Return commonsense rows end to end, without padding: with every token labelled, and with the answers alone.

    Raises:
      UserError: if the file is missing or damaged, or its rows are too few to fill the batch.
    """
    task = TASKS["commonsense"]
    rows = load_rows(source, limit=batch * length // 8)  # no commonsense row is shorter than 8 tokens
    converted = [task.convert(row, rows.where(index)) for index, row in enumerate(rows.rows)]
    examples = encode(converted, task.style, tokenizer, length)
    if len(examples.token_ids) < batch * length:
        raise UserError(f"{source}: {len(examples.token_ids)} tokens, expected at least {batch * length}")
    ids = examples.token_ids[: batch * length].reshape(batch, length).astype(np.int32)
    answers = examples.is_label[: batch * length].reshape(batch, length)
    return Tokens(ids, _every(ids)), Tokens(ids, answers & _every(ids))


def _every(ids: Int32[np.ndarray, "B T"]) -> Bool[np.ndarray, "B T"]:
    return np.broadcast_to(np.arange(ids.shape[1]) > 0, ids.shape)
