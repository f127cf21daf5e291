"""The base model of an adapter is found from any folder, and after both have moved; an error says who named it."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest
from data_helpers import message_of
from helpers import write_model, write_rows

from neuroada_jax import cli, models
from neuroada_jax.adapters import native, on_base
from neuroada_jax.adapters.base_model import located, open_base
from neuroada_jax.core import bypass
from neuroada_jax.pretrained.load import load_model

COMMANDS = (
    ["generate", "--adapter", "{}", "--prompt", "a", "--max-new-tokens", "1", "--json"],
    [
        "evaluate",
        "--adapter",
        "{}",
        "--data",
        "{rows}",
        "--limit",
        "1",
        "--max-new-tokens",
        "1",
        "--out",
        "out.jsonl",
        "--json",
    ],
    ["merge", "--adapter", "{}", "--out", "merged", "--json"],
    ["export", "{}", "--to", "peft-shira", "--out", "shira", "--json"],
)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a model and an adapter of it, which was trained there: the base model was typed as `base/tiny`."""
    folder = tmp_path_factory.mktemp("base-model") / "project"
    write_model(folder / "base" / "tiny")
    write_rows(folder / "rows.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model = load_model("base/tiny")
        targets = models.match_targets(model.params, ["q_proj"], model.model.layers_path)
        built = bypass.build(model.params, targets, 2)
        values = jax.tree.map(jnp.ones_like, built.values)
        on_base.save(folder / "runs" / "a", built._replace(values=values), model, native.Selection(2, ["q_proj"]))
    return folder


def output(capsys, command, adapter, rows, *more):
    capsys.readouterr()
    code = cli.main([*(word.format(adapter, rows=rows) for word in command), *map(str, more)])
    out, err = capsys.readouterr()
    return code, out or err.splitlines()[-1]


def without_digest(content):
    """Fields of an adapter.json that may be edited, as those of 0.1 may."""
    return {name: value for name, value in content.items() if name != "fields_digest"}


def test_what_is_written(project):
    base = json.loads((project / "runs" / "a" / "adapter.json").read_text())["base"]
    assert base["source"] == "base/tiny" and base["absolute"] == str(project / "base" / "tiny")
    assert base["relative"] == "../../base/tiny"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("moved", [False, True])
def test_every_command_finds_it_from_another_folder(command, moved, project, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if moved:
        project = shutil.copytree(project, tmp_path / "moved")
        path = project / "runs" / "a" / "adapter.json"
        content = json.loads(path.read_text())
        base = content["base"] | {"absolute": f"/gone{content['base']['absolute']}"}
        path.write_text(json.dumps(without_digest(content) | {"base": base}))
    code, out = output(capsys, command, project / "runs" / "a", project / "rows.jsonl")
    assert code == 0, out
    code, out = output(capsys, ["inspect", "{}", "--json"], project / "runs" / "a", "")
    found = json.loads(out)
    assert (found["base"], found["base_path"]) == ("base/tiny", str(project / "base" / "tiny"))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_where_it_is_nowhere_the_error_says_who_named_it(command, project, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    adapter = shutil.copytree(project / "runs" / "a", tmp_path / "alone")
    path = adapter / "adapter.json"
    content = json.loads(path.read_text())
    gone = str(tmp_path / "gone")
    path.write_text(json.dumps(without_digest(content) | {"base": content["base"] | {"absolute": gone}}))
    code, message = output(capsys, command, adapter, project / "rows.jsonl")
    places = f"base/tiny, {gone}, {tmp_path.parent / 'base' / 'tiny'}"
    assert code == 2 and message.splitlines()[-1] == (
        f"neuroada: error: the base model 'base/tiny', named by {path}, does not exist (tried {places}); give it by --model"
    )
    # A hub id, the wheel of a package, and an adapter of 0.1, which has the name as it was typed and nothing else.
    for source in ("nobody/nothing", "package:no_such_package/x", "no/such/local/model"):
        base = {key: value for key, value in content["base"].items() if key not in ("absolute", "relative")}
        path.write_text(json.dumps(without_digest(content) | {"base": base | {"source": source}}))
        code, message = output(capsys, command, adapter, project / "rows.jsonl")
        assert (
            code == 2
            and source in message
            and message.endswith(f"; named by {path} as the base model, which --model gives by another path")
        )
    code, out = output(capsys, command, adapter, project / "rows.jsonl", "--model", project / "base" / "tiny")
    assert code == 0, out
    assert not [each for each in tmp_path.iterdir() if each.name not in ("alone", "out.jsonl", "merged", "shira")]


def test_a_name_that_the_user_gives_is_not_blamed_on_the_adapter(project):
    def fail(source):
        load_model(source)

    adapter = native.read(str(project / "runs" / "a"))
    assert message_of(open_base, adapter, "a", "no/such/local/model", fail) == "model no/such/local/model does not exist"


def test_of_several_places_the_one_with_the_digests_counts(project, tmp_path, monkeypatch):
    """Here another model stands where the name, as it was typed, leads in this folder."""
    monkeypatch.chdir(tmp_path)
    directory = str(project / "runs" / "a")
    adapter = native.read(directory)
    write_model(tmp_path / "base" / "tiny", seed=1)
    assert located(adapter, directory) == str(project / "base" / "tiny")
    (tmp_path / "base" / "tiny" / "model.safetensors").write_bytes(b"damaged")
    assert located(adapter, directory) == str(project / "base" / "tiny")
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(project / "base", tmp_path / "base")
    assert located(adapter, directory) == "base/tiny"


def test_an_adapter_that_is_saved_again_leads_to_the_base_from_there(project, tmp_path):
    adapter = native.read(str(project / "runs" / "a"))
    native.write(tmp_path / "deep" / "er" / "b", adapter)
    base = native.read(str(tmp_path / "deep" / "er" / "b")).metadata["base"]
    assert (tmp_path / "deep" / "er" / "b" / base["relative"]).resolve() == (project / "base" / "tiny").resolve()


@pytest.mark.parametrize("field", ["absolute", "relative"])
@pytest.mark.parametrize("value", [3, None, ["x"]])
def test_paths_of_another_kind_are_refused(field, value, project, tmp_path):
    adapter = shutil.copytree(project / "runs" / "a", tmp_path / "a")
    content = json.loads((adapter / "adapter.json").read_text())
    content["base"][field] = value
    (adapter / "adapter.json").write_text(json.dumps(content))
    assert (
        message_of(native.read, str(adapter))
        == f"{adapter / 'adapter.json'}: base.{field}: expected a path, found {value!r}"
    )
