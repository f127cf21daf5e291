"""Checkpoints that read images, too: their text part is a decoder by itself, under both spellings of its names."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from quantised_files import SECTIONS, stored
from quick import jit

from neuroada_jax.adapters import exchange, native, on_base
from neuroada_jax.core import quantised
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained import save
from neuroada_jax.pretrained.load import load_model, load_with_progress, open_model

TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 12,
    "sliding_window": 5,
    "sliding_window_pattern": 2,
    "max_position_embeddings": 64,
    "rope_scaling": {"rope_type": "linear", "factor": 3.0},
}  # without the number of heads, which the hub's configs leave to the class
VISION = {
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}


def saved(directory, spelling, text=TEXT):
    """A random Gemma 3 with its tower, under the names of transformers since 4.52, or of the hub's files before."""
    config = transformers.Gemma3Config(text_config=dict(text), vision_config=dict(VISION), mm_tokens_per_image=1)
    reference = transformers.Gemma3ForConditionalGeneration._from_config(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items() if name != "lm_head.weight"}
    if spelling == "hub":
        names = {name: name.replace("model.language_model.", "language_model.model.") for name in tensors}
        tensors = {names[name].removeprefix("model."): tensor for name, tensor in tensors.items()}
    directory.mkdir()
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    content = {**config.to_dict(), "text_config": {**text, "model_type": "gemma3_text"}, "eos_token_id": [1, 3]}
    (directory / "config.json").write_text(json.dumps(content))
    return reference


@pytest.mark.parametrize("spelling", ["transformers", "hub"])
def test_the_text_part_is_read_and_saved_by_itself(spelling, tmp_path, capsys):
    reference = saved(tmp_path / "both", spelling)
    opened = open_model(str(tmp_path / "both"))
    loaded = load_with_progress(opened)
    said = capsys.readouterr().err
    assert "the text part alone is used and saved, without the" in said and "does not use" not in said
    assert loaded.model.hf_config["model_type"] == "gemma3_text" and loaded.model.hf_config["eos_token_id"] == [1, 3]
    ids = np.random.default_rng(0).integers(4, 97, (1, 24)).astype(np.int32)
    module = loaded.model.module()

    @jit
    def logits(params):
        return module.apply({"params": params}, module.apply({"params": params}, jnp.asarray(ids))[0], method="unembed")

    with torch.no_grad():
        want = reference(torch.from_numpy(ids).long()).logits.numpy()
    assert np.std(want) > 0.3
    np.testing.assert_allclose(logits(loaded.params), want, rtol=0, atol=1e-4)
    save.save(tmp_path / "text", opened, loaded.params, None)
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32)
    assert type(text).__name__ == "Gemma3ForCausalLM"
    with torch.no_grad():
        np.testing.assert_allclose(text(torch.from_numpy(ids).long()).logits.numpy(), want, rtol=0, atol=1e-4)
    assert load_model(str(tmp_path / "text")).digests == loaded.digests
    module, k = "model.layers.0.self_attn.q_proj", 1
    columns, values = np.zeros((32, k), np.int32), np.ones((32, k), np.float32)
    adapter = on_base.assemble(loaded, {module: values}, {module: columns}, native.Selection(k, ["self_attn.q_proj"]), {})
    native.write(tmp_path / "adapter", adapter)
    with pytest.raises(UserError, match=r"--to peft-shira: PEFT would load .* with what reads images; use huggingface"):
        exchange.export_adapter(str(tmp_path / "adapter"), "peft-shira", str(tmp_path / "peft"))
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("spelling", ["transformers", "hub"])
@pytest.mark.parametrize("form", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_quantised_kernels_of_the_text_part_are_read_and_those_of_the_tower_are_not(form, spelling, tmp_path):
    saved(tmp_path / "both", spelling, {**TEXT, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16})
    tensors = safetensors.numpy.load_file(tmp_path / "both" / "model.safetensors")
    kernels = [name for name in tensors if "language_model" in name and name.endswith("_proj.weight")]
    of_tower = [name for name in tensors if "vision_tower" in name and name.endswith("fc2.weight")]
    assert len(kernels) == 7 * 3 and len(of_tower) == 2
    for name in kernels + (of_tower if form == "int8" else []):
        tensors |= stored(name, tensors.pop(name), form)
    safetensors.numpy.save_file(tensors, tmp_path / "both" / "model.safetensors")
    file = tmp_path / "both" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": SECTIONS[form]}))
    opened = open_model(str(tmp_path / "both"))
    assert opened.model.quantization == f"stored:{form}" and "quantization_config" not in opened.model.hf_config
    held = opened.load().params
    assert quantised.holds(held)
    plain = open_model(str(tmp_path / "both"), quantization_of="none").load().params
    jax.tree.map(np.testing.assert_array_equal, quantised.map_quantised(quantised.dequantise, held), plain)


def test_what_is_no_text_part_is_refused_by_name(tmp_path):
    saved(tmp_path / "both", "hub")
    file = tmp_path / "both" / "config.json"
    content = json.loads(file.read_text())
    for edit, message in (
        ({"text_config": None}, "text_config must be an object of model_type 'gemma3_text', found None"),
        ({"text_config": {"model_type": "llama"}}, "text_config must be an object of model_type 'gemma3_text'"),
        ({"quantization_config": {"quant_method": "other"}}, "quantization_config: checkpoints of 'other' are not read"),
        ({"model_type": "llava"}, "model_type 'llava' is not supported"),
    ):
        file.write_text(json.dumps({**content, **edit}))
        with pytest.raises(UserError, match=message):
            open_model(str(tmp_path / "both"))
