"""The PyTorch side of the step benchmark: a Hugging Face model with the same weights, the same tokens and AdamW.

The released NeuroAda (a scatter-add into a copy of the weight, under autograd) and its mask-based baseline (dense
gradients, masked) are written here from their formulas. LoRA, SHiRA and Super-Tuning are PEFT's own.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
import transformers
from torch import nn
from transformers.initialization import no_init_weights

from benchmarks import common
from benchmarks.methods import (
    FLOOR,
    FULL,
    LEARNING_RATE,
    MASKED,
    MODELS,
    PEFT_LORA,
    RELEASED,
    Method,
    Running,
    Tokens,
    lora_rank,
    target_shapes,
)
from neuroada_jax import models
from neuroada_jax.models import LLAMA_TARGETS, Model, Remat, names
from neuroada_jax.pretrained.load import open_model
from neuroada_jax.pretrained.source import open_tensors

# peft 0.21 on transformers 5.23, whenever it wraps a model, and its SHiRA whenever it runs
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled", UserWarning)


class Weights(NamedTuple):
    """A model's weights by Hugging Face name on PyTorch's device; frozen methods share them."""

    model: Model
    tensors: dict[str, torch.Tensor]


def load(source: str, dtype: str) -> Weights:
    """Return a checkpoint's weights, read by the library without JAX arrays; for a name in MODELS, random weights."""
    torch.set_num_threads(os.cpu_count() or 1)
    where: dict[str, Any] = {"device": common.torch_device(), "dtype": getattr(torch, dtype)}
    if source in MODELS:
        model = models.from_hf_config(MODELS[source], dtype)
        with torch.device("meta"):
            shapes = _empty_model(model, where["dtype"]).state_dict()
        return Weights(model, {name: torch.empty(each.shape, **where).normal_(std=0.02) for name, each in shapes.items()})
    opened = open_model(source, dtype)
    stored = open_tensors(opened.path)
    wanted = names.checkpoint_names(opened.model.abstract_params(), opened.model.layers_path)
    to_torch = lambda name: torch.from_numpy(np.array(stored.read(name), np.float32)).to(**where)  # noqa: E731
    return Weights(opened.model, {name: to_torch(name) for name in wanted})


def gpu_memory() -> tuple[int, int]:
    """Return the bytes that tensors hold on the GPU, now and at most so far, as PyTorch's allocator counts them."""
    return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()


def own(loaded: Weights) -> Weights:
    """Return the model with a copy of the weights, for a method that writes to them."""
    return loaded._replace(tensors={name: tensor.clone() for name, tensor in loaded.tensors.items()})


def methods(ks: Sequence[int], remats: Iterable[Remat]) -> list[Method]:
    """Return the rows of the table, the floor first; methods that cost the same at every k appear at the first k only."""
    found = [Method("PyTorch", FLOOR, None, _floor)]
    for k in ks:
        found.append(Method("PyTorch", RELEASED, k, lambda loaded, k=k: _released(loaded, k)))
        found.append(Method("PyTorch", PEFT_LORA, k, lambda loaded, k=k: _lora(loaded, k)))
    first = ks[0]
    if Remat.FULL in remats:
        found.append(Method("PyTorch", f"{PEFT_LORA}, remat full", first, lambda loaded: _lora(loaded, first, Remat.FULL)))
    masked = lambda loaded: _masked(loaded, first)  # noqa: E731
    return [
        *found,
        Method("PyTorch", "PEFT SHiRA", first, lambda loaded: _shira(loaded, first), core=False),
        Method("PyTorch", "PEFT Super-Tuning", first, lambda loaded: _supertuning(loaded, first), core=False),
        Method("PyTorch", MASKED, first, masked, owns_weights=True, core=False),
        Method("PyTorch", FULL, None, _full, owns_weights=True, core=False),
    ]


def build_model(loaded: Weights) -> nn.Module:
    """Return LlamaForCausalLM (or its like) on the given tensors, all of them frozen."""
    first = next(iter(loaded.tensors.values()))
    model = _empty_model(loaded.model, first.dtype)
    absent, unknown = model.load_state_dict(loaded.tensors, strict=False, assign=True)
    model.tie_weights()
    if unknown or set(absent) - {"lm_head.weight"}:
        raise ValueError(f"transformers' model has other tensors: {absent}, {unknown}")
    model.config.use_cache = False
    return model.to(first.device).train().requires_grad_(False)


def _empty_model(model: Model, dtype: torch.dtype) -> nn.Module:
    config = transformers.AutoConfig.for_model(**model.hf_config)
    with no_init_weights():
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def _mean_loss(model: nn.Module, tokens: Tokens) -> torch.Tensor:
    device = next(model.parameters()).device
    ids = torch.from_numpy(tokens.ids.astype(np.int64)).to(device)
    labels = torch.where(torch.from_numpy(tokens.labelled.copy()).to(device), ids, -100)
    return model(input_ids=ids, labels=labels).loss


def _trained(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    after_backward: Callable[[], None] = lambda: None,
    trained: int | None = None,
) -> Running:
    """Return the step over `parameters`: loss, gradient, clipping and AdamW (fused, as in transformers' Trainer)."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def run(tokens: Tokens) -> float:
        optimizer.zero_grad()
        loss = _mean_loss(model, tokens)
        loss.backward()
        after_backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    return Running(run, sum(parameter.numel() for parameter in parameters) if trained is None else trained)


def _floor(loaded: Weights) -> Running:
    """Freeze all weights; the embeddings require a gradient, so that it passes through every layer."""
    model = build_model(loaded)
    model.enable_input_require_grads()

    def run(tokens: Tokens) -> float:
        loss = _mean_loss(model, tokens)
        loss.backward()
        return loss.item()

    return Running(run, 0)


def _targets(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield the (parent, attribute, linear map) of every target."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in LLAMA_TARGETS:
                yield parent, name, child


def _largest(weight: torch.Tensor, k: int) -> torch.Tensor:
    """Return the columns of the k largest |W| of every neuron, ascending: int64 (O, k)."""
    return weight.detach().abs().topk(min(k, weight.shape[1]), dim=1).indices.sort(dim=1).values


class _MergedByScatter(nn.Module):
    """y = x (W + D)^T + b, with W + D formed by a scatter-add that autograd sees; values in the weight's dtype."""

    def __init__(self, linear: nn.Linear, k: int):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        columns = _largest(linear.weight, k)
        where = {"device": linear.weight.device}
        starts = torch.arange(linear.weight.shape[0], **where)[:, None] * linear.weight.shape[1]
        self.register_buffer("positions", (columns + starts).flatten())
        self.values = nn.Parameter(torch.zeros(self.positions.numel(), dtype=linear.weight.dtype, **where))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        merged = self.weight.flatten().scatter_add(0, self.positions, self.values)
        return nn.functional.linear(x, merged.view_as(self.weight), self.bias)


def _released(loaded: Weights, k: int) -> Running:
    model = build_model(loaded)
    values = []
    for parent, name, linear in _targets(model):
        adapted = _MergedByScatter(linear, k)
        setattr(parent, name, adapted)
        values.append(adapted.values)
    return _trained(model, values)


def _masked(loaded: Weights, k: int) -> Running:
    """Train complete weights; after the backward pass their gradients are zeroed outside a boolean mask."""
    model = build_model(loaded)
    linears = [linear.requires_grad_(True) for _, _, linear in _targets(model)]
    masks = [
        torch.zeros_like(each.weight, dtype=torch.bool).scatter_(1, _largest(each.weight, k), True) for each in linears
    ]

    def mask_gradients() -> None:
        for linear, mask in zip(linears, masks, strict=True):
            linear.weight.grad.mul_(mask)

    trained = sum(int(mask.sum()) for mask in masks)
    return _trained(model, [each.weight for each in linears], mask_gradients, trained)


def _full(loaded: Weights) -> Running:
    model = build_model(loaded).requires_grad_(True)
    return _trained(model, model.parameters())


def _peft(loaded: Weights, config: Any, remat: Remat = Remat.NONE) -> Running:
    model = peft.get_peft_model(build_model(loaded), config)
    if remat is Remat.FULL:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return _trained(model, [parameter for parameter in model.parameters() if parameter.requires_grad])


def _lora(loaded: Weights, k: int, remat: Remat = Remat.NONE) -> Running:
    rank = lora_rank(loaded.model, k)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LLAMA_TARGETS), task_type="CAUSAL_LM")
    return _peft(loaded, config, remat)


def _shira(loaded: Weights, k: int) -> Running:
    rank = lora_rank(loaded.model, k)
    return _peft(loaded, peft.ShiraConfig(r=rank, random_seed=0, target_modules=list(LLAMA_TARGETS), task_type="CAUSAL_LM"))


def _supertuning(loaded: Weights, k: int) -> Running:
    shapes = list(target_shapes(loaded.model))
    budget = sum(layers * outputs * min(k, inputs) for layers, outputs, inputs in shapes)
    share = budget / sum(layers * outputs * inputs for layers, outputs, inputs in shapes)
    return _peft(
        loaded, peft.SupertuningConfig(sparsity=1 - share, target_modules=list(LLAMA_TARGETS), task_type="CAUSAL_LM")
    )
