"""Adapters from the hub, by a fake of its HTTP API on this machine: what is downloaded, and every refusal in one line."""

import json

import fake_hub
import pytest
from data_helpers import message_of
from helpers import write_model
from huggingface_hub import constants
from test_native import save

import neuroada_jax as na
from neuroada_jax import cli
from neuroada_jax.adapters import hub, native
from neuroada_jax.pretrained.hub import is_id, snapshot_of
from neuroada_jax.pretrained.load import load_model, open_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base") / "m")


@pytest.fixture(scope="module")
def local(base, tmp_path_factory):
    return save(tmp_path_factory.mktemp("adapter") / "a", load_model(str(base)))


@pytest.fixture
def online(monkeypatch, tmp_path):
    with fake_hub.connected(monkeypatch, tmp_path / "cache") as server:
        yield server


@pytest.fixture
def files(local):
    """An adapter's files, with others that are not to be downloaded."""
    own = {path.name: path.read_bytes() for path in local.iterdir()}
    return own | {"README.md": b"# card", "optimizer.safetensors": b"0" * 1000, "sub/adapter.json": b"{}"}


def same(adapter, other):
    return adapter.metadata == other.metadata and all(
        (adapter.values[module] == other.values[module]).all() for module in other.values
    )


def test_an_adapter_is_downloaded_once_and_nothing_else_of_its_repository(online, files, local):
    online.add("user/name", files)
    assert same(hub.read("user/name"), native.read(str(local)))
    fetched = [line.rpartition("/")[2] for line in online.requests if line.startswith("GET /user/")]
    assert sorted(fetched) == ["adapter.json", "adapter.safetensors"]
    online.requests.clear()
    hub.read("user/name")
    assert not [line for line in online.requests if "/resolve/" in line]


def test_what_was_downloaded_is_read_without_a_network(online, files, monkeypatch, local):
    online.add("user/name", files)
    hub.read("user/name")
    online.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(hub.read("user/name"), native.read(str(local)))
    assert online.requests == []


def test_a_revision_is_a_branch_a_tag_or_a_commit(online, files, local, base, tmp_path):
    made = online.add("user/name", files)
    other = save(tmp_path / "b", load_model(str(base)), targets=["k_proj"])
    made.commits.append({path.name: path.read_bytes() for path in other.iterdir()})
    for revision in ("@v1", f"@{made.oid(1)}"):
        assert same(hub.read(f"user/name{revision}"), native.read(str(local)))
    for revision in ("", "@main", "@v2"):
        assert same(hub.read(f"user/name{revision}"), native.read(str(other)))
    assert message_of(hub.read, "user/name@v9").endswith("the hub has no such revision of it")


def test_a_local_directory_wins(online, files, local, tmp_path, monkeypatch):
    online.add("user/name", files)
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "name").mkdir()
    monkeypatch.chdir(tmp_path)
    assert message_of(hub.read, "user/name") == "user/name: no adapter here (adapter.json is missing)"
    assert online.requests == []


@pytest.mark.parametrize("name", ["/user/name", "./name", "~/name", "a/b/c", "adapter", "..", "user/name.gguf"])
def test_other_paths_are_never_asked_of_the_hub(online, name):
    assert message_of(hub.read, name) == f"{name}: no adapter here (adapter.json is missing)"
    assert online.requests == []


def test_private_repositories_need_the_token(online, files, monkeypatch, local):
    online.add("user/name", files, private=True)
    assert same(hub.read("user/name"), native.read(str(local)))
    online.add("user/other", files, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "or a private one: check the spelling, or log in with `hf auth login`" in message_of(hub.read, "user/other")


def test_gated_repositories_say_so(online, files, monkeypatch):
    online.add("user/name", files, gated=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert message_of(hub.read, "user/name") == (
        "'user/name' is neither a local directory nor an adapter that could be downloaded: it is gated: accept its "
        "conditions on its page, and log in with `hf auth login`"
    )


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (
            403,
            "the hub answered 403 (no); the token may not do this: log in with another by `hf auth login`",
        ),
        (409, "the hub answered 409 (no)"),
        (429, "the hub answered 429 (no); too many requests: try again later"),
        (500, "the hub answered 500 (no); try again later"),
        (503, "the hub answered 503 (no); try again later"),
    ],
)
@pytest.mark.parametrize("where", ["info", "file"])
def test_errors_of_the_server(online, files, status, said, where):
    online.add("user/name", files)
    online.errors[{"info": "GET /api/models/.*", "file": "(GET|HEAD) /user/.*safetensors"}[where]] = (status, {}, "no")
    assert message_of(hub.read, "user/name").endswith(f"downloaded: {said}")


def test_a_hub_that_is_not_there(monkeypatch, tmp_path):
    with fake_hub.connected(monkeypatch, tmp_path / "cache", "http://127.0.0.1:1"):
        assert "http://127.0.0.1:1 cannot be reached (" in message_of(hub.read, "user/name")


def test_offline_and_not_in_the_cache(online, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert message_of(hub.read, "user/name").endswith(
        "HF_HUB_OFFLINE is set, and the hub's cache on this machine does not have it"
    )


def test_base_models_are_refused_in_the_same_words(online, base, monkeypatch):
    start = "is neither a local path nor a model that could be downloaded: "
    assert message_of(open_model, "user/none") == (
        f"model 'user/none' {start}the hub has no such repository, or a private one: check the spelling, or log in with "
        "`hf auth login`"
    )
    online.add("user/model", {"config.json": (base / "config.json").read_bytes()}, gated=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert f"{start}it is gated: accept its conditions" in message_of(open_model, "user/model", config_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert f"{start}HF_HUB_OFFLINE is set" in message_of(open_model, "user/other")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("adapter_config.json", b"{}", "but an adapter of PEFT; download it with `hf download user/name --local-dir"),
        ("config.json", b"{}", "but a complete model; give it as --model, without --adapter"),
        ("README.md", b"", "user/name: no adapter in this repository of the hub (adapter.json is missing)"),
    ],
)
def test_repositories_that_hold_something_else(online, name, content, said):
    online.add("user/name", {name: content})
    assert said in message_of(hub.read, "user/name")


def test_half_an_adapter(online, files):
    online.add("user/name", {"adapter.json": files["adapter.json"]})
    assert message_of(hub.read, "user/name") == (
        "user/name: this repository of the hub has adapter.json but no adapter.safetensors"
    )


def test_damage_on_the_way_is_noticed(online, files):
    spoilt = bytearray(files["adapter.safetensors"])
    spoilt[-1] ^= 1
    online.add("user/name", files | {"adapter.safetensors": bytes(spoilt)})
    assert "the file was damaged or changed" in message_of(hub.read, "user/name")


# Every reader takes hub ids.


def test_from_python(online, files, base):
    online.add("user/name", files)
    tuned = na.load(str(base), adapter="user/name")
    assert tuned.adapter.metadata["k"] == 3
    assert message_of(na.load, str(base), adapter="user/none").startswith("'user/none' is neither a local directory nor")


@pytest.fixture
def printed(capsys):
    def run(*arguments):
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    return run


def test_merge_export_and_inspect(online, files, printed, tmp_path):
    online.add("user/name", files)
    printed("merge", "--adapter", "user/name", "--out", tmp_path / "merged", "--json")
    printed("export", "user/name", "--to", "peft-shira", "--out", tmp_path / "peft", "--json")
    assert (tmp_path / "merged" / "model.safetensors").is_file() and (tmp_path / "peft" / "adapter_config.json").is_file()
    inspected = printed("inspect", "user/name@v1", "--json")
    assert inspected["kind"] == "adapter" and inspected["path"] == "user/name@v1"


def test_inspect_reads_models_of_the_hub_as_before(online, base, printed):
    online.add("user/model", {"config.json": (base / "config.json").read_bytes()})
    assert printed("inspect", "user/model", "--json")["kind"] == "model"


def test_generate_and_evaluate(online, files, printed, tmp_path):
    online.add("user/name", files)
    row = tmp_path / "row.jsonl"
    row.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    chosen = ("--adapter", "user/name", "--max-new-tokens", "1", "--style", "verbatim", "--json")
    assert printed("generate", *chosen, "--prompt", "a")
    assert printed("evaluate", *chosen, "--data", row)


def test_every_command_that_reads_an_adapter_says_that_it_takes_hub_ids():
    groups = next(action for action in cli._parser()._actions if hasattr(action, "choices") and action.choices)
    texts = {
        (name, action.help)
        for name, command in groups.choices.items()
        for action in command._actions
        if action.dest == "adapter"
    }
    without = {name for name, text in texts if "USER/NAME@REVISION" not in text}
    assert len(texts) >= 6 and without == {"push"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("user/name", True),
        ("gpt2", True),
        ("a.b/c-d_e", True),
        ("user/name/more", False),
        ("./name", False),
        ("rows/train.jsonl", False),
        ("model.gguf", False),
        ("user/na me", False),
        ("", False),
        ("user/" + "n" * 92, False),
        ("user/ñ", False),
    ],
)
def test_the_form_of_hub_ids(name, expected):
    assert is_id(name) is expected


def test_paths_in_the_hubs_cache_name_their_repository():
    path = "/home/me/.cache/huggingface/hub/models--user--name/snapshots/" + "0a" * 20
    assert snapshot_of(path) == ("user/name", "0a" * 20)
    assert snapshot_of(path + "/model.gguf") == ("user/name", "0a" * 20)
    assert snapshot_of("/home/me/user/name") is None
