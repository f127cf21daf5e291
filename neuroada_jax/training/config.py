"""What a run is: every field of a config, with its default and its limits. config_file.py reads and writes them."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic.dataclasses import dataclass

from neuroada_jax.data.prompts import PromptStyle
from neuroada_jax.errors import UserError
from neuroada_jax.generation.sampling import Decoding
from neuroada_jax.models import Remat
from neuroada_jax.tasks import GLUE, TASKS, unknown

_STRICT = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Seed = Annotated[int, pydantic.Field(ge=0, lt=2**32)]  # JAX's keys are made of 32 bits


@dataclass(frozen=True, config=_STRICT)
class ModelSection:
    """Which frozen model. `path` is a Hugging Face directory, a hub id, a .gguf file or package:NAME/FILE."""

    path: str
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"


@dataclass(frozen=True, config=_STRICT)
class BypassSection:
    """k connections for every neuron of the linear maps in `targets` (names as in `neuroada inspect MODEL`).

    `score` says which k of each neuron: those with the largest |weight| (the method), with the smallest (reverse), with the
    largest |gradient| over the training data, or random ones.
    """

    k: int = pydantic.Field(default=1, ge=1)
    score: Literal["magnitude", "reverse", "gradient", "random"] = "magnitude"
    targets: list[str] | None = pydantic.Field(default=None, min_length=1)  # None: every linear map of a layer


@dataclass(frozen=True, config=_STRICT)
class ClassifierSection:
    """How an encoder's head trains, whole, beside the bypass. Its biases do not decay."""

    train: bool = True
    learning_rate: float | None = pydantic.Field(default=None, gt=0)  # None: that of the optimizer section
    weight_decay: float | None = pydantic.Field(default=None, ge=0)  # None: that of the optimizer section

    def __post_init__(self) -> None:
        if not self.train and (self.learning_rate is not None or self.weight_decay is not None):
            raise ValueError("head.train: a head that does not train has no learning_rate or weight_decay")


@dataclass(frozen=True, config=_STRICT)
class DataSection:
    """Training rows: a file, a `datasets` directory or a hub name, read as the rows of `task`.

    Which tasks there are depends on the model: a decoder continues texts, an encoder tells the labels of a GLUE task apart.

    With `packing`, a row of a batch is `max_length` tokens that hold as many whole examples as fit, each by itself.
    With `drop_overlap`, rows whose question is also in an evaluation set are left out.
    """

    train: str
    split: str = "train"
    task: str = "instruct"
    style: str | None = None  # None: the task's own prompt style
    max_length: int = pydantic.Field(default=512, gt=1)
    buckets: list[int] | None = None  # padded lengths; None: derived from the data
    group_by_length: bool = False
    packing: bool = False
    drop_overlap: bool = False
    limit: int | None = pydantic.Field(default=None, gt=0)

    def __post_init__(self) -> None:
        if self.packing and (self.group_by_length or self.buckets is not None):
            raise ValueError(
                "data.packing: packed rows all have data.max_length tokens; leave out data.group_by_length and data.buckets"
            )


@dataclass(frozen=True, config=_STRICT)
class OptimizerSection:
    """AdamW over the bypass values; the defaults are those of the published runs."""

    learning_rate: float = pydantic.Field(gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = pydantic.Field(default=0.0, ge=0, le=1)
    weight_decay: float = pydantic.Field(default=0.0, ge=0)
    clip_norm: float | None = pydantic.Field(default=1.0, gt=0)
    beta1: float = pydantic.Field(default=0.9, ge=0, lt=1)
    beta2: float = pydantic.Field(default=0.999, ge=0, lt=1)
    epsilon: float = pydantic.Field(default=1e-8, gt=0)


@dataclass(frozen=True, config=_STRICT)
class TrainingSection:
    """How long and how much at once. `batch_size` rows make one update, in `accumulation` equal parts.

    A row is an example, or with `data.packing` several. Of the checkpoints, the `keep_last` newest stay, and besides them
    the `keep_best` best: those with the highest score of `evaluation.best_epoch`, or where no set chooses, with the lowest
    mean loss of the steps since the checkpoint before.
    """

    epochs: int | None = pydantic.Field(default=None, gt=0)
    steps: int | None = pydantic.Field(default=None, gt=0)
    batch_size: int = pydantic.Field(default=16, gt=0)
    accumulation: int = pydantic.Field(default=1, gt=0)
    remat: Literal["none", "names", "full"] = "full"
    log_every: int = pydantic.Field(default=10, gt=0)
    save_every: int | None = pydantic.Field(default=None, gt=0)  # steps between checkpoints, for --resume
    keep_last: int = pydantic.Field(default=2, ge=1)
    keep_best: int = pydantic.Field(default=0, ge=0)

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"give either epochs or steps, found {'neither' if self.steps is None else 'both'}")
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}")

    @property
    def remat_policy(self) -> Remat:
        return Remat(self.remat)


@dataclass(frozen=True, config=_STRICT)
class ParallelSection:
    """How devices share a batch, and whether each holds all weights (docs/scaling.md).

    `mode` is shard_map or pmap (every device holds all weights, and one reduction sums the gradients), jit (the same, or
    with `fsdp` and `tensor` devices that share the weights by neuron), single, or auto: jit where weights are shared,
    shard_map on several GPUs or TPUs, else single.
    """

    mode: Literal["auto", "single", "shard_map", "pmap", "jit"] = "auto"
    devices: int | None = pydantic.Field(default=None, gt=0)  # None: all of them
    fsdp: int = pydantic.Field(default=1, gt=0)  # devices that share weights and batch, and gather a layer at a time
    tensor: int = pydantic.Field(default=1, gt=0)  # devices that share weights and the neurons' outputs

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "jit") and self.fsdp * self.tensor > 1:
            raise ValueError(f"parallel.mode: found {self.mode!r}, but fsdp and tensor need jit (or auto)")
        if self.mode == "single" and self.devices not in (None, 1):
            raise ValueError(f"parallel.devices: found {self.devices}, but mode single means one")


@dataclass(frozen=True, config=_STRICT)
class GenerationSection(Decoding):
    """How answers are generated, with the fields of `sampling.Decoding`; greedily where it is left out."""

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except UserError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True, config=_STRICT)
class EvaluationSet:
    """Rows to score, read as the rows of `task`.

    In a file, `suite: commonsense` or `suite: arithmetic` stands for one such set for each of its tasks.
    """

    name: str = ""  # empty: that of the task
    data: str | None = None  # None: where the task's rows are (`neuroada tasks`)
    task: str | None = None  # None: the task of the training data
    style: str | None = None
    split: str | None = None  # of `data`; None: test
    limit: int | None = pydantic.Field(default=None, gt=0)
    method: Literal["generate", "choices"] = "generate"  # choices: the likeliest of the task's answers
    max_new_tokens: int | None = pydantic.Field(default=None, gt=0)  # None: the task's own
    generation: GenerationSection = dataclasses.field(default_factory=GenerationSection)

    def __post_init__(self) -> None:
        if self.method == "choices" and self.generation != GenerationSection():
            raise ValueError("generation: method 'choices' generates nothing; leave one out")
        if self.method == "choices" and self.max_new_tokens is not None:
            raise ValueError("max_new_tokens: method 'choices' generates nothing; leave one out")
        if self.task is None and not (self.name and self.data):
            raise ValueError("a set without a task needs a name and data")
        if self.split is not None and not self.data:
            raise ValueError("split: it is of `data`, and the task's own rows have theirs; leave it out or give both")
        object.__setattr__(self, "name", self.name or self.task)  # frozen for everybody else


@dataclass(frozen=True, config=_STRICT)
class EvaluationSection:
    """What to score before (if asked) and after training, always with the merged weights.

    `best_epoch` names the set that chooses the epoch that is kept, as GLUE is reported: a part of it drawn from the seed
    (1,000 rows of more than 5,000, else half) is scored after every epoch, and the rest of it after training.
    """

    sets: list[EvaluationSet] = pydantic.Field(default_factory=list)
    best_epoch: str | None = None
    before: bool = True
    batch_size: int = pydantic.Field(default=16, gt=0)


@dataclass(frozen=True, config=_STRICT)
class WatchdogSection:
    """What is done about steps that go wrong, and from when on the rest is told (docs/reliability.md).

    A step whose loss, gradient or updated values are NaN or infinite ends the run (`stop`), or is left out (`skip`), up to
    `max_skips` of them. A loss is a spike from `spike` robust deviations above the median of the last 100 on. A batch that
    takes longer than `stall_warn` seconds is told, one that takes longer than `stall_stop` ends the run.
    """

    nonfinite: Literal["stop", "skip"] = "stop"
    max_skips: int = pydantic.Field(default=10, ge=0)
    spike: float | None = pydantic.Field(default=10.0, gt=0)
    stall_warn: float | None = pydantic.Field(default=30.0, gt=0)
    stall_stop: float | None = pydantic.Field(default=None, gt=0)


# What transformers' Trainer does unless it is told otherwise, and the published code tells it nothing of these.
_TRAINER = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "clip_norm": 1.0}


@dataclass(frozen=True, config=_STRICT)
class RunConfig:
    """Everything a run needs. `output` defaults to runs/<name>.

    `fidelity` says in which numbers it is done. recommended: values and moments of AdamW in float32 on any base. official:
    in the dtype of the base, as the published code does it, so that a bfloat16 base is summed with its values in bfloat16;
    and AdamW and clipping as transformers' Trainer has them by default. On a float32 base there is no difference.
    """

    name: str
    model: ModelSection
    data: DataSection
    optimizer: OptimizerSection
    training: TrainingSection
    bypass: BypassSection = dataclasses.field(default_factory=BypassSection)
    fidelity: Literal["recommended", "official"] = "recommended"
    classifier: ClassifierSection = dataclasses.field(default_factory=ClassifierSection)
    evaluation: EvaluationSection = dataclasses.field(default_factory=EvaluationSection)
    parallel: ParallelSection = dataclasses.field(default_factory=ParallelSection)
    watchdog: WatchdogSection = dataclasses.field(default_factory=WatchdogSection)
    tracking: list[Literal["tensorboard", "wandb", "trackio"]] = dataclasses.field(
        default_factory=list
    )  # besides metrics.jsonl
    output: str | None = None
    merge: bool = False  # also write the merged model to <output>/merged
    seed: Seed = 42
    seeds: list[Seed] | None = pydantic.Field(default=None, min_length=1)  # a run for each

    def __post_init__(self) -> None:
        for field, default in _TRAINER.items() if self.fidelity == "official" else ():
            found = getattr(self.optimizer, field)
            if found != default:
                raise ValueError(f"optimizer.{field}: found {found}, but fidelity: official needs {default}; leave one out")
        for where, task in self.tasks():
            if task not in TASKS and task not in GLUE:
                raise ValueError(f"{where}.task: {unknown(task)}")
        styles = [member.value for member in PromptStyle]
        for where, style in self._styles():
            if style is not None and style not in styles:
                raise ValueError(f"{where}.style: unknown style {style!r}; known: {', '.join(styles)}")
        names = [each.name for each in self.evaluation.sets]
        if self.evaluation.best_epoch is not None and self.evaluation.best_epoch not in names:
            found = ", ".join(names) or "none"
            raise ValueError(f"evaluation.best_epoch: no set {self.evaluation.best_epoch!r}, found {found}")
        twice = sorted({seed for seed in self.seeds or () if (self.seeds or []).count(seed) > 1})
        if twice:
            raise ValueError(f"seeds: {twice[0]} is there twice")
        if len(names) != len(set(names)):
            raise ValueError("evaluation.sets: two sets have the same name")
        for name in names:
            if not name or "/" in name:
                raise ValueError(f"evaluation.sets: {name!r} becomes part of a file name; it must be text without '/'")

    def tasks(self) -> list[tuple[str, str]]:
        """(section, task) of the training rows and of every evaluation set."""
        sets = enumerate(self.evaluation.sets)
        return [("data", self.data.task)] + [(f"evaluation.sets.{i}", each.task or self.data.task) for i, each in sets]

    def _styles(self) -> list[tuple[str, str | None]]:
        sets = enumerate(self.evaluation.sets)
        return [("data", self.data.style)] + [(f"evaluation.sets.{i}", each.style) for i, each in sets]

    @property
    def directory(self) -> Path:
        """Where the run's files go."""
        return Path(self.output or f"runs/{self.name}")
