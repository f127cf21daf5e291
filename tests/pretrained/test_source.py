"""Sources of pretrained models: paths and hub ids that are found or refused, configs and their dtypes."""

import jax.numpy as jnp
import pytest
from data_helpers import message_of

from neuroada_jax.pretrained.source import config_dtype, read_config, resolve


def test_missing_directory(tmp_path):
    assert message_of(resolve, str(tmp_path / "nowhere")) == f"model {tmp_path / 'nowhere'} does not exist"
    assert message_of(resolve, str(tmp_path / "nowhere.gguf")) == f"model {tmp_path / 'nowhere.gguf'} does not exist"


def test_a_hub_id_that_cannot_be_had_is_one_line():
    assert message_of(resolve, "nobody/no-such-model").startswith(
        "model 'nobody/no-such-model' is neither a local path nor"
    )


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"abc")
    assert (
        message_of(read_config, str(tmp_path / "model.bin"))
        == f"{tmp_path / 'model.bin'}: expected a model directory or a .gguf file"
    )


def test_missing_config(tmp_path):
    assert (
        message_of(read_config, str(tmp_path)) == f"{tmp_path / 'config.json'}: cannot be read (No such file or directory)"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{not json", "not JSON ("),
        (b"", "not JSON ("),
        (b"\xff\xfe{}", "not JSON ("),
        (b"[1, 2]", "expected a JSON object, found list"),
    ],
)
def test_config_that_is_no_json_object(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    assert message_of(read_config, str(tmp_path)).startswith(f"{tmp_path / 'config.json'}: {message}")


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, jnp.bfloat16),
        ({"dtype": "bfloat16"}, jnp.bfloat16),
        ({"torch_dtype": "float16"}, jnp.bfloat16),
        ({"dtype": "float32"}, jnp.float32),
        ({}, jnp.float32),
    ],
)
def test_auto_takes_the_dtype_that_the_config_declares(declared, expected):
    assert config_dtype("auto", declared) == expected
    assert config_dtype("float32", declared) == jnp.float32
    assert config_dtype("bfloat16", declared) == jnp.bfloat16
