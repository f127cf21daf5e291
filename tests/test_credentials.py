"""A user's tokens are in no file, output or error of a run and of what it shares; nothing calls a network unasked."""

import os
import socket

import huggingface_hub.constants
import pytest
from data_helpers import message_of
from helpers import run_config, write_config, write_model, write_rows

from neuroada_jax import cli, console, credentials
from neuroada_jax.training import config_file

TOKENS = {
    name: f"{start}{name.replace('_', 'x')}{'7' * 30}"
    for name, start in [
        ("HF_TOKEN", "hf_"),
        ("HUGGING_FACE_HUB_TOKEN", "hf_"),
        ("WANDB_API_KEY", ""),
        ("OPENAI_API_KEY", "sk-"),
    ]
}


def config(folder, **sections):
    model, rows = write_model(folder / "model"), write_rows(folder / "rows.jsonl")
    test = {"name": "some", "data": str(rows), "limit": 4, "max_new_tokens": 2}
    sections = {"bypass": {"targets": ["q_proj"]}, "evaluation": {"sets": [test]}, **sections}
    return run_config(
        folder, model, rows, data={"validation": str(rows)}, merge=True, training={"save_every": 1}, **sections
    )


@pytest.mark.filterwarnings("always::neuroada_jax.errors.NeuroadaWarning")
def test_no_file_or_output_holds_a_token_and_no_network_is_asked(tmp_path, monkeypatch, capfd):
    for name, value in TOKENS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def refuse(self, address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(TOKENS["HF_TOKEN"])  # as `hf auth login` leaves it
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    path = write_config(tmp_path / "run.yaml", config(tmp_path))
    commands = [
        ["train", path],
        ["push", tmp_path / "out", "me/tiny", "--dry-run", "--out", tmp_path / "shared"],
        ["generate", "--adapter", tmp_path / "out" / "adapter", "--prompt", "a", "--max-new-tokens", "2", "--json"],
        ["inspect", tmp_path / "out" / "adapter"],
        ["train", path, f"name={TOKENS['HF_TOKEN']}"],  # refused
        ["generate", "--model", f"https://me:{TOKENS['WANDB_API_KEY']}@host/model", "--prompt", "a"],  # no such model
    ]
    codes = [cli.main([*map(str, command)]) for command in commands]
    assert codes == [0, 0, 0, 0, 2, 2]
    output = "".join(capfd.readouterr())
    assert "***" in output
    written = [each for each in tmp_path.rglob("*") if each.is_file() and "home" not in each.parts]
    assert {"results.json", "config.yaml", "README.md", "adapter.json"} <= {each.name for each in written}
    for value in TOKENS.values():
        assert value not in output
        assert [each for each in written if value.encode() in each.read_bytes()] == []


@pytest.mark.parametrize("field", ["name", "model.path", "data.train", "output", "data.system"])
@pytest.mark.parametrize(
    "value", ["hf_" + "a1" * 17, "https://me:secret@host/x", "before hf_" + "Z" * 34 + " after", os.environ["PATH"]]
)
def test_a_config_with_a_secret_is_refused_by_field(tmp_path, monkeypatch, field, value):
    monkeypatch.setenv("SOME_SECRET", os.environ["PATH"])
    content = run_config(tmp_path, tmp_path / "model", tmp_path / "rows.jsonl")
    *parents, last = field.split(".")
    node = content
    for name in parents:
        node = node.setdefault(name, {})
    node[last] = value
    message = message_of(config_file.from_dict, content, "x.yaml")
    assert message.startswith(f"x.yaml: {field}: holds a token or password") and value not in message


def test_what_is_no_secret_stays(monkeypatch):
    monkeypatch.setenv("SHORT_TOKEN", "the")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "longer than eight")
    for text in ("the hf_model of me", "https://host:80/a@b", "longer than eight", "me@host", "a://b c:d@e"):
        assert credentials.hidden(text) == text == console.visible(text) and not credentials.is_in(text)
