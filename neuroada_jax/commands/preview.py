"""`neuroada preview`: how a config's training rows become examples, before anything is trained."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from neuroada_jax import console
from neuroada_jax.commands import shared
from neuroada_jax.errors import UserError

_BAR, _INDENT = 24, 4
_NEWLINE, _TAB, _SPACE = "↵", "→", "·"
# Learnt tokens are bold; two colours each, in turns, so that one sees where a token ends.
_STYLES = {True: ("bold green", "bold cyan"), False: ("default", "bright_black")}


def add(commands: shared.Commands) -> None:
    """Add the command."""
    summary = "show how a config's rows become examples, without weights"
    parser = shared.add_command(commands, "preview", run, summary)
    shared.add_config(parser)
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="examples to show, 1 to 5 (default: 3)")


def run(parsed: argparse.Namespace) -> None:
    """Tokenise the training rows and print the first examples, the lengths, the counts and the steps."""
    from neuroada_jax.training import config_file, preview

    shared.on_cpu()
    if not 1 <= parsed.rows <= 5:
        raise UserError(f"--rows: expected 1 to 5, found {parsed.rows}")
    found = preview.preview(config_file.load(parsed.config, parsed.overrides), parsed.rows)
    if parsed.json:
        shared.print_json(found.to_json())
        return
    console.write(_legend(found.examples[0].is_label is not None))
    console.styled([])
    for number, example in enumerate(found.examples, start=1):
        _print_example(example, f"example {number} of {len(found.lengths)}")
    _print_lengths(found.statistics(), preview.histogram(found.lengths))
    for message in found.messages:
        console.write(message)
    for line in _steps(found):
        console.write(line)


def _legend(has_labels: bool) -> str:
    """Return how tokens are shown; `has_labels`: whether some of them are learnt."""
    spaces = f"{_SPACE} is a space, {_NEWLINE} a line break, {_TAB} a tab"
    if console.has_colour():
        return f"{'learnt tokens are bold green and cyan; ' if has_labels else ''}{spaces}"
    return f"{'^ begins a learnt token, . another' if has_labels else '. begins a token'}; {spaces}"


def _print_example(example: Any, title: str) -> None:
    """Print the tokens of an example; learnt ones in colour, or where there is none, underlined in a line of its own."""
    about = [title, example.place, f"{len(example.ids)} tokens"]
    if example.is_label is None:
        named = ", ".join(example.label) or "none" if isinstance(example.label, list) else example.label
        about.append(f"label {named:g}" if isinstance(named, float) else f"label {named}")
    else:
        about.append(f"{sum(example.is_label)} learnt")
    if example.turn is not None:
        about.append(f"turn {example.turn[0]} of {example.turn[1]} of a chat that was split")
    console.write(", ".join(about))
    learnt = example.is_label or [False] * len(example.ids)
    pieces = [(visible(token), each) for token, each in zip(example.tokens, learnt, strict=True)]
    coloured = console.has_colour()
    # Of WordPiece tokens, which have no spaces of their own, words would stand together.
    for line in _lines(pieces, max(console.width() - _INDENT, 8), apart=example.is_label is None):
        parts = [(style, "".join(text for text, _, _ in run)) for style, run in groupby(line, key=lambda each: each[2])]
        console.styled([(" " * _INDENT, ""), *((text, style if coloured else "") for style, text in parts)])
        if not coloured:
            console.styled([((" " * _INDENT + "".join(marks for _, marks, _ in line)).rstrip(), "")])
    console.styled([])


def visible(text: str) -> str:
    r"""Return a token's text in printable characters, white space as symbols, an empty one as two quotes.

    Characters that stand for others here, and those that cannot be printed, are written as in Python: \u00b7, \x07.
    """
    signs = {" ": _SPACE, "\n": _NEWLINE, "\t": _TAB}

    def shown(sign: str) -> str:
        if sign in signs:
            return signs[sign]
        if sign in signs.values() or not sign.isprintable():
            return sign.encode("ascii", "backslashreplace").decode() if ord(sign) > 127 else repr(sign)[1:-1]
        return sign

    return "".join(map(shown, text)) or "''"


def _lines(pieces: list[tuple[str, bool]], width: int, *, apart: bool) -> Iterator[list[tuple[str, str, str]]]:
    """Yield lines of (text, marks, style) that end at the width and after line breaks; `apart`: tokens do not touch."""
    line: list[tuple[str, str, str]] = []
    used = 0
    for number, (text, learnt) in enumerate(pieces):
        style = _STYLES[learnt][number % 2]
        if apart and 0 < used < width:
            line.append((" ", " ", style))
            used += 1
        for at, sign in enumerate(text):
            cells = console.cells(sign)
            if used + cells > width:
                yield line
                line, used = [], 0
            mark = ("^~" if learnt else ". ")[at > 0]
            line.append((sign, mark + mark.replace("^", "~").replace(".", " ") * (cells - 1) if cells else "", style))
            used += cells
        if text.endswith(_NEWLINE):
            yield line
            line, used = [], 0
    if line:
        yield line


def _print_lengths(statistics: Mapping[str, int | float], bins: Sequence[Any]) -> None:
    """Print the lengths of the examples, as numbers and as a histogram."""
    console.write("tokens per example: " + ", ".join(f"{name} {value:.4g}" for name, value in statistics.items()))
    most = max(each.examples for each in bins)
    spans = [f"{each.first}" if each.first == each.last else f"{each.first} to {each.last}" for each in bins]
    for each, span in zip(bins, spans, strict=True):
        bar = "#" * max(round(_BAR * each.examples / most), each.examples > 0)
        console.styled([(f"{' ' * _INDENT}{span:>{max(map(len, spans))}} {bar:<{_BAR}} {each.examples}", "")])
    console.styled([])


def _steps(found: Any) -> Iterator[str]:
    """Yield the lines about labels, split chats and steps."""
    counts = found.counts
    if found.label_counts:
        yield "examples of each label: " + ", ".join(f"{name} {count}" for name, count in found.label_counts.items())
    if found.split_places:
        more = counts["split_rows"] - len(found.split_places)
        yield f"split chats: {', '.join(found.split_places)}" + (f" and {more} more" if more > 0 else "")
    if counts.get("foreign_tokens"):
        names = ", ".join(counts["foreign_tokens"])
        yield f"the chat template means these as one token, and the tokenizer splits them: {names}"
    if found.validation is not None:
        examples, batches = found.validation["examples"], found.validation["steps"]
        yield f"each validation: {_count(examples, 'example')} in {_count(batches, 'batch')}, without an update"
    lengths = ", ".join(str(length) for length, _ in found.shapes)
    yield f"rows are padded to {lengths} tokens: at most {_count(len(found.shapes), 'compiled step')}"
    of = _count(found.packing["rows"], "packed row") if found.packing else _count(counts["examples"], "example")
    yield (
        f"{_count(found.steps_per_epoch, 'step')} an epoch ({of} in batches of {found.batch_size}), "
        f"{found.total_steps} in all"
    )


def _count(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"
