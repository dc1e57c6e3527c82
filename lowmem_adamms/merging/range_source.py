"""Base and donor straight from the Hub: spans stream into a bounded buffer ahead of the loop.

The loop's windows are known beforehand, so the spans of each file are fetched in the order of
their use: neighbours are joined into one request, several requests are under way at once, and what
arrives waits in a ring of BUDGET bytes until its window is done. Nothing is stored. Leaves to
others: requests (`wire.py`), which files are not here (`hub.py`).
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.mapped_files import MappedFiles
from ..checkpoints.span import Span
from ..closing import Closing
from ..hub.remote_file import PARALLEL_REQUESTS, RemoteFile

if TYPE_CHECKING:
    from ..checkpoints.mapped_files import Bytes

WINDOW = 2 << 20
"""Bytes of output per kernel call: small, so that many requests fit into the buffer."""
REQUEST = 3 << 20
"""Bytes of one request, unless a span alone takes more."""
BUDGET = 24 << 20
"""Bytes that are under way, waiting or in use."""
GAP = 64 << 10
"""Bytes between two spans that are fetched along rather than asking twice."""
_ALIGNED = 64


class _Unit:
    """One request: a stretch of a file that consecutive spans of it lie in."""

    __slots__ = ("data", "file", "last", "path", "ready", "room", "start", "stop", "uses")

    def __init__(self, path: Path, file: RemoteFile, start: int, stop: int, window: int) -> None:
        self.path, self.file, self.start, self.stop = path, file, start, stop
        self.last, self.uses = window, 1
        self.room: Bytes | None = None
        self.data: Bytes | None = None
        self.ready = False

    def takes(self, span: Span, window: int) -> bool:
        """Whether a span that is used next in its file lies in it, or may be joined to it."""
        inside = self.start <= span.start and span.stop <= self.stop
        near = 0 <= span.start - self.stop <= GAP and span.stop - self.start <= REQUEST
        return (inside or near) and window - self.last <= 1

    def of(self, span: Span) -> Bytes:
        """A span's bytes."""
        assert self.data is not None
        return self.data[span.start - self.start : span.stop - self.start]


class _Ring:
    """Stretches of one buffer, handed out and given back in about the same order."""

    def __init__(self, size: int) -> None:
        import numpy as np

        self._buffer = np.empty(size, np.uint8)
        self._taken: deque[list[int]] = deque()  # [start, stop, in use], oldest first

    def take(self, nbytes: int) -> Bytes | None:
        """A stretch that starts at a multiple of _ALIGNED, or None while there is no room."""
        nbytes = _rounded(nbytes)
        start = self._taken[-1][1] if self._taken else 0
        first = self._taken[0][0] if self._taken else 0
        if self._taken and start <= first:  # wrapped: free is what lies between
            if start + nbytes > first:
                return None
        elif start + nbytes > self._buffer.size:
            start = 0
            if nbytes > (first if self._taken else self._buffer.size):
                return None
        self._taken.append([start, start + nbytes, 1])
        return self._buffer[start : start + nbytes]

    def give_back(self, stretch: Bytes) -> None:
        """Room again, once everything handed out before it is back too."""
        start = stretch.__array_interface__["data"][0] - self._buffer.__array_interface__["data"][0]
        for taken in self._taken:
            if taken[0] == start and taken[2]:
                taken[2] = 0
                break
        while self._taken and not self._taken[0][2]:
            self._taken.popleft()


class RangeSource(Closing):
    """The spans of one run of the loop, those of `remote` files by ranges, others from disk.

    windows: the spans of each window, in order, as the loop will ask for them, once each. Anonymous
    memory: BUDGET, or what one window needs if that is more. unchecked: the remote files whose
    bytes could not be held against the Hub's digest, because not all were read, or not in order.
    """

    def __init__(
        self, remote: Mapping[Path, RemoteFile], windows: Iterable[Sequence[Span]]
    ) -> None:
        self._remote, self._files = remote, MappedFiles()
        self._units = _units(remote, windows, self._register)
        self._uses: dict[tuple[Path, int, int], deque[_Unit]] = {}
        self._turn, self._changed = threading.Lock(), threading.Condition()
        self._stop = threading.Event()
        self._ring = _Ring(BUDGET)
        self._busy = 0  # units being fetched, and spans being digested
        self._hungry = False
        self._failure: BaseException | None = None
        self._used: set[Path] = set()
        self._digests = {path: _Digest(file) for path, file in remote.items() if file.sha256}
        self._hasher = ThreadPoolExecutor(1, "sha256")
        self._hashing: deque[Future[None]] = deque()
        self._lanes = [
            threading.Thread(target=self._lane, daemon=True) for _ in range(PARALLEL_REQUESTS)
        ]
        for lane in self._lanes:
            lane.start()

    def close(self) -> None:
        """End all requests."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        for lane in self._lanes:
            lane.join()
        self._hasher.shutdown()
        self._files.close()

    def finish(self) -> list[str]:
        """After the run: `org/name: file` of what could not be checked; HubError for a bad file."""
        while self._hashing:
            self._hashing.popleft().result()
        return [
            f"{file.repo_id}: {file.name}"
            for path, file in self._remote.items()
            if path in self._used and not (path in self._digests and self._digests[path].complete)
        ]

    def view(self, span: Span) -> Bytes:
        """The span's bytes; waits for them. Valid until `release`."""
        if span.path not in self._remote:
            return self._files.view(span)
        view = self._unit(span).of(span)
        address = view.__array_interface__["data"][0]
        return view.copy() if address % span.dtype.itemsize else view

    def prefetch(self, span: Span) -> list[Callable[[], None]]:
        """Nothing for the Hub's, which are ahead already."""
        return [] if span.path in self._remote else self._files.prefetch(span)

    def release(self, span: Span, *, evict: bool) -> Callable[[], None] | None:
        """Digest a span, and let go of its unit with the last span in it."""
        if span.path not in self._remote:
            return self._files.release(span, evict=evict)
        with self._changed:
            self._used.add(span.path)
            unit = self._uses[_key(span)].popleft()
            if not self._uses[_key(span)]:
                del self._uses[_key(span)]
            digest = self._digests.get(span.path)
            follows = digest is not None and digest.follows(span)
            self._busy += follows
        while self._hashing and self._hashing[0].done():
            self._hashing.popleft().result()
        if digest is not None and follows:
            self._hashing.append(self._hasher.submit(self._hash, digest, unit.of(span), unit))
        else:
            self._let_go(unit)
        return None

    def _hash(self, digest: _Digest, view: Bytes, unit: _Unit) -> None:
        try:
            digest.update(view)
        finally:
            self._let_go(unit, busy=1)

    def _let_go(self, unit: _Unit, *, busy: int = 0) -> None:
        with self._changed:
            self._busy -= busy
            unit.uses -= 1
            if unit.uses == 0 and unit.room is not None:
                self._ring.give_back(unit.room)
                unit.room = unit.data = None
            self._changed.notify_all()

    def _register(self, span: Span, unit: _Unit) -> None:
        """Note which unit a span comes in, before anybody asks for it."""
        with self._changed:
            self._uses.setdefault(_key(span), deque()).append(unit)
            self._changed.notify_all()

    def _unit(self, span: Span) -> _Unit:
        """The unit that a span comes in, fetched."""
        with self._changed:
            while True:
                waiting = self._uses.get(_key(span))
                if waiting and waiting[0].ready:
                    self._hungry = False
                    return waiting[0]
                if self._failure is not None and not self._busy:  # what came before it is used up
                    raise self._failure
                self._hungry = True
                self._changed.notify_all()
                self._changed.wait()

    def _lane(self) -> None:
        try:
            while (unit := self._next()) is not None:
                assert unit.data is not None
                try:
                    unit.file.read_into(unit.start, memoryview(unit.data), self._stop)  # type: ignore[arg-type]
                    unit.ready = True
                finally:
                    with self._changed:
                        self._busy -= 1
                        self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _next(self) -> _Unit | None:
        """The next unit in order, with room for its bytes; None at the end."""
        with self._turn:
            unit = None if self._ended() else next(self._units, None)
            if unit is None:
                return None
            with self._changed:
                while not self._ended():
                    shift, nbytes = unit.start % _ALIGNED, unit.stop - unit.start
                    unit.room = self._room(shift + nbytes)
                    if unit.room is not None:
                        unit.data = unit.room[shift : shift + nbytes]
                        self._busy += 1
                        return unit
                    self._changed.wait()
            return None

    def _ended(self) -> bool:
        """Whether nothing more is to be fetched."""
        return self._stop.is_set() or self._failure is not None

    def _room(self, nbytes: int) -> Bytes | None:
        """Of the ring; of the heap where the loop waits and nothing else is to come: a window that
        needs more than the ring has.
        """
        import numpy as np

        if (stretch := self._ring.take(nbytes)) is not None:
            return stretch
        return np.empty(nbytes, np.uint8) if self._hungry and not self._busy else None


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED


def _key(span: Span) -> tuple[Path, int, int]:
    return span.path, span.start, span.stop


def _units(
    remote: Mapping[Path, RemoteFile],
    windows: Iterable[Sequence[Span]],
    register: Callable[[Span, _Unit], None],
) -> Iterator[_Unit]:
    """The requests, in the order of their first use; each is closed before it is yielded."""
    open_units: dict[Path, _Unit] = {}
    order: deque[_Unit] = deque()
    for window, spans in enumerate(windows):
        for span in spans:
            if span.path not in remote:
                continue
            unit = open_units.get(span.path)
            if unit is not None and unit.takes(span, window):
                unit.stop, unit.last, unit.uses = span.stop, window, unit.uses + 1
            else:
                unit = _Unit(span.path, remote[span.path], span.start, span.stop, window)
                open_units[span.path] = unit
                order.append(unit)
            register(span, unit)
        while order and (window > order[0].last or open_units[order[0].path] is not order[0]):
            yield _closed(order.popleft(), open_units)
    while order:
        yield _closed(order.popleft(), open_units)


def _closed(unit: _Unit, open_units: dict[Path, _Unit]) -> _Unit:
    if open_units[unit.path] is unit:
        open_units[unit.path] = _Unit(unit.path, unit.file, -1, -1 - GAP, -1)  # takes nothing
    return unit


class _Digest:
    """The sha256 of a file whose bytes come by, as long as they come in order."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._sha256 = file, hashlib.sha256(file.header)
        self._next = len(file.header) if file.header else -1
        self._done = self._next
        self.complete = False

    def follows(self, span: Span) -> bool:
        """Whether a span is the file's next; from the first that is not on, none is."""
        if span.start != self._next:
            self._next = -1
            return False
        self._next = span.stop
        return True

    def update(self, view: Any) -> None:
        """Take bytes; HubError at the end of a file that is not what the Hub says."""
        self._sha256.update(view)
        self._done += len(view)
        if self._done == self._file.size:
            self._file.check_sha256(self._sha256.hexdigest())
            self.complete = True
