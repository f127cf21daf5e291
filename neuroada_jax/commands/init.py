"""`neuroada init`: a starter config for rows of one's own."""

import argparse
import os
import shlex
from pathlib import Path

from neuroada_jax import console, files
from neuroada_jax.commands import shared
from neuroada_jax.errors import UserError
from neuroada_jax.pretrained.source import read_config


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
    files.write_text(
        out, starter.starter(kind, str(out), out.stem or "run", parsed.model, parsed.train, _width(parsed.model))
    )
    following = shlex.join(["neuroada", "train", str(out)])
    if parsed.json:
        shared.print_json({"config": str(out), "train": train, "next": following})
        return
    console.say(f"wrote {out}")
    if parsed.train is None and not os.path.exists(train):
        console.say(f"put your rows into {train}: {starter.row_format(kind)}")
    console.say(f"to see how they are read: {shlex.join(['neuroada', 'preview', str(out)])}")
    console.say(f"next: {following}")


def _width(model: str | None) -> int | None:
    """Return the width of a model that is a local directory, which the starting learning rate depends on."""
    path = Path(model or "") / "config.json"
    width = read_config(str(path.parent)).get("hidden_size") if model and path.is_file() else None
    return width if type(width) is int and width > 0 else None
