"""A merged folder goes to the Hub: checked first, sent file by file, committed once at the end.

What is sent belongs to no branch until the commit, so nobody finds half a model; and as the Hub
knows large files by their sha256, none is sent twice. Files go as streams over plain HTTP:
huggingface_hub then does without Xet, whose buffers alone exceed the memory that a merge takes.
"""

from __future__ import annotations

import hashlib
import shlex
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from ..errors import PushError
from ..settings import UploadSettings
from ..version import __version__
from .client import ask, uploading_client

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.hf_api import RepoSibling

NOT_PUSHED = frozenset({"answers.jsonl", "report.html"})
"""They hold the prompts and images of a search, which may not be meant for the public."""
_MADE_BY_THE_HUB = ".gitattributes"  # every new repository has one
_JOIN_SECONDS = 2.0  # for the thread to notice that its file is closed

_T = TypeVar("_T")


def pushed_files(folder: Path) -> dict[str, Path]:
    """The files of a merged folder that belong into its repository, by the path they have there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith((".", "__pycache__")) for part in relative.parts)
        if path.is_file() and not hidden and str(relative) not in NOT_PUSHED:
            found[relative.as_posix()] = path
    return found


class Upload(AbstractContextManager["Upload"]):
    """Uploads one merged folder to one repository; for use by one thread.

    `check` changes nothing, `begin` creates the repository, `add_shard` sends a file in the
    background, `finish` sends what is left and commits. Leaving the `with` block stops what is
    under way, and commits nothing.

    pending_note: a file that says that this upload is unfinished, removed by `finish`. repo, url:
    the repository's name and address.
    """

    def __init__(
        self, folder: Path, settings: UploadSettings, pending_note: Path | None = None
    ) -> None:
        from huggingface_hub import HfApi

        assert settings.push_to_hub is not None
        self._folder, self._settings, self._pending_note = folder, settings, pending_note
        self._hub = HfApi(library_name="lowmem-adamms", library_version=__version__)
        self.repo = settings.push_to_hub
        self.url = f"{self._hub.endpoint}/{self.repo}"
        self._head: str | None = None  # the main branch's commit, if the repository exists
        self._other_files: set[str] = set()
        self._additions: dict[str, CommitOperationAdd] = {}
        self._queue: SimpleQueue[tuple[str, BinaryIO] | None] = SimpleQueue()
        # A daemon: Python would wait for any other at exit, whatever Ctrl-C said
        self._thread = threading.Thread(target=self._send_queued, daemon=True)
        self._finishing = threading.Event()
        self._resources = ExitStack()

    def __enter__(self) -> Upload:
        self._resources.enter_context(uploading_client())
        self._resources.callback(self._thread.join, _JOIN_SECONDS)  # after its files are closed
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finishing.set()
        self._queue.put(None)
        self._resources.close()

    def check(self) -> None:
        """Check, without changing anything, that the repository can be created or filled.

        PushError: the name, the token, its permissions, or other files in the repository. Files
        that are the folder's, byte for byte, are no other files.
        """
        from huggingface_hub import constants, get_token

        if constants.is_offline_mode():
            raise PushError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
        if get_token() is None:
            raise PushError("no token for the Hub; set HF_TOKEN or run `hf auth login`")
        self._ask(self._check_token, "the token")
        if not self._ask(lambda: self._hub.repo_exists(self.repo)):
            return
        info = self._ask(lambda: self._hub.model_info(self.repo, files_metadata=True))
        if self._settings.private and not info.private:
            raise PushError(
                f"{self.repo} exists on the Hub and is public; make it private in its settings, or"
                " leave out `private`"
            )
        self._ask(lambda: self._hub.auth_check(self.repo, write=True))
        self._head = info.sha
        ours = pushed_files(self._folder)
        others = {f.rfilename for f in info.siblings or () if not _is_same(f, ours)}
        self._other_files = others - {_MADE_BY_THE_HUB}
        if self._other_files and not self._settings.replace_repo:
            raise PushError(
                f"{self.repo} exists on the Hub and holds other files ({min(self._other_files)} and"
                " so on); choose another name, or replace them with `replace_repo=True`"
            )

    def _check_token(self) -> None:
        """PushError unless the Hub knows the token, and it may write in the namespace."""
        me = self._hub.whoami()
        user, namespace = me["name"], self.repo.partition("/")[0]
        roles = {user: "admin"} | {org["name"]: org.get("roleInOrg") for org in me.get("orgs", ())}
        if namespace not in roles:
            raise PushError(
                f"{self.repo}: this token is {user}'s and can write to {', '.join(roles)}, not"
                f" {namespace}"
            )
        token = me.get("auth", {}).get("accessToken", {})
        if "read" in (roles[namespace], token.get("role")):
            raise PushError(
                f"{self.repo}: with this token {user} may only read in {namespace}; use one, and a"
                " role, that may write"
            )

    def begin(self) -> None:
        """Create the repository unless it exists. PushError if the Hub refuses."""
        if self._head is None:
            private = True if self._settings.private else None  # None: the organisation's default
            self._ask(lambda: self._hub.create_repo(self.repo, private=private, exist_ok=True))
            self._head = self._ask(lambda: self._hub.model_info(self.repo)).sha

    def add_shard(self, path: Path) -> None:
        """Send a complete file in the background; from now on it may be moved, but not changed."""
        self._queue.put((path.name, self._open(path)))

    def finish(self, progress: Callable[[int], None] | None = None) -> int:
        """Send what is left of the folder, which is complete, and commit.

        Returns the number of its files, or raises PushError, which says how to go on later.
        progress is called with the size of each file that has arrived.
        """
        files = pushed_files(self._folder)
        self._finishing.set()
        self._queue.put(None)
        self._thread.join()
        try:
            self.begin()
            for name, path in files.items():
                if name not in self._additions:
                    self._send(name, self._open(path))
                if progress is not None:
                    progress(path.stat().st_size)
            self._commit(files)
        except PushError as error:
            raise PushError(f"{error}; {self._way_on()}") from error
        if self._pending_note is not None:
            self._pending_note.unlink(missing_ok=True)
        return len(files)

    def _way_on(self) -> str:
        words = ["python", "-m", "lowmem_adamms", "push", str(self._folder), self.repo]
        words += ["--private"] if self._settings.private else []
        words += ["--replace-repo"] if self._settings.replace_repo else []
        command = shlex.join(words)
        return f"the output is complete at {self._folder}; to finish the upload: {command}"

    def _open(self, path: Path) -> BinaryIO:
        return self._resources.enter_context(path.open("rb"))

    def _send_queued(self) -> None:
        """The thread: send one file after another, until `finish` takes over or one fails."""
        with suppress(Exception):  # finish() tries again, and says what is wrong
            for name, file in iter(self._queue.get, None):
                if self._finishing.is_set():
                    return
                self._send(name, file)

    def _send(self, name: str, file: BinaryIO) -> None:
        """Send a file if the Hub keeps its like as a large one; a small one goes in the commit."""
        from huggingface_hub import CommitOperationAdd

        addition = CommitOperationAdd(name, file)  # reads it once, for its sha256

        def send() -> None:
            file.seek(0)
            self._hub.preupload_lfs_files(self.repo, [addition], num_threads=1)

        self._ask(send)
        self._additions[name] = addition

    def _commit(self, files: Mapping[str, Path]) -> None:
        """Everything in one commit, on top of what the branch was when it was checked."""
        from huggingface_hub import CommitOperationDelete

        stale = sorted(self._other_files - files.keys())
        deletions = [CommitOperationDelete(name, is_folder=False) for name in stale]

        def commit() -> None:
            try:
                self._hub.create_commit(
                    self.repo,
                    [*self._additions.values(), *deletions],
                    commit_message=f"Upload merge with lowmem-adamms {__version__}",
                    parent_commit=self._head,
                )
            except Exception:  # perhaps only the answer was lost
                info = self._hub.model_info(self.repo, files_metadata=True)
                if sum(_is_same(file, files) for file in info.siblings or ()) < len(files):
                    raise

        self._ask(commit)

    def _ask(self, request: Callable[[], _T], subject: str = "") -> _T:
        return ask(subject or self.repo, request, error_class=PushError, advice="")


def _is_same(sibling: RepoSibling, files: Mapping[str, Path]) -> bool:
    """Whether a file on the Hub has the bytes of ours: by its sha256, or git's sha1."""
    path = files.get(sibling.rfilename)
    if path is None or sibling.size != path.stat().st_size:
        return False
    with path.open("rb") as file:
        if sibling.lfs:
            return hashlib.file_digest(file, "sha256").hexdigest() == sibling.lfs.sha256
        git_blob = b"blob %d\0" % sibling.size + file.read()
    return hashlib.sha1(git_blob).hexdigest() == sibling.blob_id
