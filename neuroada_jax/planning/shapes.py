"""Shapes of a run before there are weights or data: its train state, its optimiser and its longest batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from neuroada_jax.core.trees import Tree
from neuroada_jax.data.batches import Batch, ClassificationBatch
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained.load import OpenedModel, open_model
from neuroada_jax.tasks import ClassificationTask
from neuroada_jax.training import connections, modules, objectives, optimizer, step
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.objectives import Objective
from neuroada_jax.training.step import AnyBatch


class AbstractRun(NamedTuple):
    """A run without weights.

    Attributes:
      opened: the model's config and architecture.
      transformation: its optimiser.
      state: the shapes of the train state.
      objective: its task.
    """

    opened: OpenedModel
    transformation: optax.GradientTransformation
    state: step.TrainState
    objective: Objective


def abstract_run(config: RunConfig) -> AbstractRun:
    """Return a run's model, optimiser, train state and objective; reads the model's config only.

    Raises:
      UserError: a model or target that does not exist, examples longer than the model allows.
    """
    opened = open_model(config.model.path, config.model.dtype, config_only=True, quantization_of=config.model.held)
    objective, opened = objectives.objective(config, opened)
    modules.check_length(config, opened.model)
    paths = modules.target_paths(config, opened.model)
    # The number of steps is a constant of the schedule and takes no memory.
    transformation = optimizer.build(config.optimizer, 1, config.classifier)

    def initial_state(params: Tree) -> step.TrainState:
        built = connections.of_equal_shapes(config, opened.model, params, paths)
        return step.initial_state(params, built, transformation, dense)

    dense = modules.dense_paths(config, opened, _missing(opened), paths)
    return AbstractRun(opened, transformation, jax.eval_shape(initial_state, opened.abstract_params()), objective)


def _missing(opened: OpenedModel) -> list[str]:
    """Return the tensors that the checkpoint lacks (BERT's pooler), none where its weights are not on this machine."""
    if opened.model.architecture.is_decoder:
        return []
    try:
        return opened.missing()
    except UserError:
        return []


def longest_batch(config: RunConfig, examples: int, task: ClassificationTask | None = None) -> AnyBatch:
    """Return the shapes of the longest possible batch of a run; for a decoder, every position has a label.

    Args:
      config: the run.
      examples: rows of the batch.
      task: of an encoder; None for a decoder.
    """
    if config.data.packing:
        length = config.data.max_length
    elif config.data.buckets:
        # Examples are truncated to max_length, so buckets beyond the first that holds it stay empty.
        fitting = [size for size in config.data.buckets if size >= config.data.max_length]
        length = min(fitting, default=max(config.data.buckets))
    else:
        length = -(-config.data.max_length // 8) * 8

    if task is not None:
        return abstract_classification_batch(examples, length, task)
    return abstract_batch(examples, length, config.data.packing)


def abstract_classification_batch(examples: int, length: int, task: ClassificationTask) -> ClassificationBatch:
    """Return the shapes of an encoder's batch."""
    ids, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((examples, length), (examples,)))
    numbers = jax.ShapeDtypeStruct((examples,), jnp.float32)
    several = jax.ShapeDtypeStruct((examples, len(task.labels)), jnp.float32)
    labels = several if task.is_multilabel else numbers if task.is_regression else lengths
    leaves: Any = (ids, lengths, ids, labels, numbers)
    return ClassificationBatch(*leaves)


def abstract_batch(examples: int, length: int, packed: bool = False) -> Batch:
    """Return the shapes of a decoder's batch with a label at every position."""

    def shape(*sizes: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((examples, *sizes), dtype)

    return Batch(
        input_ids=shape(length),
        lengths=shape(),
        label_positions=shape(length),
        label_ids=shape(length),
        label_mask=shape(length, dtype=jnp.float32),
        positions=shape(length) if packed else None,
    )
