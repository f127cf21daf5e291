"""What every file in benchmarks/results must look like."""

import json
from pathlib import Path


def read(folder: Path, name: str, *, timed: bool = True) -> tuple[dict, list[dict]]:
    """Settings and rows of a result, checked."""
    content = json.loads((folder / f"{name}.json").read_text())
    settings, rows = content["settings"], content["rows"]
    assert {"date", "machine", "versions"} | ({"repeats"} if timed else set()) <= settings.keys()
    assert {"cpu", "cores"} <= settings["machine"].keys()
    assert {"jax", "neuroada-jax", "python"} <= settings["versions"].keys()
    assert rows
    for row in rows:
        assert {"method", "k", "dtype", "shape", "seconds", "peak_bytes"} <= row.keys()
        assert row["seconds"] > 0
    return settings, rows


def printed_rows(text: str) -> int:
    """Lines of a printed table below its head, one for each row; a wide one has paragraphs below its title."""
    lines = [line.strip() for line in text.splitlines()]
    rules = (number for number, line in enumerate(lines) if line and set(line) == {"─"})
    rule = next(rules, lines.index(""))
    return sum(bool(line) for line in lines[rule + 1 :])
