"""`neuroada tasks`: list the tasks."""

import argparse

from neuroada_jax import console
from neuroada_jax.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    shared.add_command(commands, "tasks", run, "list every task with its metric, prompt style and data")


def run(parsed: argparse.Namespace) -> None:
    """Print the tasks."""
    from neuroada_jax import tasks

    found = tasks.listing()
    if parsed.json:
        shared.print_json(found)
        return
    header = ("task", "suite", "model", "metric", "prompt", "data")
    rows = [
        (each["task"], each["suite"] or "", each["model"], each["metric"], each["prompt"], "".join(each["data"][-1:]))
        for each in found
    ]
    console.table("tasks", header, rows)
    console.say("data: the last source that is tried; --json lists all of them")
