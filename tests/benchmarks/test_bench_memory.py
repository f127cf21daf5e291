"""benchmarks/memory.py on a tiny model: what every method is given, and that the steps it compiles are real ones."""

import contract
import jax
import numpy as np
import pytest
from helpers import CONFIG, NEURONS

from benchmarks import memory
from neuroada_jax import models
from neuroada_jax.models import Remat
from neuroada_jax.planning import plan

LAYERS, TINY = 2, {**CONFIG, "tie_word_embeddings": False}
MAPS = LAYERS * (16 * 16 + 2 * 8 * 16 + 16 * 16 + 3 * 16 * 24)  # entries of the adapted kernels
FACTORS = LAYERS * 232  # inputs and outputs of a layer's maps: what LoRA trains for each rank
OTHERS = 2 * 304 * 16 + (2 * LAYERS + 1) * 16  # embedding, output layer, norms


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(memory.MODELS, "llama-7b", TINY)


def test_rows_and_table(tmp_path, capsys):
    options = ["--models", "llama-7b", "--batch", "2", "--length", "16", "--k", "1", "--ranks", "2", "--remat", "full"]
    memory.main([*options, "--out", str(tmp_path)])
    settings, rows = contract.read(tmp_path, "memory", timed=False)
    assert contract.printed_rows(capsys.readouterr().out) == len(rows)
    assert settings["target"] == "cpu"
    names = ["full fine-tuning", "neuroada-jax", "autodiff scatter", "mask-based NeuroAda", "LoRA"]
    assert [(row["method"], row["remat"]) for row in rows] == [(name, "full") for name in names]
    chosen = LAYERS * NEURONS
    assert [row["trained"] for row in rows] == [MAPS + OTHERS, chosen, chosen, chosen, 2 * FACTORS]
    for row in rows:
        assert row["bytes"]["weights"] == 2 * (MAPS + OTHERS)
        assert row["peak_bytes"] == sum(row["bytes"].values())
        assert row["bytes"]["temporaries"] > 0
    assert rows[0]["ratio_to_full"] == 1 > rows[1]["ratio_to_full"]
    assert [row["bytes"]["adapter"] for row in rows] == [0, chosen * (4 + 4 + 2), chosen * 8, MAPS, 2 * 2 * FACTORS]
    moments = [2 * 2 * (MAPS + OTHERS), 8 * chosen, 8 * chosen, 2 * 2 * MAPS, 2 * 2 * 2 * FACTORS]
    for row, expected in zip(rows[:5], moments, strict=True):
        assert expected <= row["bytes"]["optimizer"] <= expected + 32, row["method"]  # and counters


def test_the_compiled_steps_train():
    """The same programs on arrays instead of shapes: a step lowers the loss, and the mask holds."""
    model = models.from_hf_config(TINY, "float32")
    batch = plan.abstract_batch(2, 16)
    rng = np.random.default_rng(0)
    made = batch._replace(
        input_ids=rng.integers(0, 304, (2, 16), dtype=np.int32),
        lengths=np.full(2, 16, np.int32),
        label_positions=np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16)),
        label_ids=rng.integers(0, 304, (2, 16), dtype=np.int32),
        label_mask=np.ones((2, 16), np.float32),
    )

    def random(leaf):
        if leaf.dtype == np.bool:
            return jax.numpy.zeros(leaf.shape, leaf.dtype)
        return jax.numpy.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)

    for program, moves in (
        (memory._full(model, Remat.FULL, batch), True),
        (memory._masked(model, Remat.NONE, batch, 1), False),
    ):
        trainable, state, frozen, _ = program.arguments
        trainable, frozen = jax.tree.map(random, (trainable, frozen))
        state = memory.ADAMW.init(trainable)
        before = jax.tree.map(np.array, trainable)
        losses = []
        for _ in range(4):
            with jax.numpy_dtype_promotion("standard"):
                trainable, state, loss = program.step(trainable, state, frozen, made)
            losses.append(float(loss))
        assert (losses[-1] < losses[0]) == moves
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(trainable), strict=True):
            assert (old != np.asarray(new)).any() == moves  # every leaf of a full step, none behind an empty mask


def test_a_gpu_needs_its_compiler(tmp_path, monkeypatch):
    without = memory.compiler_for(memory.find("cpu", "float32"))
    monkeypatch.setattr(memory, "compiler_for", lambda target: without)
    with pytest.raises(SystemExit, match="make bench-memory-h100"):
        memory.main(["--target", "h100", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_the_table_of_models():
    parameters = {
        name: sum(leaf.size for leaf in jax.tree.leaves(models.from_hf_config(config).abstract_params()))
        for name, config in memory.MODELS.items()
        if name != "llama-7b"
    }
    assert parameters == {"llama-13b": 13_015_864_320, "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496}
