"""The sink of a merge: windows go, in order, into the output's shards in OUT/.partial.

One thread writes and another digests what is written, while the loop blends the next window. The
journal notes what is durable, for a killed run to resume from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from ..mapping.plan import Step
from .journal import Journal
from .loop import WINDOW
from .output_folder import digest_file
from .shard_file import ShardFile
from .shard_layout import Entry, ShardLayout

if TYPE_CHECKING:
    from ..checkpoints.mapped_files import Bytes

BUFFERS = 4
"""Windows of output in memory at once: one being blended, one being written, two between."""
DURABLE = 1 << 30
"""Bytes after which what is written is made durable and noted."""


@dataclass(slots=True)
class _Stretch:
    """Consecutive bytes of one shard, from `position` in it, that lie together in a buffer."""

    shard: ShardFile
    position: int
    start: int
    stop: int


@dataclass(slots=True)
class _Buffer:
    """A window of output: filled from its start, then written."""

    content: Bytes
    used: int = 0
    stretches: list[_Stretch] = field(default_factory=list)

    def take(self, shard: ShardFile, position: int, nbytes: int) -> Bytes:
        """The next bytes of the buffer, to be filled with those of a shard at `position`."""
        start, self.used = self.used, self.used + nbytes
        last = self.stretches[-1] if self.stretches else None
        if last and last.shard is shard and last.position + last.stop - last.start == position:
            last.stop = self.used
        else:
            self.stretches.append(_Stretch(shard, position, start, self.used))
        return self.content[start : self.used]


class DiskSink(AbstractContextManager["DiskSink"]):
    """Writes windows to the shards in the work folder, in order, in threads of its own.

    A step of the plan is one tensor of the output, unless the output is quantized: then what is
    written are the entries that a step becomes. Anonymous memory: BUFFERS windows.
    """

    def __init__(
        self,
        work: Path,
        shards: tuple[ShardLayout, ...],
        journal: Journal,
        *,
        evict: bool,
        finished: Callable[[str], None] | None = None,
    ) -> None:
        """finished: called in the writer's thread with the name of each shard that is durable."""
        import numpy as np

        self._work, self._journal, self._evict = work, journal, evict
        self._shards, self._finished = shards, finished
        self._shard_of = {name: shard for shard in shards for name in shard.offsets}
        for shard in shards:
            _forget_lost(work, shard, journal)
        self._free: SimpleQueue[_Buffer] = SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(_Buffer(np.empty(WINDOW, np.uint8)))
        self._buffer: _Buffer | None = None
        self._current: ShardFile | None = None
        self._ended: list[ShardFile] = []
        self._writer = ThreadPoolExecutor(1, "write")
        self._hasher = ThreadPoolExecutor(1, "hash")
        self._pending: deque[Future[None]] = deque()
        self._failed = False

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the last shard; after an error only what was handed over before it."""
        try:
            if kind is None:
                self._switch_to(None)
                self.commit()
                self._raise_failure(wait=True)
                self._finish_empty_shards()
        finally:
            self._writer.shutdown()
            self._hasher.shutdown()
            for shard in (*self._ended, self._current):
                if shard is not None:
                    shard.close()

    def wants(self, tensor: Step | Entry) -> bool:
        """Whether the tensor is not yet durable; a shard's last is wanted until that is noted."""
        shard = self._shard_of[tensor.name]
        if shard.name in self._journal.done:
            return False
        end = shard.starts[tensor.name] + tensor.nbytes
        return end > self._journal.upto.get(shard.name, 0) or end == shard.written

    def copy(self, tensor: Step | Entry, offset: int, content: Bytes) -> Future[None]:
        """Queue bytes to be written from where they are; the future is done when they are."""
        shard, position = self._locate(tensor, offset)
        self.commit()
        written = self._submit(shard.write, position, content)
        self._raise_failure()
        return written

    def slot(self, tensor: Step | Entry, offset: int, nbytes: int) -> Bytes:
        """The next stretch of the current buffer; waits for one to be free."""
        shard, position = self._locate(tensor, offset)
        if self._buffer is None:
            self._buffer = self._free.get()
            self._raise_failure()
        return self._buffer.take(shard, position, nbytes)

    def commit(self) -> None:
        """Hand the filled buffer to the writer, and after it the shards that ended in it."""
        if (buffer := self._buffer) is not None:
            written = self._submit(self._write, buffer)
            written.add_done_callback(lambda _: self._free.put(_Buffer(buffer.content)))
            self._buffer = None
        for shard in self._ended:
            self._submit(self._finish, shard)
        self._ended = []

    def write_quant_state(self, entry: Entry, content: bytes) -> None:
        """Keep a quant state for its shard's end; journalled with the tensors written before it."""
        shard, _ = self._locate(entry, 0)
        assert len(content) <= entry.nbytes
        self._submit(shard.quant_states.__setitem__, entry.name, content)

    def _locate(self, tensor: Step | Entry, offset: int) -> tuple[ShardFile, int]:
        """The shard of a tensor, opened, and the position in it of one of the tensor's bytes."""
        layout = self._shard_of[tensor.name]
        if self._current is None or self._current.layout is not layout:
            resume_at = layout.starts[tensor.name]
            shard = ShardFile(self._work, layout, resume_at, self._hasher, evict=self._evict)
            shard.quant_states = dict(self._journal.quant_states.get(layout.name, {}))
            self._switch_to(shard)
        assert self._current is not None
        return self._current, layout.offsets[tensor.name] + offset

    def _switch_to(self, shard: ShardFile | None) -> None:
        """Go on with another shard; the one in hand is finished behind the next commit."""
        if self._current is not None:
            self._ended.append(self._current)
        self._current = shard

    def _finish_empty_shards(self) -> None:
        """Write the shards that no byte was ever handed over for: all their tensors are empty."""
        for layout in self._shards:
            if layout.name not in self._journal.done:
                self._finish(ShardFile(self._work, layout, 0, self._hasher, evict=False))

    # In the writer's thread

    def _write(self, buffer: _Buffer) -> None:
        for stretch in buffer.stretches:
            stretch.shard.write(stretch.position, buffer.content[stretch.start : stretch.stop])
        shard = buffer.stretches[-1].shard
        if shard.since_durable >= DURABLE:
            self._journal.note_durable(shard.layout.name, shard.make_durable(), shard.quant_states)

    def _finish(self, shard: ShardFile) -> None:
        self._journal.note_done(shard.layout.name, *shard.finish())
        if self._finished:
            self._finished(shard.layout.name)

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

    def _raise_failure(self, *, wait: bool = False) -> None:
        """Raise what went wrong in the writer's thread, if anything did."""
        while self._pending and (wait or self._pending[0].done()):
            self._pending.popleft().result()


def _forget_lost(work: Path, shard: ShardLayout, journal: Journal) -> None:
    """Forget what the journal promises of a shard that somebody deleted or changed."""
    places = (work / shard.name, work.parent / shard.name)
    paths = [path for path in places if path.exists()]
    if done := journal.done.get(shard.name):
        found = any(digest_file(path) == done["blake3"] for path in paths)
    else:  # a quantized shard gets its final size a moment before it is noted as done
        found = any(shard.written <= path.stat().st_size <= shard.size for path in paths)
    if not found:
        journal.forget(shard.name)
