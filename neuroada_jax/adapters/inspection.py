"""The report of `neuroada inspect` on a model or an adapter: neurons, k, values, percentage and bytes of each module."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from neuroada_jax import console
from neuroada_jax.adapters import hub, native, official, peft, peft_lora
from neuroada_jax.adapters.base_model import located
from neuroada_jax.adapters.factors import Factors
from neuroada_jax.core import bypass
from neuroada_jax.pretrained.load import open_model

VALUE_BYTES = 4  # float32
INDEX_BYTES = 4  # int32


def _row(module: str, neurons: int, inputs: int | None, k: int, trained: int | None = None) -> dict[str, Any]:
    """Return the report on a map of whose values `trained` were trained, None for all; a file has the others' zeros."""
    values = neurons * k if trained is None else trained
    row = {"module": module, "neurons": neurons, "inputs": inputs, "k": k, "values": values}
    row["percent"] = None if inputs is None else 100 * values / (neurons * inputs)
    return row | {"bytes": neurons * k * (VALUE_BYTES + INDEX_BYTES)}


def _low_rank_row(module: str, pair: Factors) -> dict[str, Any]:
    """Return the report on a map with low-rank factors."""
    (rank, inputs), outputs, values = pair.a.shape, len(pair.b), pair.a.size + pair.b.size
    row = {"module": module, "neurons": outputs, "inputs": inputs, "k": None, "r": rank, "values": values}
    return row | {"percent": 100 * values / (outputs * inputs), "bytes": values * VALUE_BYTES}


def inspect(path: str, k: int) -> dict[str, Any]:
    """Return the report on an adapter in any format, or on a model with a bypass of `k` connections per neuron.

    Raises:
      UserError: neither is there, or a file is damaged.
    """
    adapter = hub.directory_if_adapter(path)
    if adapter is not None:
        return inspect_adapter(adapter) | {"path": path}
    if peft.is_adapter(path):
        return inspect_peft(path)
    if (Path(path) / "tunable_para").is_dir():
        return inspect_official(path)
    return inspect_model(path, k)


def inspect_model(path: str, k: int) -> dict[str, Any]:
    """Return the report on a bypass of `k` connections on every linear map of a model, without its weights.

    Raises:
      UserError: there is no model, or its architecture is not supported.
    """
    opened = open_model(path, config_only=True)
    model, (quantised_as, bits) = opened.model, opened.stored_as()
    total = bypass.count(model.abstract_params())
    rows = [_row(module, outputs, inputs, min(k, inputs)) for module, (outputs, inputs) in model.linear_maps().items()]
    return {
        "kind": "model",
        "path": path,
        "model_type": model.hf_config["model_type"],
        "parameters": total,
        "quantization": quantised_as,
        "bits_per_weight": bits,
        "layers": model.config.num_layers,
        "k": k,
        **_totals(rows, total),
        "modules": rows,
    }


def inspect_adapter(path: str) -> dict[str, Any]:
    """Return the report on a native adapter; its base model is not needed, since adapter.json has the inputs.

    Raises:
      UserError: there is no adapter, or a file is damaged.
    """
    adapter = native.read(path)
    base_model, inputs = adapter.metadata.get("base", {}), adapter.metadata.get("inputs", {})
    options = native.options_of(adapter.metadata)
    rows = [
        _row(module, len(values), inputs.get(module), values.shape[1], adapter.trained(module))
        for module, values in adapter.values.items()
    ]
    rows += [_low_rank_row(module, pair) for module, pair in adapter.factors.items()]
    about = {key: adapter.metadata.get(key) for key in ("version", "k", "targets", "rule", "seed", "created", "versions")}
    return {
        "kind": "adapter",
        "path": path,
        "base": base_model.get("source"),
        "base_path": located(adapter, path),
        **about,
        "selection": options._asdict(),
        "lora": adapter.metadata.get("lora"),
        "dense_parameters": sorted(adapter.dense_parameters),
        **_totals(rows, base_model.get("parameters")),
        "modules": rows,
    }


def inspect_peft(path: str) -> dict[str, Any]:
    """Return the report on a PEFT adapter; None where the base model would be needed.

    SuperTuning's flat positions do not separate neurons from columns, so that its neurons and k are unknown.

    Raises:
      UserError: there is no adapter, a file is damaged, or it is another tuner's.
    """
    if peft_lora.is_lora(path):
        return _inspect_peft_lora(path)
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
    base_model = stored.config.get("base_model_name_or_path")
    return _foreign(f"PEFT {stored.kind.value} adapter", path, base_model, list(stored.dense_parameters), rows)


def _inspect_peft_lora(path: str) -> dict[str, Any]:
    stored = peft_lora.open_stored(Path(path))
    rows = [_low_rank_row(module, pair) for module, pair in stored.pairs.items()]
    base_model = stored.config.get("base_model_name_or_path")
    found = _foreign(f"PEFT {peft_lora.TYPE} adapter", path, base_model, list(stored.dense_parameters), rows)
    return found | {"lora": stored.options._asdict()}


def inspect_official(path: str) -> dict[str, Any]:
    """Return the report on an adapter of the published code, whose pickled positions are not read: neurons and k are None.

    Raises:
      UserError: there is no adapter, a file is damaged, or PyTorch is not installed.
    """
    tensors = official.load_tensors(Path(path) / official.VALUES)
    suffix = ".weight_new"
    rows = [
        _foreign_row(name.removesuffix(suffix), None, None, tensor.numel())
        | {"bytes": tensor.numel() * tensor.element_size()}
        for name, tensor in tensors.items()
        if name.endswith(suffix)
    ]
    dense_parameters = [name for name in tensors if not name.endswith(suffix)]
    return _foreign("official adapter", path, None, dense_parameters, rows)


def _foreign(
    kind: str, path: str, base_model: Any, dense_parameters: list[str], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    about = {"kind": kind, "path": path, "version": None, "base": base_model, "dense_parameters": sorted(dense_parameters)}
    return {**about, **_totals(rows, None), "modules": rows}


def _foreign_row(module: str, neurons: int | None, k: int | None, values: int) -> dict[str, Any]:
    return {"module": module, "neurons": neurons, "inputs": None, "k": k, "values": values, "percent": None}


def _totals(rows: list[dict[str, Any]], parameters: int | None) -> dict[str, Any]:
    values = sum(row["values"] for row in rows)
    return {
        "values": values,
        "percent": None if parameters is None else 100 * values / parameters,
        "bytes": sum(row["bytes"] for row in rows),
        "kinds": _kinds(rows),
    }


def _kinds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the sums over the modules of each kind, which differ in the number of their layer alone."""
    kinds: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        name = re.sub(r"\.\d+(?=\.|$)", ".*", row["module"])
        name = name.rpartition(".*.")[2] or name
        key = (name, *(row[field] for field in ("neurons", "inputs", "k")))
        kind = kinds.setdefault(key, {**row, "module": name, "modules": 0, "values": 0, "bytes": 0})
        for field, more in (("modules", 1), ("values", row["values"]), ("bytes", row["bytes"])):
            kind[field] += more
        if row["percent"] is not None:
            kind["percent"] = 100 * kind["values"] / (kind["modules"] * row["neurons"] * row["inputs"])
    fields = ("module", "modules", "neurons", "inputs", "k", "values", "percent", "bytes")
    return [{field: kind[field] for field in fields} for kind in kinds.values()]


def print_inspection(content: dict[str, Any], *, every: bool = False) -> None:
    """Print the report: the total, then a table with a row for each kind of module.

    Args:
      content: of `inspect`.
      every: a row for each module instead.
    """

    def text(number: int | None) -> str:
        return "-" if number is None else f"{number:,}"

    for line in _summary(content):
        console.write(line)
    fields = {"module": "module", "maps": "modules", "O": "neurons", "I": "inputs", "k": "k", "values": "values"}
    if every:
        del fields["maps"]
    if content.get("lora"):
        del fields["k"]
    console.table(
        "linear maps of O neurons with I inputs" + ("" if every else " (--all: each of them)"),
        [*fields, "bytes"],
        [
            (row["module"], *(text(row[name]) for name in list(fields.values())[1:]), console.size(row["bytes"]))
            for row in content["modules" if every else "kinds"]
        ],
    )


def _selection(options: dict[str, Any]) -> dict[str, Any]:
    """Return what differs from the defaults in how the connections were selected, by the names of the summary."""
    differs = {name: value for name, value in options.items() if value != native.SelectionOptions._field_defaults[name]}
    if differs.pop("shared_columns", False):
        differs["columns"] = "shared by all neurons of a map"
    if "random_over" in differs:
        differs["positions random over"] = f"a {differs.pop('random_over')}"
    if "layers" in differs:
        differs["layers trained"] = " ".join(map(str, differs.pop("layers")))
    if "neurons" in differs:
        differs["neurons trained"] = f"{100 * differs.pop('neurons'):g} %"
    return differs


def _summary(content: dict[str, Any]) -> list[str]:
    """Return the lines above the table: what it is, and the total."""
    about = {
        "layers": content.get("layers"),
        "parameters": content.get("parameters"),
        "quantised": None if content.get("quantization") in (None, "none") else content["quantization"],
        "bits per weight of a layer": None
        if content.get("bits_per_weight") is None
        else f"{content['bits_per_weight']:.4g}",
        "base model": content.get("base"),
        "rule": content.get("rule"),
        **{f"LoRA {name}": value for name, value in (content.get("lora") or {}).items()},
        **_selection(content.get("selection") or {}),
        "seed": content.get("seed"),
        "created": content.get("created"),
    }
    known = [
        f"{name} {f'{value:,}' if name == 'parameters' else value}" for name, value in about.items() if value is not None
    ]
    kind = f"{content['model_type']} model" if content["kind"] == "model" else content["kind"]
    ks = sorted({row["k"] for row in content["modules"]}, key=str)
    k = f" (k = {' or '.join(map(str, ks))})" if None not in ks else ""
    if (content.get("selection") or {}).get("random_over", "neuron") != "neuron":
        k = f" (k = {content['k']} on average, in arrays for up to {ks[-1]})"
    share = "" if content["percent"] is None else f", {content['percent']:.4f} % of the parameters"
    total = f"total: {content['values']:,} values{k} in {len(content['modules'])} linear maps{share}"
    lines = [f"{total}, {console.size(content['bytes'])}", ", ".join([f"{kind} {content['path']}", *known])]
    if content.get("dense_parameters"):
        lines.append(f"trained densely beside them: {', '.join(content['dense_parameters'])}")
    return lines
