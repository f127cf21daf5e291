"""PEFT's format of LoRA: adapter_config.json and adapter_model.safetensors, written and read without peft.

Tensors are named `base_model.model.<module>.<name>`:

    lora_A.weight   float32 (r, I)
    lora_B.weight   float32 (O, r)

and the weight is W + lora_alpha / r B A. Dense modules (a classifier) are in `modules_to_save`, as in peft.py.
"""

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from neuroada_jax import files, models
from neuroada_jax.adapters import factors, peft
from neuroada_jax.adapters.factors import Factors, LoraOptions
from neuroada_jax.adapters.native import Adapter
from neuroada_jax.adapters.on_base import dense_slots
from neuroada_jax.errors import UserError
from neuroada_jax.models import names
from neuroada_jax.pretrained.load import OpenedModel

TYPE = "LORA"
_A, _B = "lora_A.weight", "lora_B.weight"
# Fields of adapter_config.json that are read, or change nothing of what the tensors mean. Of any other, also one that a
# later PEFT adds, only what stands for "no" is read.
_PLAIN = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "use_rslora", "bias", "modules_to_save", "init_lora_weights", "lora_dropout"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config"),  # of training, or defaults of what is refused
    *("velora_config", "ensure_weight_tying"),
)
# Of `init_lora_weights`; the others, such as PiSSA's, take something from the base weights before the training, so that the
# factors belong to weights that are in no file.
_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class Stored(NamedTuple):
    """PEFT's LoRA adapter, read and checked as far as possible without its base model.

    Attributes:
      config: the content of adapter_config.json.
      options: r, and alpha such that alpha / r is the scale, also where PEFT divides by the root of r.
      pairs: module path -> factors.
      dense_parameters: parameter name -> float32 array, from `modules_to_save`.
    """

    config: dict[str, Any]
    options: LoraOptions
    pairs: dict[str, Factors]
    dense_parameters: dict[str, np.ndarray]


def export(adapter: Adapter, directory: Path, base_model: OpenedModel) -> list[str]:
    """Write a directory that `PeftModel.from_pretrained` loads.

    Args:
      adapter: with low-rank factors.
      directory: the destination; must not exist.
      base_model: the adapter's base model; its weights are not needed.

    Returns: a line on what was written.

    Raises:
      UserError: the adapter does not fit the base model, or the directory exists or cannot be written.
    """
    options = factors.options_of(adapter.metadata)
    assert options is not None
    _check_fit("adapter", base_model.model, adapter.factors)
    _check_experts(base_model.model, adapter.factors)
    tensors = {f"{peft.PREFIX}{name}": leaf for name, leaf in adapter.dense_parameters.items()}
    for module, pair in adapter.factors.items():
        tensors |= {f"{peft.PREFIX}{module}.{_A}": pair.a, f"{peft.PREFIX}{module}.{_B}": pair.b}
    config = peft.shared_config(TYPE, adapter, base_model) | {
        "r": options.r,
        "lora_alpha": int(options.alpha) if options.alpha.is_integer() else options.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
    }
    with files.new_directory(directory) as temporary:
        safetensors.numpy.save_file(tensors, str(temporary / "adapter_model.safetensors"), metadata={"format": "pt"})
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return [f"r={options.r}, lora_alpha={options.alpha:g}: {adapter.size:,} values in {len(adapter.factors)} linear maps"]


def _check_fit(where: str, model: models.Model, pairs: Any) -> None:
    """Refuse factors of modules that the model does not have, or of another shape than its weights."""
    for module, (outputs, inputs) in peft.shapes_of(model, list(pairs)).items():
        pair = pairs[module]
        if pair.a.shape[1] != inputs or pair.b.shape[0] != outputs:
            found = f"{pair.a.shape} and {pair.b.shape}"
            raise UserError(f"{where}: {module} has factors {found}, which do not fit ({outputs}, {inputs})")


def _check_experts(model: models.Model, pairs: Collection[str]) -> None:
    """Refuse factors of some of the maps of experts where PEFT cannot load them: gate or up without the two others.

    transformers stacks gate and up as one, and PEFT 0.21 names the factors of that one as if down had some, too.
    """
    experts = model.config.experts if model.architecture.is_decoder else None
    if experts is None:
        return
    adapted = {module.rpartition(".")[2] for module in pairs if f".{names.EXPERTS}." in module}
    gate, up, _ = experts.maps
    lacking = [name for name in experts.maps if name not in adapted]
    if lacking and {gate, up} & adapted:
        have = " and ".join(name for name in experts.maps if name in adapted)
        raise UserError(
            f"adapter: of the experts {have} have factors and {' and '.join(lacking)} none; PEFT loads those of {gate} and "
            f"{up} with those of all three maps alone, since transformers stacks them; use huggingface"
        )


def is_lora(directory: str | Path) -> bool:
    """Return whether a PEFT adapter's config says that it is LoRA."""
    where = Path(directory) / "adapter_config.json"
    return where.is_file() and files.read_json(where).get("peft_type") == TYPE


def open_stored(directory: Path) -> Stored:
    """Read PEFT's LoRA and check all that can be checked without its base model.

    Raises:
      UserError: a missing or truncated file, another tuner, a variant of LoRA that is not read, or tensors that form none.
    """
    config, tensors, path = peft.read_files(directory)
    where = directory / "adapter_config.json"
    options = _options(where, config)
    halves: dict[str, dict[str, np.ndarray]] = {_A: {}, _B: {}}
    dense: dict[str, np.ndarray] = {}
    for name, leaf in tensors.items():
        own = peft.own_name(path, name, f"<module>.{_A}")
        last = next((last for last in halves if own.endswith(f".{last}")), None)
        if last is None:
            dense[own] = leaf
        else:
            halves[last][own.removesuffix(f".{last}")] = leaf
    if not halves[_A] or halves[_A].keys() != halves[_B].keys():
        raise UserError(f"{path}: expected pairs of {_A} and {_B}")
    peft.check_targets(where, config, halves[_A])
    peft.check_dense_parameters(path, config.get("modules_to_save") or [], dense)
    pairs = {module: Factors(leaf, halves[_B][module]) for module, leaf in halves[_A].items()}
    for module, pair in pairs.items():
        factors.check(f"{path}: {module}", pair, options.r)
    return Stored(config, options, pairs, dense)


def _options(where: Path, config: dict[str, Any]) -> LoraOptions:
    """Check a config and return its r and alpha."""
    if config.get("peft_type") != TYPE:
        raise UserError(f"{where}: peft_type {config.get('peft_type')!r}, expected {TYPE}")
    for field in config:
        if config[field] and field not in _PLAIN:
            raise UserError(f"{where}: {field} is {config[field]!r}; only plain LoRA is read")
    initial = config.get("init_lora_weights")
    if initial not in _INITIAL:
        raise UserError(
            f"{where}: init_lora_weights is {initial!r}, which is not known to keep the base weights; only LoRA beside the "
            "base's own weights is read: save it with PEFT's path_initial_model_for_weight_conversion"
        )
    if config.get("bias", "none") != "none":
        raise UserError(f"{where}: bias is {config['bias']!r}, expected 'none'")
    peft.check_saved(where, config)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise UserError(f"{where}: r {rank!r}, expected a positive integer")
    if type(alpha) not in (int, float) or not 0 < float(alpha) < math.inf:  # type: ignore[arg-type]
        raise UserError(f"{where}: lora_alpha {alpha!r}, expected a number above 0")
    number = float(alpha)  # type: ignore[arg-type]
    return LoraOptions(rank, number * math.sqrt(rank) if config.get("use_rslora") else number)


def read(directory: Path, base_model: models.Model) -> Stored:
    """Read PEFT's LoRA of `base_model`. Nothing in it is executed.

    Raises:
      UserError: see `open_stored`; also a module that the base model does not have, or factors that do not fit it.
    """
    stored = open_stored(directory)
    _check_fit(str(directory), base_model, stored.pairs)
    peft.check_embedding(directory, base_model, stored)
    try:
        dense_slots(base_model, stored.dense_parameters, stored.pairs)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from error
    return stored
