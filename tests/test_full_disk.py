"""A full disk, wherever something is written: one line, and nothing that is half written."""

import contextlib
import resource
import signal

import numpy as np
import pytest
from data_helpers import CHAT, message_of
from helpers import write_model

from neuroada_jax import files
from neuroada_jax.adapters import native, on_base, peft
from neuroada_jax.pretrained import save
from neuroada_jax.pretrained.load import load_model
from neuroada_jax.training import loss_curve

LIMITS = [0, 300, 5000]  # bytes that any file can have, as if the disk were full then


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    model = load_model(str(write_model(tmp_path_factory.mktemp("model") / "m")))
    save.save(tmp_path_factory.mktemp("saved") / "m", model, model.params, CHAT)  # compiles while the disk is not full
    return model


@pytest.fixture(scope="module")
def adapter(base_model):
    columns = {
        name: np.tile(np.arange(8, dtype=np.int32), (outputs, 1))
        for name, (outputs, _) in base_model.model.linear_maps().items()
    }
    values = {name: np.ones(chosen.shape) for name, chosen in columns.items()}
    return on_base.assemble(base_model, values, columns, native.Selection(8, []))


@contextlib.contextmanager
def full_at(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def official(adapter, base_model, path):
    pytest.importorskip("torch")
    from neuroada_jax.adapters import official

    official.export(adapter, path)


WRITERS = {
    "adapter": lambda adapter, base_model, path: native.write(path, adapter),
    "supertuning": lambda adapter, base_model, path: peft.export(adapter, path, peft.Kind.SUPERTUNING, base_model),
    "shira": lambda adapter, base_model, path: peft.export(adapter, path, peft.Kind.SHIRA, base_model),
    "official": official,
    "merged": lambda adapter, base_model, path: save.save(path, base_model, base_model.params, CHAT),
    "text": lambda adapter, base_model, path: files.write_text(path, "a" * 6000),
    "loss.png": lambda adapter, base_model, path: loss_curve.loss_curve(path, [2.0, 1.0], "a run"),
}


@pytest.mark.parametrize("size", LIMITS)
@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_nothing_half(kind, size, adapter, base_model, tmp_path):
    path = tmp_path / "destination"
    with full_at(size):
        message = message_of(WRITERS[kind], adapter, base_model, path)
    assert message.startswith(f"{path}: cannot be written (")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_what_was_there(adapter, base_model, tmp_path):
    path = tmp_path / "adapter"
    native.write(path, adapter)
    before = {each: each.read_bytes() for each in path.rglob("*")}
    with full_at(300):
        message_of(native.write, path, adapter, replace=True)
    assert {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()} == before
