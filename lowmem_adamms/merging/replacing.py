"""A new merge in the place of a complete one: made beside it, and moved there once it is complete.

Beside OUT lie `.OUT.new` while the new one is made, and `.OUT.old` for the moment in which they
change places. The same command goes on from wherever it was killed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..errors import OutputError
from .journal import ANSWERS, PENDING, WORK, find_complete
from .output_folder import INDEX, sync

_PAPERS = {"README.md", "adamms.json", "config.json", "report.html", ANSWERS, PENDING, INDEX}


def find_staging(out: Path) -> Path | None:
    """Where a merge to `out` is made: beside the complete one that lies there; None: in `out`.

    OutputError if `out` holds files that are not of that merge: they would be lost.
    """
    out = out.resolve()
    staging, old = _beside(out)
    if find_complete(out):
        _check_own_files(out)
        if find_complete(old):  # what a kill has left
            shutil.rmtree(old)
        return staging
    return staging if find_complete(staging) and not out.exists() else None


def move_into_place(out: Path) -> None:
    """Put the complete merge from beside `out` in its place, and delete what was there."""
    out = out.resolve()
    staging, old = _beside(out)
    if out.exists():
        _check_own_files(out)
    try:
        if out.exists():
            out.rename(old)
        staging.rename(out)
    except OSError as error:
        raise OutputError(
            f"{out} cannot be replaced ({error.strerror}); the new merge is complete in {staging}"
        ) from None
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _check_own_files(out: Path) -> None:
    recipe = json.loads((out / "adamms.json").read_bytes())
    try:
        own = {output["file"] for output in recipe["outputs"]} | set(recipe["sidecars"]) | _PAPERS
    except (KeyError, TypeError):
        raise OutputError(f"{out}: adamms.json does not list its files; delete {out}") from None
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if name not in own | {WORK} and (path.is_symlink() or not path.is_dir()):
            raise OutputError(f"{path} is not of the merge that would be replaced; move it away")


def _beside(out: Path) -> tuple[Path, Path]:
    return out.parent / f".{out.name}.new", out.parent / f".{out.name}.old"
