"""A stand-in for the Hugging Face Hub on loopback: what pushing and pulling a model needs of it, and faults on demand.

Clients reach it by HF_ENDPOINT, with HF_HUB_DISABLE_XET=1. Weights go through LFS, other files inside the commit.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repo:
    """A repository: its commits by their hash, their messages, and branches and tags by name."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: Files, message: str) -> str:
        """Commits `files` to `ref`, and returns the commit's hash."""
        oid = hashlib.sha1(f"{len(self.commits)} {ref} {message}".encode()).hexdigest()
        self.commits[oid], self.refs[ref] = dict(files), oid
        self.messages.append(message)
        return oid


@dataclass
class Faults:
    """Faults on demand; all off at first."""

    #: By file name: a download ends after so many bytes, as if that were all.
    shorten_to: dict[str, int] = field(default_factory=dict)
    #: The server hangs up inside the body of a request to a path that matches this regular expression.
    hang_up: str = "(?!)"
    #: Paths (regular expressions) that answer with a status and a text.
    answer: dict[str, tuple[int, str]] = field(default_factory=dict)
    #: Error texts repeat the Authorization header, as no server should.
    echo_token: bool = False


class HubServer(ThreadingHTTPServer):
    """The server; `url` is the endpoint for clients.

    Attributes:
        tokens: the account of each valid token; it may write to repositories of its name and of "org".
        repos: by id.
        requests: method and path of every request, and whether it carried a token.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.tokens: dict[str, str] = {}
        self.repos: dict[str, Repo] = {}
        self.lfs_objects: Files = {}
        self.faults = Faults()
        self.requests: list[tuple[str, str, bool]] = []

    def add(self, repo_id: str, files: Files) -> None:
        """Adds files to a repository, made if it is missing."""
        repo = self.repos.setdefault(repo_id, Repo())
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
    with HubServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


class Refusal(Exception):
    """Ends a request with a status other than 200."""

    def __init__(self, status: int, text: str, code: str = ""):
        super().__init__(text)
        self.status, self.text, self.code = status, text, code


ROUTES: list[tuple[str, str, Callable[..., Any]]] = []


def route(methods: str, path: str) -> Callable:
    """Makes a method of `Handler` answer requests; it returns the JSON of its answer, or None if it has answered."""
    def register(method: Callable[..., Any]) -> Callable[..., Any]:
        ROUTES.append((methods, path.replace("ID", "([^/]+/[^/]+)").replace("NAME", "([^/]+)"), method))
        return method
    return register


class Handler(BaseHTTPRequestHandler):
    """Answers one request. As HTTP 1.0: a closed connection ends every answer, and faults are simple."""

    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        """The tests look at `HubServer.requests`."""

    def do_GET(self) -> None:
        path, faults = urlsplit(self.path).path, self.server.faults
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.server.requests.append((self.command, unquote(path), bool(token)))
        try:
            for pattern, (status, text) in faults.answer.items():
                if re.search(pattern, path):
                    raise Refusal(status, text)
            if token and token not in self.server.tokens:
                raise Refusal(401, "Invalid credentials in Authorization header")
            self.account = self.server.tokens.get(token)
            self.body = self.read_body(hang_up=re.search(faults.hang_up, path) is not None)
            if self.body is None:
                return
            for methods, pattern, answer in ROUTES:
                if self.command in methods and (match := re.fullmatch(pattern, path)):
                    data = answer(self, *map(unquote, match.groups()))
                    return None if data is None else self.send_json(data)
            raise Refusal(404, f"no such route: {self.command} {path}")
        except Refusal as refusal:
            text = refusal.text + (f" (got {self.headers.get('Authorization')})" if faults.echo_token else "")
            self.send_json({"error": text}, refusal.status, {"X-Error-Message": text, "X-Error-Code": refusal.code})

    do_HEAD = do_POST = do_PUT = do_GET

    def read_body(self, hang_up: bool) -> bytes | None:
        """Returns the request's body; None if the server hung up inside it."""
        length = int(self.headers.get("Content-Length", 0))
        if hang_up:
            self.rfile.read(length // 2)
            return None
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send_json(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(data).encode(), status, {**(headers or {}), "Content-Type": "application/json"})

    def send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Accounts

    def may_write(self, repo_id: str) -> bool:
        return self.account is not None and repo_id.partition("/")[0] in (self.account, "org")

    def repo(self, repo_id: str, *, write: bool = False) -> Repo:
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and not self.may_write(repo_id)):
            raise Refusal(401 if self.account is None else 404, "Repository not found", "RepoNotFound")
        if write and not self.may_write(repo_id):
            raise Refusal(403, "Forbidden: you need write access")
        return repo

    def at(self, repo_id: str, revision: str, *, write: bool = False) -> tuple[Repo, str]:
        """Returns a repository and the commit's hash of a branch, tag or hash."""
        repo = self.repo(repo_id, write=write)
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, oid

    # Routes

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Any:
        if self.account is None:
            raise Refusal(401, "Invalid username or password.")
        return {"type": "user", "name": self.account, "orgs": [{"name": "org"}]}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Any:
        return {"errors": [], "warnings": []}

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        data = json.loads(self.body)
        repo_id = f"{data.get('organization') or self.account}/{data['name']}"
        if self.account is None:
            raise Refusal(401, "Invalid username or password.")
        if not self.may_write(repo_id):
            raise Refusal(403, "Forbidden: the namespace needs write access")
        exists = repo_id in self.server.repos
        if not exists:
            # Older clients send the second form.
            private = data.get("visibility") == "private" or bool(data.get("private"))
            self.server.repos[repo_id] = repo = Repo(private)
            repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.send_json({"url": f"{self.server.url}/{repo_id}"}, 409 if exists else 200)

    @route("POST", "/api/models/ID/branch/NAME")
    def branch(self, repo_id: str, name: str) -> Any:
        repo, oid = self.at(repo_id, json.loads(self.body).get("startingPoint") or "main", write=True)
        repo.refs[name] = oid
        return {}

    @route("POST", "/api/models/ID/preupload/NAME")
    def preupload(self, repo_id: str, revision: str) -> Any:
        repo, oid = self.at(repo_id, revision, write=True)
        paths, known = [file["path"] for file in json.loads(self.body)["files"]], repo.commits[oid]
        return {"files": [{"path": path, "shouldIgnore": False, "uploadMode": "lfs" if is_lfs(path) else "regular",
                           "oid": content_id(path, known[path]) if path in known else None} for path in paths]}

    @route("POST", r"/ID\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo_id: str) -> Any:
        self.repo(repo_id, write=True)
        return {"transfer": "basic", "objects": [
            {"oid": wanted["oid"], "size": wanted["size"]} | (
                {} if wanted["oid"] in self.server.lfs_objects else
                {"actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}})
            for wanted in json.loads(self.body)["objects"]]}

    @route("PUT", "/lfs/([0-9a-f]{64})")
    def lfs_put(self, oid: str) -> Any:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.lfs_objects[oid] = self.body
        return {}

    @route("POST", "/api/models/ID/commit/NAME")
    def commit(self, repo_id: str, revision: str) -> Any:
        header, *changes = map(json.loads, self.body.splitlines())
        repo, oid = self.at(repo_id, revision, write=True)
        files = dict(repo.commits[oid])
        for change in changes:
            value = change["value"]
            if change["key"] == "deletedFile":
                del files[value["path"]]
            else:
                files[value["path"]] = (self.server.lfs_objects[value["oid"]] if change["key"] == "lfsFile"
                                        else base64.b64decode(value["content"]))
        oid = repo.commit(revision, files, header["value"]["summary"])
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}"}

    @route("GET", "/api/models/ID")
    @route("GET", "/api/models/ID/revision/NAME")
    def info(self, repo_id: str, revision: str = "main") -> Any:
        repo, oid = self.at(repo_id, revision)
        return {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": oid, "private": repo.private,
                "siblings": [{"rfilename": path} for path in repo.commits[oid]], "tags": []}

    @route("GET", "/api/models/ID/tree/NAME")
    def tree(self, repo_id: str, revision: str) -> Any:
        repo, oid = self.at(repo_id, revision)
        return [{"type": "file", "path": path, "size": len(content), "oid": content_id(path, content)}
                for path, content in repo.commits[oid].items()]

    @route("GET HEAD", "/ID/resolve/NAME/(.+)")
    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo, oid = self.at(repo_id, revision)
        content = repo.commits[oid].get(path)
        if content is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": oid, "ETag": f'"{content_id(path, content)}"'}
        if is_lfs(path):
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": headers["ETag"]}
        if self.command == "HEAD":
            return self.send(content, 200, headers)
        self.send(content[:self.server.faults.shorten_to.get(path)], 200, headers)


def is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


def content_id(path: str, content: bytes) -> str:
    """Returns the hash by which a client recognises an unchanged file: of LFS, or of a git blob."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
