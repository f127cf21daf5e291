"""The weights of a transformers model under the names of checkpoints, in which each expert has tensors of its own."""

from collections.abc import Mapping
from typing import Any

from neuroada_jax import models


def by_name(state: Mapping[str, Any], model: models.Model) -> dict[str, Any]:
    """Return the tensors of a state dict by their names in a checkpoint; those of experts are views of the stacks.

    Args:
      state: of the model in transformers, which stacks the experts' maps, gate and up in one.
      model: what it is here.
    """
    experts = model.config.experts if model.architecture.is_decoder else None
    if experts is None:
        return dict(state)
    gate, up, down = experts.maps
    found: dict[str, Any] = {}
    for name, tensor in state.items():
        name = name.replace(".mlp.", f".{experts.block}.")
        prefix, _, own = name.rpartition(".experts.")
        halves = {"gate_up_proj": (gate, up), "down_proj": (down,)}.get(own) if prefix else None
        if halves is None:
            found[name] = tensor
            continue
        for number, each in enumerate(tensor):
            for half, part in zip(halves, each.chunk(len(halves)), strict=True):
                found[f"{prefix}.experts.{number}.{half}.weight"] = part
    return found
