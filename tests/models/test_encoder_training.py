"""Every family of encoders trained as PyTorch trains it: the bypass of all default targets, classes and numbers."""

import functools

import jax
import numpy as np
import optax
import pytest
import torch
from test_encoder import CASES, converted, random_batch, torch_inputs, torch_model

from neuroada_jax import models
from neuroada_jax.core import bypass
from neuroada_jax.data.batches import ClassificationBatch
from neuroada_jax.models import names
from neuroada_jax.models.losses import classification_losses
from neuroada_jax.training import step

FAMILIES = [
    "electra",
    "distilbert",
    "deberta-v2",
    "deberta-v3",
    "modernbert",
    "modernbert_mean",
    "mpnet",
    "bert_regression",
]
STEPS, RATE = 3, 0.02


def torch_trained(reference, columns, kind, batch, labels):
    """Values by module after Adam's steps on W + D, D zero but at the columns."""
    values = {module: torch.zeros(own.shape, requires_grad=True) for module, own in columns.items()}
    frozen = {name: parameter.detach() for name, parameter in reference.named_parameters()}
    adam = torch.optim.Adam(list(values.values()), lr=RATE, eps=1e-3)
    inputs = torch_inputs(*batch)
    if kind in ("distilbert", "modernbert", "mpnet"):
        del inputs["token_type_ids"]
    for _ in range(STEPS):
        weights = dict(frozen)
        for module, own in values.items():
            weight = frozen[f"{module}.weight"]
            place = (torch.arange(len(weight))[:, None], torch.from_numpy(columns[module]).long())
            weights[f"{module}.weight"] = weight + torch.zeros_like(weight).index_put(place, own)
        loss = torch.func.functional_call(reference, weights, (), {**inputs, "labels": torch.from_numpy(labels)}).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
    return {module: own.detach().numpy() for module, own in values.items()}


@pytest.mark.parametrize(
    ("case", "k"),
    [
        pytest.param(case, k, marks=() if (case, k) == ("modernbert", 1) else pytest.mark.slow)
        for case in FAMILIES
        for k in (1, 20)
    ],
)
def test_values_equal_those_that_pytorch_trains(case, k):
    kind, fields = CASES[case]
    reference = torch_model(kind, fields)
    model, params = converted(reference)
    ids, mask, token_types = random_batch(reference.config)
    rng, classes = np.random.default_rng(3), model.config.num_labels
    labels = rng.normal(size=4).astype(np.float32) if classes == 1 else rng.integers(0, classes, 4)
    paths = models.match_targets(params, list(model.architecture.targets), model.layers_path)
    built = bypass.build(params, paths, k)
    columns = jax.tree.map(np.array, built.columns)
    transformation = optax.adam(RATE, eps=1e-3)
    state = step.initial_state(params, built, transformation)
    run = step.make_step(model.module(), transformation, losses=classification_losses)
    own = labels if classes == 1 else labels.astype(np.int32)
    lengths = mask.sum(axis=1).astype(np.int32)
    for _ in range(STEPS):
        state, _ = run(state, ClassificationBatch(ids, lengths, token_types, own, np.ones(4, np.float32)))
    flat = functools.partial(names.unstacked, layers_path=model.layers_path)
    values = dict(flat(jax.tree.map(np.asarray, state.trainable["bypass"])))
    want = torch_trained(reference, dict(flat(columns)), kind, (ids, mask, token_types), labels)
    assert values.keys() == want.keys() and max(np.abs(each).max() for each in want.values()) > RATE
    for module, trained in want.items():
        np.testing.assert_allclose(values[module], trained, rtol=0, atol=1e-4, err_msg=module)
