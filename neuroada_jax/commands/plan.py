"""`neuroada plan`: the memory and time that a run would need."""

import argparse
import os

from neuroada_jax.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    summary = "report the memory and time that a run would need, without weights"
    parser = shared.add_command(commands, "plan", run, summary)
    shared.add_config(parser)
    parser.add_argument(
        "--machine",
        "--target",
        default="cpu",
        metavar="NAME",
        help="cpu (this machine), h100, h200, a100, l40s or rtx4090 (default: cpu)",
    )
    parser.add_argument(
        "--devices", type=int, metavar="N", help="devices that share a batch (default: as the config's `parallel`, else 1)"
    )


def run(parsed: argparse.Namespace) -> None:
    """Compile the run's step from shapes alone and print the plan."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # silences XLA on a missing GPU and on memory
    shared.on_cpu()  # a described GPU is compiled for without taking a real one, and several CPUs are virtual ones
    from neuroada_jax.planning import plan
    from neuroada_jax.training import config_file

    settings = config_file.load(parsed.config, parsed.overrides)
    plan.start_devices(settings, parsed.devices)
    made = plan.plan(settings, parsed.machine, parsed.devices)
    if parsed.json:
        shared.print_json(made.to_json())
    else:
        made.print_table()
