"""`neuroada models`: list the supported models."""

import argparse

from neuroada_jax import console
from neuroada_jax.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    shared.add_command(commands, "models", run, "list every supported model_type with its default targets")


def run(parsed: argparse.Namespace) -> None:
    """Print the model types."""
    from neuroada_jax.models import listing

    found = listing.listing()
    if parsed.json:
        shared.print_json(found)
        return
    header = ("model_type", "kind", "models", "targets", "example")
    rows = [
        (each["model_type"], each["kind"], each["models"], " ".join(each["targets"]), each["example"]) for each in found
    ]
    console.table("models", header, rows)
    for each in found:
        if each["notes"]:
            console.say(f"{each['model_type']}: {each['notes']}")
