"""Adapters in PEFT itself: logits, merged weights, several adapters; the way back; everything that is refused."""

import functools
import json
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft as real_peft
import pytest
import safetensors.numpy
import torch
import transformers
from data_helpers import message_of
from helpers import CONFIG, random_tensors, write_model

from neuroada_jax import models
from neuroada_jax.adapters import inspection, native, on_base, peft
from neuroada_jax.adapters.peft import Kind
from neuroada_jax.core import trees
from neuroada_jax.models import names
from neuroada_jax.pretrained.load import LoadedModel, load_model, open_model

WIDE = {"hidden_size": 64, "intermediate_size": 96}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name)
Q = "model.layers.0.self_attn.q_proj"


class Family(NamedTuple):
    """A base as this library and as PyTorch loads it."""

    base_model: LoadedModel
    torch_class: Any
    dense_parameters: dict[str, tuple[int, ...]]  # what may be trained densely

    def in_torch(self):
        dtype = getattr(torch, jnp.dtype(self.base_model.model.config.dtype).name)
        return self.torch_class.from_pretrained(self.base_model.path, dtype=dtype).eval()


LLAMAS = {"tied": ({}, {}), "untied": ({"tie_word_embeddings": False}, {"lm_head.weight": (304, 64)})}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for name, (fields, dense_parameters) in LLAMAS.items():
        for dtype in ("float32", "bfloat16"):
            directory = write_model(folder / f"{name}-{dtype}", None, dtype=dtype, **WIDE, **fields)
            loaded = load_model(str(directory), "auto")
            made[name, dtype] = Family(loaded, transformers.LlamaForCausalLM, dense_parameters)
    return made


@pytest.fixture(scope="module")
def untied(families):
    return families["untied", "float32"]


def trained(family, k=3, seed=0, targets=TARGETS, dense_parameters=()):
    """An adapter with random values of the size that training leaves."""
    base_model, rng = family.base_model, np.random.default_rng(seed)
    stored = safetensors.numpy.load_file(f"{base_model.path}/model.safetensors")
    columns = {}
    for name, weight in stored.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets:
            largest = np.argsort(-np.abs(weight.astype(np.float32)), axis=1)[:, :k]
            columns[module] = np.sort(largest, axis=1).astype(np.int32)
    values = {module: 0.05 * rng.standard_normal(leaf.shape, np.float32) for module, leaf in columns.items()}
    dense = {name: 0.3 * rng.standard_normal(family.dense_parameters[name], np.float32) for name in dense_parameters}
    return on_base.assemble(base_model, values, columns, native.Selection(k, targets, seed=seed), dense)


def merged_weights(family, adapter, kind):
    """The merged weights by plain numpy. On bfloat16 SuperTuning rounds the values first, SHiRA adds them in float32."""
    stored = safetensors.numpy.load_file(f"{family.base_model.path}/model.safetensors")
    for module, columns in adapter.columns.items():
        weight = stored[f"{module}.weight"]
        values = adapter.values[module]
        if kind is Kind.SUPERTUNING:
            values = values.astype(weight.dtype).astype(np.float32)
        rows = np.arange(len(columns))[:, None]
        weight[rows, columns] = (weight[rows, columns].astype(np.float32) + values).astype(weight.dtype)
    return stored | {name: classifier.astype(stored[name].dtype) for name, classifier in adapter.dense_parameters.items()}


def our_logits(family, weights_by_name, ids):
    """Logits of this library's model on given weights, in float32."""
    model = models.from_hf_config(family.base_model.model.hf_config)
    tensors = {name: tensor.astype(np.float32) for name, tensor in weights_by_name.items()}
    params: dict[str, Any] = {}
    slots = names.checkpoint_names(model.abstract_params(), model.layers_path)
    for path in dict.fromkeys(slot.path for slot in slots.values()):
        layers = [tensors[name] for name, slot in slots.items() if slot.path == path]
        stacked = names.is_stacked(path, model.layers_path)
        leaf = jnp.asarray(np.stack(layers) if stacked else layers[0])
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return np.asarray(_forward(model.module(), params, jnp.asarray(ids, jnp.int32)))


@functools.partial(jax.jit, static_argnums=0)
def _forward(module, params, ids):
    hidden, _ = module.apply({"params": params}, ids)
    return module.apply({"params": params}, hidden, method="unembed")


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)).logits.float().numpy()


IDS = np.random.default_rng(5).integers(8, 300, (2, 16))


def assert_merged(model, want):
    state = model.state_dict()
    for name, weight in want.items():
        found = state[name]
        host = found.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if found.dtype == torch.bfloat16 else found.numpy()
        assert host.dtype == weight.dtype and host.tobytes() == weight.tobytes(), name


def assert_same_arrays(a, b):
    for left, right in ((a.values, b.values), (a.columns, b.columns), (a.dense_parameters, b.dense_parameters)):
        assert left.keys() == right.keys()
        for name, leaf in left.items():
            assert leaf.dtype == right[name].dtype and leaf.tobytes() == right[name].tobytes(), name


@KINDS
@pytest.mark.parametrize("k", [1, 2, 5, 20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(LLAMAS))
def test_peft_has_our_logits_and_our_merged_weights(families, name, dtype, k, kind, tmp_path):
    family = families[name, dtype]
    adapter = trained(family, k, dense_parameters=family.dense_parameters if k == 2 else ())
    notes = peft.export(adapter, tmp_path / "x", kind, family.base_model)
    assert len(notes) == 1 and f"{sum(leaf.size for leaf in adapter.values.values()):,} values" in notes[0]
    model = real_peft.PeftModel.from_pretrained(family.in_torch(), tmp_path / "x").eval()
    attached = logits(model, IDS)
    want = merged_weights(family, adapter, kind)
    merged = model.merge_and_unload()
    assert_merged(merged, want)
    if k == 2 and (kind is Kind.SHIRA or dtype == "float32"):  # so says our own merge
        params = dict(trees.flatten(on_base.merge(adapter, family.base_model)))
        for parameter, slot in names.checkpoint_names(
            family.base_model.model.abstract_params(), family.base_model.model.layers_path
        ).items():
            leaf = params[slot.path] if slot.layer is None else params[slot.path][slot.layer]
            assert np.asarray(leaf).tobytes() == want[parameter].tobytes()
    np.testing.assert_array_equal(logits(merged, IDS), attached)
    assert np.abs(attached - logits(family.in_torch(), IDS)).max() > 0.1  # the adapter matters
    ours = our_logits(family, want, IDS)
    np.testing.assert_allclose(logits(merged.float(), IDS), ours, rtol=0, atol=1e-4)

    back = peft.read(tmp_path / "x", family.base_model.model, kind)
    assert_same_arrays(back, adapter)
    assert all("padding" in note for note in back.notes)


@KINDS
def test_two_adapters_and_none(untied, kind, tmp_path):
    first, second = trained(untied, 3), trained(untied, 20, seed=1, targets=["q_proj", "down_proj"])
    peft.export(first, tmp_path / "first", kind, untied.base_model)
    peft.export(second, tmp_path / "second", kind, untied.base_model)
    model = real_peft.PeftModel.from_pretrained(untied.in_torch(), tmp_path / "first", adapter_name="first").eval()
    model.load_adapter(tmp_path / "second", adapter_name="second")
    for name, adapter in (("second", second), ("first", first), ("second", second)):
        model.set_adapter(name)
        want = our_logits(untied, merged_weights(untied, adapter, kind), IDS)
        np.testing.assert_allclose(logits(model, IDS), want, rtol=0, atol=1e-4)
        with model.disable_adapter():
            np.testing.assert_array_equal(logits(model, IDS), logits(untied.in_torch(), IDS))


def test_supertuning_through_transformers_itself(untied, tmp_path):
    adapter = trained(untied)
    peft.export(adapter, tmp_path / "x", Kind.SUPERTUNING, untied.base_model)
    model = untied.in_torch()
    model.load_adapter(str(tmp_path / "x"))
    want = our_logits(untied, merged_weights(untied, adapter, Kind.SUPERTUNING), IDS)
    np.testing.assert_allclose(logits(model.eval(), IDS), want, rtol=0, atol=1e-4)
    model.disable_adapters()
    np.testing.assert_array_equal(logits(model, IDS), logits(untied.in_torch(), IDS))


@KINDS
def test_padding_leaves_the_first_entry_alone(kind, tmp_path):
    """Its base weight is -0.0, which adding 0.0 would change; and its own trained value is zero, which is no padding."""
    weight = random_tensors({**CONFIG, **WIDE})["model.layers.0.self_attn.q_proj.weight"]
    weight[0] = np.float32(-0.0)
    directory = write_model(tmp_path / "m", None, weights={f"{Q}.weight": weight}, **WIDE)
    family = Family(load_model(str(directory)), transformers.LlamaForCausalLM, {})
    adapter = trained(family, 2)
    adapter = adapter._replace(columns={name: leaf.copy() for name, leaf in adapter.columns.items()})
    adapter.columns[Q][0] = [1, 2]
    peft.export(adapter, tmp_path / "x", kind, family.base_model)
    merged = real_peft.PeftModel.from_pretrained(family.in_torch(), tmp_path / "x").merge_and_unload()
    assert_merged(merged, merged_weights(family, adapter, kind))
    adapter.columns[Q][0], adapter.values[Q][0, 0] = [0, 2], 0.0
    peft.export(adapter, tmp_path / "y", kind, family.base_model)
    assert_same_arrays(peft.read(tmp_path / "y", family.base_model.model, kind), adapter)


@KINDS
def test_what_peft_trained_itself_comes_in(untied, kind, tmp_path):
    """Entries anywhere, some rows with many and some with none."""
    if kind is Kind.SHIRA:
        config = real_peft.ShiraConfig(r=2, target_modules=["q_proj", "down_proj"], random_seed=0, init_weights=False)
    else:
        config = real_peft.SupertuningConfig(sparsity=0.9, target_modules=["q_proj", "down_proj"], init_weights=False)
    model = real_peft.get_peft_model(untied.in_torch(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shira_weight" in name or "supertuning_values" in name:
                parameter.mul_(0.05)
    model.save_pretrained(tmp_path / "x")
    imported = peft.read(tmp_path / "x", untied.base_model.model, kind)
    k = imported.values[Q].shape[1]
    assert f"entries: filled up to {k} with zero values" in imported.notes[0]
    selection = native.Selection(k, ["q_proj", "down_proj"])
    adapter = on_base.assemble(untied.base_model, imported.values, imported.columns, selection)
    native.write(tmp_path / "native", adapter)
    again = native.read(str(tmp_path / "native"))  # passes the native checks
    assert_merged(model.merge_and_unload(), merged_weights(untied, again, kind))


def test_inspect(untied, tmp_path):
    adapter = trained(untied, 3, dense_parameters=["lm_head.weight"])
    for kind in Kind:
        path = tmp_path / kind.name
        peft.export(adapter, path, kind, untied.base_model)
        content = inspection.inspect(str(path), 1)
        assert content["kind"] == f"PEFT {kind.name} adapter" and content["base"] == untied.base_model.source
        assert content["values"] == sum(leaf.size for leaf in adapter.values.values())
        assert content["dense_parameters"] == ["lm_head.weight"] and len(content["modules"]) == 14
        rows = {row["module"]: row for row in content["modules"]}
        assert (rows[Q]["neurons"], rows[Q]["k"]) == ((64, 3) if kind is Kind.SHIRA else (None, None))
        tensors = safetensors.numpy.load_file(str(path / "adapter_model.safetensors"))
        assert sum(row["bytes"] for row in rows.values()) == sum(t.nbytes for n, t in tensors.items() if "lm_head" not in n)


# What cannot be exported.


def test_what_shira_cannot_hold(tmp_path):
    family = Family(load_model(str(write_model(tmp_path / "m", None))), transformers.LlamaForCausalLM, {})
    adapter = trained(family, 16)
    message = message_of(peft.export, adapter, tmp_path / "x", Kind.SHIRA, family.base_model)
    assert message.startswith("PEFT SHiRA cannot hold this adapter: it needs r=") and "peft-supertuning can" in message
    assert not (tmp_path / "x").exists()
    peft.export(adapter, tmp_path / "x", Kind.SUPERTUNING, family.base_model)  # every connection of q_proj: sparsity 0
    assert_same_arrays(peft.read(tmp_path / "x", family.base_model.model, Kind.SUPERTUNING), adapter)
    message = message_of(peft.export, adapter, tmp_path / "x", Kind.SUPERTUNING, family.base_model)
    assert message == f"{tmp_path / 'x'} exists already; choose another folder or remove it"


def test_an_adapter_of_another_base_is_not_exported(untied, tmp_path):
    other = open_model(str(write_model(tmp_path / "m", None)))
    message = message_of(peft.export, trained(untied), tmp_path / "x", Kind.SHIRA, other)
    assert "neurons or columns that do not fit" in message
    adapter = trained(untied, targets=["lm_head"])
    assert (
        message_of(peft.export, adapter, tmp_path / "x", Kind.SHIRA, other) == "the base model has no linear map 'lm_head'"
    )


@pytest.mark.parametrize("shapes", [[(11008, 4096, 20), (4096, 11008, 20)], [(3, 7, 1)], [(49, 49, 48), (5, 93, 1)]])
def test_the_sparsity_leaves_room_and_little_more(shapes):
    by_name = {str(number): shape for number, shape in enumerate(shapes)}
    sparsity = peft._sparsity(by_name)
    assert 0 <= sparsity < 1 and json.loads(json.dumps(sparsity)) == sparsity
    lengths = [peft.supertuning_length(outputs, inputs, sparsity) for outputs, inputs, _ in shapes]
    assert all(length >= outputs * k for length, (outputs, _, k) in zip(lengths, shapes, strict=True))
    assert min(length - outputs * k for length, (outputs, _, k) in zip(lengths, shapes, strict=True)) == 0


# Crafted files. Each gives one line, and nothing they name is imported.


@pytest.fixture(scope="module")
def pristine(untied, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    for kind in Kind:
        peft.export(trained(untied), folder / kind.name, kind, untied.base_model)
    return folder


DOWN = "model.layers.0.mlp.down_proj"  # has padding in both formats
PREFIX = f"base_model.model.{DOWN}"
SPOILED_TENSORS = {
    "nan": lambda t, v, i: t[v].__setitem__(3, np.nan),
    "infinite": lambda t, v, i: t[v].__setitem__(3, np.inf),
    "negative": lambda t, v, i: t[i].__setitem__((..., 3), -1),
    "beyond": lambda t, v, i: t[i].__setitem__((..., 3), 64 * 96),
    "twice": lambda t, v, i: t[i].__setitem__((..., 3), t[i][..., 4]),
    "trained padding": lambda t, v, i: t[v].__setitem__(-1, 0.5),
    "float64": lambda t, v, i: t.update({v: t[v].astype(np.float64)}),
    "float indices": lambda t, v, i: t.update({i: t[i].astype(np.float32)}),
    "shorter": lambda t, v, i: t.update({v: t[v][:-1].copy(), i: t[i][..., :-1].copy()}),
    "values alone shorter": lambda t, v, i: t.update({v: t[v][:-1].copy()}),
    "rank": lambda t, v, i: t.update({v: t[v][None]}),
    "empty": lambda t, v, i: t.update({v: t[v][:0].copy(), i: t[i][..., :0].copy()}),
    "no indices": lambda t, v, i: t.pop(i),
    "no values": lambda t, v, i: t.pop(v),
    "nothing": lambda t, v, i: t.clear(),
    "stranger": lambda t, v, i: t.update({"base_model.model.lm_head.weight": np.zeros(3, np.float32)}),
    "module": lambda t, v, i: t.update({v.replace("down_proj", "x"): t[v], i.replace("down_proj", "x"): t[i]}),
    "parent": lambda t, v, i: t.update({"base_model.model.../x." + v.rpartition(".")[2]: t[v]}),
    "absolute": lambda t, v, i: t.update({"/etc/x." + v.rpartition(".")[2]: t[v]}),
}
TENSOR_MESSAGES = {
    "nan": f"{DOWN} holds NaN or infinite values",
    "infinite": f"{DOWN} holds NaN or infinite values",
    "negative": f"{DOWN} has indices outside 0 to 2147483647",
    "beyond": ("has entries outside its weight (64, 96)", "has a column 6144, but 96 inputs"),
    "twice": f"{DOWN} has several entries at row 1, column",
    "trained padding": f"{DOWN} has several entries at row 0, column 0",
    "float64": f"{DOWN} has values float64 and indices int32, expected float32 and int32",
    "float indices": f"{DOWN} has values float32 and indices float32, expected float32 and int32",
    "shorter": "but the config gives",
    "values alone shorter": f"{DOWN} has values",
    "rank": f"{DOWN} has values (1, ",
    "empty": f"{DOWN} has values (0,)",
    "no indices": "expected pairs of",
    "no values": "expected pairs of",
    "nothing": "expected pairs of",
    "stranger": "belongs to no tuner and to none of modules_to_save []",
    "module": "target_modules does not name model.layers.0.mlp.x, which has values",
    "parent": "expected names like base_model.model.<module>.",
    "absolute": "expected names like base_model.model.<module>.",
}


@KINDS
@pytest.mark.parametrize("spoiled", list(SPOILED_TENSORS))
def test_tensors_that_are_no_adapter(untied, pristine, kind, spoiled, tmp_path):
    directory = shutil.copytree(pristine / kind.name, tmp_path / "x")
    path = str(directory / "adapter_model.safetensors")
    tensors = safetensors.numpy.load_file(path)
    if spoiled == "trained padding":
        entry = tensors[f"{PREFIX}.{peft._INDICES[kind]}"]
        entry[..., 0] = 0  # the first entry is at row 0, column 0
    SPOILED_TENSORS[spoiled](tensors, f"{PREFIX}.{peft._VALUES[kind]}", f"{PREFIX}.{peft._INDICES[kind]}")
    safetensors.numpy.save_file(tensors, path)
    message = message_of(peft.read, directory, untied.base_model.model, kind)
    wanted = TENSOR_MESSAGES[spoiled]
    assert any(each in message for each in ([wanted] if isinstance(wanted, str) else wanted))
    assert "\n" not in message


@KINDS
def test_half_precision_is_widened(untied, pristine, kind, tmp_path):
    directory = shutil.copytree(pristine / kind.name, tmp_path / "x")
    path = str(directory / "adapter_model.safetensors")
    tensors = safetensors.numpy.load_file(path)
    narrow = {name: leaf.astype(ml_dtypes.bfloat16) if leaf.dtype == np.float32 else leaf for name, leaf in tensors.items()}
    safetensors.numpy.save_file(narrow, path)
    found = peft.open_stored(directory)
    for module, leaf in found.values.items():
        own = f"{peft.PREFIX}{module}.{peft._VALUES[kind]}"
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, tensors[own].astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (Kind.SHIRA, {"peft_type": "LORA"}, "peft_type 'LORA', expected SUPERTUNING or SHIRA"),
        (Kind.SHIRA, {"peft_type": None}, "peft_type None, expected SUPERTUNING or SHIRA"),
        (Kind.SHIRA, {"peft_type": ["SHIRA"]}, "peft_type ['SHIRA'], expected"),
        (Kind.SHIRA, {"peft_type": "SUPERTUNING", "r": None, "sparsity": 0.5}, "expected pairs of supertuning_values"),
        (Kind.SHIRA, {"r": None}, "r None, expected a positive integer"),
        (Kind.SHIRA, {"r": 1.5}, "r 1.5, expected a positive integer"),
        (Kind.SHIRA, {"r": True}, "r True, expected a positive integer"),
        (Kind.SHIRA, {"r": 10**30}, "but the config gives"),
        (Kind.SHIRA, {"fan_in_fan_out": True}, "fan_in_fan_out is set"),
        (Kind.SUPERTUNING, {"sparsity": None}, "sparsity None, expected a number from 0 to below 1"),
        (Kind.SUPERTUNING, {"sparsity": "0.5"}, "sparsity '0.5', expected a number from 0 to below 1"),
        (Kind.SUPERTUNING, {"sparsity": 1.0}, "sparsity 1.0, expected a number from 0 to below 1"),
        (Kind.SUPERTUNING, {"sparsity": float("nan")}, "sparsity nan, expected a number from 0 to below 1"),
        (Kind.SUPERTUNING, {"sparsity": 0.5}, "but the config gives"),
        (Kind.SUPERTUNING, {"r": 8}, "r is 8: SuperTuning's low-rank part is not supported"),
        (Kind.SUPERTUNING, {"modules_to_save": "classifier"}, "modules_to_save 'classifier', expected a list of names"),
        (Kind.SUPERTUNING, {"target_modules": ["k_proj", 3]}, "target_modules does not name model.layers.0.mlp.down_proj"),
        (Kind.SUPERTUNING, {"target_modules": TARGETS}, None),
        (Kind.SUPERTUNING, {"auto_mapping": {"base_model_class": "os.system", "parent_library": "os"}}, None),
    ],
)
def test_configs_that_are_no_adapters(untied, pristine, kind, fields, message, tmp_path):
    directory = shutil.copytree(pristine / kind.name, tmp_path / "x")
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    if message is None:
        assert_same_arrays(peft.read(directory, untied.base_model.model, kind), trained(untied))
    else:
        assert message in message_of(peft.read, directory, untied.base_model.model, kind)


@KINDS
def test_modules_and_dense_parameters_that_the_base_does_not_have(untied, kind, tmp_path):
    adapter = trained(untied, dense_parameters=["lm_head.weight"])
    peft.export(adapter, tmp_path / "x", kind, untied.base_model)
    path = tmp_path / "x" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(str(path))
    tensors["base_model.model.lm_head.bias"] = np.zeros(304, np.float32)
    safetensors.numpy.save_file(tensors, str(path))
    message = message_of(peft.read, tmp_path / "x", untied.base_model.model, kind)
    assert "dense parameter 'lm_head.bias' has shape [304], the base model has no such tensor" in message
    tied = open_model(str(write_model(tmp_path / "tied", None, num_hidden_layers=1, **WIDE)))
    message = message_of(peft.read, tmp_path / "x", tied.model, kind)
    assert message.startswith("the base model has no linear map 'model.layers.1.")


def test_files_that_are_missing_or_another_kind(untied, pristine, tmp_path):
    model = untied.base_model.model
    message = message_of(peft.read, tmp_path, model, Kind.SHIRA)
    assert message == f"{tmp_path}: no PEFT adapter here (adapter_config.json is missing)"
    directory = shutil.copytree(pristine / "SHIRA", tmp_path / "x")
    message = message_of(peft.read, directory, model, Kind.SUPERTUNING)
    assert message == f"{directory}: this is a SHIRA adapter, not SUPERTUNING"
    path = directory / "adapter_model.safetensors"
    path.rename(directory / "adapter_model.bin")
    assert "adapter_model.bin is a pickle and is not read" in message_of(peft.read, directory, model, Kind.SHIRA)
    (directory / "adapter_model.bin").unlink()
    assert message_of(peft.read, directory, model, Kind.SHIRA).startswith(f"{path}: not a complete safetensors file (")


def test_a_huge_declared_shape(untied, pristine, tmp_path):
    directory = shutil.copytree(pristine / "SHIRA", tmp_path / "x")
    for shape, dtype in (([2**40], "F32"), ([0, 2**62], "F32"), ([2**63], "F32"), ([], "F8_E8M0"), ([4], "X1")):
        header = {f"{PREFIX}.shira_weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}}
        text = json.dumps(header).encode()
        (directory / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        assert str(directory) in message_of(peft.read, directory, untied.base_model.model, Kind.SHIRA)
