"""The command line, in this process: a run end to end, `--json`, and bad inputs as one line with exit code 2."""

import json
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import yaml
from data_helpers import BYTES, CHAT
from helpers import CONFIG, NEURONS, random_tensors, run_config, write_config, write_model, write_rows
from transformers import AutoModelForCausalLM

from neuroada_jax import cli, console, models
from neuroada_jax.adapters import native
from neuroada_jax.commands import shared
from neuroada_jax.data.batches import Batches
from neuroada_jax.data.examples import encode
from neuroada_jax.data.rows import load_rows
from neuroada_jax.tasks import GLUE, OWN, TASKS
from neuroada_jax.training import loop

SOME = {"targets": ["q_proj", "down_proj"], "k": 2}


@pytest.fixture
def neuroada(capsys):
    """Runs a command and returns (exit code, standard output, standard error)."""

    def run(*arguments):
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(model directory, file of rows)."""
    folder = tmp_path_factory.mktemp("inputs")
    return write_model(folder / "model"), write_rows(folder / "rows.jsonl")


def config(folder, inputs, name="run.yaml", **sections):
    sections = {"bypass": SOME, **sections}
    return write_config(folder / name, run_config(folder, *inputs, **sections))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, inputs):
    """The folder of a whole run: train, evaluation before and after, merge; made once."""
    folder = tmp_path_factory.mktemp("trained")
    test = {"name": "held out", "data": str(inputs[1]), "limit": 6, "max_new_tokens": 2}
    path = config(folder, inputs, evaluation={"sets": [test]}, merge=True, training={"steps": 7})
    assert cli.main(["train", str(path), "data.style=verbatim", "--overwrite", "seed=3"]) == 0
    return folder / "out"


def one_line_error(result):
    """The message of a command that failed as it should."""
    code, out, err = result
    assert code == 2 and out == ""
    lines = [line for line in err.splitlines() if line.startswith("neuroada: error: ")]
    assert len(lines) == 1 and err.splitlines()[-1] == lines[0]
    assert "Traceback" not in err
    return lines[0].removeprefix("neuroada: error: ")


def one_object(result):
    """What a command printed with --json."""
    code, out, _ = result
    assert code == 0
    assert out.count("\n") == 1
    return json.loads(out)


# What a run leaves.


def test_results(trained, inputs):
    results = json.loads((trained / "results.json").read_text())
    values = 2 * 2 * (16 + 16)
    total = sum(tensor.size for tensor in random_tensors(CONFIG).values())
    assert results["trainable"] == values and results["total_parameters"] == total
    assert results["trainable_percent"] == pytest.approx(100 * values / total)
    assert results["steps"] == 7 and results["epochs"] == 7 / 6 and results["examples"] == 24
    assert results["last_loss"] < results["first_loss"]
    assert 1 <= results["compiled_steps"] <= results["possible_steps"]
    assert results["tokens_per_second"] > 0 and results["backend"] == "cpu"
    assert results["name"] == "tiny" and results["directory"] == str(trained)
    before, after = (results[when]["held out"] for when in ("before", "after"))
    assert after["n"] == 6 and 0 <= before["value"] <= 1 and len(after["interval"]) == 2
    assert results["versions"]["python"] == sys.version.split()[0]


def test_metrics_have_a_line_for_every_step(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 8))
    results = json.loads((trained / "results.json").read_text())
    assert (lines[0]["loss"], lines[-1]["loss"]) == (results["first_loss"], results["last_loss"])
    rates = [0.02 * (1 - step / 7) for step in range(7)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates, rel=1e-5)
    examples = encode(rows(trained), "verbatim", CHAT, 64)
    assert sum(line["labels"] for line in lines[:6]) == examples.label_counts.sum()
    assert sum(line["tokens"] for line in lines[:6]) == examples.lengths.sum()
    assert all(line["gradient_norm"] > 0 for line in lines)


def rows(trained):
    return load_rows(yaml.safe_load((trained / "config.yaml").read_text())["data"]["train"])


def test_the_other_files_of_a_run(trained):
    assert (trained / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    written = yaml.safe_load((trained / "config.yaml").read_text())
    assert written["seed"] == 3 and written["data"]["style"] == "verbatim" and written["bypass"]["k"] == 2
    predictions = [json.loads(line) for line in (trained / "predictions-held out-after.jsonl").read_text().splitlines()]
    assert len(predictions) == 6 and predictions[0]["prompt"] == "after a," and predictions[0]["answer"] == "b"
    adapter = native.read(str(trained / "adapter"))
    assert len(adapter.values) == 4 and all(values.any() for values in adapter.values.values())
    assert not [path.name for path in trained.iterdir() if path.name.startswith(".")]


def test_the_merged_model_is_base_plus_adapter(trained, inputs):
    base_model = safetensors.numpy.load_file(str(inputs[0] / "model.safetensors"))
    merged = safetensors.numpy.load_file(str(trained / "merged" / "model.safetensors"))
    adapter = native.read(str(trained / "adapter"))
    assert merged.keys() == base_model.keys()
    for module, values in adapter.values.items():
        weight = base_model[f"{module}.weight"]
        columns = adapter.columns[module]
        assert (np.sort(np.argsort(-np.abs(weight), axis=1)[:, :2], axis=1) == columns).all()
        np.put_along_axis(weight, columns, np.take_along_axis(weight, columns, 1) + values, 1)
    for name, weight in base_model.items():
        assert weight.tobytes() == merged[name].tobytes(), name
    AutoModelForCausalLM.from_pretrained(trained / "merged")


def test_an_output_folder_with_a_run_is_left_alone(trained, inputs, neuroada):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    message = one_line_error(neuroada("train", trained.parent / "run.yaml"))
    assert message == f"{trained} holds a run already; use --overwrite to replace it, --resume to go on, or another name"
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_overwrite_replaces_a_run_and_json_prints_its_results(tmp_path, inputs, neuroada):
    path = config(tmp_path, inputs)
    out = tmp_path / "out"
    (out / "merged").mkdir(parents=True)
    (out / "merged" / "old").write_text("")
    (out / "config.yaml").write_text("name: old\n")
    printed = one_object(neuroada("train", path, "--json", "--overwrite", "training.steps=2"))
    assert printed == json.loads((out / "results.json").read_text())
    assert printed["steps"] == 2 and printed["after"] == printed["before"] == {}
    assert not (out / "merged").exists()


def test_a_run_prints_tables(trained, capsys):
    from neuroada_jax.training import report

    report.print_summary(json.loads((trained / "results.json").read_text()))
    out = capsys.readouterr().out
    assert "held out" in out and "128" in out and "7" in out and "before" in out and out.count(", seed ") == 2


def next_commands(err):
    """The commands that `train` ends with, as lists of words."""
    lines = err.splitlines()
    return [shlex.split(line)[1:] for line in lines[lines.index("next:") + 1 :]]


def test_a_run_ends_with_what_it_wrote_and_commands_that_work(tmp_path, inputs, neuroada):
    folder = tmp_path / "with space"
    folder.mkdir()
    rows = [folder / "a.csv", folder / "b.csv"]
    for path in rows:
        path.write_text("question,completion\n" + "after a,b\n" * 4)
    data = {"train": [str(path) for path in rows], "columns": {"prompt": "question"}}
    code, out, err = neuroada("train", config(folder, inputs, training={"steps": 1}, data=data), "--json")
    assert code == 0 and json.loads(out)["steps"] == 1
    written = next(line for line in err.splitlines() if line.startswith("wrote "))
    path, _, names = written.removeprefix("wrote ").partition(": ")
    assert sorted(names.split(", ")) == sorted(each.name for each in Path(path).iterdir())
    commands = next_commands(err)
    assert [each[0] for each in commands] == ["generate", "evaluate", "merge"]
    for command in commands:
        code, _, err = neuroada(
            *command, *{"evaluate": ["--limit", 2, "--out", folder / "x", "--max-new-tokens", 1]}.get(command[0], [])
        )
        assert code == 0, err
    assert (folder / "out" / "merged" / "config.json").is_file()


def test_several_seeds_end_with_the_first_ones_adapter(tmp_path, inputs, neuroada):
    sets = {"sets": [{"name": "some", "data": str(inputs[1]), "limit": 2, "max_new_tokens": 1}], "before": False}
    path = config(tmp_path, inputs, training={"steps": 1}, evaluation=sets, merge=True)
    code, _, err = neuroada("train", path, "--seeds", "4,5")
    assert code == 0 and "\nwrote " in err and f"wrote {tmp_path / 'out'}: results.json\n" in err
    adapter = str(tmp_path / "out" / "seed-4" / "adapter")
    assert all(adapter in command for command in next_commands(err))
    assert [command[0] for command in next_commands(err)] == ["generate", "evaluate", "export"]
    assert next_commands(err)[1] == ["evaluate", "--adapter", adapter, "--task", "instruct", "--data", str(inputs[1])]


def test_a_packed_run_trains_on_every_example_once_an_epoch(tmp_path, inputs, neuroada):
    sections = {"data": {"packing": True, "max_length": 40}, "training": {"steps": None, "epochs": 3, "accumulation": 2}}
    code, out, err = neuroada("train", config(tmp_path, inputs, **sections), "--json")
    assert code == 0
    results, out = json.loads(out), tmp_path / "out"
    examples = encode(rows(out), "plain", CHAT, 40)
    packed = Batches(examples, 4, 42, packed_length=40)
    assert f"packed into {packed.row_count} rows of 40 tokens: {24 / packed.row_count:.1f} examples a row, " in err
    steps = packed.steps_per_epoch
    assert 1 < steps < 24 / 4 and results["steps"] == 3 * steps and results["epochs"] == 3
    assert results["compiled_steps"] == results["possible_steps"] == 1
    assert results["last_loss"] < results["first_loss"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for first in range(0, 3 * steps, steps):
        epoch = lines[first : first + steps]
        assert sum(line["labels"] for line in epoch) == examples.label_counts.sum()
        assert sum(line["tokens"] for line in epoch) == examples.lengths.sum()


# The other commands.


def test_evaluate(trained, inputs, neuroada, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the generations go
    arguments = ["evaluate", "--model", inputs[0], "--data", inputs[1], "--limit", 6, "--max-new-tokens", 2]
    arguments += ["--style", "verbatim", "--trained-on", inputs[1]]
    results = json.loads((trained / "results.json").read_text())
    before, after = (results[when]["held out"] for when in ("before", "after"))
    base_model = one_object(neuroada(*arguments, "--json"))
    assert base_model == {
        "empty": before["empty"],
        "task": "instruct",
        "metric": "accuracy",
        "value": before["value"],
        "n": 6,
        "interval": before["interval"],
        "overlap": 6,
        "unfinished": 6,
    }
    assert len((tmp_path / "runs" / "evaluate" / "instruct.jsonl").read_text().splitlines()) == 6
    out = tmp_path / "predictions.jsonl"
    adapted = one_object(neuroada(*arguments, "--json", "--adapter", trained / "adapter", "--out", out))
    assert (adapted["value"], adapted["interval"]) == (after["value"], after["interval"])
    assert out.read_text() == (trained / "predictions-held out-after.jsonl").read_text()
    code, table, _ = neuroada(*arguments)
    assert code == 0 and all(word in table for word in ("instruct", "accuracy", "overlap", "empty"))


def test_tasks(neuroada):
    code, out, _ = neuroada("tasks", "--json")
    assert code == 0 and [each["task"] for each in json.loads(out)] == [*TASKS, *OWN, *GLUE]
    code, table, _ = neuroada("tasks")
    assert code == 0 and all(name in table for name in (*TASKS, *OWN, *GLUE))


def test_rows_that_are_also_in_a_set_are_dropped(inputs, tmp_path, neuroada):
    sets = [{"name": "some", "data": str(inputs[1]), "limit": 5, "max_new_tokens": 1}]
    path = config(tmp_path, inputs, data={"drop_overlap": True}, evaluation={"sets": sets, "before": False})
    results = one_object(neuroada("train", path, "--json", "training.steps=1"))
    assert results["examples"] == 24 - 5 and results["after"]["some"]["overlap"] == 0
    assert results["mean"] is None
    whole = ("evaluation.sets.0.limit=24", "training.steps=1", "--overwrite")
    assert one_line_error(neuroada("train", path, *whole)).endswith("so that data.drop_overlap leaves none")


def test_generate(trained, inputs, neuroada):
    arguments = ["generate", "--prompt", "after a,", "--prompt", "after b, and", "--max-new-tokens", 4]
    merged = one_object(neuroada(*arguments, "--model", trained / "merged", "--json"))
    adapted = one_object(neuroada(*arguments, "--adapter", trained / "adapter", "--json"))  # its base comes from it
    assert adapted == merged
    assert [each["prompt"] for each in merged["generations"]] == ["after a,", "after b, and"]
    assert all(each["tokens"] <= 4 for each in merged["generations"])
    code, out, _ = neuroada(*arguments, "--model", trained / "merged")
    assert code == 0 and out == "\n\n".join(each["text"] for each in merged["generations"]) + "\n"


def test_generate_with_settings(trained, inputs, neuroada):
    arguments = ["generate", "--model", trained / "merged", "--prompt", "after a,", "--max-new-tokens", 6, "--json"]

    def text(*options):
        return one_object(neuroada(*arguments, *options))["generations"][0]["text"]

    drawn = {text("--temperature", 5, "--seed", seed) for seed in range(4)}
    assert len(drawn) > 1 and text("--temperature", 5, "--seed", 3) in drawn
    assert text("--top-k", 1) == text()
    assert text("--beams", 3, "--length-penalty", 2, "--early-stopping", "--no-repeat-ngram", 1)
    said = text("--repetition-penalty", 1.5)
    assert text("--repetition-penalty", 1.5, "--stop", said[2:4], "--stop", "never") == said[: said.index(said[2:4])]


def test_inspect(trained, inputs, neuroada):
    model = one_object(neuroada("inspect", inputs[0], "--k", 3, "--json"))
    assert model["kind"] == "model" and model["values"] == 2 * 3 * NEURONS and len(model["modules"]) == 14
    adapter = one_object(neuroada("inspect", trained / "adapter", "--json"))
    assert adapter["kind"] == "adapter" and adapter["values"] == 128 and adapter["base"] == str(inputs[0])
    assert [(kind["module"], kind["modules"]) for kind in adapter["kinds"]] == [
        ("mlp.down_proj", 2),
        ("self_attn.q_proj", 2),
    ]
    for content in (model, adapter):
        for kind in content["kinds"]:
            weights = kind["modules"] * kind["neurons"] * kind["inputs"]
            assert kind["percent"] == pytest.approx(100 * kind["values"] / weights)
    for path, values in ((inputs[0], f"{2 * NEURONS}"), (trained / "adapter", "128")):
        code, out, _ = neuroada("inspect", path)
        assert code == 0 and out.startswith(f"total: {values} values (k = ")
        assert [line.split()[:2] for line in out.splitlines() if "q_proj" in line] == [["self_attn.q_proj", "2"]]
        code, out, _ = neuroada("inspect", path, "--all")
        assert code == 0 and out.startswith(f"total: {values} values") and "model.layers.1.self_attn.q_proj" in out


def test_inspect_needs_no_more_of_a_model_than_its_config(inputs, neuroada, tmp_path):
    (tmp_path / "config.json").write_text((inputs[0] / "config.json").read_text())
    alone, complete = (one_object(neuroada("inspect", path, "--k", 1, "--json")) for path in (tmp_path, inputs[0]))
    assert {**alone, "path": None} == {**complete, "path": None}


def test_merge(trained, inputs, neuroada, tmp_path):
    out = tmp_path / "merged"
    made = one_object(neuroada("merge", "--adapter", trained / "adapter", "--out", out, "--json"))
    assert made["model"] == str(out) and "model.safetensors" in made["files"]
    assert sorted(path.name for path in out.iterdir()) == made["files"]
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (trained / "merged" / name).read_bytes()
    message = one_line_error(neuroada("merge", "--adapter", trained / "adapter", "--out", out))
    assert message == f"--out: {out} exists already; choose another folder or remove it"


@pytest.mark.filterwarnings("always::neuroada_jax.errors.NeuroadaWarning")
def test_push_writes_what_a_run_would_share(trained, inputs, neuroada, tmp_path):
    out = tmp_path / "shared"
    content = one_object(neuroada("push", trained, "me/tiny", "--dry-run", "--out", out, "--json"))
    assert len(content["notes"]) == 1 and "base model is a local one, called model in what is shared" in content["notes"][0]
    names = ["README.md", "adapter.json", "adapter.safetensors", "loss.png", "results.json"]
    assert [file["name"] for file in content["files"]] == names
    shared = native.read(str(out))
    assert (
        shared.metadata["base"]["source"] == "model"
        and shared.values.keys() == native.read(f"{trained}/adapter").values.keys()
    )
    assert "| held out | accuracy | 6 |" in (out / "README.md").read_text()
    for name in names:
        assert str(trained.parent).encode() not in (out / name).read_bytes()
        assert str(inputs[0].parent).encode() not in (out / name).read_bytes()


def test_the_console_entry(inputs):
    command = [str(Path(sys.executable).parent / "neuroada"), "inspect"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command, inputs[0], "--json"], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0 and json.loads(done.stdout)["values"] == 2 * NEURONS and done.stderr == ""
    done = subprocess.run([*command, "no/such/model"], capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1


def test_usage_errors(neuroada, capsys, tmp_path):
    for arguments in (["fly"], ["train"], ["train", "x", "--fast"], ["generate"], ["tasks", "--json", "y"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        out, err = capsys.readouterr()
        assert (caught.value.code, out, err.count("\n")) == (2, "", 1) and err.startswith("neuroada: error: ")
    with pytest.raises(SystemExit):
        cli.main(["export", "x", "--out", "y", "--to", "peft-shiro"])
    known = "official, peft-supertuning, peft-shira, peft-lora, huggingface, found 'peft-shiro'; did you mean 'peft-shira'?"
    assert (
        capsys.readouterr().err == f"neuroada: error: argument --to: expected one of {known}; see neuroada export --help\n"
    )
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0 and "neuroada-jax" in capsys.readouterr().out


def test_alone_it_lists_every_command_in_a_group(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    out = capsys.readouterr().out
    assert caught.value.code == 2 and max(map(len, out.splitlines())) <= 80
    *_, groups = out.partition("\na run:\n")
    listed = [line.split()[0] for line in groups.splitlines() if line.startswith("  ")]
    assert listed == list(cli._parser().commands.choices)


def usage_error(capsys, *arguments):
    with pytest.raises(SystemExit):
        cli.main([str(argument) for argument in arguments])
    return capsys.readouterr().err.removeprefix("neuroada: error: ").rstrip("\n")


def test_every_command_and_option_is_found_by_a_name_with_two_letters_swapped(capsys):
    """Also where the mistyped option is a required one."""

    def swapped(name):
        at = next(at for at in range(len(name) - 2, 0, -1) if name[at] != name[at - 1] and "-" not in name[at - 1 : at + 1])
        return f"{name[: at - 1]}{name[at]}{name[at - 1]}{name[at + 1 :]}"

    for name, command in cli._parser().commands.choices.items():
        assert (
            usage_error(capsys, swapped(name))
            == f"no command {swapped(name)!r}; did you mean {name!r}?; see neuroada --help"
        )
        options = [option for action in command._actions for option in action.option_strings if len(option) > 4]
        assert "--json" in options
        for option in options:
            found = usage_error(capsys, name, f"{swapped(option)}=1")
            # --process is as near to --processes.
            assert found.startswith(
                f"unrecognized arguments: {swapped(option)}; did you mean '{option}"
            ) and found.endswith(f"{name} --help")


def test_a_field_that_is_written_as_an_option_is_explained(capsys):
    written = usage_error(capsys, "train", "run.yaml", "--max-length", 9)
    how = "a field of the config is written data.max_length=VALUE"
    assert written == f"unrecognized arguments: --max-length; {how}; see neuroada train --help"
    assert "written training.steps=VALUE;" in usage_error(capsys, "plan", "run.yaml", "--training-steps=9")
    assert "optimizer.learning_rate=VALUE or classifier.learning_rate=VALUE" in usage_error(
        capsys, "train", "x", "--learning_rate", 1
    )
    assert "field" not in usage_error(capsys, "tasks", "--steps")


@pytest.mark.parametrize("at", [0, 1, 3])
def test_overrides_may_stand_anywhere_behind_the_config(at, tmp_path, inputs, neuroada):
    """Python's releases differ in which of them argparse finds behind an option."""
    path = config(tmp_path, inputs)
    arguments = ["--overwrite", "--seeds", "1,2"]
    arguments.insert(at, "bypass.kk=1")
    found = bad_run(neuroada, tmp_path, path, "name=a", *arguments)
    assert found == "override 'bypass.kk=1': bypass.kk: unknown field; did you mean 'k'?"
    arguments[arguments.index("bypass.kk=1")] = "y"
    assert bad_run(neuroada, tmp_path, path, *arguments) == "override 'y': expected the form section.field=value"


# Bad inputs. Each gives one line, exit code 2, and leaves nothing behind.


def bad_run(neuroada, folder, path, *arguments):
    message = one_line_error(neuroada("train", path, *arguments))
    assert not (folder / "out").exists()
    return message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bypass.kk=1", "bypass.kk: unknown field; did you mean 'k'?"),
        ("training.stepz=1", "training.stepz: unknown field; did you mean 'steps'?"),
        ("training.steps=many", "training.steps: input should be a valid integer, found 'many'"),
        ("bypass.k=0", "bypass.k: input should be greater than or equal to 1, found 0"),
        (
            "data.task=sst",
            f"data.task: unknown task 'sst'; did you mean 'sst2'? known: {', '.join(dict.fromkeys([*TASKS, *OWN, *GLUE]))}",
        ),
        (
            "data={train: x, packing: true, buckets: [64]}",
            "data.packing: packed rows all have data.max_length tokens; remove data.group_by_length and data.buckets",
        ),
    ],
)
def test_bad_config(override, message, tmp_path, inputs, neuroada):
    path = config(tmp_path, inputs)
    assert bad_run(neuroada, tmp_path, path, override) == f"override {override!r}: {message}"


def test_seeds_that_are_wrong_are_blamed_on_their_option(tmp_path, inputs, neuroada):
    message = bad_run(neuroada, tmp_path, config(tmp_path, inputs), "--seeds", "1,1", "bypass.k=2")
    assert message == "--seeds 1,1: seeds: 1 is given twice"


def test_missing_config_and_broken_yaml(tmp_path, neuroada):
    path = tmp_path / "none.yaml"
    assert one_line_error(neuroada("train", path)) == f"{path}: cannot be read (No such file or directory)"
    path.write_text("name: a\n  b: c\n")
    assert one_line_error(neuroada("train", path)).startswith(f"{path}: line 2 not YAML")


def test_targets_that_match_nothing_are_listed(tmp_path, inputs, neuroada):
    message = bad_run(neuroada, tmp_path, config(tmp_path, inputs, bypass={"targets": ["q_proj", "query"]}))
    assert message.startswith("bypass.targets: 'query' matches no linear map; this model has ")
    assert "self_attn.q_proj" in message and message.count("_proj") == 7
    message = bad_run(neuroada, tmp_path, config(tmp_path, inputs, bypass={"targets": ["lm_head"]}))
    assert message.startswith("bypass.targets: 'lm_head' shares its weights with the embedding")


@pytest.mark.filterwarnings("default")
def test_k_above_the_inputs_is_clamped_with_a_warning(tmp_path, inputs, neuroada):
    path = config(tmp_path, inputs, bypass={"k": 20, "targets": ["q_proj", "down_proj"]}, training={"steps": 1})
    code, _, err = neuroada("train", path, "--json")
    assert code == 0
    warned = [line for line in err.splitlines() if line.startswith("neuroada: warning: ")]
    assert len(warned) == 1 and "20 is more than the 16 inputs of" in warned[0] and "q_proj" in warned[0]
    adapter = native.read(str(tmp_path / "out" / "adapter"))
    shapes = {module.split(".")[-1]: values.shape for module, values in adapter.values.items()}
    assert shapes == {"q_proj": (16, 16), "down_proj": (16, 20)}


def test_missing_models(tmp_path, inputs, neuroada):
    for path in (tmp_path / "none", "./none", "none.gguf", "no/such/thing/at-all"):
        message = bad_run(neuroada, tmp_path, config(tmp_path, (path, inputs[1])))
        assert message == f"model {path} does not exist"
    message = bad_run(neuroada, tmp_path, config(tmp_path, ("nobody/nothing", inputs[1])))
    assert message.startswith("model 'nobody/nothing' is neither a local path nor a model that could be downloaded")
    (tmp_path / "empty").mkdir()
    message = bad_run(neuroada, tmp_path, config(tmp_path, (tmp_path / "empty", inputs[1])))
    assert message == f"{tmp_path / 'empty' / 'config.json'}: cannot be read (No such file or directory)"
    (tmp_path / "text.gguf").write_text("no model")
    assert str(tmp_path / "text.gguf") in bad_run(neuroada, tmp_path, config(tmp_path, (tmp_path / "text.gguf", inputs[1])))


def test_unsupported_architecture_lists_the_supported(tmp_path, inputs, neuroada):
    model = write_model(tmp_path / "m")
    (model / "config.json").write_text(json.dumps({**CONFIG, "model_type": "gpt2"}))
    message = bad_run(neuroada, tmp_path, config(tmp_path, (model, inputs[1])))
    known = ", ".join(sorted(models.ARCHITECTURES))
    assert message == f"{model}: config.json: model_type 'gpt2' is not supported; supported: {known}"


def test_weights_that_are_missing_or_not_whole(tmp_path, inputs, neuroada):
    model = write_model(tmp_path / "m")
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    path = config(tmp_path, (model, inputs[1]))
    weights.write_bytes(whole[:-100])
    assert bad_run(neuroada, tmp_path, path).startswith(f"{weights}: not a complete safetensors file")
    weights.unlink()
    message = bad_run(neuroada, tmp_path, path)
    assert message.startswith(f"{model}: found neither model.safetensors nor model.safetensors.index.json (where ")
    index = {"weight_map": dict.fromkeys(random_tensors(CONFIG), "model-00001-of-00002.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    message = bad_run(neuroada, tmp_path, path)
    assert message == f"{model / 'model-00001-of-00002.safetensors'}: this shard is missing, though the index names it"
    (model / "model-00001-of-00002.safetensors").write_bytes(whole[:40])
    assert "not a complete safetensors file" in bad_run(neuroada, tmp_path, path)
    tensors = random_tensors(CONFIG)
    del tensors["model.norm.weight"]
    (model / "model.safetensors.index.json").unlink()
    safetensors.numpy.save_file(tensors, str(weights))
    message = bad_run(neuroada, tmp_path, path)
    assert message == f"{model}: tensor 'model.norm.weight' is missing from the checkpoint; expected shape [16]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "{path}: the file is empty, expected one JSON object per line"),
        ('{"prompt": "a", "completion": "b"}\nnot json\n', "{path}:2: not JSON"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "{path}:2: no field 'completion', found fields prompt"),
        ('{"question": "a"}\n', "{path}:1: found fields question; expected"),
        ('{"prompt": "a", "completion": 3}\n', "{path}:1: field 'completion' is a number"),
        ("[1]\n", "{path}:1: "),
    ],
)
def test_bad_data(text, message, tmp_path, inputs, neuroada):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    found = bad_run(neuroada, tmp_path, config(tmp_path, (inputs[0], path)))
    assert found.startswith(message.format(path=path))


def test_missing_data(tmp_path, inputs, neuroada):
    path = tmp_path / "none.jsonl"
    message = bad_run(neuroada, tmp_path, config(tmp_path, (inputs[0], path)))
    assert message == f"{path}: no such file or directory"


def test_evaluation_data_is_checked_before_anything_is_written(tmp_path, inputs, neuroada):
    for fields, part in (
        ({"data": str(tmp_path / "none.jsonl")}, "none.jsonl: no such file or directory"),
        ({"data": str(inputs[1]), "method": "choices"}, "task 'instruct' has no fixed answers"),
        ({"data": str(inputs[1]), "task": "sst2"}, "rows.jsonl:1: task 'sst2' needs"),
        (
            {"data": str(inputs[1]), "max_new_tokens": 127},
            "tokens; with max_new_tokens 127 that exceeds the model's 128 positions",
        ),
    ):
        sets = {"sets": [{"name": "t", **fields}], "before": False}
        assert part in bad_run(neuroada, tmp_path, config(tmp_path, inputs, evaluation=sets))


def test_a_tokenizer_larger_than_the_embeddings(tmp_path, inputs, neuroada):
    model = write_model(tmp_path / "m", vocab_size=300)
    message = bad_run(neuroada, tmp_path, config(tmp_path, (model, inputs[1])))
    assert message == f"{model}: the tokenizer has 304 tokens, more than the 300 embeddings of the model"
    bare = write_model(tmp_path / "bare", None)
    message = bad_run(neuroada, tmp_path, config(tmp_path, (bare, inputs[1])))
    assert message.startswith(f"{bare}: no tokenizer in this directory")


def test_an_adapter_for_another_base(trained, tmp_path, inputs, neuroada):
    other = write_model(tmp_path / "other", seed=1)
    arguments = ["--model", other, "--adapter", trained / "adapter"]
    want = f"{other} is not the base model of this adapter ({inputs[0]}): tensor 'model.embed_tokens.weight' differs"
    assert one_line_error(neuroada("generate", *arguments, "--prompt", "a")) == want
    assert one_line_error(neuroada("evaluate", *arguments, "--data", inputs[1])) == want
    assert one_line_error(neuroada("merge", *arguments, "--out", tmp_path / "out")) == want
    assert not (tmp_path / "out").exists()


def test_bad_arguments_of_the_other_commands(trained, tmp_path, inputs, neuroada):
    model = ["--model", inputs[0]]
    for arguments, part in (
        (["generate", "--prompt", "a"], "give --model, or an --adapter that names its base model"),
        (["generate", *model, "--prompt", ""], "the prompt has no tokens"),
        (["generate", *model, "--prompt", "a", "--style", "fancy"], "prompt style: found 'fancy'"),
        (["generate", *model, "--prompt", "a", "--max-new-tokens", 0], "max_new_tokens: expected at least 1, found 0"),
        (["generate", *model, "--prompt", "a", "--max-new-tokens", 500], "exceeds the model's 128 positions"),
        (["generate", *model, "--prompt", "a", "--temperature", 0], "temperature: expected above 0, found 0.0"),
        (["generate", *model, "--prompt", "a", "--top-p", 0.9, "--beams", 4], "a search with 4 beams samples nothing"),
        (["generate", *model, "--prompt", "a", "--seed", 1], "seed: nothing is sampled"),
        (["generate", *model, "--prompt", "a", "--early-stopping"], "they are for a beam search"),
        (["generate", *model, "--prompt", "a", "--stop", ""], "stop: found an empty text"),
        (["generate", *model, "--prompt", "a", "--adapter", tmp_path], "no adapter here (adapter.json is missing)"),
        (
            ["evaluate", *model, "--data", inputs[1], "--task", "sst"],
            "--task: unknown task 'sst'; did you mean 'sst2'? known: i",
        ),
        (["evaluate", *model, "--data", inputs[1], "--limit", 0], "--limit: expected at least 1, found 0"),
        (["evaluate", *model, "--task", "boolq", "--split", "train"], "--split needs --data; without it, the task's own"),
        (["evaluate", *model, "--batch-size", 0], "--batch-size: expected at least 1, found 0"),
        (["evaluate", *model, "--max-new-tokens", 0], "--max-new-tokens: expected at least 1, found 0"),
        (["evaluate", *model, "--data", tmp_path / "none.jsonl"], "no such file or directory"),
        (["inspect", inputs[0], "--k", 0], "--k: expected at least 1, found 0"),
        (["inspect", tmp_path / "none"], f"{tmp_path / 'none'} does not exist"),
        (["merge", "--adapter", tmp_path / "none", "--out", tmp_path / "x"], "no adapter here"),
    ):
        assert part in one_line_error(neuroada(*arguments)), arguments
    assert list(tmp_path.iterdir()) == []


def test_evaluate_checks_before_it_reads_weights(inputs, tmp_path, neuroada, monkeypatch):
    monkeypatch.setattr(shared, "load_params", None)
    arguments = ["evaluate", "--model", inputs[0], "--data", inputs[1]]
    for options, part in (
        (["--task", "sst2"], "rows.jsonl:1: task 'sst2' needs"),
        (["--style", "fancy"], "prompt style: found 'fancy'"),
        (["--chat-template", "x"], "--chat-template: 'x' cannot be read (No such file or directory)"),
        (["--template-arguments", "{a: 1}"], "--template-arguments: prompts in style plain use no chat template"),
        (["--template-arguments", "[1]"], "--template-arguments: expected a mapping as JSON or YAML, found '[1]'"),
        (["--template-arguments", "{a: 1}", "--style", "chat"], "the chat template does not read 'a'"),
        (["--max-length", 9], "--max-length: llama is a decoder, whose prompts are not truncated; remove it"),
        (["--method", "choices", "--max-new-tokens", 9], "--max-new-tokens: method choices generates nothing"),
        (["--method", "choices"], "has no fixed answers"),
        (["--trained-on", tmp_path / "none.jsonl"], "none.jsonl: no such file or directory"),
        (["--max-new-tokens", 127], "exceeds the model's 128 positions"),
        (["--out", tmp_path], "cannot be written (it is a folder)"),
        (["--out", inputs[1] / "p.jsonl"], f"cannot be written ({inputs[1]} is no folder)"),
    ):
        assert part in one_line_error(neuroada(*arguments, *options)), options


def test_an_infinite_weight_is_found_before_anything_is_written(tmp_path, inputs, neuroada):
    embedding = random_tensors(CONFIG)["model.embed_tokens.weight"].copy()
    embedding[:, 0] = np.inf
    model = write_model(tmp_path / "m", weights={"model.embed_tokens.weight": embedding})
    message = one_line_error(neuroada("train", config(tmp_path, (model, inputs[1]), training={"steps": 3})))
    assert message.startswith(f"{model}: tensor 'model.embed_tokens.weight' holds {len(embedding)} infinite entries in ")
    assert not (tmp_path / "out").exists()


def test_an_absurd_learning_rate_keeps_the_last_good_adapter(tmp_path, inputs, neuroada):
    sections = {"optimizer": {"learning_rate": 3e38, "schedule": "constant"}, "training": {"steps": 6, "log_every": 3}}
    message = one_line_error(neuroada("train", config(tmp_path, inputs, **sections)))
    assert "became NaN or infinite at step 2 (rows " in message
    adapter = native.read(str(tmp_path / "out" / "adapter"))  # finite, or it would be refused
    assert all(values.any() for values in adapter.values.values())


def test_an_interrupt_returns_130(tmp_path, inputs, neuroada, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "run", interrupt)
    code, out, err = neuroada("train", config(tmp_path, inputs))
    assert (code, out) == (130, "") and err.splitlines()[-1] == "neuroada: interrupted"
    assert not (tmp_path / "out" / "adapter").exists()


def test_warnings_of_other_libraries_are_not_shown(capsys):
    def work():
        warnings.simplefilter("always")
        warnings.warn_explicit("theirs", UserWarning, "/home/me/neuroada_jax/.venv/lib/x.py", 1)
        console.warn("ours")

    assert cli.one_line_errors(work) == 0
    assert capsys.readouterr().err == "neuroada: warning: ours\n"


def test_tokenizers_without_a_chat_template(tmp_path, inputs, neuroada):
    model = write_model(tmp_path / "m", BYTES)
    message = bad_run(neuroada, tmp_path, config(tmp_path, (model, inputs[1]), data={"style": "chat"}))
    assert "the tokenizer has no chat template" in message
