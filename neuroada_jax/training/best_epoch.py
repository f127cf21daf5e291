"""Selection of the best epoch: one part of an evaluation set chooses it, the other part gives the reported score.

Related work reports GLUE in this way: of a dev set of more than 5,000 rows, 1,000 choose; of a smaller one, half
(rounded up). The split depends on the seed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from jaxtyping import Int64

from neuroada_jax import console
from neuroada_jax.errors import UserError
from neuroada_jax.evaluation.scoring import Score
from neuroada_jax.training.kept_states import KeptStates
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


class BestEpoch(KeptStates):
    """Scores every epoch of a run and keeps the adapter of each that is better than all before.

    Its lines, in epochs.jsonl: "epoch", "step", "metric", "value" (None if not finite) and further metrics.
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
        super().__init__(directory, "epochs", save, done)
        self._score = score

    def __call__(self, state: TrainState) -> None:
        """Score the state as that of the next epoch, unless its step has been scored already."""
        step = int(state.step)
        if self.line(step) is not None:
            return
        score = self._score(state)
        epoch = {
            "epoch": len(self.lines) + 1,
            "step": step,
            "metric": score.metric,
            "value": score.value,
            **score.beside,
        }
        self.add(epoch, state)
        console.say(f"epoch {epoch['epoch']}: {score.metric} {score.value:.4f}, best {self.rank(self.best):.4f}")
