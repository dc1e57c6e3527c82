"""How the Hub is asked: one retry, one table of errors, and huggingface_hub's settings.

All requests go through huggingface_hub, so tokens, endpoint, proxies and certificates are those
that its other users know. Names that it does not document are used in this file only.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import random
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import HubError, MergeError, first_line

ATTEMPTS = 8
"""Attempts at one thing, which take about a minute where each fails at once."""
FIRST_ATTEMPTS = 3
"""Attempts at the first request of a command: there may be no network at all."""
FIRST_PAUSE = 0.5
"""Seconds before the second attempt; each pause after it is twice as long, to LONGEST_PAUSE."""
LONGEST_PAUSE = 20.0
LONGEST_RETRY_AFTER = 300.0
"""Seconds that a server's Retry-After is obeyed for at most."""
STALL_SECONDS = 120.0
"""Seconds without a byte after which an upload's request has failed, or HF_HUB_DOWNLOAD_TIMEOUT if
that is more: the Hub may take its time over a commit."""
RUN_AGAIN = "; run the same command again to go on"

_T = TypeVar("_T")


class TemporaryError(Exception):
    """A request failed in a way that the next attempt may not."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong, and whether another attempt may go better.

    retry_after: seconds that the server asks to wait.
    """

    reason: str
    temporary: bool = False
    retry_after: float | None = None


def ask(
    subject: str,
    request: Callable[[], _T],
    *,
    error_class: type[MergeError] = HubError,
    attempts: int = ATTEMPTS,
    stop: threading.Event | None = None,
    advice: str = RUN_AGAIN,
) -> _T:
    """Return what `request` returns, trying again while the network or a server fails temporarily.

    Args:
        subject: What is asked for; the error's line begins with it.
        request: May raise TemporaryError, or anything that huggingface_hub raises.
        error_class: Raised when there is no hope, with the last failure as its cause.
        attempts: That bring nothing, after which it is given up.
        stop: Once it is set, no further attempt is made.
        advice: Ends the line where only the attempts were used up.
    """
    stop = stop or threading.Event()
    for attempt in itertools.count(1):
        try:
            return request()
        except Exception as error:
            cause = _unwrap(error)
            if isinstance(cause, MergeError) or _is_disk_error(cause):
                raise cause from None
            failure = describe(cause)
            if not failure.temporary:
                raise error_class(f"{subject}: {failure.reason}") from cause
            if attempt >= attempts or stop.wait(_pause(attempt, failure)):
                raise error_class(f"{subject}: {failure.reason}{advice}") from cause
    raise AssertionError("the loop only ends by returning or raising")


def _pause(attempt: int, failure: Failure) -> float:
    """Seconds to wait after an attempt, with some jitter so that parallel requests spread out."""
    if failure.retry_after is not None:
        return min(failure.retry_after, LONGEST_RETRY_AFTER)
    pause: float = min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)
    return pause * random.uniform(0.75, 1.25)


def describe(error: Exception) -> Failure:
    """The table: what an error of huggingface_hub or of its HTTP library means."""
    from huggingface_hub import constants, errors

    httpx = http_library()
    endpoint = constants.ENDPOINT
    match error:
        case TemporaryError():
            return Failure(str(error), temporary=True)
        case errors.GatedRepoError():
            return Failure(
                f"gated; accept its conditions on its page at {endpoint} and set HF_TOKEN"
            )
        case errors.RevisionNotFoundError():
            return Failure("the repository is there, this revision is not")
        case errors.RepositoryNotFoundError():
            return Failure(
                f"no such repository at {endpoint}, or a private one; check the name, or set"
                " HF_TOKEN"
            )
        case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError():
            return Failure(
                f"not, or not whole, in the cache at {constants.HF_HUB_CACHE}, nor a folder or file"
                " here; and the Hub cannot be reached or HF_HUB_OFFLINE is set"
            )
        case errors.EntryNotFoundError():
            return Failure(first_line(error))
        case errors.HFValidationError():
            return Failure(f"not the name of a repository: {first_line(error)}")
        case errors.HfHubHTTPError():
            return _describe_status(error)
        case httpx.TimeoutException():
            return Failure(f"{_host(error)} sent or took nothing for too long", temporary=True)
        case httpx.TransportError() if _is_certificate_error(error):
            return Failure(
                f"cannot reach {endpoint} ({first_line(error)}); if its certificate is one to"
                " trust, set SSL_CERT_FILE to a file with that of its authority"
            )
        case httpx.UnsupportedProtocol() | httpx.InvalidURL() | httpx.TooManyRedirects():
            return Failure(f"{endpoint} leads to an address that is none: {first_line(error)}")
        case httpx.TransportError():
            return Failure(f"cannot reach {_host(error)} ({first_line(error)})", temporary=True)
        case _:  # on nonsense from a server huggingface_hub may raise anything
            kind = type(error).__name__
            return Failure(
                f"{endpoint} gives an answer that makes no sense ({kind}: {first_line(error)})",
                temporary=True,
            )


def _describe_status(error: Any) -> Failure:
    """What an HTTP error status means, with the server's own words if there are any."""
    status = error.response.status_code
    said = " ".join((error.server_message or "").split()).rstrip(".")
    reason = f"{_host(error)} answers {status}" + (f": {said}" if said else "")
    if status == 401 or (status == 403 and not said):
        return Failure(f"{reason}; set another HF_TOKEN or run `hf auth login`")
    if status < 500 and status not in (408, 425, 429):
        return Failure(reason)
    seconds = error.response.headers.get("retry-after", "").strip()
    retry_after = float(seconds) if seconds.isdecimal() else None
    return Failure(reason, temporary=True, retry_after=retry_after)


def _host(error: Any) -> str:
    """Where a failed request went."""
    from huggingface_hub import constants

    try:
        url = error.request.url
    except (AttributeError, RuntimeError):  # it failed before there was a request
        return constants.ENDPOINT
    return f"{url.scheme}://{url.netloc.decode()}"


def _is_certificate_error(error: BaseException | None) -> bool:
    """Whether a server's certificate was refused, which another attempt does not change."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None


def _is_disk_error(error: Exception) -> bool:
    """Whether this machine's disk failed, not the network; such errors are left as they are."""
    network = isinstance(error, (ConnectionError, TimeoutError))
    return isinstance(error, OSError) and error.errno is not None and not network


def _unwrap(error: Exception) -> Exception:
    """The error itself, where huggingface_hub says which file or download it was about."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    wrappers = (RuntimeError, LocalEntryNotFoundError)
    while isinstance(error, wrappers) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def http_library() -> Any:
    """What huggingface_hub asks with: httpx, or httpx2 since its version 2."""
    from huggingface_hub.errors import HfHubHTTPError

    (base, *_) = HfHubHTTPError.__bases__
    return importlib.import_module(base.__module__.partition(".")[0])


@contextmanager
def hidden_progress_bars() -> Iterator[None]:
    """Inside the block huggingface_hub shows no bars, unless its own setting says otherwise."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def uploading_client() -> Iterator[None]:
    """Inside the block huggingface_hub prints errors only, and a request that stalls fails.

    It would wait forever. A client that the user configured keeps the timeouts it has.
    """
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import _http
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity

    factory, verbosity = _http._GLOBAL_CLIENT_FACTORY, get_verbosity()

    def factory_with_timeout() -> Any:
        client = factory()
        if set(client.timeout.as_dict().values()) == {None}:
            client.timeout = max(STALL_SECONDS, constants.HF_HUB_DOWNLOAD_TIMEOUT)
        return client

    set_client_factory(factory_with_timeout)
    set_verbosity(logging.ERROR)
    try:
        with hidden_progress_bars():
            yield
    finally:
        set_verbosity(verbosity)
        set_client_factory(factory)
