"""Files of version 0.1 (tests/fixtures/version_0_1) are read by this one: adapters, checkpoints, configs, results."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from neuroada_jax import cli
from neuroada_jax.training import config_file

FIXTURE = Path(__file__).parent / "fixtures" / "version_0_1"
ADAPTERS = {"decoder": "finished/decoder-run/adapter", "encoder": "finished/encoder-seeds/seed-1/adapter"}
# Names of config fields or whole sections in 0.1 -> today's; an item of a list is `*`, as in "evaluation.sets.*.data".
RENAMED: dict[str, str] = {"head": "classifier"}
TIMES = ("train_seconds", "tokens_per_second")

# The checkpoint names the library versions that wrote it; others are warned of.
pytestmark = pytest.mark.filterwarnings("ignore::neuroada_jax.errors.NeuroadaWarning")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the fixture, as the current directory: its paths are relative."""
    shutil.copytree(FIXTURE, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    return tmp_path / "files"


def neuroada(capsys, *arguments):
    """Runs a command; what it printed on standard output and standard error."""
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(content):
    """Every number of results, times apart, whatever its key is called."""
    if isinstance(content, dict):
        content = [value for key, value in content.items() if key not in TIMES]
    if isinstance(content, list):
        return set().union(*map(numbers, content))
    return {round(content, 6)} if isinstance(content, int | float) and not isinstance(content, bool) else set()


def assert_merged(model, base, adapter):
    """A merged model is the base plus what is in an adapter's file, which is read here without this package."""
    weights = safetensors.numpy.load_file(FIXTURE / base / "model.safetensors")
    found = safetensors.numpy.load_file(model / "model.safetensors")
    tensors = safetensors.numpy.load_file(FIXTURE / adapter / "adapter.safetensors")
    values = {name.removesuffix(".values"): tensors.pop(name) for name in list(tensors) if name.endswith(".values")}
    columns = {name.removesuffix(".columns"): tensors.pop(name) for name in list(tensors) if name.endswith(".columns")}
    assert len(values) == 4 and set(tensors) == ({"classifier.weight", "classifier.bias"} if base == "encoder" else set())
    assert all(np.abs(each).max() > 1e-3 for each in (*values.values(), *tensors.values()))
    for module, added in values.items():
        weight = weights[f"{module}.weight"]
        chosen = np.take_along_axis(weight, columns[module], 1)
        np.put_along_axis(weight, columns[module], chosen + added, 1)
    weights |= tensors
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_allclose(found[name], weight, rtol=0, atol=1e-6, err_msg=name)


# Adapters.


@pytest.mark.parametrize("base", ADAPTERS)
def test_adapter_is_merged_into_its_base(base, folder, capsys):
    neuroada(capsys, "merge", "--adapter", ADAPTERS[base], "--out", "merged")
    assert_merged(folder / "merged", base, ADAPTERS[base])


@pytest.mark.parametrize("base", ADAPTERS)
def test_adapter_is_inspected(base, folder, capsys):
    stored = json.loads((folder / ADAPTERS[base] / "adapter.json").read_text())
    content = json.loads(neuroada(capsys, "inspect", ADAPTERS[base], "--json")[0])
    assert content["base"] == base and content["k"] == stored["k"] == 2 and content["seed"] == stored["seed"]
    assert content["targets"] == stored["targets"] and len(content["modules"]) == 4
    assert {each["module"]: each["inputs"] for each in content["modules"]} == stored["inputs"]


def test_adapter_with_a_classifier_scores_what_its_run_scored(folder, capsys):
    """Without --model: the base is the one that the adapter names. The run scored the set in two parts."""
    arguments = ["--adapter", ADAPTERS["encoder"], "--task", "mrpc", "--data", "dev.jsonl", "--out", "predictions.jsonl"]
    found = json.loads(neuroada(capsys, "evaluate", *arguments, "--json")[0])
    results = json.loads((folder / ADAPTERS["encoder"]).with_name("results.json").read_text())
    best, rest = results["best_epoch"], results["evaluation"]["dev"]
    correct = best["value"] * best["split"]["choosing_rows"] + rest["accuracy_after"] * rest["n"]
    assert found["n"] == 21 and found["value"] == pytest.approx(correct / 21)


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_adapter_without_its_prompts_is_asked_as_ever(command, folder, capsys):
    arguments = {"generate": ["--prompt", "a", "--max-new-tokens", 2], "evaluate": ["--data", "rows.jsonl", "--limit", 2]}
    style = {"generate": "verbatim", "evaluate": "plain"}[command]
    out, err = neuroada(capsys, command, "--adapter", ADAPTERS["decoder"], *arguments[command], "--json")
    assert err.startswith(
        f"adapter.json of {ADAPTERS['decoder']} does not record its prompts (written by 0.1 or imported): style {style} is "
        "used; --style chooses another\n"
    )
    again, err = neuroada(
        capsys, command, "--adapter", ADAPTERS["decoder"], *arguments[command], "--json", "--style", style
    )
    assert again == out and err.startswith(f"prompts: {style}\n")


# Runs.


def test_decoder_run_is_resumed(folder, capsys):
    """From a checkpoint kept by merit, with scores before the training, to what the run became that was left alone."""
    run, finished = folder / "decoder-run", folder / "finished" / "decoder-run"
    shutil.copytree(folder / "interrupted" / "decoder-run", run)
    _, err = neuroada(capsys, "train", "decoder-run.yaml", "merge=true", "--resume")
    assert "resuming after step 4" in err
    assert_merged(run / "merged", "decoder", ADAPTERS["decoder"])
    found, want = lines(run / "metrics.jsonl"), lines(finished / "metrics.jsonl")
    assert [each["step"] for each in found] == [each["step"] for each in want] == list(range(1, 9))
    assert [each["labels"] for each in found] == [each["targets"] for each in want]
    assert [each["loss"] for each in found] == pytest.approx([each["loss"] for each in want], rel=1e-5)
    found, want = (json.loads((each / "results.json").read_text()) for each in (run, finished))
    assert found["trainable"] == want["trainable"] and found["examples"] == want["examples"]
    assert numbers(want["evaluation"]) <= numbers([found["before"], found["after"]])


def test_seeds_are_resumed(folder, capsys):
    """The finished seed is taken as it is; the other goes on in its second epoch, with the adapter of the first."""
    run, finished = folder / "encoder-seeds", folder / "finished" / "encoder-seeds"
    shutil.copytree(folder / "interrupted" / "encoder-seeds", run)
    before = {path: path.stat().st_mtime_ns for path in (run / "seed-2").rglob("*")}
    _, err = neuroada(capsys, "train", "encoder-seeds.yaml", "merge=true", "--seeds", "2,1", "--resume")
    assert err.count("resuming after step") == err.count("resuming after step 4") == 1
    assert {path: path.stat().st_mtime_ns for path in (run / "seed-2").rglob("*")} == before
    assert_merged(run / "seed-1" / "merged", "encoder", ADAPTERS["encoder"])
    assert lines(run / "seed-1" / "epochs.jsonl") == lines(finished / "seed-1" / "epochs.jsonl")
    found, want = (json.loads((each / "results.json").read_text()) for each in (run, finished))
    assert found["seeds"] == want["seeds"] == [2, 1]
    assert numbers(want["runs"]) <= numbers(found["runs"]) and numbers(want["evaluation"]) <= numbers(found["after"])


# Configs.


def dotted(content, prefix=""):
    """Every field of nested sections, and of sections in lists, by its path."""
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, list) and content and isinstance(content[0], dict):
        items = enumerate(content)
    else:
        return {prefix: content}
    return {
        path: leaf for key, each in items for path, leaf in dotted(each, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def general(path):
    """With `*` for the number of an item of a list."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def today(path):
    """The path that a field of 0.1 has now, by the longest entry of RENAMED that it begins with."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        new = RENAMED.get(general(".".join(parts[:end])))
        if new is not None:
            for number in (part for part in parts[:end] if part.isdigit()):
                new = new.replace("*", number, 1)
            return ".".join([new, *parts[end:]])
    return path


VALUES = json.loads((FIXTURE / "config_values.json").read_text())


@pytest.mark.parametrize("name", VALUES)
def test_every_field_of_a_config_arrives(name):
    content = dataclasses.asdict(config_file.load(str(FIXTURE / name)))
    found = dotted(json.loads(json.dumps(content)))
    want = {today(path): value for path, value in VALUES[name].items()}
    assert {path: found.get(path, "no such field") for path in want} == want


def test_the_configs_have_every_field_and_section():
    """So that no rename goes unnoticed; `suite` stands for several sets."""
    files = [path for path in FIXTURE.rglob("*.yaml") if path.parent.name == "configs"]
    given = {general(path) for file in files for path in dotted(config_file.parse_yaml(file.read_text(), file.name))}
    fields = {general(path) for values in VALUES.values() for path in values} - {"evaluation.sets"}  # where there is none
    assert {str(path.relative_to(FIXTURE)) for path in FIXTURE.rglob("*.yaml")} == set(VALUES)
    assert given - {"evaluation.sets.*.suite"} == fields
