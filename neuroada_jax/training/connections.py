"""What a run trains in the linear maps: connections, selected by the rule of `bypass.score`, or low-rank factors."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neuroada_jax import models
from neuroada_jax.adapters import native
from neuroada_jax.adapters.factors import LoraOptions
from neuroada_jax.core import bypass, low_rank, quantised, random_positions, scores, selection, trees
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.core.scores import RULES, Rule, Score
from neuroada_jax.core.trees import ModulePath, Tree
from neuroada_jax.models import names
from neuroada_jax.models.losses import label_losses
from neuroada_jax.training import modules
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.statistics import Statistics
from neuroada_jax.training.step import AnyBatch


def value_dtype(config: RunConfig, model: models.Model) -> Any:
    """Return the dtype of values and moments: float32, or the base dtype with `fidelity: official`."""
    return model.config.dtype if config.fidelity == "official" else jnp.float32


def choose(
    config: RunConfig,
    model: models.Model,
    params: Tree,
    paths: list[ModulePath],
    batches: Iterable[AnyBatch] | None = None,
    losses: Callable[..., jax.Array] = label_losses,
    by_neuron: Callable[..., Any] = lambda function: function,
    score: Score | None = None,
) -> Bypass:
    """Return the bypass of a run before its first step: zero values at the columns that its `bypass.score` selects.

    With `method: lora` it holds low-rank factors, drawn by the run's seed.

    One map at a time is searched, so that the scores of one of its layers are all that is in memory beside a statistic.

    Args:
      config: the run.
      model: its base model.
      params: the weights of the base model.
      paths: the targets.
      batches: one pass over the training data; read, and required, only for scores that need gradients or inputs.
      losses: as in `step.make_step`; for these scores only.
      by_neuron: `modes.Parallel.by_neuron`, for sharded weights.
      score: the caller's own, for the score "custom".

    Raises:
      UserError: scores of a wrong shape, or NaN or infinite ones; names the map.
    """
    if config.method == "lora":
        return _factors(config, params, paths)
    section, dtype = config.bypass, value_dtype(config, model)
    rule = Rule(score) if score is not None else RULES[section.score]
    widths, drawn = _widths(config, model, params, paths), {}
    if widths:
        rule = Rule(scores.positions)
        drawn = _random_positions(config, model, params, paths, widths)
    statistic_of = Statistics(config, model, params, paths, batches, losses).of(rule.needs)
    values: Tree = {}
    columns: Tree = {}
    for number, path in enumerate(paths):
        kernel, name = trees.get(params, path)["kernel"], ".".join(path)

        def search(tree: Tree, name: str = name, k: int = widths.get(path, section.k)) -> Tree:
            chosen, finite = _search(tree["kernel"], k, rule.score, tree.get("statistic"), name)
            return {"columns": chosen} if finite is None else {"columns": chosen, "finite": finite}

        statistic = {"by_neuron": drawn[path]} if path in drawn else statistic_of(number, path)
        found = by_neuron(search)({"kernel": kernel} | ({} if statistic is None else {"statistic": statistic}))
        selection.check_finite(found.get("finite"), name)
        chosen = found["columns"]
        *neurons, inputs = quantised.shape(kernel)
        if section.shared_columns:
            chosen = selection.most_selected(chosen, inputs)
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        trained = _trained(config, model, path, tuple(neurons), key)
        if path in drawn:
            trained = random_positions.trained(chosen, drawn[path])
        columns = trees.put(columns, path, {"columns": chosen} | ({} if trained is None else {"trained": trained}))
        values = trees.put(values, path, {"values": jnp.zeros((*neurons, chosen.shape[-1]), dtype)})
    return Bypass(values, columns)


def _search(kernel: Any, k: int, score: Score, statistic: Any, name: str) -> tuple[jax.Array, jax.Array | None]:
    """Return `selection.search` of a stacked kernel, or of one whose layers are quantised differently and lie apart."""
    if not isinstance(kernel, tuple):
        return selection.search(kernel, k, score, statistic, name=name)
    own = [jax.tree.map(lambda leaf, at=at: leaf[at], statistic) for at in range(len(kernel))]
    each = [selection.search(layer, k, score, mine, name=name) for layer, mine in zip(kernel, own, strict=True)]
    columns, finite = zip(*each, strict=True)
    return jnp.stack(columns), None if finite[0] is None else jnp.stack(finite)


def of_equal_shapes(config: RunConfig, model: models.Model, params: Tree, paths: list[ModulePath]) -> Bypass:
    """Return a bypass with the shapes of the one that `choose` returns, for `jax.eval_shape`."""
    if config.method == "lora":
        return _factors(config, params, paths)
    section, dtype = config.bypass, value_dtype(config, model)
    widths = _widths(config, model, params, paths)
    built = bypass.build(params, paths, section.k, dtype=dtype, shared=section.shared_columns)
    values, columns = built
    for path, width in widths.items():
        shape = (*quantised.shape(trees.get(params, path)["kernel"])[:-1], width)
        values = trees.put(values, path, {"values": jnp.zeros(shape, dtype)})
        columns = trees.put(columns, path, {"columns": jnp.zeros(shape, jnp.int32), "trained": jnp.zeros(shape, bool)})
    return Bypass(values, columns)


def _matrices(
    config: RunConfig, model: models.Model, params: Tree, paths: list[ModulePath]
) -> list[list[tuple[random_positions.Place, random_positions.Matrix]]]:
    """Return the matrices that random positions are drawn from together, by `bypass.random_over`; none for "neuron"."""
    section, shapes = config.bypass, {path: quantised.shape(trees.get(params, path)["kernel"]) for path in paths}
    layers = modules.trained_layers(config, model)

    def matrix(path: ModulePath, place: tuple[int, ...]) -> random_positions.Matrix:
        *_, outputs, inputs = shapes[path]
        idle = names.is_stacked(path, model.layers_path) and place[0] not in layers
        return random_positions.Matrix(outputs, inputs, 0 if idle else outputs * min(section.k, inputs))

    if section.random_over == "neuron":
        return []
    scopes = random_positions.scopes(section.random_over, {path: shape[:-2] for path, shape in shapes.items()})
    each = [[(place, matrix(*place)) for place in scope] for scope in scopes]
    trained = [[(place, one) for place, one in scope if one.positions] for scope in each]
    return [scope for scope in trained if scope]


def _widths(config: RunConfig, model: models.Model, params: Tree, paths: list[ModulePath]) -> dict[ModulePath, int]:
    """Return the k of a map's arrays where random positions are over more than a neuron; else none."""
    found: dict[ModulePath, int] = {}
    for scope in _matrices(config, model, params, paths):
        matrices = [matrix for _, matrix in scope]
        for path, inputs in {path: matrix.inputs for (path, _), matrix in scope}.items():
            neurons = math.prod(quantised.shape(trees.get(params, path)["kernel"])[:-1])
            found[path] = max(found.get(path, 1), random_positions.width(matrices, inputs, neurons))
    return found


def _random_positions(
    config: RunConfig, model: models.Model, params: Tree, paths: list[ModulePath], widths: dict[ModulePath, int]
) -> dict[ModulePath, np.ndarray]:
    """Return the columns of random positions, int32 (*L, O, k) by map; I where there is none."""
    shapes = {path: quantised.shape(trees.get(params, path)["kernel"]) for path in paths}
    drawn = {path: np.full((*shape[:-1], widths[path]), shape[-1], np.int32) for path, shape in shapes.items()}
    for number, scope in enumerate(_matrices(config, model, params, paths)):
        places, matrices = zip(*scope, strict=True)
        found = random_positions.draw(matrices, [widths[path] for path, _ in places], [config.seed, number])
        for (path, place), own in zip(places, found, strict=True):
            drawn[path][place] = own
    return drawn


def _factors(config: RunConfig, params: Tree, paths: list[ModulePath]) -> Bypass:
    section = config.lora
    return low_rank.build(params, paths, section.r, section.resolved_alpha / section.r, jax.random.key(config.seed))


def _trained(
    config: RunConfig, model: models.Model, path: ModulePath, neurons: tuple[int, ...], key: jax.Array
) -> jax.Array | None:
    """Return which entries of a map's values (*L, O, k) train, bool (*L, O, 1) or (L, 1, 1); None where all do."""
    *stack, outputs = neurons
    count, layers = modules.trained_neurons(config, outputs), modules.trained_layers(config, model)
    trained = None
    if count < outputs:
        order = jnp.argsort(jax.random.uniform(jax.random.fold_in(key, 1), neurons), axis=-1)
        trained = (jnp.argsort(order, axis=-1) < count)[..., None]
    if names.is_stacked(path, model.layers_path) and len(layers) < stack[0]:
        of_layers = jnp.isin(jnp.arange(stack[0], dtype=jnp.int32), jnp.asarray(layers, jnp.int32))
        of_layers = of_layers.reshape(-1, *(1,) * len(neurons))
        trained = of_layers if trained is None else trained & of_layers
    return trained


def selection_of(config: RunConfig, model: models.Model, score: Score | None) -> native.Selection:
    """Return what an adapter of a run says about its connections; `score` is the caller's own, None for none."""
    if config.method == "lora":
        lora = LoraOptions(config.lora.r, config.lora.resolved_alpha)
        return native.Selection(None, config.lora.targets or [], None, config.seed, lora=lora)
    section, rule, layers = config.bypass, str(config.bypass.score), modules.trained_layers(config, model)
    if score is not None:
        rule = f"{rule}: {getattr(score, '__qualname__', type(score).__name__)}"
    options = native.SelectionOptions(
        shared_columns=section.shared_columns,
        neurons=section.neurons,
        layers=layers if len(layers) < model.config.num_layers else None,
        rank=section.rank if section.score == "lowrank" else None,
        random_over=section.random_over,
    )
    return native.Selection(section.k, section.targets or [], rule, config.seed, options)
