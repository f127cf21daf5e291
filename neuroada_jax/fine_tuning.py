"""Fine-tuning from Python: `fine_tune` turns options into the config of a run, runs it, and returns the tuned model.

The config is the same `RunConfig` that a YAML file with these fields gives.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from neuroada_jax.adapters import native
from neuroada_jax.core import bypass
from neuroada_jax.core.scores import Score
from neuroada_jax.data.rows import Rows, rows_from_list
from neuroada_jax.errors import UserError
from neuroada_jax.models import unrolled
from neuroada_jax.pretrained.load import load_with_progress
from neuroada_jax.session import PretrainedModel, TunedModel
from neuroada_jax.training import config_file, run
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.loop import NotFinite

# Sections whose fields are options of `fine_tune` by their own names; those of the others are given as `section={...}`.
_FLAT = ("bypass", "data", "optimizer", "training")
# Fields of a config that `fine_tune` takes in another way.
_ELSEWHERE = {
    "model": "the model is the first argument",
    "train": "the rows are the second argument",
    "seeds": "fine_tune is one run; call it once for each seed",
}


def fine_tune(
    model: PretrainedModel,
    rows: str | Path | Iterable[Mapping[str, Any]] | Sequence[str | Path],
    /,
    *,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Any,
) -> TunedModel:
    """Train a bypass on a model, from zero values, and return the tuned model; the model itself stays as it is.

    The options are the fields of a config, with the names, checks and defaults of neuroada_jax/training/config.py. Fields
    of the sections bypass, data, optimizer and training are given by themselves (k, learning_rate, epochs, batch_size,
    max_length, style, ...), as are name, output, merge, seed, fidelity and tracking; other sections are given as dicts
    (evaluation={...}, parallel={...}, watchdog={...}, classifier={...}).

    Args:
      model: from `load`, without an adapter. A decoder lends its weights to the run and has them back afterwards; if the
        training ends early, after its first step, they are lost and the model is closed.
      rows: a file, a directory of `datasets`, a hub name, a list of these, or rows in memory: dicts, a `datasets.Dataset`
        or a pandas `DataFrame`.
      on_log: called with every step's line of metrics, while the run holds the model's weights. What it raises ends the
        run.
      overwrite: replace the run that is in `output`.
      resume: continue the run that is in `output` from its last checkpoint.
      **options: see above; `score` may also be a function of a kernel (O, I) that returns finite scores (O, I). Without
        `output` the files of the run are temporary, and only the `TunedModel` remains.

    Raises:
      UserError: in one line: a model, rows or options that do not fit; a loss that becomes NaN or infinite.
    """
    if not isinstance(model, PretrainedModel):
        raise UserError(
            "fine_tune: model: expected a PretrainedModel (neuroada_jax.load without adapter, or the attribute model of a "
            f"TunedModel), found {type(model).__name__}"
        )
    model._check_open()
    if on_log is not None and not callable(on_log):
        raise UserError(f"fine_tune: on_log: expected a function of a line's dict, found {type(on_log).__name__}")
    options, score = _score(options)
    train, in_memory = _rows(rows)
    options, held_back = _validation(options)
    config = _config(model, train, options)
    needs_files = {"resume": resume, "merge": config.merge, "save_every": config.training.save_every is not None}
    asked = next((name for name, given in needs_files.items() if given), None)
    if config.output is None and asked:
        raise UserError(f"fine_tune: {asked} needs output, the run's directory: without it no file of the run is kept")
    if config.output == "":
        raise UserError("fine_tune: output: expected the run's directory, found an empty text")
    keeps_files = config.output is not None
    with tempfile.TemporaryDirectory(prefix="neuroada-") as folder:
        if not keeps_files:
            config = dataclasses.replace(config, output=str(Path(folder) / "run"))
        history: list[dict[str, Any]] = []

        def on_lines(lines: Sequence[dict[str, Any]]) -> None:
            history.extend(dict(line) for line in lines)
            for line in lines:
                if on_log is not None:
                    on_log(dict(line))

        prepared = run.prepare(
            config,
            overwrite=overwrite,
            resume=resume,
            model=(model._loaded, model.tokenizer),
            rows=in_memory,
            validation_rows=held_back,
            score=score,
        )
        try:
            tuned, results = _train(model, prepared, on_lines)
        except UserError as error:
            if keeps_files or not isinstance(error.__cause__, NotFinite):
                raise
            reason = str(error).partition(";")[0]  # what follows names an adapter in the temporary folder
            raise UserError(f"{reason}; with output=..., the adapter of the last good step is kept") from error
        adapter = native.read(str(config.directory / "adapter"))
    return TunedModel(tuned, adapter, history, results)


def _train(model: PretrainedModel, prepared: run.Prepared, on_lines: run.OnLines) -> tuple[PretrainedModel, dict[str, Any]]:
    """Run the training; return the model that the adapter belongs to, and the run's results."""
    if not model.is_decoder:  # the task's classifier takes the place of its own, so the run reads the weights again
        results = run.finish(run.fit(prepared, on_lines=on_lines))
        return PretrainedModel(
            load_with_progress(prepared.opened, prepared.config.seed, replaced=True), model.tokenizer
        ), results
    loaded = model._take("its weights are in a run that goes on")
    placement = jax.tree.map(lambda leaf: leaf.sharding, loaded.params)  # the run may place them on several devices
    try:
        fitted = run.fit(prepared, loaded=loaded, on_lines=on_lines)
    except BaseException:
        if not any(leaf.is_deleted() for leaf in jax.tree.leaves(loaded.params)):  # no step was taken
            model._give(loaded.params)
        else:
            model._closed = "its weights went into a run that did not end"
        raise
    try:
        return model, run.finish(fitted)
    finally:
        state = fitted.state
        original = jax.jit(bypass.unmerge, donate_argnums=0)(state.params, state.columns, state.base_entries)
        model._give(jax.device_put(unrolled.stacked(original), placement))


def _score(options: Mapping[str, Any]) -> tuple[dict[str, Any], Score | None]:
    """Return the options as a config has them, and the caller's own score if there is one, else None."""
    given = options.get("score")
    return ({**options, "score": "custom"}, given) if callable(given) else (dict(options), None)


def _validation(options: Mapping[str, Any]) -> tuple[dict[str, Any], Rows | None]:
    """Return the options, and the validation rows if they are in memory, else None."""
    given = options.get("validation")
    if given is None or isinstance(given, int | float):
        return dict(options), None
    sources, rows = _rows(given, "validation")
    return {**options, "validation": sources}, rows


def _rows(rows: object, option: str = "rows") -> tuple[str | list[str], Rows | None]:
    """Return the value of data.train, and the rows if they are in memory, else None."""
    if isinstance(rows, str | Path):
        if not str(rows):
            raise UserError(f"fine_tune: {option}: expected a path, a hub name or dicts, found an empty text")
        return str(rows), None
    if isinstance(rows, list | tuple) and rows and all(isinstance(each, str | Path) for each in rows):
        return [str(each) for each in rows], None
    if type(rows).__name__ == "DataFrame":  # of pandas, which is not imported here
        rows = rows.to_dict("records")  # type: ignore[attr-defined]
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        raise UserError(f"fine_tune: {option}: expected a path, a hub name or dicts, found {type(rows).__name__}")
    found = list(rows)
    for number, row in enumerate(found):
        if not isinstance(row, Mapping):
            raise UserError(f"fine_tune: {option}: row {number}: expected a dict, found {type(row).__name__}")
        if not all(isinstance(field, str) for field in row):
            raise UserError(f"fine_tune: {option}: row {number}: expected fields named by texts, found {list(row)}")
    if not found:
        raise UserError(f"fine_tune: {option}: no rows, expected at least one")
    return "rows in memory", rows_from_list([dict(row) for row in found])


def _options() -> dict[str, str | None]:
    """Return the section of every option, None where it is a field of the config itself."""
    found: dict[str, str | None] = {}
    for field in dataclasses.fields(RunConfig):
        found[field.name] = None
        if field.name in _FLAT:
            found |= {each.name: field.name for each in dataclasses.fields(field.type)}  # type: ignore[arg-type]
    return found


def _config(model: PretrainedModel, train: str | list[str], options: Mapping[str, Any]) -> RunConfig:
    """Return the run's config.

    Raises:
      UserError: an option that does not exist (names the nearest), is given twice, or has a wrong type or value.
    """
    known = _options()
    content: dict[str, Any] = {"name": "fine_tune"}
    for name, value in options.items():
        if name in _ELSEWHERE:
            raise UserError(f"fine_tune: {name} is for config files alone: {_ELSEWHERE[name]}")
        if name not in known:
            raise UserError(f"fine_tune: unknown option {name!r}{config_file.nearest(name, sorted(known))}")
        if known[name] is None:
            content[name] = dict(value) if isinstance(value, Mapping) else value
    for name, value in options.items():
        section = known[name]
        if section is not None:
            fields = content.setdefault(section, {})
            if not isinstance(fields, dict) or name in fields:
                raise UserError(f"fine_tune: {name} is given twice, also in {section}; give it once")
            fields[name] = value
    dtype = np.dtype(model._loaded.model.config.dtype).name
    content["model"] = {"path": model.source, "dtype": dtype}
    data = content.setdefault("data", {})
    if isinstance(data, dict):
        if "train" in data:
            raise UserError(f"fine_tune: data.train is for config files alone: {_ELSEWHERE['train']}")
        data["train"] = train
    content.setdefault("optimizer", {})
    content.setdefault("training", {})
    return config_file.from_dict(content, "fine_tune")
