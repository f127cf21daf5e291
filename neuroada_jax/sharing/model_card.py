"""The model card of an adapter, made from its metadata and from the config and results of its run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from neuroada_jax import models
from neuroada_jax.adapters import factors, native
from neuroada_jax.data.prompts import PromptForm
from neuroada_jax.errors import UserError
from neuroada_jax.evaluation.scoring import Score
from neuroada_jax.sharing import card_usage, public_names
from neuroada_jax.sharing.markdown import block, code, table, text
from neuroada_jax.sharing.origin import CURVE, RESULTS, Base
from neuroada_jax.training import report
from neuroada_jax.training.config import RunConfig

_NOTE = "In %; in brackets the 95 % intervals."
_PAPER, _LORA_PAPER = "https://arxiv.org/abs/2510.18940", "https://arxiv.org/abs/2106.09685"


class Subject(NamedTuple):
    """What a card is about.

    Attributes:
      repository: hub id that the card is for.
      adapter: as it will be uploaded.
      base: the base model's public name.
      results: content of results.json, as it will be uploaded; None without a run.
      config: of the run; None without one.
      near: a path in the run, to which the config's names may be relative.
      has_curve: whether loss.png is in the folder.
    """

    repository: str
    adapter: native.Adapter
    base: Base
    results: Mapping[str, Any] | None
    config: RunConfig | None
    near: Path
    has_curve: bool

    @property
    def is_decoder(self) -> bool | None:
        """Whether the model continues texts; None for a model that is not one of this library's."""
        architecture = models.ARCHITECTURES.get(str(self.adapter.metadata["base"].get("model_type")))
        return None if architecture is None else architecture.is_decoder


def render(subject: Subject) -> str:
    """Return the text of README.md.

    Raises:
      UserError: the results are not those of a run.
    """
    before, after, mean = _scores(subject)
    parts = [
        ["---", _header(subject, after), "---"],
        [f"# {subject.repository.rpartition('/')[2]}"],
        _introduction(subject),
        _score_table(before, after, mean),
        _training(subject),
        _prompts(subject),
        card_usage.sections(subject.repository, subject.base, subject.adapter, subject.is_decoder),
        _versions(subject.adapter.metadata),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _scores(subject: Subject) -> tuple[dict[str, Score], dict[str, Score], tuple[str, str] | None]:
    """Return the scores before and after the training, and the means of several sets as texts."""
    if subject.results is None:
        return {}, {}, None
    try:
        before, after = report.scores(subject.results, "before"), report.scores(subject.results, "after")
        mean = subject.results.get("mean")
        return before, after, (report.percent(mean["before"]), report.percent(mean["after"])) if mean else None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{subject.near}: {RESULTS} has not the scores of a run ({error!r})") from error


def _header(subject: Subject, after: Mapping[str, Score]) -> str:
    """Return the metadata that the hub reads."""
    kind = {True: "text-generation", False: "text-classification", None: None}[subject.is_decoder]
    content: dict[str, Any] = {
        "base_model": subject.base.hub_id,
        "base_model_relation": "adapter" if subject.base.hub_id else None,
        "library_name": "neuroada-jax",
        "pipeline_tag": kind,
        "tags": ["lora"] if subject.adapter.factors else ["neuroada", "sparse-fine-tuning", "peft-like"],
        "datasets": [each.partition(":")[0] for each in _rows(subject) if public_names.is_on_hub(each, subject.near)],
    }
    if after and kind:
        scored = [_model_index(subject, name, score, kind) for name, score in after.items() if score.value == score.value]
        content["model-index"] = [{"name": subject.repository.rpartition("/")[2], "results": scored}] if scored else None
    present = {key: value for key, value in content.items() if value}
    return yaml.safe_dump(present, sort_keys=False, allow_unicode=True, width=10_000).strip()


def _model_index(subject: Subject, name: str, score: Score, kind: str) -> dict[str, Any]:
    """Return a set's scores in the form of a card's model-index."""
    sets = subject.config.evaluation.sets if subject.config else []
    data = next((str(each.data) for each in sets if each.name == name and each.data), "")
    source = data.partition(":") if data and public_names.is_on_hub(data, subject.near) else ("", "", "")
    dataset = {"name": _plain(name), "type": source[0] or _plain(name)} | ({"config": source[2]} if source[2] else {})
    metrics = [(score.metric, score.value), *((each, value) for each, value in score.beside.items() if value == value)]
    return {
        "task": {"type": kind},
        "dataset": dataset,
        "metrics": [{"type": each, "name": each, "value": round(float(value), 4)} for each, value in metrics],
    }


def _plain(name: str) -> str:
    return " ".join(name.split())


def _rows(subject: Subject) -> list[str]:
    """Return the names of the training rows, as the config has them: one, or a list of files."""
    train: Any = subject.config.data.train if subject.config else []
    return [str(each) for each in ([train] if isinstance(train, str) else train)]


def _introduction(subject: Subject) -> list[str]:
    base, about = subject.base, subject.adapter.metadata["base"]
    if base.hub_id:
        name = f"[{text(base.hub_id)}](https://huggingface.co/{base.hub_id})"
    else:
        name = code(base.name) if base.name else "a model of its author's own"
    name += f" at revision {code(base.revision)}" if base.revision else ""
    values = subject.adapter.size
    share = f" ({100 * values / about['parameters']:.4f} % of the model)" if about.get("parameters") else ""
    lora, k = factors.options_of(subject.adapter.metadata), subject.adapter.metadata.get("k")
    connections = "one input connection" if k == 1 else f"{text(k)} input connections"
    kind, where = f"[NeuroAda]({_PAPER})", f"on {connections} of every neuron"
    if lora is not None:
        kind, where = f"[LoRA]({_LORA_PAPER})", f"in low-rank factors with r = {lora.r} and alpha = {lora.alpha:g}"
    return [
        f"A {kind} adapter of {name}, made with neuroada-jax: {values:,} trained values{share}, {where}. It holds no base "
        "weights."
    ]


def _score_table(before: Mapping[str, Score], after: Mapping[str, Score], mean: tuple[str, str] | None) -> list[str]:
    if not after:
        return []
    known = {each.name: each for name, score in before.items() for each in report.figures(name, score)}
    rows = []
    for each in (each for name, score in after.items() for each in report.figures(name, score)):
        base = known[each.name].shown if each.name in known else "-"
        rows.append((text(each.name.strip()), text(each.metric), f"{each.n:,}", base, each.shown))
    if mean:
        rows.append(("mean of the sets", "", "", *mean))
    header = ("set", "metric", "rows", "base model", "with the adapter")
    note = "In %, but mse as it is; in brackets the 95 % intervals." if "mse" in {row[1] for row in rows} else _NOTE
    return ["## Scores", "", *table(header, rows, right=(2, 3, 4)), "", note]


def _training(subject: Subject) -> list[str]:
    metadata, config, results = subject.adapter.metadata, subject.config, subject.results or {}
    rule = f", chosen by {metadata['rule']}" if metadata.get("rule") else ""
    lora = factors.options_of(metadata)
    rows = [
        ("connections per neuron (k)", text(f"{metadata.get('k')}{rule}"))
        if lora is None
        else ("LoRA", f"r = {lora.r}, alpha = {lora.alpha:g}"),
        ("trained linear maps", text(", ".join(map(str, metadata.get("targets") or [])) or "all of every layer")),
        ("trained values", f"{subject.adapter.size:,}"),
    ]
    dense, labels = subject.adapter.dense_parameters, metadata["base"].get("labels")
    if labels:
        rows.append(("labels", text(", ".join(labels))))
    if dense:
        total = sum(each.size for each in dense.values())
        rows.append(("trained densely", f"{text(', '.join(dense))} ({total:,} values)"))
    if config:
        rows += _config_rows(subject, config, results)
    losses = [results.get("first_loss"), results.get("last_loss")]
    if all(isinstance(loss, float | int) for loss in losses):
        rows.append(("loss, first to last step", " to ".join(f"{loss:.4f}" for loss in losses)))
    validation = results.get("validation")
    if isinstance(validation, dict) and isinstance(validation.get("best_loss"), float | int):
        rows.append(("best validation loss", text(f"{validation['best_loss']:.4f} at step {validation.get('best_step')}")))
    best = results.get("best_epoch")
    if isinstance(best, dict):
        rows.append(("kept epoch", text(f"{best.get('epoch')}, the best on a part of {best.get('set')}")))
    curve = ["", f"![loss by step]({CURVE})"] if subject.has_curve else []
    return ["## Training", "", *table(("", ""), rows), *curve]


def _config_rows(subject: Subject, config: RunConfig, results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the training's table that come from the run's config."""
    names = [
        each if public_names.is_on_hub(each, subject.near) else public_names.last_part(each) for each in _rows(subject)
    ]
    split = (
        f", split {config.data.split}" if any(public_names.is_on_hub(each, subject.near) for each in _rows(subject)) else ""
    )
    used = f", {results['examples']:,} examples" if isinstance(results.get("examples"), int) else ""
    steps, epochs = results.get("steps"), results.get("epochs")
    length = f"{config.training.epochs} epochs" if config.training.epochs else f"{config.training.steps} steps"
    if isinstance(steps, int) and isinstance(epochs, float | int):
        length = f"{steps:,} steps, {epochs:.3g} epochs"
    optimizer = config.optimizer
    warmup = f", {100 * optimizer.warmup_ratio:.3g} % warmup" if optimizer.warmup_ratio else ""
    decay = f", weight decay {optimizer.weight_decay:g}" if optimizer.weight_decay else ""
    return [
        ("rows", text(f"{', '.join(names)}{split}{used}, read as {config.data.task}")),
        ("length", text(f"{length}, {config.training.batch_size} rows a step, {config.data.max_length} tokens at most")),
        ("learning rate", text(f"{optimizer.learning_rate:g}, {optimizer.schedule}{warmup}{decay}")),
        ("base dtype", text(subject.adapter.metadata["base"].get("dtype", "unknown"))),
        ("seed", text(config.seed)),
    ]


def _prompts(subject: Subject) -> list[str]:
    """Return the prompt form, as adapter.json has it; nothing for encoders and adapters without one."""
    form: PromptForm | None = native.form_of(subject.adapter)
    if form is None or subject.is_decoder is not True:
        return []
    rows = [("style", code(form.style.value))]
    rows += [("task", text(form.task))] if form.task else []
    rows += [(f"template argument {code(name)}", code(repr(value))) for name, value in form.template_arguments.items()]
    rows += [("date of the template", text(form.date))] if form.date else []
    rows += [("a generation ends at", ", ".join(code(each) for each in form.end_tokens))] if form.end_tokens else []
    template = []
    if form.chat_template is not None:
        template = [
            "",
            "<details><summary>The chat template</summary>",
            "",
            *block(form.chat_template, "jinja"),
            "</details>",
        ]
    note = "The adapter was trained on prompts of this form; neuroada-jax takes it from the adapter by itself."
    return ["## Prompts", "", note, "", *table(("", ""), rows), *template]


def _versions(metadata: Mapping[str, Any]) -> list[str]:
    versions = metadata.get("versions")
    if not isinstance(versions, dict):
        return []
    first = f"neuroada-jax {versions.get('neuroada-jax', '')}".strip()
    others = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "neuroada-jax")
    created = f" on {str(metadata['created'])[:10]}" if metadata.get("created") else ""
    return ["## Versions", "", text(f"Written by {first}{created}" + (f" with {others}." if others else "."))]
