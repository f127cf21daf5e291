"""Low-rank factors against PEFT, from the same start: training, merging, and adapters that PEFT loads."""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from helpers import write_bert, write_model

from neuroada_jax.adapters import exchange, native, on_base
from neuroada_jax.adapters.verification import load_torch
from neuroada_jax.core import low_rank, trees
from neuroada_jax.data.batches import Batch, ClassificationBatch
from neuroada_jax.errors import UserError
from neuroada_jax.models import dense_modules
from neuroada_jax.models.losses import classification_losses, label_losses
from neuroada_jax.pretrained.load import LoadedModel, load_model
from neuroada_jax.training import config_file, connections, modules, optimizer, step

STEPS, RATE, CLIP = 3, 0.02, 0.5
CLASSIFIER = [("classifier",)]
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2}
FIELDS: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", **ROUTED},
    "qwen3_moe": {"model_type": "qwen3_moe", "moe_intermediate_size": 16, **ROUTED},
}


class Case(NamedTuple):
    """A tiny model with random weights, and one batch for it."""

    loaded: LoadedModel
    batch: Any
    losses: Any
    paths: list
    config: Any


def case(kind, folder) -> Case:
    directory = write_bert(folder / "model") if kind == "bert" else write_model(folder / "model", **FIELDS.get(kind, {}))
    loaded = load_model(str(directory), labels=["a", "b", "c"] if kind == "bert" else None, seed=3)
    rng, ones = np.random.default_rng(0), np.ones((2, 8), np.float32)
    ids, lengths = rng.integers(8, 250, (2, 9), np.int32), np.array([8, 8], np.int32)
    positions = np.tile(np.arange(8, dtype=np.int32), (2, 1))
    batch: Any = Batch(ids[:, :8], lengths, positions, ids[:, 1:], ones)
    if kind == "bert":
        batch = ClassificationBatch(ids[:, :8], lengths, 0 * positions, np.array([2, 0], np.int32), ones[:, 0])
    content = {
        "name": "test",
        "method": "lora",
        "lora": {"r": 4, "alpha": 6},
        "model": {"path": str(directory)},
        "data": {"train": "unused", "task": "mrpc" if kind == "bert" else "instruct"},
        "optimizer": {"learning_rate": RATE, "schedule": "constant", "clip_norm": CLIP, "weight_decay": 0.1},
        "training": {"steps": STEPS},
    }
    config = modules.resolved(config_file.from_dict(content, "test"), loaded.model)
    losses = classification_losses if kind == "bert" else label_losses
    return Case(loaded, batch, losses, modules.target_paths(config, loaded.model), config)


def save(directory, made: Case, adapter, classifier) -> str:
    chosen = connections.selection_of(made.config, made.loaded.model, None)
    on_base.save(directory, adapter, made.loaded, chosen, classifier=classifier)
    return str(directory)


def trained_by_peft(made: Case, adapter: str, folder) -> dict[str, np.ndarray]:
    """The tensors of PEFT's model after the steps, from an adapter of ours."""
    exchange.export_adapter(adapter, "peft-lora", str(folder))
    model = peft.PeftModel.from_pretrained(
        load_torch(made.loaded.model, made.config.model.path, np.float32), folder, is_trainable=True
    ).eval()
    trained = [leaf for leaf in model.parameters() if leaf.requires_grad]
    groups = [
        {"params": [leaf for leaf in trained if leaf.ndim == dimensions], "weight_decay": decay}
        for dimensions, decay in ((2, 0.1), (1, 0.0))
    ]
    adamw = torch.optim.AdamW(groups, lr=RATE, eps=1e-8)
    ids = torch.from_numpy(made.batch.input_ids.astype(np.int64))
    labels = getattr(made.batch, "label_ids", getattr(made.batch, "labels", None))
    for _ in range(STEPS):
        logits = model(input_ids=ids).logits.flatten(0, -2)
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels.astype(np.int64)).flatten()).backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        adamw.step()
        adamw.zero_grad()
    return {name: leaf.numpy() for name, leaf in peft.get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_training_is_that_of_peft(kind, tmp_path):
    made = case(kind, tmp_path)
    params, dense = jax.tree.map(np.array, made.loaded.params), CLASSIFIER if kind == "bert" else []
    built = connections.choose(made.config, made.loaded.model, params, made.paths)
    for path, a in trees.leaves(built.values, "lora_a"):
        bound = 1 / np.sqrt(a.shape[-1])  # of PEFT's kaiming_uniform_(a=sqrt(5))
        assert 0.9 * bound < np.abs(a).max() <= bound and np.std(a) == pytest.approx(bound / np.sqrt(3), rel=0.2)
        assert not np.any(trees.get(built.values, path)["lora_b"])
    first = save(tmp_path / "first", made, built, dense_modules.split(params, dense)[1])
    expected = trained_by_peft(made, first, tmp_path / "first-peft")

    transformation = optimizer.build(made.config.optimizer, STEPS)
    module = made.loaded.model.module()
    state = step.initial_state(made.loaded.params, built, transformation, dense)
    take = step.make_step(module, transformation, losses=made.losses)
    for _ in range(STEPS):
        state, _ = take(state, made.batch)
    last = save(tmp_path / "last", made, state.bypass, state.classifier)
    exchange.export_adapter(last, "peft-lora", str(tmp_path / "last-peft"))
    found = exchange.peft.read_files(tmp_path / "last-peft")[1]
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=1e-5, err_msg=name)
    assert max(np.abs(leaf).max() for name, leaf in found.items() if "lora_B" in name) > RATE

    # Merged or not, the losses are the same; the frozen weights are those of the checkpoint.
    batch = jax.tree.map(jnp.asarray, made.batch)
    merged = dense_modules.join(low_rank.merge(state.params, state.bypass), state.classifier)
    losses = [made.losses(module, {"params": each}, batch) for each in (state.tuned, merged)]
    np.testing.assert_allclose(*losses, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, state.params, dense_modules.split(params, dense)[0])


@pytest.mark.parametrize("kind", ["llama", "bert", *FIELDS])
def test_peft_loads_an_export_and_an_import_gives_it_back(kind, tmp_path):
    made = case(kind, tmp_path)
    built = connections.choose(made.config, made.loaded.model, made.loaded.params, made.paths)
    rng = np.random.default_rng(1)
    values = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), built.values)
    dense = dense_modules.split(made.loaded.params, CLASSIFIER if kind == "bert" else [])[1]
    own = save(tmp_path / "own", made, built._replace(values=values), dense)
    exported = exchange.export_adapter(own, "peft-lora", str(tmp_path / "peft"), verify=True)
    assert exported["merged_equal"] is True and exported["max_logit_difference"] < 1e-5 * exported["logit_tolerance"] / 1e-4
    source = made.config.model.path
    if kind == "bert":  # its classifier is in the adapter, and the number of its labels in the model's config
        return
    exchange.import_adapter(str(tmp_path / "peft"), "peft-lora", source, str(tmp_path / "again"))
    before, after = native.read(own), native.read(str(tmp_path / "again"))
    assert after.metadata["lora"] == {"r": 4, "alpha": 6.0} and after.factors.keys() == before.factors.keys()
    jax.tree.map(np.testing.assert_array_equal, after.factors, before.factors)
    assert after.metadata["base"]["digests"] == before.metadata["base"]["digests"]


@pytest.mark.parametrize("kind", [pytest.param("mixtral", marks=pytest.mark.slow), "qwen3_moe"])
def test_peft_loads_factors_of_some_maps_of_experts_or_they_are_refused(kind, tmp_path):
    made = case(kind, tmp_path)
    maps = made.loaded.model.config.experts.maps
    for number, chosen in enumerate(each for count in (1, 2, 3) for each in itertools.combinations(maps, count)):
        some = dataclasses.replace(made.config, lora=dataclasses.replace(made.config.lora, targets=["q_proj", *chosen]))
        own = made._replace(config=some, paths=modules.target_paths(some, made.loaded.model))
        built = connections.choose(own.config, own.loaded.model, own.loaded.params, own.paths)
        values = jax.tree.map(lambda leaf: leaf + 0.1, built.values)
        source, out = save(tmp_path / f"own-{number}", own, built._replace(values=values), {}), tmp_path / f"peft-{number}"
        if chosen in (maps, maps[2:]):
            assert exchange.export_adapter(source, "peft-lora", str(out), verify=True)["merged_equal"]
            continue
        with pytest.raises(UserError, match=f"of the experts {' and '.join(chosen)} have factors and .* none; PEFT loads"):
            exchange.export_adapter(source, "peft-lora", str(out))
        assert not out.exists()
