"""The disk sink: windows go, in order, into the output's shards in OUT/.partial.

One thread writes and one digests what is written; space is claimed beforehand, pages are seen off
behind the stream, and the journal notes what is durable. Leaves to others: what the bytes are
(`merge.py`), index, papers and the move to the final names (`writer.py`).
"""

from __future__ import annotations

import errno
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from . import header
from .checkpoint import Span
from .journal import WORK, Journal
from .merge import WINDOW
from .plan import Plan, Step
from .stream import BLOCK, evict_range, write_out

if TYPE_CHECKING:
    from .stream import Bytes

BUFFERS = 4
"""Windows of output in memory at once: one being blended, one being written, two between."""
DURABLE = 1 << 30
"""Bytes after which what is written is made durable and noted, for a killed run to resume from."""
TRAIL = 64 << 20
"""How far behind the writer its pages must have reached the disk."""
METADATA = {"format": "pt"}  # transformers refuses a file without it


@dataclass(frozen=True, slots=True)
class OutFile:
    """One output shard: its header, and where each step's tensor starts in it."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size: int


def out_files(plan: Plan, max_shard_size: int | None = None) -> tuple[OutFile, ...]:
    """The output's shards: the base's own grouping, or greedily up to `max_shard_size` bytes."""
    groups: list[list[Step]] = []
    names: list[str] = []
    room = 0
    for step in plan.steps:
        shard = step.parts[0].base.path.name
        if max_shard_size is None:
            fresh = not names or names[-1] != shard
        else:
            fresh = not groups or step.nbytes > room
        if fresh:
            groups.append([])
            names.append(shard)
            room = max_shard_size or 0
        groups[-1].append(step)
        room -= step.nbytes
    keep = max_shard_size is None and all(re.fullmatch(r"model.*\.safetensors", n) for n in names)
    if len(groups) == 1:
        names = ["model.safetensors"]
    elif not keep:
        total = len(groups)
        names = [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    return tuple(_out_file(name, group) for name, group in zip(names, groups, strict=True))


def _out_file(name: str, steps: list[Step]) -> OutFile:
    head = header.emit([(step.name, step.dtype, step.shape) for step in steps], METADATA)
    offsets: dict[str, int] = {}
    position = len(head)
    for step in steps:
        offsets[step.name] = position
        position += step.nbytes
    header.parse(head[8:], position)
    return OutFile(name, head, offsets, position)


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

    def wants(self, step: Step) -> bool:
        """Whether the step is not yet durable; the last of a shard is wanted till that is noted."""
        file = self._homes[step.name]
        if file.name in self._journal.done:
            return False
        end = file.offsets[step.name] + step.nbytes
        return end > self._journal.upto.get(file.name, 0) or end == file.size

    def copy(self, step: Step, offset: int, span: Span) -> None:
        """Have a span copied file to file."""
        shard, at = self._place(step, offset)
        self.commit()
        self._submit(shard.copy, at, span)
        self._check()

    def slot(self, step: Step, offset: int, nbytes: int) -> Bytes:
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

    def _place(self, step: Step, offset: int) -> tuple[_Shard, int]:
        """The shard a step belongs to, opened, and the absolute position of one of its bytes."""
        file = self._homes[step.name]
        start = file.offsets[step.name]
        if self._current is None or self._current.file is not file:
            self._turn_to(_Shard(self._work, file, start, self._hasher, evict=self._evict))
        assert self._current is not None
        return self._current, start + offset

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
            self._journal.note(file=shard.file.name, upto=shard.make_durable())

    def _finish(self, shard: _Shard) -> None:
        digest = shard.finish()
        self._journal.note(file=shard.file.name, size=shard.file.size, blake3=digest)
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
        self._digest = blake3()
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
            self._digest.update(file.header)
        else:
            self._hash_file(self._fd, 0, resume)

    def write(self, at: int, view: Bytes) -> None:
        """Write and hash one stretch."""
        data = memoryview(view)  # type: ignore[arg-type]  # a buffer from Python 3.12's view on
        hashing = self._hasher.submit(self._digest.update, data)
        _pwrite_all(self._fd, data, at)
        self._written(at, view.size)
        hashing.result()

    def copy(self, at: int, span: Span) -> None:
        """Copy a span from its file, inside the kernel where it can, and hash it."""
        source = os.open(span.path, os.O_RDONLY)
        try:
            hashing = self._hasher.submit(self._hash_file, source, span.start, span.nbytes)
            _copy_range(source, self._fd, span.start, at, span.nbytes)
            self._written(at, span.nbytes)
            hashing.result()
            if self._evict:
                evict_range(source, span.start, span.stop)
        finally:
            os.close(source)

    def make_durable(self) -> int:
        """Everything written so far reaches the disk; returns how far that is."""
        os.fdatasync(self._fd) if hasattr(os, "fdatasync") else os.fsync(self._fd)
        self.since_durable = 0
        return self._end

    def finish(self) -> str:
        """fsync, close, and the BLAKE3 digest of the whole file."""
        os.fsync(self._fd)
        self.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close the file; again is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _written(self, at: int, nbytes: int) -> None:
        """Start writing out the whole blocks that are filled, and see off those TRAIL behind."""
        before, self._end = self._end // BLOCK, at + nbytes
        self.since_durable += nbytes
        first, last = before * BLOCK, self._end // BLOCK * BLOCK
        write_out(self._fd, first, last)
        first, last = max(0, first - TRAIL), max(0, last - TRAIL)
        write_out(self._fd, first, last, wait=True)
        if self._evict and first < last:
            evict_range(self._fd, first, last)

    def _hash_file(self, fd: int, start: int, nbytes: int) -> None:
        view = memoryview(self._scratch)
        for at in range(start, start + nbytes, len(view)):
            wanted = view[: min(len(view), start + nbytes - at)]
            _pread_all(fd, wanted, at)
            self._digest.update(wanted)


def _pwrite_all(fd: int, view: memoryview, at: int) -> None:
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done


def _pread_all(fd: int, view: memoryview, at: int) -> None:
    while view:
        done = os.preadv(fd, [view], at)
        if not done:
            raise OSError(errno.EIO, "an input file became shorter while it was read")
        view, at = view[done:], at + done


def _copy_range(source: int, target: int, start: int, at: int, nbytes: int) -> None:
    """copy_file_range, or reads and writes where the system or the file systems lack it."""
    while nbytes and hasattr(os, "copy_file_range"):
        try:
            done = os.copy_file_range(source, target, nbytes, start, at)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            break
        if not done:
            break
        start, at, nbytes = start + done, at + done, nbytes - done
    buffer = memoryview(bytearray(min(nbytes, 1 << 20)))
    while nbytes:
        view = buffer[: min(len(buffer), nbytes)]
        _pread_all(source, view, start)
        _pwrite_all(target, view, at)
        start, at, nbytes = start + len(view), at + len(view), nbytes - len(view)


def _forget_lost(out: Path, file: OutFile, journal: Journal) -> None:
    """What the journal promises but somebody deleted or changed must be made again."""
    places = (out / WORK / file.name, out / file.name)
    if file.size not in [path.stat().st_size for path in places if path.exists()]:
        journal.done.pop(file.name, None)
        journal.upto.pop(file.name, None)
