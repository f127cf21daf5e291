"""What a trained member leaves: its adapter, and its scores on the evaluation sets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from neuroada_jax import console
from neuroada_jax.adapters import on_base
from neuroada_jax.core import bypass, low_rank
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.core.trees import Tree
from neuroada_jax.models import dense_modules
from neuroada_jax.sweeping.group import Start
from neuroada_jax.sweeping.starts import Weights
from neuroada_jax.training import connections


def save(directory: Path, start: Start, trained: Tree, weights: Weights) -> None:
    """Write the adapter of a member.

    Args:
      directory: of the adapter, which is replaced.
      start: the member.
      trained: its values, and classifier.
      weights: of the sweep.
    """
    on_base.save(
        directory,
        Bypass(trained["bypass"], start.state.columns),
        weights.base_model,
        connections.selection_of(start.rows.config, weights.base_model.model, None),
        classifier=trained.get("classifier"),
        form=start.rows.objective.form,
        replace=True,
    )


def scores(start: Start, trained: Tree, weights: Weights) -> dict[str, Any]:
    """Score a member on the evaluation sets, by name: its values are in the weights meanwhile. Arguments as in `save`."""
    if not start.rows.scorers:
        return {}
    state = start.state
    own = Bypass(trained["bypass"], state.columns)
    params = _put_in(weights.params, own, state.base_entries)
    tuned = low_rank.beside(bypass.with_values(params, own), own)
    tuned = dense_modules.join(tuned, trained.get("classifier", {}))
    found = {}
    for name, scorer in start.rows.scorers.items():
        with console.bar(f"evaluating {name}") as bar:
            rows = range(len(scorer.rows))
            predictions = scorer.predict(weights.base_model, tuned, rows, console.reporter(bar))
        found[name] = scorer.judge(predictions).to_json()
    weights.params = _take_out(params, state.columns, state.base_entries)
    return found


_put_in: Callable[..., Tree] = jax.jit(bypass.make_resident, donate_argnums=0)
_take_out: Callable[..., Tree] = jax.jit(bypass.unmerge, donate_argnums=0)
