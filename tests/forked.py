"""Starts processes that use the package quickly: forked from a server that has imported it once."""

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *("neuroada_jax.cli", "neuroada_jax.training.run", "neuroada_jax.training.seeds"),
        # Imported by a run when it needs them: half of the processor time of a tiny one.
        *("transformers.models.llama.configuration_llama", "scipy.stats", "matplotlib.backends.backend_agg"),
    ]
)


def start(arguments: Sequence[str], log: Path, script: Path | None = None, **environment: str) -> ForkServerProcess:
    """Start `neuroada`, or a script, with these arguments; what it prints goes to a file.

    JAX has been imported with the environment of the first call; `environment` is for variables that XLA reads later.
    """
    process = _CONTEXT.Process(target=_main, args=(list(arguments), str(log), script and str(script), environment))
    process.start()
    return process


def _main(arguments: list[str], log: str, script: str | None, environment: Mapping[str, str]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.environ |= environment
    tempfile.tempdir = None  # read TMPDIR again
    from neuroada_jax import cli

    if script is None:
        sys.exit(cli.main(arguments))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
