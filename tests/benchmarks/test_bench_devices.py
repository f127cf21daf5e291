"""benchmarks/devices.py on a tiny model and virtual CPU devices."""

import contract
import jax
from helpers import CONFIG, NEURONS

from benchmarks import devices


def test_rows_and_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(devices.MODELS, "llama-7b", CONFIG)
    options = ["--target", "cpu", "--models", "llama-7b", "--devices", "1", "8", "--k", "1", "--length", "16"]
    with jax.numpy_dtype_promotion("standard"):  # JAX transposes its own attention in mixed precision
        devices.main([*options, "--out", str(tmp_path)])
    _, rows = contract.read(tmp_path, "devices", timed=False)
    assert contract.printed_rows(capsys.readouterr().out) == len(rows)
    meshes = [(row["devices"], row["fsdp"], row["tensor"]) for row in rows]
    assert meshes == [(1, 1, 1), (8, 1, 1), (8, 8, 1), (8, 1, 8)]
    alone, data, fsdp, tensor = rows
    assert alone["collectives"] == {} and data["summed_bytes"] == 4 * 2 * NEURONS + 8 and data["gathered_bytes"] == 0
    assert data["weight_bytes"] == alone["weight_bytes"] > 7 * fsdp["weight_bytes"] > 0
    assert fsdp["gathered_bytes"] > alone["weight_bytes"] and tensor["weight_bytes"] == fsdp["weight_bytes"]
    assert fsdp["flops"] == data["flops"] == alone["flops"]
