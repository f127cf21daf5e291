"""The config of a run: every field with its meaning, unit, default and limits. config_file.py reads and writes it."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic.dataclasses import dataclass

from neuroada_jax.data.prompts import PromptStyle
from neuroada_jax.errors import UserError
from neuroada_jax.generation.sampling import Decoding
from neuroada_jax.models import Remat
from neuroada_jax.tasks import ENCODER_TASKS, TASKS, unknown, wrong_columns
from neuroada_jax.training import label_fields, source_fields
from neuroada_jax.training.config_connections import BypassSection, LoraSection
from neuroada_jax.training.config_execution import STRICT, ParallelSection, WatchdogSection
from neuroada_jax.training.config_model import ModelSection

Seed = Annotated[int, pydantic.Field(ge=0, lt=2**32)]  # JAX's keys are made of 32 bits


@dataclass(frozen=True, config=STRICT)
class ClassifierSection:
    """The dense classifier of an encoder, trained beside the bypass. Its biases have no weight decay.

    Attributes:
      train: whether it is trained. Default true; a classifier that the checkpoint lacks must be.
      learning_rate: peak rate. None (the default): `optimizer.learning_rate`.
      weight_decay: of its kernels. None (the default): `optimizer.weight_decay`.
      class_weights: weights of the classes in the loss: "none" (the default), "balanced", so that every class has the same
        weight in all, or a weight for each label, such as {spam: 3}; the others have 1.
    """

    train: bool = True
    learning_rate: float | None = pydantic.Field(default=None, gt=0)
    weight_decay: float | None = pydantic.Field(default=None, ge=0)
    class_weights: label_fields.ClassWeights = "none"

    def __post_init__(self) -> None:
        if not self.train and (self.learning_rate is not None or self.weight_decay is not None):
            raise ValueError("classifier.train: a classifier that is not trained has no learning_rate or weight_decay")


@dataclass(frozen=True, config=STRICT)
class DataSection:
    """The training rows, read as the rows of `task`.

    Attributes:
      train: a file, a pattern such as data/*.jsonl, a directory, or a hub name; or a list of these (docs/data.md).
      split: of a directory or hub name. Default "train".
      columns: field that the task reads -> column of the files, such as {prompt: question}. Default none.
      task: how rows become examples. A decoder takes an instruction task (default "instruct"), an encoder a GLUE task, or
        classification, regression or multilabel on rows of your own (docs/classification.md).
      style: prompt style of a decoder. None (the default): that of the task. Chats use the chat template in any style.
      chat_template: a file, relative to the working directory, or the text of a template, which holds "{{" or "{%". None
        (the default): the tokenizer's own.
      template_arguments: values of variables that the chat template reads, such as {enable_thinking: false}, in training
        and evaluation alike. Default none.
      system: system prompt of chats without one, in training, evaluation and generation alike. None (the default): none.
      learn: "all" assistant turns of a chat are learnt (the default), but those of `weight: 0`, or the "last" of these.
      text: column of the text, or the two columns of a pair, of own classification rows. None (the default): "text".
      label: column of the label. None (the default): "label"; for multilabel with `labels`, a column of 0 and 1 for each.
      labels: names of the labels in their order. "auto" (the default): those of the training rows.
      metric: the main metric, which chooses the best epoch. None (the default): accuracy, pearson or micro_f1.
      max_length: tokens of the longest example; longer ones are truncated. Default 512.
      buckets: padded lengths in tokens, one compiled step for each that occurs. None (the default): derived from the data.
      group_by_length: batches of examples of similar length, for less padding. Default false.
      packing: fill rows of `max_length` tokens with as many complete examples as fit, which do not see one another.
        Default false.
      drop_overlap: drop rows whose question is also in an evaluation set. Default false.
      limit: number of rows that are read. None (the default): all.
      validation: rows whose loss is computed during the training, and by which the best state is kept: a share of the
        training rows between 0 and 1, drawn by the run's seed and of own classes from each the same, or what `train` may
        be. None (the default): none.
    """

    train: source_fields.Sources
    split: str = "train"
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    task: str = "instruct"
    style: str | None = None
    chat_template: str | None = None
    template_arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    system: str | None = pydantic.Field(default=None, min_length=1)
    learn: Literal["all", "last"] = "all"
    text: label_fields.TextColumns = None
    label: str | None = pydantic.Field(default=None, min_length=1)
    labels: label_fields.LabelNames = "auto"
    metric: str | None = None
    max_length: int = pydantic.Field(default=512, gt=1)
    buckets: list[int] | None = None
    group_by_length: bool = False
    packing: bool = False
    drop_overlap: bool = False
    limit: int | None = pydantic.Field(default=None, gt=0)
    validation: source_fields.Validation = None

    def __post_init__(self) -> None:
        label_fields.check(self.task, self.text, self.label, self.labels, self.metric)
        if self.packing and (self.group_by_length or self.buckets is not None):
            raise ValueError(
                "data.packing: packed rows all have data.max_length tokens; remove data.group_by_length and data.buckets"
            )


@dataclass(frozen=True, config=STRICT)
class OptimizerSection:
    """AdamW over the bypass values; the defaults are those of the published runs.

    Attributes:
      learning_rate: peak rate.
      schedule: after the warmup: "linear" to 0 (the default), "cosine" to 0, or "constant".
      warmup_ratio: share of the steps in which the rate rises linearly from 0, from 0 to 1. Default 0.
      weight_decay: decoupled. Default 0.
      clip_norm: bound of the gradient's global L2 norm. Default 1; None: no clipping.
      beta1: decay of the first moment. Default 0.9.
      beta2: decay of the second moment. Default 0.999.
      epsilon: added to the denominator. Default 1e-8.
    """

    learning_rate: float = pydantic.Field(gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = pydantic.Field(default=0.0, ge=0, le=1)
    weight_decay: float = pydantic.Field(default=0.0, ge=0)
    clip_norm: float | None = pydantic.Field(default=1.0, gt=0)
    beta1: float = pydantic.Field(default=0.9, ge=0, lt=1)
    beta2: float = pydantic.Field(default=0.999, ge=0, lt=1)
    epsilon: float = pydantic.Field(default=1e-8, gt=0)


@dataclass(frozen=True, config=STRICT)
class TrainingSection:
    """Length of the training, batch size, memory, and how often files are written.

    Attributes:
      epochs: passes over the data. Exactly one of `epochs` and `steps` is given.
      steps: updates.
      batch_size: examples in an update; with `data.packing`, packed rows. Default 16.
      accumulation: equal micro batches that a batch is computed in, one after the other. Default 1.
      remat: activations that the backward pass recomputes: "none" is fastest, "names" keeps some, "full" (the default)
        needs the least memory.
      log_every: steps between two writes of log lines; there is a line for every step. Default 10.
      save_every: steps between two checkpoints, for --resume. None (the default): only when the run is stopped.
      keep_last: number of the newest checkpoints that are kept. Default 2.
      keep_best: number of the best that are kept besides. Default 0. The best have the highest score of
        `evaluation.best_epoch`, or else the lowest validation loss, or where nothing chooses, the lowest mean loss since
        the previous checkpoint.
      validate_every: steps between two validations on `data.validation`. None (the default): one after every epoch.
      early_stopping: validations without a lower loss after which the run ends. None (the default): it never ends early.
      validation_samples: number of validation prompts that a decoder continues, to be read, at every validation. Default 0.
    """

    epochs: int | None = pydantic.Field(default=None, gt=0)
    steps: int | None = pydantic.Field(default=None, gt=0)
    batch_size: int = pydantic.Field(default=16, gt=0)
    accumulation: int = pydantic.Field(default=1, gt=0)
    remat: Literal["none", "names", "full"] = "full"
    log_every: int = pydantic.Field(default=10, gt=0)
    save_every: int | None = pydantic.Field(default=None, gt=0)
    keep_last: int = pydantic.Field(default=2, ge=1)
    keep_best: int = pydantic.Field(default=0, ge=0)
    validate_every: int | None = pydantic.Field(default=None, gt=0)
    early_stopping: int | None = pydantic.Field(default=None, gt=0)
    validation_samples: int = pydantic.Field(default=0, ge=0)

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            found = "neither" if self.steps is None else "both; set the other one to null"
            raise ValueError(f"give either epochs or steps, found {found}")
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}")

    @property
    def remat_policy(self) -> Remat:
        """The policy of the models for `remat`."""
        return Remat(self.remat)


@dataclass(frozen=True, config=STRICT)
class GenerationSection(Decoding):
    """How answers are generated, with the fields of `sampling.Decoding`; the default is greedy decoding."""

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except UserError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True, config=STRICT)
class EvaluationSet:
    """Rows to score, read as the rows of `task`.

    In a file, `suite: commonsense` or `suite: arithmetic` stands for one such set for each of its tasks.

    Attributes:
      name: in reports and file names. Empty (the default): that of the task.
      data: as `data.train`. None (the default): where the task's own rows are (`neuroada tasks`).
      columns: as `data.columns`. None (the default): those, where `data` is given and the task is that of the training.
      task: None (the default): that of the training data.
      style: prompt style. None (the default): that of the training data where the tasks are related, else the task's.
      split: of `data`. None (the default): "test".
      limit: number of rows. None (the default): all.
      method: "generate" (the default) continues the prompt and reads the answer from it; "choices" takes the likeliest of
        the task's answers.
      max_new_tokens: of a generation. None (the default): the task's own.
      generation: decoding of generations; greedy by default.
    """

    name: str = ""
    data: source_fields.Sources | None = None
    columns: dict[str, str] | None = None
    task: str | None = None
    style: str | None = None
    split: str | None = None
    limit: int | None = pydantic.Field(default=None, gt=0)
    method: Literal["generate", "choices"] = "generate"
    max_new_tokens: int | None = pydantic.Field(default=None, gt=0)
    generation: GenerationSection = dataclasses.field(default_factory=GenerationSection)

    def __post_init__(self) -> None:
        if self.method == "choices" and self.generation != GenerationSection():
            raise ValueError("generation: method 'choices' generates nothing; remove one of them")
        if self.method == "choices" and self.max_new_tokens is not None:
            raise ValueError("max_new_tokens: method 'choices' generates nothing; remove one of them")
        if self.task is None and not (self.name and self.data):
            raise ValueError("a set without a task needs a name and data")
        if self.split is not None and not self.data:
            raise ValueError("split: it needs data; without data, the task's own split is used")
        if self.columns and not self.data:
            raise ValueError("columns: they need data; without data, the task's own rows are read")
        object.__setattr__(self, "name", self.name or self.task)  # the dataclass is frozen


@dataclass(frozen=True, config=STRICT)
class EvaluationSection:
    """Scores of the base model and of the merged model.

    Attributes:
      sets: the rows to score. Default none.
      best_epoch: name of the set that chooses the epoch whose adapter is kept, as GLUE is reported: a part of it that
        depends on the seed (1,000 rows of more than 5,000, else half) is scored after every epoch, and the rest after
        training. None (the default): the last epoch is kept.
      before: whether the base model is scored before training. Default true.
      batch_size: prompts, or examples, that are scored at a time. Default 16.
    """

    sets: list[EvaluationSet] = pydantic.Field(default_factory=list)
    best_epoch: str | None = None
    before: bool = True
    batch_size: int = pydantic.Field(default=16, gt=0)


# Defaults of transformers' Trainer, which the published code does not override.
_TRAINER = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "clip_norm": 1.0}


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """Everything a run needs.

    Attributes:
      name: of the run.
      model: the base model.
      data: the training rows.
      optimizer: AdamW and its schedule.
      training: length, batch size and checkpoints.
      method: what trains in the linear maps: "neuroada" (the default), the connections of `bypass`; or "lora", the low-rank
        factors of `lora`. The section of the other one has no effect.
      bypass: the trained connections.
      lora: the low-rank factors.
      fidelity: the numbers it is computed in. "recommended" (the default): values and moments of AdamW in float32 on any
        base model. "official": in the base dtype, as the published code does it, so that a bfloat16 weight and its value
        are added in bfloat16; AdamW and clipping as transformers' Trainer has them by default. The same on float32.
      classifier: of an encoder.
      evaluation: the sets to score, before and after training.
      parallel: several devices.
      watchdog: reactions to failing steps.
      tracking: trackers that get the log lines besides metrics.jsonl. Default none.
      output: directory of the run. None (the default): runs/<name>.
      merge: also write the merged model to <output>/merged. Default false.
      seed: of the order of the data, dropout, a new classifier, random connections and splits. Default 42.
      seeds: a run for each of them, in <output>/seed-<n>. None (the default): one run.
    """

    name: str
    model: ModelSection
    data: DataSection
    optimizer: OptimizerSection
    training: TrainingSection
    method: Literal["neuroada", "lora"] = "neuroada"
    bypass: BypassSection = dataclasses.field(default_factory=BypassSection)
    lora: LoraSection = dataclasses.field(default_factory=LoraSection)
    fidelity: Literal["recommended", "official"] = "recommended"
    classifier: ClassifierSection = dataclasses.field(default_factory=ClassifierSection)
    evaluation: EvaluationSection = dataclasses.field(default_factory=EvaluationSection)
    parallel: ParallelSection = dataclasses.field(default_factory=ParallelSection)
    watchdog: WatchdogSection = dataclasses.field(default_factory=WatchdogSection)
    tracking: list[Literal["tensorboard", "wandb", "trackio"]] = dataclasses.field(default_factory=list)
    output: str | None = None
    merge: bool = False
    seed: Seed = 42
    seeds: list[Seed] | None = pydantic.Field(default=None, min_length=1)

    def __post_init__(self) -> None:
        self._check_fidelity()
        self._check_validation()
        for where, task in self.tasks():
            if task not in TASKS and task not in ENCODER_TASKS:
                raise ValueError(f"{where}.task: {unknown(task)}")
        self._check_columns()
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
            raise ValueError(f"seeds: {twice[0]} is given twice")
        if len(names) != len(set(names)):
            raise ValueError("evaluation.sets: two sets have the same name")
        for name in names:
            if not name or "/" in name:
                raise ValueError(f"evaluation.sets: {name!r} becomes part of a file name; it must be text without '/'")

    def _check_fidelity(self) -> None:
        if self.fidelity == "official" and self.method != "neuroada":
            raise ValueError(f"fidelity: official is the published NeuroAda code, which has no {self.method}; remove it")
        for field, default in _TRAINER.items() if self.fidelity == "official" else ():
            found = getattr(self.optimizer, field)
            if found != default:
                raise ValueError(
                    f"optimizer.{field}: found {found}, but fidelity: official needs {default}; remove one of them"
                )

    def _check_validation(self) -> None:
        for field in ("validate_every", "early_stopping", "validation_samples") if self.data.validation is None else ():
            if getattr(self.training, field):
                raise ValueError(f"training.{field}: it needs data.validation, a share of the rows or a file")
        if self.data.validation is not None and self.evaluation.best_epoch is not None:
            raise ValueError("data.validation: it and evaluation.best_epoch both choose the state to keep; remove one")

    def tasks(self) -> list[tuple[str, str]]:
        """Return (section, task) of the training rows and of every evaluation set."""
        sets = enumerate(self.evaluation.sets)
        return [("data", self.data.task)] + [(f"evaluation.sets.{i}", each.task or self.data.task) for i, each in sets]

    def columns_of(self, each: EvaluationSet) -> dict[str, str]:
        """Return the renamed columns of a set: its own, else those of the training data where its task is the same."""
        same = each.data is not None and each.task in (None, self.data.task)
        return each.columns if each.columns is not None else self.data.columns if same else {}

    def _check_columns(self) -> None:
        given = [self.data.columns, *(each.columns for each in self.evaluation.sets)]
        for (where, task), columns in zip(self.tasks(), given, strict=True):
            message = columns and wrong_columns(task, columns)
            if message:
                raise ValueError(f"{where}.columns: {message}")

    def _styles(self) -> list[tuple[str, str | None]]:
        sets = enumerate(self.evaluation.sets)
        return [("data", self.data.style)] + [(f"evaluation.sets.{i}", each.style) for i, each in sets]

    @property
    def trained(self) -> BypassSection | LoraSection:
        """The section that `method` names."""
        return self.lora if self.method == "lora" else self.bypass

    @property
    def directory(self) -> Path:
        """The directory of the run's files."""
        return Path(self.output or f"runs/{self.name}")
