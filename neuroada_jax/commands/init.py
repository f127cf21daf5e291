"""`neuroada init`: a starter config for rows of one's own."""

import argparse
import contextlib
import os
import shlex
from pathlib import Path

from neuroada_jax import console, files
from neuroada_jax.commands import shared
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained.source import read_config

LARGEST_WIDTH = 2**20


def add(commands: shared.Commands) -> None:
    """Add the command."""
    parser = shared.add_command(commands, "init", run, "write a starter config for rows of your own, with comments")
    parser.add_argument(
        "--kind",
        required=True,
        choices=["chat", "instruct", "classify", "text"],
        help="chats; prompts and answers; texts with labels; or texts to be learnt whole",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="YAML file to write")
    parser.add_argument("--model", metavar="MODEL", help="base model (default: a small one of the hub)")
    parser.add_argument("--train", metavar="ROWS", help="file of the training rows (default: a name to be filled)")


def run(parsed: argparse.Namespace) -> None:
    """Write the config and print the next command."""
    from neuroada_jax.training import starter

    out = Path(parsed.out)
    files.check_writable(out)
    if out.exists():
        raise UserError(f"--out: {out} exists already; choose another file or remove it")
    kind = starter.Kind(parsed.kind)
    train = parsed.train or starter.default_train(kind)
    width = _width(parsed.model)
    files.write_text(out, starter.starter(kind, str(out), out.stem or "run", parsed.model, parsed.train, width))
    following = shlex.join(["neuroada", "train", str(out)])
    if parsed.json:
        shared.print_json({"config": str(out), "train": train, "next": following})
        return
    console.say(f"wrote {out}")
    if parsed.model and width is None:
        usual = starter.default_width(kind)
        console.say(f"the learning rate is that of width {usual}: the width of {parsed.model} is not known here")
    if parsed.train is None and not os.path.exists(train):
        console.say(f"put your rows into {train}: {starter.row_format(kind)}")
    console.say(f"to see how they are read: {shlex.join(['neuroada', 'preview', str(out)])}")
    console.say(f"next: {following}")


def _width(model: str | None) -> int | None:
    """Return the width of a model that is here, which the starting learning rate depends on; None for others."""
    if not model or not (model.startswith("package:") or os.path.exists(model)):
        return None  # none, or one of the hub, which is not asked before the training
    from neuroada_jax.pretrained.load import open_model

    with contextlib.suppress(UserError):  # `train` says what is wrong with it
        return int(open_model(model, config_only=True).model.config.hidden_size)
    with contextlib.suppress(UserError):
        width = read_config(model).get("hidden_size")  # all that a config of another kind has to say
        return width if type(width) is int and 0 < width <= LARGEST_WIDTH else None
    return None
