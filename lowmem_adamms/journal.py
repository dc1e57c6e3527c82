"""What a killed merge leaves behind, and how the same command finds its way back.

One JSON object a line, each line fsynced before what it promises is relied on:
    {"merge": fingerprint}                        which merge this folder is of
    {"file": name, "upto": n}                     the first n bytes of the file are durable
    {"file": name, "size": n, "blake3": digest}   the file is complete and durable
A last line cut short by the kill is ignored. The journal is locked while a merge runs.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import OutputError

WORK = ".partial"
"""The folder inside OUT where everything is made; what is in OUT itself is complete."""
NAME = ".journal.jsonl"
"""Hidden, as no sidecar of a model is."""


class Journal:
    """The journal of one merge in `out/.partial`, opened and locked."""

    def __init__(self, out: Path, fingerprint: str) -> None:
        """Start or resume. OutputError if another merge owns the folder or is running in it."""
        self.path = out / WORK / NAME
        self.upto: dict[str, int] = {}
        self.done: dict[str, dict[str, Any]] = {}
        found = _fingerprint(self.path)
        if found not in (None, fingerprint):
            raise OutputError(
                f"{out} holds an unfinished merge of other inputs or options;"
                f" delete {out / WORK} or choose another -o"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        self._lock(out)
        self._read()
        if found is None:
            self._file.truncate(0)
            self.note(merge=fingerprint)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    @property
    def resumed(self) -> bool:
        """Whether an earlier run got somewhere."""
        return bool(self.upto or self.done)

    def note(self, **line: Any) -> None:
        """Append a line and make it durable."""
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._take(line)

    def _lock(self, out: Path) -> None:
        with contextlib.suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._file.close()
                raise OutputError(f"{out}: another merge is writing there now") from None

    def _read(self) -> None:
        self._file.seek(0)
        end = 0
        for raw in self._file:
            if not raw.endswith(b"\n"):
                break
            end += len(raw)
            self._take(json.loads(raw))
        self._file.truncate(end)

    def _take(self, line: dict[str, Any]) -> None:
        if "blake3" in line:
            self.done[line["file"]] = line
        elif "upto" in line:
            self.upto[line["file"]] = line["upto"]


def _fingerprint(path: Path) -> str | None:
    """Whose journal lies there; None if there is none or it was cut off before its first line."""
    try:
        first = path.read_bytes().partition(b"\n")
        return str(json.loads(first[0])["merge"]) if first[1] else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return "unreadable"
