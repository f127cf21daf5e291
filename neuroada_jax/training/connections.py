"""What a run trains in the linear maps: connections, selected by the rule of `bypass.score`, or low-rank factors."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from neuroada_jax import models
from neuroada_jax.adapters import native
from neuroada_jax.adapters.factors import LoraOptions
from neuroada_jax.core import bypass, low_rank, quantised, random_positions, scores, selection, trees
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.core.scores import RULES, Needs, Rule, Score
from neuroada_jax.core.trees import ModulePath, Tree
from neuroada_jax.models import names
from neuroada_jax.models.losses import label_losses
from neuroada_jax.training import modules
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.step import AnyBatch, split

INPUT_BATCHES = 16  # from which the norms of inputs are taken by default


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
    statistics = _Statistics(config, model, params, paths, batches, losses).of(rule.needs)
    values: Tree = {}
    columns: Tree = {}
    for number, path in enumerate(paths):
        kernel, name = trees.get(params, path)["kernel"], ".".join(path)

        def search(tree: Tree, name: str = name, k: int = widths.get(path, section.k)) -> Tree:
            chosen, finite = _search(tree["kernel"], k, rule.score, tree.get("statistic"), name)
            return {"columns": chosen} if finite is None else {"columns": chosen, "finite": finite}

        statistic = {"by_neuron": drawn[path]} if path in drawn else statistics(number, path)
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


class _Statistics:
    """The statistics of a run's targets, see `core.scores`."""

    def __init__(
        self,
        config: RunConfig,
        model: models.Model,
        params: Tree,
        paths: list[ModulePath],
        batches: Iterable[AnyBatch] | None,
        losses: Callable[..., jax.Array],
    ) -> None:
        """Take the arguments of `choose`."""
        self._config, self._model, self._params, self._paths = config, model, params, paths
        self._batches, self._key = batches, jax.random.key(config.seed)
        # Otherwise the output layer, which is frozen as a rule, gets no gradient.
        self._losses = functools.partial(losses, output_trains=True) if ("lm_head",) in paths else losses

    def of(self, needs: Needs) -> Callable[[int, ModulePath], Tree | None]:
        """Return the function (number, path of a target) -> its statistic, or None where a score needs none."""
        match needs:
            case Needs.GRADIENT:
                sums = gradient_sums(*self._pass_over(None), self._config.training.accumulation, self._losses)
                return lambda _, path: trees.get(sums, path)
            case Needs.INPUTS:
                squares = input_squares(*self._pass_over(INPUT_BATCHES), self._config.training.accumulation, self._losses)
                return lambda _, path: {"for_all": _norms(trees.get(squares, path)["squares"])}
            case Needs.FACTORS:
                rank = self._config.bypass.rank
                return lambda number, path: _factors_of(self._kernel(path), rank, self._key_of(number))
            case Needs.SEEDS:
                return lambda number, path: scores.seeds(self._key_of(number), quantised.shape(self._kernel(path))[:-1])
        return lambda *_: None

    def _kernel(self, path: ModulePath) -> Any:
        return trees.get(self._params, path)["kernel"]

    def _key_of(self, number: int) -> jax.Array:
        return jax.random.fold_in(self._key, number)

    def _pass_over(self, default: int | None) -> tuple[nn.Module, Tree, list[ModulePath], Iterable[AnyBatch]]:
        """Return the module, its weights, the targets, and as many batches as the config asks for; None: all."""
        assert self._batches is not None
        limit = self._config.bypass.statistic_batches or default
        module = self._model.module(self._config.training.remat_policy)
        return module, self._params, self._paths, itertools.islice(self._batches, limit)


def _norms(squares: jax.Array) -> jax.Array:
    """Return the norms of inputs (*L, I); 1 for an expert that no row was routed to, whose score is then |W|."""
    return jnp.where(jnp.any(squares > 0, axis=-1, keepdims=True), jnp.sqrt(squares), 1)


@functools.partial(jax.jit, static_argnums=1)
def _factors_of(kernel: Any, rank: int, key: jax.Array) -> Tree:
    """Return `scores.factors` of a kernel whose layers may lie apart and be quantised; one of these is dense at a time."""
    if isinstance(kernel, tuple):
        return jax.tree.map(lambda *each: jnp.stack(each), *(_factors_of(layer, rank, key) for layer in kernel))
    if quantised.is_quantised(kernel):
        return quantised.by_layer(lambda own: scores.factors(quantised.dequantise(own), rank, key), kernel)
    return scores.factors(kernel, rank, key)


def gradient_sums(
    module: nn.Module,
    params: Tree,
    paths: list[ModulePath],
    batches: Iterable[AnyBatch],
    accumulation: int = 1,
    losses: Callable[..., jax.Array] = label_losses,
) -> Tree:
    """Sum the gradient of the mean loss by the target kernels over batches, at constant weights.

    The published code sums in the same way (one mean loss for each batch), but in the base dtype; here it is float32. The
    cost is a forward and a backward pass of full fine-tuning for each batch. In memory it takes a float32 array of the
    shape of every target kernel, and during a batch one more in the kernel's dtype; targets that are quantised are
    dequantised meanwhile.

    Args:
      module: the model, with its remat policy.
      params: its weights.
      paths: the targets, with kernels (*L, O, I).
      batches: the batches to sum over.
      accumulation: number of equal micro batches in which a batch is computed.
      losses: (module, variables, batch) -> the loss at every label; gradients must reach all target kernels through it.

    Returns:
      A tree with float32 (*L, O, I) under "kernel" at each of the paths.
    """
    chosen: Tree = {}
    for path in paths:
        chosen = trees.put(chosen, path, {"kernel": quantised.dense_stack(trees.get(params, path)["kernel"])})

    def variables(kernels: Tree, params: Tree) -> Tree:
        for path in paths:
            node = {**trees.get(params, path), **trees.get(kernels, path)}
            params = trees.put(params, path, node)
        return {"params": params}

    return _sums(module, params, chosen, variables, batches, accumulation, losses)


def input_squares(
    module: nn.Module,
    params: Tree,
    paths: list[ModulePath],
    batches: Iterable[AnyBatch],
    accumulation: int = 1,
    losses: Callable[..., jax.Array] = label_losses,
) -> Tree:
    """Sum the squares of every input of the targets over the tokens of batches on which the loss depends.

    Padding is not among them, nor are tokens of a last layer that reach no label. The cost is a forward and a backward pass
    of training for each batch. Arguments as in `gradient_sums`.

    Returns:
      A tree with float32 (*L, I) under "squares" at each of the paths.
    """
    zeros: Tree = {}
    for path in paths:
        *leading, _, inputs = quantised.shape(trees.get(params, path)["kernel"])
        zeros = trees.put(zeros, path, {"squares": jnp.zeros((*leading, inputs), jnp.float32)})
    variables = lambda squares, params: {"params": params, "observed": squares}  # noqa: E731
    return _sums(module, params, zeros, variables, batches, accumulation, losses, mean=False)


def _sums(
    module: nn.Module,
    params: Tree,
    arguments: Tree,
    variables: Callable[[Tree, Tree], Tree],
    batches: Iterable[AnyBatch],
    accumulation: int,
    losses: Callable[..., jax.Array],
    mean: bool = True,
) -> Tree:
    """Sum gradients of the loss by `arguments` over batches, in float32: of the mean over a batch's labels, or of the sum.

    `variables` maps (arguments, params) to the collections of the module; for the others see `gradient_sums`.
    """

    def loss_sum(arguments: Tree, params: Tree, batch: AnyBatch) -> jax.Array:
        return jnp.sum(losses(module, variables(arguments, params), batch))

    def add(sums: Tree, params: Tree, arguments: Tree, batch: AnyBatch) -> Tree:
        divisor = jnp.maximum(jnp.sum(batch.label_mask), 1) if mean else jnp.float32(1)

        def add_part(sums: Tree, part: AnyBatch) -> tuple[Tree, None]:
            gradient = jax.grad(loss_sum)(arguments, params, part)
            return jax.tree.map(lambda total, leaf: total + leaf.astype(jnp.float32) / divisor, sums, gradient), None

        return lax.scan(add_part, sums, split(batch, accumulation))[0]

    step = jax.jit(add, donate_argnums=0)
    sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), arguments)
    for batch in batches:
        sums = step(sums, params, arguments, batch)
    return sums
