"""A repository of the Hub at one commit: what it holds, its small files, and downloads.

A revision is resolved once, to a commit; everything after that is of this commit. A file lies, or
would lie, at the path at which the ordinary cache keeps it, and is fetched to there when needed.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HubError
from ..values import format_size
from .client import ask, hidden_progress_bars
from .remote_file import RemoteFile

_REPO_ID = re.compile(r"([A-Za-z0-9_][\w.-]*/[\w.-]+)(?:@(\S+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_UNPRINTABLE = re.compile(r"[\0-\x1f\x7f\ud800-\udfff]")
PLANNING_FILES = (
    "config.json",
    "adapter_config.json",
    "*.index.json",
    "README.md",
    "tokenizer.json",
    "vocab.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
"""The files that a plan and a model card need, of either side."""
PARALLEL_DOWNLOADS = 4


@dataclass(frozen=True)
class Repository:
    """A repository at one commit.

    asked: the revision that was asked for, None for the default branch. files: all it holds, by
    name; empty where only the cache was looked at (offline). folder: where its files lie, or would
    lie: in the cache, or in a temporary folder that is removed with this object.
    """

    id: str
    sha: str
    asked: str | None
    files: Mapping[str, RemoteFile]
    folder: Path

    @property
    def ref(self) -> str:
        """`org/name@sha`."""
        return f"{self.id}@{self.sha}"

    def missing(self, paths: Iterable[Path]) -> dict[Path, RemoteFile]:
        """Those of these paths in its folder that do not exist, each with its file on the Hub."""
        return {
            path: self.files[path.name]
            for path in paths
            if path.name in self.files and not path.exists()
        }


def parse_repo_id(text: str) -> tuple[str, str | None] | None:
    """`org/name[@revision]` as its two halves; None if it is not of this form."""
    found = _REPO_ID.fullmatch(text)
    return (found[1], found[2]) if found else None


def open_repository(repo_id: str, revision: str | None, *, cache: bool = True) -> Repository:
    """Resolve a revision to its commit, list its files, and fetch those that planning needs.

    With HF_HUB_OFFLINE the cache is all there is. cache: keep fetched files in the ordinary cache,
    not in a temporary folder.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        patterns = list(PLANNING_FILES)
        folder = _download_snapshot(
            repo_id, revision, local_files_only=True, allow_patterns=patterns
        )
        return Repository(repo_id, folder.name, revision, {}, folder)
    sha, files = _list_files(repo_id, revision)
    root = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    if not cache:
        root = Path(tempfile.mkdtemp(prefix="lowmem-adamms-"))
    folder = root / f"models--{repo_id.replace('/', '--')}" / "snapshots" / sha
    repo = Repository(repo_id, sha, revision, files, folder)
    if not cache:
        weakref.finalize(repo, shutil.rmtree, root, ignore_errors=True)
    top_level = [name for name in files if "/" not in name]
    fetch_files(
        repo, {name for pattern in PLANNING_FILES for name in fnmatch.filter(top_level, pattern)}
    )
    return repo


def _list_files(repo_id: str, revision: str | None) -> tuple[str, dict[str, RemoteFile]]:
    """The commit that is meant, and every file in it with its size and digest."""
    from huggingface_hub import HfApi, constants

    ref = f"{repo_id}@{revision}" if revision else repo_id
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    info = ask(
        f"{ref} (no folder or file of that name here)",
        lambda: HfApi().model_info(
            repo_id, revision=revision, files_metadata=True, timeout=timeout
        ),
    )
    sha = info.sha or ""
    if not _COMMIT.fullmatch(sha):  # it becomes a path on this machine, as do the names
        raise HubError(f"{ref}: the Hub calls its commit {sha!r}, expected 40 hexadecimal digits")
    files = {}
    for file in info.siblings or ():
        name, size = file.rfilename, file.size or 0
        if not _is_inside(name) or not isinstance(size, int) or size < 0:
            raise HubError(
                f"{ref}: the Hub lists a file {name!r} of {size} bytes, which none can be"
            )
        sha256 = file.lfs.sha256 if file.lfs else None
        files[name] = RemoteFile(repo_id, sha, name, size, sha256 or file.blob_id or "", sha256)
    return sha, files


def _is_inside(name: object) -> bool:
    """Whether a file's name is a relative path that stays inside its folder, on any system."""
    if not isinstance(name, str) or _UNPRINTABLE.search(name):
        return False
    return {"", ".", ".."}.isdisjoint(re.split(r"[/\\]", name))


def fetch_files(repo: Repository, names: Iterable[str], *, progress_bars: bool = False) -> None:
    """Download those of these files that are not in the repository's folder yet."""
    missing = [name for name in names if not (repo.folder / name).is_file()]
    if not missing:
        return
    # By the revision that was asked for, once, so that the cache knows it when offline
    revision = repo.sha if repo.folder.exists() else repo.asked
    with nullcontext() if progress_bars else hidden_progress_bars():
        folder = _download_snapshot(
            repo.id,
            revision,
            cache_dir=repo.folder.parents[2],
            allow_patterns=[glob.escape(name) for name in missing],
            max_workers=PARALLEL_DOWNLOADS,
        )
    if folder.resolve() != repo.folder.resolve():
        raise HubError(f"{repo.id}: {repo.asked or 'main'} has just changed; run the command again")
    for name in missing:
        if not (repo.folder / name).is_file():
            raise HubError(f"{repo.ref}: {name} was not fetched")


def _download_snapshot(repo_id: str, revision: str | None, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    subject = f"{repo_id}@{revision}" if revision else repo_id
    return Path(ask(subject, lambda: snapshot_download(repo_id, revision=revision, **options)))


def download(repo: Repository, paths: Iterable[Path], *, progress_bars: bool = False) -> None:
    """Download weight files into the repository's folder, each checked against the Hub's sha256.

    HubError where the disk is too small, before anything is fetched. Files that were there before
    are taken as they are.
    """
    missing = repo.missing(paths)
    existing = next(folder for folder in repo.folder.parents if folder.exists())
    needed_bytes = sum(file.size for file in missing.values())
    free_bytes = shutil.disk_usage(existing).free
    if needed_bytes > free_bytes:
        raise HubError(
            f"{existing}: {format_size(free_bytes)} free, {repo.id} takes"
            f" {format_size(needed_bytes)}; free some, or stream it with `no_cache=True`"
        )
    names = [file.name for file in missing.values()]
    fetch_files(repo, names, progress_bars=progress_bars)
    # All of them, whatever the first says: a bad file that nobody looked at would stay in the cache
    with ThreadPoolExecutor(2) as pool:
        checks = [pool.submit(_check_download, path, file) for path, file in missing.items()]
    for check in checks:
        check.result()


def _check_download(path: Path, file: RemoteFile) -> None:
    """DigestError, and the file is gone, unless it has the Hub's sha256."""
    with path.open("rb") as data:
        found = hashlib.file_digest(data, "sha256").hexdigest()
    try:
        file.check_sha256(found)
    except HubError:
        path.resolve().unlink()  # in the cache it is a link to the blob
        path.unlink(missing_ok=True)
        raise
