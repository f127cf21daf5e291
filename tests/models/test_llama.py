"""The LLaMA family against transformers' PyTorch models, and the forms, remat policies and caches against one another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from quick import jit
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from neuroada_jax import models
from neuroada_jax.core import bypass, trees
from neuroada_jax.errors import UserError
from neuroada_jax.models import Remat, attention
from neuroada_jax.models.decoder import empty_cache
from neuroada_jax.pretrained import gguf_config, gguf_file
from neuroada_jax.pretrained.load import load_model, load_params

logging.disable_progress_bar()
logging.set_verbosity_error()

TOKENS = 24
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TORCH = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def rope(rope_type, **fields):
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **fields}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
QWEN_WINDOWS = {"use_sliding_window": True, "sliding_window": 5}

# name -> (model_type, what differs from SIZES)
CASES = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_multi_head": ("llama", {"num_key_value_heads": 4}),
    "llama_multi_query": ("llama", {"num_key_value_heads": 1}),
    "llama_head_dim": ("llama", {"head_dim": 12}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_gelu_theta_epsilon": ("llama", {"hidden_act": "gelu", "rms_norm_eps": 0.1, **rope("default", rope_theta=77.0)}),
    "rope_linear": ("llama", rope("linear", factor=3.0)),
    "rope_dynamic_short": ("llama", rope("dynamic", factor=2.0)),
    "rope_dynamic_long": ("llama", {"max_position_embeddings": 10, **rope("dynamic", factor=2.0)}),
    "rope_llama3": ("llama", rope("llama3", **LLAMA3)),
    "rope_yarn": ("llama", rope("yarn", **YARN)),
    "rope_yarn_mscale": ("llama", rope("yarn", mscale=0.7, mscale_all_dim=1.3, beta_fast=6.0, beta_slow=0.5, **YARN)),
    "rope_yarn_attention_factor": ("llama", rope("yarn", attention_factor=1.4, truncate=False, **YARN)),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2_windows_in_the_upper_layers": ("qwen2", {"max_window_layers": 1, **QWEN_WINDOWS}),
    "qwen2_windows_everywhere": ("qwen2", {"max_window_layers": 0, **QWEN_WINDOWS}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_bias_windows": ("qwen3", {"head_dim": 16, "attention_bias": True, "max_window_layers": 2, **QWEN_WINDOWS}),
}


class TorchTensors:
    """A PyTorch model's parameters as a TensorSource."""

    def __init__(self, model):
        self.tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return self.tensors[name].shape

    def read(self, name, raw=None):
        return self.tensors[name]

    def raw(self, name):
        return np.ascontiguousarray(self.tensors[name]).view(np.uint8).data


def torch_model(kind, fields, seed=0):
    """A random model whose logits are of order 1 and whose attention is peaked."""
    config_class, model_class = TORCH[kind]
    model = model_class(config_class(**fields)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
            if "norm" in name:
                parameter.add_(1.0)
    return model


def random_ids(shape, vocabulary=SIZES["vocab_size"], seed=0):
    return np.random.default_rng(seed).integers(0, vocabulary, size=shape).astype(np.int32)


def jax_logits(model, params, ids, jit=jit):
    module = model.module()

    @jit
    def forward(params, ids):
        hidden, _ = module.apply({"params": params}, ids)
        return module.apply({"params": params}, hidden, method="unembed")

    return np.asarray(forward(params, jnp.asarray(ids)))


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids).long()).logits.numpy()


def assert_same_logits(kind, fields, hf_config=None):
    reference = torch_model(kind, fields)
    model = models.from_hf_config(hf_config or reference.config.to_dict())
    params, _ = load_params(model, TorchTensors(reference))
    ids = random_ids((2, TOKENS))
    want = torch_logits(reference, ids)
    assert np.std(want) > 0.5  # else 1e-4 would say little
    np.testing.assert_allclose(jax_logits(model, params, ids), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name):
    kind, fields = CASES[name]
    assert_same_logits(kind, {**SIZES, **fields})


@pytest.mark.parametrize(
    "scaling",
    [None, {"type": "linear", "factor": 3.0}, {"rope_type": "llama3", **LLAMA3}],
    ids=["none", "linear", "llama3"],
)
def test_logits_from_an_old_style_config(scaling):
    fields = {**SIZES, "rope_theta": 500.0, "rope_scaling": scaling}
    assert_same_logits("llama", fields, {"model_type": "llama", "rms_norm_eps": 1e-6, **fields})


@pytest.mark.parametrize("name", ["mistral_window", "qwen2_windows_in_the_upper_layers"])
def test_a_window_matters_in_these_tests(name):
    kind, fields = CASES[name]
    reference = torch_model(kind, {**SIZES, **fields})
    params, _ = load_params(models.from_hf_config(reference.config.to_dict()), TorchTensors(reference))
    without = models.from_hf_config({**reference.config.to_dict(), "sliding_window": None, "layer_types": None})
    ids = random_ids((1, TOKENS))
    got, want = jax_logits(without, params, ids), torch_logits(reference, ids)
    np.testing.assert_allclose(got[:, :5], want[:, :5], rtol=0, atol=1e-4)
    assert np.abs(got - want)[:, 5:].max() > 0.1


def test_defaults_of_fields_that_a_config_leaves_out():
    mistral = models.from_hf_config({"model_type": "mistral", **SIZES}).config
    assert mistral.windows == (MistralConfig().sliding_window,) * 3
    assert models.from_hf_config({"model_type": "mistral", **SIZES, "sliding_window": None}).config.windows == (None,) * 3
    assert models.from_hf_config({"model_type": "qwen3", **SIZES}).config.head_dim == Qwen3Config().head_dim
    llama = models.from_hf_config({"model_type": "llama", **SIZES, "num_key_value_heads": None}).config
    assert (llama.num_kv_heads, llama.head_dim, llama.tied) == (4, 8, False)
    assert llama.norm_epsilon == LlamaConfig().rms_norm_eps


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", None, "hidden_size must be a positive integer, found None"),
        ("num_hidden_layers", "three", "num_hidden_layers must be a positive integer, found 'three'"),
        ("hidden_act", "tanh2", "hidden_act 'tanh2' is not supported"),
    ],
)
def test_a_config_that_cannot_be_read_names_the_field(field, value, message):
    with pytest.raises(UserError, match=message):
        models.from_hf_config({"model_type": "llama", **SIZES, field: value})


# From here on one small model per behaviour; float64 where two ways to compute the same thing are compared.


def random_model(kind="llama", dtype=jnp.float32, seed=0, **fields):
    """(model, params) with random weights, without PyTorch."""
    model = models.from_hf_config({"model_type": kind, **SIZES, **fields}, dtype)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray((centre + 0.3 * rng.normal(size=leaf.shape)).astype(leaf.dtype))

    return model, jax.tree_util.tree_map_with_path(draw, model.abstract_params())


def random_bypass(model, params, k, targets=("q_proj", "down_proj", "lm_head"), dtype=jnp.float32):
    built = bypass.build(params, models.match_targets(params, list(targets), model.layers_path), k, dtype=dtype)
    rng = np.random.default_rng(9)
    values = jax.tree.map(lambda v: jnp.asarray((0.2 * rng.normal(size=v.shape)).astype(v.dtype)), built.values)
    return built._replace(values=values)


def loss_of(module, ids, variables):
    hidden, _ = module.apply(variables, ids)
    logits = module.apply(variables, hidden, method="unembed").astype(jnp.float32)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)
    return -jnp.mean(picked)


def value_and_grad(model, params, built, ids, remat=Remat.NONE, form="bypass"):
    """Loss and the gradient of the values: on the fly, or in the form "resident"."""
    module = model.module(remat)

    @jit
    def run(params, values):
        variables = lambda values: {"params": params, form: values, "columns": built.columns}  # noqa: E731
        return jax.value_and_grad(lambda values: loss_of(module, ids, variables(values)))(values)

    return run(params, built.values)


def assert_close(a, b, rtol, atol):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


make_resident = jit(bypass.make_resident)


def test_gradient_through_the_scan_equals_the_gradient_of_merging():
    with jax.enable_x64(True):
        model, params = random_model(dtype=jnp.float64)
        built = random_bypass(model, params, 2, ["q_proj", "v_proj", "o_proj", "down_proj", "lm_head"], jnp.float64)
        ids = jnp.asarray(random_ids((2, 9)))
        module = model.module()

        @jit
        def dense(params, values):
            merged = lambda values: bypass.merge(params, built._replace(values=values))  # noqa: E731
            return jax.value_and_grad(lambda values: loss_of(module, ids, {"params": merged(values)}))(values)

        want = dense(params, built.values)
        assert_close(value_and_grad(model, params, built, ids), want, 1e-6, 1e-7)  # the loss itself is float32
        resident = make_resident(params, built, bypass.read(params, built.columns))
        assert_close(value_and_grad(model, resident, built, ids, form="resident"), want, 1e-6, 1e-7)


def test_resident_equals_on_the_fly_with_a_bfloat16_base():
    # JAX's own attention mixes bfloat16 and float32 in its backward pass, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        model, params = random_model(dtype=jnp.bfloat16)
        built = random_bypass(model, params, 2, ["q_proj", "down_proj"])
        ids = jnp.asarray(random_ids((2, 9)))
        want = value_and_grad(model, params, built, ids)
        resident = make_resident(params, built, bypass.read(params, built.columns))
        got = value_and_grad(model, resident, built, ids, form="resident")
    assert {leaf.dtype for leaf in jax.tree.leaves(got[1])} == {jnp.dtype(jnp.float32)}
    assert_close(got, want, 1e-5, 1e-5)


def test_remat_changes_neither_loss_nor_gradient():
    model, params = random_model()
    built = random_bypass(model, params, 2)
    resident = make_resident(params, built, bypass.read(params, built.columns))
    ids = jnp.asarray(random_ids((2, 9)))
    want = value_and_grad(model, resident, built, ids, Remat.NONE, "resident")
    assert_close(value_and_grad(model, resident, built, ids, Remat.NAMES, "resident"), want, 1e-5, 1e-6)
    assert_close(value_and_grad(model, resident, built, ids, Remat.FULL, "resident"), want, 1e-5, 1e-6)
    assert_close(value_and_grad(model, params, built, ids, Remat.FULL), want, 1e-4, 1e-5)  # on the fly


def test_remat_keeps_less():
    model, params = random_model(num_hidden_layers=6)
    built = random_bypass(model, params, 1)
    ids = jnp.asarray(random_ids((2, 16)))

    def kept(remat):
        module = model.module(remat)
        apply = lambda values: loss_of(module, ids, {"params": params, "bypass": values, "columns": built.columns})  # noqa: E731
        _, vjp = jax.eval_shape(lambda values: jax.vjp(apply, values), built.values)
        return sum(leaf.size for leaf in jax.tree.leaves(vjp))

    sizes = [kept(remat) for remat in (Remat.FULL, Remat.NAMES, Remat.NONE)]
    assert sizes == sorted(set(sizes))


def test_no_merged_weights_are_kept_for_the_backward_pass():
    model, params = random_model(num_hidden_layers=5, intermediate_size=44)
    built = random_bypass(model, params, 2)
    ids = jnp.asarray(random_ids((2, 9)))
    variables = lambda values: {"params": params, "bypass": values, "columns": built.columns}  # noqa: E731
    apply = lambda values: loss_of(model.module(), ids, variables(values))  # noqa: E731
    _, vjp = jax.eval_shape(lambda values: jax.vjp(apply, values), built.values)
    stacked = lambda shapes: sorted(shape for shape in shapes if len(shape) == 3 and shape[0] == 5)  # noqa: E731
    kept = stacked(leaf.shape for leaf in jax.tree.leaves(vjp))
    weight = stacked(leaf.shape for path, leaf in trees.kernels(params))
    for shape in set(weight):
        assert kept.count(shape) <= weight.count(shape), shape


def decode(model, params, ids, chunks, slots, **kwargs):
    """Hidden states from the cache, `chunks` tokens at a time."""
    module = model.module()
    step = jit(lambda params, ids, cache: module.apply({"params": params}, ids, cache=cache, **kwargs))
    cache, outputs, start = empty_cache(model.config, ids.shape[0], slots), [], 0
    for size in chunks:
        hidden, cache = step(params, ids[:, start : start + size], cache)
        outputs.append(hidden)
        start += size
    assert cache.slot == start
    return jnp.concatenate(outputs, axis=1)


CACHED = ["llama", "mistral_window", "qwen2_windows_in_the_upper_layers"]


@pytest.mark.parametrize("name", CACHED)
def test_decoding_from_the_cache_equals_the_full_forward(name):
    kind, fields = CASES[name]
    model, params = random_model(kind, **fields)
    ids = jnp.asarray(random_ids((2, 12)))
    full, _ = jit(lambda params: model.module().apply({"params": params}, ids))(params)
    np.testing.assert_allclose(decode(model, params, ids, [6] + [1] * 6, slots=15), full, rtol=0, atol=1e-5)
    if name == "llama":
        np.testing.assert_allclose(decode(model, params, ids, [1] * 12, slots=12), full, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CACHED)
def test_left_padding_changes_nothing(name):
    """Prefill of a left-padded batch, then decoding, with the masks and positions that generation passes."""
    kind, fields = CASES[name]
    model, params = random_model(kind, **fields)
    module = model.module()
    ids, pads, prompt, slots = random_ids((2, 12)), np.array([0, 4]), 9, 14
    padded = np.stack([np.concatenate([np.full(p, 3, np.int32), row])[:12] for p, row in zip(pads, ids, strict=True)])
    positions = jnp.asarray(np.maximum(np.arange(12)[None] - pads[:, None], 0), jnp.int32)
    real = np.arange(slots)[None, :] >= pads[:, None]
    causal = np.arange(slots)[None, :] <= np.arange(12)[:, None]
    mask = jnp.asarray(real[:, None, :] & causal[None])

    step = jit(lambda params, ids, positions, mask, cache: module.apply({"params": params}, ids, positions, mask, cache))
    cache, outputs = empty_cache(model.config, 2, slots), []
    for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, 12))]:
        hidden, cache = step(
            params, jnp.asarray(padded[:, start:stop]), positions[:, start:stop], mask[:, start:stop], cache
        )
        outputs.append(hidden)
    got = np.asarray(jnp.concatenate(outputs, axis=1))
    full, _ = jit(lambda params: module.apply({"params": params}, jnp.asarray(ids)))(params)
    for row, pad in enumerate(pads):
        np.testing.assert_allclose(got[row, pad:], full[row, : 12 - pad], rtol=0, atol=1e-5)
    assert np.isfinite(got).all()  # rows that see nothing do not become NaN
    if name != "mistral_window":
        return
    # The same without a cache, where S = T.
    uncached, _ = jit(lambda params: module.apply({"params": params}, jnp.asarray(padded), positions, mask[:, :, :12]))(
        params
    )
    for row, pad in enumerate(pads):
        np.testing.assert_allclose(uncached[row, pad:], full[row, : 12 - pad], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral_window", "qwen2_windows_in_the_upper_layers"])
def test_packed_segments_do_not_see_one_another(name):
    kind, fields = CASES[name]
    model, params = random_model(kind, **fields)
    ids, split, end = random_ids((1, 17)), 8, 15  # two examples, then two slots of filling
    slots = np.arange(17)
    positions = np.where(slots < split, slots, np.where(slots < end, slots - split, 0)).astype(np.int32)
    segment = np.concatenate([[0] * split, [1] * (end - split), [2, 3]])
    mask = attention.packed_mask(jnp.asarray(positions)[None])
    np.testing.assert_array_equal(mask[0], (segment[:, None] == segment[None]) & np.tri(17, dtype=bool))
    apply = jit(lambda params, *args: model.module().apply({"params": params}, *args)[0])
    packed = apply(params, jnp.asarray(ids), jnp.asarray(positions)[None], mask)
    for own in (slice(0, split), slice(split, end)):
        np.testing.assert_allclose(packed[:, own], apply(params, jnp.asarray(ids[:, own])), rtol=0, atol=1e-5)
    assert np.isfinite(packed).all()


def test_bfloat16_activations_stay_bfloat16_and_near_float32():
    model, params = random_model()
    half = models.from_hf_config(model.hf_config, jnp.bfloat16)
    ids = jnp.asarray(random_ids((2, 9)))
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    back = jax.tree.map(lambda p: p.astype(jnp.float32), rounded)
    want = jit(lambda params: model.module().apply({"params": params}, ids)[0])(back)
    got = jit(lambda params: half.module().apply({"params": params}, ids)[0])(rounded)
    assert got.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(got, np.float32) - np.asarray(want)) / np.linalg.norm(want)
    assert error < 0.05


def test_smollm2_logits_equal_transformers(smollm2_gguf):
    """Real weights. That our GGUF reader gives what transformers' own gives, bit for bit, is in test_gguf_weights."""
    path = str(smollm2_gguf)
    loaded, tensors = load_model(path), gguf_file.GGUFTensors(path)
    with torch.device("meta"):
        reference = LlamaForCausalLM(LlamaConfig(**gguf_config.read_config(path))).eval()
    state = {name: torch.tensor(tensors.read(name)) for name in tensors.names()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # tied
    reference.load_state_dict(state, assign=True)
    reference.model.rotary_emb = type(reference.model.rotary_emb)(reference.config)  # its buffer is computed, not loaded
    ids = random_ids((1, 20), vocabulary=loaded.model.config.vocab_size)
    got, want = jax_logits(loaded.model, loaded.params, ids, jax.jit), torch_logits(reference, ids)
    # The logits reach 32 and PyTorch's own float32 ones are up to 1e-4 away from its float64 ones.
    assert np.abs(got - want).max() < 2e-4
    assert np.sqrt(np.mean((got - want) ** 2)) < 5e-5
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))
