"""Standard output that is closed early or is not UTF-8: every command ends quietly, and prints what it can."""

import io
import json
import os
import subprocess
import sys

import pytest
from helpers import run_config, write_config, write_model, write_rows

from neuroada_jax import cli
from neuroada_jax.commands import generate
from neuroada_jax.errors import UserError

TEXT = "caf\u00e9 \u65e5 \U0001f600 \ud83d"  # half of a surrogate pair is in no encoding


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model, rows = write_model(folder / "model"), write_rows(folder / "rows.jsonl")
    return write_config(folder / "run.yaml", run_config(folder, model, rows))


def commands(config):
    """Command lines that print on standard output and need no weights."""
    preview, inspect = ["preview", str(config)], ["inspect", str(config.parent / "model")]
    bare = [["tasks"], preview, inspect, ["plan", str(config)], ["schema"]]
    return [*bare, *([*each, "--json"] for each in bare), ["--help"], ["preview", "--help"], ["--version"]]


def closed_pipe():
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", buffering=1)  # by lines, as standard error is


def test_a_closed_pipe_ends_every_command_quietly(config, monkeypatch, capsys):
    for words in commands(config):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", closed_pipe())
            assert cli.main(words) == 141, words
            sys.stdout.close()  # what is left in its buffer goes to nowhere
        assert "Broken" not in capsys.readouterr().err


def test_a_closed_pipe_of_errors(monkeypatch):
    def fail():
        raise UserError("nobody reads this")

    monkeypatch.setattr(sys, "stderr", closed_pipe())
    assert cli.one_line_errors(fail) == 141
    sys.stderr.close()


def test_a_preview_into_head(config):
    # `head -1` may take its line before or after the rest is written; a reader that is gone from the start cannot.
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "neuroada_jax.cli", "preview", str(config)], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert done.returncode == 141 and "rror" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("as_json", [False, True])
def test_texts_that_the_encoding_lacks_are_escaped(encoding, as_json, monkeypatch):
    def run(parsed):
        if parsed.json:
            generate.shared.print_json({"text": TEXT})
        else:
            print(TEXT)
            cli.tasks.console.write(TEXT)

    monkeypatch.setattr(cli.tasks, "run", run)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert cli.main(["tasks", *(["--json"] if as_json else [])]) == 0
    printed = written.getvalue().decode(encoding)
    if as_json:
        assert json.loads(printed) == {"text": TEXT}
    else:
        assert printed == 2 * (TEXT.encode(encoding, "backslashreplace").decode(encoding) + "\n")
