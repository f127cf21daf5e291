"""States of a run that were scored: a line for each, and the adapter of every one that is better than all before."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from neuroada_jax import files
from neuroada_jax.adapters import native, on_base
from neuroada_jax.core import bypass
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained.load import IdentifiedModel
from neuroada_jax.training import peers, processes
from neuroada_jax.training.modes import Parallel
from neuroada_jax.training.step import TrainState


def _is_sound(line: Any) -> bool:
    """Return whether a line has what ranks its state."""
    if not isinstance(line, dict) or type(line.get("step")) is not int or line["step"] < 0:
        return False
    return "value" in line and type(line["value"]) in (int, float, type(None)) and abs(line["value"] or 0) < 2**63


class KeptStates:
    """Scores of states in <name>.jsonl, and until the run ends the adapters of the best so far in <name>/<steps>/.

    A resumed run therefore knows the best state up to its checkpoint, even if the interrupted run went further. A line of
    step 0, the state before the training, is for comparison alone: it is not kept, and never the best. Adapters that no
    checkpoint needs are removed; those of a finished run are all gone but the run's own, which is the best one's.

    Attributes:
      lines: those of the file: each with a "step" and a "value" (None if not finite).
      lower_is_better: whether the state with the lowest value is the best.
    """

    lower_is_better: ClassVar[bool] = False

    def __init__(self, directory: Path, name: str, save: Callable[[Path, TrainState], None], done: int) -> None:
        """Continue after `done` steps: later lines of an interrupted run are dropped.

        Args:
          directory: of the run.
          name: of the file and of the folder of adapters.
          save: writes a state's adapter to a directory.
          done: steps done before the run was resumed; 0 for a new run.

        Raises:
          UserError: a line of the file that is damaged; names it.
        """
        self._directory, self._save = directory, save
        self._log, self._adapters = directory / f"{name}.jsonl", directory / name
        self.lines: list[dict[str, Any]] = peers.current().from_first(name, lambda: self._read(done))

    def _read(self, done: int) -> list[dict[str, Any]]:
        lines = []
        for number, line in files.json_lines(self._log) if self._log.exists() else []:
            if not _is_sound(line):
                raise UserError(
                    f"{self._log}:{number}: damaged, expected an object with a number as 'step' and as 'value'; it says "
                    "which state is the best: repair the line, or start again with --overwrite"
                )
            if line["step"] <= done:
                lines.append(line)
        return lines

    def line(self, step: int) -> dict[str, Any] | None:
        """Return the line of the state after that step; None where there is none."""
        return next((line for line in self.lines if line["step"] == step), None)

    def rank(self, line: dict[str, Any]) -> float:
        """Return a number that is the higher the better; values that are not finite rank last."""
        value = -math.inf if line["value"] is None else float(line["value"])
        return -value if self.lower_is_better and math.isfinite(value) else value

    def score(self, step: int) -> float | None:
        """Return the rank of the state after that step; None where it has no line or no finite value."""
        line = self.line(step)
        return None if line is None or line["value"] is None else self.rank(line)

    @property
    def best(self) -> dict[str, Any]:
        """The line of the first of the best states after a step."""
        return self._best()

    def _best(self, until: int | float = math.inf) -> dict[str, Any]:
        lines = [line for line in self.lines if 0 < line["step"] <= until]
        if not lines:
            raise UserError(f"{self._log}: has no line of a state, so the best one is not known; --overwrite starts again")
        return max(lines, key=self.rank)

    @property
    def start(self) -> dict[str, Any] | None:
        """The line of the state before the training; None where it was not scored."""
        return self.line(0)

    def add(self, line: dict[str, Any], state: TrainState) -> None:
        """Append the line of a state, and save its adapter if it is better than all before."""
        line = files.finite(line)
        self.lines.append(line)
        if line["step"] and self.best is line:
            self._save(self._adapters / str(line["step"]), state)
            self._remove_others()
        files.write_text(self._log, "".join(json.dumps(each) + "\n" for each in self.lines))

    def _remove_others(self) -> None:
        """Remove adapters but the best one and those that would be the best of a run resumed from a checkpoint."""
        # The directory of a checkpoint that is being written begins with its step, too.
        found = [path.name.partition(".")[0] for path in self._directory.glob("checkpoints/*")]
        steps = [int(name) for name in found if name.isdigit()]
        first = min((line["step"] for line in self.lines if line["step"]), default=0)
        needed = {str(self._best(until)["step"]) for until in [*(step for step in steps if step >= first), math.inf]}
        for path in self._adapters.glob("[0-9]*"):
            if path.name not in needed:
                shutil.rmtree(path, ignore_errors=True)

    def restore(self, state: TrainState, base_model: IdentifiedModel, devices: Parallel) -> TrainState:
        """Return the last state with the values and the classifier of the best one, on the run's devices.

        Raises:
          UserError: the adapter of the best state is gone.
        """
        if peers.current().is_first:
            adapter = native.read(str(self._adapter_of_best()))
            tree: dict[str, Any] = {"bypass": on_base.stack_layers(adapter, base_model).values}
            if state.classifier:
                tree["classifier"] = on_base.classifier(adapter, base_model)
            trainable = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), tree, state.trainable)
        else:
            trainable = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state.trainable)
        write = bypass.make_resident
        if peers.current().count > 1:
            trainable = processes.broadcast(jax.tree.map(np.asarray, trainable))
            trainable = devices.place_like(trainable, devices.shardings(state).trainable)
            write = jax.jit(devices.by_neuron(bypass.make_resident))
        params = write(state.params, Bypass(trainable["bypass"], state.columns), state.base_entries)
        return state._replace(trainable=trainable, params=params)

    def _adapter_of_best(self) -> Path:
        """Return the directory of the best state's adapter: of a run that has finished before, its own adapter."""
        step = self.best["step"]
        kept, results = self._adapters / str(step), self._directory / "results.json"
        if not kept.exists() and results.exists():
            content = files.read_json(results)
            finished = (content.get("validation") or {}).get("best_step"), (content.get("best_epoch") or {}).get("step")
            if step in finished:
                return self._directory / "adapter"
        return kept
