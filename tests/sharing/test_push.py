"""`neuroada push` against a fake of the hub's HTTP API: what arrives, what is printed, and every error in one line."""

import hashlib
import json
import tempfile

import fake_hub
import pytest
from origins import write_adapter, write_run

from neuroada_jax import cli
from neuroada_jax.adapters import hub, native

# huggingface_hub 2.4, whenever it uploads a large file without hf_xet
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("always::neuroada_jax.errors.NeuroadaWarning"),  # as on the command line
]

NAMES = ["README.md", "adapter.json", "adapter.safetensors", "loss.png", "results.json"]


@pytest.fixture
def online(monkeypatch, tmp_path):
    with fake_hub.connected(monkeypatch, tmp_path / "cache") as server:
        yield server


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


@pytest.fixture
def push(capsys, monkeypatch, tmp_path):
    """Runs the command in an empty folder and returns (exit code, standard output, standard error)."""
    (tmp_path / "work").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def push(*arguments):
        capsys.readouterr()
        code = cli.main(["push", *map(str, arguments)])
        return code, *capsys.readouterr()

    yield push
    assert list((tmp_path / "temporary").iterdir()) == []


def error(result):
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("neuroada: error: ") and err.count("\n") == 1
    return err.removeprefix("neuroada: error: ").rstrip("\n")


def printed(result):
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def test_a_run_arrives_in_one_commit_with_its_digests(online, run, push):
    content = printed(push(run, "me/tiny", "--json", "--message", "First"))
    repository = online.repositories["me/tiny"]
    assert repository.private and repository.messages == ["initial commit", "First"]
    assert sorted(repository.files) == [".gitattributes", *NAMES]
    for file in content["files"]:
        sent = repository.files[file["name"]]
        assert (len(sent), hashlib.sha256(sent).hexdigest()) == (file["bytes"], file["sha256"])
    assert content["commit"] == repository.oid() and content["url"] == f"{online.url}/me/tiny"
    assert (content["created"], content["private"], content["dry_run"]) == (True, True, False)
    assert content["base_model"] == "user/base" and content["notes"] == []
    assert sorted(online.objects) == sorted(
        fake_hub.sha256(repository.files[name]) for name in ("adapter.safetensors", "loss.png")
    )
    assert repository.files["adapter.safetensors"] == (run / "adapter" / "adapter.safetensors").read_bytes()


def test_what_was_pushed_is_read_by_its_hub_id(online, run, push):
    printed(push(run, "me/tiny", "--json"))
    pushed, own = hub.read("me/tiny"), native.read(str(run / "adapter"))
    assert pushed.metadata == own.metadata
    assert all((pushed.values[module] == values).all() for module, values in own.values.items())


def test_a_dry_run_writes_what_would_be_sent_and_asks_nothing_of_the_hub(online, run, push, tmp_path):
    content = printed(push(run, "me/tiny", "--dry-run", "--json"))
    assert online.requests == [] and content["private"] and content["out"] == "tiny-upload"
    written = tmp_path / "work" / "tiny-upload"
    assert sorted(path.name for path in written.iterdir()) == NAMES == [file["name"] for file in content["files"]]
    printed(push(run, "me/tiny", "--json"))
    sent = online.repositories["me/tiny"].files
    assert all(sent[name] == (written / name).read_bytes() for name in NAMES)
    assert error(push(run, "me/tiny", "--dry-run")) == (
        "--out: tiny-upload exists already; choose another folder or remove it"
    )


def test_a_dry_run_needs_no_token(run, push, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "none"))
    assert push(run, "me/tiny", "--dry-run", "--out", "there")[0] == 0


def test_what_is_printed(online, run, push):
    code, out, err = push(run, "me/tiny", "--dry-run")
    assert code == 0 and out.startswith("would upload") and all(name in out for name in NAMES)
    assert err == (
        "wrote tiny-upload for me/tiny (private); change its README.md if you like, then `neuroada push tiny-upload "
        "me/tiny` uploads it\n"
    )
    code, out, err = push(run, "me/tiny", "--public")
    assert code == 0 and out.startswith("uploaded")
    assert err == f"{online.url}/me/tiny (public, commit {online.repositories['me/tiny'].oid()[:10]})\n"


def test_warnings_of_what_others_cannot_use(online, push, tmp_path):
    write_adapter(tmp_path / "a", {"source": "/home/alice/tiny"})
    code, _, err = push(tmp_path / "a", "me/a")
    assert code == 0
    assert err.splitlines()[:2] == [
        "neuroada: warning: the base model is a local one, called tiny in what is shared; if the hub has it with the same "
        "weights, name it: --base-model USER/NAME",
        "neuroada: warning: no results.json beside the adapter, so that the model card has no scores",
    ]
    push(tmp_path / "a", "me/a", "--base-model", "user/base")
    files = online.repositories["me/a"].files
    assert json.loads(files["adapter.json"])["base"]["source"] == "user/base"
    assert b"base_model: user/base" in files["README.md"]


def test_a_public_repository_is_asked_for(online, run, push):
    assert printed(push(run, "me/tiny", "--public", "--json"))["private"] is False
    assert not online.repositories["me/tiny"].private


def test_an_edited_card_is_sent(online, run, push, tmp_path):
    push(run, "me/tiny", "--dry-run", "--out", "mine")
    (tmp_path / "work" / "mine" / "README.md").write_text("# Mine\n")
    content = printed(push("mine", "me/tiny", "--json"))
    assert content["notes"] == ["README.md in the adapter's directory is uploaded as it is"]
    assert online.repositories["me/tiny"].files["README.md"] == b"# Mine\n"


# Repositories that exist.


def test_a_second_push_is_a_second_commit_without_files_of_the_first(online, run, push, tmp_path):
    printed(push(run, "me/tiny", "--json"))
    write_adapter(tmp_path / "other", {"source": "user/base"})
    content = printed(push(tmp_path / "other", "me/tiny", "--json"))
    assert not content["created"] and len(online.repositories["me/tiny"].commits) == 3
    assert sorted(online.repositories["me/tiny"].files) == [".gitattributes", *NAMES[:3]]


def test_a_public_repository_gets_nothing_unless_it_may_be_public(online, run, push):
    repository = online.add("me/tiny", {"adapter.json": b"{}"})
    assert error(push(run, "me/tiny")) == (
        "me/tiny exists and is public; give --public if the adapter may be public, or another name"
    )
    assert len(repository.commits) == 2
    assert printed(push(run, "me/tiny", "--public", "--json"))["private"] is False


def test_a_private_repository_stays_private(online, run, push):
    online.add("me/tiny", {}, private=True)
    code, _, err = push(run, "me/tiny", "--public")
    assert code == 0 and "/me/tiny (private, commit " in err
    assert "warning: me/tiny was private and stays so; its settings on the hub change that" in err


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_config.json", "data/rows.jsonl"])
def test_a_repository_of_something_else_is_left_alone(online, run, push, name):
    repository = online.add("me/tiny", {name: b"", "README.md": b""}, private=True)
    assert error(push(run, "me/tiny")) == f"me/tiny exists and holds something else ({name}); choose another name"
    assert len(repository.commits) == 2


# Errors.

CALLS = {
    "create": "POST /api/repos/create",
    "info": "GET /api/models/me/tiny",
    "card": "POST /api/validate-yaml",
    "preupload": "POST /api/models/me/tiny/preupload/main",
    "batch": r"POST /me/tiny\.git/info/lfs/objects/batch",
    "object": "PUT /lfs/.*",
    "commit": "POST /api/models/me/tiny/commit/main",
}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 429, 500, 503])
@pytest.mark.parametrize("call", CALLS)
def test_errors_of_the_server(online, run, push, call, status):
    if (call, status) == ("create", 409):  # the repository exists: it is not an error
        return
    online.errors[CALLS[call]] = (status, {}, "because")
    message = error(push(run, "me/tiny"))
    assert message.startswith("me/tiny: nothing was uploaded: ")
    assert message.endswith("; the repository was created and is empty") is (call != "create")
    known = {
        401: "log in with `hf auth login`",
        403: "the hub answered 403 (because); the token may not do this: log in with another by `hf auth login`",
        429: "the hub answered 429 (because); too many requests: try again later",
        500: "the hub answered 500 (because); try again later",
    }
    assert known.get(status, "because" if call != "card" else "") in message
    if call != "create":
        assert len(online.repositories["me/tiny"].commits) == 1


def test_a_server_that_is_not_there(run, push, monkeypatch, tmp_path):
    with fake_hub.connected(monkeypatch, tmp_path / "cache", "http://127.0.0.1:1"):
        message = error(push(run, "me/tiny"))
    assert message.startswith("me/tiny: nothing was uploaded: http://127.0.0.1:1 cannot be reached (")


def test_a_server_that_is_no_hub(online, run, push, monkeypatch):
    monkeypatch.setattr(fake_hub.Handler, "send", lambda self, *_: fake_hub.Handler.html(self), raising=False)
    monkeypatch.setattr(fake_hub.Handler, "html", _html, raising=False)
    assert "answered something that is not JSON; is it a hub?" in error(push(run, "me/tiny"))


def _html(self):
    self.send_response(200)
    self.send_header("Content-Length", "6")
    self.end_headers()
    self.wfile.write(b"<html>")


def test_without_a_token(online, run, push, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert error(push(run, "me/tiny")) == (
        "no token of the hub on this machine: log in with `hf auth login`, or set HF_TOKEN"
    )
    assert online.requests == []


def test_with_a_wrong_token(online, run, push, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert error(push(run, "me/tiny")) == (
        "me/tiny: nothing was uploaded: the hub answered 401 (Invalid credentials); the token is missing or not valid: log "
        "in with `hf auth login`"
    )


def test_offline(run, push, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_fake")
    assert error(push(run, "me/tiny")).startswith("HF_HUB_OFFLINE is set, so that nothing can be uploaded")


@pytest.mark.parametrize(
    "arguments",
    [
        ("RUN", "tiny"),
        ("RUN", "a/b/c"),
        ("RUN", "me/ti ny"),
        ("RUN", "me/ti--ny"),
        ("RUN", "me/tiny.git"),
        ("RUN", ""),
        ("RUN", "./tiny"),
        ("RUN", "me/tiny", "--out", "x"),
        ("RUN", "me/tiny", "--message", " "),
        ("RUN", "me/tiny", "--base-model", "/home/me/base"),
        ("nowhere", "me/tiny"),
        (".", "me/tiny"),
    ],
    ids=repr,
)
def test_what_is_wrong_is_said_before_the_hub_is_asked(online, run, push, tmp_path, arguments):
    error(push(*(run if each == "RUN" else each for each in arguments)))
    assert online.requests == [] and list((tmp_path / "work").iterdir()) == []


def test_a_damaged_adapter_is_not_sent(online, run, push):
    path = run / "adapter" / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert str(path) in error(push(run, "me/tiny"))
    assert online.requests == []


@pytest.mark.parametrize("name", ["results.json", "config.yaml"])
def test_a_damaged_file_of_the_run_is_named(online, run, push, name):
    (run / name).write_text("{")
    assert str(run / name) in error(push(run, "me/tiny"))
    assert online.requests == []
