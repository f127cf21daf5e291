"""The JAX side of the step benchmark: the library's own step, the frozen floor, and baselines on the same model."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import baselines
from benchmarks.baselines import Baseline
from benchmarks.methods import (
    FLOOR,
    LEARNING_RATE,
    MODELS,
    OURS,
    SCATTER,
    Method,
    Running,
    Tokens,
    lora_rank,
    targets,
)
from neuroada_jax import models
from neuroada_jax.core import bypass, low_rank, trees
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.core.trees import Tree
from neuroada_jax.data.batches import Batch
from neuroada_jax.models import Remat, unrolled
from neuroada_jax.models.losses import label_losses
from neuroada_jax.pretrained.load import LoadedModel, load_model
from neuroada_jax.sweeping import stack
from neuroada_jax.training import config_file, optimizer, step
from neuroada_jax.training.config import OptimizerSection

MEMBERS = 4  # of a sweep
STEPS = 1000  # of the schedule


def load(source: str, dtype: str) -> LoadedModel:
    """Return a checkpoint's model; for a name in MODELS the weights are random, initialised on the device."""
    if source not in MODELS:
        return load_model(source, dtype)
    model = models.from_hf_config(MODELS[source], dtype)
    shapes, structure = jax.tree.flatten(model.abstract_params())
    keys = jax.random.split(jax.random.key(0), len(shapes))
    leaves = [_random(key, each.shape, each.dtype) for key, each in zip(keys, shapes, strict=True)]
    params = unrolled.apart(jax.tree.unflatten(structure, leaves), model.layers_path)
    return LoadedModel(model, source, source, {}, params)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return normal numbers of deviation 0.02, made slice by slice: their random bits never fill a second model."""
    normal = lambda key: 0.02 * jax.random.normal(key, shape[1:], dtype)  # noqa: E731
    return jax.lax.map(normal, jax.random.split(key, shape[0]))


def gpu_memory() -> tuple[int, int]:
    """Return the bytes that arrays hold on the GPU, now and at most so far, as JAX's allocator counts them."""
    counted = jax.devices()[0].memory_stats()
    return counted["bytes_in_use"], counted["peak_bytes_in_use"]


def own(loaded: LoadedModel) -> LoadedModel:
    """Return the model with a copy of the weights, for a method that writes to them."""
    return dataclasses.replace(loaded, params=jax.tree.map(jnp.copy, loaded.params))


def methods(ks: Sequence[int], remats: Iterable[Remat]) -> list[Method]:
    """Return the rows of the table, the floor first; methods that cost the same at every k appear at the first k only."""
    first = ks[0]
    ours = [(OURS, k, Remat.NONE) for k in ks]
    ours += [(f"{OURS}, remat {remat.value}", first, remat) for remat in remats if remat is not Remat.NONE]
    found = [Method("JAX", FLOOR, None, _floor)]
    for name, k, remat in ours:
        build = functools.partial(_ours, build=functools.partial(bypass.build, k=k), remat=remat)
        found.append(Method("JAX", name, k, build, owns_weights=True))
    scatter = lambda base: _baseline(base, baselines.scatter(first))  # noqa: E731
    sweep = lambda base: _members(base, first)  # noqa: E731
    found.append(Method("JAX", f"{OURS}, one of {MEMBERS} in a sweep", first, sweep, core=False, owns_weights=True))
    found.append(Method("JAX", "LoRA", first, lambda base: _lora(base, first), core=False, owns_weights=True))
    return [*found, Method("JAX", SCATTER, first, scatter, core=False)]


def to_batch(tokens: Tokens) -> Batch:
    """Return the library's batch: positions and ids of the labels, padded to a multiple of 8."""
    counts = tokens.labelled.sum(axis=1)
    rows, most = len(counts), -(-int(counts.max()) // 8) * 8
    batch = Batch(
        input_ids=tokens.ids,
        lengths=np.full(rows, tokens.ids.shape[1], np.int32),
        label_positions=np.zeros((rows, most), np.int32),
        label_ids=np.zeros((rows, most), np.int32),
        label_mask=np.zeros((rows, most), np.float32),
    )
    for row, count in enumerate(counts):
        where = tokens.labelled[row].nonzero()[0]
        batch.label_positions[row, :count] = where - 1
        batch.label_ids[row, :count] = tokens.ids[row, where]
        batch.label_mask[row, :count] = 1
    return batch


def _lora(base: LoadedModel, k: int) -> Running:
    """Return the step of the library's LoRA with the budget of k connections per neuron, alpha = r."""
    build = functools.partial(low_rank.build, rank=lora_rank(base.model, k), scale=1.0, key=jax.random.key(0))
    return _ours(base, build, Remat.NONE)


def _ours(base: LoadedModel, build: Callable[..., Bypass], remat: Remat) -> Running:
    """Return the step of the training loop: AdamW, clipping and the resident write included."""
    transformation = optimizer.build(OptimizerSection(learning_rate=LEARNING_RATE), STEPS)
    state = step.initial_state(base.params, build(base.params, targets(base.params, base.model)), transformation)
    run_step = step.make_step(base.model.module(remat), transformation)
    trained = bypass.count(state.trainable)

    def run(tokens: Tokens) -> float:
        nonlocal state
        state, metrics = run_step(state, to_batch(tokens))
        return float(jax.block_until_ready((state, metrics))[1].loss)

    return Running(run, trained)


def _members(base: LoadedModel, k: int) -> Running:
    """Return the step of a sweep over the seed, all of whose members get the same batch."""
    own = config_file.from_dict(
        {"name": "sweep", "model": {"path": base.source}, "data": {"train": "none"}, "training": {"steps": STEPS}}
        | {"optimizer": {"learning_rate": LEARNING_RATE}},
        "benchmark",
    )
    state = step.initial_state(
        base.params, bypass.build(base.params, targets(base.params, base.model), k=k), optimizer.build(own.optimizer, STEPS)
    )
    params, count = state.params, bypass.count(state.trainable)
    members = stack.stacked([state] * MEMBERS, [dataclasses.replace(own, seed=seed) for seed in range(MEMBERS)], STEPS)
    run_step = stack.make_step(base.model.module(), own, label_losses, dropout=False)

    def run(tokens: Tokens) -> float:
        nonlocal params, members
        batch = to_batch(tokens)
        batches = jax.tree.map(lambda leaf: np.stack([leaf] * MEMBERS), batch)
        params, members, metrics = run_step(params, members, batches)
        return float(jax.block_until_ready((params, metrics))[1].loss[0])

    return Running(run, count, MEMBERS)


def _floor(base: LoadedModel) -> Running:
    """Return the gradient of the layer norms' scales, which needs every layer's input gradient and a sum over tokens."""
    path = (*base.model.layers_path, "input_layernorm")
    module = base.model.module()

    @jax.jit
    def gradient(scales: Tree, params: Tree, batch: Batch) -> Any:
        loss = lambda scales: baselines.mean_loss(module, {"params": trees.put(params, path, scales)}, batch)  # noqa: E731
        return jax.value_and_grad(loss)(scales)

    def run(tokens: Tokens) -> float:
        return float(jax.block_until_ready(gradient(trees.get(base.params, path), base.params, to_batch(tokens)))[0])

    return Running(run, 0)


def _baseline(base: LoadedModel, baseline: Baseline) -> Running:
    trainable, frozen = baseline.split(base.params, targets(base.params, base.model))
    run_step = baselines.make_step(baseline, base.model.module())
    trained = baseline.count(trainable)
    state = baselines.ADAMW.init(trainable)

    def run(tokens: Tokens) -> float:
        nonlocal trainable, state
        with jax.numpy_dtype_promotion("standard"):
            trainable, state, value = run_step(trainable, state, frozen, to_batch(tokens))
        return float(jax.block_until_ready((trainable, value))[1])

    return Running(run, trained)
