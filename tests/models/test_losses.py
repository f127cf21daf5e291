"""The loss at the labelled positions against the plain one, its chunks, and what exists of the logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import CONFIG

from neuroada_jax import models
from neuroada_jax.core import bypass
from neuroada_jax.data.batches import Batch, ClassificationBatch
from neuroada_jax.models import losses

ROWS, TIME, TARGETS = 4, 12, 8


def problem(dtype=jnp.float32):
    """(module, params, bypass on q_proj and lm_head with random values, batch) for an untied model of one layer."""
    model = models.from_hf_config({**CONFIG, "num_hidden_layers": 1, "tie_word_embeddings": False}, dtype)
    rng = np.random.default_rng(0)
    normal = lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)  # noqa: E731
    params = jax.tree.map(normal, model.abstract_params())
    built = bypass.build(params, models.match_targets(params, ["q_proj", "lm_head"], model.layers_path), 2)
    built = built._replace(values=jax.tree.map(normal, built.values))
    vocabulary = CONFIG["vocab_size"]
    mask = (np.arange(TARGETS)[None] < rng.integers(1, TARGETS + 1, ROWS)[:, None]).astype(np.float32)
    batch = Batch(
        input_ids=rng.integers(0, vocabulary, (ROWS, TIME)).astype(np.int32),
        lengths=np.full(ROWS, TIME, np.int32),
        label_positions=(rng.integers(0, TIME - 1, (ROWS, TARGETS)) * mask).astype(np.int32),
        label_ids=(rng.integers(0, vocabulary, (ROWS, TARGETS)) * mask).astype(np.int32),
        label_mask=mask,
    )
    return model.module(), params, built, jax.tree.map(jnp.asarray, batch)


def plain_losses(module, variables, batch):
    """From the logits of all positions."""
    hidden, _ = module.apply(variables, batch.input_ids)
    scores = jax.nn.log_softmax(module.apply(variables, hidden, method="unembed").astype(jnp.float32))
    rows = jnp.arange(ROWS)[:, None]
    return -scores[rows, batch.label_positions, batch.label_ids] * batch.label_mask


def losses_and_gradient(function, output: bool):
    """Losses and gradient of a weighted sum of them with respect to the values, with or without those of lm_head."""
    module, params, built, batch = problem()
    weights = jnp.arange(ROWS * TARGETS, dtype=jnp.float32).reshape(ROWS, TARGETS) / 7  # cotangents that differ

    @jax.jit
    def run(values):
        def total(values):
            each = function(module, {"params": params, "bypass": values, "columns": built.columns}, batch)
            return jnp.sum(each * weights), each

        return jax.grad(total, has_aux=True)(values)

    return run(built.values if output else {"model": built.values["model"]})


@pytest.mark.parametrize("output", [False, True], ids=["frozen output layer", "output layer with a bypass"])
@pytest.mark.parametrize("chunk", [1, 10, 32, 100])  # of 32 targets: one at a time, uneven, exactly full, all
def test_losses_and_gradients_equal_the_plain_ones(output, chunk, monkeypatch):
    monkeypatch.setattr(losses, "LOGIT_BYTES", chunk * 4 * CONFIG["vocab_size"])
    gradient, each = losses_and_gradient(losses.label_losses, output)
    plain_gradient, plain = losses_and_gradient(plain_losses, output)
    np.testing.assert_allclose(each, plain, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, plain_gradient)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def shapes(jaxpr):
    """The shapes of all intermediate results of a jaxpr and those inside it."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes(inner)


@pytest.mark.parametrize("output", [False, True])
def test_no_more_logits_exist_than_a_chunk_of_them(output, monkeypatch):
    vocabulary = CONFIG["vocab_size"]
    monkeypatch.setattr(losses, "LOGIT_BYTES", 5 * 4 * vocabulary)
    module, params, built, batch = problem()
    values = built.values if output else {"model": built.values["model"]}

    def total(values):
        return jnp.sum(losses.label_losses(module, {"params": params, "bypass": values, "columns": built.columns}, batch))

    found = [s for s in shapes(jax.make_jaxpr(jax.grad(total))(values).jaxpr) if s and s[-1] == vocabulary]
    assert found
    assert max(int(np.prod(s)) for s in found) <= 5 * vocabulary


class Given(nn.Module):
    """A classifier whose outputs are a parameter."""

    @nn.compact
    def __call__(self, ids, mask, token_types):
        return self.get_variable("params", "logits")


NUMBERS = np.random.default_rng(3)
LABELLED = {
    "single_label_classification": (4, NUMBERS.integers(0, 4, 6).astype(np.int32), None),
    "weighted": (4, NUMBERS.integers(0, 4, 6).astype(np.int32), np.float32([1, 3, 0.5, 2])),
    "regression": (1, NUMBERS.normal(size=6).astype(np.float32), None),
    "multi_label_classification": (4, NUMBERS.integers(0, 2, (6, 4)).astype(np.float32), None),
}


@pytest.mark.parametrize("problem", LABELLED)
def test_the_mean_loss_of_a_classifier_is_that_of_transformers(problem):
    torch = pytest.importorskip("torch")
    import transformers
    from transformers.loss.loss_utils import ForSequenceClassificationLoss

    size, labels, weights = LABELLED[problem]
    logits = NUMBERS.normal(size=(6, size)).astype(np.float32)
    ids, lengths = np.zeros((6, 2), np.int32), np.full(6, 2, np.int32)
    mask = np.ones(6, np.float32) if weights is None else weights[labels]
    batch = ClassificationBatch(ids, lengths, ids, labels, mask)
    found = losses.classification_losses(Given(), {"params": {"logits": jnp.asarray(logits)}}, batch)
    expected = [
        torch.from_numpy(logits),
        torch.from_numpy(labels).long() if labels.dtype == np.int32 else torch.from_numpy(labels),
    ]
    if weights is not None:
        want = torch.nn.CrossEntropyLoss(torch.from_numpy(weights))(*expected)
    else:
        config = transformers.BertConfig(num_labels=size, problem_type=problem)
        want = ForSequenceClassificationLoss(expected[1], expected[0], config)
    assert found.shape == (6,) and float(found.sum() / mask.sum()) == pytest.approx(want.item(), rel=1e-6)
