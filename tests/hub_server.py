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
from typing import Any

from werkzeug.routing import Map, Rule
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

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


class Handler(WSGIRequestHandler):
    """Speaks HTTP 1.0: a closed connection ends every answer, and faults are simple."""

    protocol_version = "HTTP/1.0"

    def log(self, *arguments: Any) -> None:
        """The tests look at `HubServer.requests`."""


class Refusal(Exception):
    """Ends a request with a status other than 200."""

    def __init__(self, status: int, text: str, code: str = ""):
        super().__init__(text)
        self.status, self.text, self.code = status, text, code


class HubServer:
    """The server; `url` is the endpoint for clients.

    Attributes:
        tokens: the account of each valid token; it may write to repositories of its name and of "org".
        repos: by id.
        requests: method and path of every request, and whether it carried a token.
    """

    def __init__(self) -> None:
        self.http = make_server("127.0.0.1", 0, self.answer, threaded=True, request_handler=Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
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

    @Request.application
    def answer(self, request: Request) -> Response:
        """Answers a request by its route, unless a fault is on."""
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        self.requests.append((request.method, request.path, bool(token)))
        try:
            for pattern, (status, text) in self.faults.answer.items():
                if re.search(pattern, request.path):
                    raise Refusal(status, text)
            if token and token not in self.tokens:
                raise Refusal(401, "Invalid credentials in Authorization header")
            if re.search(self.faults.hang_up, request.path):
                request.stream.read((request.content_length or 0) // 2)
                raise ConnectionResetError
            function, arguments = ROUTES.bind_to_environ(request.environ).match()
            data = function(Call(self, request, self.tokens.get(token)), **arguments)
            return data if isinstance(data, Response) else Response(json.dumps(data), mimetype="application/json")
        except Refusal as refusal:
            text = refusal.text + (f" (got {request.headers.get('Authorization')})" if self.faults.echo_token else "")
            return Response(json.dumps({"error": text}), refusal.status, {
                "X-Error-Message": text, "X-Error-Code": refusal.code}, mimetype="application/json")


@contextmanager
def running() -> Iterator[HubServer]:
    """Yields a server that answers until the end of the block."""
    server = HubServer()
    threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.http.shutdown()
    server.http.server_close()


ROUTES = Map()


def route(method: str, path: str) -> Callable:
    """Makes a method of `Call` answer requests; it returns the JSON of its answer, or a whole one."""
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        ROUTES.add(Rule(path.replace("ID", "<path:repo_id>"), methods=[method], endpoint=function))
        return function
    return register


@dataclass
class Call:
    """A request and the account that makes it."""

    server: HubServer
    request: Request
    account: str | None

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

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Any:
        if self.account is None:
            raise Refusal(401, "Invalid username or password.")
        return {"type": "user", "name": self.account, "orgs": [{"name": "org"}]}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Any:
        return {"errors": [], "warnings": []}

    @route("POST", "/api/repos/create")
    def create(self) -> Response:
        data = self.request.get_json(force=True)
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
        return Response(json.dumps({"url": f"{self.server.url}/{repo_id}"}), 409 if exists else 200)

    @route("POST", "/api/models/ID/branch/<name>")
    def branch(self, repo_id: str, name: str) -> Any:
        repo, oid = self.at(repo_id, self.request.get_json(force=True).get("startingPoint") or "main", write=True)
        repo.refs[name] = oid
        return {}

    @route("POST", "/api/models/ID/preupload/<revision>")
    def preupload(self, repo_id: str, revision: str) -> Any:
        repo, oid = self.at(repo_id, revision, write=True)
        paths, known = [file["path"] for file in self.request.get_json(force=True)["files"]], repo.commits[oid]
        return {"files": [{"path": path, "shouldIgnore": False, "uploadMode": "lfs" if is_lfs(path) else "regular",
                           "oid": content_id(path, known[path]) if path in known else None} for path in paths]}

    @route("POST", "/ID.git/info/lfs/objects/batch")
    def lfs_batch(self, repo_id: str) -> Any:
        self.repo(repo_id, write=True)
        return {"transfer": "basic", "objects": [
            {"oid": wanted["oid"], "size": wanted["size"]} | (
                {} if wanted["oid"] in self.server.lfs_objects else
                {"actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}})
            for wanted in self.request.get_json(force=True)["objects"]]}

    @route("PUT", "/lfs/<oid>")
    def lfs_put(self, oid: str) -> Any:
        self.server.lfs_objects[oid] = self.request.get_data()
        assert hashlib.sha256(self.server.lfs_objects[oid]).hexdigest() == oid
        return {}

    @route("POST", "/api/models/ID/commit/<revision>")
    def commit(self, repo_id: str, revision: str) -> Any:
        header, *changes = map(json.loads, self.request.get_data().splitlines())
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
    @route("GET", "/api/models/ID/revision/<revision>")
    def info(self, repo_id: str, revision: str = "main") -> Any:
        repo, oid = self.at(repo_id, revision)
        return {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": oid, "private": repo.private,
                "siblings": [{"rfilename": path} for path in repo.commits[oid]], "tags": []}

    @route("GET", "/api/models/ID/tree/<revision>")
    def tree(self, repo_id: str, revision: str) -> Any:
        repo, oid = self.at(repo_id, revision)
        return [{"type": "file", "path": path, "size": len(content), "oid": content_id(path, content)}
                for path, content in repo.commits[oid].items()]

    @route("GET", "/ID/resolve/<revision>/<path:path>")
    def resolve(self, repo_id: str, revision: str, path: str) -> Response:
        repo, oid = self.at(repo_id, revision)
        content = repo.commits[oid].get(path)
        if content is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": oid, "ETag": f'"{content_id(path, content)}"'}
        if is_lfs(path):
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": headers["ETag"]}
        end = self.server.faults.shorten_to.get(path) if self.request.method == "GET" else None
        return Response(content[:end], headers=headers)


def is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


def content_id(path: str, content: bytes) -> str:
    """Returns the hash by which a client recognises an unchanged file: of LFS, or of a git blob."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
