"""What `neuroada inspect` tells of a model or an adapter: neurons, k, values, percentage and bytes of every module."""

from collections.abc import Iterator
from typing import Any

from neuroada_jax import bypass, weights
from neuroada_jax.formats import native
from neuroada_jax.models import names

VALUE_BYTES = 4  # float32
INDEX_BYTES = 4  # int32


def _row(module: str, neurons: int, inputs: int | None, k: int) -> dict[str, Any]:
    values = neurons * k
    row = {"module": module, "neurons": neurons, "inputs": inputs, "k": k, "values": values}
    row["percent"] = None if inputs is None else 100 * k / inputs
    return row | {"bytes": values * (VALUE_BYTES + INDEX_BYTES)}


def inspect_model(path: str, k: int) -> dict[str, Any]:
    """What a bypass of `k` connections on every linear map of a model would hold. Reads the config, not the weights.

    Raises:
      UserError: no model there, or one that is not supported.
    """
    model = weights.open_model(path, config_only=True).model
    params = model.abstract_params()
    total = bypass.count(params)

    def modules() -> Iterator[dict[str, Any]]:
        for where, kernel in bypass.kernels(params):
            outputs, inputs = kernel.shape[-2:]
            for module in names.module_names(where, kernel, model.stack):
                yield _row(module, outputs, inputs, min(k, inputs))

    rows = list(modules())
    return {
        "kind": "model",
        "path": path,
        "model_type": model.hf_config["model_type"],
        "parameters": total,
        "layers": model.config.num_layers,
        **_totals(rows, total),
        "modules": rows,
    }


def inspect_adapter(path: str) -> dict[str, Any]:
    """What an adapter holds. Its base is not needed: adapter.json knows the inputs of every module.

    Raises:
      UserError: no whole adapter there.
    """
    adapter = native.read(path)
    base, inputs = adapter.metadata.get("base", {}), adapter.metadata.get("inputs", {})
    rows = [_row(module, len(values), inputs.get(module), values.shape[1]) for module, values in adapter.values.items()]
    about = {key: adapter.metadata.get(key) for key in ("version", "k", "targets", "rule", "seed", "created", "versions")}
    return {
        "kind": "adapter",
        "path": path,
        "base": base.get("source"),
        **about,
        **_totals(rows, base.get("parameters")),
        "modules": rows,
    }


def _totals(rows: list[dict[str, Any]], parameters: int | None) -> dict[str, Any]:
    values = sum(row["values"] for row in rows)
    return {
        "values": values,
        "percent": None if parameters is None else 100 * values / parameters,
        "bytes": sum(row["bytes"] for row in rows),
    }
