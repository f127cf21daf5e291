"""Tensors of safetensors directories: one file or several, damaged files, and indexes that do not fit them."""

import json

import ml_dtypes
import numpy as np
import pytest
from data_helpers import message_of
from helpers import write_safetensors
from safetensors.numpy import save_file

from neuroada_jax.pretrained import safetensors_directory
from neuroada_jax.pretrained.safetensors_directory import SafetensorsDirectory

NAME = "layer.weight"
TENSORS = {name: np.arange(12, dtype=np.float32).reshape(3, 4) + i for i, name in enumerate(("norm", NAME, "a", "b", "c"))}


def error_of(directory):
    return message_of(SafetensorsDirectory, str(directory))


@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_read_by_name(tmp_path, shards):
    found = SafetensorsDirectory(str(write_safetensors(tmp_path, TENSORS, shards)))
    assert set(found.names()) == set(TENSORS) and found.notes == []
    for name, tensor in TENSORS.items():
        assert found.shape(name) == (3, 4) and bytes(found.raw(name)) == tensor.tobytes()
        np.testing.assert_array_equal(found.read(name), tensor)


def test_missing_shard(tmp_path):
    write_safetensors(tmp_path, TENSORS, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert error_of(tmp_path) == (
        f"{tmp_path / 'model-00002-of-00003.safetensors'}: this shard is missing, though the index names it"
    )


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_truncated_file(tmp_path, kept):
    write_safetensors(tmp_path, TENSORS, shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    assert error_of(tmp_path).startswith(f"{shard}: not a complete safetensors file (")


def test_a_file_that_is_no_safetensors_file(tmp_path):
    write_safetensors(tmp_path, TENSORS)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 9)
    assert error_of(tmp_path).startswith(f"{tmp_path / 'model.safetensors'}: not a complete safetensors file (")


def test_tensor_that_the_index_promises_and_no_shard_has(tmp_path):
    write_safetensors(tmp_path, TENSORS, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = content["weight_map"]["gone"] = content["weight_map"][NAME]
    index.write_text(json.dumps(content))
    assert error_of(tmp_path) == f"{tmp_path / file}: tensor 'gone' is missing, though the index places it there"


def test_all_tensors_of_the_shards_count_whatever_the_index_says_of_them(tmp_path):
    """As in transformers, which reads the names of the files from the index and nothing else."""
    write_safetensors(tmp_path, TENSORS, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    content["weight_map"] = {"a": files[0], "b": files[1]}
    index.write_text(json.dumps(content))
    save_file({"a": TENSORS["a"] + 100, "b": TENSORS["b"]}, tmp_path / files[1])
    save_file({name: tensor for name, tensor in TENSORS.items() if name != "b"}, tmp_path / files[0])
    found = SafetensorsDirectory(str(tmp_path))
    assert set(found.names()) == set(TENSORS)
    np.testing.assert_array_equal(found.read("a"), TENSORS["a"] + 100)  # the last shard has the last word
    assert found.notes == [f"{tmp_path}: 'a' in several shards; that of {files[1]} is used, as in transformers"]


def test_a_single_file_comes_before_an_index(tmp_path):
    write_safetensors(tmp_path, {name: tensor + 100 for name, tensor in TENSORS.items()}, shards=2)
    write_safetensors(tmp_path, TENSORS)
    found = SafetensorsDirectory(str(tmp_path))
    np.testing.assert_array_equal(found.read(NAME), TENSORS[NAME])
    files = "model.safetensors is read, as in transformers, and not the shards of model.safetensors.index.json beside it"
    assert found.notes == [f"{tmp_path}: {files}"]


@pytest.mark.parametrize("shards", [1, 2])
def test_a_file_that_the_config_names_comes_before_both(tmp_path, shards):
    write_safetensors(tmp_path, {name: tensor + 100 for name, tensor in TENSORS.items()}, shards)
    file = "model.safetensors" if shards == 1 else "model.safetensors.index.json"
    (tmp_path / file).rename(tmp_path / f"other.{file}")
    write_safetensors(tmp_path, TENSORS)
    np.testing.assert_array_equal(SafetensorsDirectory(str(tmp_path), f"other.{file}").read(NAME), TENSORS[NAME] + 100)
    for wrong in ("missing.safetensors", f"../{tmp_path.name}/{file}", ""):
        message = message_of(SafetensorsDirectory, str(tmp_path), wrong)
        assert message == (f"{tmp_path / 'config.json'}: transformers_weights names {wrong!r}, expected a file beside it")


@pytest.mark.parametrize("chunk", [5, 100])
def test_values_are_compared_whatever_they_are_stored_as(tmp_path, chunk, monkeypatch):
    monkeypatch.setattr(safetensors_directory, "_CHUNK", chunk)
    tensors = {
        **TENSORS,
        "half": TENSORS["a"].astype(np.float16),
        "brain": TENSORS["a"].astype(ml_dtypes.bfloat16),
        "last": TENSORS["a"] + np.eye(3, 4, dtype=np.float32)[::-1] * 1e-6,
        "flat": TENSORS["a"].reshape(-1),
        "zero": np.zeros(3, np.float32),
        "negative": -np.zeros(3, np.float32),
        "nan": np.full(3, np.nan, np.float32),
        "double": TENSORS["a"].astype(np.float64),
    }
    found = SafetensorsDirectory(str(write_safetensors(tmp_path, tensors)))
    for equal in (("a", "a"), ("a", "half"), ("half", "brain"), ("zero", "negative")):
        assert found.same_values(*equal)
    for different in (("a", "b"), ("a", "last"), ("a", "flat"), ("nan", "nan"), ("zero", "a")):
        assert not found.same_values(*different)
    assert "tensor 'double' is stored as F64" in message_of(found.same_values, "a", "double")


def test_a_tensor_in_a_dtype_that_is_no_plain_float(tmp_path):
    write_safetensors(tmp_path, TENSORS | {NAME: np.zeros((3, 4), ml_dtypes.float8_e4m3fn)})
    message = f"{tmp_path / 'model.safetensors'}: tensor {NAME!r} is stored as F8_E4M3, expected one of F32, F16, BF16"
    assert message_of(SafetensorsDirectory(str(tmp_path)).read, NAME) == message


@pytest.mark.parametrize("escape", ["../x.safetensors", "{parent}/x.safetensors", "sub/../../x.safetensors", ".."])
def test_an_index_that_leaves_the_directory(tmp_path, escape):
    save_file(TENSORS, tmp_path / "x.safetensors")
    directory = write_safetensors(tmp_path / "model", TENSORS, shards=2)
    (directory / "sub").mkdir()
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], escape.format(parent=tmp_path))
    index.write_text(json.dumps(content))
    message = error_of(directory)
    assert str(directory) in message
    assert escape == ".." or "the index names a file outside the directory" in message


@pytest.mark.parametrize(
    "content",
    ["{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ["b"]}}'],
)
def test_an_index_without_a_map_of_files(tmp_path, content):
    write_safetensors(tmp_path, TENSORS, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert str(tmp_path / "model.safetensors.index.json") in error_of(tmp_path)


def test_missing_weights(tmp_path):
    write_safetensors(tmp_path, TENSORS)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text("{}")
    nothing = f"{tmp_path}: found neither model.safetensors nor model.safetensors.index.json"
    hint = "(save_pretrained of transformers writes model.safetensors)"
    assert error_of(tmp_path) == f"{nothing} {hint.replace('(', '(where a repository has other weights alone, ')}"
    (tmp_path / "pytorch_model.bin").touch()
    assert error_of(tmp_path) == f"{nothing}, only pytorch_model.bin {hint}"
    for name in ("model.fp16.safetensors", "tf_model.h5", "model-q8.gguf", "a.pt"):
        (tmp_path / name).touch()
    names = "a.pt, model-q8.gguf, model.fp16.safetensors, pytorch_model.bin, ..."
    assert error_of(tmp_path) == f"{nothing}, only {names} {hint}"
