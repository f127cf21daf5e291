"""`neuroada evaluate`: score a base model, or one with an adapter, on the rows of a task."""

import argparse
from pathlib import Path
from typing import Any

from neuroada_jax import console, files
from neuroada_jax.commands import shared
from neuroada_jax.errors import UserError


def add(commands: shared.Commands) -> None:
    """Add the command."""
    parser = shared.add_command(commands, "evaluate", run, "score a base model, or one with an adapter, on rows of a task")
    shared.add_model(parser)
    shared.add_processes(parser)
    parser.add_argument("--task", metavar="TASK", help="task of the rows (default: that of the training, else instruct)")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="ROWS",
        help="files, directories of files or of `datasets`, or hub names (default: the task's own rows)",
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="FIELD=COLUMN",
        help="columns of --data under the names that the task reads",
    )
    parser.add_argument("--split", metavar="NAME", help="split of --data, where it has several (default: test)")
    parser.add_argument("--limit", type=int, metavar="N", help="score the first N rows only")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="rows at a time (default: 16)")
    parser.add_argument("--out", metavar="FILE", help="JSON lines of predictions (default: runs/evaluate/TASK.jsonl)")
    decoder = parser.add_argument_group("options for a decoder")
    shared.add_prompt_form(decoder, "that of the training where the task is related, else the task's")
    decoder.add_argument(
        "--method", choices=["generate", "choices"], help="generate answers, or choose the likeliest (default: generate)"
    )
    decoder.add_argument("--max-new-tokens", type=int, metavar="N", help="longest generation (default: the task's)")
    decoder.add_argument(
        "--trained-on", metavar="ROWS", help="training rows; test questions that are among them are also scored separately"
    )
    encoder = parser.add_argument_group("options for an encoder")
    encoder.add_argument(
        "--max-length", type=int, metavar="N", help="tokens to truncate examples to (default: the model's positions)"
    )


def run(parsed: argparse.Namespace) -> None:
    """Score the rows, print the score and write every prediction; in each of several processes, those of its share."""
    from neuroada_jax.training import processes

    with processes.joined(parsed.coordinator, parsed.processes, parsed.process, parsed.join_timeout) as together:
        _run(parsed, is_first=together.is_first)


def _run(parsed: argparse.Namespace, *, is_first: bool) -> None:
    from neuroada_jax.adapters import prompting
    from neuroada_jax.tasks import ENCODER_TASKS, TASKS, read_rows, unknown
    from neuroada_jax.training import one_job, processes

    if parsed.task is not None and parsed.task not in (*TASKS, *ENCODER_TASKS):
        raise UserError(f"--task: {unknown(parsed.task)}")
    shared.check_minimum(parsed, limit=1, max_new_tokens=1, max_length=1, batch_size=1)
    opened, tokenizer, adapter = shared.open_model(parsed, decoder=parsed.task in TASKS)
    found = prompting.recorded(opened, adapter, parsed.adapter)
    if parsed.task is None:
        parsed.task = (found.form and found.form.task) or "instruct"
        if parsed.task not in (*TASKS, *ENCODER_TASKS):
            raise UserError(f"{found.where}: this command has no rows of task {parsed.task!r}; --task chooses another")
    out = Path(parsed.out or f"runs/evaluate/{parsed.task}.jsonl")
    if is_first:
        files.check_writable(out)
    is_decoder = opened.model.architecture.is_decoder
    if is_decoder and parsed.task not in TASKS:
        raise UserError(f"--task: {parsed.task!r} needs an encoder with a classifier, and {opened.source} is a decoder")
    if not is_decoder and parsed.task not in ENCODER_TASKS:
        raise UserError(
            f"--task: {parsed.task!r} needs a decoder, and {opened.source} is an encoder; give {', '.join(ENCODER_TASKS)}"
        )
    _check_kind(parsed, opened.model)
    if parsed.split and not parsed.data:
        raise UserError("--split needs --data; without it, the task's own split is used")
    task: Any = TASKS[parsed.task] if is_decoder else _encoder_task(parsed.task, found.form, opened)
    rows = read_rows(task, parsed.data, parsed.split, parsed.limit, _columns(parsed, task))
    if is_decoder:
        scorer = _continuation(parsed, opened, tokenizer, rows, found)
    else:
        scorer = _classification(parsed, opened, tokenizer, rows, task)
    base_model, params = shared.load_params(opened, adapter)
    one_job.check_evaluation(vars(parsed), scorer.rows.rows, base_model.digests, adapter)
    with console.bar("evaluating") as bar:
        score = processes.score(parsed.task, scorer, base_model, params, console.reporter(bar))
    if is_first:
        _show(parsed, score, rows.source, out)


def _show(parsed: argparse.Namespace, score: Any, source: str, out: Path) -> None:
    """Print a score, and write its predictions and the picture of its classes."""
    from neuroada_jax.evaluation import class_report, scoring
    from neuroada_jax.tasks import TASKS, overlap
    from neuroada_jax.training import report

    try:  # a score is not lost where its predictions cannot be written, nor they where standard output is closed
        if parsed.json:
            shared.print_json({"task": parsed.task} | _summary(score))
        else:
            report.print_scores({}, {parsed.task: score})
    finally:
        scoring.write_predictions(out, score)
    if score.classes is not None:
        class_report.confusion_picture(
            out.with_name(f"confusion-{out.stem}.png"), score.classes, f"{source}, {score.n} rows"
        )
    note = overlap.known(parsed.task) if parsed.task in TASKS and score.overlap is None else None
    if note:
        console.say(note)
    console.say(f"every prediction is in {out}")


def _columns(parsed: argparse.Namespace, task: Any) -> dict[str, str]:
    """Return --columns as a mapping; a task on own rows reads the columns of the training.

    Raises:
      UserError: an item without "=", a field that the task does not read, or columns without --data.
    """
    from neuroada_jax.tasks import OWN, wrong_columns

    columns: dict[str, str] = {}
    for each in parsed.columns:
        field, equals, column = each.partition("=")
        if not (field and equals and column):
            raise UserError(f"--columns: found {each!r}, expected FIELD=COLUMN such as prompt=question")
        if field in columns:
            raise UserError(f"--columns: field {field!r} is given twice, expected one column for each field")
        columns[field] = column
    message = wrong_columns(parsed.task, columns, task.columns if parsed.task in OWN else None) if columns else None
    if message:
        raise UserError(f"--columns: {message}")
    if columns and not parsed.data:
        raise UserError("--columns needs --data; without it, the task's own rows are read")
    return columns


_PROMPTS = ("style", "chat_template", "template_arguments")


def _check_kind(parsed: argparse.Namespace, model: Any) -> None:
    """Raise UserError where an option is given that this kind of model cannot use."""
    kind, others = "a decoder, whose prompts are not truncated", ["max_length"]
    if not model.architecture.is_decoder:
        kind, others = "an encoder, which has no prompts", ["method", *_PROMPTS, "max_new_tokens", "trained_on"]
    for name in others:
        if getattr(parsed, name) is not None:
            raise UserError(f"{shared.flag(name)}: {model.hf_config['model_type']} is {kind}; remove it")


def _continuation(parsed: argparse.Namespace, opened: Any, tokenizer: Any, rows: Any, found: Any) -> Any:
    """Validate the options and return the decoder's scorer; `found` are the prompts of its training."""
    from neuroada_jax.adapters import prompting
    from neuroada_jax.data.prompts import is_templated
    from neuroada_jax.data.rows import load_rows
    from neuroada_jax.evaluation import continuation
    from neuroada_jax.tasks import TASKS, overlap

    task, trained_on = TASKS[parsed.task], None
    if parsed.trained_on:
        training_rows = continuation.convert(load_rows(parsed.trained_on), TASKS[task.suite or task.name])
        trained_on = overlap.questions(training_rows.rows)
    given, method = shared.prompt_options(parsed), parsed.method or "generate"
    if method == "choices" and parsed.max_new_tokens is not None:
        raise UserError("--max-new-tokens: method choices generates nothing; remove it")
    related = found.form is not None and task.is_related(TASKS.get(found.form.task, task))
    chosen = given._replace(style=given.style or (None if related else task.style))
    asked = prompting.resolve(found, chosen, opened, tokenizer, default=task.style, spell=shared.flag)
    if not any(is_templated(row, asked.form) for row in rows.rows):
        asked = prompting.without_chats(asked, given, tokenizer, shared.flag)
    prompting.say(asked, found, given, tokenizer, shared.flag)
    options = continuation.Options(
        asked.form, method, parsed.max_new_tokens, batch_size=parsed.batch_size, trained_on=trained_on
    )
    return continuation.ContinuationScorer.prepare(opened, tokenizer, rows, task, options)


def _encoder_task(name: str, form: Any, opened: Any) -> Any:
    """Return an encoder's task; one on own rows has the columns of the training, else text and label."""
    from neuroada_jax.adapters import on_base
    from neuroada_jax.data.prompts import PromptForm
    from neuroada_jax.tasks import GLUE
    from neuroada_jax.tasks.classification import LABEL, TEXT, trained_task

    if name in GLUE:
        return GLUE[name]
    known = form is not None and form.task == name and form.text
    asked = form if known else PromptForm(task=name, text=(TEXT,), label=LABEL)
    return trained_task(asked, on_base.classifier_labels(opened) or [])


def _classification(parsed: argparse.Namespace, opened: Any, tokenizer: Any, rows: Any, task: Any) -> Any:
    """Validate the options and return the encoder's scorer."""
    from neuroada_jax.evaluation import classification

    positions = opened.model.config.max_positions
    missing = opened.missing() if not parsed.adapter else []
    if missing:
        raise UserError(f"{opened.source} has no {missing[0]}: give an --adapter, which brings its trained classifier")
    if parsed.max_length is not None and parsed.max_length > positions:
        raise UserError(f"--max-length: found {parsed.max_length}, expected 1 to the model's {positions} positions")
    options = {"max_length": parsed.max_length or positions, "batch_size": parsed.batch_size}
    return classification.ClassificationScorer.prepare(opened, tokenizer, rows, task, **options)


def _summary(score: Any) -> dict[str, Any]:
    """Return the content of `evaluate --json` beside the task; counts and parts that a score lacks are omitted."""
    counts = {"overlap": score.overlap, "empty": score.empty, "unfinished": score.unfinished or None}
    parts = {name: part._asdict() for name, part in score.parts.items()}
    return {
        "metric": score.metric,
        "value": score.value,
        "n": score.n,
        "interval": score.interval,
        **score.beside,
        **{f"{name}_interval": interval for name, interval in score.beside_intervals.items()},
        **{name: count for name, count in counts.items() if count is not None},
        **({"parts": parts} if parts else {}),
        **({"classes": score.classes.to_json()} if score.classes else {}),
    }
