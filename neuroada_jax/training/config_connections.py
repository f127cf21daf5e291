"""The sections of a config about what trains in the linear maps: connections, or low-rank factors."""

from typing import Annotated, Literal

import pydantic
from pydantic.dataclasses import dataclass

from neuroada_jax.training.config_execution import STRICT

Layer = Annotated[int, pydantic.Field(ge=0)]


@dataclass(frozen=True, config=STRICT)
class BypassSection:
    """The trained connections.

    Attributes:
      k: connections of every neuron (output) of the target linear maps. Default 1.
      score: which k of a neuron's weights are trained, see docs/connections.md: those with the largest |weight|
        ("magnitude", the method and the default), the smallest ("reverse"), the largest |gradient| ("gradient") or gradient
        over |weight| ("gradient_over_magnitude"), the largest |weight| times norm of its input ("activation"), the largest
        entries of a low-rank approximation ("lowrank"), "random" ones, or those of a Python function ("custom": only in
        `neuroada_jax.fine_tune(score=function)`).
      targets: names of linear maps, as in `neuroada inspect MODEL`. None (the default): every linear map of a layer.
      shared_columns: whether all neurons of a map train the same k columns, those that most of them would select. Default
        false. The gradient is then one dense product, which is cheap at large k.
      random_over: for the score "random", what its positions are drawn from: the inputs of every neuron ("neuron", the
        default, k of each), or all entries of a map ("map"), of a layer's targets ("block") or of all targets ("model"), as
        many as k a neuron, so that neurons differ in their number of connections.
      neurons: share of the neurons of each map that train, chosen at random by the seed, from 0 to 1. Default 1.
      layers: numbers of the layers that train, from 0. None (the default): all.
      exclude_layers: numbers of the layers that do not train, in place of `layers`. None (the default): none.
      rank: of the approximation, for "lowrank". Default 32.
      select_from: of a base model that is quantised on load, the weights of the checkpoint ("original") or
        the dequantised ones ("quantised"). None (the default): "original" for "magnitude" and "reverse".
      statistic_batches: batches of the first epoch from which "gradient", "gradient_over_magnitude" and "activation" take
        their statistics. None (the default): all; 16 for "activation".
    """

    k: int = pydantic.Field(default=1, ge=1)
    score: Literal[
        "magnitude", "reverse", "gradient", "gradient_over_magnitude", "activation", "lowrank", "random", "custom"
    ] = "magnitude"
    targets: list[str] | None = pydantic.Field(default=None, min_length=1)
    shared_columns: bool = False
    random_over: Literal["neuron", "map", "block", "model"] = "neuron"
    neurons: float = pydantic.Field(default=1.0, gt=0, le=1)
    layers: list[Layer] | None = pydantic.Field(default=None, min_length=1)
    exclude_layers: list[Layer] | None = pydantic.Field(default=None, min_length=1)
    rank: int = pydantic.Field(default=32, ge=1)
    statistic_batches: int | None = pydantic.Field(default=None, ge=1)
    select_from: Literal["original", "quantised"] | None = None

    def __post_init__(self) -> None:
        if self.layers is not None and self.exclude_layers is not None:
            raise ValueError("give either layers or exclude_layers, found both")
        others = {"score": "random", "shared_columns": False, "neurons": 1}
        for field, value in others.items():
            if self.random_over != "neuron" and getattr(self, field) != value:
                raise ValueError(
                    f"random_over: {self.random_over!r} needs {field} {str(value).lower()}, found {getattr(self, field)}"
                )


@dataclass(frozen=True, config=STRICT)
class LoraSection:
    """Low-rank factors A and B of the target linear maps, for `method: lora`: W + alpha / r B A.

    Attributes:
      r: rank, PEFT's `r`. Default 8.
      alpha: PEFT's `lora_alpha`: the product B A counts alpha / r times. None (the default): 2 r.
      targets: PEFT's `target_modules`, names as in `bypass.targets`. None (the default): every linear map of a layer.
    """

    r: int = pydantic.Field(default=8, ge=1)
    alpha: float | None = pydantic.Field(default=None, gt=0)
    targets: list[str] | None = pydantic.Field(default=None, min_length=1)

    @property
    def resolved_alpha(self) -> float:
        """The value of `alpha`, also where it follows from r."""
        return 2.0 * self.r if self.alpha is None else self.alpha
