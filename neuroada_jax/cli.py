"""The command line: the commands of `neuroada_jax.commands` in groups, with errors and warnings in one line."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from neuroada_jax import __version__, console
from neuroada_jax.commands import (
    adapters,
    classify,
    evaluate,
    generate,
    init,
    lm_eval,
    models,
    parsing,
    plan,
    preview,
    push,
    schema,
    sweep,
    tasks,
    train,
)
from neuroada_jax.errors import NeuroadaWarning, UserError

# Without PyTorch, transformers warns on import that no models are available. The models here need no PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


CLOSED_PIPE = 128 + 13  # as the shell reports a process that SIGPIPE ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: its own or 0; 2 for a UserError, 130 for Ctrl-C, 141 for a closed pipe."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where it is not UTF-8: symbols and texts as escapes
    return one_line_errors(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int | None:
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    # `train run.yaml --overwrite bypass.k=2`: argparse may leave overrides behind an option in `rest`; which ones depends
    # on the version of Python, so all are joined here, and the config's reader refuses what is no override.
    if rest and (not hasattr(parsed, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    code: int | None = parsed.run(parsed)
    return code


def one_line_errors(work: Callable[[], int | None]) -> int:
    """Run `work` and return the process's exit code, its own or 0; print errors for the user as one line each."""
    try:
        try:
            return _with_one_line_errors(work)
        finally:
            sys.stdout.flush()  # here rather than at exit, so that a closed pipe is met below
    except BrokenPipeError:  # `neuroada ... | head` has what it wants
        _discard_output()
        return CLOSED_PIPE


def _with_one_line_errors(work: Callable[[], int | None]) -> int:
    try:
        with _one_line_warnings():
            return work() or 0
    except UserError as error:
        sys.stderr.write(f"neuroada: error: {console.one_line(str(error))}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("neuroada: interrupted\n")
        return 130


def _discard_output() -> None:
    """Lead standard output and error, where their reader is gone, to nowhere: Python's own flush complains at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    def show(message: Any, category: Any, *_: Any, **__: Any) -> None:
        if issubclass(category, NeuroadaWarning):  # those of other libraries are not for the user
            sys.stderr.write(f"neuroada: warning: {console.one_line(str(message))}\n")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


# The groups in which the commands are listed.
_GROUPS = {
    "a run": (init, preview, plan, train, sweep),
    "its result": (generate, classify, evaluate, lm_eval),
    "adapters and models on disk": (adapters, push),
    "what there is": (models, tasks, schema),
}


def _parser() -> parsing.MainParser:
    parser = parsing.MainParser(_GROUPS, description="Sparse fine-tuning of language models with NeuroAda, in JAX.")
    parser.add_argument("--version", action="version", version=f"neuroada-jax {__version__}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
