"""A merged folder goes to the Hub: checked first, sent file by file, committed once at the end.

What is sent belongs to no branch until the commit, so nobody finds half a model; and as the Hub
knows large files by their sha256, none is sent twice. Files go as streams over plain HTTP:
huggingface_hub then does without Xet, whose buffers alone exceed the memory that a merge takes.
"""

from __future__ import annotations

import hashlib
import io
import shlex
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import PushError, first_line
from ..version import __version__
from .client import ATTEMPTS, FIRST_ATTEMPTS, ask, uploading_client

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile

NOT_PUSHED = frozenset({"answers.jsonl", "report.html"})
"""They hold the prompts and images of a search, which may not be meant for the public."""
FILE_ATTEMPTS = 3
"""Attempts at one large file; within each, huggingface_hub repeats a request five times."""
_MADE_BY_THE_HUB = ".gitattributes"  # every new repository has one
_POLL_SECONDS = 0.2  # between looks at the thread; Ctrl-C is heard in between
_JOIN_SECONDS = 2.0  # for the thread to notice that it should stop

_T = TypeVar("_T")


# What may be uploaded where


@dataclass(frozen=True, slots=True)
class Target:
    """A repository that can take an upload.

    head: the commit of its main branch, None if it does not exist. present: files of ours that it
    holds already, byte for byte. stale: its other files, to be deleted or overwritten.
    """

    repo_id: str
    private: bool = False
    replace: bool = False
    head: str | None = None
    present: frozenset[str] = field(default_factory=frozenset)
    stale: frozenset[str] = field(default_factory=frozenset)


def check_target(
    repo_id: str,
    *,
    private: bool = False,
    replace: bool = False,
    card_text: str | None = None,
    folder: Path | None = None,
) -> Target:
    """Check, without changing anything, that a repository can be created or filled.

    Args:
        repo_id: `org/name` or `user/name`.
        private: Make the repository private; an existing public one is refused.
        replace: Accept a repository that holds other files; the upload will delete them.
        card_text: The model card to be uploaded, whose metadata the Hub must accept.
        folder: The folder to be uploaded if it is complete: then what the repository already has
            of it does not count as other files.

    Raises:
        PushError: The name, the token, its permissions, the card or the repository's content.
    """
    from huggingface_hub import constants

    if repo_id.count("/") != 1:
        raise PushError(f"{repo_id!r}: expected a repository as org/name or user/name")
    if constants.is_offline_mode():
        raise PushError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    hub = _hub_api()
    with uploading_client():
        _ask("the token", lambda: _check_token(hub, repo_id))
        if card_text is not None:
            check_card(card_text)
        head = _find_head(hub, repo_id, private=private)
        if head is None:
            return Target(repo_id, private, replace)
        listed = _ask(repo_id, lambda: _list_files(hub, repo_id))
    ours = pushed_files(folder) if folder else {}
    present = frozenset(name for name in listed if _is_same(listed[name], ours.get(name)))
    others = frozenset(listed) - present - {_MADE_BY_THE_HUB}
    if others and not replace:
        raise PushError(
            f"{repo_id} exists on the Hub and holds other files ({min(others)} and so on); choose"
            " another name, or replace them with --replace-repo"
        )
    return Target(repo_id, private, replace, head, present, others)


def pushed_files(folder: Path) -> dict[str, Path]:
    """The files of a merged folder that belong into its repository, by the path they have there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith((".", "__pycache__")) for part in relative.parts)
        if path.is_file() and not hidden and str(relative) not in NOT_PUSHED:
            found[relative.as_posix()] = path
    return found


def check_card(text: str) -> None:
    """PushError if the Hub would refuse the model card: else only the final commit would fail."""
    from huggingface_hub import ModelCard

    advice = "rename the inputs' folders or mend the base's README.md"
    try:
        card = ModelCard(text)
    except Exception as error:  # YAML's own errors, and what the library makes of odd values
        reason = first_line(error)
        raise PushError(f"the model card's metadata are not valid: {reason}; {advice}") from error

    def validate() -> None:
        try:
            card.validate()
        except ValueError as error:
            raise error.__context__ or error from None  # the library hides the Hub's answer

    try:
        _ask("the model card", validate)
    except PushError as error:
        raise PushError(f"{error}; {advice}") from error


def _check_token(hub: HfApi, repo_id: str) -> None:
    """PushError unless the Hub knows the token, and it may write in the repository's namespace."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise PushError("no token for the Hub; set HF_TOKEN or run `hf auth login`")
    me = hub.whoami()
    namespace = repo_id.partition("/")[0]
    user = me.get("name")
    roles = {org.get("name"): org.get("roleInOrg") for org in me.get("orgs", ())}
    if namespace not in (user, *roles):
        known = ", ".join(map(str, (user, *roles)))
        raise PushError(
            f"{repo_id}: this token is {user}'s and can write to {known}, not {namespace}"
        )
    if roles.get(namespace) == "read":
        raise PushError(f"{repo_id}: {user} may only read in {namespace}; ask for the role `write`")
    if not _token_may_write(me.get("auth", {}).get("accessToken", {}), namespace, repo_id):
        raise PushError(f"{repo_id}: this token may not write there; use one with the role `write`")


def _token_may_write(token: Mapping[str, Any], namespace: str, repo_id: str) -> bool:
    """What the Hub tells of a token's own role; where it tells nothing, the upload will show."""
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if token.get("role") != "fineGrained" or not isinstance(scopes, list):
        return bool(token.get("role") != "read")
    return any(
        scope.get("entity", {}).get("name") in (namespace, repo_id)
        and any(may.startswith("repo") and may.endswith("write") for may in scope["permissions"])
        for scope in scopes
    )


def _find_head(hub: HfApi, repo_id: str, *, private: bool) -> str | None:
    """The commit of the repository's main branch, or None if there is no repository."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = _ask(repo_id, lambda: hub.model_info(repo_id))
    except PushError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            return None
        raise
    if private and not info.private:
        raise PushError(
            f"{repo_id} exists on the Hub and is public; make it private in its settings, or leave"
            " out --private"
        )
    try:
        _ask(repo_id, lambda: hub.auth_check(repo_id, write=True))
    except PushError as error:
        raise PushError(f"this token may not write there: {error}") from error
    return info.sha


def _list_files(hub: HfApi, repo_id: str) -> dict[str, RepoFile]:
    """Every file on the repository's main branch."""
    from huggingface_hub.hf_api import RepoFile

    tree = hub.list_repo_tree(repo_id, recursive=True)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _is_same(listed: RepoFile, path: Path | None) -> bool:
    """Whether a file on the Hub has the bytes of one here: by its sha256, or git's sha1."""
    if path is None or listed.size != path.stat().st_size:
        return False
    with path.open("rb") as file:
        if listed.lfs:
            return hashlib.file_digest(file, "sha256").hexdigest() == listed.lfs.sha256
        git_digest = hashlib.sha1(b"blob %d\0" % listed.size)
        git_digest.update(file.read())
    return git_digest.hexdigest() == listed.blob_id


def _hub_api() -> HfApi:
    """The Hub's client, under our name."""
    from huggingface_hub import HfApi

    return HfApi(library_name="lowmem-adamms", library_version=__version__)


def _ask(
    subject: str,
    request: Callable[[], _T],
    attempts: int = FIRST_ATTEMPTS,
    stop: threading.Event | None = None,
) -> _T:
    return ask(subject, request, error_class=PushError, attempts=attempts, stop=stop, advice="")


# The upload


class Upload(AbstractContextManager["Upload"]):
    """Uploads one merged folder to one repository; for use by one thread.

    `begin` creates the repository, `add_shard` sends a file in the background, `finish` sends what
    is left and commits. Leaving the `with` block stops what is under way, and commits nothing.

    pending_note: a file that says that this upload is unfinished, removed by `finish`. repo, url:
    the repository's name and address. notes: what the Hub had to say about the model card.
    """

    def __init__(
        self, target: Target, folder: str | Path, pending_note: Path | None = None
    ) -> None:
        self._hub, self._target, self._folder = _hub_api(), target, Path(folder)
        self.repo, self.url = target.repo_id, f"{self._hub.endpoint}/{target.repo_id}"
        self.notes: list[str] = []
        self._head, self._pending_note = target.head, pending_note
        self._additions: dict[str, CommitOperationAdd] = {}
        self._queue: SimpleQueue[tuple[str, _SentFile] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._finished_bytes = self._sent_bytes = self._reported_bytes = 0
        self._resources = ExitStack()

    def __enter__(self) -> Upload:
        self._resources.enter_context(uploading_client())
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)
        self._resources.close()

    def begin(self) -> None:
        """Create the repository unless it exists. PushError if the Hub refuses."""
        if self._head is None:
            private = True if self._target.private else None  # None: the organisation's default
            self._ask(lambda: self._hub.create_repo(self.repo, private=private, exist_ok=True))
            self._head = self._ask(lambda: self._hub.model_info(self.repo)).sha

    def add_shard(self, path: Path) -> None:
        """Send a complete file in the background; from now on it may be moved, but not changed."""
        self._enqueue(path.name, path)

    def finish(self, progress: Callable[[int], None] | None = None) -> int:
        """Send what is left of the folder, which is complete, and commit.

        Args:
            progress: Called with the bytes sent since the last call.

        Returns:
            The number of files that the repository has of the folder.

        Raises:
            PushError: The Hub cannot be brought to take it; says how to go on later.
        """
        files = pushed_files(self._folder)
        try:
            self.begin()
            self._wait(progress)
            self._error = None  # what could not be sent in the background is sent now
            for name, path in files.items():
                if name not in self._additions and name not in self._target.present:
                    self._enqueue(name, path)
            self._wait(progress)
            if self._error is not None:
                raise self._error
            self._commit(files)
        except PushError as error:
            raise PushError(f"{error}; {self._way_on()}") from error
        if self._pending_note is not None:
            self._pending_note.unlink(missing_ok=True)
        return len(files)

    def _way_on(self) -> str:
        words = ["python", "-m", "lowmem_adamms", "push", str(self._folder), self.repo]
        words += ["--private"] if self._target.private else []
        words += ["--replace-repo"] if self._target.replace else []
        command = shlex.join(words)
        return f"the output is complete at {self._folder}; to finish the upload: {command}"

    def _enqueue(self, name: str, path: Path) -> None:
        if self._thread is None:
            # A daemon: Python would wait for any other at exit, whatever Ctrl-C said
            self._thread = threading.Thread(target=self._send_queued, daemon=True)
            self._thread.start()
        self._queue.put((name, self._resources.enter_context(_SentFile(path))))

    def _wait(self, progress: Callable[[int], None] | None) -> None:
        """Until everything in the queue is sent, or something could not be."""
        if self._thread is None:
            return
        self._queue.put(None)
        while self._thread.is_alive():
            self._thread.join(_POLL_SECONDS)
            if progress is not None:
                sent_bytes = self._sent_bytes
                progress(sent_bytes - self._reported_bytes)
                self._reported_bytes = sent_bytes
        self._thread, self._queue = None, SimpleQueue()

    def _send_queued(self) -> None:
        """The thread: send one file after another until there are no more, or one fails."""
        try:
            while (item := self._queue.get()) is not None and not self._stop.is_set():
                name, file = item
                if name not in self._additions and name not in self._target.present:
                    self._additions[name] = self._send(name, file)
        except BaseException as error:
            self._error = error

    def _send(self, name: str, file: _SentFile) -> CommitOperationAdd:
        """Send a file if the Hub keeps its like as a large one; a small one goes in the commit."""
        from huggingface_hub import CommitOperationAdd

        addition = CommitOperationAdd(name, file)  # reads it once, for its sha256
        file.on_read = self._note_position

        def send() -> None:
            file.seek(0)
            self._hub.preupload_lfs_files(self.repo, [addition], num_threads=1)

        self._ask(send, attempts=FILE_ATTEMPTS)
        file.on_read = None
        self._finished_bytes += addition.upload_info.size
        self._sent_bytes = self._finished_bytes
        if addition.path_or_fileobj is not file:  # it was large: its digest is all a commit needs
            file.close()
        return addition

    def _note_position(self, position: int) -> None:
        if self._stop.is_set():
            raise PushError("stopped")
        self._sent_bytes = self._finished_bytes + position

    def _commit(self, files: Mapping[str, Path]) -> None:
        """Everything in one commit, on top of what the branch was when it was checked."""
        from huggingface_hub import CommitOperationDelete

        additions = [self._additions[name] for name in files if name in self._additions]
        stale = sorted(self._target.stale - set(files))
        deletions = [CommitOperationDelete(name, is_folder=False) for name in stale]
        if not (additions or deletions):
            return

        def commit() -> None:
            try:
                self._hub.create_commit(
                    self.repo,
                    [*additions, *deletions],
                    commit_message=f"Upload merge with lowmem-adamms {__version__}",
                    parent_commit=self._head,
                )
            except Exception:
                if not self._is_committed(files):
                    raise

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)  # what the Hub says about the card
            self._ask(commit)
        messages = [warning.message for warning in caught]
        self.notes += [" ".join(str(m).split()) for m in messages if isinstance(m, UserWarning)]

    def _is_committed(self, files: Mapping[str, Path]) -> bool:
        """Whether a commit that seemed to fail is there: only the answer may have been lost."""
        try:
            listed = _list_files(self._hub, self.repo)
        except Exception:
            return False
        return all(name in listed and _is_same(listed[name], files[name]) for name in files)

    def _ask(self, request: Callable[[], _T], attempts: int = ATTEMPTS) -> _T:
        return _ask(self.repo, request, attempts, self._stop)


class _SentFile(io.BufferedReader):
    """A file being sent. on_read: called with the position after every read."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self.on_read: Callable[[int], None] | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        """As any file's."""
        data = super().read(size)
        if self.on_read is not None:
            self.on_read(self.tell())
        return data
