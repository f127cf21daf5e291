"""`neuroada train`: fine-tune a model as a config says."""

import argparse
import re
import shlex
import sys
from typing import TYPE_CHECKING

from neuroada_jax.commands import shared
from neuroada_jax.errors import UserError

if TYPE_CHECKING:
    from neuroada_jax.training.peers import Peers


def add(commands: shared.Commands) -> None:
    """Add the command."""
    parser = shared.add_command(commands, "train", run, "fine-tune a model as a config says")
    parser.epilog = (
        f"Exit code: 0 for a finished run, 2 for an error, {shared.STOPPED} where Ctrl-C or SIGTERM stopped the run with "
        "its last step saved; the last line is then the command that resumes it."
    )
    shared.add_config(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is already in the output directory")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint (training.save_every)")
    parser.add_argument(
        "--resume-or-start", action="store_true", help="--resume if the output directory holds a run, else start it"
    )
    parser.add_argument(
        "--force-resume", action="store_true", help="with --resume: continue although config, data or model have changed"
    )
    parser.add_argument("--seeds", metavar="N,N,...", help="do one run for each seed, as `seeds: [...]` in the config does")
    shared.add_processes(parser)


def run(parsed: argparse.Namespace) -> int:
    """Train, print the results or how to resume, and return the exit code."""
    from neuroada_jax.training import processes

    if parsed.resume_or_start and (parsed.resume or parsed.overwrite):
        raise UserError("--resume-or-start: give it without --resume or --overwrite")
    if parsed.seeds is not None and not re.fullmatch(r"\d+(,\d+)*", parsed.seeds):
        raise UserError(f"--seeds: expected numbers with commas between, such as 42,43,44, found {parsed.seeds!r}")
    arguments = (parsed.coordinator, parsed.processes, parsed.process, parsed.join_timeout)
    with processes.joined(*arguments) as together:
        code = _run(parsed, together)
        if code == shared.STOPPED and together.count > 1:
            together.stopped(shared.STOPPED)
    return code


def _run(parsed: argparse.Namespace, together: "Peers") -> int:
    """Train in one of the processes of a run; return its exit code."""
    from neuroada_jax.training import config_file, processes, report, run, run_directory, seeds, signals

    typed = {f"seeds=[{parsed.seeds}]": f"--seeds {parsed.seeds}"} if parsed.seeds else {}
    settings = config_file.load(parsed.config, [*parsed.overrides, *typed], typed)
    several = settings.seeds is not None
    if several and together.count > 1:
        raise UserError("seeds: several processes train one seed; start a run for each")
    train = seeds.train if several else run.train
    stopped, before = None, run_directory.written(settings)
    if parsed.resume_or_start:
        begun = together.from_first("begun", lambda: bool(run_directory.written(settings)))
        parsed.resume, parsed.force_resume = begun, parsed.force_resume and begun
    flags = {"overwrite": parsed.overwrite, "resume": parsed.resume, "force_resume": parsed.force_resume}
    with (
        processes.own_output(settings) as own,
        signals.listening(signals.SharedStop(together) if together.count > 1 else signals.Stop()) as stop,
    ):
        try:
            results = train(own, **flags, stop=stop)
        except signals.Stopped as request:
            stopped = request
        else:
            if not together.is_first:
                return 0
            if parsed.json:
                shared.print_json(results)
            else:
                (seeds.print_summary if several else report.print_summary)(results)
            report.print_next_steps(settings)
    if stopped is None:
        return 0
    # After the signal listener's own line, which another thread writes.
    if together.is_first:
        begun = parsed.resume or run_directory.written(settings) != before
        saved = "nothing new to save" if stopped.step is None else f"step {stopped.step} is saved"
        how = f"stopped, {saved}; go on with" if begun else "stopped before the run had begun; start it with"
        sys.stderr.write(f"neuroada: {how}: {_again(parsed, begun, stopped.step is not None)}\n")
    return shared.STOPPED


def _again(parsed: argparse.Namespace, begun: bool, saved: bool) -> str:
    """Return the command that resumes a stopped run, or starts it where it had not begun."""
    options = {
        "--seeds": parsed.seeds,
        "--json": parsed.json,
        "--overwrite": parsed.overwrite and not begun,
        "--resume": begun,
        "--force-resume": parsed.force_resume and not saved,  # a new checkpoint has the changed config
        "--coordinator": parsed.coordinator,
        "--processes": parsed.processes and str(parsed.processes),
        "--process": None if parsed.process is None else str(parsed.process),
        "--join-timeout": parsed.join_timeout and f"{parsed.join_timeout:g}",
    }
    given = [word for name, value in options.items() if value for word in ((name,) if value is True else (name, value))]
    return shlex.join(["neuroada", "train", parsed.config, *parsed.overrides, *given])
