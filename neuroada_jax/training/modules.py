"""Which modules of a model a config trains, and whether the two fit at all. Needs no weights but for a missing head."""

import dataclasses

from neuroada_jax import console, models
from neuroada_jax.core import trees
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained.load import IdentifiedModel
from neuroada_jax.tasks import GLUE, TASKS
from neuroada_jax.training.config import ClassifierSection, GenerationSection, RunConfig


def check_kind(config: RunConfig, model: models.Model) -> None:
    """Raises UserError where the config asks of a decoder what only an encoder does, or the reverse."""
    kind = model.hf_config["model_type"]
    is_decoder = model.architecture.is_decoder
    if is_decoder and config.classifier != ClassifierSection():
        raise UserError(f"head: {kind} is a decoder, which has no head to train; leave this section out")
    if not is_decoder and config.data.packing:
        raise UserError(f"data.packing: {kind} is an encoder, which reads one example a row; set it to false")
    if not is_decoder and config.data.drop_overlap:
        raise UserError(f"data.drop_overlap: {kind} is an encoder, whose rows ask no questions; set it to false")
    for where, task in config.tasks():
        if is_decoder and task not in TASKS:
            raise UserError(
                f"{where}.task: {task!r} trains an encoder to tell labels apart, and {kind} is a decoder; "
                f"take another model, or a task of {', '.join(TASKS)}"
            )
        if not is_decoder and task not in GLUE:
            raise UserError(
                f"{where}.task: {task!r} trains a decoder to continue texts, and {kind} is an encoder; "
                f"take another model, or a task of {', '.join(GLUE)}"
            )
        if not is_decoder and task != config.data.task:
            raise UserError(f"{where}.task: {task!r}, and the head is trained for {config.data.task!r}; leave it out")
    unset = {"style": None, "method": "generate", "max_new_tokens": None, "generation": GenerationSection()}
    for number, each in enumerate(config.evaluation.sets if not is_decoder else ()):
        for field in (field for field, value in unset.items() if getattr(each, field) != value):
            raise UserError(f"evaluation.sets.{number}.{field}: {kind} is an encoder, which has no prompts; leave it out")
    if not is_decoder and config.data.style is not None:
        raise UserError(f"data.style: {kind} is an encoder, which has no prompts; leave it out")


def resolved(config: RunConfig, model: models.Model) -> RunConfig:
    """The config with the defaults that depend on the model written out."""
    targets = config.bypass.targets or list(model.architecture.targets)
    return dataclasses.replace(config, bypass=dataclasses.replace(config.bypass, targets=targets))


def dense_paths(config: RunConfig, base_model: IdentifiedModel, targets: list[trees.ModulePath]) -> list[trees.ModulePath]:
    """The modules that train whole: an encoder's head, and whatever else the checkpoint lacks. None of a decoder.

    Args:
      config: the run.
      base_model: the model; reading its weights showed which tensors the checkpoint lacks.
      targets: the linear maps that carry a bypass.

    Raises:
      UserError: the head is not to be trained, and the checkpoint has none; or a part of it is to carry a bypass.
    """
    architecture = base_model.model.architecture
    initialised = base_model.initialised
    if initialised and not config.classifier.train:
        raise UserError(f"head.train: {base_model.source} has no {initialised[0]}, so that the head must be trained")
    parameters = {tuple(name.split(".")) for name in initialised}
    paths = [
        path
        for path in architecture.optional
        if (path in architecture.classifier and config.classifier.train)
        or any(name[: len(path)] == path for name in parameters)
    ]
    for target in targets:
        if any(target[: len(path)] == path for path in paths):
            raise UserError(f"bypass.targets: {'.'.join(target)} belongs to the head, which trains whole; leave it out")
    return paths


def check_length(config: RunConfig, model: models.Model) -> None:
    """Raises UserError where rows may be longer than the model's positions."""
    positions = model.config.max_positions
    if config.data.max_length > positions:
        raise UserError(f"data.max_length: {config.data.max_length} is more than the model's {positions} positions")


def target_paths(config: RunConfig, model: models.Model) -> list[trees.ModulePath]:
    """The linear maps that carry a bypass; warns where one has fewer than k inputs. Needs no weights.

    Raises:
      UserError: targets that match nothing, or the output layer of a model with tied embeddings.
    """
    k, targets = config.bypass.k, config.bypass.targets or list(model.architecture.targets)
    if "lm_head" in targets and model.architecture.is_decoder and model.config.tied:
        raise UserError("bypass.targets: 'lm_head' shares its weights with the embedding in this model (tied embeddings)")
    shapes = model.abstract_params()
    paths = models.match_targets(shapes, targets, model.layers_path)
    for path in paths:
        inputs = trees.get(shapes, path)["kernel"].shape[-1]
        if k > inputs:
            console.warn(f"bypass.k: {k} is more than the {inputs} inputs of {'.'.join(path)}; all {inputs} are used there")
    return paths
