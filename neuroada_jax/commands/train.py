"""`neuroada train`: fine-tune a model as a config says."""

import argparse
import contextlib
import re
import shlex
import sys

from neuroada_jax.commands import shared
from neuroada_jax.errors import UserError


def add(commands: shared.Commands) -> None:
    """Add the command."""
    parser = shared.add_command(commands, "train", run, "fine-tune a model as a config says")
    shared.add_config(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is already in the output directory")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint (training.save_every)")
    parser.add_argument(
        "--force-resume", action="store_true", help="with --resume: continue although config, data or model have changed"
    )
    parser.add_argument("--seeds", metavar="N,N,...", help="do one run for each seed, as `seeds: [...]` in the config does")
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0, where a run has several processes; auto: ask SLURM (docs/scaling.md)",
    )
    parser.add_argument("--processes", type=int, metavar="N", help="number of processes, with --coordinator HOST:PORT")
    parser.add_argument(
        "--process", type=int, metavar="N", help="number of this process, from 0, with --coordinator HOST:PORT"
    )


def run(parsed: argparse.Namespace) -> None:
    """Train, and print the results or where to resume."""
    from neuroada_jax.training import config_file, processes, report, run, seeds, signals

    if parsed.seeds is not None and not re.fullmatch(r"\d+(,\d+)*", parsed.seeds):
        raise UserError(f"--seeds: expected numbers with commas between, such as 42,43,44, found {parsed.seeds!r}")
    if parsed.coordinator and parsed.resume:
        raise UserError("--resume: runs of several processes save no checkpoints yet, so there is none to resume from")
    typed = {f"seeds=[{parsed.seeds}]": f"--seeds {parsed.seeds}"} if parsed.seeds else {}
    settings = config_file.load(parsed.config, [*parsed.overrides, *typed], typed)
    several = settings.seeds is not None
    train = seeds.train if several else run.train
    stopped = None
    flags = {"overwrite": parsed.overwrite, "resume": parsed.resume, "force_resume": parsed.force_resume}
    with (
        processes.joined(parsed.coordinator, parsed.processes, parsed.process) as first,
        processes.own_output(settings) as settings,
        # Several processes have nothing to save and cannot stop at different steps: there a signal ends them as usual.
        contextlib.nullcontext(signals.Stop()) if parsed.coordinator else signals.listening() as stop,
    ):
        try:
            results = train(settings, **flags, stop=stop)
        except signals.Stopped as request:
            stopped = request
        else:
            if parsed.json and first:
                shared.print_json(results)
            else:
                (seeds.print_summary if several else report.print_summary)(results)
    if stopped:  # after the signal listener's own line, which another thread writes
        saved = "nothing new to save" if stopped.step is None else f"step {stopped.step} is saved"
        seeds_option = ["--seeds", parsed.seeds] if parsed.seeds else []
        again = shlex.join(["neuroada", "train", parsed.config, *parsed.overrides, *seeds_option, "--resume"])
        sys.stderr.write(f"neuroada: stopped, {saved}; go on with: {again}\n")
