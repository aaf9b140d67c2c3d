"""A stand-in for the Hugging Face Hub on loopback: the part of its HTTP surface that pushing and pulling a model needs.

It keeps repositories in memory, speaks both ways of uploading (content inside the commit, and LFS) and fails on demand.
Clients reach it by HF_ENDPOINT, with HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repo:
    """A repository: its commits by their hash, with their messages, and branches and tags by name."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: Files, message: str) -> str:
        """Commits `files` to `ref`, and returns the commit's hash."""
        oid = hashlib.sha1(f"{len(self.commits)} {ref} {message}".encode()).hexdigest()
        self.commits[oid], self.messages[oid], self.refs[ref] = dict(files), message, oid
        return oid


@dataclass
class Faults:
    """Faults on demand, by file name; all off at first."""

    #: The connection breaks after so many bytes of a download, so many times.
    break_after: dict[str, int] = field(default_factory=dict)
    breaks: int = 1000
    #: A download ends after so many bytes, as if that were all, though the file's metadata has the true size.
    shorten_to: dict[str, int] = field(default_factory=dict)
    #: The server hangs up after so many bytes of each commit, or of each upload to LFS.
    stop_commit_after: int | None = None
    stop_lfs_after: int | None = None
    #: Paths (regular expressions) that answer with a status, and the text of that answer.
    answer: dict[str, tuple[int, str]] = field(default_factory=dict)
    #: Error texts repeat the Authorization header, as no server should.
    echo_token: bool = False


class HubServer(ThreadingHTTPServer):
    """The server; `url` is the endpoint for clients.

    Attributes:
        tokens: the account of each valid token; it may write to repositories of its name and of "org".
        repos: by id.
        lfs_objects: by SHA-256.
        lfs: whether `*.safetensors` go through LFS.
        faults: see `Faults`.
        requests: method, path and whether it carried a token, of every request.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokens: dict[str, str] = {}
        self.repos: dict[str, Repo] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.lfs = True
        self.faults = Faults()
        self.requests: list[tuple[str, str, bool]] = []
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, repo_id: str, files: Files) -> None:
        """Adds files to a repository, made if it is missing."""
        repo = self.repos.setdefault(repo_id, Repo(private=False))
        repo.commit("main", {**repo.commits.get(repo.refs.get("main", ""), {}), **files}, "add")

    def files(self, repo_id: str, revision: str = "main") -> Files:
        """Returns the files at a revision."""
        repo = self.repos[repo_id]
        return repo.commits[repo.refs.get(revision, revision)]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news."""


@contextmanager
def running() -> Iterator[HubServer]:
    """Yields a server that answers until the end of the block."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def is_private(data: dict[str, Any]) -> bool:
    """Returns whether a request asks for a private repository; older clients send the second form."""
    return data.get("visibility") == "private" or bool(data.get("private"))


class Answer(Exception):
    """Ends a request with a status other than 200."""

    def __init__(self, status: int, text: str, code: str = ""):
        super().__init__(text)
        self.status, self.text, self.code = status, text, code


class Handler(BaseHTTPRequestHandler):
    """Answers one request. As HTTP 1.0: a closed connection ends every answer, and faults are simple."""

    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        """The tests look at `HubServer.requests`."""

    def do_GET(self) -> None:
        self.dispatch()

    do_HEAD = do_POST = do_PUT = do_GET

    def dispatch(self) -> None:
        parts = urlsplit(self.path)
        self.route = unquote(parts.path)
        with self.server.lock:
            self.server.requests.append((self.command, self.route, "Authorization" in self.headers))
        try:
            for pattern, (status, text) in self.server.faults.answer.items():
                if re.search(pattern, self.route):
                    raise Answer(status, text)
            self.account = self.authenticate()
            for method, pattern, name in ROUTES:
                match = re.fullmatch(pattern, parts.path)
                if match and self.command in method:
                    data = getattr(self, name)(*map(unquote, match.groups()))
                    if data is not None:
                        self.send_json(data)
                    return
            raise Answer(404, f"no such route: {self.command} {self.route}")
        except Answer as answer:
            text = answer.text
            if self.server.faults.echo_token:
                text += f" (got {self.headers.get('Authorization')})"
            headers = {"X-Error-Message": text} | ({"X-Error-Code": answer.code} if answer.code else {})
            self.send_json({"error": text}, answer.status, headers)

    # Accounts

    def authenticate(self) -> str | None:
        """Returns the account of the request's token, None without one."""
        header = self.headers.get("Authorization", "")
        if not header:
            return None
        account = self.server.tokens.get(header.removeprefix("Bearer "))
        if account is None:
            raise Answer(401, "Invalid credentials in Authorization header")
        return account

    def repo(self, repo_id: str, *, write: bool = False) -> Repo:
        repo = self.server.repos.get(repo_id)
        if write and self.account is None:
            raise Answer(401, "Invalid username or password.")
        if repo is None or (repo.private and not self.may_write(repo_id)):
            raise Answer(401 if self.account is None else 404, "Repository not found", "RepoNotFound")
        if write and not self.may_write(repo_id):
            raise Answer(403, "Forbidden: you need write access")
        return repo

    def may_write(self, repo_id: str) -> bool:
        return self.account is not None and repo_id.partition("/")[0] in (self.account, "org")

    def at(self, repo_id: str, revision: str, *, write: bool = False) -> tuple[Repo, str]:
        """Returns a repository and the commit's hash of a branch, tag or hash."""
        repo = self.repo(repo_id, write=write)
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, oid

    # Routes

    # A handler returns the JSON of its answer, or None if it has answered itself.

    def whoami(self) -> Any:
        if self.account is None:
            raise Answer(401, "Invalid username or password.")
        return {"type": "user", "name": self.account, "orgs": [{"name": "org"}]}

    def validate_yaml(self) -> Any:
        self.read_json()
        return {"errors": [], "warnings": []}

    def create(self) -> None:
        data = self.read_json()
        if self.account is None:
            raise Answer(401, "Invalid username or password.")
        repo_id = f"{data.get('organization') or self.account}/{data['name']}"
        if not self.may_write(repo_id):
            raise Answer(403, "You don't have the rights to create a model under this namespace")
        with self.server.lock:
            exists = repo_id in self.server.repos
            if not exists:
                self.server.repos[repo_id] = repo = Repo(private=is_private(data))
                repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.send_json({"url": f"{self.server.url}/{repo_id}"}, 409 if exists else 200)

    def branch(self, repo_id: str, name: str) -> Any:
        repo, oid = self.at(repo_id, self.read_json().get("startingPoint") or "main", write=True)
        repo.refs[name] = oid
        return {}

    def tag(self, repo_id: str, revision: str) -> Any:
        name = self.read_json()["tag"]
        repo, oid = self.at(repo_id, revision, write=True)
        repo.refs[name] = oid
        return {}

    def settings(self, repo_id: str) -> Any:
        private = is_private(self.read_json())
        self.repo(repo_id, write=True).private = private
        return {}

    def preupload(self, repo_id: str, revision: str) -> Any:
        data = self.read_json()
        repo, oid = self.at(repo_id, revision, write=True)
        return {"files": [
            {"path": path, "shouldIgnore": False, "uploadMode": self.mode(path),
             "oid": self.oid(path, repo.commits[oid][path]) if path in repo.commits[oid] else None}
            for path in (file["path"] for file in data["files"])]}

    def mode(self, path: str) -> str:
        return "lfs" if self.server.lfs and path.endswith(".safetensors") else "regular"

    def oid(self, path: str, content: bytes) -> str:
        """Returns the hash by which a client recognises an unchanged file."""
        if self.mode(path) == "lfs":
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def lfs_batch(self, repo_id: str) -> Any:
        data = self.read_json()
        self.repo(repo_id, write=True)
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} | (
            {} if wanted["oid"] in self.server.lfs_objects else
            {"actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}})
            for wanted in data["objects"]]
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str) -> Any:
        content = self.read_body(self.server.faults.stop_lfs_after)
        if content is None:
            return None
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.lfs_objects[oid] = content
        return {}

    def commit(self, repo_id: str, revision: str) -> Any:
        body = self.read_body(self.server.faults.stop_commit_after)
        if body is None:
            return None
        header, *changes = map(json.loads, body.splitlines())
        with self.server.lock:
            repo, oid = self.at(repo_id, revision, write=True)
            files = dict(repo.commits[oid])
            for change in changes:
                value = change["value"]
                if change["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif change["key"] == "lfsFile":
                    files[value["path"]] = self.server.lfs_objects[value["oid"]]
                else:
                    assert change["key"] == "deletedFile"
                    del files[value["path"]]
            oid = repo.commit(revision, files, header["value"]["summary"])
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}"}

    def info(self, repo_id: str, revision: str = "main") -> Any:
        repo, oid = self.at(repo_id, revision)
        return {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": oid, "private": repo.private,
                "siblings": [{"rfilename": path} for path in repo.commits[oid]], "tags": []}

    def tree(self, repo_id: str, revision: str) -> Any:
        repo, oid = self.at(repo_id, revision)
        return [self.entry(path, content) for path, content in repo.commits[oid].items()]

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": self.oid(path, content)}
        if self.mode(path) == "lfs":
            entry["lfs"] = {"oid": self.oid(path, content), "size": len(content), "pointerSize": 100}
        return entry

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo, oid = self.at(repo_id, revision)
        content = repo.commits[oid].get(path)
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if content is None:
            raise Answer(404, "Entry not found", "EntryNotFound")
        headers["ETag"] = f'"{self.oid(path, content)}"'
        if self.mode(path) == "lfs":
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": headers["ETag"]}
        faults, start, status = self.server.faults, 0, 200
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and self.command == "GET":
            start, status = int(asked[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        sent = content[start:]
        if self.command == "GET" and path in faults.shorten_to:
            sent = sent[:faults.shorten_to[path]]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(sent))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            if path in faults.break_after and faults.breaks:
                faults.breaks -= 1
                sent = sent[:faults.break_after[path]]
            self.wfile.write(sent)

    # Bodies

    def read_body(self, stop_after: int | None = None) -> bytes | None:
        """Returns the request's body; None where the server hung up inside it."""
        length = int(self.headers.get("Content-Length", 0))
        if stop_after is not None:
            self.rfile.read(min(stop_after, length))
            self.close_connection = True
            return None
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def read_json(self) -> dict[str, Any]:
        return json.loads(self.read_body() or b"{}")

    def send_json(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Type": "application/json",
                            "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


_ID = r"([^/]+/[^/]+)"
ROUTES: list[tuple[tuple[str, ...], str, str]] = [
    (("GET",), "/api/whoami-v2", "whoami"),
    (("POST",), "/api/validate-yaml", "validate_yaml"),
    (("POST",), "/api/repos/create", "create"),
    (("POST",), f"/api/models/{_ID}/branch/([^/]+)", "branch"),
    (("POST",), f"/api/models/{_ID}/tag/([^/]+)", "tag"),
    (("PUT",), f"/api/models/{_ID}/settings", "settings"),
    (("POST",), f"/api/models/{_ID}/preupload/([^/]+)", "preupload"),
    (("POST",), f"/api/models/{_ID}/commit/([^/]+)", "commit"),
    (("POST",), rf"/{_ID}\.git/info/lfs/objects/batch", "lfs_batch"),
    (("PUT",), "/lfs/([0-9a-f]{64})", "lfs_put"),
    (("GET",), f"/api/models/{_ID}", "info"),
    (("GET",), f"/api/models/{_ID}/revision/([^/]+)", "info"),
    (("GET",), f"/api/models/{_ID}/tree/([^/]+)", "tree"),
    (("GET", "HEAD"), f"/{_ID}/resolve/([^/]+)/(.+)", "resolve"),
]
