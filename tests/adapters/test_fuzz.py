"""Mutated adapters in every format: each is refused in one line, or is read as what it still is. Never a crash."""

import contextlib
import importlib.util
import json

import numpy as np
import pytest
from helpers import write_model

from neuroada_jax.adapters import inspection, native, on_base, peft
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained.load import load_model

MUTATIONS = 200  # of each format
TARGETS = {"self_attn.k_proj": (32, 64), "mlp.down_proj": (64, 96)}  # out of the seven; (O, I)
HEAD = "lm_head.weight"
JUNK = [None, True, -1, 0, 1.5, 2**70, float("nan"), "", "\ud800", "../x", [], [[1]], {}, {"a": []}, "SHIRA", "float64"]


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    fields = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False}
    return load_model(str(write_model(path, None, vocab_size=32, **fields)))


@pytest.fixture(scope="module")
def adapter(base_model):
    rng = np.random.default_rng(0)
    columns, values = {}, {}
    for name, (outputs, inputs) in TARGETS.items():
        for layer in range(2):
            chosen = rng.permuted(np.tile(np.arange(inputs), (outputs, 1)), axis=1)[:, :2]
            columns[f"model.layers.{layer}.{name}"] = np.sort(chosen, axis=1)
            values[f"model.layers.{layer}.{name}"] = rng.standard_normal((outputs, 2))
    dense_parameters = {HEAD: rng.standard_normal((32, 64))}
    return on_base.assemble(base_model, values, columns, native.Selection(2, list(TARGETS)), dense_parameters)


class Native:
    """With its digest, which notices everything in the tensors."""

    @staticmethod
    def write(adapter, directory, base_model):
        native.write(directory, adapter)

    @staticmethod
    def read(directory, base_model):
        found = native.read(str(directory))
        on_base.stack_layers(found, base_model)
        on_base.dense_slots(base_model.model, found.dense_parameters, found.values)
        return found


class NativeWithoutDigest(Native):
    """As the first releases wrote it."""

    @staticmethod
    def write(adapter, directory, base_model):
        native.write(directory, adapter)
        metadata = json.loads((directory / "adapter.json").read_text())
        del metadata["digest"]
        (directory / "adapter.json").write_text(json.dumps(metadata))


class SuperTuning:
    kind = peft.Kind.SUPERTUNING

    @classmethod
    def write(cls, adapter, directory, base_model):
        peft.export(adapter, directory, cls.kind, base_model)

    @classmethod
    def read(cls, directory, base_model):
        return peft.read(directory, base_model.model, cls.kind)


class Shira(SuperTuning):
    kind = peft.Kind.SHIRA


class Official:
    @staticmethod
    def write(adapter, directory, base_model):
        from neuroada_jax.adapters import official

        official.export(adapter, directory)

    @staticmethod
    def read(directory, base_model):
        from neuroada_jax.adapters import official

        return official.read(directory, base_model.model)


FORMATS = [Native, NativeWithoutDigest, SuperTuning, Shira]
if importlib.util.find_spec("neuroada_jax.adapters.official"):
    FORMATS.append(Official)


# Mutations: each takes a file's bytes and gives others, and whether what it changed may be another, sound adapter.


def header_of(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header, data):
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def flip_bits(rng, content, suffix):
    changed = bytearray(content)
    places = rng.integers(0, len(content), rng.integers(1, 9))
    for place in places:
        changed[place] ^= 1 << rng.integers(8)
    return bytes(changed), suffix != ".json" and places.max() >= data_start(content, suffix)


def data_start(content, suffix):
    return 8 + int.from_bytes(content[:8], "little") if suffix == ".safetensors" else 0


def flip_data(rng, content, suffix):
    start = data_start(content, suffix)
    changed = bytearray(content)
    changed[rng.integers(start, len(content))] ^= 1 << rng.integers(8)
    return bytes(changed), suffix != ".json"


def truncate(rng, content, suffix):
    return content[: rng.integers(0, len(content))], False


def insert_bytes(rng, content, suffix):
    place = int(rng.integers(0, len(content)))
    return content[:place] + rng.bytes(int(rng.integers(1, 9))) + content[place:], suffix != ".json"


def replace_block(rng, content, suffix):
    place, size = int(rng.integers(0, len(content))), int(rng.integers(1, 65))
    changed = content[:place] + rng.bytes(size) + content[place + size :]
    return changed, suffix != ".json" and place + size > data_start(content, suffix)


def swap_tensors(rng, content, suffix):
    if suffix != ".safetensors":
        return flip_bits(rng, content, suffix)
    header, data = header_of(content)
    first, second = rng.choice([name for name in header if name != "__metadata__"], 2, replace=False)
    header[first], header[second] = header[second], header[first]
    return with_header(header, data), True


def edit_json(rng, content, suffix):
    """Another value somewhere in adapter.json, adapter_config.json or a safetensors header."""
    if suffix not in (".json", ".safetensors"):
        return flip_bits(rng, content, suffix)
    tree, data = (json.loads(content), b"") if suffix == ".json" else header_of(content)
    node, key = tree, None
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = keys[rng.integers(len(keys))]
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.2:
            break
        node = node[key]
    edit = rng.integers(4)
    if edit == 0:
        del node[key]
    elif edit == 1 and isinstance(node, dict):
        node[f"{key}x"] = node.pop(key)
    elif edit == 2 and isinstance(node[key], int | float) and not isinstance(node[key], bool):
        node[key] = node[key] + type(node[key])(rng.choice([-1, 1, 2**20]))
    else:
        node[key] = JUNK[rng.integers(len(JUNK))]
    if suffix == ".json":
        return json.dumps(tree).encode("utf-8", "surrogatepass"), False
    return with_header(tree, data), False


MUTATORS = [flip_bits, flip_data, truncate, insert_bytes, replace_block, swap_tensors, edit_json, edit_json]


def assert_sound(found, original):
    """Our own check, which shares no code with the readers."""
    assert found.values.keys() == found.columns.keys() and found.values
    for module, values in found.values.items():
        outputs, inputs = TARGETS[".".join(module.split(".")[3:])]
        columns = found.columns[module]
        assert module in original.values and values.dtype == np.float32 and columns.dtype == np.int32
        assert values.shape == columns.shape == (outputs, values.shape[1]) and np.isfinite(values).all()
        for row in columns:
            assert list(row) == sorted(set(row)) and row[0] >= 0 and row[-1] < inputs
    for name, classifier in found.dense_parameters.items():
        assert (
            name == HEAD
            and classifier.dtype == np.float32
            and classifier.shape == (32, 64)
            and np.isfinite(classifier).all()
        )


def assert_identical(found, original, where=""):
    for left, right in (
        (found.values, original.values),
        (found.columns, original.columns),
        (found.dense_parameters, original.dense_parameters),
    ):
        assert left.keys() == right.keys(), where
        assert all(leaf.tobytes() == right[name].tobytes() for name, leaf in left.items()), where


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.__name__)
def test_mutations(form, base_model, adapter, tmp_path):
    rng = np.random.default_rng(20)
    directory = tmp_path / "x"
    form.write(adapter, directory, base_model)
    assert_identical(form.read(directory, base_model), adapter)
    contents = {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
    outcomes = {"refused": 0, "the same": 0, "another": 0}
    for number in range(MUTATIONS):
        path = list(contents)[rng.integers(len(contents))]
        mutate = MUTATORS[number % len(MUTATORS)]
        mutated, may_differ = mutate(rng, contents[path], path.suffix)
        path.write_bytes(mutated)
        where = f"{form.__name__} mutation {number}: {mutate.__name__} of {path.name}"
        try:
            found = form.read(directory, base_model)
        except UserError as error:
            outcomes["refused"] += 1
            if not str(error):
                raise AssertionError(f"{where}: refused without a word") from error
        except Exception as error:
            raise AssertionError(f"{where}: {error!r}") from error
        else:
            assert_sound(found, adapter)
            if may_differ:
                outcomes["another"] += 1
            else:
                outcomes["the same"] += 1
                assert_identical(found, adapter, where)
        with contextlib.suppress(UserError):
            inspection.inspect(str(directory), 1)
        path.write_bytes(contents[path])
    assert_identical(form.read(directory, base_model), adapter)
    assert MUTATIONS // 3 < outcomes["refused"] < MUTATIONS
