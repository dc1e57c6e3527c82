"""`~/` as a shell means it, where no shell saw it: in quotes, behind a `=`, inside a file."""

from __future__ import annotations

from pathlib import Path


def at_home(path: str) -> str:
    """The same path, from the home folder on if it begins with `~/`."""
    return str(Path(path).expanduser()) if path.startswith("~/") else path
