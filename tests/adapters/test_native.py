"""The native adapter: what is in it, that it comes back bit for bit, and everything that is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from data_helpers import message_of
from helpers import CONFIG, random_tensors, write_model

from neuroada_jax import models
from neuroada_jax.adapters import inspection, native, on_base
from neuroada_jax.core import bypass
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.data.prompts import PromptForm, PromptStyle
from neuroada_jax.pretrained.load import load_model

TARGETS = ["q_proj", "down_proj"]
MODULES = [f"model.layers.{layer}.{name}" for layer in range(2) for name in ("mlp.down_proj", "self_attn.q_proj")]
Q = "model.layers.0.self_attn.q_proj"


def trained(base_model, targets=TARGETS, k=3, seed=0):
    """A bypass with random values, as after training."""
    built = bypass.build(
        base_model.params, models.match_targets(base_model.params, targets, base_model.model.layers_path), k
    )
    rng = np.random.default_rng(seed)
    values = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32)), built.values)
    return Bypass(values, built.columns)


def save(directory, base_model, bypass_=None, targets=TARGETS, **options):
    selection = native.Selection(3, targets, seed=7)
    on_base.save(directory, bypass_ or trained(base_model, targets), base_model, selection, **options)
    return directory


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    return load_model(str(write_model(tmp_path_factory.mktemp("model") / "m", None)))


@pytest.fixture(scope="module")
def pristine(base_model, tmp_path_factory):
    return save(tmp_path_factory.mktemp("adapter") / "a", base_model)


@pytest.fixture
def adapter(pristine, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(pristine, tmp_path / "a")


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_round_trip_bit_for_bit(base_model, pristine):
    assert_same(on_base.load(str(pristine), base_model), trained(base_model))


def test_round_trip_of_an_untied_head(tmp_path):
    directory = write_model(tmp_path / "m", None, tie_word_embeddings=False)
    base_model = load_model(str(directory))
    made = trained(base_model, ["lm_head", "k_proj"])
    save(tmp_path / "a", base_model, made, ["lm_head", "k_proj"])
    assert_same(on_base.load(str(tmp_path / "a"), base_model), made)
    assert native.read(str(tmp_path / "a")).values["lm_head"].shape == (CONFIG["vocab_size"], 3)


def test_what_is_in_it(base_model, pristine):
    tensors = safetensors.numpy.load_file(str(pristine / "adapter.safetensors"))
    assert sorted(tensors) == sorted(f"{module}.{leaf}" for module in MODULES for leaf in ("values", "columns"))
    assert tensors[f"{Q}.values"].shape == (16, 3) and tensors[f"{Q}.values"].dtype == np.float32
    assert tensors[f"{Q}.columns"].dtype == np.int32
    # No base weights: nothing but k values and k columns a neuron, and no tensor of a weight's shape.
    shapes = {tensor.shape for tensor in random_tensors(CONFIG).values()}
    assert not shapes & {tensor.shape for tensor in tensors.values()}
    assert sum(tensor.size for tensor in tensors.values()) == 2 * 3 * 2 * (16 + 16)
    metadata = json.loads((pristine / "adapter.json").read_text())
    assert (metadata["format"], metadata["version"]) == ("neuroada-adapter", 1)
    assert (metadata["k"], metadata["targets"], metadata["rule"], metadata["seed"]) == (3, TARGETS, "magnitude", 7)
    assert metadata["base"]["source"] == base_model.source and metadata["base"]["model_type"] == "llama"
    assert metadata["base"]["digests"] == base_model.digests and len(base_model.digests) == len(random_tensors(CONFIG))
    assert metadata["inputs"][Q] == 16
    assert {"jax", "neuroada-jax"} <= set(metadata["versions"]) and metadata["created"].endswith("+00:00")
    assert sorted(path.name for path in pristine.iterdir()) == ["adapter.json", "adapter.safetensors"]
    assert native.is_adapter(str(pristine)) and not native.is_adapter(base_model.path)


def test_merging_equals_the_bypass_on_the_fly(base_model, pristine):
    loaded = on_base.load(str(pristine), base_model)
    merged = bypass.merge(base_model.params, loaded)
    ids, module = jnp.arange(8, dtype=jnp.int32)[None], base_model.model.module()
    plain, _ = jax.jit(module.apply)({"params": merged}, ids)
    on_the_fly, _ = jax.jit(module.apply)(
        {"params": base_model.params, "bypass": loaded.values, "columns": loaded.columns}, ids
    )
    np.testing.assert_allclose(plain, on_the_fly, atol=1e-5)
    assert np.abs(np.asarray(plain) - np.asarray(jax.jit(module.apply)({"params": base_model.params}, ids)[0])).max() > 0.1


def test_another_base_is_refused(base_model, pristine, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"  # not even a target
    changed = random_tensors(CONFIG)[name].copy()
    changed[3, 5] = np.nextafter(changed[3, 5], 9, dtype=np.float32)
    other = load_model(str(write_model(tmp_path / "other", None, weights={name: changed})))
    message = message_of(on_base.load, str(pristine), other)
    assert message == f"{other.source} is not the base model of this adapter ({base_model.source}): tensor {name!r} differs"
    untied = load_model(str(write_model(tmp_path / "untied", None, tie_word_embeddings=False)))
    save(tmp_path / "u", untied)
    message = message_of(on_base.load, str(tmp_path / "u"), base_model)
    assert message.endswith("tensor 'lm_head.weight' is missing")
    copy = load_model(str(write_model(tmp_path / "copy", None)))  # the same weights elsewhere will do
    assert_same(on_base.load(str(pristine), copy), on_base.load(str(pristine), base_model))


def rewrite_metadata(adapter, **fields):
    path = adapter / "adapter.json"
    content = json.loads(path.read_text())
    del content["fields_digest"]  # which would notice every change
    path.write_text(json.dumps(content | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "peft"}, "format 'peft', expected 'neuroada-adapter'"),
        ({"version": 2}, "version 2, this release reads 1"),
        ({"version": None}, "version None, this release reads 1"),
        ({"base": "SmolLM2"}, "'base', its 'digests' or 'inputs' is missing or not an object"),
        ({"base": {"digests": [1]}}, "'base', its 'digests' or 'inputs' is missing or not an object"),
        ({"base": {}}, "'base', its 'digests' or 'inputs' is missing or not an object"),
    ],
)
def test_wrong_metadata(adapter, base_model, fields, message):
    rewrite_metadata(adapter, **fields)
    found = message_of(on_base.load, str(adapter), base_model)
    assert found.startswith(str(adapter / "adapter.json")) and message in found


def test_the_prompt_form_is_in_it(base_model, tmp_path):
    form = PromptForm(PromptStyle.CHAT, "{{ messages }}", {"a": [1]}, "2026-01-31", "instruct", ("<|im_end|>",))
    read = native.read(str(save(tmp_path / "a", base_model, form=form)))
    assert native.form_of(read) == form
    contract = {"style": "chat", "template_arguments": {"a": [1]}, "task": "instruct", "end_tokens": ["<|im_end|>"]}
    assert contract.items() <= read.metadata["prompt"].items()
    assert native.form_of(native.read(str(save(tmp_path / "b", base_model)))) is None


@pytest.mark.parametrize("prompt", [[], {"style": "poem"}, {"end_tokens": {}}, {"template": "{{ x }}"}])
def test_a_prompt_form_that_is_none(adapter, prompt):
    file = adapter / "adapter.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prompt": prompt}))
    assert message_of(native.read, str(adapter)).startswith(f"{file}: prompt")


def test_files_that_are_missing_or_not_whole(adapter, base_model, tmp_path):
    path = adapter / "adapter.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert message_of(on_base.load, str(adapter), base_model).startswith(f"{path}: not a complete safetensors file (")
    path.unlink()
    assert message_of(on_base.load, str(adapter), base_model).startswith(f"{path}: not a complete safetensors file (")
    (adapter / "adapter.json").write_text("{")
    assert message_of(on_base.load, str(adapter), base_model).startswith(f"{adapter / 'adapter.json'}: not JSON")
    (adapter / "adapter.json").unlink()
    assert message_of(native.read, str(adapter)) == f"{adapter}: no adapter here (adapter.json is missing)"


def spoil(tensors, spoiled):
    """The change under test, by name, in a dict of tensors."""
    values, columns = f"{Q}.values", f"{Q}.columns"
    match spoiled:
        case "nan":
            tensors[values][2, 1] = np.nan
        case "infinite":
            tensors[values][2, 1] = -np.inf
        case "unsorted":
            tensors[columns] = np.ascontiguousarray(tensors[columns][:, ::-1])
        case "twice":
            tensors[columns][4, 1] = tensors[columns][4, 0]
        case "negative":
            tensors[columns][4, 0] = -1
        case "beyond":
            tensors[columns][4, 2] = 16
        case "float64":
            tensors[values] = tensors[values].astype(np.float64)
        case "bfloat16":
            tensors[values] = tensors[values].astype(ml_dtypes.bfloat16)
        case "int64":
            tensors[columns] = tensors[columns].astype(np.int64)
        case "no columns":
            del tensors[columns]
        case "no values":
            del tensors[values]
        case "nothing":
            tensors.clear()
            tensors["x"] = np.zeros(2, np.float32)
        case "stranger":
            tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((16, 16), np.float32)
        case "shape":
            tensors[values] = tensors[values][:, :2].copy()
        case "rank":
            tensors[values], tensors[columns] = tensors[values][0], tensors[columns][0]
        case "neurons":
            tensors[values], tensors[columns] = tensors[values][:8].copy(), tensors[columns][:8].copy()
        case "module":
            tensors["model.layers.9.self_attn.q_proj.values"] = tensors[values]
            tensors["model.layers.9.self_attn.q_proj.columns"] = tensors[columns]
        case "layer":
            del tensors[values], tensors[columns]
        case "other k":
            tensors[values], tensors[columns] = tensors[values][:, :2].copy(), tensors[columns][:, :2].copy()


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ("nan", f"{Q}.values holds NaN or infinite entries"),
        ("infinite", f"{Q}.values holds NaN or infinite entries"),
        ("unsorted", f"{Q}.columns must be ascending and distinct within each neuron"),
        ("twice", f"{Q}.columns must be ascending and distinct within each neuron"),
        ("negative", f"{Q}.columns must be ascending and distinct within each neuron, from 0 on"),
        ("beyond", f"{Q} has 16 neurons or columns that do not fit (16, 16)"),
        ("float64", f"{Q} has values float64 and columns int32, expected float32 and int32"),
        ("bfloat16", f"{Q} has values bfloat16 and columns int32, expected float32 and int32"),
        ("int64", f"{Q} has values float32 and columns int64, expected float32 and int32"),
        ("no columns", "expected pairs of .values and .columns"),
        ("no values", "expected pairs of .values and .columns"),
        ("nothing", "expected pairs of .values and .columns, found x"),
        ("stranger", "expected pairs of .values and .columns"),
        ("shape", f"{Q} has values (16, 2) and columns (16, 3), expected (O, k) for both"),
        ("rank", f"{Q} has values (3,) and columns (3,), expected (O, k) for both"),
        ("neurons", f"{Q} has 8 neurons or columns that do not fit (16, 16)"),
        ("module", "the base model has no module 'model.layers.9.self_attn.q_proj'"),
        ("layer", "model.layers.1.self_attn.q_proj has values but other layers' q_proj have none"),
        ("other k", "model.layers.1.self_attn.q_proj has another k than model.layers.0.self_attn.q_proj"),
    ],
)
def test_tensors_that_are_no_adapter(adapter, base_model, spoiled, message):
    path = str(adapter / "adapter.safetensors")
    tensors = safetensors.numpy.load_file(path)
    spoil(tensors, spoiled)
    safetensors.numpy.save_file(tensors, path)
    rewrite_metadata(adapter, digest=None)
    assert message in message_of(on_base.load, str(adapter), base_model)


def test_a_flipped_bit_in_the_values_is_noticed(adapter, base_model):
    path = adapter / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1  # still finite float32, or a column in range
    path.write_bytes(content)
    message = message_of(on_base.load, str(adapter), base_model)
    assert message == f"{path}: its digest differs from the one in adapter.json; the file was damaged or changed"


def test_an_adapter_without_a_digest_is_read(adapter, base_model):
    rewrite_metadata(adapter, digest=None)
    assert_same(on_base.load(str(adapter), base_model), trained(base_model))


def test_a_failed_save_leaves_nothing_and_keeps_the_old_one(base_model, tmp_path, monkeypatch):
    old = save(tmp_path / "a", base_model)
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    assert message_of(save, old, base_model) == f"{old} exists already; choose another folder or remove it"

    def fill(tensors, path, **_):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.numpy, "save_file", fill)
        message = message_of(save, old, base_model, replace=True)
        assert message == f"{old}: cannot be written (No space left on device)"
        message_of(save, tmp_path / "b", base_model)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(native.json, "dumps", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(old, base_model, replace=True)
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before

    save(old, base_model, trained(base_model, seed=1), replace=True)
    assert_same(on_base.load(str(old), base_model), trained(base_model, seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_place_that_cannot_be_written(base_model, tmp_path):
    (tmp_path / "file").write_text("")
    message = message_of(save, tmp_path / "file" / "a", base_model)
    assert message.startswith(f"{tmp_path / 'file' / 'a'}: cannot be written (")


def test_inspection(base_model, pristine):
    found = inspection.inspect_adapter(str(pristine))
    assert found["values"] == 2 * 3 * (16 + 16) and found["bytes"] == 8 * found["values"]
    assert {row["module"] for row in found["modules"]} == set(MODULES)
    model = inspection.inspect_model(base_model.path, 3)
    assert model["parameters"] == bypass.count(base_model.params)
    row = next(row for row in model["modules"] if row["module"] == "model.layers.1.mlp.down_proj")
    assert (row["neurons"], row["inputs"], row["values"], row["bytes"]) == (16, 24, 48, 384)
    assert row["percent"] == pytest.approx(12.5)
    clamped = inspection.inspect_model(base_model.path, 20)["modules"]
    assert {row["k"] for row in clamped} == {16, 20}


def test_kinds_of_modules_add_up_to_the_total():
    def row(module, neurons, k=2):
        return inspection._row(module, neurons, 8, k)

    names = ("model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.12.q_proj", "lm_head", "blocks.0", "blocks.1")
    rows = [*(row(name, 4) for name in names), row("model.layers.13.q_proj", 6), row("model.layers.14.q_proj", 6, 1)]
    found = inspection._totals(rows, 1000)
    assert [(kind["module"], kind["modules"], kind["neurons"], kind["k"]) for kind in found["kinds"]] == [
        ("q_proj", 3, 4, 2),
        ("lm_head", 1, 4, 2),
        ("blocks.*", 2, 4, 2),
        ("q_proj", 1, 6, 2),
        ("q_proj", 1, 6, 1),
    ]
    for name in ("values", "bytes"):
        assert sum(kind[name] for kind in found["kinds"]) == sum(each[name] for each in rows) == found[name]
