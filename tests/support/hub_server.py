"""A Hub on the loopback interface, for tests that push and load for real.

It keeps model repositories in memory and answers the requests that huggingface_hub makes when models and pipelines
are pushed and loaded: create, info, tree, preupload, LFS upload, commit, resolve. ``*.safetensors`` go through LFS.
Clients need ``HubServer.environment`` set before huggingface_hub is imported, so they run in their own process.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repository:
    """``commits`` maps a sha to all files of that commit; ``refs`` maps branches and pull requests to a sha."""

    commits: dict[str, Files] = field(default_factory=lambda: {_sha1(b""): {}})
    refs: dict[str, str] = field(default_factory=lambda: {"main": _sha1(b"")})

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
        repositories: by id, such as ``"tester/model"``.
        url: address of the server.
    """

    token = "hf_test"

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
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
        with self.hub.lock:
            if url.path.startswith("/lfs/"):  # the address in the batch answer is the permission
                return self._put_lfs_object(url.path.removeprefix("/lfs/"), body)
            if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
                return self._json({"error": "Invalid credentials"}, status=401)
            for method, pattern, handle in _ROUTES:
                match = re.fullmatch(pattern, url.path)
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
        repo_id = f"{request.get('organization') or 'tester'}/{request['name']}"
        exists = repo_id in self.hub.repositories
        self.hub.repositories.setdefault(repo_id, Repository())
        self._json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id}, status=409 if exists else 200)

    def _info(self, body: bytes, repo_id: str, revision: str) -> None:
        if found := self._find(repo_id, revision):
            siblings = [{"rfilename": path} for path in found[0].commits[found[1]]]
            self._json({"id": repo_id, "sha": found[1], "siblings": siblings, "tags": [], "private": False})

    def _tree(self, body: bytes, repo_id: str, revision: str, folder: str) -> None:
        if found := self._find(repo_id, revision):
            files = found[0].commits[found[1]]
            inside = {path: content for path, content in files.items() if path.startswith(folder and folder + "/")}
            if folder and not inside:
                return self._missing("Entry")
            self._json([_entry(path, content) for path, content in inside.items()])

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
        if not found:
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
        self._send(content, **headers)

    def _validate_card(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def _whoami(self, body: bytes) -> None:
        self._json({"type": "user", "name": "tester", "orgs": [], "auth": {"type": "access_token"}})


_ID = r"([^/]+/[^/]+)"
_ROUTES = [
    ("POST", r"/api/repos/create", _Handler._create),
    ("POST", r"/api/validate-yaml", _Handler._validate_card),
    ("GET", r"/api/whoami-v2", _Handler._whoami),
    ("GET", rf"/api/models/{_ID}(?:/revision/([^/]+))?", _Handler._info),
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
    return path.endswith(".safetensors")


def _entry(path: str, content: bytes) -> dict:
    """A file as the tree lists it; the oid of an LFS file is that of its pointer."""
    if not _is_lfs(path):
        return {"type": "file", "path": path, "size": len(content), "oid": _blob_oid(content)}
    sha256 = _content_oid(path, content)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
    lfs = {"oid": sha256, "size": len(content), "pointerSize": len(pointer)}
    return {"type": "file", "path": path, "size": len(content), "oid": _blob_oid(pointer), "lfs": lfs}
