"""The modules of a model that a config trains, and whether a config suits a model; almost everything before the weights."""

import dataclasses
import math
from typing import Any

from neuroada_jax import console, models
from neuroada_jax.core import low_rank, trees
from neuroada_jax.errors import UserError
from neuroada_jax.models import names
from neuroada_jax.pretrained import quantization
from neuroada_jax.pretrained.load import OpenedModel
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
    targets = config.trained.targets or list(model.architecture.targets)
    section: Any = dataclasses.replace(config.trained, targets=targets)
    return dataclasses.replace(config, **{section_name(config): section})


def section_name(config: RunConfig) -> str:
    """Return the name of the section of what trains in the linear maps."""
    return "lora" if config.method == "lora" else "bypass"


def size_of(config: RunConfig) -> str:
    """Return the k or r of a run, for titles."""
    return f"LoRA r = {config.lora.r}" if config.method == "lora" else f"k = {config.bypass.k}"


def checked_targets(config: RunConfig, model: models.Model) -> list[trees.ModulePath]:
    """Check that a run's connections or factors suit a model of its kind, and return the paths of its targets.

    Raises:
      UserError: see `target_paths` and `check_quantised`.
    """
    paths = target_paths(config, model)
    check_quantised(config, model)
    return paths


def say_unused(config: RunConfig) -> None:
    """Say which fields of the other method's section are set, and have no effect."""
    name, other = ("bypass", config.bypass) if config.method == "lora" else ("lora", config.lora)
    defaults = dataclasses.asdict(type(other)())
    fields = [field for field, value in dataclasses.asdict(other).items() if value != defaults[field]]
    if fields:
        listed = ", ".join(f"{name}.{field}" for field in fields)
        console.say(f"method: {config.method} does not use {listed}; the section {section_name(config)} counts")


def dense_paths(
    config: RunConfig, base_model: OpenedModel, initialised: list[str], targets: list[trees.ModulePath]
) -> list[trees.ModulePath]:
    """Return the paths of the modules that train densely: an encoder's classifier and modules missing in the checkpoint.

    A decoder has none.

    Args:
      config: the run.
      base_model: the model.
      initialised: the Hugging Face names of the tensors that its checkpoint lacks.
      targets: the linear maps that carry a bypass.

    Raises:
      UserError: `classifier.train` is false, and the checkpoint lacks the classifier; or a target is part of it.
    """
    architecture = base_model.model.architecture
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
            field = f"{section_name(config)}.targets"
            raise UserError(f"{field}: {'.'.join(target)} belongs to the classifier, which trains densely; remove it")
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
    name, targets = section_name(config), config.trained.targets or list(model.architecture.targets)
    if "lm_head" in targets and model.architecture.is_decoder and model.config.tied:
        raise UserError(f"{name}.targets: 'lm_head' shares its weights with the embedding in this model (tied embeddings)")
    shapes = model.abstract_params()
    paths = models.match_targets(shapes, targets, model.layers_path, f"{name}.targets")
    rank = {"lora.r": config.lora.r} if config.method == "lora" else {}
    if config.method == "neuroada" and config.bypass.score == "lowrank":
        rank = {"bypass.rank": config.bypass.rank}
    for path in paths:
        outputs, inputs = trees.get(shapes, path)["kernel"].shape[-2:]
        for field in (field for field, value in rank.items() if value > min(outputs, inputs)):
            raise UserError(
                f"{field}: {rank[field]} is more than the rank of {'.'.join(path)} ({outputs}, {inputs}); expected at most "
                f"{min(outputs, inputs)}"
            )
        k = config.bypass.k
        if config.method == "neuroada" and k > inputs:
            console.warn(f"bypass.k: {k} is more than the {inputs} inputs of {'.'.join(path)}; all {inputs} are used there")
    return paths


def trained_layers(config: RunConfig, model: models.Model) -> list[int]:
    """Return the numbers of the layers whose targets train, ascending.

    Raises:
      UserError: a layer that the model does not have or that is named twice, or none that trains.
    """
    section, depth = config.bypass, model.config.num_layers
    if config.method == "lora":
        return list(range(depth))
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
    """Return how many entries of the values and low-rank factors (arrays or shapes) train."""
    total = sum(leaf.size for name in low_rank.LEAVES for _, leaf in trees.leaves(values, name))
    shapes = model.abstract_params()
    for path, leaf in trees.leaves(values, "values"):
        *stack, neurons, k = leaf.shape
        if config.bypass.random_over != "neuron":  # of which arrays are wider than the mean
            k = min(config.bypass.k, trees.get(shapes, path)["kernel"].shape[-1])
        if names.is_stacked(path, model.layers_path):
            stack[0] = len(trained_layers(config, model))
        total += math.prod(stack) * trained_neurons(config, neurons) * k
    return total


OF_WEIGHTS_ALONE = ("magnitude", "reverse")  # scores that need nothing but the weights


def check_quantised(config: RunConfig, model: models.Model) -> None:
    """Check that a run's connections can be selected on a quantised base model, from the weights that it asks for.

    Raises:
      UserError: they cannot.
    """
    section, on_load = config.bypass, quantization.made(model) is not None
    if config.method != "neuroada":
        return
    if section.select_from == "original" and not on_load:
        raise UserError(
            "bypass.select_from: 'original' needs weights that are quantised on load (model.quantization nf4, int8, fp8); "
            "remove it"
        )
    if section.select_from == "original" and section.score not in OF_WEIGHTS_ALONE:
        raise UserError(
            f"bypass.select_from: 'original' needs a score of the weights alone ({', '.join(OF_WEIGHTS_ALONE)}), found "
            f"{section.score!r}; remove it"
        )
