"""The disk sink: windows go, in order, into the output's shards in OUT/.partial.

One thread writes and one digests what is written; space is claimed beforehand, pages are seen off
behind the stream, and the journal notes what is durable. Leaves to others: what the bytes are
(`merge.py`), where they go in the shards (`outfiles.py`), index, papers and the move to the final
names (`writer.py`).
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from blake3 import blake3

from ..checkpoints.mapped_files import BLOCK, MappedFiles, evict_range, flush_range
from ..checkpoints.safetensors_header import parse_header
from ..checkpoints.span import Span
from .journal import WORK, Journal
from .loop import WINDOW
from .shard_layout import Entry, OutFile, emit_header, positions

if TYPE_CHECKING:
    from ..checkpoints.mapped_files import Bytes

BUFFERS = 4
"""Windows of output in memory at once: one being blended, one being written, two between."""
DURABLE = 1 << 30
"""Bytes after which what is written is made durable and noted, for a killed run to resume from."""
TRAIL = 64 << 20
"""How far behind the writer its pages must have reached the disk."""


class Named(Protocol):
    """What is written under one name: a step of the plan, or one entry of it."""

    @property
    def name(self) -> str:
        """The tensor's."""

    @property
    def nbytes(self) -> int:
        """Bytes of it."""


class DiskSink:
    """Writes windows to the shards in `out/.partial`, in order, in threads of its own.

    Anonymous memory: BUFFERS windows. One thread writes, one digests what is written.
    """

    def __init__(
        self,
        out: Path,
        files: tuple[OutFile, ...],
        journal: Journal,
        *,
        evict: bool,
        finished: Callable[[str], None] | None = None,
    ) -> None:
        """finished: called in the writer's thread with the name of each shard that is durable."""
        import numpy as np

        self._work, self._journal, self._evict = out / WORK, journal, evict
        self._files, self._finished = files, finished
        self._homes = {name: file for file in files for name in file.offsets}
        for file in files:
            _forget_lost(out, file, journal)
        self._free: SimpleQueue[Bytes] = SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(np.empty(WINDOW, np.uint8))
        self._buffer: Bytes | None = None
        self._used = 0
        self._extents: list[tuple[_Shard, int, Bytes]] = []
        self._current: _Shard | None = None
        self._ended: list[_Shard] = []
        self._writer = ThreadPoolExecutor(1, "write")
        self._hasher = ThreadPoolExecutor(1, "hash")
        self._pending: deque[Future[None]] = deque()
        self._failed = False

    def __enter__(self) -> DiskSink:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the last shard; after an error only what was handed over before it."""
        try:
            if kind is None:
                self._turn_to(None)
                self.commit()
                self._check(wait=True)
                self._finish_empty()
        finally:
            self._writer.shutdown()
            self._hasher.shutdown()
            for shard in (*self._ended, self._current):
                if shard is not None:
                    shard.close()

    def _finish_empty(self) -> None:
        """Write the shards that no byte was ever handed over for: all their tensors are empty."""
        for file in self._files:
            if file.name not in self._journal.done:
                self._finish(_Shard(self._work, file, 0, self._hasher, evict=False))

    def wants(self, step: Named) -> bool:
        """Whether the step is not yet durable; the last of a shard is wanted till that is noted."""
        file = self._homes[step.name]
        if file.name in self._journal.done:
            return False
        end = file.starts[step.name] + step.nbytes
        return end > self._journal.upto.get(file.name, 0) or end == file.written

    def late(self, entry: Entry, content: bytes) -> None:
        """The bytes of a late entry; journalled with what is durable of the tensors before it."""
        shard, _ = self._place(entry, 0)
        assert len(content) <= entry.nbytes
        self._submit(shard.late.__setitem__, entry.name, content)

    def copy(self, step: Named, offset: int, span: Span) -> None:
        """Have a span written from where it lies mapped."""
        shard, at = self._place(step, offset)
        self.commit()
        self._submit(shard.copy, at, span)
        self._check()

    def slot(self, step: Named, offset: int, nbytes: int) -> Bytes:
        """The next stretch of the current buffer; waits for one to be free."""
        shard, at = self._place(step, offset)
        if self._buffer is None:
            self._buffer, self._used = self._free.get(), 0
            self._check()
        view = self._buffer[self._used : self._used + nbytes]
        self._used += nbytes
        self._extents.append((shard, at, view))
        return view

    def commit(self) -> None:
        """Hand the filled buffer to the writer, and after it the shards that ended in it."""
        if (buffer := self._buffer) is not None:
            written = self._submit(self._write, self._extents, buffer)
            written.add_done_callback(lambda _: self._free.put(buffer))
            self._buffer, self._extents = None, []
        for shard in self._ended:
            self._submit(self._finish, shard)
        self._ended = []

    def _place(self, step: Named, offset: int) -> tuple[_Shard, int]:
        """The shard a step belongs to, opened, and the absolute position of one of its bytes."""
        file = self._homes[step.name]
        if self._current is None or self._current.file is not file:
            start = file.starts[step.name]
            shard = _Shard(self._work, file, start, self._hasher, evict=self._evict)
            shard.late = dict(self._journal.late.get(file.name, {}))
            self._turn_to(shard)
        assert self._current is not None
        return self._current, file.offsets[step.name] + offset

    def _turn_to(self, shard: _Shard | None) -> None:
        """Go on with another shard; the one in hand is finished behind the next commit."""
        if self._current is not None:
            self._ended.append(self._current)
        self._current = shard

    def _write(self, extents: list[tuple[_Shard, int, Bytes]], buffer: Bytes) -> None:
        for shard, at, view in _joined(extents, buffer):
            shard.write(at, view)
        shard = extents[-1][0]
        if shard.since_durable >= DURABLE:
            upto, late = shard.make_durable(), {k: v.hex() for k, v in shard.late.items()}
            told = {"late": late} if late else {}
            self._journal.note(file=shard.file.name, upto=upto, **told)

    def _finish(self, shard: _Shard) -> None:
        size, digest = shard.finish()
        self._journal.note(file=shard.file.name, size=size, blake3=digest)
        if self._finished:
            self._finished(shard.file.name)

    def _submit(self, work: Callable[..., None], *args: Any) -> Future[None]:
        """Queue work for the writer; once something failed, nothing queued behind it is done."""
        future = self._writer.submit(self._attempt, work, *args)
        self._pending.append(future)
        return future

    def _attempt(self, work: Callable[..., None], *args: Any) -> None:
        if not self._failed:
            try:
                work(*args)
            except BaseException:
                self._failed = True
                raise

    def _check(self, *, wait: bool = False) -> None:
        """Raise what went wrong in the writer's thread, if anything did."""
        while self._pending and (wait or self._pending[0].done()):
            self._pending.popleft().result()


def _joined(
    extents: list[tuple[_Shard, int, Bytes]], buffer: Bytes
) -> Iterator[tuple[_Shard, int, Bytes]]:
    """Extents that follow each other in shard and buffer, as one."""
    shard, start, _ = extents[0]
    length, used = 0, 0
    for home, at, view in extents:
        if home is not shard or at != start + length:
            yield shard, start, buffer[used - length : used]
            shard, start, length = home, at, 0
        length += view.size
        used += view.size
    yield shard, start, buffer[used - length : used]


class _Shard:
    """One output file being written, from byte `resume` on; its digest covers it from byte 0."""

    def __init__(
        self, work: Path, file: OutFile, resume: int, hasher: ThreadPoolExecutor, *, evict: bool
    ) -> None:
        self.file, self._hasher, self._evict = file, hasher, evict
        self.late: dict[str, bytes] = {}
        self._digest = blake3()
        self._trail: deque[tuple[int, int]] = deque()
        self._behind = 0  # bytes in the trail
        fresh = resume <= len(file.header)
        flags = os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0)
        self._fd = os.open(work / file.name, flags, 0o666)
        self._scratch = bytearray(1 << 20)
        self.since_durable = 0
        self._end = resume
        if fresh:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, 0, file.size)
            else:
                os.ftruncate(self._fd, file.size)
            _pwrite_all(self._fd, memoryview(file.header), 0)
            self._end = len(file.header)
            self._digest.update(file.header)
        elif file.ordered:
            self._hash_file(resume)

    def write(self, at: int, view: Bytes) -> None:
        """Write and hash one stretch."""
        data = memoryview(view)  # type: ignore[arg-type]  # a buffer from Python 3.12's view on
        hashing = self._hashing(self._digest.update, data)
        _pwrite_all(self._fd, data, at)
        self._written(at, view.size)
        if hashing:
            hashing.result()

    def copy(self, at: int, span: Span) -> None:
        """Write and hash a span of another file, from where it is mapped."""
        with MappedFiles() as files:
            self.write(at, files.view(span))
            if let_go := files.release(span, evict=self._evict):
                let_go()

    def make_durable(self) -> int:
        """Everything written so far reaches the disk; returns how far that is."""
        os.fdatasync(self._fd) if hasattr(os, "fdatasync") else os.fsync(self._fd)
        self.since_durable = 0
        return self._end

    def finish(self) -> tuple[int, str]:
        """fsync, close, and size and BLAKE3 digest of the whole file."""
        size = self.file.size
        if not self.file.ordered:
            size = self._complete()
            self._hash_file(size)
        os.fsync(self._fd)
        if self._evict and not self.file.ordered:
            evict_range(self._fd, 0, size)
        self.close()
        return size, self._digest.hexdigest()

    def _complete(self) -> int:
        """Put what is late behind the rest, and over the header's place the final one."""
        entries = [
            replace(entry, shape=(len(self.late[entry.name]),)) if entry.late else entry
            for entry in self.file.entries
        ]
        head = emit_header(entries, room=len(self.file.header))
        offsets, size = positions(entries, len(head))
        parse_header(head[8:], size)
        _pwrite_all(self._fd, memoryview(head), 0)
        for name, content in self.late.items():
            _pwrite_all(self._fd, memoryview(content), offsets[name])
        os.ftruncate(self._fd, size)
        self._digest = blake3()
        return size

    def close(self) -> None:
        """Close the file; again is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _hashing(self, work: Callable[..., object], *args: Any) -> Future[object] | None:
        """Digest in the other thread, if what is written comes in the file's order."""
        return self._hasher.submit(work, *args) if self.file.ordered else None

    def _written(self, at: int, nbytes: int) -> None:
        """Start writing out what is filled, and see off what lies TRAIL behind."""
        self.since_durable += nbytes
        if self.file.ordered:
            self._see_off_blocks(at + nbytes)
            return
        self._end += nbytes
        flush_range(self._fd, at, at + nbytes)
        self._trail.append((at, nbytes))
        self._behind += nbytes
        while self._behind > TRAIL:
            at, nbytes = self._trail.popleft()
            self._behind -= nbytes
            flush_range(self._fd, at, at + nbytes, wait=True)
            if self._evict:
                evict_range(self._fd, at, at + nbytes)

    def _see_off_blocks(self, end: int) -> None:
        """Of a file that is written in its order: whole blocks, which the cache can drop whole."""
        before, self._end = self._end // BLOCK, end
        first, last = before * BLOCK, self._end // BLOCK * BLOCK
        flush_range(self._fd, first, last)
        first, last = max(0, first - TRAIL), max(0, last - TRAIL)
        flush_range(self._fd, first, last, wait=True)
        if self._evict and first < last:
            evict_range(self._fd, first, last)

    def _hash_file(self, stop: int) -> None:
        """Digest what lies in the file up to a byte."""
        view = memoryview(self._scratch)
        for at in range(0, stop, len(view)):
            wanted = view[: min(len(view), stop - at)]
            pread_all(self._fd, wanted, at)
            self._digest.update(wanted)


def _pwrite_all(fd: int, view: memoryview, at: int) -> None:
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done


def pread_all(fd: int, view: memoryview, at: int) -> None:
    """Fill a view from the bytes of a file from `at` on; OSError if it ends before."""
    while view:
        done = os.preadv(fd, [view], at)
        if not done:
            raise OSError(errno.EIO, "an input file became shorter while it was read")
        view, at = view[done:], at + done


def _forget_lost(out: Path, file: OutFile, journal: Journal) -> None:
    """What the journal promises but somebody deleted or changed must be made again."""
    places = (out / WORK / file.name, out / file.name)
    sizes = [path.stat().st_size for path in places if path.exists()]
    if done := journal.done.get(file.name):
        there = done["size"] in sizes
    else:  # what is not ordered gets its final size a moment before it is noted as done
        there = any(file.written <= size <= file.size for size in sizes)
    if not there:
        journal.done.pop(file.name, None)
        journal.upto.pop(file.name, None)
