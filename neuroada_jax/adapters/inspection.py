"""What `neuroada inspect` tells of a model or an adapter: neurons, k, values, percentage and bytes of every module."""

from pathlib import Path
from typing import Any

import numpy as np

from neuroada_jax import console
from neuroada_jax.adapters import native, official, peft
from neuroada_jax.core import bypass
from neuroada_jax.pretrained.load import open_model

VALUE_BYTES = 4  # float32
INDEX_BYTES = 4  # int32


def _row(module: str, neurons: int, inputs: int | None, k: int) -> dict[str, Any]:
    values = neurons * k
    row = {"module": module, "neurons": neurons, "inputs": inputs, "k": k, "values": values}
    row["percent"] = None if inputs is None else 100 * k / inputs
    return row | {"bytes": values * (VALUE_BYTES + INDEX_BYTES)}


def inspect(path: str, k: int) -> dict[str, Any]:
    """What a model (with a bypass of `k` connections), or an adapter in any format, holds.

    Raises:
      UserError: neither is there, or it is not whole.
    """
    if native.is_adapter(path):
        return inspect_adapter(path)
    if peft.is_adapter(path):
        return inspect_peft(path)
    if (Path(path) / "tunable_para").is_dir():
        return inspect_official(path)
    return inspect_model(path, k)


def inspect_model(path: str, k: int) -> dict[str, Any]:
    """What a bypass of `k` connections on every linear map of a model would hold. Reads the config, not the weights.

    Raises:
      UserError: no model there, or one that is not supported.
    """
    model = open_model(path, config_only=True).model
    total = bypass.count(model.abstract_params())
    rows = [_row(module, outputs, inputs, min(k, inputs)) for module, (outputs, inputs) in model.linear_maps().items()]
    return {
        "kind": "model",
        "path": path,
        "model_type": model.hf_config["model_type"],
        "parameters": total,
        "layers": model.config.num_layers,
        "k": k,
        **_totals(rows, total),
        "modules": rows,
    }


def inspect_adapter(path: str) -> dict[str, Any]:
    """What an adapter holds. Its base is not needed: adapter.json knows the inputs of every module.

    Raises:
      UserError: no whole adapter there.
    """
    adapter = native.read(path)
    base_model, inputs = adapter.metadata.get("base", {}), adapter.metadata.get("inputs", {})
    rows = [_row(module, len(values), inputs.get(module), values.shape[1]) for module, values in adapter.values.items()]
    about = {key: adapter.metadata.get(key) for key in ("version", "k", "targets", "rule", "seed", "created", "versions")}
    return {
        "kind": "adapter",
        "path": path,
        "base": base_model.get("source"),
        **about,
        **_totals(rows, base_model.get("parameters")),
        "modules": rows,
    }


def inspect_peft(path: str) -> dict[str, Any]:
    """What a PEFT adapter holds; null where only the base knows: SuperTuning's positions do not tell rows from columns.

    Raises:
      UserError: no whole adapter there, or another tuner's.
    """
    stored = peft.open_stored(Path(path))
    rows = []
    for module, count in stored.entries.items():
        neurons = k = None
        if stored.kind is peft.Kind.SHIRA:
            per_neuron = np.unique(stored.indices[module][0, :count], return_counts=True)[1]
            neurons, k = len(per_neuron), int(per_neuron.max())
        length = len(stored.values[module])
        indices = stored.indices[module].size
        rows.append(
            _foreign_row(module, neurons, k, count)
            | {"padding": length - count, "bytes": length * VALUE_BYTES + indices * INDEX_BYTES}
        )
    about = {
        "version": None,
        "base": stored.config.get("base_model_name_or_path"),
        "dense_parameters": sorted(stored.dense_parameters),
    }
    return {"kind": f"PEFT {stored.kind.value} adapter", "path": path, **about, **_totals(rows, None), "modules": rows}


def inspect_official(path: str) -> dict[str, Any]:
    """What an adapter of the published code holds, without its pickled positions: rows and columns are null.

    Raises:
      UserError: no whole adapter there, or PyTorch is not installed.
    """
    tensors = official.load_tensors(Path(path) / official.VALUES)
    suffix = ".weight_new"
    rows = [
        _foreign_row(name.removesuffix(suffix), None, None, tensor.numel())
        | {"bytes": tensor.numel() * tensor.element_size()}
        for name, tensor in tensors.items()
        if name.endswith(suffix)
    ]
    dense_parameters = sorted(name for name in tensors if not name.endswith(suffix))
    return {
        "kind": "official adapter",
        "path": path,
        "base": None,
        "dense_parameters": dense_parameters,
        **_totals(rows, None),
        "modules": rows,
    }


def _foreign_row(module: str, neurons: int | None, k: int | None, values: int) -> dict[str, Any]:
    return {"module": module, "neurons": neurons, "inputs": None, "k": k, "values": values, "percent": None}


def _totals(rows: list[dict[str, Any]], parameters: int | None) -> dict[str, Any]:
    values = sum(row["values"] for row in rows)
    return {
        "values": values,
        "percent": None if parameters is None else 100 * values / parameters,
        "bytes": sum(row["bytes"] for row in rows),
    }


def print_inspection(content: dict[str, Any]) -> None:
    """The table that `neuroada inspect` shows."""

    def text(number: int | None) -> str:
        return "-" if number is None else f"{number:,}"

    rows = content["modules"]
    neurons = [row["neurons"] for row in rows]
    ks = {row["k"] for row in rows}
    everything = {
        "module": "all",
        "neurons": None if None in neurons else sum(neurons),
        "k": ks.pop() if len(ks) == 1 else None,
    }
    console.table(
        f"{content['kind']} {content['path']}",
        ("module", "neurons", "k", "values", "% of weights", "bytes"),
        [
            (
                row["module"],
                text(row["neurons"]),
                text(row["k"]),
                text(row["values"]),
                "-" if row["percent"] is None else f"{row['percent']:.4f}",
                console.size(row["bytes"]),
            )
            for row in [*rows, everything | {name: content[name] for name in ("values", "percent", "bytes")}]
        ],
    )
