"""Checkpoints of a run in several processes: the first one writes and reads what a run in one process does."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from neuroada_jax.core import bypass
from neuroada_jax.errors import UserError
from neuroada_jax.training import peers, processes
from neuroada_jax.training.checkpoint import Checkpoints, saved
from neuroada_jax.training.modes import Parallel
from neuroada_jax.training.resuming import digest_of_arrays
from neuroada_jax.training.step import TrainState


class SharedCheckpoints(Checkpoints):
    """The checkpoints of a run in several processes, of which only the first needs the run's directory.

    All processes make the same calls.
    """

    def __init__(self, directory: Path, keep_last: int, keep_best: int, devices: Parallel) -> None:
        """Take the devices of the run besides the arguments of `Checkpoints`."""
        super().__init__(directory, keep_last, keep_best)
        self._devices = devices

    def save(self, state: TrainState, about: dict[str, Any] | None = None, merit: float | None = None) -> None:
        """Gather the state, and save it on the first process; see `Checkpoints.save`."""
        content = self._devices.on_host(saved(state))
        if peers.current().is_first:
            self._save(int(state.step), content, about or {}, merit)

    def restore(self, state: TrainState) -> TrainState:
        """Restore what the first process reads; see `Checkpoints.restore`.

        Raises:
          UserError: also where another process did not get the arrays that the first one read.
        """
        together, expected = peers.current(), saved(state)
        blank = lambda leaf: np.zeros(leaf.shape, leaf.dtype)  # noqa: E731
        found = self._read(expected, blank) if together.is_first else jax.tree.map(blank, expected)
        found = processes.broadcast(jax.tree.map(np.asarray, found))
        came = together.share("restored", [digest_of_arrays(found), int(found["step"])])
        if others := [number for number, each in enumerate(came) if each != came[0]]:
            raise UserError(f"{self._directory / str(came[0][1])}: process {others[0]} did not get what process 0 read")

        devices = self._devices
        placed = devices.place_like(found, saved(devices.shardings(state)))
        trained = bypass.Bypass(placed["trainable"]["bypass"], placed["columns"])
        base_entries = jax.jit(devices.by_neuron(bypass.read))(state.params, trained.columns)
        params = jax.jit(devices.by_neuron(bypass.make_resident))(state.params, trained, base_entries)
        return state._replace(**placed, base_entries=base_entries, params=params)
