"""Base and donor shard by shard: each is fetched, checked, used and deleted, within a disk budget.

Leaves to others: requests (`wire.py`), reading what was fetched (`stream.py`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.mapped_files import MappedFiles
from ..checkpoints.span import Span
from ..closing import Closing
from ..errors import HubError, RecipeError
from ..hub.remote_file import RemoteFile

if TYPE_CHECKING:
    from ..checkpoints.mapped_files import Bytes

FOLDER = ".inputs"
"""Inside OUT/.partial."""
_PIECE = 4 << 20


@dataclass(frozen=True, slots=True)
class _Visit:
    """A shard's stay on the disk: the first window that uses it, the last, and how many uses."""

    path: Path
    file: RemoteFile
    first: int
    last: int
    uses: int


def visits(remote: Mapping[Path, RemoteFile], windows: Iterable[Sequence[Span]]) -> list[_Visit]:
    """When each remote shard is used, in the order of first use.

    windows: the spans of each; those of one window are needed at one time.
    """
    when: dict[Path, list[int]] = {}
    for i, spans in enumerate(windows):
        for span in spans:
            if span.path in remote:
                when.setdefault(span.path, []).append(i)
    return [_Visit(path, remote[path], at[0], at[-1], len(at)) for path, at in when.items()]


def check_budget(stays: Sequence[_Visit], budget: int) -> None:
    """RecipeError where the shards that are needed at one time exceed the budget."""
    most = max(
        (
            sum(other.file.size for other in stays if other.first <= stay.first <= other.last)
            for stay in stays
        ),
        default=0,
    )
    if most > budget:
        raise RecipeError(
            f"--disk-budget {budget / 1e9:.2f} GB: the shards that are needed at one time take"
            f" {most / 1e9:.2f} GB; give that much, or --no-cache, which stores none"
        )


class ShardSource(Closing):
    """The spans of one run of the loop, from shards that come and go in `work`.

    windows: the spans of each window, in order, as the loop will ask for them. budget: bytes of
    shards on the disk at one time. What a killed run left in `work` is gone on with.
    """

    def __init__(
        self,
        remote: Mapping[Path, RemoteFile],
        windows: Iterable[Sequence[Span]],
        work: Path,
        budget: int,
    ) -> None:
        stays = visits(remote, windows)
        check_budget(stays, budget)
        self._work, self._budget, self._files = work, budget, MappedFiles()
        self._homes = {stay.path: work / _home(stay.file) for stay in stays}
        self._uses = {stay.path: stay.uses for stay in stays}
        self._changed, self._stop = threading.Condition(), threading.Event()
        self._used = 0
        self._there: set[Path] = set()
        self._failure: BaseException | None = None
        self._sizes = {stay.path: stay.file.size for stay in stays}
        work.mkdir(parents=True, exist_ok=True)
        for stray in set(work.iterdir()) - set(self._homes.values()):
            stray.unlink()
        self._fetcher = threading.Thread(target=self._run, args=(stays,), daemon=True)
        self._fetcher.start()

    def close(self) -> None:
        """End fetching; what is there stays, for a run that goes on, until `finish`."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        self._fetcher.join()
        self._files.close()

    def finish(self) -> list[str]:
        """After the run: the folder is gone. Every shard was checked as it came."""
        shutil.rmtree(self._work)
        return []

    def here(self, span: Span) -> Span:
        """The same bytes in a file of this disk; waits until they are there."""
        if span.path not in self._homes:
            return span
        with self._changed:
            while span.path not in self._there:
                if self._failure is not None:
                    raise self._failure
                self._changed.wait()
        return replace(span, path=self._homes[span.path])

    def view(self, span: Span) -> Bytes:
        """The span's bytes, mapped."""
        return self._files.view(self.here(span))

    def prefetch(self, span: Span) -> list[Callable[[], None]]:
        """Nothing for what was just fetched: it is still in the page cache."""
        return [] if span.path in self._homes else self._files.prefetch(span)

    def release(self, span: Span, *, evict: bool) -> Callable[[], None] | None:
        """Delete a shard with its last span."""
        if span.path not in self._homes:
            return self._files.release(span, evict=evict)
        at = self.here(span)
        if let_go := self._files.release(at, evict=False):
            let_go()
        self._uses[span.path] -= 1
        if self._uses[span.path]:
            return None
        self._files.unmap(at.path)  # whose space is free only when nothing maps it
        at.path.unlink()
        with self._changed:
            self._there.discard(span.path)
            self._used -= self._sizes[span.path]
            self._changed.notify_all()
        return None

    def _run(self, stays: Sequence[_Visit]) -> None:
        try:
            for stay in stays:
                with self._changed:
                    while self._used + stay.file.size > self._budget and not self._stop.is_set():
                        self._changed.wait()
                    self._used += stay.file.size
                if self._stop.is_set():
                    return
                _fetch(stay.file, self._homes[stay.path], self._stop)
                with self._changed:
                    self._there.add(stay.path)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()


def _home(file: RemoteFile) -> str:
    return f"{file.repo_id.replace('/', '--')}--{file.sha[:12]}--{file.name}"


def _fetch(file: RemoteFile, home: Path, stop: threading.Event) -> None:
    """A whole shard, from where a killed run left it; HubError if its sha256 is not the Hub's."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE))
    with home.open("a+b", buffering=0) as data:
        at = min(data.seek(0, os.SEEK_END), file.size)
        data.seek(0)
        for start in range(0, at, _PIECE):
            piece = buffer[: min(_PIECE, at - start)]
            data.readinto(piece)
            digest.update(piece)
        data.truncate(at)
        for start in range(at, file.size, _PIECE):
            piece = buffer[: min(_PIECE, file.size - start)]
            file.read_into(start, piece, stop)
            data.write(piece)
            digest.update(piece)
    try:
        file.check_sha256(digest.hexdigest())
    except HubError:
        home.unlink()
        raise
