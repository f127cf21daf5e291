"""`neuroada init`: configs that are read, explain their fields, and train as they are on tiny rows."""

import itertools
import json
import re

import pytest
from helpers import write_bert, write_model, write_rows

from neuroada_jax import cli
from neuroada_jax.training import config_file
from neuroada_jax.training.starter import Kind, starter

kinds = pytest.mark.parametrize("kind", list(Kind))


def init(capsys, *arguments):
    capsys.readouterr()
    code = cli.main(["init", *map(str, arguments)])
    return code, *capsys.readouterr()


def write_tiny_rows(path, kind):
    if kind is Kind.INSTRUCT:
        return write_rows(path, 8)
    if kind is Kind.CLASSIFY:
        path.write_text("text,label\n" + "".join(f"{letter * 3},{letter}s\n" for letter in "abcabc"))
        return path
    rows = {
        Kind.CHAT: [{"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": "b"}]} for c in "abcd"],
        Kind.TEXT: [{"text": 9 * letter} for letter in "abcd"],
    }
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[kind]))
    return path


@kinds
def test_every_field_has_one_line_of_comment_and_is_read(kind):
    text = starter(kind, "my.yaml", "my")
    loaded = config_file.from_dict(config_file.parse_yaml(text, ""), "")
    flat = config_file.flatten_config(loaded)
    lines, section, found = text.splitlines(), "", {}
    for before, line in itertools.pairwise(lines):
        if line.endswith(":"):
            section = line[:-1]
        elif not line.lstrip().startswith("#"):
            assert re.match(r" *# \S.{15,}", before), line
            name, _, value = line.strip().partition(": ")
            section = section if line.startswith("  ") else ""
            found[f"{section}.{name}".lstrip(".")] = config_file.parse_yaml(value, "")
    assert kind is not Kind.CHAT or all(field in text for field in ("messages", "conversations", "ShareGPT"))
    assert len(found) >= 14 and max(map(len, lines)) <= 124
    assert {path: flat[path] for path in found} == found
    # What is left out has its default: a minimal config with the same fields is the same run.
    minimal = {}
    for path, value in found.items():
        section, _, name = path.rpartition(".")
        (minimal.setdefault(section, {}) if section else minimal)[name] = value
    assert config_file.from_dict(minimal, "") == loaded


@kinds
def test_it_trains_as_it_is(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = write_bert(tmp_path / "tiny") if kind is Kind.CLASSIFY else write_model(tmp_path / "tiny")
    code, _, err = init(capsys, "--kind", kind, "--out", "my run.yaml", "--model", model)
    assert code == 0
    wrote, fill, look, following = err.splitlines()
    assert (wrote, following) == ("wrote my run.yaml", "next: neuroada train 'my run.yaml'")
    assert look == "to see how they are read: neuroada preview 'my run.yaml'"
    write_tiny_rows(tmp_path / re.match(r"put your rows into ([\w.]+): .", fill)[1], kind)
    # The tiny BERT has 40 positions: the one field that the model, not the rows, asks to change.
    shorter = ["data.max_length=32"] if kind is Kind.CLASSIFY else ["data.max_length=64"]
    assert cli.main(["train", "my run.yaml", *shorter]) == 0
    assert (tmp_path / "runs" / "my run" / "adapter" / "adapter.json").is_file()
    results = json.loads((tmp_path / "runs" / "my run" / "results.json").read_text())
    assert results["last_loss"] < results["first_loss"]
    assert "neuroada classify" in (shown := capsys.readouterr().err) or "neuroada generate" in shown


@kinds
def test_model_and_rows_of_any_name(kind, tmp_path, capsys):
    for number, name in enumerate(["a b", "x: y", "#1", "true", "1e3", "it's", 'q"q', "null", "ä\t", "[x]", "- z", "a #b"]):
        out = tmp_path / f"{number}.yaml"
        code, printed, _ = init(capsys, "--kind", kind, "--out", out, "--model", name, "--train", name, "--json")
        assert code == 0
        assert json.loads(printed) == {"config": str(out), "train": name, "next": f"neuroada train {out}"}
        loaded = config_file.load(str(out))
        assert (loaded.name, loaded.model.path, loaded.data.train) == (str(number), name, name)


def test_it_overwrites_nothing_and_refuses_what_it_cannot_write(tmp_path, capsys):
    out = tmp_path / "my.yaml"
    out.write_text("mine")
    arguments = ["--kind", "chat", "--out"]
    code, _, err = init(capsys, *arguments, out)
    assert (code, err) == (2, f"neuroada: error: --out: {out} exists already; choose another file or remove it\n")
    assert out.read_text() == "mine"
    code, _, err = init(capsys, *arguments, tmp_path)
    assert code == 2 and err.count("\n") == 1 and "it is a folder" in err
    code, _, err = init(capsys, *arguments, out / "x.yaml")
    assert code == 2 and "is no folder" in err
    assert [path.name for path in tmp_path.iterdir()] == ["my.yaml"]
