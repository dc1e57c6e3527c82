"""How the Hub is asked: one retry, one table of errors, and huggingface_hub's settings.

All requests go through huggingface_hub, so tokens, endpoint, proxies and certificates are those
that its other users know. Names that it does not document are used in this file only.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ..errors import HubError, MergeError, first_line

ATTEMPTS = 8
"""Attempts at one range of a file, which take about a minute where each fails at once."""
FEW_ATTEMPTS = 3
"""Attempts where there may be no network at all, or where huggingface_hub makes its own."""
FIRST_PAUSE = 0.5
"""Seconds before the second attempt; each pause after it is twice as long, to LONGEST_PAUSE."""
LONGEST_PAUSE = 20.0
STALL_SECONDS = 120.0
"""Seconds without a byte after which an upload's request has failed."""
RUN_AGAIN = "; run the same command again to go on"

_T = TypeVar("_T")


class TemporaryError(Exception):
    """A request failed in a way that the next attempt may not."""


def ask(
    subject: str,
    request: Callable[[], _T],
    *,
    error_class: type[MergeError] = HubError,
    attempts: int = FEW_ATTEMPTS,
    stop: threading.Event | None = None,
    advice: str = RUN_AGAIN,
) -> _T:
    """Return what `request` returns, trying again while the network or a server fails temporarily.

    At the end error_class is raised, from the last failure: "subject: reason", and the advice where
    only the attempts were used up. Once `stop` is set, no further attempt is made.
    """
    stop = stop or threading.Event()
    pause = FIRST_PAUSE
    while True:
        attempts -= 1
        try:
            return request()
        except Exception as error:
            cause = _unwrap(error)
            if isinstance(cause, MergeError) or _is_disk_error(cause):
                raise cause from None
            reason, temporary = _describe(cause)
            if not temporary:
                raise error_class(f"{subject}: {reason}") from cause
            if attempts == 0 or stop.wait(pause):
                raise error_class(f"{subject}: {reason}{advice}") from cause
        pause = min(2 * pause, LONGEST_PAUSE)


def _describe(error: Exception) -> tuple[str, bool]:
    """The table of errors: what one of huggingface_hub or httpx means, and if it may pass."""
    from huggingface_hub import constants, errors

    httpx = http_library()
    endpoint = constants.ENDPOINT
    match error:
        case TemporaryError():
            return str(error), True
        case errors.GatedRepoError():
            return f"gated; accept its conditions on its page at {endpoint} and set HF_TOKEN", False
        case errors.RepositoryNotFoundError():
            advice = "check the name, or set HF_TOKEN"
            return f"no such repository at {endpoint}, or a private one; {advice}", False
        case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError():
            return (
                f"not, or not whole, in the cache at {constants.HF_HUB_CACHE}, nor a folder or file"
                " here; and the Hub cannot be reached or HF_HUB_OFFLINE is set"
            ), False
        case errors.HFValidationError():
            return f"not the name of a repository: {first_line(error)}", False
        case errors.HfHubHTTPError():
            return _describe_status(error)
        case httpx.TimeoutException():
            return f"{_host(error.request.url)} sent or took nothing for too long", True
        case httpx.TransportError() if "CERTIFICATE_VERIFY_FAILED" in str(error):
            advice = "to trust its certificate, set SSL_CERT_FILE to a file with its authority's"
            return f"cannot reach {_host(error.request.url)} ({first_line(error)}); {advice}", False
        case httpx.TransportError():
            return f"cannot reach {_host(error.request.url)} ({first_line(error)})", True
        case ValueError() if "README.md" in str(error):  # the Hub refuses the model card
            return " ".join(str(error).split()), False
        case _:  # on nonsense from a server huggingface_hub may raise anything
            said = f"{type(error).__name__}: {first_line(error)}"
            return f"{endpoint} gives an answer that makes no sense ({said})", True


def _describe_status(error: Any) -> tuple[str, bool]:
    """What an HTTP error status means, with the server's own words if there are any."""
    status = error.response.status_code
    said = " ".join((error.server_message or "").split()).rstrip(".")
    reason = f"{_host(error.response.url)} answers {status}" + (f": {said}" if said else "")
    if status == 401 or (status == 403 and not said):
        reason += "; set another HF_TOKEN or run `hf auth login`"
    return reason, status >= 500 or status in (408, 425, 429)


def _host(url: Any) -> str:
    return f"{url.scheme}://{url.netloc.decode()}"


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

    It would wait forever.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity

    factory, verbosity = _http._GLOBAL_CLIENT_FACTORY, get_verbosity()

    def factory_with_timeout() -> Any:
        client = factory()
        client.timeout = STALL_SECONDS
        return client

    set_client_factory(factory_with_timeout)
    set_verbosity(logging.ERROR)
    try:
        with hidden_progress_bars():
            yield
    finally:
        set_verbosity(verbosity)
        set_client_factory(factory)
