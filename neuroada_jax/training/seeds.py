"""One config, several seeds: a run for each in a folder of its own, and a table with mean and deviation."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neuroada_jax import console, files
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained.load import open_with_tokenizer
from neuroada_jax.training import config_file, modules, report, resuming, run
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
    """Runs a config once for each of its `seeds`, in <output>/seed-<n>, and writes <output>/results.json.

    Everything that follows from the seed differs: a new head, the order of the rows, dropout, the part of a set that
    chooses the epoch.

    Args:
      config: with `seeds`; its `seed` is not used.
      overwrite: replace runs that are there.
      resume: leave finished runs alone, go on with one that was interrupted, and start the others.
      force_resume: see `run.train`; a finished run counts although its config differs.
      stop: see `run.train`.

    Returns: the content of results.json.

    Raises:
      UserError: see `run.train`; also a folder that holds a run, unless told what to do with it, and with `resume` a
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
    for seed, each in runs.items():
        console.say(f"seed {seed}, in {each.directory}")
        if seed in found:
            continue
        if resume:
            saved = (each.directory / "checkpoints").exists()
            found[seed] = run.train(each, overwrite=not saved, resume=saved, force_resume=force_resume, stop=stop)
        else:
            found[seed] = run.train(each, overwrite=overwrite, stop=stop)
    results = summarise(config, {seed: found[seed] for seed in runs})
    files.write_text(config.directory / "results.json", files.to_json(results, indent=2) + "\n")
    return results


def _of_seed(config: RunConfig, seed: int) -> RunConfig:
    directory: Path = config.directory / f"seed-{seed}"
    return dataclasses.replace(config, name=f"{config.name}-seed-{seed}", output=str(directory), seed=seed, seeds=None)


def _finished(runs: dict[int, RunConfig], force: bool) -> dict[int, dict[str, Any]]:
    """The results of the runs that have ended, whose configs must be what the others will be trained by.

    Raises:
      UserError: one differs in what the result depends on, without `force`, or has not scored the sets of the config.
    """
    done = {seed: each for seed, each in runs.items() if (each.directory / "results.json").exists()}
    if not done:
        return {}
    first = next(iter(done.values()))
    model = open_with_tokenizer(first.model.path, first.model.dtype)[0].model
    found = {}
    for seed, each in done.items():
        written = config_file.load(str(each.directory / "config.yaml"))
        about = {"config": dataclasses.asdict(written), "dropout_seed": None if model.architecture.is_decoder else seed}
        resuming.check_config(about, modules.resolved(each, model), force)
        found[seed] = files.read_json(each.directory / "results.json")
        scored, asked = list(found[seed]["evaluation"]), [one.name for one in each.evaluation.sets]
        if missing := [name for name in asked if name not in scored]:
            raise UserError(f"{each.directory} has no score of {', '.join(missing)}, found {', '.join(scored) or 'none'}")
    return found


def summarise(config: RunConfig, runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The content of results.json of several seeds, from that of each.

    Returns:
      runs: a row for each seed: its folder, the epoch that was kept, the split, and the scores of every set.
      evaluation: by set and then by metric: mean, deviation (of a sample; None for one seed) and the values. None for both
        where a score is not finite.
    """
    sets = [each.name for each in config.evaluation.sets]
    first = next(iter(runs.values()))
    rows = [
        {
            "seed": seed,
            "directory": each["directory"],
            "best_epoch": each.get("best_epoch"),
            "evaluation": each["evaluation"],
            "train_seconds": each["train_seconds"],
        }
        for seed, each in runs.items()
    ]
    evaluation = {}
    for name in sets:
        metric = first["evaluation"][name]["metric"]
        evaluation[name] = {
            "metric": metric,
            "n": [each["evaluation"][name]["n"] for each in runs.values()],
            **{
                each: _spread([found["evaluation"][name][f"{each}_after"] for found in runs.values()])
                for each in (metric, *first["evaluation"][name]["beside"])
            },
        }
    return {
        "name": config.name,
        "directory": str(config.directory),
        "seeds": list(runs),
        "steps": first["steps"],
        "trainable": first["trainable"],
        "total_parameters": first["total_parameters"],
        "trainable_percent": first["trainable_percent"],
        "runs": rows,
        "evaluation": evaluation,
        "backend": first["backend"],
        "versions": first["versions"],
    }


def _spread(values: Sequence[Any]) -> dict[str, Any]:
    if None in values:  # a score that was not finite
        return {"mean": None, "deviation": None, "values": list(values)}
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "deviation": deviation, "values": list(values)}


def print_summary(results: dict[str, Any]) -> None:
    """A table with a line for each seed and figure of a set, and their mean."""
    names, lines = list(results["evaluation"]), []
    runs = [{name: report.figures(name, row["evaluation"][name], "after") for name in names} for row in results["runs"]]
    columns = report.count_columns(each for found in runs for every in found.values() for each in every)
    for name in names:
        values: dict[tuple[str, str], list[float | None]] = {}
        for row, found in zip(results["runs"], runs, strict=True):
            best = row["best_epoch"]
            epoch = f"{best['epoch']} of {len(best['epochs'])}" if best and best["set"] == name else "-"
            for each in found[name]:
                value = report.share(each.value, each.interval)
                lines.append((each.name, each.metric, str(row["seed"]), str(each.n), *each.cells(columns), epoch, value))
                values.setdefault((each.name, each.metric), []).append(each.value)
        for (shown, metric), every in values.items():
            spread = _spread(every)
            deviation = "-" if spread["deviation"] is None else f"{100 * spread['deviation']:.1f}"
            value = f"{report.share(spread['mean'], None)} ± {deviation}"
            lines.append((shown, metric, "mean", "", *[""] * len(columns), "", value))
    title = f"{results['name']}: scores in % (95 % interval; mean ± standard deviation)"
    console.table(title, ("set", "metric", "seed", "n", *columns, "epoch", "score"), lines)
    console.say(f"trained values: {results['trainable']:,}; files: {results['directory']}")
