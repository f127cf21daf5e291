"""One config, several seeds: a run for each in its own directory, and a table with mean and standard deviation."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neuroada_jax import console, files
from neuroada_jax.errors import UserError
from neuroada_jax.locks import check_unlocked
from neuroada_jax.pretrained.load import open_with_tokenizer
from neuroada_jax.training import config_file, modules, preparation, report, results, resuming, run, run_directory
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.signals import Stop


def train(
    config: RunConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    force_resume: bool = False,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Run a config once for each of its `seeds`, in <output>/seed-<n>, and write <output>/results.json.

    Everything that follows from the seed differs between runs: the initial classifier, the order of the examples, dropout
    masks, the part of a set that chooses the epoch, random connections.

    Args:
      config: with `seeds`; its `seed` is not used.
      overwrite: replace existing runs.
      resume: keep finished runs, resume those that were interrupted, and start the others.
      force_resume: see `run.train`; a finished run is kept even if its config differs.
      stop: see `run.fit`.

    Returns: the content of results.json.

    Raises:
      UserError: see `run.train`; also a directory that holds a run, without `overwrite` or `resume`, and with `resume` a
        finished run of another config.
    """
    runs = {seed: _of_seed(config, seed) for seed in config.seeds or [config.seed]}
    if overwrite and resume:
        raise UserError("give --overwrite or --resume, not both")
    if (config.directory / "config.yaml").exists():
        raise UserError(f"{config.directory} holds one run, without seeds; use another name, or remove it")
    for each in runs.values() if not overwrite and not resume else ():  # before the first of them is trained
        if (each.directory / "config.yaml").exists():
            raise UserError(
                f"{each.directory} holds a run already; use --overwrite to replace it, --resume to go on, or another name"
            )
    found = _finished(runs, force_resume) if resume else {}
    replaced = _former(config, runs) if overwrite else []
    for seed, each in runs.items():
        console.say(f"seed {seed}, in {each.directory}")
        if seed in found:
            continue
        saved = resume and (each.directory / "checkpoints").exists()
        prepared = run.prepare(
            each, overwrite=overwrite or (resume and not saved), resume=saved, force_resume=force_resume and saved
        )
        found[seed] = run.finish(run.fit(dataclasses.replace(prepared, replaced=replaced), stop=stop))
        replaced = []
    content = summarise(config, {seed: found[seed] for seed in runs})
    files.write_text(config.directory / "results.json", files.to_json(content, indent=2) + "\n")
    return content


def _of_seed(config: RunConfig, seed: int) -> RunConfig:
    directory: Path = config.directory / f"seed-{seed}"
    return dataclasses.replace(config, name=f"{config.name}-seed-{seed}", output=str(directory), seed=seed, seeds=None)


def _former(config: RunConfig, runs: dict[int, RunConfig]) -> list[Path]:
    """Return what former runs of the seeds have left, so that a later `resume` cannot take it for what replaces it.

    Raises:
      UserError: one of them is at work.
    """
    for each in runs.values():
        check_unlocked(each.directory / run_directory.LOCK, str(each.directory))
    _, *others = runs.values()  # that of the first is removed by its run
    left = [path for each in others for path in (*run_directory.results_of(each.directory), each.directory / "config.yaml")]
    return [config.directory / "results.json", *left]


def _finished(runs: dict[int, RunConfig], force: bool) -> dict[int, dict[str, Any]]:
    """Return the results of finished runs, by seed. Their configs must match the one that the remaining seeds will use.

    Raises:
      UserError: a config that differs in a field that changes the result, or other rows, without `force`; or an evaluation
        set of the config that a finished run has not scored.
    """
    done = {seed: each for seed, each in runs.items() if (each.directory / "results.json").exists()}
    if not done:
        return {}
    first = next(iter(done.values()))
    opened, tokenizer = open_with_tokenizer(first.model.path, first.model.dtype, quantization_of=first.model.held)
    model = opened.model
    found = {}
    for seed, each in done.items():
        written = config_file.load(str(each.directory / "config.yaml"))
        about = {"config": dataclasses.asdict(written), "dropout_seed": None if model.architecture.is_decoder else seed}
        resuming.check_config(about, modules.resolved(each, model), force)
        found[seed] = results.read(each.directory / "results.json")
        scored, asked = list(found[seed]["after"]), [one.name for one in each.evaluation.sets]
        if missing := [name for name in asked if name not in scored]:
            raise UserError(f"{each.directory} has no score of {', '.join(missing)}, found {', '.join(scored) or 'none'}")
        if then := found[seed].get("rows"):  # earlier versions did not write it
            rows = preparation.prepare_rows(each, (opened, tokenizer), date=then["date"])
            resuming.check_data(then, each.directory, rows, force)
    return found


def summarise(config: RunConfig, runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Return the content of results.json of several seeds, from that of each.

    Returns: a dict, of which
      runs: for each seed its directory, the epoch that was kept, and the scores before and after, as in its own file.
      after: by set, the metric, the rows of each seed, and of the value and of every metric beside it mean, standard
        deviation (of a sample; None for one seed) and the values. Mean and deviation are None where a value is not finite.
    """
    first = next(iter(runs.values()))
    kept = ("directory", "best_epoch", "before", "after", "rounded_to_nothing", "train_seconds")
    after = {}
    for name in (each.name for each in config.evaluation.sets):
        scores = [each["after"][name] for each in runs.values()]
        after[name] = {
            "metric": scores[0]["metric"],
            "n": [score["n"] for score in scores],
            "value": _spread([score["value"] for score in scores]),
            "beside": {metric: _spread([score["beside"][metric] for score in scores]) for metric in scores[0]["beside"]},
        }
    return {
        "name": config.name,
        "directory": str(config.directory),
        "seeds": list(runs),
        "steps": first["steps"],
        "trainable": first["trainable"],
        "total_parameters": first["total_parameters"],
        "trainable_percent": first["trainable_percent"],
        "runs": [{"seed": seed, **{field: each.get(field) for field in kept}} for seed, each in runs.items()],
        "after": after,
        "backend": first["backend"],
        "versions": first["versions"],
    }


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Return the mean, the standard deviation of a sample, and the values; null stands for a value that is not finite."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(finite) < len(values):
        return {"mean": None, "deviation": None, "values": list(values)}
    deviation = statistics.stdev(finite) if len(finite) > 1 else None
    return {"mean": statistics.mean(finite), "deviation": deviation, "values": finite}


def print_summary(content: dict[str, Any]) -> None:
    """Print a table with a line for each seed and figure of a set, and their means.

    Args:
      content: of results.json of several seeds.
    """
    lines = []
    runs = [
        {name: report.figures(name, score) for name, score in report.scores(row, "after").items()}
        for row in content["runs"]
    ]
    fields = report.count_fields(each for found in runs for figures in found.values() for each in figures)
    for name in content["after"]:
        values: dict[tuple[str, str], list[float]] = {}
        for row, found in zip(content["runs"], runs, strict=True):
            best = row["best_epoch"]
            epoch = f"{best['epoch']} of {len(best['epochs'])}" if best and best["set"] == name else "-"
            for each in found[name]:
                lines.append(
                    (each.name, each.metric, str(row["seed"]), str(each.n), *each.cells(fields), epoch, each.shown)
                )
                values.setdefault((each.name, each.metric), []).append(each.value)
        for (label, metric), every in values.items():
            spread = _spread(every)
            value = f"{report.shown(metric, spread['mean'])} ± {_deviation(metric, spread['deviation'])}"
            lines.append((label, metric, "mean", "", *[""] * len(fields), "", value))
    title = f"{content['name']}: scores in % (95 % interval; mean ± standard deviation)"
    console.table(title, ("set", "metric", "seed", "n", *fields, "epoch", "score"), lines)
    console.say(f"trained values: {content['trainable']:,}; files: {content['directory']}")


def _deviation(metric: str, value: float | None) -> str:
    return "-" if value is None else report.shown(metric, value)
