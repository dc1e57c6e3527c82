"""A small Hub on this machine: what a client reads from it, and what can go wrong on the way.

Speaks, over HTTP on two ports of 127.0.0.1, the part of the Hub's API that reading needs: model
info, tree, paths-info (huggingface.co/docs/hub/api, and what huggingface_hub itself requests),
and `resolve` with its headers, which redirects large files to the second port, a stand-in for the
content network, by addresses that can be made to expire. Faults are put in by hand, and every
request is noted with the bytes it was sent. Uploads are not spoken here.

    python tests/hub_server.py org/name=FOLDER …      serves until it is killed; prints its endpoint
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import ssl
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

if TYPE_CHECKING:
    from pytest import MonkeyPatch

LARGE = (".safetensors", ".bin", ".pt")
"""What is kept in LFS: named by its sha256, and served by the content network."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Seen:
    """One request, as it was answered. `start` and `stop` of what was asked; `sent` bytes of it."""

    method: str
    path: str
    file: str
    status: int
    start: int
    stop: int
    sent: int
    authorised: bool


@dataclass
class Fault:
    """Something that goes wrong in answers to GET (or HEAD) of paths that contain `match`.

    kind: "drop" (the connection breaks `after` bytes), "stall" (no byte for `seconds` after that),
    "status" (answers `status` with `headers`), "short" (says and sends a body `after` bytes less),
    "ignore" (sends the whole file whatever range was asked), "shift" (another range than asked),
    "etag" (another ETag), "flip" (the first byte is inverted), "size" (another size of the file).
    times: answers it still spoils; skip: answers let through before.
    """

    kind: str
    match: str = ""
    times: int = 1
    skip: int = 0
    after: int = 0
    seconds: float = 0.0
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "GET"


@dataclass(frozen=True)
class _File:
    path: Path
    size: int
    oid: str
    sha256: str | None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass
class _Repo:
    id: str
    sha: str
    files: dict[str, _File]
    revisions: dict[str, str]
    private: bool
    gated: bool


class HubServer:
    """Repositories served from folders, for as long as the `with` block lasts."""

    def __init__(
        self, *, token: str = "hf_secret", certificate: tuple[Path, Path] | None = None
    ) -> None:
        """certificate: its file and that of its key, to speak HTTP over TLS."""
        self.token = token
        self._scheme = "https" if certificate else "http"
        self.repos: dict[str, _Repo] = {}
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self.signature = 0
        self.lock = threading.Lock()
        self._servers = [_Server(("127.0.0.1", 0), handler) for handler in (_Hub, _Network)]
        for server in self._servers:
            server.hub = self
            if certificate:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(*certificate)
                server.tls = context

    def __enter__(self) -> HubServer:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT should be."""
        return f"{self._scheme}://127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def network(self) -> str:
        """The content network, which must never see a token."""
        return f"{self._scheme}://127.0.0.1:{self._servers[1].server_address[1]}"

    def add(
        self,
        repo_id: str,
        folder: Path,
        *,
        revisions: tuple[str, ...] = ("main",),
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Serve a folder as a repository, again after it has changed; returns the commit's sha."""
        files = {
            str(path.relative_to(folder)): _file(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        listing = json.dumps([repo_id, [[name, file.etag] for name, file in files.items()]])
        sha = hashlib.sha1(listing.encode()).hexdigest()
        known = dict.fromkeys((*revisions, sha), sha)
        self.repos[repo_id] = _Repo(repo_id, sha, files, known, private, gated)
        return sha

    def expire(self) -> None:
        """Addresses handed out so far are refused from now on."""
        self.signature += 1

    def fail(self, kind: str, match: str = "", **options: Any) -> Fault:
        """Put in a fault; see Fault."""
        fault = Fault(kind, match, **options)
        self.faults.append(fault)
        return fault

    def served(self, name: str) -> list[tuple[int, int]]:
        """The stretches of a file (`org/name/file`) whose bytes were sent, as they were sent."""
        found = [seen for seen in self.seen if seen.file == name and seen.status in (200, 206)]
        return [(seen.start, seen.start + seen.sent) for seen in found if seen.sent]

    def sent(self, suffix: str = "") -> int:
        """Bytes of files that were sent, of those whose names end so."""
        return sum(seen.sent for seen in self.seen if seen.file and seen.file.endswith(suffix))


def use(server: HubServer, patch: MonkeyPatch, home: Path) -> None:
    """The Hub as far as this process is concerned, without a token, its cache below `home`."""
    from huggingface_hub import constants

    patch.delenv("HF_TOKEN", raising=False)
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "no-token"))
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "ENDPOINT", server.endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def _file(path: Path) -> _File:
    size = path.stat().st_size
    oid = hashlib.sha1(f"{path.name} {size} {path.stat().st_mtime_ns}".encode()).hexdigest()
    if path.suffix not in LARGE:
        return _File(path, size, oid, None)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return _File(path, size, oid, digest.hexdigest())


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    hub: HubServer
    tls: ssl.SSLContext | None = None

    def finish_request(self, request: Any, client_address: Any) -> None:
        """In the connection's own thread: a client that does not trust us must not hold up all."""
        if self.tls is None:
            super().finish_request(request, client_address)
            return
        with self.tls.wrap_socket(request, server_side=True) as wrapped:
            super().finish_request(wrapped, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    """What both ports share: JSON, errors, files with ranges and faults."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        raise NotImplementedError

    def json(self, document: object) -> None:
        body = json.dumps(document).encode()
        self.reply(200, {"Content-Type": "application/json"}, body)

    def error(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.reply(status, {key: value for key, value in headers.items() if value}, b"")

    def reply(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        self.note(status)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def note(
        self, status: int, file: str = "", start: int = 0, stop: int = 0, sent: int = 0
    ) -> None:
        authorised = "authorization" in self.headers
        with self.hub.lock:
            seen = Seen(self.command, self.path, file, status, start, stop, sent, authorised)
            self.hub.seen.append(seen)

    def fault(self) -> Fault | None:
        """The first fault that is due for this request."""
        with self.hub.lock:
            for fault in self.hub.faults:
                fits = fault.match in unquote(self.path) and fault.method == self.command
                if not fits or fault.times <= 0:
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def file(self, name: str, file: _File, headers: dict[str, str]) -> None:
        """Send a file, or the range of it that was asked for, spoilt by what fault is due."""
        fault = self.fault()
        if fault and fault.kind == "status":
            self.reply(fault.status, fault.headers)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if fault and fault.kind == "ignore":
            asked = None
        start, stop = 0, file.size
        if asked:
            start, stop = int(asked[1]), min(int(asked[2] or file.size) + 1, file.size)
            if start >= file.size:
                self.reply(416, {"Content-Range": f"bytes */{file.size}"})
                return
        if fault and fault.kind == "etag":
            headers = headers | {"ETag": '"another"', "X-Linked-Etag": '"another"'}
        if fault and fault.kind == "short":
            stop -= fault.after
        shift = 1 if fault and fault.kind == "shift" else 0
        total = file.size + (1 if fault and fault.kind == "size" else 0)
        self.send_response(206 if asked else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        if asked:
            self.send_header("Content-Range", f"bytes {start + shift}-{stop - 1 + shift}/{total}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        sent = 0
        try:
            if self.command != "HEAD":
                sent = self._send(file, start, stop, fault)
        finally:
            self.note(206 if asked else 200, name, start, stop, sent)

    def _send(self, file: _File, start: int, stop: int, fault: Fault | None) -> int:
        """The bytes from `start` to `stop`, or as many as the fault lets through."""
        breaks = fault is not None and fault.kind in ("drop", "stall")
        end = min(stop, start + fault.after) if fault and breaks else stop
        at = start
        self.wfile.flush()
        with file.path.open("rb") as source, contextlib.suppress(ConnectionError):
            if fault and fault.kind == "flip" and at < end:
                self.connection.sendall(bytes([source.read(1)[0] ^ 0xFF]))
                at += 1
            while at < end:
                if self.server.tls:
                    source.seek(at)
                    self.connection.sendall(block := source.read(min(_CHUNK, end - at)))
                    done = len(block)
                else:
                    done = os.sendfile(self.connection.fileno(), source.fileno(), at, end - at)
                if not done:
                    break
                at += done
            if fault and fault.kind == "stall":
                time.sleep(fault.seconds)
        if breaks:
            self.close_connection = True
        return at - start


class _Hub(_Handler):
    """The API and `resolve`."""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"))
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*map(unquote, found.groups()))
        else:
            self.error(404, "RepoNotFound")

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        path = urlsplit(self.path).path
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", path)
        repo = self._repo(*map(unquote, found.groups())) if found else None
        if repo is None:
            return
        as_json = self.headers.get("Content-Type", "").startswith("application/json")
        asked = json.loads(body) if as_json else parse_qs(body.decode())
        paths = [path for path in asked.get("paths", []) if path in repo.files]
        self.json([_entry(path, repo.files[path]) for path in paths])

    def _repo(self, repo_id: str, revision: str, *, content: bool = False) -> _Repo | None:
        """The repository at a revision, or None once an error was sent. content: of its files."""
        repo = self.hub.repos.get(repo_id)
        known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repo is None or (repo.private and not known):
            self.error(404 if known else 401, "RepoNotFound", "Repository not found")
        elif repo.gated and content and not known:
            self.error(401, "GatedRepo", f"Access to model {repo_id} is restricted.")
        elif revision not in repo.revisions:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repo
        return None

    def _api(self, rest: str) -> None:
        fault = self.fault()
        if fault and fault.kind == "status":
            self.reply(fault.status, fault.headers)
            return
        pattern = r"([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)/?)?"
        found = re.fullmatch(pattern, rest)
        if not found:
            self.error(404, "RepoNotFound")
            return
        repo = self._repo(unquote(found[1]), unquote(found[3] or "main"))
        if repo is None:
            return
        if found[2] == "tree":
            self.json([_entry(name, file) for name, file in repo.files.items()])
            return
        query = parse_qs(urlsplit(self.path).query)
        siblings = [_sibling(name, file, "blobs" in query) for name, file in repo.files.items()]
        document: dict[str, Any] = {
            "_id": repo.sha[:24],
            "id": repo.id,
            "modelId": repo.id,
            "sha": repo.sha,
        }
        document |= {"private": repo.private, "gated": "auto" if repo.gated else False}
        self.json(document | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        repo = self._repo(repo_id, revision, content=True)
        if repo is None:
            return
        headers = {"X-Repo-Commit": repo.sha}
        if (file := repo.files.get(name)) is None:
            self.note(404)
            self.send_response(404)
            for key, value in (headers | {"X-Error-Code": "EntryNotFound"}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if file.sha256 is None:
            self.file(f"{repo_id}/{name}", file, headers | {"ETag": f'"{file.oid}"'})
            return
        fault = self.fault()
        if fault and fault.kind == "status":
            self.reply(fault.status, fault.headers)
            return
        etag = "0" * 64 if fault and fault.kind == "etag" else file.sha256
        headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(file.size)}
        where = f"/{quote(repo_id)}/{repo.sha}/{quote(name)}?signature={self.hub.signature}"
        self.reply(302, headers | {"Location": self.hub.network + where})


class _Network(_Handler):
    """Large files, for whoever holds an address that has not expired; a token is an error."""

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        org, repo, _, name = unquote(split.path).strip("/").split("/", 3)
        if split.query != f"signature={self.hub.signature}" or "authorization" in self.headers:
            self.error(403, message="expired, or a token where none belongs")
            return
        file = self.hub.repos[f"{org}/{repo}"].files[name]
        assert file.sha256 is not None
        etag = {"ETag": f'"{file.sha256[:32]}"'}
        self.file(f"{org}/{repo}/{name}", file, etag)


def _entry(name: str, file: _File) -> dict[str, Any]:
    """A file as `tree` and `paths-info` list it."""
    entry: dict[str, Any] = {"type": "file", "path": name, "size": file.size, "oid": file.oid}
    if file.sha256:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    return entry


def _sibling(name: str, file: _File, blobs: bool) -> dict[str, Any]:
    """A file as model info lists it."""
    entry: dict[str, Any] = {"rfilename": name}
    if blobs:
        entry |= {"size": file.size, "blobId": file.oid}
        if file.sha256:
            entry["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
    return entry


def main() -> None:
    """Serve the folders named on the command line until the input ends."""
    with HubServer() as hub:
        for word in sys.argv[1:]:
            repo_id, _, folder = word.partition("=")
            hub.add(repo_id, Path(folder))
        sys.stdout.write(hub.endpoint + "\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
