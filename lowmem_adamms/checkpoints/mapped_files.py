"""Mapped reads of weight files: pages are read ahead of use and released after it.

A mapping costs no anonymous memory; its pages are the kernel's to evict. Reading ahead and
releasing happen in aligned blocks, whatever the tensors' bounds: whole blocks make requests of full
size, and hold the cache's large folios whole, which could not be dropped by halves. On Linux 5.14
and later a block is populated by an explicit call, elsewhere by advice.
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

from ..errors import FormatError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .span import Span

    Bytes = npt.NDArray[np.uint8]

W = TypeVar("W")
BLOCK = 8 << 20
"""Bytes read ahead or released at a time, from multiples of it on."""
_MADV_POPULATE_READ = 22  # linux/mman.h; not in Python's mmap module
_WRITE = 2  # SYNC_FILE_RANGE_WRITE, linux/fs.h
_WAIT_WRITE_WAIT = 7  # SYNC_FILE_RANGE_WRITE_AND_WAIT


class MappedFile:
    """One file, mapped read-only for as long as the object is open."""

    def __init__(self, path: Path) -> None:
        import numpy as np

        self._path = path
        self._file = path.open("rb")
        if not os.fstat(self._file.fileno()).st_size:
            self._file.close()
            raise _too_short(path, 0, 1)
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes: Bytes = np.frombuffer(self._map, np.uint8)
        self._address: int = self._bytes.__array_interface__["data"][0]

    def view(self, start: int, stop: int) -> Bytes:
        """The bytes from `start` to `stop`; must not be used after close().

        FormatError if the file ends before them, as one that was cut since its header was read.
        """
        if stop > self._bytes.size:
            raise _too_short(self._path, self._bytes.size, stop)
        return self._bytes[start:stop]

    def populate_block(self, block: int) -> None:
        """Read a block's pages now, without the GIL. Only ever advice: errors are ignored."""
        start = block * BLOCK
        length = min(BLOCK, self._bytes.size - start)
        if length <= 0:  # `view` raises when the bytes are asked for
            return
        address, size = ctypes.c_void_p(self._address + start), ctypes.c_size_t(length)
        if _libc_madvise is None or _libc_madvise(address, size, _MADV_POPULATE_READ) != 0:
            self._map.madvise(mmap.MADV_WILLNEED, start, length)

    def release_blocks(self, first: int, stop: int, *, evict: bool) -> None:
        """Unmap blocks `first` to `stop - 1`; with `evict` also drop them from the page cache."""
        start_byte, stop_byte = first * BLOCK, min(stop * BLOCK, self._bytes.size)
        if start_byte < stop_byte:
            self._map.madvise(mmap.MADV_DONTNEED, start_byte, stop_byte - start_byte)
            if evict:
                evict_range(self._file.fileno(), start_byte, stop_byte)

    def close(self) -> None:
        """Unmap; views handed out before keep the mapping alive until they are gone."""
        del self._bytes
        with contextlib.suppress(BufferError):
            self._map.close()
        self._file.close()


def _too_short(path: Path, size: int, needed: int) -> FormatError:
    return FormatError(
        f"{path}: {size} bytes, expected {needed} or more as when the plan was made; put it back"
    )


class MappedFiles(contextlib.AbstractContextManager["MappedFiles"]):
    """Mapped files, opened on first use and closed together. Used by one thread.

    keep: leave pages mapped when they are released, for a later pass over the same files; the
    kernel still evicts them when memory is short.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self.keep = keep
        self._open: dict[Path, MappedFile] = {}
        self._prefetched: set[tuple[Path, int]] = set()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap all files; they are opened again if they are needed."""
        for mapped in self._open.values():
            mapped.close()
        self._open.clear()
        self._prefetched.clear()

    def view(self, span: Span) -> Bytes:
        """The span's bytes where they are mapped, or a copy where they are not aligned."""
        view = self._mapped(span.path).view(span.start, span.stop)
        return view.copy() if span.start % span.dtype.itemsize else view

    def prefetch(self, span: Span) -> list[Callable[[], None]]:
        """Calls, for any thread, that read the blocks of a span not prefetched before."""
        mapped = self._mapped(span.path)
        blocks = range(span.start // BLOCK, -(-span.stop // BLOCK))
        fresh = [block for block in blocks if (span.path, block) not in self._prefetched]
        self._prefetched.update((span.path, block) for block in fresh)
        return [partial(mapped.populate_block, block) for block in fresh]

    def release(self, span: Span, *, evict: bool) -> Callable[[], None] | None:
        """A call, for any thread, that releases the blocks which end inside a span, if any do.

        evict: also drop them from the page cache.
        """
        first, stop = span.start // BLOCK, span.stop // BLOCK
        if self.keep or first == stop:
            return None
        self._prefetched.difference_update((span.path, block) for block in range(first, stop))
        return partial(self._mapped(span.path).release_blocks, first, stop, evict=evict)

    def _mapped(self, path: Path) -> MappedFile:
        if path not in self._open:
            self._open[path] = MappedFile(path)
        return self._open[path]


def _libc_function(name: str) -> Callable[..., int] | None:
    """A libc function called without the GIL, or None where there is none of that name."""
    if not sys.platform.startswith("linux"):
        return None
    function: Any = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    return function  # type: ignore[no-any-return]


_libc_madvise = _libc_function("madvise")
_libc_sync_file_range = _libc_function("sync_file_range")


def evict_range(fd: int, start: int, stop: int) -> None:
    """Drop clean, unmapped pages of a range from the page cache."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, start, stop - start, os.POSIX_FADV_DONTNEED)


def flush_range(fd: int, start: int, stop: int, *, wait: bool = False) -> None:
    """Start writing a range's dirty pages to disk, so that fsync finds little left (Linux)."""
    if _libc_sync_file_range is not None and start < stop:
        length = ctypes.c_int64(stop - start)
        flags = ctypes.c_uint(_WAIT_WRITE_WAIT if wait else _WRITE)
        _libc_sync_file_range(ctypes.c_int(fd), ctypes.c_int64(start), length, flags)


def read_ahead(
    windows: Iterable[W],
    spans: Callable[[W], Iterable[Sequence[Span]]],
    prefetch: Callable[[Span], Iterable[Callable[[], None]]],
    readers: Sequence[ThreadPoolExecutor],
    count: int,
) -> Iterator[W]:
    """The same windows, each with its pages read; those of the `count` after it are on their way.

    spans: what a window reads, in groups; the nth span of each group goes to the nth reader, and to
    the last one those for which there is none.
    prefetch: how a span's pages are read, as calls that may run in any order.
    """
    queue: deque[tuple[W, list[Future[None]]]] = deque()

    def take_first() -> W:
        window, reads = queue.popleft()
        for read in reads:
            read.result()
        return window

    for window in windows:
        reads: list[Future[None]] = []
        for group in spans(window):
            for i, span in enumerate(group):
                reader = readers[min(i, len(readers) - 1)]
                reads += map(reader.submit, prefetch(span))
        queue.append((window, reads))
        if len(queue) > count:
            yield take_first()
    while queue:
        yield take_first()
