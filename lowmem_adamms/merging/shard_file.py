"""One output shard while it is written: its bytes, its digest, and what of it is on the disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from ..checkpoints.mapped_files import BLOCK, evict_range, flush_range
from ..checkpoints.safetensors_header import parse_header
from .shard_layout import ShardLayout, emit_header, place_entries

if TYPE_CHECKING:
    from ..checkpoints.mapped_files import Bytes

TRAIL = 64 << 20
"""How far behind the writing, in a file that is written in order, pages must be on the disk."""
_SCRATCH_BYTES = 1 << 20


class ShardFile:
    """An output file, written from byte `resume_at` (in the order of writing) to its end.

    Used by one thread, except that the digest of a file that is written in order is computed in
    `hasher` while its bytes are written. Any other file is digested when it is complete.
    """

    def __init__(
        self,
        folder: Path,
        layout: ShardLayout,
        resume_at: int,
        hasher: ThreadPoolExecutor,
        *,
        evict: bool,
    ) -> None:
        """The caller puts the quant states that a killed run noted into `quant_states`."""
        self.layout = layout
        self.quant_states: dict[str, bytes] = {}
        self.since_durable = 0
        """Bytes written since `make_durable`."""
        self._hasher, self._evict = hasher, evict
        self._digest = blake3()
        self._end = resume_at
        self._path = folder / layout.name
        fresh = resume_at <= len(layout.header)
        flags = os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0)
        self._fd = os.open(self._path, flags, 0o666)
        with self._named_errors():
            if fresh:
                self._allocate()
                self._end = len(layout.header)
            elif layout.in_order:
                self._digest_file(resume_at)

    def write(self, position: int, content: Bytes) -> None:
        """Write one stretch at its position in the file; hash it if the file is in order."""
        data = memoryview(content)  # type: ignore[arg-type]  # a buffer from Python 3.12's view on
        with self._named_errors():
            if self.layout.in_order:
                hashing = self._hasher.submit(self._digest.update, data)
                _write_all(self._fd, data, position)
                self._flush_blocks(position + data.nbytes)
                hashing.result()
            else:
                _write_all(self._fd, data, position)
                flush_range(self._fd, position, position + data.nbytes)
                self._end += data.nbytes
        self.since_durable += data.nbytes

    def make_durable(self) -> int:
        """Have everything written so far on the disk; returns how far that is."""
        with self._named_errors():
            os.fdatasync(self._fd) if hasattr(os, "fdatasync") else os.fsync(self._fd)
        self.since_durable = 0
        return self._end

    def finish(self) -> tuple[int, str]:
        """Make the complete file durable and close it; returns its size and BLAKE3 digest."""
        size = self.layout.size
        with self._named_errors():
            if not self.layout.in_order:
                size = self._complete()
                self._digest_file(size)
            os.fsync(self._fd)
        if self._evict and not self.layout.in_order:
            evict_range(self._fd, 0, size)
        self.close()
        return size, self._digest.hexdigest()

    def close(self) -> None:
        """Close the file; again is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Errors of calls that know only a descriptor, with the file's name."""
        try:
            yield
        except OSError as error:
            error.filename = str(self._path)
            raise

    def _allocate(self) -> None:
        """Claim the file's space, so that a full disk shows now, and write the header."""
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._fd, 0, self.layout.size)
        else:
            os.ftruncate(self._fd, self.layout.size)
        _write_all(self._fd, memoryview(self.layout.header), 0)
        self._digest.update(self.layout.header)

    def _complete(self) -> int:
        """Write the quant states at the end and the final header in its place; returns the size."""
        entries = [
            replace(entry, shape=(len(self.quant_states[entry.name]),))
            if entry.quant_state
            else entry
            for entry in self.layout.entries
        ]
        head = emit_header(entries, min_bytes=len(self.layout.header))
        offsets, size = place_entries(entries, len(head))
        parse_header(head[8:], size)
        _write_all(self._fd, memoryview(head), 0)
        for name, content in self.quant_states.items():
            _write_all(self._fd, memoryview(content), offsets[name])
        os.ftruncate(self._fd, size)
        return size

    def _digest_file(self, stop: int) -> None:
        """Digest the file's bytes from its start to `stop`."""
        self._digest = blake3()
        scratch, position = memoryview(bytearray(_SCRATCH_BYTES)), 0
        while position < stop:
            wanted = scratch[: min(_SCRATCH_BYTES, stop - position)]
            count = os.preadv(self._fd, [wanted], position)
            if not count:
                raise OSError(errno.EIO, f"{self.layout.name} became shorter while it was written")
            self._digest.update(wanted[:count])
            position += count

    def _flush_blocks(self, end: int) -> None:
        """Start writing whole blocks up to `end` to the disk; evict those TRAIL behind.

        Whole blocks, because the page cache's large folios can only be dropped whole.
        """
        first, last = self._end // BLOCK * BLOCK, end // BLOCK * BLOCK
        self._end = end
        flush_range(self._fd, first, last)
        first, last = max(0, first - TRAIL), max(0, last - TRAIL)
        if first < last:
            flush_range(self._fd, first, last, wait=True)
            if self._evict:
                evict_range(self._fd, first, last)


def _write_all(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, position)
        data, position = data[count:], position + count
