"""Mutate every kind of file that is read, and see that each mutation is refused in one line or read as what it is.

    make fuzz              (or: python tests/fuzz.py --cases 20000 --seed 0)

The readers are called in this process; one that raises anything but UserError is a traceback, one that takes longer than
`SECONDS` a hang, one that takes more than `BYTES` of memory beyond what was there before is over memory. What is accepted
is compared with the sound file: where a digest covers what was changed, it has to give the same value. The last line is
`fuzz: N cases, C clean, A accepted, 0 tracebacks, 0 hangs, 0 over memory`; the exit code is 1 unless the last three are 0.
"""

import argparse
import contextlib
import faulthandler
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

SECONDS, BYTES = 30, 10**9
LONGEST = 2000  # characters of a message
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class Hang(BaseException):
    """The time of a case is up."""


def _peak() -> int:
    """Return the largest memory of this process since `_reset_peak`, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", text)[1]) * 1024


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def alarm(seconds: float, terminal: int = 2):
    """Raise Hang in the enclosed code after some seconds; `terminal` is a descriptor."""

    def ring(*_):
        raise Hang

    # Of the processor, so that other work on the machine makes no hang of what is bounded in the processor's time.
    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    # A library that does not come back to Python keeps the alarm waiting; then the process ends, and says where.
    faulthandler.dump_traceback_later(20 * seconds, exit=True, file=terminal)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def printed():
    """Catch what the enclosed code prints, other languages too; yield a function that returns and forgets it."""
    with tempfile.TemporaryFile() as caught:
        kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}

        def latest() -> bytes:
            found = os.pread(caught.fileno(), 10**6, 0)
            if found:
                os.ftruncate(caught.fileno(), 0)
                os.lseek(caught.fileno(), 0, os.SEEK_SET)
            return found

        for descriptor in kept:
            os.dup2(caught.fileno(), descriptor)
        try:
            yield latest
        finally:
            for descriptor, before in kept.items():
                os.dup2(before, descriptor)
                os.close(before)


def fuzz(name: str, folder: Path, cases: int, seed: int, on_fault=None, verbose: bool = False) -> Counter:
    """Return how many cases of a format had which outcome; `on_fault` gets a description of each that must not be."""
    from fuzz_formats import FORMATS
    from fuzz_mutations import pick, rng_of

    from neuroada_jax.console import one_line
    from neuroada_jax.errors import UserError

    folder.mkdir(parents=True)
    form, rng, counts = FORMATS[name](), rng_of([seed, list(FORMATS).index(name)]), Counter()
    paths = form.write(folder)
    sound = form.read(folder)
    contents = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    terminal = os.dup(2)  # not that of the cases, whose output is looked at

    def fault(kind, error):
        counts[kind] += 1
        if on_fault:
            kept = folder.parent / f"fault-{name}-{number}-{path.name}"
            kept.write_bytes(mutated)
            where = ""
            if isinstance(error, BaseException) and error.__traceback__:
                trace = error.__traceback__
                while trace.tb_next:
                    trace = trace.tb_next
                where = f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
            what = f"{kind}: {str(error)[:200]!r} ({type(error).__name__}{where})"
            on_fault(f"{name} case {number}: {mutate.__name__} of {path.name}: {what} -> {kept}")

    for number in range(cases):
        path = pick(rng, paths)
        mutate = pick(rng, form.mutators_of(path))
        mutated = mutate(rng, contents[path])
        path.write_bytes(mutated)
        if verbose:
            (folder.parent / "last").write_text(f"{name} {number} {path.name} {mutate.__name__}")
        form.changed = [path]
        _reset_peak()
        before = _peak()
        shown = b""
        try:
            with printed() as latest, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    with alarm(SECONDS, terminal):
                        found = form.read(folder)
                finally:
                    shown = latest()
        except UserError as error:
            text = one_line(str(error))
            if not text or len(text) > LONGEST or _CONTROL.search(text):
                fault("tracebacks", error)
            else:
                counts["clean"] += 1
        except Hang as error:
            fault("hangs", error)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of a Rust library is no Exception
            fault("tracebacks", error)
        else:
            same = mutated == contents[path] or repr(found) == repr(sound)
            counts["accepted"] += 1
            counts["equal"] += same
            if not same and form.digested(folder):
                fault("tracebacks", AssertionError("accepted with another value, in spite of its digest"))
        if _CONTROL.search(shown.decode("utf-8", "replace").replace("\n", "")):
            fault("tracebacks", AssertionError(f"control characters reach the terminal: {shown[:100]!r}"))
        if _peak() - before > BYTES:
            fault("over memory", MemoryError(f"{_peak() - before:,} bytes"))
        for each, content in contents.items():
            if each == path or each.name.endswith(".jsonl"):
                each.write_bytes(content)
    os.close(terminal)
    form.changed = []
    assert repr(form.read(folder)) == repr(sound), f"{name}: the sound folder is read differently after the mutations"
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutate every kind of file that is read.")
    parser.add_argument("--cases", type=int, default=20_000, help="mutations of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", nargs="*", help="only these")
    given = parser.parse_args()
    from fuzz_formats import FORMATS

    total = Counter()
    folder = tempfile.mkdtemp(prefix="neuroada-fuzz-")  # kept where a case has to be looked at
    with open(os.devnull, "w") as quiet:
        for name in given.formats or FORMATS:
            began = time.process_time()
            cases = min(given.cases, 2000) if name == "loaded" else given.cases
            with contextlib.redirect_stderr(quiet):
                counts = fuzz(
                    name, Path(folder) / name, cases, given.seed, lambda text: print(text, flush=True), verbose=True
                )
            total += counts
            seconds = time.process_time() - began
            print(f"{name}: {cases} cases, {dict(counts)}, {1000 * seconds / max(cases, 1):.1f} ms a case", flush=True)
    bad = {kind: total[kind] for kind in ("tracebacks", "hangs", "over memory")}
    if not any(bad.values()):
        shutil.rmtree(folder)
    cases = total["clean"] + total["accepted"] + bad["tracebacks"] + bad["hangs"]
    shown = ", ".join(f"{number} {kind}" for kind, number in bad.items())
    print(f"fuzz: {cases} cases, {total['clean']} clean, {total['accepted']} accepted, {shown}")
    return int(any(bad.values()))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.exit(main())
