"""`neuroada preview`: rows as examples, their lengths, counts and steps, as the run itself prepares them; no weights."""

import io
import json
import re
import shutil
import sys

import numpy as np
import pytest
import rich.console
from data_helpers import CHATML, byte_level
from helpers import run_config, write_bert, write_config, write_model

from neuroada_jax import cli, console
from neuroada_jax.commands import preview as command
from neuroada_jax.training import config_file, preparation, preview, run

BASE = byte_level(single="<s> $A", eos="</s>", template=CHATML)
# The answers of turns before the last are written without their thoughts, so that a chat becomes an example a turn.
SPLITTING = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'].split('!')[-1] }}")
PAIRS = [{"prompt": f"{'a ' * (i + 1)}?", "completion": "yes" * (i % 3 + 1)} for i in range(20)]


def chat(*contents):
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": turns}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models without weights: config.json and tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    found = {"base": write_model(folder / "base", BASE), "bert": write_bert(folder / "bert")}
    for path in list(found.values()):
        found[f"whole {path.name}"] = shutil.copytree(path, path.with_name(f"whole-{path.name}"))
        (path / "model.safetensors").unlink()
    return found


@pytest.fixture
def config(models, tmp_path):
    """Writes a config for these rows and returns its path."""

    def make(rows, model="base", sections=None, **data):
        path = tmp_path / "rows.jsonl"
        path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
        content = run_config(tmp_path, models[model], path, data=data, **(sections or {}))
        return write_config(tmp_path / "run.yaml", content)

    return make


@pytest.fixture
def neuroada(capsys):
    """Runs `neuroada preview` and returns (exit code, standard output, standard error)."""

    def call(*arguments):
        capsys.readouterr()
        code = cli.main(["preview", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def shown(neuroada, monkeypatch):
    """What `neuroada preview` prints on a page of some columns, without colour."""

    def call(*arguments, width=100, **options):
        written = io.StringIO()
        monkeypatch.setattr(console, "_out", rich.console.Console(file=written, width=width, highlight=False, **options))
        assert neuroada(*arguments)[0] == 0
        return written.getvalue()

    return call


def found_in(result):
    code, out, err = result
    assert code == 0 and out.count("\n") == 1, err
    return json.loads(out)


def test_examples_lengths_counts_and_steps_are_those_of_the_run(config, models, neuroada, tmp_path):
    path = config(PAIRS, max_length=24, buckets=[16, 24], sections={"training": {"epochs": 3, "steps": None}})
    found = found_in(neuroada(path, "data.style=verbatim", "--rows", "2", "--json"))
    settings = config_file.load(str(path), ["data.style=verbatim", f"model.path={models['whole base']}"])
    batches = run.prepare(settings).batches
    examples = batches.examples
    for number, each in enumerate(found["examples"]):
        ids, labels = examples.example(number)
        assert each["ids"] == ids.tolist() and each["is_label"] == labels.tolist()
        assert each["place"] == f"{tmp_path / 'rows.jsonl'}:{number + 1}"
    assert found["examples"][0]["tokens"][0] == "<s>" and found["examples"][0]["tokens"][-1] == "</s>"
    assert "".join(found["examples"][1]["tokens"]) == "<s>a a ?yesyes</s>"
    counts = found["counts"]
    assert (counts["rows"], counts["examples"], counts["truncated"]) == (20, len(examples), examples.truncated)
    assert (counts["tokens"], counts["labels"]) == (examples.lengths.sum(), examples.label_counts.sum())
    assert counts["dropped"] == examples.dropped > 0 and counts["truncated"] > 0
    lengths = found["lengths"]
    assert (lengths["min"], lengths["max"]) == (examples.lengths.min(), examples.lengths.max())
    assert lengths["mean"] == pytest.approx(examples.lengths.mean()) and lengths["median"] <= lengths["p95"]
    bins = lengths["histogram"]
    assert 1 < len(bins) <= 10 and bins[0]["first"] == lengths["min"] and bins[-1]["last"] == lengths["max"]
    for each in bins:
        assert each["examples"] == ((examples.lengths >= each["first"]) & (examples.lengths <= each["last"])).sum()
    assert found["shapes"] == [list(shape) for shape in batches.shapes]
    assert (found["steps_per_epoch"], found["total_steps"]) == (batches.steps_per_epoch, 3 * batches.steps_per_epoch)
    assert found["prompt"]["style"] == "verbatim" and "template" not in found["prompt"] and found["packing"] is None


@pytest.mark.parametrize("lengths", [[7], [7, 8], [7, 16], [7, 17], [3, 500], list(range(1, 200))])
def test_the_histogram_has_at_most_ten_bins_without_gaps(lengths):
    bins = preview.histogram(np.array(lengths, np.int32))
    assert len(bins) <= 10 and sum(each.examples for each in bins) == len(lengths)
    assert [each.first for each in bins[1:]] == [each.last + 1 for each in bins[:-1]]
    assert (bins[0].first, bins[-1].last) == (min(lengths), max(lengths))


def test_without_colour_learnt_tokens_are_marked_below(config, shown):
    path = config([chat("a\tb·?", "c d")])
    page = shown(path)
    assert "\x1b" not in page and "^ begins a learnt token" in page
    lines = [line[4:] for line in page.splitlines() if line.startswith("    ")]
    at = next(i for i, line in enumerate(lines) if line.startswith("c·"))
    assert lines[at] == "c·d<|im_end|>" and re.fullmatch(r"\^[\^~]{2}\^~{9}", lines[at + 1])
    at = next(i for i, line in enumerate(lines) if line.startswith("a→b"))
    assert lines[at].endswith(r"<|im_end|>↵") and not re.search(r"[\^~]", lines[at + 1])
    assert r"\xc2\xb7" in lines[at]  # its two bytes are a token each; they cannot be taken for a space


def test_on_a_terminal_they_are_in_colour_unless_NO_COLOR_is_set(config, shown, monkeypatch):
    path = config([chat("a", "b")])
    page = shown(path, force_terminal=True, color_system="standard")
    assert "\x1b[1;32mb" in page.replace("\x1b[1;36m", "\x1b[1;32m") and "~~~" not in page
    monkeypatch.setenv("NO_COLOR", "1")
    page = shown(path, force_terminal=True, color_system="standard")
    assert "\x1b" not in page and "^~~~" in page


def test_into_a_pipe_there_are_marks_and_messages_stay_off_standard_error(config, neuroada):
    code, out, err = neuroada(config([chat("a", "b")]))
    assert code == 0 and "^~~~" in out and "\x1b" not in out
    assert "1 examples of 1 rows" in out and "prompts: " in out and "prompts: " not in err


def test_where_standard_output_is_not_UTF_8(config, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="latin-1"))
    assert cli.main(["preview", str(config([chat("a b", "日")]))]) == 0
    sys.stdout.flush()
    assert rb"user\u21b5" in written.getvalue() and b"a\xb7b" in written.getvalue()


@pytest.mark.parametrize("width", [40, 60, 120])
def test_it_keeps_to_the_width(config, shown, width):
    page = shown(config([*PAIRS, {"prompt": "中文" * 30, "completion": "é"}]), width=width)
    ours = [line for line in page.splitlines() if "/" not in line]  # a path is not broken
    assert max(map(console.cells, ours)) <= max(width, 45)
    assert sum("#" in line for line in ours) >= 2


def test_chats_that_a_template_splits(config, neuroada, shown, tmp_path):
    (tmp_path / "template.jinja").write_text(SPLITTING)
    path = config([chat("a", "b"), chat("c", "hm!d", "e", "hm!f")], chat_template=str(tmp_path / "template.jinja"))
    found = found_in(neuroada(path, "--json"))
    assert found["counts"]["split_rows"] == 1 and found["counts"]["examples"] == 3
    assert [each.get("turn") for each in found["examples"]] == [None, [1, 2], [2, 2]]
    assert found["split_chats"] == [f"{tmp_path / 'rows.jsonl'}:2"]
    page = " ".join(shown(path).split())
    assert "turn 2 of 2 of a chat that was split" in page and "split chats: " in page


def test_packing_and_validation(config, neuroada, shown):
    path = config(PAIRS, packing=True, validation=0.25, max_length=64)
    found = found_in(neuroada(path, "--json"))
    assert found["validation"] == {"rows": 5, "examples": 5, "steps": 2} and found["counts"]["rows"] == 15
    packing = found["packing"]
    assert packing["filled"] == found["counts"]["tokens"] / (packing["rows"] * 64) and packing["length"] == 64
    assert found["steps_per_epoch"] == -(-packing["rows"] // 4) and found["total_steps"] == 3
    page = shown(path)
    assert (
        "5 examples of 5 rows are for validation" in page
        and "each validation: 5 examples in 2 batches, without an update" in page
        and f"({packing['rows']} packed rows in batches of 4)" in page
    )


def test_texts_are_learnt_but_for_their_first_token(config, neuroada):
    (each,) = found_in(neuroada(config([{"text": "one two"}]), "--json"))["examples"]
    assert "".join(each["tokens"]) == "<s>one two</s>" and each["is_label"] == [False] + [True] * (len(each["ids"]) - 1)


ENCODERS = [
    ({"task": "classification"}, ["b", "a", "b"], ["b", "a", "b"], {"a": 1, "b": 2}),
    ({"task": "regression"}, [1.5, 2, 3], [1.5, 2.0, 3.0], {}),
    ({"task": "multilabel"}, ["a|b", "", "b"], [["a", "b"], [], ["b"]], {"a": 1, "b": 2}),
]


@pytest.mark.parametrize("data, labels, expected, counts", ENCODERS)
def test_an_encoder_has_labels(config, neuroada, shown, data, labels, expected, counts):
    if data["task"] == "multilabel":
        labels = [each.split("|") if each else [] for each in labels]
    path = config([{"text": f"t {i}", "label": label} for i, label in enumerate(labels)], "bert", max_length=32, **data)
    found = found_in(neuroada(path, "--json"))
    assert [each["label"] for each in found["examples"]] == expected and found["label_counts"] == counts
    assert found["examples"][0]["tokens"] == ["[CLS]", "t", " ", "0", "[SEP]"] and "is_label" not in found["examples"][0]
    page = shown(path)
    assert "    [CLS] t · 0 [SEP]\n    .     . . . .\n" in page and "^" not in page
    assert ("examples of each label: a 1, b 2" in page) == bool(counts)
    assert ("label none" in page) == (data["task"] == "multilabel")


PAIR = {"prompt": "a", "completion": "b"}
CLASSES = {"model": "whole bert", "task": "classification", "max_length": 32}
BAD = [
    ("[]\n", {}),
    ([{"prompt": "a", "completion": 3}], {}),
    ([{"prompt": "a"}], {}),
    ([{"prompt": "a" * 100, "completion": "b"}], {}),
    ([PAIR, chat("a", "b")], {}),
    ([PAIR], {"columns": {"prompt": "question"}}),
    ([PAIR], {"limit": 1, "validation": 0.5}),
    ([PAIR], {"max_length": 1000}),
    ([{"text": "a", "label": "x"}] * 2, CLASSES),
    ([{"text": "a", "label": "x"}, {"text": 1, "label": "y"}], CLASSES),
]


@pytest.mark.parametrize("rows, options", BAD)
def test_what_the_training_refuses_is_refused_in_the_same_line(config, neuroada, rows, options, capsys):
    path = config(rows, **{"model": "whole base", **options})
    code, out, err = neuroada(path, "--json")
    last = err.splitlines()[-1]
    assert (code, out) == (2, "") and last.startswith("neuroada: error: ")
    assert cli.main(["train", str(path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == last


@pytest.mark.parametrize("rows", ["0", "6", "-1"])
def test_rows_are_one_to_five(config, neuroada, rows):
    assert neuroada(config(PAIRS), "--rows", rows) == (2, "", f"neuroada: error: --rows: expected 1 to 5, found {rows}\n")


def test_the_output_folder_is_neither_read_nor_written(config, neuroada, tmp_path):
    path = config(PAIRS)
    assert neuroada(path)[0] == 0 and not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("of an earlier run")
    assert neuroada(path)[0] == 0 and [each.name for each in (tmp_path / "out").iterdir()] == ["config.yaml"]


def test_of_several_seeds_it_shows_the_first(config, neuroada):
    path = config(PAIRS, validation=0.5)
    several, one, other = (
        found_in(neuroada(path, word, "--json"))["examples"] for word in ("seeds=[7, 8]", "seed=7", "seed=8")
    )
    assert several == one != other


def test_a_hub_id_downloads_no_weights(config, models, neuroada, monkeypatch):
    asked = []

    def download(name, allow_patterns, **_):
        asked.append((name, allow_patterns))
        return str(models["base"])

    monkeypatch.setattr(preview.source.huggingface_hub, "snapshot_download", download)
    assert neuroada(config(PAIRS), "model.path=user/name")[0] == 0
    ((name, patterns),) = asked
    assert name == "user/name" and "*.json" in patterns and not any("safetensors" in each for each in patterns)


def test_it_asks_for_no_device_and_no_tracker(config, neuroada, monkeypatch):
    """A run prepared on a machine with other devices can still be previewed here."""
    monkeypatch.setattr(preparation.parallel, "resolve", lambda *_: pytest.fail("devices were asked for"))
    assert neuroada(config(PAIRS), "parallel.devices=64", "training.batch_size=64")[0] == 0


@pytest.mark.parametrize(
    "text, expected",
    [("a b", "a·b"), ("\n\n", "↵↵"), ("\t", "→"), ("·↵→", r"\xb7\u21b5\u2192"), ("\x07\u200b", r"\x07\u200b"), ("", "''")],
)
def test_visible(text, expected):
    assert command.visible(text) == expected
