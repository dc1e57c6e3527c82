"""A merge goes to the Hub: shards as they are finished, then one commit with everything.

A thread sends one large file at a time while the merge makes the next. What it sends belongs to no
branch until the commit, so that nobody finds half a model. The Hub knows large files by their
sha256: what it has is not sent again, whoever asks. Files go as streams, plainly over HTTP: at
their memory, and so that a stop is a stop; huggingface_hub then does without Xet, whose buffers
alone exceed what a merge takes. Leaves to others: what may be pushed where (`push_check.py`), and
what the files are.
"""

from __future__ import annotations

import io
import logging
import shlex
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from ..checkpoints.mapped_files import evict_range
from ..closing import Closing
from ..errors import PushError
from ..merging.journal import PENDING, WORK
from .plain_http import impatient
from .repository import without_bars
from .upload_check import Target, api, is_same, listing, patiently, pushed_files, status

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

WAITS = (2.0, 10.0, 30.0, 60.0)
"""Seconds between the attempts for one file; in each, huggingface_hub tries for half a minute."""
STALL = 120.0
"""Seconds without a byte either way after which a request has failed, or HF_HUB_DOWNLOAD_TIMEOUT if
that is more: the Hub may take its time over a commit."""
_POLL = 0.2  # seconds between looks at the thread; a Ctrl-C is heard in between
_LINGER = 2.0  # seconds that a thread gets to notice that it should stop


class Push(Closing):
    """Uploads one merged folder to one repository. All methods are for one thread.

    `begin` makes the repository, `shard` sends a file in the background, `finish` sends what is
    left and commits. close: what is under way stops, and nothing is committed.
    """

    def __init__(self, target: Target, out: str | Path) -> None:
        self.repo, self.url = target.repo, ""
        self.notes: list[str] = []
        self._target, self._out, self._hub = target, Path(out), api()
        self._head = target.head
        self._begun = False
        self._sent = 0
        self._stop = threading.Event()
        self._queue: SimpleQueue[str | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._additions: dict[str, CommitOperationAdd] = {}
        self._streams: dict[str, _Stream] = {}

    def close(self) -> None:
        """Stop; a file half sent is sent anew another time."""
        self._stop.set()
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(_LINGER)
        for stream in self._streams.values():
            stream.close()

    def begin(self) -> None:
        """Make the repository if there is none. PushError if the Hub does not let us."""
        if self._begun:
            return
        if self._head is None:
            private = True if self._target.private else None
            patiently(lambda: self._hub.create_repo(self.repo, private=private, exist_ok=True))
            self._head = patiently(lambda: self._hub.model_info(self.repo)).sha
        self._begun = True

    def shard(self, name: str) -> None:
        """Send the shard `name`, complete in the output or its work folder, in the background."""
        if self._thread is None:
            self._thread = self._sender(self._queue)
        self._queue.put(name)

    def finish(self, progress: Callable[[int], None] | None = None) -> int:
        """Send what is left of the complete output, commit, and return how many files are there.

        progress: called with the bytes done since the last call. PushError, with the way to go on,
        if the Hub cannot be brought to take it.
        """
        files = pushed_files(self._out)
        try:
            self.begin()
            self._send(files, progress)
            self._commit(files)
        except PushError as error:
            raise PushError(f"{error}; {self._way_on()}") from error
        (self._out / PENDING).unlink(missing_ok=True)
        return len(files)

    def _way_on(self) -> str:
        words = ["python", "-m", "lowmem_adamms", "push", str(self._out), self.repo]
        words += ["--private"] if self._target.private else []
        words += ["--replace-repo"] if self._target.replace else []
        return f"the output is complete at {self._out}; to finish the upload: {shlex.join(words)}"

    def _send(self, files: Iterable[str], progress: Callable[[int], None] | None) -> None:
        """Wait for the background; then everything it did not send, or could not."""
        self._queue.put(None)
        told = self._wait(0, progress)
        left = [name for name in files if name not in {*self._additions, *self._target.here}]
        self._queue, self._error = SimpleQueue(), None
        for name in (*left, None):
            self._queue.put(name)
        self._thread = self._sender(self._queue)
        self._wait(told, progress)
        if self._error is not None:
            raise self._error

    def _wait(self, told: int, progress: Callable[[int], None] | None) -> int:
        """Until the thread ends; returns the bytes that `progress` was told of."""
        while True:
            running = self._thread is not None and self._thread.is_alive()
            if progress and self._sent != told:
                sent = self._sent
                progress(sent - told)
                told = sent
            if self._thread is None or not running:
                return told
            self._thread.join(_POLL)

    def _sender(self, names: SimpleQueue[str | None]) -> threading.Thread:
        # A daemon: Python would wait for any other at exit, whatever Ctrl-C said
        thread = threading.Thread(target=self._work, args=(names,), name="upload", daemon=True)
        thread.start()
        return thread

    def _work(self, names: SimpleQueue[str | None]) -> None:
        """Send one file after the other until there are no more, one fails or we are stopped."""
        try:
            while (name := names.get()) is not None and not self._stop.is_set():
                if name not in self._additions and name not in self._target.here:
                    self._additions[name] = self._upload(name)
        except BaseException as error:
            self._error = error

    def _upload(self, name: str) -> CommitOperationAdd:
        """Send one file, if the Hub keeps its like as a large one; small ones go in the commit."""
        from huggingface_hub import CommitOperationAdd

        before, stream = self._sent, self._open(name)

        def attempt() -> None:
            self._sent = before
            stream.seek(0)
            with stream.counted(self._count):
                self._hub.preupload_lfs_files(self.repo, [addition], num_threads=1)

        try:
            addition = CommitOperationAdd(name, stream)  # reads it once, for its sha256
            patiently(attempt, WAITS, self._pause)
        except BaseException:
            stream.close()
            raise
        self._sent = before + addition.upload_info.size
        if addition.path_or_fileobj is stream:
            self._streams[name] = stream
        else:  # it was large: only its digest is needed now
            stream.finish()
        return addition

    def _open(self, name: str) -> _Stream:
        """Files move from the work folder to their place, never back; an open one may move."""
        try:
            return _Stream(self._out / WORK / name, self._stop)
        except FileNotFoundError:
            return _Stream(self._out / name, self._stop)

    def _count(self, nbytes: int) -> None:
        self._sent += nbytes

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise PushError("stopped")

    def _commit(self, files: dict[str, Path]) -> None:
        """Everything in one commit on what the branch was when we looked."""
        from huggingface_hub import CommitOperationDelete

        from ..version import __version__

        self.url = f"{self._hub.endpoint}/{self.repo}"
        additions = [self._additions[name] for name in files if name in self._additions]
        stale = sorted(self._target.stale - set(files))
        deletions = [CommitOperationDelete(name, is_folder=False) for name in stale]
        if not (additions or deletions):
            return

        def attempt() -> None:
            for stream in self._streams.values():
                stream.seek(0)
            try:
                self._hub.create_commit(
                    self.repo,
                    [*additions, *deletions],
                    commit_message=f"Upload merge with lowmem-adamms {__version__}",
                    parent_commit=self._head,
                )
            except Exception as error:
                if not self._landed(files, error):
                    raise

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)  # what the Hub has to say about the card
            patiently(attempt, WAITS, self._pause)
        self.notes += [
            " ".join(str(warning.message).split())
            for warning in caught
            if issubclass(warning.category, UserWarning)
        ]

    def _landed(self, files: dict[str, Path], error: Exception) -> bool:
        """Whether a commit that seemed to fail is there: the answer may have been lost."""
        if status(error) in (400, 401, 403):
            return False
        try:
            there = listing(self._hub, self.repo)
        except PushError:
            return False
        return all(name in there and is_same(there[name], files[name]) for name in files)


class _Stream(io.BufferedReader):
    """A file being sent: counts what is read, ends when stopped, leaves no pages behind."""

    def __init__(self, path: Path, stop: threading.Event) -> None:
        super().__init__(io.FileIO(path))
        self._stop = stop
        self._count: Callable[[int], None] | None = None

    @contextmanager
    def counted(self, count: Callable[[int], None]) -> Iterator[None]:
        """Within, `count` is called with the bytes of every read."""
        self._count = count
        try:
            yield
        finally:
            self._count = None

    def read(self, size: int | None = -1, /) -> bytes:
        """As any file's; an error once the push was stopped."""
        if self._stop.is_set():
            raise PushError("stopped")
        data = super().read(size)
        if self._count:
            self._count(len(data))
        return data

    def finish(self) -> None:
        """Close it; its pages may go from the page cache."""
        evict_range(self.fileno(), 0, 0)  # 0: to its end
        self.close()


@contextmanager
def quiet() -> Iterator[None]:
    """huggingface_hub puts no bars, and no retries with signed URLs, between our lines.

    Nor does it wait for ever: a request that stalls fails after STALL seconds.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity

    before = get_verbosity()
    set_verbosity(logging.ERROR)
    try:
        with without_bars(), impatient(max(STALL, constants.HF_HUB_DOWNLOAD_TIMEOUT)):
            yield
    finally:
        set_verbosity(before)
