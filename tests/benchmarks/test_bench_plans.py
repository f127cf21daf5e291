"""benchmarks/plans.py on a tiny model and virtual CPU devices, and the steps of baselines.py that it compiles."""

import contract
import jax
import numpy as np
import pytest
from helpers import CONFIG, NEURONS

from benchmarks import baselines, methods, plans
from neuroada_jax import models
from neuroada_jax.models import Remat
from neuroada_jax.planning import shapes

LAYERS, TINY = 2, {**CONFIG, "tie_word_embeddings": False}
MAPS = LAYERS * (16 * 16 + 2 * 8 * 16 + 16 * 16 + 3 * 16 * 24)  # entries of the adapted kernels
FACTORS = LAYERS * 232  # inputs and outputs of a layer's maps: what LoRA trains for each rank
OTHERS = 2 * 304 * 16 + (2 * LAYERS + 1) * 16  # embedding, output layer, norms
METHODS = ["full fine-tuning", "neuroada-jax", "autodiff scatter", "mask-based NeuroAda", "LoRA"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(plans.MODELS, "llama-7b", TINY)


def run(folder, *arguments):
    with jax.numpy_dtype_promotion("standard"):  # JAX transposes its own attention in mixed precision
        return plans.main([*arguments, "--machine", "cpu", "--out", str(folder)])


@pytest.mark.slow  # a benchmark in full
def test_every_method_has_its_bytes(tmp_path, capsys):
    options = ["--models", "llama-7b", "--batch", "2", "--length", "16", "--k", "1", "--ranks", "2", "--remat", "full"]
    assert run(tmp_path, "memory", *options) == 0
    settings, rows = contract.read(tmp_path, "memory", timed=False)
    assert contract.printed_rows(capsys.readouterr().out) == len(rows)
    assert settings["compiled_for"] == "cpu"
    assert [(row["method"], row["remat"]) for row in rows] == [(name, "full") for name in METHODS]
    chosen = LAYERS * NEURONS
    assert [row["trained"] for row in rows] == [MAPS + OTHERS, chosen, chosen, chosen, 2 * FACTORS]
    for row in rows:
        assert row["bytes"]["weights"] == 2 * (MAPS + OTHERS)
        assert row["peak_bytes"] == sum(row["bytes"].values())
        assert row["bytes"]["temporaries"] > 0
    assert rows[0]["ratio_to_full"] == 1 > rows[1]["ratio_to_full"]
    scales = 4 * 7 * LAYERS
    adapters = [0, chosen * (4 + 4 + 2), chosen * 8, MAPS, 4 * 2 * FACTORS + scales]
    assert [row["bytes"]["adapter"] for row in rows] == adapters
    moments = [2 * 2 * (MAPS + OTHERS), 8 * chosen, 8 * chosen, 2 * 2 * MAPS, 2 * 4 * 2 * FACTORS]
    for row, expected in zip(rows, moments, strict=True):
        assert expected <= row["bytes"]["optimizer"] <= expected + 32, row["method"]  # and counters


@pytest.mark.slow  # half a minute of compiling; tests/planning has the planner's own on shared weights
def test_devices_share_weights_and_traffic(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(plans.MODELS, "llama-7b", CONFIG)
    options = ["--models", "llama-7b", "--devices", "1", "8", "--k", "1", "--length", "16"]
    assert run(tmp_path, "devices", *options) == 0
    _, rows = contract.read(tmp_path, "devices", timed=False)
    assert contract.printed_rows(capsys.readouterr().out) == len(rows)
    meshes = [(row["devices"], row["fsdp"], row["tensor"]) for row in rows]
    assert meshes == [(1, 1, 1), (8, 1, 1), (8, 8, 1), (8, 1, 8)]
    alone, data, fsdp, tensor = rows
    assert alone["collectives"] == {} and data["summed_bytes"] == 4 * 2 * NEURONS + 8 and data["gathered_bytes"] == 0
    assert data["weight_bytes"] == alone["weight_bytes"] > 7 * fsdp["weight_bytes"] > 0
    assert fsdp["gathered_bytes"] > alone["weight_bytes"] and tensor["weight_bytes"] == fsdp["weight_bytes"]
    assert fsdp["flops"] == data["flops"] == alone["flops"]


@pytest.mark.parametrize("command", ["memory", "devices"])
def test_a_gpu_needs_its_compiler(tmp_path, monkeypatch, command):
    without = plans.compiler_for(plans.find("cpu", "float32"))
    monkeypatch.setattr(plans, "compiler_for", lambda machine: without)
    with pytest.raises(SystemExit, match="make check-gpu"):
        plans.main([command, "--machine", "h100", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "baseline", [baselines.full(), baselines.masked(1)], ids=["every leaf moves", "k entries a neuron move"]
)
def test_the_compiled_baselines_train(baseline):
    model = models.from_hf_config(TINY, "float32")
    rng = np.random.default_rng(0)
    batch = shapes.abstract_batch(2, 16)._replace(
        input_ids=rng.integers(0, 304, (2, 16), dtype=np.int32),
        lengths=np.full(2, 16, np.int32),
        label_positions=np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16)),
        label_ids=rng.integers(0, 304, (2, 16), dtype=np.int32),
        label_mask=np.ones((2, 16), np.float32),
    )
    params = jax.tree.map(
        lambda leaf: jax.numpy.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), model.abstract_params()
    )
    trainable, frozen = baseline.split(params, methods.targets(params, model))
    before = jax.tree.map(np.array, trainable)
    state, step, losses = baselines.ADAMW.init(trainable), baselines.make_step(baseline, model.module(Remat.FULL)), []
    for _ in range(4):
        with jax.numpy_dtype_promotion("standard"):
            trainable, state, loss = step(trainable, state, frozen, batch)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(trainable), strict=True):
        moved = old != np.asarray(new)
        assert moved.any()
        assert "mask" not in frozen or (moved.sum(-1) <= 1).all()


def test_the_table_of_models():
    parameters = {
        name: sum(leaf.size for leaf in jax.tree.leaves(models.from_hf_config(config).abstract_params()))
        for name, config in plans.MODELS.items()
        if name not in ("llama-7b", "tiny") and not name.startswith("small-")  # the second is of gpu.py
    }
    assert parameters == {
        "llama-13b": 13_015_864_320,
        "llama-3-8b": 8_030_261_248,
        "llama-3-70b": 70_553_706_496,
        "qwen3-30b-a3b": 30_532_122_624,
    }
