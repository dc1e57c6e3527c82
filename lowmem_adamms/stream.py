"""Mapped reads of weight files: pages are brought in ahead of use and let go behind it.

A mapping costs no anonymous memory; its pages are the kernel's to evict. On Linux 5.14 and later
pages are populated by an explicit call in a thread, elsewhere by advice. Leaves to others: what is
read, in which order, and when it is done with.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .checkpoint import Span

    Bytes = npt.NDArray[np.uint8]

_POPULATE_READ = 22  # MADV_POPULATE_READ, linux/mman.h; not in Python's mmap module
_PAGE = mmap.PAGESIZE


class Mapped:
    """One file, mapped read-only for as long as the object is open."""

    def __init__(self, path: Path) -> None:
        import numpy as np

        self._file = path.open("rb")
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes: Bytes = np.frombuffer(self._map, np.uint8)
        self._address: int = self._bytes.__array_interface__["data"][0]

    def view(self, start: int, stop: int) -> Bytes:
        """The bytes from `start` to `stop`; must not be used after close()."""
        return self._bytes[start:stop]

    def populate(self, start: int, stop: int) -> None:
        """Bring the pages in now, without holding the GIL. Only ever advice: errors are ignored."""
        start -= start % _PAGE
        if _madvise(self._address + start, stop - start, _POPULATE_READ) != 0:
            self._map.madvise(mmap.MADV_WILLNEED, start, stop - start)

    def release(self, start: int, stop: int, *, evict: bool) -> None:
        """Unmap whole pages before `stop`; with `evict` also drop them from the page cache."""
        start, stop = start - start % _PAGE, stop - stop % _PAGE
        if stop <= start:
            return
        self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)
        if evict and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(
                self._file.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED
            )

    def close(self) -> None:
        """Unmap; views handed out before keep the mapping alive until they are gone."""
        del self._bytes
        try:
            self._map.close()
        except BufferError:
            pass
        self._file.close()


class Files:
    """The mapped files of one run, opened on first use and closed together."""

    def __init__(self, *, evict: bool) -> None:
        self._evict = evict
        self._open: dict[Path, Mapped] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for mapped in self._open.values():
            mapped.close()
        self._open.clear()

    def view(self, span: Span) -> Bytes:
        """The span's bytes where they are mapped, or a copy where they are not aligned."""
        view = self._mapped(span.path).view(span.start, span.stop)
        return view.copy() if span.start % span.dtype.itemsize else view

    def populate(self, span: Span) -> None:
        """Bring a span's pages in ahead of use."""
        self._mapped(span.path).populate(span.start, span.stop)

    def release(self, span: Span) -> None:
        """Let a span's pages go."""
        self._mapped(span.path).release(span.start, span.stop, evict=self._evict)

    def open(self, span: Span) -> None:
        """Map a span's file (done in one thread, so that others only ever find it mapped)."""
        self._mapped(span.path)

    def _mapped(self, path: Path) -> Mapped:
        if path not in self._open:
            self._open[path] = Mapped(path)
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


def start_writeback(fd: int, offset: int, length: int, *, wait: bool = False) -> None:
    """Have dirty pages of a range written out now, so that fsync finds little left (Linux)."""
    if _libc_sync_file_range is not None:
        flags = 7 if wait else 2  # WAIT_BEFORE | WRITE | WAIT_AFTER, or WRITE alone
        _libc_sync_file_range(
            ctypes.c_int(fd), ctypes.c_int64(offset), ctypes.c_int64(length), ctypes.c_uint(flags)
        )
