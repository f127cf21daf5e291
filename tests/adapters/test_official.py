"""The published code's files: what is written, what comes back, and everything that is refused."""

import os
import pickle
import shutil
import time
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from data_helpers import message_of
from helpers import write_model

from neuroada_jax import models
from neuroada_jax.adapters import native, official, on_base
from neuroada_jax.core import bypass, trees
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.errors import UserError
from neuroada_jax.models import names
from neuroada_jax.pretrained.load import load_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q = "model.layers.0.self_attn.q_proj"


def golden_files(name):
    """The published code's own files, read as its loader does (they are this repository's)."""
    folder = GOLDEN / "official" / name
    tensors = torch.load(folder / official.VALUES, weights_only=True)
    return tensors, np.load(folder / official.POSITIONS, allow_pickle=True).item()


def as_adapter(tensors, positions, dtype="float32"):
    values, columns = {}, {}
    for name, where in positions.items():
        module = name.removesuffix(".weight")
        outputs = int(where[:, 0].max()) + 1
        columns[module] = where[:, 1].reshape(outputs, -1).numpy().astype(np.int32)
        values[module] = tensors[f"{name}_new"].detach().float().reshape(outputs, -1).numpy()
    dense_parameters = {name: tensor.detach().numpy() for name, tensor in tensors.items() if not name.endswith("_new")}
    return native.Adapter({"base": {"dtype": dtype}}, values, columns, dense_parameters)


def trained(base_model, k, *, dtype=jnp.float32, seed=0, targets=TARGETS):
    """A native adapter with random values that `dtype` can hold, as after training."""
    built = bypass.build(
        base_model.params, models.match_targets(base_model.params, targets, base_model.model.layers_path), k
    )
    rng = np.random.default_rng(seed)
    values = jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), dtype).astype(jnp.float32), built.values
    )
    stacked = Bypass(values, built.columns)
    arrays = (dict(names.unstacked(tree, base_model.model.layers_path)) for tree in stacked)
    return on_base.assemble(base_model, *arrays, native.Selection(k, targets)), stacked


# Writing


@pytest.mark.parametrize("name", ["llama_untied", "roberta_cls"])
def test_it_writes_what_the_published_code_writes(name, tmp_path):
    tensors, positions = golden_files(name)
    adapter = as_adapter(tensors, positions)
    shuffled = native.Adapter(
        adapter.metadata, dict(sorted(adapter.values.items())), adapter.columns, adapter.dense_parameters
    )
    assert official.export(shuffled, tmp_path / "out") == []
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == [
        "out/positions.npy",
        "out/tunable_para/state_dict_tunable.pt",
    ]
    ours = torch.load(tmp_path / "out" / official.VALUES, weights_only=True)
    assert list(ours) == list(tensors) and type(ours) is type(tensors)
    for key, tensor in tensors.items():
        found = ours[key]
        assert (type(found), found.dtype, found.shape) == (type(tensor), tensor.dtype, tensor.shape)
        assert found.requires_grad and torch.equal(found, tensor)
    # As the published code reads it; the file is ours.
    ours = np.load(tmp_path / "out" / official.POSITIONS, allow_pickle=True)
    assert (ours.dtype, ours.shape) == (np.dtype(object), ())
    assert list(ours.item()) == list(positions) and type(ours.item()) is dict
    for key, where in positions.items():
        found = ours.item()[key]
        assert (found.dtype, found.shape, found.stride()) == (torch.int64, where.shape, where.stride())
        assert torch.equal(found, where)


def test_the_layers_of_a_deep_model_come_in_their_order(tmp_path):
    values = {
        f"model.layers.{layer}.mlp.{name}": np.ones((2, 1), np.float32) for layer in (10, 2, 0) for name in ("z", "up_proj")
    }
    values["lm_head"] = np.ones((2, 1), np.float32)
    columns = {module: np.zeros((2, 1), np.int32) for module in values}
    official.export(native.Adapter({"base": {"dtype": "float32"}}, values, columns, {}), tmp_path / "out")
    found = list(torch.load(tmp_path / "out" / official.VALUES, weights_only=True))
    layers = [f"model.layers.{layer}.mlp.{name}.weight_new" for layer in (0, 2, 10) for name in ("up_proj", "z")]
    assert found == [*layers, "lm_head.weight_new"]


def test_values_take_the_dtype_of_the_base(tmp_path):
    adapter = as_adapter(*golden_files("roberta_cls"), dtype="bfloat16")
    (note,) = official.export(adapter, tmp_path / "a")
    assert note.endswith(" of 896 values rounded to bfloat16, the base dtype")
    found = torch.load(tmp_path / "a" / official.VALUES, weights_only=True)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert official.export(adapter, tmp_path / "b", "float32") == []
    found = torch.load(tmp_path / "b" / official.VALUES, weights_only=True)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    message = message_of(official.export, adapter, tmp_path / "a")
    assert message == f"{tmp_path / 'a'} exists already; choose another folder or remove it"


def test_without_pytorch(tmp_path, monkeypatch, golden_base):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    adapter = native.Adapter({"base": {"dtype": "float32"}}, {}, {}, {})
    for message in (
        message_of(official.export, adapter, tmp_path / "a"),
        message_of(official.read, GOLDEN / "official" / "llama_untied", golden_base.model),
    ):
        assert message == 'the official format needs PyTorch: pip install -e ".[torch]"'
    assert not (tmp_path / "a").exists()


# Reading


@pytest.fixture(scope="module")
def golden_base():
    return load_model(str(GOLDEN / "llama_untied"))


def test_the_published_codes_files_become_a_native_adapter(golden_base, tmp_path):
    imported = official.read(GOLDEN / "official" / "llama_untied", golden_base.model)
    assert (imported.dense_parameters, imported.notes) == ({}, [])
    selection = native.Selection(1, TARGETS, rule=None)
    adapter = on_base.assemble(golden_base, imported.values, imported.columns, selection)
    native.write(tmp_path / "a", adapter)
    merged = bypass.merge(golden_base.params, on_base.load(str(tmp_path / "a"), golden_base))
    with np.load(GOLDEN / "llama_untied_k1_adamw_const.npz") as golden:
        expected = {key.partition("/")[2]: golden[key] for key in golden if key.startswith("merged_values/")}
        for name, entries in expected.items():
            slot = names.checkpoint_names(merged, golden_base.model.layers_path)[name]
            rows, columns = golden[f"positions/{name}"].T
            np.testing.assert_array_equal(imported.columns[name.removesuffix(".weight")].reshape(-1), columns)
            kernel = np.asarray(trees.get(merged, slot.path)[slot.layer])
            np.testing.assert_array_equal(kernel[rows, columns], entries)  # bit for bit
    assert len(expected) == len(imported.values) == 14


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(tied, dtype) -> a loaded random model."""
    folder = tmp_path_factory.mktemp("models")
    made = {}

    def get(tied, dtype):
        if (tied, dtype) not in made:
            path = write_model(folder / f"{tied}-{dtype}", None, tie_word_embeddings=tied, dtype=dtype)
            made[tied, dtype] = load_model(str(path), dtype)
        return made[tied, dtype]

    return get


@pytest.mark.parametrize(
    ("tied", "dtype", "k"),
    [(tied, dtype, k) for tied, dtype in ((True, "float32"), (False, "bfloat16")) for k in (1, 20)]
    + [(tied, dtype, k) for tied, dtype in ((False, "float32"), (True, "bfloat16")) for k in (2, 5)],
)
def test_there_and_back_and_the_published_formula(checkpoint, tied, dtype, k, tmp_path):
    base_model = checkpoint(tied, dtype)
    targets = TARGETS if tied else [*TARGETS, "lm_head"]
    adapter, stacked = trained(base_model, k, dtype=jnp.dtype(dtype), targets=targets)
    assert official.export(adapter, tmp_path / "out") == []
    back = official.read(tmp_path / "out", base_model.model)
    assert set(back.values) == set(adapter.values)
    for module in adapter.values:
        np.testing.assert_array_equal(back.values[module], adapter.values[module], strict=True)
        np.testing.assert_array_equal(back.columns[module], adapter.columns[module], strict=True)
    if dtype == "bfloat16":
        assert back.notes == ["bfloat16 in the file, converted to float32 without loss"]

    # The model rebuilt in PyTorch from the two files alone.
    model = transformers.AutoModelForCausalLM.from_pretrained(base_model.path, dtype=getattr(torch, dtype))
    tensors = torch.load(tmp_path / "out" / official.VALUES, weights_only=True)
    positions = np.load(tmp_path / "out" / official.POSITIONS, allow_pickle=True).item()
    merged = {}
    for name, where in positions.items():
        kernel = model.get_parameter(name).detach()
        flat = where[:, 0] * kernel.size(1) + where[:, 1]
        merged[name] = kernel.flatten().scatter_add(0, flat, tensors[f"{name}_new"].detach()).view_as(kernel)
    ours = jax.jit(bypass.merge)(base_model.params, stacked)
    slots = names.checkpoint_names(ours, base_model.model.layers_path)
    for name, kernel in merged.items():
        leaf = trees.get(ours, slots[name].path)
        leaf = np.asarray((leaf if slots[name].layer is None else leaf[slots[name].layer]).astype(jnp.float32))
        np.testing.assert_array_equal(leaf, kernel.float().numpy())
    if dtype == "float32":
        ids = np.random.default_rng(0).integers(0, 300, (2, 9)).astype(np.int32)
        with torch.no_grad():
            theirs = torch.func.functional_call(model.eval(), merged, torch.from_numpy(ids).long()).logits
        module = base_model.model.module()

        @jax.jit
        def logits_of(params):
            hidden, _ = module.apply({"params": params}, jnp.asarray(ids))
            return module.apply({"params": params}, hidden, method="unembed")

        logits = logits_of(ours)
        np.testing.assert_allclose(logits, theirs.numpy(), atol=1e-4)


# What is refused


@pytest.fixture
def spoiled(tmp_path):
    """A copy of the golden LLaMA files: `write(tensors, positions)` replaces their content."""
    folder = shutil.copytree(GOLDEN / "official" / "llama_untied", tmp_path / "spoiled")

    def write(tensors=None, positions=None):
        if tensors is not None:
            torch.save(tensors, folder / official.VALUES)
        if positions is not None:
            np.save(folder / official.POSITIONS, positions, allow_pickle=True)
        return folder

    return write


def refusal(folder, base_model):
    began = time.perf_counter()
    message = message_of(official.read, folder, base_model.model)
    assert message.startswith(str(folder)) and len(message) < 500
    assert time.perf_counter() - began < 60  # hostile files may not stall the reader
    return message


def test_files_that_are_missing(golden_base, spoiled):
    folder = spoiled()
    (folder / official.VALUES).unlink()
    assert refusal(folder, golden_base) == f"{folder / official.VALUES}: no such file"
    (folder / official.POSITIONS).unlink()
    assert refusal(folder, golden_base).startswith(f"{folder / official.POSITIONS}: cannot be read (")


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_bombs_among_the_values_do_not_go_off(golden_base, spoiled, tmp_path):
    marker = tmp_path / "marker"
    folder = spoiled({"x": Bomb(marker)})
    assert "no file of plain tensors" in refusal(folder, golden_base)
    (folder / official.VALUES).write_bytes(pickle.dumps(Bomb(marker)))
    assert "no file of plain tensors" in refusal(folder, golden_base)
    assert not marker.exists()


def k2(tensors, positions):
    """Two connections a neuron, on all maps but the first."""
    for name in list(positions)[1:]:
        rows = positions[name][:, 0].repeat_interleave(2)
        positions[name] = torch.stack([rows, torch.tensor([0, 1]).repeat(len(rows) // 2)], 1)
        tensors[f"{name}_new"] = torch.zeros(len(rows))


def spoil(what, tensors, positions):
    """The change under test, by name."""
    values, where = f"{Q}.weight_new", positions[f"{Q}.weight"]
    match what:
        case "beyond":
            where[5, 1] = 64
        case "negative":
            where[5, 1] = -1
        case "row twice":
            where[5, 0] = 4
        case "rows in another order":
            positions[f"{Q}.weight"] = where.flip(0)
        case "row missing":
            positions[f"{Q}.weight"] = where[:-1]
        case "column twice" | "descending":
            pairs = torch.stack([where[:, 0].repeat_interleave(2), torch.tensor([3, 7]).repeat(64)], 1)
            pairs[11, 1] = 3 if what == "column twice" else 2
            positions[f"{Q}.weight"], tensors[values] = pairs, torch.zeros(128)
        case "k differs":
            k2(tensors, positions)
        case "too many":
            positions[f"{Q}.weight"] = torch.zeros(64 * 65, 2, dtype=torch.int64)
        case "one field":
            positions[f"{Q}.weight"] = where[:, :1]
        case "int32":
            positions[f"{Q}.weight"] = where.int()
        case "nan":
            tensors[values] = torch.full((64,), torch.nan)
        case "infinite":
            tensors[values] = torch.full((64,), -torch.inf)
        case "float64":
            tensors[values] = torch.zeros(64, dtype=torch.float64)
        case "int64":
            tensors[values] = torch.zeros(64, dtype=torch.int64)
        case "too few":
            tensors[values] = torch.zeros(63)
        case "matrix":
            tensors[values] = torch.zeros(64, 1)
        case "sparse":
            tensors[values] = torch.zeros(64).to_sparse()
        case "meta":
            tensors[values] = torch.zeros(64, device="meta")
        case "expanded":
            tensors[values] = torch.zeros(1).expand(1 << 40)
        case "no tensor":
            tensors[values] = [0.0] * 64
        case "no values":
            del tensors[values]
        case "no positions":
            del positions[f"{Q}.weight"]
        case "module":
            positions["model.layers.9.weight"], tensors["model.layers.9.weight_new"] = where, torch.zeros(64)
        case "bias":
            positions["model.norm.bias"], tensors["model.norm.bias_new"] = where, torch.zeros(64)
        case "stranger":
            tensors["classifier.dense.weight"] = torch.zeros(2, 2)
        case "escape":
            tensors["../../x"] = torch.zeros(2, 2)
        case "head shape":
            tensors["model.norm.weight"] = torch.zeros(63)
        case "whole kernel":
            tensors[f"{Q}.weight"] = torch.zeros(64, 64)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("beyond", f"'{Q}.weight' has columns from 0 to 64, expected 0 to 63"),
        ("negative", f"'{Q}.weight' has columns from -1 to 6"),
        ("row twice", f"'{Q}.weight' must have the same number of entries in each of 64 rows"),
        ("rows in another order", f"'{Q}.weight' must have the same number of entries in each of 64 rows"),
        ("row missing", f"'{Q}.weight' is [63, 2], expected a pair for each of k connections of 64 neurons"),
        ("too many", "k up to 64"),
        ("one field", f"'{Q}.weight' is [64, 1], expected a pair"),
        ("column twice", f"'{Q}.weight' must have ascending and distinct columns in every row"),
        ("descending", f"'{Q}.weight' must have ascending and distinct columns in every row"),
        ("k differs", f"'{Q}.weight' has 1 entries per row, and others have 2"),
        ("int32", "a storage in it holds no int64 numbers"),
        ("nan", f"'{Q}.weight_new' holds NaN or infinite entries"),
        ("infinite", f"'{Q}.weight_new' holds NaN or infinite entries"),
        ("float64", f"'{Q}.weight_new' is torch.float64, expected float32, bfloat16 or float16"),
        ("int64", f"'{Q}.weight_new' is torch.int64, expected float32, bfloat16 or float16"),
        ("too few", f"'{Q}.weight_new' has shape [63], expected [64]"),
        ("matrix", f"'{Q}.weight_new' has shape [64, 1], expected [64]"),
        ("sparse", f"'{Q}.weight_new' holds no plain numbers (torch.sparse_coo, cpu)"),
        ("meta", f"'{Q}.weight_new' holds no plain numbers (torch.strided, meta)"),
        ("expanded", f"'{Q}.weight_new' has shape [1099511627776], expected [64]"),
        ("no tensor", f"'{Q}.weight_new' is list, expected a tensor"),
        ("no values", f"'{Q}.weight_new' is not both in tunable_para/state_dict_tunable.pt and in positions.npy"),
        ("no positions", f"'{Q}.weight_new' is not both in tunable_para/state_dict_tunable.pt and in positions.npy"),
        ("module", "the base model has no linear map 'model.layers.9.weight'"),
        ("bias", "'model.norm.bias_new' is not both in"),
        ("stranger", "the base model has no parameter 'classifier.dense.weight'"),
        ("escape", "the base model has no parameter '../../x'"),
        ("head shape", "'model.norm.weight' has shape [63], expected [64]"),
        ("whole kernel", f"the base model has no parameter '{Q}.weight', or one that carries a bypass"),
    ],
)
def test_content_that_does_not_fit(golden_base, spoiled, what, message):
    tensors, positions = golden_files("llama_untied")
    spoil(what, tensors, positions)
    found = refusal(spoiled(tensors, positions), golden_base)
    assert message in found, found


def test_archives_that_are_not_what_they_seem(golden_base, spoiled):
    folder = spoiled()
    path = folder / official.VALUES
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        content = {entry: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in content.items():
            archive.writestr(entry.filename, data if "data/0" not in entry.filename else bytes(100 << 20))
    assert path.stat().st_size < 1 << 20
    assert refusal(folder, golden_base) == f"{path}: refused, since it unpacks to more than its own size"
    numbers = next(data for entry, data in content.items() if entry.filename.endswith("data/0"))
    at = whole.index(numbers) + 7
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert "is damaged (its checksum differs)" in refusal(folder, golden_base)
    for size in (0, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "no file of plain tensors as torch.save writes it" in refusal(folder, golden_base)
    torch.save([torch.zeros(2)], path)
    assert refusal(folder, golden_base) == f"{path}: expected a dict of named tensors, found list"


@pytest.mark.parametrize("file", [official.POSITIONS, official.VALUES], ids=["positions", "values"])
def test_mutated_files_load_whole_or_not_at_all(golden_base, spoiled, file):
    """Positions have no checksum: a column that became another valid one cannot be told. Everything else is checked."""
    folder = spoiled()
    path = folder / file
    whole = path.read_bytes()
    params = golden_base.model.abstract_params()

    class Traced(models.Model):  # tracing the shapes would take most of the time
        def abstract_params(self):
            return params

    base_model = Traced(*golden_base.model)
    original = official.read(folder, base_model)
    rng = np.random.default_rng(0)
    messages = []
    for _ in range(100):
        mutated = bytearray(whole)
        for at in rng.integers(0, len(whole), rng.integers(1, 4)):
            mutated[at] = rng.integers(0, 256)
        kind = rng.integers(0, 4)
        if kind == 0:
            mutated = mutated[: rng.integers(0, len(whole))]
        elif kind == 1:
            at, length = rng.integers(0, len(whole)), int(rng.integers(1, 64))
            mutated[at:at] = mutated[at : at + length]
        path.write_bytes(bytes(mutated))
        try:
            found = official.read(folder, base_model)
        except UserError as error:
            messages.append(str(error))
            continue
        assert list(found.values) == list(original.values)
        for module, values in original.values.items():
            columns = found.columns[module]
            np.testing.assert_array_equal(found.values[module], values)
            assert columns.shape == values.shape and columns.dtype == np.int32 and columns.min() >= 0
            assert columns.max() < original.columns[module].max() + 128
            if file == official.VALUES:
                np.testing.assert_array_equal(columns, original.columns[module])
    assert len(messages) > 40
    assert all(message.startswith(str(folder)) and "\n" not in message for message in messages)
