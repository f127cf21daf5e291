"""The weights of a run, read or in memory; and columns that are selected from weights before these are quantised."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from neuroada_jax.core import selection, trees
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.core.scores import RULES
from neuroada_jax.core.trees import ModulePath, Tree
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained import quantization
from neuroada_jax.pretrained.load import LoadedModel, OpenedModel, load_with_progress, with_params
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
        """Select the columns of one kernel of a layer; the layers, and the experts of each, come in their order."""
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
            built_of = trees.get(columns, path)
            of_all = jnp.asarray(np.stack(chosen).reshape(built_of["columns"].shape))
            columns = trees.put(columns, path, {**built_of, "columns": of_all})
        return Bypass(built.values, columns)


def original_columns(config: RunConfig, opened: OpenedModel, paths: list[ModulePath]) -> OriginalColumns | None:
    """Return what selects a run's columns from the original weights, None where they are not selected from these."""
    section = config.bypass
    wanted = (
        config.method == "neuroada" and section.score in modules.OF_WEIGHTS_ALONE and section.select_from != "quantised"
    )
    return OriginalColumns(config, paths) if wanted and quantization.made(opened.model) is not None else None


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
    original = None if prepared.resumed_from else original_columns(config, opened, prepared.target_paths)
    on_kernel: Any = None if original is None else original.add
    return load_with_progress(opened, config.seed, shardings, on_kernel=on_kernel), original
