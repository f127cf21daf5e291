"""The weights of a run, read or in memory; and columns that are selected from weights before these are quantised."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from neuroada_jax.core import quantise, selection, trees
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.core.scores import RULES
from neuroada_jax.core.trees import ModulePath, Tree
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained.load import LoadedModel, load_with_progress, with_params
from neuroada_jax.training import modules
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.preparation import Prepared


class OriginalColumns:
    """The columns of kernels that are quantised on load, selected while they are read."""

    def __init__(self, config: RunConfig, paths: list[ModulePath]) -> None:
        """Take the run, and the paths of its targets."""
        self._config, self._paths = config.bypass, set(paths)
        self._chosen: dict[ModulePath, list[np.ndarray]] = {}

    def add(self, path: ModulePath, layer: int | None, kernel: np.ndarray) -> None:
        """Select the columns of one layer's kernel; the layers come in their order."""
        if path not in self._paths:
            return
        section, name = self._config, f"{'.'.join(path)} of layer {layer}"
        found = selection.select(
            jnp.asarray(kernel), section.k, RULES[section.score].score, shared=section.shared_columns, name=name
        )
        self._chosen.setdefault(path, []).append(np.asarray(found))

    def put_into(self, built: Bypass) -> Bypass:
        """Return the bypass with these columns in the place of those that were selected from quantised kernels."""
        columns: Tree = built.columns
        for path, chosen in self._chosen.items():
            columns = trees.put(columns, path, {**trees.get(columns, path), "columns": jnp.asarray(np.stack(chosen))})
        return Bypass(built.values, columns)


def load(prepared: Prepared, loaded: LoadedModel | None) -> tuple[LoadedModel, OriginalColumns | None]:
    """Return the weights of a run, and the columns of its original weights where it selects from these.

    Args:
      prepared: the run.
      loaded: the model with its weights, where they are in memory; None: read them.

    Raises:
      UserError: weights that do not fit, or no original ones.
    """
    config, opened = prepared.config, prepared.opened
    if loaded is not None:
        if config.bypass.select_from == "original":
            raise UserError("bypass.select_from: 'original' needs weights that are read, found a model in memory")
        return with_params(opened, loaded, config.seed), None
    shardings = prepared.devices.weight_shardings(opened.abstract_params())
    section, original = config.bypass, None
    is_new = config.method == "neuroada" and not prepared.resumed_from
    if is_new and opened.model.quantization in quantise.MADE and section.select_from != "quantised":
        original = OriginalColumns(config, prepared.target_paths) if section.score in modules.OF_WEIGHTS_ALONE else None
    on_kernel: Any = None if original is None else original.add
    return load_with_progress(opened, config.seed, shardings, on_kernel=on_kernel), original
