"""Training an encoder: the head beside the bypass, dropout keys, regression, and parity with the official PyTorch code."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import GOLDEN, load_golden

from neuroada_jax import models
from neuroada_jax.core import bypass, trees
from neuroada_jax.data.batches import ClassificationBatch
from neuroada_jax.models import ENCODER_TARGETS, Remat, dense_modules, names
from neuroada_jax.models.losses import classification_losses
from neuroada_jax.pretrained.load import load_model
from neuroada_jax.training import checkpoint, optimizer, step
from neuroada_jax.training.config import ClassifierSection, OptimizerSection

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
}
HEAD = [("classifier",)]
SOME = ["query", "intermediate.dense"]  # fewer targets compile faster


# model_type -> (fields of its config, its targets, its dense modules), where they are not those of BERT
KINDS = {
    "electra": ({"embedding_size": 8}, SOME, HEAD),
    "distilbert": ({"hidden_dim": 24}, ["q_lin", "lin1"], [("pre_classifier",), ("classifier",)]),
    "deberta-v2": (
        {
            "relative_attention": True,
            "pos_att_type": "p2c|c2p",
            "position_buckets": 6,
            "norm_rel_ebd": "layer_norm",
            "conv_kernel_size": 3,
        },
        ["query_proj", "intermediate.dense"],
        [("classifier",), ("pooler",)],
    ),
    "modernbert": ({"local_attention": 6}, ["Wqkv", "mlp.Wo"], [("head",), ("classifier",)]),
    "mpnet": ({}, ["q", "intermediate.dense"], HEAD),
}


def setup(kind="roberta", labels=("a", "b", "c"), dropout=0.0, dtype=jnp.float32, classifier=None, targets=SOME, **section):
    """(model, transformation, make_state) of a random encoder; every state starts from the same numbers."""
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    fields, targets, dense = KINDS.get(kind, ({}, targets, HEAD))
    model = models.from_hf_config({"model_type": kind, **SIZES, **rates, **fields}, dtype, labels)
    section = OptimizerSection(**{"learning_rate": 0.02, "schedule": "constant", **section})
    transformation = optimizer.build(section, 100, classifier)

    def make_state(paths=dense):
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), model.abstract_params()
        )
        built = bypass.build(params, models.match_targets(params, targets, model.layers_path), 2)
        return step.initial_state(params, built, transformation, paths)

    return model, transformation, make_state


def random_batch(rows=4, time=12, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return ClassificationBatch(
        input_ids=rng.integers(2, SIZES["vocab_size"], (rows, time)).astype(np.int32),
        lengths=rng.integers(4, time + 1, rows).astype(np.int32),
        token_types=rng.integers(0, 2, (rows, time)).astype(np.int32),
        labels=rng.integers(0, classes, rows).astype(np.int32) if classes else rng.standard_normal(rows, np.float32),
        label_mask=np.ones(rows, np.float32),
    )


def make_step(model, transformation, accumulation=1, dropout_seed=None):
    return step.make_step(model.module(), transformation, accumulation, classification_losses, dropout_seed)


def test_the_head_is_in_the_trainable_tree_and_nowhere_else():
    model, transformation, make_state = setup()
    state = make_state()
    assert "classifier" not in state.params and set(state.trainable) == {"bypass", "classifier"}
    assert jax.tree.map(jnp.shape, state.tuned) == jax.tree.map(lambda leaf: leaf.shape, model.abstract_params())
    seen = []
    spy = optax.GradientTransformation(
        transformation.init,
        lambda gradient, *rest: seen.append(gradient) or transformation.update(gradient, *rest),
    )
    run = step.make_step(model.module(), spy, losses=classification_losses)
    new, _ = jax.eval_shape(run, state, random_batch())
    assert jax.tree.structure(seen[0]) == jax.tree.structure(state.trainable)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    moments = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sorted(moments) == sorted(2 * [leaf.shape for leaf in jax.tree.leaves(state.trainable)])


def test_a_step_moves_head_and_values_and_nothing_else():
    model, transformation, make_state = setup(learning_rate=0.003)
    before = make_state()  # another one: steps donate theirs
    run = make_step(model, transformation)
    state, losses = make_state(), []
    for _ in range(5):
        state, metrics = run(state, random_batch())
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] and float(metrics.labels) == 4
    for leaf, old in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(before.trainable), strict=True):
        assert np.abs(leaf - old).max() > 1e-3
    kept = bypass.unmerge(state.params, state.columns, state.base_entries)
    originals = bypass.unmerge(before.params, before.columns, before.base_entries)
    jax.tree.map(np.testing.assert_array_equal, kept, originals)


def apply(model, state, batch):
    mask = jnp.arange(batch.input_ids.shape[1])[None] < batch.lengths[:, None]
    return model.module().apply({"params": state.tuned}, jnp.asarray(batch.input_ids), mask, jnp.asarray(batch.token_types))


def test_the_loss_is_the_mean_over_examples():
    model, transformation, make_state = setup("bert")
    state, batch = make_state(), random_batch()
    batch = batch._replace(label_mask=np.array([1, 1, 1, 0], np.float32), lengths=np.array([12, 5, 3, 0], np.int32))
    want = -jax.nn.log_softmax(apply(model, state, batch))[np.arange(3), batch.labels[:3]].mean()
    _, metrics = make_step(model, transformation)(state, batch)
    assert float(metrics.loss) == pytest.approx(float(want), rel=1e-5)
    assert float(metrics.labels) == 3


def test_regression_takes_the_mean_squared_error():
    model, transformation, make_state = setup(labels=("score",))
    state, batch = make_state(), random_batch(classes=None)
    want = np.mean((np.asarray(apply(model, state, batch))[:, 0] - batch.labels) ** 2)
    _, metrics = make_step(model, transformation)(state, batch)
    assert float(metrics.loss) == pytest.approx(float(want), rel=1e-5)


def test_accumulation_equals_one_batch():
    batch = random_batch()
    batch.label_mask[3] = 0  # parts with different numbers of examples
    results = []
    for parts in (1, 2):
        model, transformation, make_state = setup()
        results.append(make_step(model, transformation, parts)(make_state(), batch))
    (whole, metrics), (split, split_metrics) = results
    np.testing.assert_allclose(metrics, split_metrics, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), whole.trainable, split.trainable)


def test_dropout_follows_from_seed_and_step_and_survives_a_resume(tmp_path):
    model, transformation, make_state = setup(dropout=0.3)
    run = make_step(model, transformation, dropout_seed=5)
    batch, state, losses = random_batch(), make_state(), []
    for number in range(3):
        if number == 2:
            with checkpoint.Checkpoints(tmp_path) as checkpoints:
                checkpoints.save(state)
        state, metrics = run(state, batch)
        losses.append(float(metrics.loss))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        resumed = checkpoints.restore(make_state())
    resumed, metrics = run(resumed, batch)
    assert float(metrics.loss) == losses[-1]
    jax.tree.map(np.testing.assert_array_equal, resumed.trainable, state.trainable)
    jax.tree.map(np.testing.assert_array_equal, resumed.tuned, state.tuned)

    def first(seed, parts=1):
        return float(make_step(model, transformation, parts, seed)(make_state(), batch)[1].loss)

    assert len({losses[0], first(6), first(5, parts=2)}) == 3
    _, metrics = run(make_state()._replace(step=jnp.int32(1)), batch)
    assert float(metrics.loss) != losses[0]


def test_rates_and_decay_of_the_head_are_its_own():
    batch, trained = random_batch(), {}
    sections = {
        "same": ClassifierSection(),
        "slow": ClassifierSection(learning_rate=0.002),
        "decay": ClassifierSection(weight_decay=0.5),
    }
    for name, section in sections.items():
        model, transformation, make_state = setup(classifier=section, clip_norm=None)
        before = jax.tree.map(np.array, make_state().trainable)
        state, _ = make_step(model, transformation)(make_state(), batch)
        trained[name] = jax.tree.map(lambda new, old: np.asarray(new) - old, state.trainable, before)
    for other in ("slow", "decay"):  # two programs, which XLA may round differently
        same = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8)
        jax.tree.map(same, trained["same"]["bypass"], trained[other]["bypass"])
    same, slow, decay = (trained[name]["classifier"]["classifier"]["dense"] for name in ("same", "slow", "decay"))
    np.testing.assert_allclose(slow["kernel"], 0.1 * same["kernel"], rtol=1e-3, atol=1e-6)
    kernel = before["classifier"]["classifier"]["dense"]["kernel"]
    np.testing.assert_allclose(decay["kernel"], same["kernel"] - 0.02 * 0.5 * kernel, rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(decay["bias"], same["bias"])


def test_a_bfloat16_base_trains_a_float32_head():
    model, transformation, make_state = setup(dtype=jnp.bfloat16, dropout=0.1)
    run = make_step(model, transformation, dropout_seed=0)
    state = make_state()
    with jax.numpy_dtype_promotion("standard"):  # JAX transposes its own attention in mixed precision
        for _ in range(3):
            state, metrics = run(state, random_batch())
    assert np.isfinite(float(metrics.loss)) and int(state.failed_step) == -1
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.tuned))} == {jnp.dtype(jnp.bfloat16)}


def test_split_and_join_are_inverse():
    params = {"a": {"b": {"kernel": jnp.ones(2)}, "c": {"bias": jnp.zeros(3)}}, "d": {"kernel": jnp.ones(4)}}
    rest, classifier = dense_modules.split(params, [("a", "b"), ("d",)])
    assert rest == {"a": {"c": params["a"]["c"]}} and set(classifier) == {"a", "d"}
    jax.tree.map(np.testing.assert_array_equal, dense_modules.join(rest, classifier), params)
    assert set(dense_modules.to_names(classifier)) == {"a.b.weight", "d.weight"}
    assert dense_modules.join(params, {}) == params == dense_modules.split(params, [])[0]


# Parity with the official PyTorch code (tests/golden/README.md).

FACTS = json.loads((GOLDEN / "meta_roberta.json").read_text())


def golden_batches(rows=None):
    data = load_golden("data_cls.npz")
    flat = {name: array.reshape(-1, *array.shape[2:]) for name, array in data.items()}
    for chosen in rows or np.arange(20).reshape(5, 4):
        yield ClassificationBatch(
            input_ids=flat["input_ids"][chosen],
            lengths=flat["attention_mask"][chosen].sum(axis=1).astype(np.int32),
            token_types=np.zeros((4, 16), np.int32),
            labels=flat["labels"][chosen],
            label_mask=np.ones(4, np.float32),
        )


def run_official(case, section, rows=None):
    """(model, original parameters, built columns, losses, gradient norms, last state) of a golden case."""
    facts = FACTS[case]
    loaded = load_model(str(GOLDEN / "roberta_cls"))
    original = jax.tree.map(np.array, loaded.params)
    paths = models.match_targets(loaded.params, list(ENCODER_TARGETS), loaded.model.layers_path)
    built = bypass.build(loaded.params, paths, facts["k"])
    transformation = optimizer.build(section, 5)
    state = step.initial_state(loaded.params, built, transformation, HEAD)
    run = make_step(loaded.model, transformation, dropout_seed=0)
    losses, norms = [], []
    for batch in golden_batches(rows):
        state, metrics = run(state, batch)
        losses.append(float(metrics.loss))
        norms.append(float(metrics.gradient_norm))
    return loaded.model, original, losses, norms, jax.tree.map(np.asarray, state)


def check_trained(model, state, golden, prefix):
    expected = {key.removeprefix(prefix) for key in golden if key.startswith(prefix)}
    values = {
        f"{name}.weight_new": leaf.reshape(-1) for name, leaf in names.unstacked(state.bypass.values, model.layers_path)
    }
    found = values | dense_modules.to_names(state.classifier)
    assert set(found) == expected
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, golden[prefix + name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_parity_with_the_official_code(k):
    case = f"roberta_cls_k{k}_adamw_const"
    golden, facts = load_golden(f"{case}.npz"), FACTS[case]
    section = OptimizerSection(learning_rate=facts["lr"], schedule="constant", clip_norm=None)
    model, original, losses, norms, state = run_official(case, section)
    assert bypass.count(state.trainable) == facts["n_trainable"]
    np.testing.assert_allclose(losses, facts["losses_train"], rtol=1e-5)
    np.testing.assert_allclose(norms, facts["grad_norm"], rtol=1e-4)
    check_trained(model, state, golden, "param_step5/")

    merged, kept = (dict(named_kernels(tree, model.layers_path)) for tree in (state.tuned, original))
    for name, columns in names.unstacked(state.columns, model.layers_path):
        rows, cols = golden[f"positions/{name}.weight"].T
        np.testing.assert_array_equal(columns.reshape(-1), cols)
        np.testing.assert_array_equal(np.arange(len(columns)).repeat(k), rows)
        changed = merged[name].copy()
        np.testing.assert_allclose(changed[rows, cols], golden[f"merged_values/{name}.weight"], rtol=1e-6, atol=1e-6)
        changed[rows, cols] = kept[name][rows, cols]
        np.testing.assert_array_equal(changed, kept[name])

    first = next(golden_batches())
    mask = jnp.arange(16)[None] < first.lengths[:, None]
    for params, want in ((original, golden["logits0_before"]), (state.tuned, golden["logits0_merged"])):
        logits = model.module().apply({"params": params}, jnp.asarray(first.input_ids), mask)
        np.testing.assert_allclose(logits[:1, : want.shape[1]], want, rtol=1e-4, atol=1e-5)
    after = [
        float(jnp.mean(classification_losses(model.module(), {"params": state.tuned}, batch))) for batch in golden_batches()
    ]
    np.testing.assert_allclose(after, facts["losses_after_5"], rtol=1e-5)


def named_kernels(params, layers_path):
    for path, kernel in trees.kernels(params):
        if names.is_stacked(path, layers_path):
            yield from zip(names.module_names(path, kernel, layers_path), np.asarray(kernel), strict=True)


def test_parity_with_the_official_trainer():
    case = "roberta_cls_k1_trainer_perCell_mag_add_warm0.2_wd0.0"
    facts = FACTS[case]
    section = OptimizerSection(
        learning_rate=facts["lr"],
        schedule=facts["schedule"],
        warmup_ratio=facts["warmup_ratio"],
        weight_decay=facts["weight_decay"],
        clip_norm=facts["max_grad_norm"],
    )
    rates = optimizer.schedule(section, 5)
    np.testing.assert_allclose([float(rates(number)) for number in range(5)], facts["lr_used"], rtol=1e-6)
    model, _, losses, norms, state = run_official(case, section, facts["batch_rows"])
    np.testing.assert_allclose(losses, facts["losses"], rtol=1e-5)
    np.testing.assert_allclose(norms, facts["grad_norm_before_clip"], rtol=1e-4)
    check_trained(model, state, load_golden(f"{case}.npz"), "param_final/")


@pytest.mark.parametrize("remat", [Remat.FULL])
def test_remat_policies_agree(remat):
    model, transformation, make_state = setup(dropout=0.2)
    results = []
    for policy in (Remat.NONE, remat):
        run = step.make_step(model.module(policy), transformation, 1, classification_losses, 3)
        state, batch = make_state(), random_batch()
        for _ in range(3):
            state, metrics = run(state, batch)
        results.append((float(metrics.loss), state.trainable))
    (loss, tree), (other, other_tree) = results
    assert other == pytest.approx(loss, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), tree, other_tree)
