"""A server on this machine that takes uploads as the Hub does, and fails when told to.

What huggingface_hub asks of the Hub when a model is pushed: who the token is, making and describing
a repository, which files are large, Git LFS with single and multipart uploads, commits as JSON
lines, and a check of the card's metadata. Large files belong to no branch before a commit names
them. Faults are injected per request. No authentication but the token's name.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest import MonkeyPatch

LARGE = (".safetensors",)
"""What the Hub keeps as large files whatever their size, by its .gitattributes."""
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_CARD_NAME = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)


@dataclass
class Repo:
    """A repository: its commits, oldest first, each with all its files."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    large: set[str] = field(default_factory=set)

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, bytes]:
        """What the main branch holds."""
        return self.commits[-1][1]

    def commit(self, files: dict[str, bytes]) -> str:
        count = len(self.commits)
        self.commits.append((hashlib.sha1(b"commit %d" % count).hexdigest(), files))
        return self.head


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose `METHOD path` matches `pattern`.

    kind: a status as text; "drop" closes before reading the body; "cut" does after `after` bytes of
    it; "lost" does what was asked and closes without an answer; "garbage" answers with nonsense;
    "stall" takes `after` bytes of the body and then nothing, nor answers, till the server ends.
    """

    pattern: str
    kind: str
    times: int = 1
    after: int = 0
    words: str = "as the test wishes"


class HubServer:
    """State and address of the server; `tokens` are the users by their token."""

    def __init__(self) -> None:
        self.tokens: dict[str, dict[str, Any]] = {"tok": person("ada", orgs={"lab": "write"})}
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.seen: list[str] = []
        self.received = 0
        self.part_size: int | None = None
        self.reached = threading.Event()
        self.ended = threading.Event()
        self._gate = threading.Event()
        self._gate.set()
        self._passing = 0
        self.lock = threading.RLock()
        self.url = ""

    def asked(self, pattern: str) -> list[str]:
        """The requests so far, `METHOD path`, that match."""
        return [line for line in self.seen if re.search(pattern, line)]

    def add_repo(self, name: str, files: dict[str, bytes] | None = None, **how: Any) -> Repo:
        """A repository with the Hub's first commit, and perhaps one more."""
        repo = self.repos[name] = Repo(**how)
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        if files:
            repo.commit(repo.files | files)
        return repo

    def hold(self, passing: int = 0) -> None:
        """After `passing` more bodies of large files the next one sets `reached`, and waits."""
        self._passing = passing
        self.reached.clear()
        self._gate.clear()

    def release(self) -> None:
        """Whoever was held is dropped; everybody else passes."""
        self._gate.set()

    def take(self, body: bytes) -> bool:
        """Count a body that arrived; False if it was held, and is to be dropped."""
        with self.lock:
            self.received += len(body)
            self._passing -= 1
            if self._passing >= 0 or self._gate.is_set():
                return True
        self.reached.set()
        self._gate.wait(60)
        return False


def person(name: str, *, orgs: dict[str, str] | None = None, **token: Any) -> dict[str, Any]:
    """What whoami-v2 says of a token: its owner, their roles in organisations, its own role."""
    return {
        "type": "user",
        "name": name,
        "orgs": [{"name": org, "roleInOrg": role} for org, role in (orgs or {}).items()],
        "auth": {"accessToken": {"displayName": "t", "role": "write", **token}},
    }


@contextlib.contextmanager
def serving() -> Iterator[HubServer]:
    """The server, on a port of its own, until the end of the block."""
    hub = HubServer()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        hub.release()
        hub.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


def use(server: HubServer, patch: MonkeyPatch) -> None:
    """The Hub as far as this process is concerned; nobody waits before trying again."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    from lowmem_adamms.hub import client

    patch.setattr(constants, "ENDPOINT", server.url)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setenv("HF_TOKEN", "tok")
    patch.setattr(client, "FIRST_PAUSE", 0.0)
    patch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))


class _Answer(Exception):  # noqa: N818  # not an error: how a route ends early
    """An answer that is not the ordinary one."""

    def __init__(self, status: int, words: str, **headers: str) -> None:
        super().__init__(words)
        self.status, self.words, self.headers = status, words, headers


class _Drop(Exception):  # noqa: N818
    """The connection is closed without an answer."""


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing: the tests look at `HubServer.seen`."""

    def _handle(self) -> None:
        path = self.path.partition("?")[0]
        line = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.seen.append(line)
            fault = self._fault(line)
        try:
            if fault and fault.kind in ("drop", "cut", "stall"):
                self._read(0 if fault.kind == "drop" else fault.after)
                if fault.kind == "stall":
                    self.hub.ended.wait()
                raise _Drop
            body = self._read()
            if fault and fault.kind == "garbage":
                return self._send(200, b"<html>not json")
            if fault and fault.kind.isdigit():
                raise _Answer(int(fault.kind), fault.words)
            status, answer, headers = self._route(line, body)
            if fault and fault.kind == "lost":
                raise _Drop
            self._send(status, answer, headers)
        except _Answer as answer:
            document = answer.words.startswith("{")
            said = answer.words if document else json.dumps({"error": answer.words})
            self._send(answer.status, said.encode(), answer.headers)
        except (_Drop, ConnectionError):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_POST = do_PUT = _handle  # noqa: N815

    def _fault(self, line: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times > 0 and re.search(fault.pattern, line):
                fault.times -= 1
                return fault
        return None

    def _read(self, most: int | None = None) -> bytes:
        """The body, with its length known or in chunks; at most `most` bytes of it."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)[:most]
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length if most is None else min(length, most))
        if len(body) < length and most is None:
            raise _Drop
        return body

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _route(self, line: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        for pattern, route in _ROUTES:
            if found := re.fullmatch(pattern, line):
                answer = route(self, body, **found.groupdict())
                if isinstance(answer, dict) and "headers" in answer:
                    return 200, b"", answer["headers"]
                return 200, json.dumps(answer).encode(), {}
        raise _Answer(404, f"no route for {line}")

    # Who and what

    def _me(self) -> dict[str, Any]:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise _Answer(401, "Invalid username or password.")
        return self.hub.tokens[token]

    def _may_write(self, repo: str) -> None:
        """403 unless the token's owner writes in the namespace; the Hub says no more than that."""
        me, namespace = self._me(), repo.partition("/")[0]
        roles = {org["name"]: org["roleInOrg"] for org in me["orgs"]} | {me["name"]: "admin"}
        token = me["auth"]["accessToken"]
        if roles.get(namespace, "read") == "read" or token.get("denied"):
            raise _Answer(403, "You don't have the rights to write there.")

    def _repo(self, name: str) -> Repo:
        if name not in self.hub.repos:
            raise _Answer(404, "Repository not found", **{"X-Error-Code": "RepoNotFound"})
        return self.hub.repos[name]

    def whoami(self, body: bytes) -> Any:
        return self._me()

    def create(self, body: bytes) -> Any:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or self._me()['name']}/{wanted['name']}"
        self._may_write(name)
        url = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repos:
            raise _Answer(409, json.dumps(url | {"error": "You already created this model repo"}))
        self.hub.add_repo(name, private=wanted.get("visibility") == "private")
        return url

    def model(self, body: bytes, repo: str) -> Any:
        found = self._repo(repo)
        siblings = [{"rfilename": name} for name in found.files]
        return {"id": repo, "sha": found.head, "private": found.private, "siblings": siblings}

    def auth_check(self, body: bytes, repo: str) -> Any:
        self._repo(repo)
        self._may_write(repo)
        return {}

    def tree(self, body: bytes, repo: str) -> Any:
        found = self._repo(repo)
        return [_entry(name, data, name in found.large) for name, data in found.files.items()]

    def validate_yaml(self, body: bytes) -> Any:
        import yaml  # type: ignore[import-untyped]

        content = json.loads(body)["content"]
        front = re.match(r"---\r?\n(.*?)\n---", content, re.DOTALL)
        if front is None:
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]}
        names = yaml.safe_load(front[1]).get("base_model", [])
        wrong = [name for name in names if not _CARD_NAME.fullmatch(str(name))]
        if wrong:
            words = f'"base_model" with value "{wrong[0]}" is not valid. Use a model id.'
            raise _Answer(400, json.dumps({"errors": [{"message": words}], "warnings": []}))
        return {"errors": [], "warnings": []}

    # Large files

    def preupload(self, body: bytes, repo: str) -> Any:
        found = self._repo(repo)
        self._may_write(repo)
        files = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            large = path.endswith(LARGE) or file["size"] > 1 << 20
            oid = None
            if path in found.files:
                entry = _entry(path, found.files[path], path in found.large)
                oid = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def batch(self, body: bytes, repo: str) -> Any:
        self._repo(repo)
        self._may_write(repo)
        answers = []
        for item in json.loads(body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                answer["actions"] = self._actions(item["oid"], item["size"])
            answers.append(answer)
        return {"transfer": "basic", "objects": answers}

    def _actions(self, oid: str, size: int) -> Any:
        verify = {"href": f"{self.hub.url}/lfs/{oid}/verify"}
        if self.hub.part_size is None or size <= self.hub.part_size:
            return {"upload": {"href": f"{self.hub.url}/lfs/{oid}"}, "verify": verify}
        count = -(-size // self.hub.part_size)
        urls = {f"{i:05}": f"{self.hub.url}/lfs/{oid}/{i}" for i in range(1, count + 1)}
        header = {"chunk_size": str(self.hub.part_size), **urls}
        complete = {"href": f"{self.hub.url}/lfs/{oid}/complete", "header": header}
        return {"upload": complete, "verify": verify}

    def put(self, body: bytes, oid: str) -> Any:
        if not self.hub.take(body):
            raise _Drop
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Answer(400, "BadDigest")
        self.hub.objects[oid] = body
        return {}

    def put_part(self, body: bytes, oid: str, part: str) -> Any:
        if not self.hub.take(body):
            raise _Drop
        self.hub.parts.setdefault(oid, {})[int(part)] = body
        return {"headers": {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}}

    def complete(self, body: bytes, oid: str) -> Any:
        parts = self.hub.parts.pop(oid)
        listed = [part["partNumber"] for part in json.loads(body)["parts"]]
        whole = b"".join(parts[number] for number in listed)
        if hashlib.sha256(whole).hexdigest() != oid:
            raise _Answer(400, "BadDigest")
        self.hub.objects[oid] = whole
        return {}

    def verify(self, body: bytes, oid: str) -> Any:
        if len(self.hub.objects.get(oid, b"")) != json.loads(body)["size"]:
            raise _Answer(404, "object not found")
        return {}

    # Commits

    def commit(self, body: bytes, repo: str) -> Any:
        found = self._repo(repo)
        self._may_write(repo)
        files, large = dict(found.files), set(found.large)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                if value.get("parentCommit") not in (None, found.head):
                    raise _Answer(412, "A commit has happened since.")
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                large.discard(value["path"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _Answer(400, f"large file {value['path']} was not uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
                large.add(value["path"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _Answer(400, f"unknown operation {line['key']}")
        found.large = large
        oid = found.commit(files)
        return {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid}


def _entry(name: str, data: bytes, large: bool) -> dict[str, Any]:
    """One line of a tree: git's digest, and for large files that of their content."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob}
    if large:
        oid = hashlib.sha256(data).hexdigest()
        entry |= {"oid": "0" * 40, "lfs": {"oid": oid, "size": len(data), "pointerSize": 134}}
    return entry


_ROUTES: list[tuple[str, Callable[..., Any]]] = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (rf"GET /api/models/{_REPO}", _Handler.model),
    (rf"GET /api/models/{_REPO}/auth-check/write", _Handler.auth_check),
    (rf"GET /api/models/{_REPO}/tree/main", _Handler.tree),
    (rf"POST /api/models/{_REPO}/preupload/main", _Handler.preupload),
    (rf"POST /api/models/{_REPO}/commit/main", _Handler.commit),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs/(?P<oid>[0-9a-f]{64})", _Handler.put),
    (r"PUT /lfs/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", _Handler.put_part),
    (r"POST /lfs/(?P<oid>[0-9a-f]{64})/complete", _Handler.complete),
    (r"POST /lfs/(?P<oid>[0-9a-f]{64})/verify", _Handler.verify),
]
