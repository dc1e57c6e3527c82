"""A small Hub on this machine, for reading and uploading, and what can go wrong with both.

Speaks the part of the Hub's API that huggingface_hub uses for models: info, tree, `resolve`, who a
token belongs to, creating a repository, Git LFS, commits, and the check of a card. Large files are
served from a second port, a stand-in for the content network, by addresses that can be made to
expire. Every request is noted; faults are put in by hand.

    python tests/hub_server.py org/name=FOLDER … [--tls FOLDER]

serves until its input ends; prints its endpoint. With --tls a certificate is made in the folder.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

if TYPE_CHECKING:
    from pytest import MonkeyPatch

LARGE = (".safetensors", ".bin", ".pt")
"""What is kept in LFS whatever its size: named by its sha256, and served by the content network."""
TOKEN = "tok"
"""The token of ada, who may write to her own namespace and to that of lab."""


@dataclass(frozen=True)
class File:
    """One file of a commit. sha256: its digest if it is a large one."""

    source: Path | bytes
    size: int
    oid: str
    sha256: str | None = None

    @classmethod
    def of(cls, name: str, source: Path | bytes) -> File:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        with _open(source) as file:
            if name.endswith(LARGE) or size > 1 << 20:
                return cls(source, size, "0" * 40, hashlib.file_digest(file, "sha256").hexdigest())
            return cls(source, size, hashlib.sha1(b"blob %d\0" % size + file.read()).hexdigest())

    def entry(self, name: str) -> dict[str, Any]:
        """As model info and a tree list it, each by names of its own."""
        entry = {"type": "file", "path": name, "rfilename": name, "size": self.size}
        entry |= {"oid": self.oid, "blobId": self.oid}
        if self.sha256:
            lfs = {"oid": self.sha256, "sha256": self.sha256, "size": self.size}
            entry["lfs"] = lfs | {"pointerSize": 134}
        return entry


def _open(source: Path | bytes) -> io.BytesIO | io.BufferedReader:
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")


@dataclass
class Repo:
    """A repository: its commits, oldest first, each with all its files."""

    id: str
    private: bool = False
    gated: bool = False
    commits: list[tuple[str, dict[str, File]]] = field(default_factory=list)
    revisions: dict[str, str] = field(default_factory=dict)

    @property
    def sha(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, File]:
        """What the main branch holds."""
        return self.commits[-1][1]

    @property
    def contents(self) -> dict[str, bytes]:
        """The same as bytes, but for what the Hub itself put there."""
        sources = {k: file.source for k, file in self.files.items() if k != ".gitattributes"}
        return {k: _open(source).read() for k, source in sources.items()}

    def commit(self, files: Mapping[str, Path | bytes], *revisions: str) -> str:
        """Put all these files on the main branch, and on others."""
        made = {name: File.of(name, source) for name, source in files.items()}
        sha = hashlib.sha1(f"{self.id} {len(self.commits)}".encode()).hexdigest()
        self.commits.append((sha, made))
        self.revisions |= dict.fromkeys(("main", sha, *revisions), sha)
        return sha


@dataclass
class Seen:
    """One request, `METHOD /path?query`, and of the file that was sent for it what was sent."""

    line: str
    authorised: bool
    file: str = ""
    start: int = 0
    sent: int = 0


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match `pattern`, after `skip` others.

    Of any request: "status" answers `status` with `headers` and `words`; "lost" does what was asked
    and closes without an answer; "hang up" closes after `after` bytes of the request's body;
    "silence" sets the server's `reached` there, and closes when its `released` is set.

    Of a file that is sent: "drop" breaks the connection after `after` bytes; "long" sends `after`
    bytes more and says no length; "ignore" sends the whole file whatever range was asked; "etag"
    says another ETag; "size" another size of the file; "flip" inverts the first byte.
    """

    pattern: str
    kind: str
    times: int = 1
    skip: int = 0
    after: int = 0
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    words: str = ""


def person(name: str, orgs: dict[str, str], **token: Any) -> dict[str, Any]:
    """What whoami-v2 says of a token: its owner, their roles in organisations, its own role."""
    return {
        "type": "user",
        "name": name,
        "orgs": [{"name": org, "roleInOrg": role} for org, role in orgs.items()],
        "auth": {"accessToken": {"displayName": "t", "role": "write", **token}},
    }


class HubServer:
    """Repositories served and taken for as long as the `with` block lasts.

    endpoint: what HF_ENDPOINT should be. network: the content network, which must never see a
    token. objects: the large files that arrived, by sha256. received: the bytes of those requests.
    """

    def __init__(self, certificate: tuple[Path, Path] | None = None) -> None:
        """certificate: its file and that of its key, to speak HTTP over TLS."""
        self.tokens = {TOKEN: person("ada", {"lab": "write"})}
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.received = 0
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self.signature = 0  # of the content network's addresses; any other has expired
        self.lock = threading.RLock()
        self.reached, self.released = threading.Event(), threading.Event()
        self._servers = [_Server(self, certificate) for _ in range(2)]
        self.endpoint, self.network = (server.url for server in self._servers)

    def __enter__(self) -> HubServer:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(
        self,
        repo_id: str,
        files: Path | Mapping[str, bytes],
        *revisions: str,
        private: bool = False,
        gated: bool = False,
    ) -> Repo:
        """Serve a folder's files, or these, as a repository."""
        if isinstance(files, Path):
            found = {str(p.relative_to(files)): p for p in sorted(files.rglob("*")) if p.is_file()}
        repo = self.repos[repo_id] = Repo(repo_id, private, gated)
        repo.commit(found if isinstance(files, Path) else files, *revisions)
        return repo

    def fail(self, pattern: str, kind: str, **options: Any) -> Fault:
        """Put in a fault; see Fault."""
        self.faults.append(Fault(pattern, kind, **options))
        return self.faults[-1]

    def asked(self, pattern: str) -> list[str]:
        """The requests so far, `METHOD /path?query`, that match."""
        return [seen.line for seen in self.seen if re.search(pattern, seen.line)]

    def served(self, name: str) -> list[tuple[int, int]]:
        """The stretches of a file (`org/name/file`) that were sent."""
        return [(s.start, s.start + s.sent) for s in self.seen if s.file == name and s.sent]

    def sent(self, suffix: str = "") -> int:
        """Bytes sent of files whose names end so."""
        return sum(seen.sent for seen in self.seen if seen.file.endswith(suffix))


def use(server: HubServer, patch: MonkeyPatch, home: Path, token: str | None = None) -> None:
    """The Hub as far as this process is concerned; nobody waits before trying again."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    from lowmem_adamms.hub import client

    patch.delenv("HF_TOKEN", raising=False)
    if token:
        patch.setenv("HF_TOKEN", token)
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "no-token"))
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "ENDPOINT", server.endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(client, "FIRST_PAUSE", 0.0)
    patch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that this machine signed itself, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        raise FileNotFoundError("needs the program openssl to make a certificate")
    files = folder / "certificate.pem", folder / "key.pem"
    argv = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    argv += ["-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext"]
    argv += ["subjectAltName=IP:127.0.0.1", "-out", str(files[0]), "-keyout", str(files[1])]
    subprocess.run(argv, check=True, capture_output=True)
    return files


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: HubServer, certificate: tuple[Path, Path] | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        if certificate:  # a client's own thread shakes hands: one without trust holds up no other
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.socket = context.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )
        scheme = "https" if certificate else "http"
        self.url = f"{scheme}://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class _Answer(Exception):  # noqa: N818  # not an error: how a route ends early
    """An answer that is not the ordinary one."""

    def __init__(self, status: int, words: str = "", code: str = "", **headers: str) -> None:
        super().__init__(words)
        self.status, self.words, self.headers = status, words, headers
        if code:
            self.headers["X-Error-Code"] = code


class _Drop(Exception):  # noqa: N818
    """The connection is closed without an answer."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: object) -> None:
        """Nothing: the tests look at `HubServer.seen`."""

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def _handle(self) -> None:
        line = f"{self.command} {unquote(self.path)}"
        with self.hub.lock:
            self.request_seen = Seen(line, "authorization" in self.headers)
            self.hub.seen.append(self.request_seen)
            self.fault = self._due_fault(line)
        kind = self.fault.kind if self.fault else ""
        try:
            if self.fault and kind in ("hang up", "silence"):
                self._read(self.fault.after)
                if kind == "silence":
                    self.hub.reached.set()
                    self.hub.released.wait()
                raise _Drop
            body = self._read()
            if self.fault and kind == "status":
                raise _Answer(self.fault.status, self.fault.words, **self.fault.headers)
            self._route(line.partition("?")[0], body, lost=kind == "lost")
        except _Answer as answer:
            document = answer.words.startswith("{")
            said = answer.words if document else json.dumps({"error": answer.words})
            self._reply(answer.status, said.encode() if answer.words else b"", answer.headers)
        except (_Drop, ConnectionError):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    def _due_fault(self, line: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times > 0 and re.search(fault.pattern, line):
                if fault.skip == 0:
                    fault.times -= 1
                    return fault
                fault.skip -= 1
        return None

    def _read(self, most: int | None = None) -> bytes:
        """The body, or at most `most` bytes of it."""
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length if most is None else min(length, most))
        if len(body) < length and most is None:
            raise _Drop
        return body

    def _reply(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _route(self, line: str, body: bytes, *, lost: bool) -> None:
        for pattern, route in _ROUTES:
            if found := re.fullmatch(pattern, line):
                answer = route(self, body, **found.groupdict())
                if lost:
                    raise _Drop
                if answer is not None:
                    self._reply(200, json.dumps(answer).encode())
                return
        raise _Answer(404, f"no route for {line}", "RepoNotFound")

    # Who may do what

    def _me(self) -> dict[str, Any] | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.hub.tokens.get(token)

    def _readable(self, name: str, revision: str = "main", *, content: bool = False) -> Repo:
        """The repository at a revision; content: of whose files something is asked."""
        repo, me = self.hub.repos.get(name), self._me()
        if repo is None or (repo.private and not me):
            raise _Answer(404 if me else 401, "Repository not found", "RepoNotFound")
        if repo.gated and content and not me:
            raise _Answer(401, f"Access to model {name} is restricted.", "GatedRepo")
        if revision not in repo.revisions:
            raise _Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo

    def _check_writer(self) -> None:
        """403 if the token's owner may not write; the Hub says no more than that."""
        if self.whoami(b"")["auth"]["accessToken"].get("denied"):
            raise _Answer(403, "You don't have the rights to write there.")

    def _writable(self, name: str) -> Repo:
        repo = self._readable(name)
        self._check_writer()
        return repo

    def whoami(self, body: bytes) -> Any:
        me = self._me()
        if me is None:
            raise _Answer(401, "Invalid username or password.")
        return me

    def auth_check(self, body: bytes, repo: str) -> Any:
        self._writable(repo)
        return {}

    # What there is

    def model(self, body: bytes, repo: str, revision: str = "main") -> Any:
        found = self._readable(repo, revision or "main")
        siblings = [file.entry(name) for name, file in found.files.items()]
        private, gated = found.private, "auto" if found.gated else False
        known = {"id": repo, "sha": found.sha, "private": private, "gated": gated}
        return known | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0}

    def tree(self, body: bytes, repo: str, revision: str) -> Any:
        files = self._readable(repo, revision).files
        return [file.entry(name) for name, file in files.items()]

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        found = self._readable(repo, revision, content=True)
        headers = {"X-Repo-Commit": found.sha}
        file = found.files[name]
        if file.sha256 is None:
            self._send_file(f"{repo}/{name}", file, headers | {"ETag": f'"{file.oid}"'})
            return
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        where = f"/network/{quote(repo)}/{quote(name)}?signature={self.hub.signature}"
        self._reply(302, b"", headers | {"Location": self.hub.network + where})

    def network(self, body: bytes, repo: str, name: str) -> None:
        """Large files, for whoever holds an address that has not expired; a token is an error."""
        signed = urlsplit(self.path).query == f"signature={self.hub.signature}"
        if not signed or "authorization" in self.headers:
            raise _Answer(403, "expired, or a token where none belongs")
        file = self.hub.repos[repo].files[name]
        assert file.sha256 is not None
        self._send_file(f"{repo}/{name}", file, {"ETag": f'"{file.sha256[:32]}"'})

    def _send_file(self, name: str, file: File, headers: dict[str, str]) -> None:
        """Send a file, or the range of it that was asked for, spoilt by what fault is due."""
        fault = self.fault or Fault("", "")
        start, stop, size = 0, file.size, file.size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and fault.kind != "ignore":
            start, stop = int(asked[1]), min(int(asked[2] or size) + 1, size)
            total = size + 1 if fault.kind == "size" else size
            headers = headers | {"Content-Range": f"bytes {start}-{stop - 1}/{total}"}
        if fault.kind == "etag":
            headers = headers | {"ETag": '"another"'}
        if fault.kind == "long":
            stop += fault.after
            self.close_connection = True
        else:
            headers = headers | {"Content-Length": str(stop - start)}
        self.send_response(206 if "Content-Range" in headers else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.request_seen.file, self.request_seen.start = name, start
        if self.command != "HEAD":
            self._send_bytes(file, start, stop, fault)

    def _send_bytes(self, file: File, start: int, stop: int, fault: Fault) -> None:
        if fault.kind == "drop":
            stop = min(stop, start + fault.after)
            self.close_connection = True
        self.wfile.flush()
        self.request_seen.sent = stop - start  # before the client can have it and ask us
        with _open(file.source) as source, contextlib.suppress(ConnectionError):
            source.seek(start)
            try:
                if fault.kind == "flip":
                    self.connection.sendall(bytes([source.read(1)[0] ^ 0xFF]))
                if (at := source.tell()) < stop:
                    self.connection.sendfile(source, at, stop - at)
            finally:
                self.request_seen.sent = source.tell() - start

    # Uploads

    def create(self, body: bytes) -> Any:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or self.whoami(b'')['name']}/{wanted['name']}"
        self._check_writer()
        url = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if name in self.hub.repos:
            raise _Answer(409, json.dumps(url | {"error": "You already created this model repo"}))
        attributes = {".gitattributes": b"*.safetensors filter=lfs\n"}
        self.hub.add(name, attributes, private=wanted.get("visibility") == "private")
        return url

    def validate_yaml(self, body: bytes) -> Any:
        return {"errors": [], "warnings": []}

    def preupload(self, body: bytes, repo: str) -> Any:
        files = []
        existing = self._writable(repo).files
        for file in json.loads(body)["files"]:
            path = file["path"]
            large = path.endswith(LARGE) or file["size"] > 1 << 20
            old = existing.get(path)
            answer = {"path": path, "uploadMode": "lfs" if large else "regular"}
            files.append(answer | {"shouldIgnore": False, "oid": old and (old.sha256 or old.oid)})
        return {"files": files}

    def batch(self, body: bytes, repo: str) -> Any:
        self._writable(repo)
        answers = []
        for item in json.loads(body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            url = f"{self.hub.endpoint}/lfs/{item['oid']}"
            if item["oid"] not in self.hub.objects:
                answer["actions"] = {"upload": {"href": url}}
            answers.append(answer)
        return {"transfer": "basic", "objects": answers}

    def put(self, body: bytes, oid: str) -> Any:
        with self.hub.lock:
            self.hub.received += len(body)
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Answer(400, "BadDigest")
        self.hub.objects[oid] = body
        return {}

    def commit(self, body: bytes, repo: str) -> Any:
        found = self._writable(repo)
        files = {name: file.source for name, file in found.files.items()}
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header" and value.get("parentCommit") not in (None, found.sha):
                raise _Answer(412, "A commit has happened since.")
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            if key == "deletedFile":
                del files[value["path"]]
        sha = found.commit(files)
        return {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}", "commitOid": sha}


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_OID = r"(?P<oid>[0-9a-f]{64})"
_ROUTES: list[tuple[str, Callable[..., Any]]] = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (rf"GET /api/models/{_REPO}", _Handler.model),
    (rf"GET /api/models/{_REPO}/revision/(?P<revision>.+)", _Handler.model),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+)/?", _Handler.tree),
    (rf"GET /api/models/{_REPO}/auth-check/write", _Handler.auth_check),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
    (rf"(?:GET|HEAD) /network/{_REPO}/(?P<name>.+)", _Handler.network),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (rf"POST /api/models/{_REPO}/preupload/main", _Handler.preupload),
    (rf"POST /api/models/{_REPO}/commit/main", _Handler.commit),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (rf"PUT /lfs/{_OID}", _Handler.put),
]


def main() -> None:
    """Serve the folders named on the command line until the input ends."""
    words = sys.argv[1:]
    certificate = None
    if "--tls" in words:
        certificate = make_certificate(Path(words[-1]))
        del words[-2:]
    with HubServer(certificate) as hub:
        for word in words:
            repo_id, _, folder = word.partition("=")
            hub.add(repo_id, Path(folder))
        sys.stdout.write(hub.endpoint + "\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
