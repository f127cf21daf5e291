"""Tables and progress in terminals of several widths."""

import io
import re

import pytest
import rich.console

from neuroada_jax import console

HEADER = ("module", "maps", "O", "I", "k", "values", "bytes")
ROWS = [(f"self_attn.{name}_proj", "30", "1,536", "1,536", "20", "921,600", "7.37 MB") for name in "qkvo"]
PATH = "/home/somebody/" + 12 * "long-name/"


def screen(monkeypatch, name, width):
    """A terminal of this width in the place of standard output or standard error; what it has been sent."""
    written = io.StringIO()
    monkeypatch.setattr(
        console, name, rich.console.Console(file=written, width=width, force_terminal=True, highlight=False)
    )
    return written


def text(written):
    """What stands in the terminal, without the codes for colours and the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_table_breaks_no_word_and_keeps_to_the_width(width, monkeypatch):
    written = screen(monkeypatch, "_out", width)
    console.table("scores in % (95 % interval), of sets that have a title longer than sixty columns", HEADER, ROWS)
    lines = text(written).splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(lines).replace(",", " ").replace(":", " ").split()
    for row in ROWS:
        for cell in row:
            assert all(part in words for part in cell.replace(",", " ").split())
    assert all(name in words for name in HEADER[1:])
    assert ("─" in text(written)) == (width >= 60)


def test_the_values_of_a_narrow_list_go_on_between_words_and_a_path_is_not_broken(monkeypatch):
    written = screen(monkeypatch, "_out", 60)
    console.table("run", ("", ""), [("batch", 8 * "1,024 examples "), ("files", PATH)])
    lines = text(written).splitlines()
    assert lines[0] == "run" and f"    {PATH}" in lines
    assert lines[2].startswith("batch: 1,024 examples") and len(lines[2]) <= 60 and lines[3].startswith("    ")


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_progress_stays_in_one_line(width, monkeypatch):
    written = screen(monkeypatch, "_err", width)
    with console.bar("evaluating hellaswag", 1200) as bar:
        for done in (300, 1200):
            bar.update(done, 1200, "loss 0.1234, 12345 tokens/s")
            bar._progress.refresh()
    lines = text(written).replace("\r", "\n").split("\n")
    assert max(map(len, map(str.rstrip, lines))) <= width
    shown = [line for line in lines if line.strip()]
    assert all(line.startswith("evaluating hellaswag") for line in shown)
    assert "1200/1200" in shown[-1] and ("━" in shown[-1]) == (width == 120)
    assert ("tokens/s" in shown[-1]) == (width >= 80)
