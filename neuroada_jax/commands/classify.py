"""`neuroada classify`: label texts, or the rows of a file, with a trained classifier."""

import argparse
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neuroada_jax import console, files
from neuroada_jax.commands import shared
from neuroada_jax.errors import UserError

_SHOWN_ROWS = 20  # of a file, in the table


def add(commands: shared.Commands) -> None:
    """Add the command."""
    summary = "label texts, or the rows of a file, with a trained classifier"
    parser = shared.add_command(commands, "classify", run, summary)
    shared.add_model(parser)
    parser.add_argument("--text", action="append", default=[], metavar="TEXT", help="text to label; may be repeated")
    parser.add_argument(
        "--text-pair", action="append", default=[], metavar="TEXT", help="second text of the pair; one for each --text"
    )
    parser.add_argument("--data", metavar="ROWS", help="file, directory or hub name whose rows are labelled")
    parser.add_argument("--split", metavar="NAME", help="split of --data, where it has several (default: test)")
    parser.add_argument("--limit", type=int, metavar="N", help="label the first N rows of --data only")
    parser.add_argument(
        "--text-column",
        action="append",
        default=[],
        metavar="NAME",
        help="column of --data with the text; twice for a pair (default: that of the training, else text)",
    )
    parser.add_argument("--all", action="store_true", help="give the probabilities of all labels")
    parser.add_argument("--top-k", type=int, metavar="N", help="give the probabilities of the N likeliest labels")
    parser.add_argument("--out", metavar="FILE", help="JSON lines of the predictions")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="texts at a time (default: 32)")
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="tokens to truncate texts to (default: the model's positions)"
    )


def run(parsed: argparse.Namespace) -> None:
    """Label the texts, and print or write the labels with their probabilities."""
    from neuroada_jax.data.examples import encode_labelled
    from neuroada_jax.evaluation import classification

    shared.check_minimum(parsed, limit=1, top_k=1, batch_size=1, max_length=1)
    _check_options(parsed)
    if parsed.out:
        files.check_writable(Path(parsed.out))
    opened, tokenizer, adapter = shared.open_model(parsed, decoder=False)
    length = _check_model(parsed, opened)
    texts = _texts(parsed, _trained_columns(opened, adapter))
    examples = encode_labelled(texts, classification.unlabelled(len(texts)), tokenizer, length)
    if examples.truncated:
        console.say(f"{examples.truncated} of {len(texts)} texts truncated to {length} tokens")
    base_model, params = shared.load_params(opened, adapter)
    with console.bar("labelling") as bar:
        logits = classification.predict(base_model, params, examples, parsed.batch_size, console.reporter(bar))
    found = [
        dict(zip(("text", "text_pair"), pair, strict=False)) | _summary(each, parsed)
        for pair, each in zip(texts, classification.predictions(base_model, logits), strict=True)
    ]
    if parsed.json:
        shared.print_json({"predictions": found})
    else:
        _print(found, parsed)
    if parsed.out:
        files.write_text(Path(parsed.out), "".join(files.to_json(each) + "\n" for each in found))
        console.say(f"{len(found)} predictions are in {parsed.out}")


def _check_options(parsed: argparse.Namespace) -> None:
    """Raise UserError where options are missing or exclude one another."""
    if bool(parsed.text) == bool(parsed.data):
        raise UserError(f"give either --text or --data, found {'both' if parsed.text else 'neither'}")
    if parsed.text_pair and len(parsed.text_pair) != len(parsed.text):
        raise UserError(f"--text-pair: found {len(parsed.text_pair)} for {len(parsed.text)} --text, expected one for each")
    for name in ("split", "limit", "text_column"):
        if getattr(parsed, name) and not parsed.data:
            raise UserError(f"{shared.flag(name)}: it is for the rows of --data; remove it")
    if len(parsed.text_column) > 2 or len(set(parsed.text_column)) < len(parsed.text_column):
        raise UserError(f"--text-column: found {', '.join(parsed.text_column)}, expected one column, or two for a pair")
    if parsed.all and parsed.top_k is not None:
        raise UserError("--top-k: --all gives all labels; remove one of them")


def _check_model(parsed: argparse.Namespace, opened: Any) -> int:
    """Return the tokens to truncate texts to; raise UserError where the model has no trained classifier."""
    if opened.model.architecture.is_decoder:
        kind = opened.model.hf_config["model_type"]
        raise UserError(f"{opened.source}: {kind} is a decoder, which has no classifier; neuroada generate continues texts")
    missing = opened.missing() if not parsed.adapter else []
    if missing:
        raise UserError(f"{opened.source} has no {missing[0]}: give an --adapter, which brings its trained classifier")
    positions = opened.model.config.max_positions
    if parsed.max_length is not None and parsed.max_length > positions:
        raise UserError(f"--max-length: found {parsed.max_length}, expected 1 to the model's {positions} positions")
    return parsed.max_length or positions


def _trained_columns(opened: Any, adapter: Any) -> tuple[str, ...]:
    """Return the columns of the texts that a model was trained on; empty where they are not recorded."""
    from neuroada_jax.adapters import native
    from neuroada_jax.pretrained import prompt_form
    from neuroada_jax.tasks import GLUE

    form = prompt_form.read(opened.path) if adapter is None else native.form_of(adapter)
    if form is None:
        return ()
    return GLUE[form.task].texts if form.task in GLUE else form.text


def _texts(parsed: argparse.Namespace, trained: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the texts, or pairs of texts, to label.

    Raises:
      UserError: pairs for a model of single texts, or the reverse; a column that is missing or holds no text.
    """
    from neuroada_jax.data.rows import load_rows

    if parsed.text:
        given = parsed.text, parsed.text_pair
        found = list(zip(*(side for side in given if side), strict=True))
        _check_number("--text-pair", len(found[0]), trained)
        for number, each in enumerate(found):
            if files.has_half_characters(each):
                raise UserError(f"--text: text {number} is not UTF-8")
        return found
    columns = tuple(parsed.text_column) or tuple(trained) or ("text",)
    _check_number("--text-column", len(columns), trained)
    rows = load_rows(parsed.data, parsed.split or "test", parsed.limit)
    field = "--text-column" if parsed.text_column else "the training" if trained else "--text-column (by default)"
    return [_row_texts(row, columns, field, rows.where(i)) for i, row in enumerate(rows.rows)]


def _check_number(option: str, found: int, trained: Sequence[str]) -> None:
    if trained and found != len(trained):
        expected = f"a pair ({', '.join(trained)})" if len(trained) == 2 else f"one text ({trained[0]})"
        raise UserError(f"{option}: found {found} text(s), but the model was trained on {expected}")


def _row_texts(row: Mapping[str, Any], columns: Sequence[str], field: str, where: str) -> tuple[str, ...]:
    from neuroada_jax.tasks.labels import check_column, shown

    for column in columns:
        check_column(row, column, field, where)
        if not isinstance(row[column], str):
            raise UserError(f"{where}: column {column!r} is {shown(row[column])}, expected text")
    return tuple(row[column] for column in columns)


def _summary(prediction: Any, parsed: argparse.Namespace) -> dict[str, Any]:
    """Return a prediction as JSON has it."""
    content = dataclasses.asdict(prediction)
    by_name = content.pop("probabilities")
    if not by_name or not (parsed.all or parsed.top_k):
        return content
    ranked = sorted(by_name.items(), key=lambda each: -each[1])
    return content | {"probabilities": by_name if parsed.all else dict(ranked[: parsed.top_k])}


def _print(found: Sequence[Mapping[str, Any]], parsed: argparse.Namespace) -> None:
    """Print a table of the predictions, of a file's the first ones and how often each label was given."""
    rows = []
    for each in found[: _SHOWN_ROWS if parsed.data else None]:
        text = " | ".join(each[field] for field in ("text", "text_pair") if field in each)
        label, probability, further = each["label"], each["probability"], each.get("probabilities")
        if isinstance(label, list):
            shown = ", ".join(f"{name} {share:.3f}" for name, share in zip(label, probability, strict=True)) or "none"
        else:
            shown = f"{label:.4g}" if probability is None else f"{label} {probability:.3f}"
        if further:
            shown += " (" + ", ".join(f"{name} {share:.3f}" for name, share in further.items()) + ")"
        rows.append((_short(text), shown))
    console.table("labels with their probabilities", ("text", "label"), rows)
    if parsed.data:
        if len(found) > len(rows):
            console.say(f"{len(found) - len(rows)} further rows; --out writes all of them")
        given = Counter(str(each["label"]) for each in found if isinstance(each["label"], str))
        if given:
            console.say("given: " + ", ".join(f"{name} {count}" for name, count in given.most_common(12)))


def _short(text: str, most: int = 70) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."
