"""Answers that share a prompt are scored as if each were read alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import write_model

from neuroada_jax.evaluation import choices
from neuroada_jax.pretrained.load import load_model


@pytest.fixture(scope="module", params=[{}, {"model_type": "mistral", "sliding_window": 7}], ids=["llama", "windows"])
def base_model(request, tmp_path_factory):
    fields = {**request.param, **({"architectures": ["MistralForCausalLM"]} if request.param else {})}
    return load_model(str(write_model(tmp_path_factory.mktemp("model") / "m", **fields)))


def example(rng, prompt, *answer):
    ids = np.array([*prompt, *answer], np.int32)
    return ids, np.arange(len(ids)) >= len(ids) - max(len(answer), int(rng.integers(1, 3)))


def alone(base_model):
    """(ids, is_label) -> the summed loss of an example's labels, from its full logits."""
    module = base_model.model.module()

    @jax.jit
    def log_probabilities(ids):
        hidden, _ = module.apply({"params": base_model.params}, ids[None])
        return jax.nn.log_softmax(module.apply({"params": base_model.params}, hidden, method="unembed")[0])

    def loss(ids, is_label):
        likely = np.asarray(log_probabilities(jnp.asarray(np.pad(ids, (0, 64 - len(ids))))))
        return -likely[np.arange(len(ids) - 1), ids[1:]][is_label[1:]].sum()

    return loss


def test_losses_are_those_of_each_example_alone(base_model):
    rng = np.random.default_rng(0)
    groups = []
    for length in (3, 40, 11, 24, 5):
        prompt = rng.integers(5, 250, length)
        tails = [(7, 8, 2), (7, 9, 2), (7, 8, 9, 9, 2), (2,)]  # longer ones, and one that is nothing but an end
        groups.append([example(rng, prompt, *tail) for tail in tails])
    groups.append([example(rng, groups[0][0][0], *([6] * more)) for more in range(3)])  # each the beginning of the next
    seen = []
    got = choices.losses(base_model.model, base_model.params, groups, 4, lambda done, total: seen.append((done, total)))
    loss = alone(base_model)
    wanted = [[loss(*each) for each in group] + [np.inf] * (4 - len(group)) for group in groups]
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert seen[-1][0] == seen[-1][1] == len(seen)


def test_a_common_prefix_is_read_once(base_model):
    group = [(np.array([5, 6, 7, 8, tail, 2], np.int32), np.arange(6) >= 3) for tail in (20, 30)]
    row = choices._row(group)
    assert row.ids.tolist() == [5, 6, 7, 8, 20, 2, 30, 2]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 5, 4, 5]
    # The first label that differs is predicted from the last shared token.
    assert [slots.tolist() for slots, _ in row.labels] == [[2, 3, 4], [2, 3, 6]]
