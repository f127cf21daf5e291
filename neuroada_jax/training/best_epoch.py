"""Selection of the best epoch: one part of an evaluation set chooses it, the other part gives the reported score.

Related work reports GLUE in this way: of a dev set of more than 5,000 rows, 1,000 choose; of a smaller one, half
(rounded up). The split depends on the seed.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import xxhash
from jaxtyping import Int64

from neuroada_jax import console, files
from neuroada_jax.adapters import native, on_base
from neuroada_jax.core import bypass
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.errors import UserError
from neuroada_jax.evaluation.scoring import Score
from neuroada_jax.pretrained.load import IdentifiedModel
from neuroada_jax.training.step import TrainState

LARGE = 5000
CHOOSING_OF_LARGE = 1000


class Split(NamedTuple):
    """The two parts of an evaluation set, as ascending row numbers."""

    choosing: Int64[np.ndarray, "c"]
    test: Int64[np.ndarray, "t"]

    def describe(self) -> dict[str, Any]:
        """Return the sizes, and a digest of the numbers that differs wherever the split does."""
        digest = xxhash.xxh3_128_hexdigest(self.choosing.tobytes() + b"|" + self.test.tobytes())
        return {"choosing_rows": len(self.choosing), "test_rows": len(self.test), "digest": digest}


def split(rows: int, seed: int) -> Split:
    """Split row numbers at random into those that choose the epoch and the test part.

    Raises:
      UserError: fewer than two rows.
    """
    if rows < 2:
        raise UserError(f"evaluation.best_epoch: a set of {rows} row(s) cannot be split in two")
    count = CHOOSING_OF_LARGE if rows > LARGE else (rows + 1) // 2
    order = np.random.default_rng([seed, rows]).permutation(rows)
    return Split(np.sort(order[:count]), np.sort(order[count:]))


def _rank(epoch: dict[str, Any]) -> float:
    return -math.inf if epoch["value"] is None else epoch["value"]


class BestEpoch:
    """Scores every epoch of a run and keeps the adapter of each that is better than all before.

    Until the run ends, epochs.jsonl has a line for every epoch and epochs/<steps>/ the adapters. A resumed run therefore
    knows the best epoch up to its checkpoint, even if the interrupted run went further.

    Attributes:
      epochs: the lines of epochs.jsonl: "epoch", "step", "metric", "value" (None if not finite) and further metrics.
    """

    def __init__(
        self, directory: Path, score: Callable[[TrainState], Score], save: Callable[[Path, TrainState], None], done: int
    ) -> None:
        """Continue after `done` steps: later epochs of an interrupted run are dropped.

        Args:
          directory: of the run.
          score: scores a state on the part that chooses.
          save: writes a state's adapter to a directory.
          done: steps done before the run was resumed; 0 for a new run.
        """
        self._score, self._save = score, save
        self._log, self._adapters = directory / "epochs.jsonl", directory / "epochs"
        lines = self._log.read_text(encoding="utf-8").splitlines() if self._log.exists() else []
        self.epochs = [epoch for epoch in map(json.loads, lines) if epoch["step"] <= done]

    def value(self, step: int) -> float | None:
        """Return the score of the epoch that ended with that step; None where there is none, or it is not finite."""
        return next((epoch["value"] for epoch in self.epochs if epoch["step"] == step), None)

    @property
    def best(self) -> dict[str, Any]:
        """The line of the first epoch with the highest value; values that are not finite rank last."""
        return max(self.epochs, key=_rank)

    def __call__(self, state: TrainState) -> None:
        """Score the state as that of the next epoch, unless its step has been scored already."""
        step = int(state.step)
        if any(epoch["step"] == step for epoch in self.epochs):
            return
        score = self._score(state)
        epoch = {"epoch": len(self.epochs) + 1, "step": step, "metric": score.metric, "value": score.value, **score.beside}
        epoch = files.finite(epoch)
        if not self.epochs or _rank(epoch) > _rank(self.best):
            self._save(self._adapters / str(step), state)
        self.epochs.append(epoch)
        files.write_text(self._log, "".join(json.dumps(each) + "\n" for each in self.epochs))
        console.say(f"epoch {epoch['epoch']}: {score.metric} {score.value:.4f}, best {_rank(self.best):.4f}")

    def restore(self, state: TrainState, base_model: IdentifiedModel) -> TrainState:
        """Return the last state with the values and the classifier of the best epoch."""
        adapter = native.read(str(self._adapters / str(self.best["step"])))
        tree: dict[str, Any] = {"bypass": on_base.stack_layers(adapter, base_model).values}
        if state.classifier:
            tree["classifier"] = on_base.classifier(adapter, base_model)
        trainable = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), tree, state.trainable)
        params = bypass.make_resident(state.params, Bypass(trainable["bypass"], state.columns), state.base_entries)
        return state._replace(trainable=trainable, params=params)
