"""Byte ranges of one file on the Hub: retried, resumed inside the range, checked.

A file belongs to one commit. Another commit, ETag, size or range than was asked for is an error,
never data.
"""

from __future__ import annotations

import functools
import threading
from typing import Any
from urllib.parse import urlsplit

from ..errors import DigestError, HubError
from .client import ATTEMPTS, TemporaryError, ask, http_library

PARALLEL_REQUESTS = 8
"""Requests under way at once, for whoever reads many ranges."""


class RemoteFile:
    """One file of a repository at one commit. Threads may share it.

    sha256: the Hub's digest of a large file, None for a small one. header: the file's first bytes,
    once somebody has read them; kept for whoever computes its digest later.
    """

    def __init__(
        self, repo_id: str, sha: str, name: str, size: int, etag: str, sha256: str | None
    ) -> None:
        self.repo_id, self.sha, self.name, self.size = repo_id, sha, name, size
        self.etag, self.sha256 = etag, sha256
        self.header = b""
        self._subject = f"{repo_id}@{sha[:12]}: {name}"
        self._lock = threading.Lock()
        self._location: tuple[str, dict[str, str]] | None = None
        self._served_etag: str | None = None

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`. HubError if they cannot be had."""
        buffer = bytearray(stop - start)
        self.read_into(start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, start: int, view: memoryview, stop: threading.Event | None = None) -> None:
        """Fill `view` with the bytes from `start` on. stop: when set, that ends in a HubError."""
        done = 0
        while done < len(view):
            receive = functools.partial(self._receive, start + done, view[done:], stop)
            done += ask(self._subject, receive, attempts=ATTEMPTS, stop=stop)

    def check_sha256(self, found: str) -> None:
        """DigestError unless the file's bytes, whose sha256 is `found`, are those of the Hub."""
        if self.sha256 not in (None, found):
            raise DigestError(
                f"{self._subject} has the sha256 {found[:16]}…, the Hub says {self.sha256[:16]}…;"
                " run the same command again to fetch it anew"
            )

    def _receive(self, start: int, view: memoryview, stop: threading.Event | None) -> int:
        """Request bytes for `view`, and return how many arrived before the connection ended."""
        from huggingface_hub import constants, get_session

        url, headers = self._locate()
        wanted = f"bytes={start}-{start + len(view) - 1}"
        headers = headers | {"Range": wanted, "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        received = 0
        with get_session().stream(
            "GET", url, headers=headers, timeout=timeout, follow_redirects=False
        ) as response:
            self._check_response(response, start, start + len(view))
            try:
                for chunk in response.iter_raw():
                    piece = chunk[: len(view) - received]
                    view[received : received + len(piece)] = piece
                    received += len(piece)
                    if stop is not None and stop.is_set():
                        raise TemporaryError("stopped")
            except http_library().TransportError:
                if not received:
                    raise
        if not received:
            raise TemporaryError("the connection ended early")
        return received

    def _locate(self) -> tuple[str, dict[str, str]]:
        """Ask the Hub where the bytes are, and that they are still those of this commit.

        Returns the address, and the headers to send there.
        """
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        with self._lock:
            if self._location is None:
                url = hf_hub_url(self.repo_id, self.name, revision=self.sha)
                found = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
                for what, expected, answered in (
                    ("commit", self.sha, found.commit_hash),
                    ("ETag", self.etag, found.etag),
                    ("size", self.size, found.size),
                ):
                    if answered != expected:
                        raise HubError(
                            f"{self._subject}: its {what} is {answered}, expected {expected}"
                        )
                on_hub = urlsplit(constants.ENDPOINT)[:2] == urlsplit(found.location)[:2]
                # Only the Hub may see the token
                headers = build_hf_headers(token=None if on_hub else False)
                self._location = found.location, headers
            return self._location

    def _check_response(self, response: Any, start: int, stop: int) -> None:
        """The response must be the range that was asked for, of the file that was asked for."""
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        status = response.status_code
        if response.is_redirect or status in (401, 403, 404, 410):
            with self._lock:
                self._location = None  # a signed address lasts for an hour or so
            raise TemporaryError(f"the address of its bytes is refused ({status})")
        hf_raise_for_status(response)
        if status != 206 and (start, stop) != (0, self.size):
            raise HubError(f"{self._subject}: the server ignores ranges; leave out `no_cache`")
        served = response.headers.get("content-range")
        wanted = f"bytes {start}-{stop - 1}/{self.size}"
        if status == 206 and served != wanted:
            raise HubError(f"{self._subject}: the server sends {served!r}, expected {wanted!r}")
        # What serves the bytes may name them otherwise than the Hub does, but always alike
        etag = response.headers.get("etag")
        with self._lock:
            known = self._served_etag = self._served_etag or etag
        if etag != known:
            raise HubError(f"{self._subject}: changed while read (ETag {known}, then {etag})")
