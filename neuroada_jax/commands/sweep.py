"""`neuroada sweep`: train a config at several rates, seeds and connections, and choose by validation."""

import argparse
import shlex
import sys

from neuroada_jax.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    parser = shared.add_command(commands, "sweep", run, "train at several rates, seeds or k, and choose by validation")
    parser.epilog = (
        "Leaves sweep.json, sweep.png, members/, best/adapter and best/config.yaml in the config's output directory. "
        f"Ctrl-C or SIGTERM stops a sweep with the steps of its members saved (exit code {shared.STOPPED}); the last line "
        "is then the command that goes on. One that was killed goes on from the last saved steps (training.save_every)."
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


def run(parsed: argparse.Namespace) -> int:
    """Do the sweep, print its table or how to go on, and return the exit code."""
    from neuroada_jax.sweeping import choice, grid, report, store, sweep
    from neuroada_jax.training import config_file, signals

    shared.check_minimum(parsed, at_once=1)
    given = grid.parse(parsed.grid)
    config = config_file.load(parsed.config, parsed.overrides)
    options = sweep.Options(parsed.extend, parsed.halving, parsed.at_once, parsed.overwrite)
    stopped, before = None, store.written(config.directory)
    with signals.listening() as stop:
        try:
            content, cells = sweep.run(config, given, options, "--grid", stop)
        except signals.Stopped as request:
            stopped = request
    if stopped is not None:  # after the listener's own line, which another thread writes
        again = _again(parsed, begun=store.written(config.directory) != before)
        saved = "" if stopped.step is None else f", step {stopped.step} of the members in work is saved"
        sys.stderr.write(f"neuroada: stopped{saved}; go on with: {again}\n")
        return shared.STOPPED
    if parsed.json:
        shared.print_json(content)
    else:
        report.print_table(content, cells)
    choice.check_chosen(content)
    return 0


def _again(parsed: argparse.Namespace, begun: bool) -> str:
    """Return the command that goes on, or begins where nothing was written."""
    flags = {"--extend": parsed.extend, "--halving": parsed.halving, "--json": parsed.json}
    flags["--overwrite"] = parsed.overwrite and not begun
    words = ["neuroada", "sweep", parsed.config, *parsed.overrides]
    words += [word for axis in parsed.grid for word in ("--grid", axis)]
    words += ["--at-once", str(parsed.at_once)] if parsed.at_once else []
    return shlex.join([*words, *(name for name, given in flags.items() if given)])
