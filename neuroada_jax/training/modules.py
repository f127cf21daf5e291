"""The modules of a model that a config trains, and whether a config suits a model; almost everything before the weights."""

import dataclasses
from typing import Any

from neuroada_jax import console, models
from neuroada_jax.core import trees
from neuroada_jax.errors import UserError
from neuroada_jax.models import names
from neuroada_jax.pretrained.load import IdentifiedModel
from neuroada_jax.tasks import ENCODER_TASKS, OWN, TASKS
from neuroada_jax.training.config import ClassifierSection, GenerationSection, RunConfig

# Fields of the data and of an evaluation set that do not apply to an encoder, with their defaults.
_FOR_TRAINED_PROMPTS: dict[str, Any] = {
    "style": None,
    "chat_template": None,
    "template_arguments": {},
    "system": None,
    "learn": "all",
}
_FOR_PROMPTS = {"style": None, "method": "generate", "max_new_tokens": None, "generation": GenerationSection()}


def check_kind(config: RunConfig, model: models.Model) -> None:
    """Check that a config asks of a decoder or an encoder only for features of its kind.

    Raises:
      UserError: it asks for something else.
    """
    kind = model.hf_config["model_type"]
    if model.architecture.is_decoder:
        _check_decoder(config, kind)
    else:
        _check_encoder(config, kind)


def _check_decoder(config: RunConfig, kind: str) -> None:
    if config.classifier != ClassifierSection():
        raise UserError(f"classifier: {kind} is a decoder, which has no classifier to train; remove this section")
    for where, task in config.tasks():
        if task in OWN:
            encoders = ", ".join(name for name, each in models.ARCHITECTURES.items() if not each.is_decoder)
            raise UserError(
                f"{where}.task: {task!r} needs an encoder ({encoders}), and {kind} is a decoder; name another model, or "
                "write the label as the completion of prompt/completion rows for task instruct"
            )
        if task not in TASKS:
            raise UserError(
                f"{where}.task: {task!r} is a classification task for encoders, and {kind} is a decoder; use another model "
                f"or one of {', '.join(TASKS)}"
            )


def _check_encoder(config: RunConfig, kind: str) -> None:
    if config.data.packing:
        raise UserError(f"data.packing: {kind} is an encoder, which reads one example at a time; set it to false")
    if config.data.drop_overlap:
        raise UserError(
            f"data.drop_overlap: {kind} is an encoder, whose rows have no questions to compare; set it to false"
        )
    for where, task in config.tasks():
        if task not in ENCODER_TASKS:
            raise UserError(
                f"{where}.task: {task!r} trains a decoder to continue texts, and {kind} is an encoder; use another model "
                f"or one of {', '.join(ENCODER_TASKS)}"
            )
        if task != config.data.task:
            raise UserError(f"{where}.task: the classifier is trained for {config.data.task!r}, found {task!r}; remove it")
    for number, each in enumerate(config.evaluation.sets):
        for field in (field for field, value in _FOR_PROMPTS.items() if getattr(each, field) != value):
            raise UserError(f"evaluation.sets.{number}.{field}: {kind} is an encoder, which has no prompts; remove it")
    for field in (field for field, value in _FOR_TRAINED_PROMPTS.items() if getattr(config.data, field) != value):
        raise UserError(f"data.{field}: {kind} is an encoder, which has no prompts; remove it")


def resolved(config: RunConfig, model: models.Model) -> RunConfig:
    """Return the config with defaults that depend on the model filled in."""
    targets = config.bypass.targets or list(model.architecture.targets)
    return dataclasses.replace(config, bypass=dataclasses.replace(config.bypass, targets=targets))


def dense_paths(config: RunConfig, base_model: IdentifiedModel, targets: list[trees.ModulePath]) -> list[trees.ModulePath]:
    """Return the paths of the modules that train densely: an encoder's classifier and modules missing in the checkpoint.

    A decoder has none.

    Args:
      config: the run.
      base_model: the loaded model, which names the tensors that its checkpoint lacks.
      targets: the linear maps that carry a bypass.

    Raises:
      UserError: `classifier.train` is false, and the checkpoint lacks the classifier; or a target is part of it.
    """
    architecture = base_model.model.architecture
    initialised = base_model.initialised
    if initialised and not config.classifier.train:
        raise UserError(f"classifier.train: {base_model.source} has no {initialised[0]}: the classifier must be trained")
    parameters = {tuple(name.split(".")) for name in initialised}
    paths = [
        path
        for path in architecture.optional
        if (path in architecture.classifier and config.classifier.train)
        or any(name[: len(path)] == path for name in parameters)
    ]
    for target in targets:
        if any(target[: len(path)] == path for path in paths):
            raise UserError(
                f"bypass.targets: {'.'.join(target)} belongs to the classifier, which trains densely; remove it"
            )
    return paths


def check_length(config: RunConfig, model: models.Model) -> None:
    """Check that `data.max_length` does not exceed the positions of the model.

    Raises:
      UserError: it does.
    """
    positions = model.config.max_positions
    if config.data.max_length > positions:
        raise UserError(f"data.max_length: {config.data.max_length} is more than the model's {positions} positions")


def say_dropout(model: models.Model) -> None:
    """Report a dropout that the model's config asks for and training does not apply."""
    for name in ("attention_dropout", "resid_pdrop", "embd_pdrop"):
        rate = model.hf_config.get(name)
        if model.architecture.is_decoder and rate:
            console.say(f"config.json: {name} {rate} is not applied: a decoder is trained without dropout")


def target_paths(config: RunConfig, model: models.Model) -> list[trees.ModulePath]:
    """Return the paths of the targets, and warn of those with fewer than k inputs.

    Raises:
      UserError: a target matches no linear map, or is the output layer of a model with tied embeddings; a rank or layers
        that the model does not have.
    """
    trained_layers(config, model)
    k, targets = config.bypass.k, config.bypass.targets or list(model.architecture.targets)
    if "lm_head" in targets and model.architecture.is_decoder and model.config.tied:
        raise UserError("bypass.targets: 'lm_head' shares its weights with the embedding in this model (tied embeddings)")
    shapes = model.abstract_params()
    paths = models.match_targets(shapes, targets, model.layers_path)
    for path in paths:
        outputs, inputs = trees.get(shapes, path)["kernel"].shape[-2:]
        if config.bypass.score == "lowrank" and config.bypass.rank > min(outputs, inputs):
            raise UserError(
                f"bypass.rank: {config.bypass.rank} is more than the rank of {'.'.join(path)} ({outputs}, {inputs}); "
                f"expected at most {min(outputs, inputs)}"
            )
        if k > inputs:
            console.warn(f"bypass.k: {k} is more than the {inputs} inputs of {'.'.join(path)}; all {inputs} are used there")
    return paths


def trained_layers(config: RunConfig, model: models.Model) -> list[int]:
    """Return the numbers of the layers whose targets train, ascending.

    Raises:
      UserError: a layer that the model does not have or that is named twice, or none that trains.
    """
    section, depth = config.bypass, model.config.num_layers
    field = "layers" if section.exclude_layers is None else "exclude_layers"
    named = section.layers or section.exclude_layers or []
    for number in named:
        if number >= depth:
            raise UserError(f"bypass.{field}: {number} is no layer of this model, expected numbers from 0 to {depth - 1}")
        if named.count(number) > 1:
            raise UserError(f"bypass.{field}: {number} is given twice")
    chosen = sorted(section.layers or set(range(depth)) - set(named))
    if not chosen:
        raise UserError(f"bypass.exclude_layers: all {depth} layers of this model are named, so that none would train")
    return chosen


def trained_neurons(config: RunConfig, neurons: int) -> int:
    """Return how many neurons of a map train, at least one."""
    return max(1, round(config.bypass.neurons * neurons))


def count_trained(config: RunConfig, model: models.Model, values: trees.Tree) -> int:
    """Return how many entries of the values (arrays or shapes) train."""
    total = 0
    for path, leaf in trees.leaves(values, "values"):
        *_, neurons, k = leaf.shape
        depth = len(trained_layers(config, model)) if names.is_stacked(path, model.layers_path) else 1
        total += depth * trained_neurons(config, neurons) * k
    return total
