"""Pickled dicts of tensors that are read without unpickling, and every pickle that does something else."""

import collections
import io
import os
import pickle
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import message_of

from neuroada_jax.adapters import inert_pickle

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "official" / "llama_untied" / "positions.npy"
NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def refusal(tmp_path):
    """The message about a .npy file with this content, an object to pickle or the file's bytes."""

    def refusal(content):
        path = tmp_path / "positions.npy"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.save(path, content, allow_pickle=True)
        began = time.perf_counter()
        message = message_of(inert_pickle.read_tensors, path)
        assert message.startswith(f"{path}: ") and len(message) < 500
        assert time.perf_counter() - began < 60  # hostile files may not stall the reader
        return message

    return refusal


def test_a_sound_tensor_is_read(tmp_path):
    """The crafted tensors below are refused for what they claim, not for how they are made."""
    path = tmp_path / "positions.npy"
    np.save(path, {NAME: Tensor(PAIRS, 0, (4, 2), (2, 1))}, allow_pickle=True)
    found = inert_pickle.read_tensors(path)
    np.testing.assert_array_equal(found[NAME], np.reshape(PAIRS, (4, 2)))


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker, function=os.system):
        self.marker, self.function = marker, function

    def __reduce__(self):
        return self.function, (f"touch {self.marker}",)


def test_bombs_do_not_go_off(refusal, tmp_path):
    marker = tmp_path / "marker"
    inside = io.BytesIO()
    torch.save({"x": Bomb(marker)}, inside, _use_new_zipfile_serialization=False)
    for bomb in (Bomb(marker), Bomb(marker, exec), Storage(inside.getvalue()), Storage(pickle.dumps(Bomb(marker)))):
        assert "refused, since it " in refusal({NAME: bomb})
        refusal([bomb])
    assert not marker.exists()


def test_positions_are_not_unpickled(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("unpickled")

    positions = np.load(GOLDEN, allow_pickle=True).item()
    for name in ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    found = inert_pickle.read_tensors(GOLDEN)
    assert list(found) == list(positions)
    for name, where in positions.items():
        np.testing.assert_array_equal(found[name], where.numpy())


def npy(*opcodes):
    """A .npy file with that pickle in it."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|O", "fortran_order": False, "shape": ()})
    return stream.getvalue() + b"\x80\x04" + b"".join(opcodes) + b"."


# A pair of the pair before, 60 times over: 2^60 entries for whoever compares, hashes or prints them.
NESTED = [bytes([0x68, level, 0x68, level, 0x86, 0x94]) for level in range(60)]
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        ([b"cbuiltins\neval\n", b"\x8c\x011\x85R"], "it calls 'builtins.eval', which"),
        ([b"\x8c\x02os\x8c\x06system\x93", b"\x8c\x011\x85R"], "it calls 'os.system', which"),
        ([b"(S'1'\nios\nsystem\n"], "it has the opcode STRING"),
        ([b"(\x8c\x011ios\nsystem\n"], "it has the opcode INST"),
        ([b"(cos\nsystem\n\x8c\x011o"], "it has the opcode OBJ"),
        ([b"cos\nsystem\n)\x81"], "it has the opcode NEWOBJ"),
        ([b"\x82\x01"], "it has the opcode EXT1"),
        ([TENSOR, b"}\x8c\x0c__defaults__Nsb"], "it sets the state of something that has none"),
        ([TENSOR, b"N}\x8c\x0c__defaults__Ns\x86b"], "it sets the state of something that has none"),
        ([b"]", b")R"], "it calls something that has no name"),
        ([TENSOR, b"]R"], "calls 'torch._utils._rebuild_tensor_v2' with no tuple"),
        ([b"})Ns"], "a dict in it has a key twice, or one that is no text"),
        ([b")\x94", *NESTED, b"}h\x3cNs"], "a dict in it has a key twice, or one that is no text"),
        ([b"}\x8c\x01aNs\x8c\x01aNs"], "a dict in it has a key twice, or one that is no text"),
        ([b")", b"Na"], "it appends to something that is no list"),
        ([b"Nr\xff\xff\xff\xff", b"0"], "no dict of tensors as np.save writes it"),  # a memo at a distant index
        ([b"\x8e" + struct.pack("<Q", 1 << 50)], "no dict of tensors as np.save writes it"),  # bytes that are not there
        ([b"h\x07"], "no dict of tensors as np.save writes it"),
        ([b""], "no dict of tensors as np.save writes it"),
        ([b"N"], "no dict of tensors as np.save writes it"),
        ([b"(" * 1000, b"t" * 1000], "no dict of tensors as np.save writes it"),
    ],
)
def test_pickles_that_do_something_else(refusal, opcodes, message):
    assert message in refusal(npy(*opcodes))


def storage(numbers, kind="LongStorage", count=None):
    """A storage in PyTorch's older format, which np.save has inside; `count` is what it says of itself."""
    count = len(numbers) if count is None else count
    classifier = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    parts = [b"X\x07\x00\x00\x00storage", b"ctorch\n" + kind.encode() + b"\n", b"X\x01\x00\x00\x001"]
    parts += [b"X\x03\x00\x00\x00cpu", pickle.dumps(count, 2)[2:-1], b"N"]
    reference = b"\x80\x02(" + b"".join(parts) + b"tQ."
    data = struct.pack("<q", count) + np.asarray(numbers, np.int64).tobytes()
    return b"".join([*classifier, reference, pickle.dumps(["1"], 2), data])


class Storage:
    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.content,)


class Tensor:
    """A tensor that says of itself what it likes."""

    def __init__(self, numbers, offset, size, strides, **options):
        self.content = storage(numbers, **options)
        self.arguments = (offset, size, strides, False, collections.OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (Storage(self.content), *self.arguments)


PAIRS = [0, 5, 1, 5, 2, 5, 3, 5]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            Tensor(PAIRS, 0, (1 << 40, 2), (0, 0)),
            "a tensor in it says that it is [1099511627776, 2], and its",
        ),
        (Tensor(PAIRS, 0, (1 << 70, 2), (2, 1)), "a tensor in it is no matrix"),
        (Tensor(PAIRS, 0, (0, 2), (2, 1)), "a tensor in it says that it is [0, 2]"),
        (Tensor(PAIRS, 0, (4, 2), (3, 1)), "a tensor in it reaches beyond its storage"),
        (Tensor(PAIRS, 1, (4, 2), (2, 1)), "a tensor in it reaches beyond its storage"),
        (Tensor(PAIRS, -1, (4, 2), (2, 1)), "a tensor in it is no matrix"),
        (Tensor(PAIRS, 0, (4, 2), (-2, 1)), "a tensor in it is no matrix"),
        (Tensor(PAIRS, 0, (8,), (1,)), "a tensor in it is no matrix"),
        (Tensor(PAIRS, 0, [4, 2], (2, 1)), "a tensor in it has no storage, size or strides"),
        (Tensor(PAIRS, 0, (4, 2), (2, 1), kind="CharStorage"), "a storage in it holds no int64 numbers"),
        (
            Tensor(PAIRS, 0, (4, 2), (2, 1), count=1 << 40),
            "says that it has 1099511627776 numbers, and has 8",
        ),
        (Tensor(PAIRS, 0, (4, 2), (2, 1), count=-1), "it refers to something that is no storage"),
        (None, f"'{NAME}' is no matrix of integers"),
        ([1, 2], f"'{NAME}' is no matrix of integers"),
    ],
)
def test_tensors_that_say_too_much(refusal, tensor, message):
    assert message in refusal({NAME: tensor})
