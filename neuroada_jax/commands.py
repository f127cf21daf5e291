"""What each command does with its arguments. Imports are inside, so that a command loads what it needs and no more."""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from neuroada_jax import console, files
from neuroada_jax.errors import UserError


def _load(parsed: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The decoder of --model, or of the adapter, with the adapter merged in: (base, params, tokenizer)."""
    return _read(*_open(parsed))


def _open(parsed: argparse.Namespace, *, decoder: bool = True) -> tuple[Any, Any, Any]:
    """The model of --model, or of the adapter, without its weights: (base, tokenizer, adapter or None).

    With `decoder`, only a model that continues texts will do.
    """
    from neuroada_jax.adapters import native
    from neuroada_jax.pretrained.load import open_with_tokenizer

    adapter = native.read(parsed.adapter) if parsed.adapter else None
    source = parsed.model or (adapter.metadata.get("base", {}).get("source") if adapter else None)
    if not source:
        raise UserError("give --model, or an --adapter that names its base")
    trained_in = adapter.metadata["base"].get("dtype") if adapter else None
    labels = adapter.metadata["base"].get("labels") if adapter else None
    opened, tokenizer = open_with_tokenizer(source, parsed.dtype or trained_in or "auto", labels)
    if decoder and not opened.model.architecture.is_decoder:
        kind = opened.model.hf_config["model_type"]
        raise UserError(f"{source}: {kind} is an encoder, which cannot continue a text; this command needs a decoder")
    return opened, tokenizer, adapter


def _read(opened: Any, tokenizer: Any, adapter: Any) -> tuple[Any, Any, Any]:
    """(base, params, tokenizer) of what `_open` opened: the weights, with the adapter merged in."""
    from neuroada_jax.adapters import native
    from neuroada_jax.pretrained.load import load_with_progress

    base_model = load_with_progress(opened)
    return base_model, base_model.params if adapter is None else native.merge(adapter, base_model), tokenizer


def _print_json(content: dict[str, Any]) -> None:
    print(files.to_json(content))


def _at_least(parsed: argparse.Namespace, **least: int) -> None:
    """Raises UserError where one of these options is below its least value; None, not given, is none."""
    for option, smallest in least.items():
        value = getattr(parsed, option)
        if value is not None and value < smallest:
            raise UserError(f"{_option(option)}: expected at least {smallest}, found {value}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def train(parsed: argparse.Namespace) -> None:
    """Fine-tunes as a config says."""
    from neuroada_jax.training import config_file, processes, report, run, seeds, signals

    if parsed.seeds is not None and not re.fullmatch(r"\d+(,\d+)*", parsed.seeds):
        raise UserError(f"--seeds: expected numbers with commas between, such as 42,43,44, found {parsed.seeds!r}")
    overrides = parsed.overrides + ([f"seeds=[{parsed.seeds}]"] if parsed.seeds else [])
    settings = config_file.load(parsed.config, overrides)
    several = settings.seeds is not None
    train = seeds.train if several else run.train
    stopped = None
    flags = {"overwrite": parsed.overwrite, "resume": parsed.resume, "force_resume": parsed.force_resume}
    if parsed.coordinator and parsed.resume:
        raise UserError("--resume: several processes save no checkpoints yet, so that there is none to go on from")
    with (
        processes.joined(parsed.coordinator, parsed.processes, parsed.process) as first,
        processes.own_output(settings) as settings,
        # Several processes have nothing to save and cannot stop at different steps: there a signal ends them as usual.
        contextlib.nullcontext(signals.Stop()) if parsed.coordinator else signals.listening() as stop,
    ):
        try:
            results = train(settings, **flags, stop=stop)
        except signals.Stopped as request:
            stopped = request
        else:
            if parsed.json and first:
                _print_json(results)
            else:
                (seeds.print_summary if several else report.print_summary)(results)
    if stopped:  # told behind the listener's own line, which another thread writes
        saved = "nothing new to save" if stopped.step is None else f"step {stopped.step} is saved"
        seeds_option = ["--seeds", parsed.seeds] if parsed.seeds else []
        again = shlex.join(["neuroada", "train", parsed.config, *parsed.overrides, *seeds_option, "--resume"])
        sys.stderr.write(f"neuroada: stopped, {saved}; go on with: {again}\n")


def plan(parsed: argparse.Namespace) -> None:
    """Says what a config would need of a machine."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's own words on a GPU that is missing, or on memory
    import jax

    # Before anything else asks JAX for a device: a described GPU is compiled for without taking a real one, and several
    # CPUs are virtual ones.
    jax.config.update("jax_platforms", "cpu")
    from neuroada_jax.planning import plan
    from neuroada_jax.training import config_file

    settings = config_file.load(parsed.config, parsed.overrides)
    plan.start_devices(settings, parsed.devices)
    made = plan.plan(settings, parsed.target, parsed.devices)
    if parsed.json:
        _print_json(made)
    else:
        plan.print_plan(made)


def evaluate(parsed: argparse.Namespace) -> None:
    """Scores a model, or one with an adapter, on a file of rows."""
    from neuroada_jax.evaluation import scoring
    from neuroada_jax.tasks import GLUE, TASKS, overlap, read_rows, unknown
    from neuroada_jax.training import report

    if parsed.task not in TASKS | GLUE:
        raise UserError(f"--task: {unknown(parsed.task)}")
    _at_least(parsed, limit=1, max_new_tokens=1, max_length=1, batch_size=1)
    out = Path(parsed.out or f"runs/evaluate/{parsed.task}.jsonl")
    files.check_writable(out)
    opened = _open(parsed, decoder=parsed.task not in GLUE)
    is_decoder = opened[0].model.architecture.is_decoder
    if is_decoder and parsed.task not in TASKS:
        raise UserError(f"--task: {parsed.task!r} needs an encoder with a head, and {opened[0].source} is a decoder")
    _check_kind(parsed, opened[0].model)
    if parsed.split and not parsed.data:
        raise UserError("--split: it is of --data, and the task's own rows have theirs; leave it out or give both")
    rows = read_rows((TASKS if is_decoder else GLUE)[parsed.task], parsed.data, parsed.split, parsed.limit)
    scorer = (_continuation if is_decoder else _classification)(parsed, *opened[:2], rows)
    base_model, params, _ = _read(*opened)
    with console.bar("evaluating") as shown:
        score = scorer.score(base_model, params, console.reporter(shown))
    try:  # a score is not lost where its predictions cannot be written, nor they where nobody reads the score
        if parsed.json:
            _print_json({"task": parsed.task} | _score_to_json(score))
        else:
            report.print_scores({parsed.task: report.score(None, score)})
    finally:
        scoring.write_predictions(out, score)
    note = overlap.known(parsed.task) if is_decoder and score.overlap is None else None
    if note:
        console.say(note)
    console.say(f"every prediction is in {out}")


def _check_kind(parsed: argparse.Namespace, model: Any) -> None:
    """Raises UserError where an option of `evaluate` is given that this kind of model cannot use."""
    says, others = "a decoder, whose prompts are not cut", ["max_length"]
    if not model.architecture.is_decoder:
        says, others = "an encoder, which has no prompts", ["method", "style", "max_new_tokens", "trained_on"]
    for option in others:
        if getattr(parsed, option) is not None:
            raise UserError(f"{_option(option)}: {model.hf_config['model_type']} is {says}; leave it out")


def _score_to_json(score: Any) -> dict[str, Any]:
    """What `evaluate --json` says of a score beside its task; what it has not is left out."""
    counts = {"overlap": score.overlap, "empty": score.empty}
    parts = {name: part._asdict() for name, part in score.parts.items()}
    return {
        "metric": score.metric,
        "value": score.value,
        "n": score.n,
        "interval": score.interval,
        **score.beside,
        **{f"{name}_interval": found for name, found in score.beside_intervals.items()},
        **{name: count for name, count in counts.items() if count is not None},
        **({"parts": parts} if parts else {}),
    }


def _continuation(parsed: argparse.Namespace, opened: Any, tokenizer: Any, rows: Any) -> Any:
    """Validate the options and return the decoder's scorer."""
    from neuroada_jax.data.prompts import PromptStyle
    from neuroada_jax.data.rows import load_rows
    from neuroada_jax.evaluation import continuation
    from neuroada_jax.tasks import TASKS, overlap

    task, trained_on = TASKS[parsed.task], None
    if parsed.trained_on:
        training_rows = continuation.convert(load_rows(parsed.trained_on), TASKS[task.suite or task.name])
        trained_on = overlap.questions(training_rows.rows)
    style, method = PromptStyle(parsed.style or task.style), parsed.method or "generate"
    if method == "choices" and parsed.max_new_tokens is not None:
        raise UserError("--max-new-tokens: method choices generates nothing; leave it out")
    options = continuation.Options(
        style, method, parsed.max_new_tokens, batch_size=parsed.batch_size, trained_on=trained_on
    )
    return continuation.ContinuationScorer.prepare(opened, tokenizer, rows, task, options)


def _classification(parsed: argparse.Namespace, opened: Any, tokenizer: Any, rows: Any) -> Any:
    """Validate the options and return the encoder's scorer."""
    from neuroada_jax.evaluation import classification
    from neuroada_jax.tasks import GLUE

    positions = opened.model.config.max_positions
    missing = opened.missing() if not parsed.adapter else []
    if missing:
        raise UserError(f"{opened.source} has no {missing[0]}: give an --adapter, which brings its trained head")
    if parsed.max_length is not None and parsed.max_length > positions:
        raise UserError(f"--max-length: found {parsed.max_length}, expected 1 to the model's {positions} positions")
    options = {"max_length": parsed.max_length or positions, "batch_size": parsed.batch_size}
    return classification.ClassificationScorer.prepare(opened, tokenizer, rows, GLUE[parsed.task], **options)


def tasks(parsed: argparse.Namespace) -> None:
    """Lists the tasks."""
    from neuroada_jax import tasks

    found = tasks.listing()
    if parsed.json:
        print(json.dumps(found, ensure_ascii=False))
        return
    header = ("task", "suite", "model", "metric", "prompt", "data")
    rows = [
        (each["task"], each["suite"] or "", each["model"], each["metric"], each["prompt"], "".join(each["data"][-1:]))
        for each in found
    ]
    console.table("tasks", header, rows)
    console.say("data: the last place that is looked at; --json has all of them")


def lm_eval(parsed: argparse.Namespace) -> None:
    """Scores a model on the harness's tasks."""
    from neuroada_jax.evaluation import lm_eval_harness

    _at_least(parsed, batch_size=1, limit=1, num_fewshot=0)
    if parsed.out and not Path(parsed.out).parent.is_dir():
        raise UserError(f"--out: the folder {Path(parsed.out).parent} does not exist")
    tasks = lm_eval_harness.find_tasks(
        parsed.tasks.split(","), parsed.include_path
    )  # before the weights, which take longer
    base_model, params, tokenizer = _load(parsed)
    with console.bar("scoring") as shown:
        results = lm_eval_harness.evaluate(
            lm_eval_harness.NeuroAdaLM(base_model, params, tokenizer, parsed.batch_size, console.reporter(shown)),
            tasks,
            num_fewshot=parsed.num_fewshot,
            limit=parsed.limit,
            apply_chat_template=parsed.apply_chat_template,
        )
    if parsed.out:
        lm_eval_harness.write_results(Path(parsed.out), results)
    print(lm_eval_harness.summary_json(results) if parsed.json else lm_eval_harness.summary_table(results))


def generate(parsed: argparse.Namespace) -> None:
    """Continues a prompt."""
    from neuroada_jax.generation.sampling import Decoding
    from neuroada_jax.generation.texts import continue_texts

    fields = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(Decoding)}
    decoding = Decoding(**{**fields, "stop": tuple(parsed.stop)})
    base_model, params, tokenizer = _load(parsed)
    made = continue_texts(
        base_model,
        params,
        tokenizer,
        parsed.prompt,
        style=parsed.style,
        max_new_tokens=parsed.max_new_tokens,
        decoding=decoding,
    )
    if parsed.json:
        pairs = zip(parsed.prompt, made, strict=True)
        _print_json({"generations": [{"prompt": prompt, **each._asdict()} for prompt, each in pairs]})
    else:
        print("\n\n".join(each.text for each in made))


def inspect(parsed: argparse.Namespace) -> None:
    """Lists the modules of a model or an adapter."""
    from neuroada_jax.adapters import inspection

    _at_least(parsed, k=1)
    content = inspection.inspect(parsed.path, parsed.k)
    _print_json(content) if parsed.json else inspection.print_inspection(content)


def merge(parsed: argparse.Namespace) -> None:
    """Writes base and adapter as one model."""
    from neuroada_jax.adapters import exchange

    made = exchange.export_adapter(parsed.adapter, "huggingface", parsed.out, model=parsed.model, dtype=parsed.dtype)
    _print_json({"model": made["out"], "files": made["files"]}) if parsed.json else exchange.print_result(made)


def export(parsed: argparse.Namespace) -> None:
    """Writes an adapter for another library."""
    from neuroada_jax.adapters import exchange

    options = {"model": parsed.model, "dtype": parsed.dtype, "verify": parsed.verify}
    made = exchange.export_adapter(parsed.adapter, parsed.to, parsed.out, **options)
    _print_json(made) if parsed.json else exchange.print_result(made)


def import_(parsed: argparse.Namespace) -> None:
    """Reads another library's adapter."""
    from neuroada_jax.adapters import exchange

    options = {"dtype": parsed.dtype, "allow_pickle": parsed.allow_pickle}
    made = exchange.import_adapter(parsed.directory, parsed.source_format, parsed.base, parsed.out, **options)
    _print_json(made) if parsed.json else exchange.print_result(made)
