"""Small reads at any place of any file, here or on the Hub: for samples and checks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import FormatError
from ..hub.remote_file import PARALLEL_REQUESTS, RemoteFile
from .arranged import Arranged, view_side
from .coded import CodedSpan
from .span import Span

if TYPE_CHECKING:
    from ..kernels.reference import Bits, Floats
    from .mapped_files import Bytes

_T = TypeVar("_T")
_R = TypeVar("_R")
Remote = Mapping[Path, RemoteFile]
_RWF_DONTCACHE = 0x80  # linux/fs.h, Linux 6.14; not in Python's os module


def evenly_spread(total: int, length: int, count: int) -> list[int]:
    """Where `count` stretches of `length` begin in `total`, the first and the last included.

    Ascending and each once: a short total has fewer.
    """
    last = max(total - length, 0)
    return sorted({last * i // max(count - 1, 1) for i in range(count)})


class SampledReader(AbstractContextManager["SampledReader"]):
    """Files opened for a few small reads each. remote: those that are on the Hub only."""

    def __init__(self, remote: Remote | None = None) -> None:
        self._remote = remote or {}
        self._open: dict[Path, BufferedReader] = {}
        self._stack = ExitStack()
        # One after the other from a disk, many requests at once to the Hub
        self._pool = ThreadPoolExecutor(PARALLEL_REQUESTS if remote else 1)

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()
        self._stack.close()

    def map(self, work: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
        """What `work`, which reads here, makes of each item, in their order."""
        return self._pool.map(work, items)

    def read_bytes(self, span: Span | Arranged) -> bytes | bytearray:
        """A span's bytes."""
        if isinstance(span, Arranged | CodedSpan):
            return bytes(view_side(span, self._read_array).tobytes())
        path = span.path
        if path in self._remote:
            return self._remote[path].read(span.start, span.stop)
        if path not in self._open:
            self._open[path] = self._stack.enter_context(path.open("rb"))
        return _read_uncached(self._open[path], span.start, span.nbytes)

    def _read_array(self, span: Span) -> Bytes:
        import numpy as np

        return np.frombuffer(self.read_bytes(span), np.uint8)

    def read_bits(self, span: Span | Arranged) -> Bits:
        """A span of a blendable dtype as a flat array of its storage type, such as uint16."""
        import numpy as np

        from ..kernels import reference

        return np.frombuffer(self.read_bytes(span), reference.STORAGE[span.dtype.name])

    def read_floats(self, span: Span | Arranged) -> Floats:
        """A span of a blendable dtype as a flat float64 array."""
        from ..kernels import reference

        return reference.widen(self.read_bits(span), span.dtype.name)


def _read_uncached(file: BufferedReader, start: int, nbytes: int) -> bytearray:
    """Bytes of a file, not left in the page cache where the system can.

    A lone page in the cache would split the large request that reads around it later.
    """
    raw = bytearray(nbytes)
    for flags in (_RWF_DONTCACHE, 0):  # neither moves the file's position, which threads share
        try:
            if os.preadv(file.fileno(), [raw], start, flags) == nbytes:
                return raw
        except (OSError, AttributeError, NotImplementedError):
            pass
    file.seek(start)  # a buffered read goes on where the system gives less than it was asked for
    if file.readinto(raw) != nbytes:
        raise FormatError(
            f"{file.name}: ends before byte {start + nbytes}; cut since it was opened?"
        )
    return raw
