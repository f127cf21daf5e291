"""Every tensor of a checkpoint is used as transformers uses it, or named: tied layers, other names, tensors of no use."""

import functools
import itertools
import json
import random
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from data_helpers import message_of

from neuroada_jax import models
from neuroada_jax.adapters import native, on_base
from neuroada_jax.core import trees
from neuroada_jax.models import names
from neuroada_jax.pretrained import save, tensor_names
from neuroada_jax.pretrained.load import load_model, load_with_progress, open_model, with_params

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
}
DECODERS = [kind for kind, each in models.ARCHITECTURES.items() if each.is_decoder]
ENCODERS = [kind for kind, each in models.ARCHITECTURES.items() if not each.is_decoder]
EMBEDDING, HEAD = tensor_names.EMBEDDING, tensor_names.HEAD
Q = "model.layers.1.self_attn.q_proj"
IDS = np.random.default_rng(0).integers(8, 64, (2, 12))


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


def auto(kind):
    return transformers.AutoModelForCausalLM if kind in DECODERS else transformers.AutoModelForSequenceClassification


@functools.cache
def reference(kind):
    """(config fields, tensors) of a random model, untied, with every tensor that transformers has for it."""
    more = {"num_key_value_heads": 1, "head_dim": 8} if kind in DECODERS else {}
    more |= {"pad_token_id": 0} if kind in ("smollm3", "phi3", "modernbert") else {}  # whose default is beyond 64 tokens
    deberta = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "conv_kernel_size": 3}
    more |= deberta if kind == "deberta-v2" else {}
    more |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8} if kind == "qwen3_moe" else {}
    config = transformers.AutoConfig.for_model(kind, **SIZES, **more, tie_word_embeddings=False)
    model, generator = auto(kind).from_config(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
            parameter.add_(1.0 if "norm" in name.lower() else 0.0)
    with tempfile.TemporaryDirectory() as folder:  # experts have names of their own on disk alone
        model.save_pretrained(folder)
        tensors = safetensors.torch.load_file(f"{folder}/model.safetensors")
    return {**config.to_dict(), "architectures": [type(model).__name__]}, tensors


def write(directory, kind, tensors, **fields):
    directory.mkdir()
    safetensors.torch.save_file({name: each.clone() for name, each in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**reference(kind)[0], **fields}))
    return directory


def in_transformers(kind, directory):
    return auto(kind).from_pretrained(directory, output_loading_info=True)


def torch_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.numpy()


@functools.cache
def forward(architecture, config):
    module = architecture.module(config, models.Remat.NONE)

    @jax.jit
    def run(params, ids):
        hidden, _ = module.apply({"params": params}, ids)
        return module.apply({"params": params}, hidden, method="unembed")

    return run


def our_logits(model, params):
    return np.asarray(forward(model.architecture, model.config)(params, jnp.asarray(IDS, jnp.int32)))


def assert_same_tensors(params, model, state):
    """Every tensor of ours is the one that transformers has under its name."""
    leaves = dict(trees.flatten(params))
    for name, slot in names.checkpoint_names(params, model.layers_path).items():
        ours = leaves[slot.path] if slot.layer is None else leaves[slot.path][slot.layer]
        np.testing.assert_array_equal(np.asarray(ours), state[name].numpy(), err_msg=name)


# Tied or not.


HEADS, EMBEDDINGS, FLAGS = ("none", "equal", "different"), ("embedding", "no embedding"), ("tied", "untied")


def is_rerun(kind, head, embedding, flag):
    """The same code ties all kinds: all cases of an untied and a tied family, of others what differs and what is absent."""
    first = kind in ("llama", "gemma2") or (embedding, head, flag) == ("embedding", "none", "tied")
    return not (first or (embedding, head) == ("embedding", "different"))


@pytest.mark.parametrize(
    ("flag", "head", "embedding", "kind"),
    [
        pytest.param(*case, id="-".join(case), marks=pytest.mark.slow if is_rerun(kind, head, embedding, flag) else ())
        for kind, head, embedding, flag in itertools.product(DECODERS, HEADS, EMBEDDINGS, FLAGS)
        if (case := (flag, head, embedding, kind))
    ],
)
def test_tied_as_transformers_ties(flag, head, embedding, kind, tmp_path, capfd):
    flag, embedding = flag == "tied", embedding == "embedding"
    tensors = dict(reference(kind)[1])
    if head == "equal":
        tensors[HEAD] = tensors[EMBEDDING].to(torch.float32)
    lacking = [HEAD] * (head == "none") + [EMBEDDING] * (not embedding)
    tensors = {name: each for name, each in tensors.items() if name not in lacking}
    path = str(write(tmp_path / "m", kind, tensors, tie_word_embeddings=flag))
    theirs, report = in_transformers(kind, path)
    if report["missing_keys"]:  # which transformers initialises from nowhere
        message = message_of(load_model, path)
        assert any(f"{path}: tensor {name!r} is missing" in message for name in report["missing_keys"])
        return
    want, tied = torch_logits(theirs), theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert np.std(want) > 0.5  # else 1e-4 would say little
    capfd.readouterr()
    loaded = load_with_progress(open_model(path))
    said = [each for each in capfd.readouterr().err.splitlines() if each.startswith(path)]
    assert len(said) == (flag and not tied) and all(f"{HEAD} differs from {EMBEDDING}" in each for each in said)
    np.testing.assert_allclose(our_logits(loaded.model, loaded.params), want, rtol=0, atol=1e-4)

    # Whoever asks whether the model is tied hears the same.
    assert open_model(path, config_only=True).model == open_model(path).model == loaded.model
    assert loaded.model.config.tied == tied == (HEAD not in loaded.digests) == ("lm_head" not in loaded.params)
    assert tied == ("lm_head" not in loaded.model.linear_maps()) == loaded.model.hf_config["tie_word_embeddings"]
    assert with_params(open_model(path), loaded).params.keys() == loaded.params.keys()

    columns = np.sort(np.random.default_rng(1).permuted(np.tile(np.arange(16), (16, 1)), axis=1)[:, :3], axis=1)
    modules = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)]
    for scale in (0.0, 0.5):
        values = scale * np.random.default_rng(2).standard_normal((16, 3)).astype(np.float32)
        made = dict.fromkeys(modules, values), dict.fromkeys(modules, columns), native.Selection(3, ["o_proj"])
        with torch.no_grad():
            for module in modules:
                weight = theirs.get_submodule(module).weight
                weight[torch.arange(16)[:, None], torch.from_numpy(columns)] += torch.from_numpy(values)
        save.save(tmp_path / f"{scale}", loaded, on_base.merge(on_base.assemble(loaded, *made), loaded), None)
        merged, report = in_transformers(kind, tmp_path / f"{scale}")
        assert not any(report.values()) and merged.config.tie_word_embeddings == tied
        np.testing.assert_array_equal(torch_logits(merged), torch_logits(theirs))
    assert np.abs(torch_logits(theirs) - want).max() > 0.1


def test_a_head_of_another_dtype_or_shape(tmp_path):
    tensors = dict(reference("llama")[1])
    tensors[EMBEDDING] = tensors[EMBEDDING].bfloat16()
    tied = write(tmp_path / "equal", "llama", tensors | {HEAD: tensors[EMBEDDING].float()}, tie_word_embeddings=True)
    assert open_model(str(tied)).model.config.tied
    longer = write(tmp_path / "longer", "llama", tensors | {HEAD: torch.ones(65, 16)}, tie_word_embeddings=True)
    message = message_of(load_model, str(longer))
    assert message == f"{longer}: tensor {HEAD!r} has shape [65, 16], expected [64, 16]"


def test_a_config_without_weights_is_believed_where_the_config_is_enough(tmp_path):
    path = write(tmp_path / "m", "llama", reference("llama")[1], tie_word_embeddings=True)
    assert not open_model(str(path)).model.config.tied
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])  # a download that was cut off
    assert open_model(str(path), config_only=True).model.config.tied
    assert "not a complete safetensors file" in message_of(open_model, str(path))


def test_a_peft_adapter_beside_a_model_is_refused(tmp_path):
    """transformers would load it into the model, where PEFT is installed."""
    path = write(tmp_path / "m", "llama", reference("llama")[1])
    (path / "adapter_config.json").write_text("{}")
    assert message_of(load_model, str(path)).startswith(f"{path}: a PEFT adapter (adapter_config.json) lies beside")


# Other names, and tensors of no use.


def extras(kind, rng):
    """Names that a model of the kind does not have."""
    letters = "".join(rng.choice("abcdefgh") for _ in range(5))
    found = [
        f"{letters}.weight",
        f"{letters}_tower.{rng.randrange(9)}.mlp.weight",
        "score.weight",
        f"{letters}.LayerNorm.w",
    ]
    if kind in DECODERS:
        layers = [f"model.layers.{number}." for number in (0, 1)]
        found += [f"{layer}self_attn.q_norm.bias" for layer in layers]
        found += [f"{layer}self_attn.{each}_proj.lora_{side}.weight" for layer in layers for each in "qv" for side in "AB"]
        found += [f"model.layers.{number}.mlp.up_proj.weight" for number in (2, 3)]
        found += ["lm_head.bias", "mtp.0.norm.weight", "visual.blocks.0.attn.qkv.weight", "model.embed_positions.weight"]
    else:
        prefix = models.ARCHITECTURES[kind].prefix
        found += ["cls.predictions.bias", "cls.seq_relationship.weight", "lm_head.dense.weight", f"{prefix}pooler.weight"]
        found += [f"{prefix}encoder.layer.{number}.output.dense.bias" for number in (2, 3)]
        found += ["roberta.pooler.dense.weight"] if kind != "bert" else []
    return rng.sample(found, rng.randrange(len(found)))


def respelled(kind, rng):
    """The tensors of a random model under other names, some of them twice with different values; (tensors, extra names)."""
    prefix, tensors = models.ARCHITECTURES[kind].prefix, {}
    for name, tensor in reference(kind)[1].items():
        first = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        spellings = [name, first, name.removeprefix(prefix), first.removeprefix(prefix)]
        spellings += [f"{prefix}{name}"] if not name.startswith(prefix) else []
        for number, spelling in enumerate(rng.sample(spellings, 1 + (rng.random() < 0.2))):
            tensors[spelling] = tensor + number
    extra = extras(kind, rng)
    buffers = ["model.layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"]
    buffers = buffers if kind in DECODERS else [f"{prefix}embeddings.position_ids", "embeddings.position_ids"]
    return tensors | dict.fromkeys([*extra, *rng.sample(buffers, 1)], torch.ones(3)), extra


# Of experts under other names or under one twice transformers cannot make its own tensors, and ends.
@pytest.mark.parametrize("kind", [kind for kind in models.ARCHITECTURES if kind not in ("mixtral", "qwen3_moe")])
@pytest.mark.parametrize("seed", range(4))
def test_names_are_assigned_as_in_transformers(seed, kind, tmp_path, capfd):
    tensors, extra = respelled(kind, random.Random(f"{kind}{seed}"))
    path = write(tmp_path / "m", kind, tensors)
    theirs, report = in_transformers(kind, path)
    loaded = load_with_progress(open_model(str(path)))
    assert_same_tensors(loaded.params, loaded.model, theirs.state_dict())
    found = tensor_names.assign(loaded.model, tensors)
    repeated = set(tensors) - set(found.stored.values()) - set(extra) - {each for each in tensors if "inv_freq" in each}
    repeated -= {each for each in tensors if each.endswith("position_ids")}
    # Buffers of no use are never named by us; Gemma 3's have other names in transformers, and ModernBERT has no positions.
    unexpected = {each for each in report["unexpected_keys"] if not tensor_names._BUFFERS.search(each)}
    assert set(found.unused) == unexpected | repeated == set(extra) | repeated
    said = [each for each in capfd.readouterr().err.splitlines() if " does not use: " in each]
    assert len(said) == bool(found.unused)
    for line in said:
        count = f"{len(found.unused)} tensor{'s' * (len(found.unused) > 1)}"
        assert line.startswith(f"{path} has {count} that this {'decoder' if kind in DECODERS else 'sequence classifier'}")
        if len(found.unused) <= 6:
            assert sorted(line.partition(" use: ")[2].split(", ")) == sorted(found.unused)


@pytest.mark.parametrize(
    ("unused", "shown"),
    [
        (["score.weight", "b.c"], "score.weight, b.c"),
        ([f"cls.predictions.{each}" for each in "abcdefg"], "cls.* (7)"),
        ([f"{Q[:13]}{layer}{Q[14:]}.bias" for layer in range(24)], "model.layers.0-23.self_attn.q_proj.bias (24)"),
        ([f"{Q[:13]}{layer}{Q[14:]}.bias" for layer in range(0, 24, 2)], "model.layers.*.self_attn.q_proj.bias (12)"),
        ([f"model.layers.{n}.{each}" for n in (24, 25) for each in "abcd"], "model.layers.24-25.* (8)"),
        ([f"base.{n}.q.lora_{side}.w" for n in range(9) for side in "AB"] + ["x"], "base.* (18), x"),
        ([f"{each}.w" for each in "abcdefgh"], "a.w, b.w, c.w, d.w, e.w, f.w, ..."),
        (["two\nlines", "t" * 200], f"'two\\nlines', {'t' * 100}..."),
        ([f"a.\u00b2.{'9' * 5000}.{each}" for each in "abcdefg"], "a.* (7)"),
    ],
)
def test_many_names_are_a_short_text(unused, shown):
    used = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(24)]
    assert tensor_names.describe(unused, used) == shown


def test_names_with_odd_numbers_are_sorted_and_named(tmp_path):
    odd = ["a.\u00b2", f"model.layers.{'9' * 5000}.mlp.up_proj.weight", "", ".", "model.layers.-1.x", "model.norm.weight.3"]
    path = write(tmp_path / "m", "llama", reference("llama")[1] | dict.fromkeys(odd, torch.ones(3)))
    opened = open_model(str(path))
    assert set(tensor_names.assign(opened.model, [*reference("llama")[1], *odd]).unused) == set(odd)
    assert " has 6 tensors that this decoder does not use: " in tensor_names.line(
        str(path), opened.model, [*odd, EMBEDDING]
    )
