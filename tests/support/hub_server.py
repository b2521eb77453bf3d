"""A Hub on the loopback interface, for tests that push and load for real.

It keeps repositories in memory and answers the requests that huggingface_hub makes when models, pipelines and data
sets are pushed and loaded: create, info, tree, preupload, LFS upload, commit, resolve. Weights go through LFS. The one
token belongs to the user ``tester``, who reads everything and writes to ``tester/...``. Clients need
``HubServer.environment`` set before huggingface_hub is imported, so they run in their own process.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from urllib.request import Request, urlopen

Files = dict[str, bytes]


@dataclass
class Repository:
    """``commits`` maps a sha to all files of that commit; ``refs`` maps branches and pull requests to a sha."""

    commits: dict[str, Files] = field(default_factory=lambda: {_sha1(b""): {}})
    refs: dict[str, str] = field(default_factory=lambda: {"main": _sha1(b"")})
    private: bool = False

    def files(self, revision: str = "main") -> Files:
        return self.commits[self.refs[revision]]

    def resolve(self, revision: str) -> str | None:
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None

    def commit(self, ref: str, parent: str, files: Files) -> str:
        sha = _sha1(f"{parent} {len(self.commits)}".encode())
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha


class HubServer:
    """``with HubServer() as hub``: serves on a free port until the block ends.

    Attributes:
        repositories: by id, such as ``"tester/model"``; a data set has the id ``"datasets/tester/name"``.
        url: address of the server.
        requests: method and path of each request, in order.
        drops: pattern of "METHOD path" -> how many more such requests lose their connection instead of an answer.
        corrupted: paths of files that arrive with another content than was stored.
    """

    token = "hf_test"
    user = "tester"

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.drops: dict[str, float] = {}
        self.corrupted: set[str] = set()
        self.lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._http.shutdown()
        self._http.server_close()

    def environment(self, home: str, token: str | None = None) -> dict[str, str]:
        """Environment variables of a client whose cache and token live in ``home``."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": home,
            "HF_TOKEN": self.token if token is None else token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


def set_faults(url: str, *, drops: Mapping[str, int] | None = None, corrupted: Sequence[str] = ()) -> None:
    """From a client: replace ``HubServer.drops`` and ``HubServer.corrupted`` of the server at ``url``."""
    body = json.dumps([drops or {}, list(corrupted)]).encode()
    with urlopen(Request(f"{url}/control", data=body, method="POST")) as answer:
        answer.read()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"  # keep-alive: every answer carries its exact length

    def log_message(self, format: str, *args) -> None:
        """Silence the log to stderr."""

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def _route(self) -> None:
        # The body is read first: what stays unread would be taken for the next request of the connection.
        body = self._read_body()
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        # A data set is a repository whose id starts with `datasets/`, as in the addresses of its files.
        path = url.path.replace("/api/datasets/", "/api/models/datasets/", 1)
        with self.hub.lock:
            if url.path == "/control":  # a test asks for faults
                self.hub.drops, self.hub.corrupted = (
                    kind(value) for kind, value in zip((dict, set), json.loads(body))
                )
                return self._json({})
            request = f"{self.command} {path}"
            self.hub.requests.append(request)
            for pattern, left in self.hub.drops.items():
                if left > 0 and re.search(pattern, request):
                    self.hub.drops[pattern] = left - 1
                    self.close_connection = True
                    return self.connection.shutdown(socket.SHUT_RDWR)
            if url.path.startswith("/lfs/"):  # the address in the batch answer is the permission
                return self._put_lfs_object(url.path.removeprefix("/lfs/"), body)
            if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
                return self._json({"error": "Invalid credentials"}, status=401)
            for method, pattern, handle in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    return handle(self, body, *(unquote(group or "") for group in match.groups()))
            return self._json({"error": f"No route for {self.command} {url.path}"}, status=501)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, content: bytes, *, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value, *, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(value).encode(), status=status, Content_Type="application/json", **headers)

    def _missing(self, what: str, **headers: str) -> None:
        self._json({"error": f"{what} not found"}, status=404, X_Error_Code=f"{what}NotFound", **headers)

    def _find(self, repo_id: str, revision: str) -> tuple[Repository, str] | None:
        repository = self.hub.repositories.get(repo_id)
        if repository is None:
            return self._missing("Repo")
        sha = repository.resolve(revision or "main")
        if sha is None:
            return self._missing("Revision")
        return repository, sha

    def _create(self, body: bytes) -> None:
        request = json.loads(body)
        name = f"{request.get('organization') or self.hub.user}/{request['name']}"
        repo_id = f"datasets/{name}" if request.get("type") == "dataset" else name
        if not self._may_write(repo_id):
            return None
        exists = repo_id in self.hub.repositories
        private = request.get("visibility") == "private" or request.get("private") is True
        self.hub.repositories.setdefault(repo_id, Repository(private=private))
        return self._json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id}, status=409 if exists else 200)

    def _may_write(self, repo_id: str) -> bool:
        allowed = repo_id.removeprefix("datasets/").startswith(f"{self.hub.user}/")
        if not allowed:
            self._json({"error": f"You don't have the rights to write to {repo_id}"}, status=403)
        return allowed

    def _auth_check(self, body: bytes, repo_id: str, write: str) -> None:
        if self._find(repo_id, "main") and (not write or self._may_write(repo_id)):
            self._json({})

    def _create_branch(self, body: bytes, repo_id: str, branch: str) -> None:
        if (found := self._find(repo_id, "main")) and self._may_write(repo_id):
            exists = branch in found[0].refs
            found[0].refs.setdefault(branch, found[1])
            self._json({"error": "Reference already exists"} if exists else {}, status=409 if exists else 200)

    def _refs(self, body: bytes, repo_id: str) -> None:
        if found := self._find(repo_id, "main"):
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
                for name, sha in found[0].refs.items()
                if not name.startswith("refs/")
            ]
            self._json({"branches": branches, "tags": [], "converts": []})

    def _info(self, body: bytes, repo_id: str, revision: str) -> None:
        if found := self._find(repo_id, revision):
            files = found[0].commits[found[1]]
            siblings = [{"rfilename": path} for path in files]
            if self.query.get("blobs"):
                siblings = [{"rfilename": path, **_entry(path, content)} for path, content in files.items()]
            private, name = found[0].private, repo_id.removeprefix("datasets/")
            self._json({"id": name, "sha": found[1], "siblings": siblings, "tags": [], "private": private})

    def _tree(self, body: bytes, repo_id: str, revision: str, folder: str) -> None:
        if found := self._find(repo_id, revision):
            files = found[0].commits[found[1]]
            inside = {path: content for path, content in files.items() if path.startswith(folder and folder + "/")}
            if folder and not inside:
                return self._missing("Entry")
            entries = [_entry(path, content) for path, content in inside.items()]
            if self.query.get("recursive", ["False"])[0].lower() != "true":
                depth = folder.count("/") + 1 if folder else 0
                folders = {"/".join(path.split("/")[: depth + 1]) for path in inside if path.count("/") > depth}
                entries = [entry for entry in entries if entry["path"].count("/") == depth]
                entries += [{"type": "directory", "path": path, "size": 0, "oid": _sha1(b"")} for path in folders]
            self._json(entries)

    def _paths_info(self, body: bytes, repo_id: str, revision: str) -> None:
        if found := self._find(repo_id, revision):
            asked = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
            files = found[0].commits[found[1]]
            self._json([_entry(path, files[path]) for path in asked if path in files])

    def _preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        if found := self._find(repo_id, revision):
            files = found[0].commits[found[1]]
            answer = [
                {
                    "path": path,
                    "uploadMode": "lfs" if _is_lfs(path) else "regular",
                    "shouldIgnore": False,
                    "oid": _content_oid(path, files[path]) if path in files else None,  # equal ones are not sent
                }
                for path in (file["path"] for file in json.loads(body)["files"])
            ]
            self._json({"files": answer})

    def _lfs_batch(self, body: bytes, repo_id: str) -> None:
        objects = [{"oid": item["oid"], "size": item["size"]} for item in json.loads(body)["objects"]]
        for item in objects:
            if item["oid"] not in self.hub.lfs_objects:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def _put_lfs_object(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._json({"error": "The content does not match its sha256"}, status=422)
        self.hub.lfs_objects[oid] = body
        self._send(b"")

    def _commit(self, body: bytes, repo_id: str, revision: str) -> None:
        found = self._find(repo_id, revision)
        if not found or not self._may_write(repo_id):
            return
        repository, parent = found
        files = dict(repository.commits[parent])
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs_objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            elif operation["key"] == "deletedFolder":
                files = {path: content for path, content in files.items() if not path.startswith(value["path"])}
        pull_request = self.query.get("create_pr") == ["1"]
        number = sum(ref.startswith("refs/pr/") for ref in repository.refs) + 1
        sha = repository.commit(f"refs/pr/{number}" if pull_request else revision, parent, files)
        url = f"{self.hub.url}/{repo_id}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}"}
        self._json(answer | ({"pullRequestUrl": f"{url}/discussions/{number}"} if pull_request else {}))

    def _resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        found = self._find(repo_id, revision)
        if not found:
            return
        files = found[0].commits[found[1]]
        if path not in files:
            return self._missing("Entry", X_Repo_Commit=found[1])  # the client caches that the file is absent
        content = files[path]
        entry = _entry(path, content)
        headers = {"ETag": f'"{entry["oid"]}"', "X_Repo_Commit": found[1]}
        if "lfs" in entry:
            headers |= {"X_Linked_Etag": f'"{entry["lfs"]["oid"]}"', "X_Linked_Size": str(len(content))}
        if path in self.hub.corrupted:
            content = bytes([content[0] ^ 1]) + content[1:]
        self._send(content, **headers)

    def _validate_card(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def _whoami(self, body: bytes) -> None:
        self._json({"type": "user", "name": "tester", "orgs": [], "auth": {"type": "access_token"}})


_ID = r"((?:datasets/)?[^/]+/[^/]+)"
_ROUTES = [
    ("POST", r"/api/repos/create", _Handler._create),
    ("POST", r"/api/validate-yaml", _Handler._validate_card),
    ("GET", r"/api/whoami-v2", _Handler._whoami),
    ("GET", rf"/api/models/{_ID}(?:/revision/([^/]+))?", _Handler._info),
    ("GET", rf"/api/models/{_ID}/auth-check(/write)?", _Handler._auth_check),
    ("GET", rf"/api/models/{_ID}/refs", _Handler._refs),
    ("POST", rf"/api/models/{_ID}/branch/([^/]+)", _Handler._create_branch),
    ("POST", rf"/api/models/{_ID}/paths-info/([^/]+)", _Handler._paths_info),
    ("GET", rf"/api/models/{_ID}/tree/([^/]+)(?:/(.+))?", _Handler._tree),
    ("POST", rf"/api/models/{_ID}/preupload/([^/]+)", _Handler._preupload),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    ("POST", rf"/api/models/{_ID}/commit/([^/]+)", _Handler._commit),
    ("GET HEAD", rf"/{_ID}/resolve/([^/]+)/(.+)", _Handler._resolve),
]


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _blob_oid(content: bytes) -> str:
    return _sha1(b"blob %d\0" % len(content) + content)


def _content_oid(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if _is_lfs(path) else _blob_oid(content)


def _is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".pth", ".pt", ".bin"))


def _entry(path: str, content: bytes) -> dict:
    """A file as the tree lists it; the oid of an LFS file is that of its pointer."""
    if not _is_lfs(path):
        return {"type": "file", "path": path, "size": len(content), "oid": _blob_oid(content)}
    sha256 = _content_oid(path, content)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
    lfs = {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": len(pointer)}
    return {"type": "file", "path": path, "size": len(content), "oid": _blob_oid(pointer), "lfs": lfs}
