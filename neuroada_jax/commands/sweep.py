"""`neuroada sweep`: train a config at several rates, seeds and connections, and choose by validation."""

import argparse

from neuroada_jax.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    parser = shared.add_command(commands, "sweep", run, "train at several rates, seeds or k, and choose by validation")
    parser.epilog = (
        "Leaves sweep.json, sweep.png, members/, best/adapter and best/config.yaml in the config's output directory. A "
        "sweep that was ended goes on with the same command."
    )
    shared.add_config(parser)
    parser.add_argument(
        "--grid",
        action="append",
        required=True,
        metavar="FIELD=V,V",
        help="a field and its values, such as optimizer.learning_rate=1e-3,3e-3 or seed=42,43; once for each field",
    )
    parser.add_argument("--extend", action="store_true", help="go on outwards while the best rate is at the edge")
    parser.add_argument("--halving", action="store_true", help="drop the worse half at a third of the steps")
    parser.add_argument("--at-once", type=int, metavar="N", help="members at a time, at most (default: as many as fit)")
    parser.add_argument("--overwrite", action="store_true", help="replace a sweep that is in the output directory")


def run(parsed: argparse.Namespace) -> None:
    """Do the sweep and print its table."""
    from neuroada_jax.sweeping import grid, report, sweep
    from neuroada_jax.training import config_file

    shared.check_minimum(parsed, at_once=1)
    given = grid.parse(parsed.grid)
    config = config_file.load(parsed.config, parsed.overrides)
    options = sweep.Options(parsed.extend, parsed.halving, parsed.at_once, parsed.overwrite)
    content, cells = sweep.run(config, given, options, "--grid")
    if parsed.json:
        shared.print_json(content)
    else:
        report.print_table(content, cells)
