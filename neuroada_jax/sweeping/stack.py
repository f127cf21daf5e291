"""The members of a sweep as one stacked state, and the step that takes all of them one step further.

The frozen weights are there once. Values, moments, columns and base entries have a leading axis of members. On a GPU the
step is one `jax.vmap` over the members: W + D is formed for one layer of all members at a time and never kept. On a CPU,
where a batched product has nothing to gain, one program takes the members in turns: each writes its values into the
resident weights and takes them out again, so that activations are there once as well.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, UInt32

from neuroada_jax.core import bypass, platform
from neuroada_jax.core.trees import Tree
from neuroada_jax.models import dense_modules
from neuroada_jax.training import optimizer, step
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.step import AnyBatch, StepMetrics, TrainState


class Stack(NamedTuple):
    """The states of several members, every leaf with a leading axis of members.

    Attributes:
      state: their train states, with empty `params`: the weights are those of the base model, and shared.
      rates: learning rates by step, of values and classifier.
      seeds: of their dropout masks.
    """

    state: TrainState
    rates: dict[str, Float[Array, "members steps"]]
    seeds: UInt32[Array, "members"]


def fresh(state: TrainState, config: RunConfig) -> TrainState:
    """Return a member's state before its first step, with the moments of its optimiser.

    Args:
      state: from `step.initial_state`; its `params` and `opt_state` are not used.
      config: of the member.
    """
    moments = optimizer.build(config.optimizer, 1, config.classifier).init(state.trainable)
    return state._replace(params={}, opt_state=moments)


def stacked(states: Sequence[TrainState], configs: Sequence[RunConfig], total_steps: int) -> Stack:
    """Return the stack of members' states.

    Args:
      states: from `fresh`, or what has become of it.
      configs: of the members.
      total_steps: of each of them.
    """
    rates = [_rates(config, total_steps) for config in configs]
    return Stack(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *states),
        {name: jnp.stack([own[name] for own in rates]) for name in optimizer.TRAINED},
        jnp.asarray(np.array([config.seed for config in configs], np.uint32)),
    )


def _rates(config: RunConfig, total_steps: int) -> dict[str, Float[Array, "steps"]]:
    """Return the learning rate of every step, so that members with other schedules share a program."""
    counts = jnp.arange(total_steps, dtype=jnp.int32)
    schedules = optimizer.schedules_of(config.optimizer, total_steps, config.classifier)
    with jax.numpy_dtype_promotion("standard"):  # as in the step: optax mixes int32 counts and float32
        return {
            name: jnp.broadcast_to(jnp.asarray(jax.vmap(rate)(counts), jnp.float32), (total_steps,))
            for name, rate in schedules.items()
        }


Step = Callable[[Tree, Stack, AnyBatch], tuple[Tree, Stack, StepMetrics]]
Validate = Callable[[Tree, Stack, AnyBatch], tuple[Tree, tuple[Array, Array]]]


def in_turns() -> bool:
    """Return whether the program takes the members in turns rather than in one batch, for the platform traced for."""
    return platform.name() == "cpu"


def make_step(
    module: nn.Module, config: RunConfig, losses: Callable[..., Array], dropout: bool, turns: bool | None = None
) -> Any:
    """Return the jitted step (frozen weights, stack, stacked batches) -> (weights, stack, metrics of each member).

    Weights and stack are donated; the weights come back as they were.

    Args:
      module: the model.
      config: of any of the members, which agree in all but `grid.SHARED`.
      losses: as in `step.make_sums`.
      dropout: whether `losses` gets a key.
      turns: see `in_turns`; None: as it says.
    """
    turns = in_turns() if turns is None else turns
    form = "resident" if turns else "bypass"

    def own_step(own: Stack, params: Tree, batch: AnyBatch) -> tuple[Stack, StepMetrics]:
        seed = own.seeds if dropout else None
        state = own.state._replace(params=params)
        sums = step.make_sums(module, config.training.accumulation, losses, seed, form)(state, batch)
        schedules = {name: _looked_up(rates) for name, rates in own.rates.items()}
        made = optimizer.build(config.optimizer, 1, config.classifier, schedules)
        state, metrics = step.make_update(made, write=lambda params, *_: params)(state, sums)
        return own._replace(state=state._replace(params={})), metrics

    def run(params: Tree, stack: Stack, batches: AnyBatch) -> tuple[Tree, Stack, StepMetrics]:
        params, (stack, metrics) = _over_members(own_step, params, stack, batches, turns)
        return params, stack, metrics

    return jax.jit(run, donate_argnums=(0, 1), compiler_options=platform.step_options())


def make_validation(module: nn.Module, losses: Callable[..., Array], turns: bool | None = None) -> Any:
    """Return the jitted function (weights, stack, batches) -> (weights, (sums of the losses, numbers of labels)).

    The weights are donated and come back as they were. Arguments as in `make_step`.
    """
    turns = in_turns() if turns is None else turns
    form = "resident" if turns else "bypass"

    def own_loss(own: Stack, params: Tree, batch: AnyBatch) -> tuple[Array, Array]:
        state = own.state
        variables = {
            "params": dense_modules.join(params, state.classifier),
            "columns": state.columns,
            form: state.trainable["bypass"],
        }
        return jnp.sum(losses(module, variables, batch)), jnp.sum(batch.label_mask)

    def run(params: Tree, stack: Stack, batches: AnyBatch) -> tuple[Tree, tuple[Array, Array]]:
        found: tuple[Tree, tuple[Array, Array]] = _over_members(own_loss, params, stack, batches, turns)
        return found

    return jax.jit(run, donate_argnums=0)


def _over_members(
    work: Callable[[Stack, Tree, AnyBatch], Any], params: Tree, stack: Stack, batches: AnyBatch, turns: bool
) -> tuple[Tree, Any]:
    """Return the weights, and what `work` returns for every member."""
    if not turns:
        return params, jax.vmap(work, in_axes=(0, None, 0))(stack, params, batches)

    def one(params: Tree, own: tuple[Stack, AnyBatch]) -> tuple[Tree, Any]:
        state = own[0].state
        params = bypass.make_resident(params, state.bypass, state.base_entries)
        result = work(own[0], params, own[1])
        return bypass.unmerge(params, state.columns, state.base_entries), result

    return lax.scan(one, params, (stack, batches))


def _looked_up(rates: Float[Array, "steps"]) -> optax.Schedule:
    return lambda count: jnp.take(rates, count, mode="clip")
