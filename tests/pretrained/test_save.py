"""Merged models as transformers sees them: loading, logits, generations, shards, dtypes, tokenizer."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from data_helpers import CHAT, CHATML, message_of
from helpers import CONFIG, load_in_transformers, write_model
from transformers import AutoTokenizer

from neuroada_jax import models
from neuroada_jax.core import bypass
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.data.prompts import PromptForm, PromptStyle
from neuroada_jax.generation import texts
from neuroada_jax.generation.generate import Ending, generate
from neuroada_jax.pretrained import prompt_form, save
from neuroada_jax.pretrained.load import load_model

PROMPTS = ["the", "after a,", "Please choose the correct answer", "option1\n", "a  b   c d"]


def merged(base_model, seed=0):
    """The base with a random bypass merged into it."""
    built = bypass.build(
        base_model.params, models.match_targets(base_model.params, ["q_proj", "down_proj"], base_model.model.layers_path), 3
    )
    rng = np.random.default_rng(seed)
    values = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape, np.float32)), built.values)
    return bypass.merge(base_model.params, Bypass(values, built.columns))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(name -> (base, params, directory)) for a tied, an untied and a bfloat16 model."""
    folder = tmp_path_factory.mktemp("models")
    cases = {
        "tied": {},
        "untied": {"tie_word_embeddings": False},
        "bfloat16": {"dtype": "bfloat16"},
    }
    made = {}
    for name, fields in cases.items():
        base_model = load_model(str(write_model(folder / name, **fields)), "auto")
        params = merged(base_model)
        save.save(folder / f"{name}-merged", base_model, params, CHAT)
        made[name] = (base_model, params, folder / f"{name}-merged")
    return made


def jax_logits(base_model, params, ids):
    module = base_model.model.module()

    @jax.jit
    def forward(params):
        hidden, _ = module.apply({"params": params}, jnp.asarray(ids))
        return module.apply({"params": params}, hidden, method="unembed").astype(jnp.float32)

    return np.asarray(forward(params))


@pytest.mark.parametrize("name", ["tied", "untied", "bfloat16"])
def test_loads_in_transformers_with_the_same_logits_and_generations(name, saved, caplog, capfd):
    base_model, params, directory = saved[name]
    model = load_in_transformers(directory, caplog, capfd)
    assert model.dtype == (torch.bfloat16 if name == "bfloat16" else torch.float32)
    stored = safetensors.numpy.load_file(str(directory / "model.safetensors"))
    assert ("lm_head.weight" in stored) == (name == "untied")
    changed = np.asarray(params["model"]["layers"]["self_attn"]["q_proj"]["kernel"][1])
    assert stored["model.layers.1.self_attn.q_proj.weight"].tobytes() == changed.tobytes()

    ids = np.random.default_rng(1).integers(0, CONFIG["vocab_size"], (2, 20)).astype(np.int32)
    if name == "bfloat16":  # both in float32 from the same rounded weights, else rounding hides everything
        model, base_model, params = model.float(), load_model(str(directory), "float32"), None
        params = base_model.params
    with torch.no_grad():
        want = model(torch.from_numpy(ids).long()).logits.numpy()
    np.testing.assert_allclose(jax_logits(base_model, params, ids), want, rtol=0, atol=1e-4)

    if name == "bfloat16":
        return
    tokenizer = AutoTokenizer.from_pretrained(directory)
    coded = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    got = generate(base_model.model, params, coded, Ending(), max_new_tokens=10)
    for prompt, each in zip(coded, got, strict=True):
        inputs = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0}
        out = model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
        assert out[0, len(prompt) :].tolist() == each.ids


def test_it_loads_here_again(saved):
    for name in ("tied", "bfloat16"):
        _, params, directory = saved[name]
        again = load_model(str(directory), "auto").params
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), again, params)


def test_files_and_config(saved):
    base_model, _, directory = saved["bfloat16"]
    config = json.loads((directory / "config.json").read_text())
    assert config == {**base_model.model.hf_config, "dtype": "bfloat16"}
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation == {"bos_token_id": CHAT.bos_token_id, "eos_token_id": CHAT.eos_token_id}
    assert not (directory / "model.safetensors.index.json").exists()
    with safetensors.safe_open(str(directory / "model.safetensors"), "numpy") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_the_tokenizer_comes_along(saved):
    again = AutoTokenizer.from_pretrained(saved["tied"][2])
    for text in (*PROMPTS, "<|im_start|>user\nhi<|im_end|>\n", "  ünï 日本"):
        assert again(text)["input_ids"] == CHAT(text)["input_ids"]
        assert again.decode(again(text)["input_ids"]) == CHAT.decode(CHAT(text)["input_ids"])
    assert (again.eos_token, again.bos_token, len(again)) == (CHAT.eos_token, CHAT.bos_token, len(CHAT))
    chat = [{"role": "user", "content": "hi"}]
    rendered = again.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == CHAT.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("name", ["untied", "bfloat16"])
def test_shards(name, saved, tmp_path, monkeypatch, caplog, capfd):
    base_model, params, unsharded = saved[name]
    monkeypatch.setattr(save, "SHARD_BYTES", 5_000)
    save.save(tmp_path / "m", base_model, params, CHAT)
    files = sorted(path.name for path in tmp_path.glob("m/*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    one = load_in_transformers(unsharded, caplog, capfd).state_dict()
    many = load_in_transformers(tmp_path / "m", caplog, capfd).state_dict()
    assert one.keys() == many.keys() and all(torch.equal(one[key], many[key]) for key in one)
    again = load_model(str(tmp_path / "m"), "auto").params
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), again, params)


def test_a_generation_config_is_copied(tmp_path):
    directory = write_model(tmp_path / "m")
    (directory / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true, "eos_token_id": [1, 3]}')
    base_model = load_model(str(directory))
    save.save(tmp_path / "out", base_model, base_model.params, CHAT)
    assert (tmp_path / "out" / "generation_config.json").read_text() == (directory / "generation_config.json").read_text()


@pytest.mark.parametrize(
    ("file", "joined"),
    [
        (None, ["<|im_end|>", "</s>"]),
        ({"eos_token_id": [1, 2], "top_k": 5}, [1, 2, "<|im_end|>"]),
        ({"eos_token_id": 2}, [2, "</s>", "<|im_end|>"]),
        ({"top_k": 5}, ["<|im_end|>", "</s>"]),
        ({"eos_token_id": None}, ["</s>", "<|im_end|>"]),
    ],
)
def test_end_tokens_of_the_training_join_those_of_the_base(tmp_path, file, joined):
    """Of generation_config.json; of config.json if that says nothing."""
    directory = write_model(tmp_path / "m")
    if file is not None:
        (directory / "generation_config.json").write_text(json.dumps(file))
    base_model = load_model(str(directory))
    form = PromptForm(end_tokens=("</s>", "<|im_end|>"))
    save.save(tmp_path / "out", base_model, base_model.params, CHAT, form=form)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    ids = [each if isinstance(each, int) else CHAT.convert_tokens_to_ids(each) for each in joined]
    assert written.pop("eos_token_id") == ids
    assert written == {"bos_token_id": CHAT.bos_token_id} if file is None else written.items() <= file.items()
    assert prompt_form.read(str(tmp_path / "out")) == form
    assert texts.end_tokens(load_model(str(tmp_path / "out")), CHAT) == sorted({*ids, CHAT.eos_token_id})


def test_the_chat_template_of_the_training_is_the_saved_tokenizers(saved, tmp_path):
    base_model, params, _ = saved["tied"]
    for number, text in enumerate((CHATML, CHATML.replace("user", "human") + "{# another #}")):
        form = PromptForm(PromptStyle.CHAT, text)
        save.save(tmp_path / str(number), base_model, params, CHAT, form=form)
        assert AutoTokenizer.from_pretrained(tmp_path / str(number)).chat_template == text
        assert CHAT.chat_template == CHATML
    form = PromptForm(end_tokens=("<|eot_id|>",))
    message = message_of(save.save, tmp_path / "m", base_model, params, CHAT, form=form)
    assert "end token '<|eot_id|>' of the trained prompts is not one token" in message and not (tmp_path / "m").exists()


def test_a_config_without_architectures_or_with_an_old_dtype_field(tmp_path):
    directory = write_model(tmp_path / "m")
    config = {key: value for key, value in CONFIG.items() if key not in ("architectures", "dtype")}
    (directory / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    base_model = load_model(str(directory), "float32")
    save.save(tmp_path / "out", base_model, base_model.params, CHAT)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["dtype"] == "float32" and "torch_dtype" not in written


def test_an_existing_directory_is_refused(saved, tmp_path):
    base_model, params, _ = saved["tied"]
    (tmp_path / "m").mkdir()
    message = message_of(save.save, tmp_path / "m", base_model, params, CHAT)
    assert message == f"{tmp_path / 'm'} exists already; choose another folder or remove it"
    (tmp_path / "m" / "old.txt").write_text("old")
    save.save(tmp_path / "m", base_model, params, CHAT, replace=True)
    assert not (tmp_path / "m" / "old.txt").exists() and (tmp_path / "m" / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_failed_save_leaves_nothing(saved, tmp_path, monkeypatch):
    base_model, params, _ = saved["tied"]

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "_copy_generation_config", fail)
    message = message_of(save.save, tmp_path / "m", base_model, params, CHAT)
    assert message == f"{tmp_path / 'm'}: cannot be written (No space left on device)"
    assert list(tmp_path.iterdir()) == []
