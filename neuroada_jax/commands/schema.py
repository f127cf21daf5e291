"""`neuroada schema`: the JSON schema of a config."""

import argparse
from pathlib import Path

from neuroada_jax import files
from neuroada_jax.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    summary = "print the JSON schema of a config, for editors"
    parser = shared.add_command(commands, "schema", run, summary)
    parser.add_argument("--out", metavar="FILE", help="file to write (default: standard output)")


def run(parsed: argparse.Namespace) -> None:
    """Print or write the schema, in one line with --json."""
    from neuroada_jax.training import schema

    text = files.to_json(schema.json_schema(), indent=None if parsed.json else 2)
    if parsed.out is None:
        print(text)
    else:
        files.write_text(Path(parsed.out), text + "\n")
