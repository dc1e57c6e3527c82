"""Base and donor straight from the Hub: spans stream into a bounded buffer ahead of the loop.

The loop's windows are known beforehand, so the spans of each file are fetched in the order of
their use: neighbours are joined into one request, several requests are under way at once, and what
arrives waits in a ring buffer until its window is done. Nothing is stored on the disk.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.mapped_files import MappedFiles
from ..checkpoints.span import Span
from ..errors import HubError
from ..hub.remote_file import PARALLEL_REQUESTS, RemoteFile
from .ring_buffer import ALIGNMENT, RingBuffer

if TYPE_CHECKING:
    from ..checkpoints.mapped_files import Bytes

REMOTE_WINDOW = 2 << 20
"""Bytes of output per kernel call: small, so that many requests fit into the buffer."""
REQUEST = 3 << 20
"""Bytes of one request, unless a span alone takes more."""
BUFFER = 24 << 20
"""Bytes that are under way, waiting or in use."""
GAP = 64 << 10
"""Bytes between two spans that are fetched along rather than asking twice."""


@dataclass(slots=True, eq=False)
class _Request:
    """A stretch of one file, and the spans of it that are used one after the other.

    uses: spans not yet released. memory: what the buffer gave for it; `data` is the part of it that
    the bytes fill.
    """

    path: Path
    file: RemoteFile
    start: int
    stop: int
    last_window: int
    uses: int = 0
    memory: Bytes | None = None
    data: Bytes | None = None
    arrived: bool = False

    def add(self, span: Span, window: int) -> bool:
        """Join the span used next in the file, if it is within or near enough; else False."""
        inside = self.start <= span.start and span.stop <= self.stop
        near = 0 <= span.start - self.stop <= GAP and span.stop - self.start <= REQUEST
        if not (inside or near) or window - self.last_window > 1:
            return False
        self.stop, self.last_window = max(self.stop, span.stop), window
        return True

    def view(self, span: Span) -> Bytes:
        """A span's bytes, once they arrived."""
        assert self.data is not None
        return self.data[span.start - self.start : span.stop - self.start]


class RangeSource(AbstractContextManager["RangeSource"]):
    """The spans of one run of the loop: those of `remote` files by ranges, others from the disk.

    windows: the spans of each window, in order, as the loop will ask for them, once each. Anonymous
    memory: BUFFER, or what one window needs if that is more.
    """

    def __init__(
        self, remote: Mapping[Path, RemoteFile], windows: Iterable[Sequence[Span]]
    ) -> None:
        self._remote, self._files = remote, MappedFiles()
        self._requests = _plan_requests(remote, windows, self._register)
        self._requests_lock = threading.Lock()
        self._requests_of: dict[tuple[Path, int, int], deque[_Request]] = {}
        self._digests = {path: _Digest(file) for path, file in remote.items() if file.sha256}
        self._used: set[Path] = set()
        # What follows is shared with the lanes and guarded by _changed
        self._changed = threading.Condition()
        self._ring = RingBuffer(BUFFER)
        self._stop = threading.Event()
        self._busy = 0
        """Requests being fetched, and spans about to be released."""
        self._loop_waits = False
        self._failure: BaseException | None = None
        self._lanes = [
            threading.Thread(target=self._run_lane, daemon=True) for _ in range(PARALLEL_REQUESTS)
        ]
        for lane in self._lanes:
            lane.start()

    def __exit__(self, *_: object) -> None:
        """End all requests."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        for lane in self._lanes:
            lane.join()
        self._files.close()

    def finish(self) -> list[str]:
        """After the run: the files, as `org/name: file`, whose digest could not be checked.

        That is because not all of a file was read, or not in order. HubError for a file whose
        digest is not the Hub's.
        """
        if self._failure is not None:
            raise self._failure
        return [
            f"{file.repo_id}: {file.name}"
            for path, file in self._remote.items()
            if path in self._used and not (path in self._digests and self._digests[path].complete)
        ]

    def view(self, span: Span) -> Bytes:
        """The span's bytes; waits for them."""
        if span.path not in self._remote:
            return self._files.view(span)
        view = self._wait_for(span).view(span)
        address = view.__array_interface__["data"][0]
        return view.copy() if address % span.dtype.itemsize else view

    def prefetch(self, span: Span) -> list[Callable[[], None]]:
        """Nothing for spans of the Hub, which are under way already."""
        return [] if span.path in self._remote else self._files.prefetch(span)

    def release(self, span: Span, *, evict: bool) -> Callable[[], None] | None:
        """A call that digests the span, and frees the memory of its request after its last span."""
        if span.path not in self._remote:
            return self._files.release(span, evict=evict)
        self._used.add(span.path)
        digest = self._digests.get(span.path)
        if digest is not None and not digest.is_next(span):
            digest = None
        with self._changed:
            request = self._requests_of[_key(span)].popleft()
            if not self._requests_of[_key(span)]:
                del self._requests_of[_key(span)]
            self._busy += 1
        return partial(self._release, request, request.view(span), digest)

    def _release(self, request: _Request, view: Bytes, digest: _Digest | None) -> None:
        failure = None
        try:
            if digest is not None:
                digest.update(view)
        except HubError as error:
            failure = error
        with self._changed:
            self._failure = self._failure or failure
            self._busy -= 1
            request.uses -= 1
            if request.uses == 0 and request.memory is not None:
                self._ring.give_back(request.memory)
                request.memory = request.data = None
            self._changed.notify_all()

    def _register(self, span: Span, request: _Request) -> None:
        """Note which request brings a span, before the loop can ask for it."""
        with self._changed:
            self._requests_of.setdefault(_key(span), deque()).append(request)
            request.uses += 1
            self._changed.notify_all()

    def _wait_for(self, span: Span) -> _Request:
        """The request that brings a span, once it arrived."""
        with self._changed:
            while True:
                requests = self._requests_of.get(_key(span))
                if requests and requests[0].arrived:
                    self._loop_waits = False
                    return requests[0]
                if self._failure is not None and not self._busy:  # what came before it is used up
                    raise self._failure
                self._loop_waits = True
                self._changed.notify_all()
                self._changed.wait()

    def _run_lane(self) -> None:
        """Fetch one request after the other, until there are no more or one fails."""
        try:
            while (request := self._next_request()) is not None:
                assert request.data is not None
                try:
                    request.file.read_into(request.start, memoryview(request.data), self._stop)  # type: ignore[arg-type]
                    request.arrived = True
                finally:
                    with self._changed:
                        self._busy -= 1
                        self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _next_request(self) -> _Request | None:
        """The next request in order, once there is memory for its bytes; None at the end."""
        with self._requests_lock:
            request = None if self._has_ended() else next(self._requests, None)
            if request is None:
                return None
            # As aligned in memory as in the file
            shift, nbytes = request.start % ALIGNMENT, request.stop - request.start
            with self._changed:
                while not self._has_ended():
                    request.memory = self._take_memory(shift + nbytes)
                    if request.memory is not None:
                        request.data = request.memory[shift : shift + nbytes]
                        self._busy += 1
                        return request
                    self._changed.wait()
            return None

    def _has_ended(self) -> bool:
        return self._stop.is_set() or self._failure is not None

    def _take_memory(self, nbytes: int) -> Bytes | None:
        """Memory of the ring buffer, if it has room.

        Of the heap where the loop waits and nothing else will make room: for a window that needs
        more than the buffer.
        """
        import numpy as np

        memory = self._ring.take(nbytes)
        if memory is None and self._loop_waits and not self._busy:
            return np.empty(nbytes, np.uint8)
        return memory


def _key(span: Span) -> tuple[Path, int, int]:
    return span.path, span.start, span.stop


def _plan_requests(
    remote: Mapping[Path, RemoteFile],
    windows: Iterable[Sequence[Span]],
    register: Callable[[Span, _Request], None],
) -> Iterator[_Request]:
    """The requests, in the order of their first use; nothing is added to one after it is yielded.

    Each file has one open request at most, to which the spans of the next windows may be joined.
    """
    open_requests: dict[Path, _Request] = {}
    ordered: deque[_Request] = deque()

    def close_first() -> _Request:
        request = ordered.popleft()
        if open_requests.get(request.path) is request:
            del open_requests[request.path]
        return request

    for window, spans in enumerate(windows):
        for span in spans:
            if span.path not in remote:
                continue
            request = open_requests.get(span.path)
            if request is None or not request.add(span, window):
                file = remote[span.path]
                request = _Request(span.path, file, span.start, span.stop, window)
                open_requests[span.path] = request
                ordered.append(request)
            register(span, request)
        while ordered and (
            ordered[0].last_window < window or open_requests.get(ordered[0].path) is not ordered[0]
        ):
            yield close_first()
    while ordered:
        yield close_first()


class _Digest:
    """The sha256 of a file whose bytes come by, as long as they come in order.

    complete: all of it came, and the digest is the Hub's.
    """

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._sha256 = file, hashlib.sha256(file.header)
        self._next = len(file.header) if file.header else -1
        self._digested = self._next
        self.complete = False

    def is_next(self, span: Span) -> bool:
        """Whether a span follows the last one; from the first that does not on, none does."""
        if span.start != self._next:
            self._next = -1
            return False
        self._next = span.stop
        return True

    def update(self, view: Bytes) -> None:
        """Digest a span that is next. HubError at the end of a file that is not the Hub's."""
        self._sha256.update(memoryview(view))  # type: ignore[arg-type]  # a buffer from 3.12 on
        self._digested += len(view)
        if self._digested == self._file.size:
            self._file.check_sha256(self._sha256.hexdigest())
            self.complete = True
