"""The disk sink, and `merge`: from a plan to a checkpoint folder that transformers loads.

Everything is made inside OUT/.partial and moved to its final name when all of it is complete,
fsynced and indexed; the index moves last. The journal there lets the same command resume after any
kill. Leaves to others: what the bytes are (`merge.py`), the words (`card.py`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from . import card, header, kinship
from .checkpoint import Span
from .errors import OutputError
from .journal import ANSWERS, NAME, WORK, Journal
from .merge import WINDOW, check_alpha, run
from .plan import Plan, Step
from .stream import BLOCK, evict_range, reading, write_out

if TYPE_CHECKING:
    from .stream import Bytes

BUFFERS = 4
"""Windows of output in memory at once: one being blended, one being written, two between."""
DURABLE = 1 << 30
"""Bytes after which what is written is made durable and noted, for a killed run to resume from."""
TRAIL = 64 << 20
"""How far behind the writer its pages must have reached the disk."""
INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}  # transformers refuses a file without it


@dataclass(frozen=True, slots=True)
class OutFile:
    """One output shard: its header, and where each step's tensor starts in it."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size: int


def merge(
    plan: Plan,
    alpha: float,
    out: str | Path,
    *,
    max_shard_size: int | None = None,
    force: bool = False,
    search: Mapping[str, Any] | None = None,
    beside: Mapping[str, bytes] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write the merged checkpoint of `plan` at `alpha` to the folder `out`, and return it.

    max_shard_size: bytes; None keeps the base's shards. force: merge also what looks unrelated.
    search: how alpha was found, for adamms.json. beside: further files, such as a report.
    progress: called with bytes of output done since the last call. Resumes a killed run of the same
    merge. Raises RecipeError, OutputError or MappingError before anything is written.
    """
    alpha, out = check_alpha(alpha), Path(out)
    files = check_output(plan, out, max_shard_size=max_shard_size)
    fingerprint = _fingerprint(plan, alpha, files)
    from .kernels.select import select

    with reading(plan.spans):
        kin = kinship.measure(plan) if force else kinship.check(plan)
        kernel, why = select(plan.dtypes)
    evict = plan.bytes_read + plan.bytes_written > _physical_memory() // 2
    with Journal(out, fingerprint) as journal:
        with DiskSink(out, files, journal, evict=evict) as sink:
            if progress:
                progress(sum(step.nbytes for step in plan.steps if not sink.wants(step)))
            run(plan, alpha, sink, kernel=kernel, evict=evict, progress=progress)
        for name, content in (beside or {}).items():
            _write_file(out / WORK / name, content)
        papers = card.recipe(plan, alpha, kin, why, search or {})
        _write_papers(plan, alpha, out, files, journal, papers)
        _publish(out)
    return out


def check_output(
    plan: Plan, out: Path, *, max_shard_size: int | None = None
) -> tuple[OutFile, ...]:
    """The output's shards, if `out` can take them; OutputError if it cannot."""
    files = out_files(plan, max_shard_size)
    _check_place(plan, out)
    _check_space(files, out)
    return files


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
        self, out: Path, files: tuple[OutFile, ...], journal: Journal, *, evict: bool
    ) -> None:
        import numpy as np

        self._work, self._journal, self._evict = out / WORK, journal, evict
        self._files = files
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


def _check_place(plan: Plan, out: Path) -> None:
    """OUT must be new, empty, or our own unfinished merge, and not an input or inside one."""
    there = _nearest(out)
    if not there.is_dir():
        raise OutputError(f"{out}: {there} is a file; -o names a folder")
    for side in (plan.base, plan.donor):
        if side.folder and side.folder.resolve() in (out.resolve(), *out.resolve().parents):
            raise OutputError(f"{out} is the input {side.path} or inside it; choose another -o")
    if there != out or (out / WORK / NAME).is_file():
        return
    ours = {out / WORK, out / WORK / ANSWERS}  # what a killed search leaves
    if not set(out.rglob("*")) <= ours:
        raise OutputError(f"{out} is not empty; choose another -o or empty it")


def _nearest(path: Path) -> Path:
    """The path itself if it exists, else the nearest folder above it that does."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _check_space(files: tuple[OutFile, ...], out: Path) -> None:
    """The whole output must fit before anything starts."""
    there = _nearest(out)
    partial = [out / WORK / file.name for file in files]
    already = sum(path.stat().st_blocks * 512 for path in partial if path.exists())
    placed = sum(file.size for file in files if (out / file.name).exists())
    need = sum(file.size for file in files) - already - placed + (64 << 20)
    free = shutil.disk_usage(there).free
    if need > free:
        raise OutputError(
            f"{there}: {free / 1e9:.1f} GB free, the output needs {need / 1e9:.1f} GB;"
            " free some or choose another -o"
        )


def _fingerprint(plan: Plan, alpha: float, files: tuple[OutFile, ...]) -> str:
    """A digest of everything that decides the output's bytes."""
    from . import __version__

    layout = [[file.name, file.size, sorted(file.offsets.items())] for file in files]
    document = json.dumps([__version__, repr(alpha), layout, plan.identity()])
    return hashlib.sha256(document.encode()).hexdigest()


def _write_papers(
    plan: Plan,
    alpha: float,
    out: Path,
    files: tuple[OutFile, ...],
    journal: Journal,
    papers: dict[str, Any],
) -> None:
    """Index, sidecars, model card and adamms.json into the work folder, each durable."""
    work = out / WORK
    if len(files) > 1:
        weight_map = {name: file.name for file in files for name in sorted(file.offsets)}
        total = sum(step.nbytes for step in plan.steps)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(work / INDEX, index)
    for relative in plan.base.sidecars():
        _write_file(work / relative, (plan.base.path / relative).read_bytes())
    dtype = plan.options["dtype"]
    if dtype and plan.base.config:
        _write_json(work / "config.json", card.config_in_dtype(plan.base.config, dtype))
    _write_file(work / "README.md", card.model_card(plan, alpha, papers).encode())
    made = [journal.done[file.name] for file in files]
    outputs = [{key: line[key] for key in ("file", "size", "blake3")} for line in made]
    _write_json(work / "adamms.json", papers | {"outputs": outputs})


def _write_json(path: Path, document: object) -> None:
    _write_file(path, json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n")


def _write_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _publish(out: Path) -> None:
    """Move everything to its final name, the index last, then remove the work folder."""
    work = out / WORK
    everything = sorted(work.rglob("*"))
    made = [path for path in everything if path.is_file() and path.name != NAME]
    if (work / ANSWERS).is_file():  # a search does not fsync it as it grows
        _sync(work / ANSWERS)
    for path in sorted(made, key=lambda path: path.name == INDEX):
        target = out / path.relative_to(work)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    for folder in {out.absolute().parent, *(out / path.relative_to(work).parent for path in made)}:
        _sync(folder)
    for folder in [path for path in reversed(everything) if path.is_dir()]:
        folder.rmdir()
    (work / NAME).unlink()
    work.rmdir()
    _sync(out)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
