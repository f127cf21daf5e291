"""Checkpoints of a run through Orbax: step, values, columns, optimiser state. The only file that knows Orbax.

The base weights are not in a checkpoint, and a batch is a pure function of (seed, epoch, index), so that the step is the
data's cursor too. The columns are: those chosen by a gradient cost a pass over the data, and may differ where a GPU sums in
another order.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from neuroada_jax import bypass
from neuroada_jax.errors import UserError
from neuroada_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one run's directory; the newest `keep` stay."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self._directory, self._keep = directory, keep

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Made when first needed: a run that saves nothing has no folder of checkpoints."""
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True)
        return ocp.CheckpointManager(self._directory.resolve(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        if "_manager" in vars(self):
            self._manager.close()  # waits for saves under way

    def save(self, state: TrainState) -> None:
        """Saves in the background; what is saved is copied first, so the state may be donated at once."""
        self._manager.save(int(state.step), args=ocp.args.StandardSave(saved(state)))

    def restore(self, state: TrainState) -> TrainState:
        """The newest checkpoint put into a state that was just initialised, on whatever columns of the same shapes.

        Raises:
          UserError: there is no checkpoint, or it does not fit the state.
        """
        step = self._manager.latest_step()
        if step is None:
            raise UserError(f"{self._directory}: no checkpoint to resume from")
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, saved(state))
        try:
            found = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self._directory / str(step)}: this checkpoint cannot be resumed from ({reason})") from error
        trained = bypass.Bypass(found["trainable"]["bypass"], found["columns"])
        base = bypass.read(state.params, trained.columns)  # no step was taken: these are the original weights
        return state._replace(**found, base=base, params=bypass.make_resident(state.params, trained, base))


def saved(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds of a state, abstract or real."""
    kept = ("step", "trainable", "columns", "optimizer")
    return {field: getattr(state, field) for field in kept}
