"""Bytes of one file of the Hub by range requests: retried, resumed inside the range, checked.

Requests go through huggingface_hub's own client, headers, addresses and settings, so that tokens,
endpoint, proxies, certificates and timeouts are those that count everywhere else. A file belongs to
one commit: another commit, ETag, size or range than was asked for is an error, never data. Leaves
to others: what a repository holds (`hub.py`), and which ranges are wanted (`ranges.py`).
"""

from __future__ import annotations

import importlib
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ..errors import HubError, first_line
from . import plain_http as plain
from .plain_http import hub_utils

TRIES = 6
"""Attempts in a row that bring nothing, after which it is given up."""
PAUSE = 0.5
"""Seconds before the second attempt; twice as many before each one after it."""
LONGEST_PAUSE = 20.0
LONGEST_ASKED = 300.0
"""Seconds of a server's Retry-After that are waited for at most."""
_PIECE = 1 << 20
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_AGAIN = "run the same command again to go on"

_T = TypeVar("_T")


class _PassingError(Exception):
    """An attempt failed in a way that another may not; `after` seconds if the server said so."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Patience:
    """Waits between attempts, until they are used up; those that bring something start anew."""

    def __init__(
        self,
        what: str,
        stop: threading.Event | None = None,
        tries: int | None = None,
        advice: str = _AGAIN,
    ) -> None:
        self._what, self._stop, self._advice = what, stop or threading.Event(), advice
        self._tried, self._tries = 0, tries or TRIES

    def progress(self) -> None:
        """Something arrived."""
        self._tried = 0

    def wait(self, failure: _PassingError) -> None:
        """Sleep before the next attempt; HubError if there is none."""
        self._tried += 1
        if self._tried >= self._tries or self._stop.is_set():
            raise HubError(f"{self._what}: {failure}; {self._advice}") from None
        pause = min(PAUSE * 2 ** (self._tried - 1), LONGEST_PAUSE) * random.uniform(0.75, 1.25)
        self._stop.wait(pause if failure.after is None else min(failure.after, LONGEST_ASKED))


def patiently(
    what: str, ask: Callable[[], _T], tries: int | None = None, advice: str = _AGAIN
) -> _T:
    """What `ask` answers, asked again while the network or the server fails in passing.

    HubError, one line that begins with `what`, where it fails for good, and ends in `advice` where
    only patience ran out.
    """
    patience = Patience(what, tries=tries, advice=advice)
    while True:
        try:
            with _sorted(what):
                return ask()
        except _PassingError as failure:
            patience.wait(failure)


@contextmanager
def _sorted(what: str) -> Iterator[None]:
    """The errors of huggingface_hub and of what it asks with, as _PassingError or HubError."""
    from huggingface_hub import constants, errors

    at = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError:
        raise HubError(
            f"{what}: gated; accept its conditions on its page at {at} and set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{what}: the repository is there, this revision is not") from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{what}: no such folder or file here and no such repository at {at}, or a private one;"
            " check the name, or set HF_TOKEN"
        ) from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        raise HubError(
            f"{what}: not, or not whole, in the cache at {constants.HF_HUB_CACHE}, nor a folder or"
            " file here; and the Hub cannot be reached or HF_HUB_OFFLINE is set"
        ) from None
    except errors.EntryNotFoundError as error:
        raise HubError(f"{what}: {first_line(error)}") from None
    except errors.HFValidationError as error:
        raise HubError(f"{what}: not the name of a repository: {first_line(error)}") from None
    except errors.HfHubHTTPError as error:
        response = error.response
        server = response.request.url.host
        raise _of_status(what, response.status_code, response.headers, server) from None
    except plain.TransportError as error:
        raise _PassingError(str(error)) from None
    except _transport_errors() as error:
        if _is_mistrust(error):
            raise HubError(
                f"{what}: cannot reach {at} ({first_line(error)}); if its certificate is one to"
                " trust, set SSL_CERT_FILE to a file with that of its authority"
            ) from None
        raise _PassingError(f"cannot reach {at} ({first_line(error)})") from None


def _is_mistrust(error: BaseException | None) -> bool:
    """Whether a server's certificate was refused, which another attempt does not change."""
    import ssl

    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None


def _of_status(what: str, status: int, headers: Any, server: str) -> Exception:
    """What an answer that is none means: _PassingError, or HubError."""
    if status in _PASSING:
        return _PassingError(f"{server} answers {status}", _retry_after(headers))
    hint = "; check HF_TOKEN" if status in (401, 403) else ""
    return HubError(f"{what}: {server} answers {status}{hint}")


def _retry_after(headers: Any) -> float | None:
    """Seconds that the server asks for, if it says so in seconds."""
    text = headers.get("retry-after", "").strip()
    return float(text) if text.isdecimal() else None


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the client's library raises when the network fails: httpx, or what came after it."""
    roots = [cls.__module__.partition(".")[0] for cls in type(hub_utils().get_session()).__mro__]
    library = importlib.import_module(next(root for root in roots if root.startswith("httpx")))
    return (library.TransportError,)


class RemoteFile:
    """One file of a repository at one commit. Threads may share it.

    header: its first bytes, if they were read before; for whoever digests it.
    """

    def __init__(
        self, repo_id: str, sha: str, name: str, size: int, etag: str, sha256: str | None
    ) -> None:
        self.repo_id, self.sha, self.name, self.size = repo_id, sha, name, size
        self.etag, self.sha256 = etag, sha256
        self.header = b""
        self._what = f"{repo_id}@{sha[:12]}: {name}"
        self._lock = threading.Lock()
        self._location: tuple[str, bool, dict[str, str]] | None = None
        self._served_etag: str | None = None

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`. HubError if they cannot be had."""
        buffer = bytearray(stop - start)
        self.read_into(start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, start: int, view: memoryview, stop: threading.Event | None = None) -> None:
        """Fill `view` with the bytes from `start` on; what arrived is never fetched again.

        stop: when set, waiting for another attempt ends.
        """
        done, patience = 0, Patience(self._what, stop)
        while done < len(view):
            try:
                with (
                    _sorted(self._what),
                    self._answer(start + done, start + len(view)) as answer,
                ):
                    while count := answer.receive(view[done : done + _PIECE]):
                        done += count
                        patience.progress()
                        if stop is not None and stop.is_set():
                            raise _PassingError("stopped")
                if done < len(view):
                    raise _PassingError("the connection ended early")
            except _PassingError as failure:
                patience.wait(failure)

    @contextmanager
    def _answer(self, start: int, stop: int) -> Iterator[plain.Answer]:
        """One request for a range, its answer checked."""
        from huggingface_hub import constants

        url, ours, headers = self._where()
        headers = headers | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with plain.get(url, headers, constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
            self._check(answer, start, stop, ours)
            yield answer

    def _where(self) -> tuple[str, bool, dict[str, str]]:
        """Where its bytes are, whether that is the Hub itself, and headers for it.

        Only the Hub may see the token.
        """
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

        with self._lock:
            if self._location is None:
                url = hf_hub_url(self.repo_id, self.name, revision=self.sha)
                found = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
                for what, ours, theirs in (
                    ("commit", self.sha, found.commit_hash),
                    ("ETag", self.etag, found.etag),
                    ("size", self.size, found.size),
                ):
                    if ours != theirs:
                        raise HubError(f"{self._what}: its {what} is {theirs}, expected {ours}")
                home = urlsplit(constants.ENDPOINT)[:2] == urlsplit(found.location)[:2]
                headers = hub_utils().build_hf_headers(token=None if home else False)
                self._location = found.location, home, headers
            return self._location

    def _check(self, answer: plain.Answer, start: int, stop: int, ours: bool) -> None:
        """The answer must be the range that was asked for, of the file that was asked for."""
        status = answer.status
        if status // 100 == 3 or (status in (401, 403, 404, 410) and not ours):
            with self._lock:
                self._location = None  # an address with a signature lasts for an hour or so
            raise _PassingError(f"the address of its bytes is refused ({status})")
        whole = status == 200 and (start, stop) == (0, self.size)
        if status == 200 and not whole:
            raise HubError(f"{self._what}: the server ignores ranges; leave out --no-cache")
        if status != 206 and not whole:
            raise _of_status(self._what, status, answer.headers, answer.host)
        span = answer.headers.get("content-range", "")
        if status == 206 and span != (wanted := f"bytes {start}-{stop - 1}/{self.size}"):
            raise HubError(f"{self._what}: the server sends {span!r}, expected {wanted!r}")
        length = answer.headers.get("content-length")
        if length is not None and length != str(stop - start):
            raise HubError(f"{self._what}: {length} bytes are sent, expected {stop - start}")
        self._same_etag(answer.headers.get("etag"))

    def _same_etag(self, etag: str | None) -> None:
        """What serves the bytes may name them otherwise than the Hub, but always alike."""
        with self._lock:
            known = self._served_etag = self._served_etag or etag
        if etag != known:
            raise HubError(f"{self._what}: changed while it was read (ETag {known}, then {etag})")
