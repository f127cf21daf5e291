"""A hub of its own on 127.0.0.1: the calls of the Hugging Face hub's HTTP API that a push and a download make.

What clients send is kept as the hub keeps it: repositories with commits, LFS objects by their sha256. Any answer can be
replaced by an error, for tests of what is said about it.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Repository:
    """A repository: its visibility and commits, each a dict of path -> bytes."""

    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b"*.safetensors lfs\n"}])
    messages: list[str] = field(default_factory=lambda: ["initial commit"])
    gated: bool = False

    def oid(self, number: int = -1) -> str:
        names = [
            sorted((path, sha256(content)) for path, content in self.commits[number].items()),
            number % len(self.commits),
        ]
        return hashlib.sha1(json.dumps(names).encode()).hexdigest()

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files) of "main", a tag such as "v1" (the second commit) or a commit's id."""
        if revision == "main":
            return self.oid(), self.files
        for number, files in enumerate(self.commits):
            if revision in (self.oid(number), f"v{number}"):
                return self.oid(number), files
        return None


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class FakeHub:
    """The state of the server, and what was asked of it.

    Attributes:
      url: the endpoint.
      repositories: by id.
      objects: LFS objects by sha256, of uploads whose digest was checked.
      requests: "METHOD path" of every request.
      errors: regular expression of "METHOD path" -> (status, headers, message) in place of the answer.
      token: the token that may write and see private repositories.
    """

    def __init__(self) -> None:
        self.url, self.token = "", "hf_fake"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.errors: dict[str, tuple[int, dict[str, str], str]] = {}

    def add(self, name: str, files: dict[str, bytes], *, private: bool = False, gated: bool = False) -> Repository:
        made = self.repositories[name] = Repository(private, gated=gated)
        made.commits.append(files)
        made.messages.append("files")
        return made


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        self.body = self.received()
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        asked = f"{self.command} {path}"
        self.hub.requests.append(asked)
        for pattern, (status, headers, message) in self.hub.errors.items():
            if re.fullmatch(pattern, asked):
                return self.send(status, {"error": message}, {"X-Error-Message": message, **headers})
        for pattern, method in ROUTES.items():
            found = re.fullmatch(pattern, asked)
            if found:
                return method(self, *found.groups())
        self.send(404, {"error": f"the fake hub has no answer to {asked}"})

    def received(self) -> bytes:
        """The body of the request; objects come in chunks, of which each has its length before it."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while length := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def repository(self, name: str) -> Repository | None:
        """The repository, or None after the answer that there is none (for this token)."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self.allowed):
            self.send(401 if not self.allowed else 404, {"error": "Not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    def revision(self, name: str, revision: str) -> tuple[Repository, str, dict[str, bytes]] | None:
        found = self.repository(name)
        if found is None:
            return None
        at = found.at(revision)
        if at is None:
            self.send(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return (found, *at)

    # Writing

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self.allowed:
            return self.send(401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"})
        if name in self.hub.repositories:
            return self.send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        self.hub.repositories[name] = Repository(asked.get("visibility") == "private")
        self.send(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": "1"})

    def validate_yaml(self) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        if self.revision(name, revision):
            asked = json.loads(self.body)["files"]
            modes = {True: "lfs", False: "regular"}
            answer = [
                {"path": each["path"], "uploadMode": modes[each["path"].endswith((".safetensors", ".png"))]}
                for each in asked
            ]
            self.send(200, {"files": [each | {"shouldIgnore": False, "oid": None} for each in answer]})

    def lfs_batch(self, name: str) -> None:
        if self.repository(name):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
                for each in json.loads(self.body)["objects"]
            ]
            self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        assert sha256(self.body) == oid, "an uploaded object has another digest than announced"
        self.hub.objects[oid] = self.body
        self.send(200)

    def commit(self, name: str, revision: str) -> None:
        found = self.revision(name, revision)
        if not found:
            return
        files, message = dict(found[2]), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = self.hub.objects[value["oid"]]
                assert len(content) == value["size"]
                files[value["path"]] = content
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        found[0].commits.append(files)
        found[0].messages.append(message)
        oid = found[0].oid()
        self.send(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    # Reading

    def info(self, name: str, revision: str | None = None) -> None:
        found = self.revision(name, revision or "main")
        if found:
            repository, oid, files = found
            siblings = [{"rfilename": path} for path in files]
            about = {"id": name, "sha": oid, "private": repository.private, "gated": repository.gated, "tags": []}
            self.send(200, about | {"downloads": 0, "likes": 0, "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        found = self.revision(name, revision)
        if found:
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in found[2].items()
            ]
            self.send(200, entries)

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self.revision(name, revision)
        if not found:
            return
        repository, oid, files = found
        if repository.gated and not self.allowed:
            return self.send(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        if path not in files:
            return self.send(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
        self.send(200, files[path], {"X-Repo-Commit": oid, "ETag": f'"{hashlib.sha1(files[path]).hexdigest()}"'})


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    "POST /api/repos/create": Handler.create,
    "POST /api/validate-yaml": Handler.validate_yaml,
    rf"POST /api/models/{_NAME}/preupload/(\w+)": Handler.preupload,
    rf"POST /{_NAME}\.git/info/lfs/objects/batch": Handler.lfs_batch,
    r"PUT /lfs/(\w+)": Handler.lfs_upload,
    rf"POST /api/models/{_NAME}/commit/(\w+)": Handler.commit,
    rf"GET /api/models/{_NAME}": Handler.info,
    rf"GET /api/models/{_NAME}/revision/([\w.-]+)": Handler.info,
    rf"GET /api/models/{_NAME}/tree/(\w+)": Handler.tree,
    rf"(?:GET|HEAD) /{_NAME}/resolve/(\w+)/(.+)": Handler.resolve,
}


@contextlib.contextmanager
def serving():
    """A running `FakeHub`."""
    hub = FakeHub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def connected(monkeypatch, cache, url: str | None = None):
    """A `FakeHub` that the hub's client of this process talks to, without waiting before it tries again.

    Args:
      monkeypatch: pytest's.
      cache: directory of the client's cache.
      url: an endpoint where nothing listens, in place of the fake.
    """
    import huggingface_hub
    from huggingface_hub import constants, utils
    from huggingface_hub.utils import _http

    with serving() as hub:
        endpoint = url or hub.url
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(_http.time, "sleep", lambda _: None)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        huggingface_hub.close_session()
        utils.disable_progress_bars()
        try:
            yield hub
        finally:
            utils.enable_progress_bars()
            huggingface_hub.close_session()
