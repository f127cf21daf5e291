"""The files in benchmarks/results and the sources that docs/performance.md gives for them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SOURCES = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").partition("## Sources")[2]


def test_every_result_has_a_source():
    rows = re.findall(r"^\| [^|]+ \| ([^|]+\.json) \| [^|]+ \| [0-9a-f]{7} \|$", SOURCES, re.MULTILINE)
    assert sorted(rows) == sorted(path.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*.json"))


def test_a_script_is_here_or_its_commit_is_named():
    for line in SOURCES.splitlines():
        for script in re.findall(r"python -m benchmarks\.(\w+)", line):
            assert (ROOT / "benchmarks" / f"{script}.py").exists() or "at b8c0df8" in line, line
