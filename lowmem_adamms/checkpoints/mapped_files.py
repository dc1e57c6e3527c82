"""Mapped reads of weight files: pages are brought in ahead of use and let go behind it.

A mapping costs no anonymous memory; its pages are the kernel's to evict. Reading ahead and letting
go happen in aligned blocks, whatever the tensors' bounds: whole blocks make requests of full size,
and hold the cache's large folios whole, which could not be dropped by halves. On Linux 5.14 and
later a block is populated by an explicit call, elsewhere by advice. Leaves to others: what is read,
in which order, and when it is done with.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..closing import Closing
from ..errors import FormatError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .span import Span

    Bytes = npt.NDArray[np.uint8]

W = TypeVar("W")
_POPULATE_READ = 22  # MADV_POPULATE_READ, linux/mman.h; not in Python's mmap module
BLOCK = 8 << 20
"""Bytes brought in or let go at a time, from multiples of it on."""


class MappedFile:
    """One file, mapped read-only for as long as the object is open."""

    def __init__(self, path: Path) -> None:
        import numpy as np

        self._path = path
        self._file = path.open("rb")
        if not os.fstat(self._file.fileno()).st_size:
            self._file.close()
            raise _cut(path, 0, 1)
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes: Bytes = np.frombuffer(self._map, np.uint8)
        self._address: int = self._bytes.__array_interface__["data"][0]

    def view(self, start: int, stop: int) -> Bytes:
        """The bytes from `start` to `stop`; must not be used after close().

        FormatError if the file ends before them, as one that was cut since its header was read.
        """
        if stop > self._bytes.size:
            raise _cut(self._path, self._bytes.size, stop)
        return self._bytes[start:stop]

    def populate(self, block: int) -> None:
        """Bring a block's pages in now, without the GIL. Only ever advice: errors are ignored."""
        start = block * BLOCK
        length = min(BLOCK, self._bytes.size - start)
        if length <= 0:  # said when the bytes are asked for
            return
        if _madvise(self._address + start, length, _POPULATE_READ) != 0:
            self._map.madvise(mmap.MADV_WILLNEED, start, length)

    def release(self, first: int, last: int, *, evict: bool) -> None:
        """Unmap blocks `first` to `last - 1`; with `evict` also drop them from the page cache."""
        start, stop = first * BLOCK, min(last * BLOCK, self._bytes.size)
        if start < stop:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)
            if evict:
                evict_range(self._file.fileno(), start, stop)

    def close(self) -> None:
        """Unmap; views handed out before keep the mapping alive until they are gone."""
        del self._bytes
        with contextlib.suppress(BufferError):
            self._map.close()
        self._file.close()


def _cut(path: Path, size: int, needed: int) -> FormatError:
    return FormatError(
        f"{path}: {size} bytes, expected {needed} or more as when the plan was made; put it back"
    )


class MappedFiles(Closing):
    """Mapped files, opened on first use and closed together. Used by one thread.

    keep: leave what was brought in mapped, for whoever reads it again; the kernel still evicts it
    when memory is short.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self.keep = keep
        self._open: dict[Path, MappedFile] = {}
        self._asked: set[tuple[Path, int]] = set()

    def close(self) -> None:
        """Unmap all files; they are opened again if they are needed."""
        for mapped in self._open.values():
            mapped.close()
        self._open.clear()
        self._asked.clear()

    def unmap(self, path: Path) -> None:
        """Unmap one file."""
        if path in self._open:
            self._open.pop(path).close()
        self._asked = {asked for asked in self._asked if asked[0] != path}

    def view(self, span: Span) -> Bytes:
        """The span's bytes where they are mapped, or a copy where they are not aligned."""
        view = self._mapped(span.path).view(span.start, span.stop)
        return view.copy() if span.start % span.dtype.itemsize else view

    def prefetch(self, span: Span) -> list[Callable[[], None]]:
        """Calls, for any thread, that bring in those blocks of a span nobody has asked for yet."""
        mapped = self._mapped(span.path)
        blocks = range(span.start // BLOCK, -(-span.stop // BLOCK))
        fresh = [block for block in blocks if (span.path, block) not in self._asked]
        self._asked.update((span.path, block) for block in fresh)
        return [partial(mapped.populate, block) for block in fresh]

    def release(self, span: Span, *, evict: bool) -> Callable[[], None] | None:
        """A call, for any thread, that lets go of the blocks which end inside a span, if any do.

        evict: also from the page cache.
        """
        first, last = span.start // BLOCK, span.stop // BLOCK
        if self.keep or first == last:
            return None
        self._asked.difference_update((span.path, block) for block in range(first, last))
        return partial(self._mapped(span.path).release, first, last, evict=evict)

    def _mapped(self, path: Path) -> MappedFile:
        if path not in self._open:
            self._open[path] = MappedFile(path)
        return self._open[path]


def _libc_call(name: str) -> Callable[..., int] | None:
    """A libc function called without the GIL, or None where there is none of that name."""
    if not sys.platform.startswith("linux"):
        return None
    function: Any = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    return function  # type: ignore[no-any-return]


_libc_madvise = _libc_call("madvise")
_libc_sync_file_range = _libc_call("sync_file_range")


def _madvise(address: int, length: int, advice: int) -> int:
    if _libc_madvise is None:
        return -1
    return _libc_madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_int(advice))


def evict_range(fd: int, start: int, stop: int) -> None:
    """Drop clean, unmapped pages of a range from the page cache."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, start, stop - start, os.POSIX_FADV_DONTNEED)


def flush_range(fd: int, start: int, stop: int, *, wait: bool = False) -> None:
    """Have dirty pages of a range written out now, so that fsync finds little left (Linux)."""
    if _libc_sync_file_range is not None and start < stop:
        length = ctypes.c_int64(stop - start)
        flags = 7 if wait else 2  # WAIT_BEFORE | WRITE | WAIT_AFTER, or WRITE alone
        _libc_sync_file_range(ctypes.c_int(fd), ctypes.c_int64(start), length, ctypes.c_uint(flags))


def file_digest(path: Path, digest: Any) -> str:
    """In hex, what a digest such as `hashlib.sha256()` makes of a whole file."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return str(digest.hexdigest())


def read_ahead(
    windows: Iterable[W],
    spans: Callable[[W], Iterable[Sequence[Span]]],
    ahead: Callable[[Span], Iterable[Callable[[], None]]],
    readers: Sequence[ThreadPoolExecutor],
    count: int,
) -> Iterator[W]:
    """The same windows, each with its pages brought in; `count` more are under way behind it.

    spans: what a window reads, in groups, the nth span of each for the nth reader. ahead: how a
    span's pages are brought in, as calls that may run in any order.
    """
    queue: deque[tuple[W, list[Future[None]]]] = deque()

    def first() -> W:
        window, futures = queue.popleft()
        for future in futures:
            future.result()
        return window

    for window in windows:
        futures: list[Future[None]] = []
        for group in spans(window):
            for reader, span in zip(readers, group, strict=False):
                futures += map(reader.submit, ahead(span))
        queue.append((window, futures))
        if len(queue) > count:
            yield first()
    while queue:
        yield first()
