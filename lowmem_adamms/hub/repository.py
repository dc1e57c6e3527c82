"""Repositories of the Hub: which commit is meant, what it holds, its headers and small files.

A revision is resolved once, to a commit; everything after that is of this commit. What is not in
the cache is known by its headers, fetched by ranges, and lies under the path at which the cache
would keep it: there `download` puts it, for whoever needs files. Leaves to others: requests for
bytes (`wire.py`), what the headers mean (`checkpoint.py`), streaming (`ranges.py`, `shards.py`).
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from ..checkpoints.mapped_files import file_digest
from ..checkpoints.safetensors_header import MAX_HEADER_BYTES, Header, parse_header
from ..errors import DigestError, FormatError, HubError
from .plain_http import hub_utils
from .remote_file import RemoteFile, patiently

_REF = re.compile(r"([A-Za-z0-9_][\w.-]*/[\w.-]+)(?:@(\S+))?")
PLANNING = (
    *("config.json", "*.index.json", "README.md", "tokenizer.json", "vocab.json"),
    *("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"),
)
"""The files that a plan and a model card need, of either side."""
FIRST_TRIES = 3
"""Attempts at the first question: there may be no network at all."""
LANES = 8
"""Requests under way at once."""
_FIRST = 1 << 17  # bytes that hold nearly every header


@dataclass(frozen=True)
class Repo:
    """A repository at one commit. `files` is empty where only the cache was looked at (offline).

    folder: where its files lie, or would lie, in the cache or, without one, in a folder that goes
    with this object.
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
        """Those of these paths in its folder that are not there, and what can be read instead."""
        return {
            path: self.files[path.name]
            for path in paths
            if path.name in self.files and not path.exists()
        }


def parse(text: str) -> tuple[str, str | None] | None:
    """`org/name[@revision]` as its two halves; None if it is not of this form."""
    found = _REF.fullmatch(text)
    return (found[1], found[2]) if found else None


def find(repo_id: str, revision: str | None, *, cache: bool = True) -> Repo:
    """The repository at the commit that is meant, its files for planning fetched.

    cache: keep them in the ordinary cache; else in a temporary folder. HubError where it cannot be
    had, in one line; with HF_HUB_OFFLINE the cache is all there is.
    """
    from huggingface_hub import HfApi, constants

    what = f"{repo_id}@{revision}" if revision else repo_id
    if constants.is_offline_mode():
        how: dict[str, Any] = {"local_files_only": True, "allow_patterns": list(PLANNING)}
        folder = patiently(what, lambda: _snapshot(repo_id, revision, None, **how))
        return Repo(repo_id, folder.name, revision, {}, folder)
    info = patiently(
        what,
        lambda: HfApi().model_info(
            repo_id, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        ),
        tries=FIRST_TRIES,
        advice="no folder or file of that name is here either: correct it, or run it again",
    )
    sha = str(info.sha)
    files = {file.name: file for file in _files(repo_id, sha, info.siblings or ())}
    store = None if cache else Path(tempfile.mkdtemp(prefix="lowmem-adamms-"))
    names = [name for name in files if "/" not in name and any(map(PurePath(name).match, PLANNING))]
    base = store or Path(constants.HF_HUB_CACHE).expanduser().resolve()
    folder = base / f"models--{repo_id.replace('/', '--')}" / "snapshots" / sha
    repo = Repo(repo_id, sha, revision, files, folder)
    if store:
        weakref.finalize(repo, shutil.rmtree, store, ignore_errors=True)
    fetch(repo, names)
    return repo


def _files(repo_id: str, sha: str, siblings: Iterable[Any]) -> Iterator[RemoteFile]:
    """What a repository lists, with sizes and digests."""
    for sibling in siblings:
        sha256 = sibling.lfs["sha256"] if sibling.lfs else None
        size, etag = sibling.size or 0, sha256 or sibling.blob_id or ""
        yield RemoteFile(repo_id, sha, sibling.rfilename, size, etag, sha256)


def fetch(repo: Repo, names: Iterable[str], *, bars: bool = False, workers: int = LANES) -> None:
    """Have files of a repository lie in its folder. bars: show huggingface_hub's progress."""
    missing = [name for name in names if not (repo.folder / name).is_file()]
    if not missing:
        return
    patterns = [glob.escape(name) for name in missing]
    options: dict[str, Any] = {"allow_patterns": patterns, "max_workers": workers}
    cache = repo.folder.parents[2]
    with contextlib.nullcontext() if bars else without_bars():
        # By the name that was asked for, so that the cache can tell it when offline
        at = patiently(
            repo.ref, lambda: _snapshot(repo.id, repo.asked, cache, known=repo, **options)
        )
    if at.resolve() != repo.folder.resolve():
        raise HubError(f"{repo.id}: {repo.asked or 'main'} has just changed; run the command again")
    for name in missing:
        if not (repo.folder / name).is_file():
            raise HubError(f"{repo.ref}: {name} was not fetched")


def _snapshot(
    repo_id: str, revision: str | None, cache: Path | None, *, known: Repo | None = None, **how: Any
) -> Path:
    from huggingface_hub import snapshot_download

    if known is not None and known.folder.exists():  # the name was resolved and noted before
        revision = known.sha
    return Path(snapshot_download(repo_id, revision=revision, cache_dir=cache, **how))


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """huggingface_hub shows no progress inside the block, unless its user insists."""
    from huggingface_hub import constants

    utils, told = hub_utils(), constants.HF_HUB_DISABLE_PROGRESS_BARS
    if told is not None or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def headers(files: Mapping[Path, RemoteFile]) -> dict[Path, Header]:
    """The safetensors header of each file, by ranges, several at once."""
    with ThreadPoolExecutor(LANES) as pool:
        return dict(zip(files, pool.map(_header, files.values()), strict=True))


def _header(file: RemoteFile) -> Header:
    """One header: a request for what nearly always holds it, another for what is beyond."""
    raw = file.read(0, min(file.size, _FIRST))
    length = int.from_bytes(raw[:8], "little")
    name = f"{file.repo_id}: {file.name}"
    if len(raw) < 8 or 8 + length > file.size or length > MAX_HEADER_BYTES:
        raise FormatError(f"{name}: not a safetensors file, or a damaged one")
    if len(raw) < 8 + length:
        raw += file.read(len(raw), 8 + length)
    file.header = raw[: 8 + length]
    try:
        return parse_header(file.header[8:], file.size)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from None


def download(repo: Repo, paths: Iterable[Path], *, bars: bool = False) -> None:
    """Have weight files lie in the cache, each with the sha256 that the Hub gives it.

    HubError where the disk is too small, before anything is fetched, or where a digest differs;
    such a file is removed again. Files that were there before are taken as they are.
    """
    missing = repo.missing(paths)
    if not missing:
        return
    there = next(folder for folder in repo.folder.parents if folder.exists())
    need, free = sum(file.size for file in missing.values()), shutil.disk_usage(there).free
    if need > free:
        raise HubError(
            f"{there}: {free / 1e9:.1f} GB free, {repo.id} takes {need / 1e9:.1f} GB; free some,"
            " or --no-cache or --disk-budget"
        )
    fetch(repo, [file.name for file in missing.values()], bars=bars, workers=2)
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda item: _check_digest(*item), missing.items()):
            pass


def _check_digest(path: Path, file: RemoteFile) -> None:
    """HubError, and the file is gone, if it is not what the Hub says."""
    if file.sha256 is None:
        return
    found = file_digest(path, hashlib.sha256())
    if found != file.sha256:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise bad_digest(file, found)


def bad_digest(file: RemoteFile, found: str) -> DigestError:
    """What to say of bytes that are not the Hub's."""
    return DigestError(
        f"{file.repo_id}@{file.sha[:12]}: {file.name} has the sha256 {found[:16]}…, the Hub says"
        f" {str(file.sha256)[:16]}…; run the same command again to fetch it anew"
    )
