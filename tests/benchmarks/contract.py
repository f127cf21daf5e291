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
    """Rows of a printed table: lines below its rule; where it is too wide for the terminal, paragraphs below its title."""
    lines = text.splitlines()
    rules = [number for number, line in enumerate(lines) if line.strip() and set(line.strip()) == {"─"}]
    if rules:
        return sum(bool(line.strip()) for line in lines[rules[0] + 1 :])
    paragraphs = lines[lines.index("") + 1 :]
    return sum(bool(line) and not line.startswith(" ") for line in paragraphs)  # a paragraph's next lines are indented
