"""The output folder: whether it is usable, files written durably, and the move to final names."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from blake3 import blake3

from ..checkpoints.weight_files import INDEXES, SINGLES
from ..errors import OutputError
from ..mapping.plan import Plan
from ..values import format_size
from .journal import ANSWERS, JOURNAL, WORK, Journal, is_pending
from .shard_layout import ShardLayout

INDEX, SINGLE = INDEXES[0], SINGLES[0]
_SPARE_BYTES = 64 << 20
"""Disk space beside shards and sidecars, for the other files and the file system."""


def check_place(plan: Plan, out: Path) -> None:
    """Raise OutputError unless `out` is new, empty or our own unfinished merge, and no input."""
    nearest = _nearest(out)
    if not nearest.is_dir():
        where = "" if nearest == out else f"{out}: "
        raise OutputError(f"{where}{nearest} is a file; choose another `out`, a folder")
    check_no_input(plan, out)
    if nearest != out or (out / WORK / JOURNAL).is_file():
        return
    if is_pending(out):
        raise OutputError(
            f"{out} is complete and waits for its upload; finish that with `push` or the command"
            " that began it, or choose another `out`"
        )
    ours = {out / WORK, out / WORK / ANSWERS}  # what a killed search leaves
    if not set(out.rglob("*")) <= ours:
        raise OutputError(f"{out} is not empty; choose another `out` or empty it")


def check_no_input(plan: Plan, out: Path) -> None:
    """Raise OutputError if `out` is the folder of an input, or inside it."""
    for side in plan.checkpoints.values():
        if side.folder and side.folder.resolve() in (out.resolve(), *out.resolve().parents):
            raise OutputError(f"{out} is the input {side.path} or inside it; choose another `out`")


def check_space(plan: Plan, shards: Sequence[ShardLayout], out: Path) -> None:
    """Raise OutputError unless what is not yet written of the output fits on the disk."""
    files = {Path(shard.name): shard.size for shard in shards} | plan.base.sidecars()
    required_bytes = _SPARE_BYTES
    for path, size in files.items():
        if not (out / path).exists():
            begun = out / WORK / path
            required_bytes += size - (begun.stat().st_blocks * 512 if begun.exists() else 0)
    nearest = _nearest(out)
    free_bytes = shutil.disk_usage(nearest).free
    if required_bytes > free_bytes:
        raise OutputError(
            f"{nearest}: {format_size(free_bytes)} free, the output needs"
            f" {format_size(required_bytes)}; free some or choose another `out`"
        )


def check_still_unused(out: Path, journal: Journal) -> None:
    """Raise OutputError if another run finished in `out` since it was checked: its result stays."""
    if journal.resumed or {path.name for path in out.iterdir()} == {WORK}:
        return
    journal.path.unlink()
    with suppress(OSError):  # answers of a search may lie there
        journal.path.parent.rmdir()
    raise OutputError(f"{out}: another run has just put its result there; choose another `out`")


def write_json(path: Path, document: object) -> None:
    """Write a document and make it durable."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    # A path that is not UTF-8 comes as lone surrogates, which JSON can hold and UTF-8 cannot
    write_file(path, text.encode(errors="backslashreplace") + b"\n")


def write_file(path: Path, content: bytes) -> None:
    """Write a file and make it durable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, target: Path) -> None:
    """Copy a file piece by piece, as it may be large, and make the copy durable."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as given, target.open("wb") as file:
        shutil.copyfileobj(given, file)
        file.flush()
        os.fsync(file.fileno())


def digest_file(path: Path) -> str:
    """The BLAKE3 digest of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, blake3).hexdigest()  # type: ignore[arg-type]


def publish(out: Path) -> None:
    """Move everything to its final name, what makes it loadable last; remove the work folder."""
    work = out / WORK
    everything = sorted(work.rglob("*"))
    files = [path for path in everything if path.is_file() and path.name != JOURNAL]
    if (work / ANSWERS).is_file():  # a search does not fsync it as it grows
        sync(work / ANSWERS)
    for path in sorted(files, key=lambda path: (path.name == INDEX, path.name == SINGLE)):
        target = out / path.relative_to(work)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    for folder in {out.absolute().parent, *(out / path.relative_to(work).parent for path in files)}:
        sync(folder)
    for folder in [path for path in reversed(everything) if path.is_dir()]:
        folder.rmdir()
    (work / JOURNAL).unlink()
    work.rmdir()
    sync(out)


def _nearest(path: Path) -> Path:
    """The path itself if it exists, else the nearest folder above it that does."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def sync(path: Path) -> None:
    """Make a file or the entries of a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
