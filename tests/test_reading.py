"""Reading whole files: what is no regular file, and what is too large, is one line."""

import os
import threading

import pytest

from neuroada_jax import files
from neuroada_jax.errors import UserError
from neuroada_jax.training import config_file


def message(read, path):
    with pytest.raises(UserError) as found:
        read(path)
    return str(found.value)


def test_a_pipe_or_device_in_the_place_of_a_file_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "zero.json"):
        path = tmp_path / name
        for read in (files.read_json, lambda path: list(files.json_lines(path))):
            assert message(read, path) == f"{path}: not a regular file, expected one"


def test_a_config_may_come_through_a_pipe_and_ends_at_a_bound(tmp_path):
    path = tmp_path / "run.yaml"
    os.mkfifo(path)
    text = "name: x\nmodel: {path: m}\ndata: {train: t.jsonl}\noptimizer: {learning_rate: 1e-3}\ntraining: {steps: 1}\n"
    writer = threading.Thread(target=path.write_text, args=(text,))
    writer.start()
    assert config_file.load(str(path)).name == "x"
    writer.join()
    endless = tmp_path / "endless.yaml"
    endless.symlink_to("/dev/zero")
    assert "more than" in message(lambda path: config_file.load(str(path)), endless)
