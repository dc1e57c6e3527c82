"""GET requests whose body is received where it is wanted, over huggingface_hub's client or plainly.

Where nothing but plain HTTP is configured (an endpoint or mirror on this machine or network, no
proxy, no client of the user's own), the standard library's connections receive straight into the
buffer, at a third of the processor time; everything else goes through huggingface_hub's client.
Leaves to others: what an answer means (`wire.py`).
"""

from __future__ import annotations

import atexit
import functools
import http.client
import importlib
import inspect
import io
import socket
import struct
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, headers (lower case), who answers, and its body.

    receive: puts the next bytes of the body at the start of a buffer; how many, 0 at the end.
    """

    status: int
    headers: Mapping[str, str]
    host: str
    receive: Callable[[memoryview], int]


class TransportError(Exception):
    """The network failed; another attempt may not."""


def hub_utils() -> Any:
    """huggingface_hub's public helpers; their module does not tell type checkers so."""
    return importlib.import_module("huggingface_hub.utils")


@contextmanager
def get(url: str, headers: Mapping[str, str], timeout: float) -> Iterator[Answer]:
    """One request, redirects not followed. Raises the client's own errors, or TransportError."""
    split = urlsplit(url)
    if _is_plain(split):
        with _plainly(split, headers, timeout) as answer:
            yield answer
        return
    options: dict[str, Any] = {"headers": headers, "follow_redirects": False, "timeout": timeout}
    with hub_utils().get_session().stream("GET", url, **options) as response:
        chunks = response.iter_raw()
        rest = b""

        def receive(view: memoryview) -> int:
            nonlocal rest
            rest = rest or next(chunks, b"")
            taken, rest = rest[: len(view)], rest[len(view) :]
            view[: len(taken)] = taken
            return len(taken)

        with closing(chunks):
            yield Answer(response.status_code, response.headers, split.hostname or "", receive)


@contextmanager
def impatient(seconds: float) -> Iterator[None]:
    """Within, a request of huggingface_hub's client fails when nothing moves for so long.

    By default it waits for ever. A client of the user's own that has timeouts keeps them.
    """
    from huggingface_hub import set_client_factory

    before, _ = _factories()
    if before is None:
        yield
        return

    @functools.wraps(before)
    def factory() -> Any:
        client = before()
        if set(client.timeout.as_dict().values()) == {None}:
            client.timeout = seconds
        return client

    set_client_factory(factory)
    try:
        yield
    finally:
        set_client_factory(before)


def _factories() -> tuple[Any, Any]:
    """What makes huggingface_hub's client, and what does unless the user says otherwise."""
    inner = importlib.import_module("huggingface_hub.utils._http")
    names = ("_GLOBAL_CLIENT_FACTORY", "default_client_factory")
    current, default = (getattr(inner, name, None) for name in names)
    return current, default


def _is_plain(split: SplitResult) -> bool:
    """Whether the client would do nothing that a bare connection does not."""
    proxies = urllib.request.getproxies()
    proxied = any(kind in proxies for kind in ("http", "all"))
    factory, default = _factories()
    ours = factory is not None and inspect.unwrap(factory) is default
    return split.scheme == "http" and not proxied and ours


class _Pool:
    """Connections that may be used again, by host and port."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[str, list[http.client.HTTPConnection]] = {}
        atexit.register(self.close)

    def take(self, place: str) -> http.client.HTTPConnection | None:
        """An open one, if there is any."""
        with self._lock:
            idle = self._idle.get(place)
            return idle.pop() if idle else None

    def give_back(self, place: str, connection: http.client.HTTPConnection) -> None:
        """Keep one whose answer was received to its end."""
        with self._lock:
            self._idle.setdefault(place, []).append(connection)

    def close(self) -> None:
        """Close all that are not in use."""
        with self._lock:
            for connection in (one for idle in self._idle.values() for one in idle):
                connection.close()
            self._idle.clear()


_POOL = _Pool()


def _asked(
    split: SplitResult, headers: Mapping[str, str], timeout: float
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """A request sent and the head of its answer; TransportError if neither comes."""
    target = split.path + (f"?{split.query}" if split.query else "")
    while True:
        used = _POOL.take(split.netloc)
        connection = used or http.client.HTTPConnection(split.netloc, timeout=timeout)
        try:
            connection.request("GET", target, headers=dict(headers))
            return connection, connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            if used is None:  # one that was used before may have been closed in the meantime
                raise TransportError(f"{split.netloc}: {error!r}") from None


@contextmanager
def _plainly(split: SplitResult, headers: Mapping[str, str], timeout: float) -> Iterator[Answer]:
    connection, response = _asked(split, headers, timeout)
    body = _Body(connection, response, timeout)

    def receive(view: memoryview) -> int:
        try:
            return body.receive(view)
        except BlockingIOError:
            raise TransportError(f"{split.netloc}: nothing for {timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise TransportError(f"{split.netloc}: {error!r}") from None

    lower = {key.lower(): value for key, value in response.getheaders()}
    try:
        yield Answer(response.status, lower, split.hostname or "", receive)
    finally:
        again = body.left == 0 and not response.will_close and not response.chunked
        response.close()
        if again:
            _POOL.give_back(split.netloc, connection)
        else:
            connection.close()


class _Body:
    """What follows an answer's head, received in as few system calls as can be.

    left: bytes to come, None if the answer does not tell. BlockingIOError after `timeout` seconds
    without a byte.
    """

    def __init__(
        self,
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
        timeout: float,
    ) -> None:
        self.left = response.length
        self._response, self._socket = response, connection.sock
        self._read_before = True  # there may be something in the buffer that the head came in
        if self._socket is not None:  # it is None where the connection ends with the answer
            wait = struct.pack("@ll", int(timeout), int(timeout % 1 * 1e6))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)

    def receive(self, view: memoryview) -> int:
        """Fill the view; less where the network pauses or the body ends."""
        if self._response.fp is None or self.left == 0:
            return 0
        if self._response.chunked:
            return self._response.readinto(view)
        count = self._some(view if self.left is None else view[: self.left])
        self.left = None if self.left is None else self.left - count
        return count

    def _some(self, wanted: memoryview) -> int:
        if self._read_before:
            # No more than the buffer holds, and not response.readinto: both would ask the network
            # behind what is there already, and lose it if that breaks
            first = wanted[: io.DEFAULT_BUFFER_SIZE]
            count: int = self._response.fp.readinto1(first)
            self._read_before = self._socket is None or count == len(first)
            return count
        before = self._socket.gettimeout()
        self._socket.settimeout(None)  # else Python itself waits, and returns for every packet
        try:
            return self._socket.recv_into(wanted, flags=socket.MSG_WAITALL)
        finally:
            self._socket.settimeout(before)
