"""What a killed run leaves behind, and how the same command finds its way back.

JSON Lines, one object each. The first line says whose journal it is, by a fingerprint of everything
that decides the result; a last line cut short by a kill is ignored; the file is locked while it is
in use. Of a merge (each line fsynced before what it promises is relied on):
    {"merge": fingerprint}
    {"file": name, "upto": n}                     the first n bytes of the file are durable
    {"file": name, "upto": n, "late": {t: hex}}   and these tensors are written at its end
    {"file": name, "size": n, "blake3": digest}   the file is complete and durable
Of a search:
    {"search": fingerprint}
    {"alpha": a, "index": i, "answer": text, "tokens": [ids]}
the same with "again": true where an alpha was asked twice, to measure the noise, and with
"alphas": {role: a} where layers had their own.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from ..closing import Closing
from ..errors import OutputError
from ..mapping.alphas import Alpha, alpha_from_json, alpha_to_json

WORK = ".partial"
"""The folder inside OUT where everything is made; what is in OUT itself is complete."""
NAME = ".journal.jsonl"
"""Hidden, as no sidecar of a model is."""
ANSWERS = "answers.jsonl"
"""A search's journal; it ends beside the merged model, and scores again with `--answers`."""

PENDING = ".push.json"
"""In OUT beside a complete merge whose upload is not finished: `{"merge": fingerprint, "repo": …}`.
It is made in WORK and moves with the rest."""


class _Log(Closing):
    """A locked file of JSON lines that belongs to one fingerprint. resumed: it was there before."""

    def __init__(self, path: Path, kind: str, fingerprint: str, others: str) -> None:
        """others: what to say if the file belongs to another run than this one."""
        self.path, self.fingerprint = path, fingerprint
        found = _fingerprint(path, kind)
        if found == _STRANGE:
            raise OutputError(f"{path} is no journal of a {kind}; choose another place")
        if found not in (None, fingerprint):
            raise OutputError(others)
        self.resumed = found is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._lock()
        self._read()
        if found is None:
            self._file.truncate(0)
            self._append({kind: fingerprint})

    def close(self) -> None:
        """Give up the lock; what was noted stays."""
        self._file.close()

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=True).encode() + b"\n")
        self._file.flush()
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        raise NotImplementedError

    def _lock(self) -> None:
        with contextlib.suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._file.close()
                raise OutputError(f"{self.path}: another run is writing there now") from None

    def _read(self) -> None:
        self._file.seek(0)
        end = 0
        for raw in self._file:
            if not raw.endswith(b"\n"):
                break
            try:
                line = json.loads(raw)
            except ValueError:  # what a power cut may leave of lines that were not fsynced
                break
            end += len(raw)
            self._take(line)
        self._file.truncate(end)


class Journal(_Log):
    """The journal of one merge in `out/.partial`, opened and locked."""

    def __init__(self, out: Path, fingerprint: str) -> None:
        """Start or resume. OutputError if another merge owns the folder or is running in it."""
        self.upto: dict[str, int] = {}
        self.late: dict[str, dict[str, bytes]] = {}
        self.done: dict[str, dict[str, Any]] = {}
        others = (
            f"{out} holds an unfinished merge of other inputs or options;"
            f" delete {out / WORK} or choose another -o"
        )
        super().__init__(out / WORK / NAME, "merge", fingerprint, others)

    def note(self, **line: Any) -> None:
        """Append a line and make it durable."""
        self._append(line)
        os.fsync(self._file.fileno())

    def _take(self, line: dict[str, Any]) -> None:
        if "blake3" in line:
            self.done[line["file"]] = line
        elif "upto" in line:
            self.upto[line["file"]] = line["upto"]
            late = {name: bytes.fromhex(content) for name, content in line.get("late", {}).items()}
            self.late.setdefault(line["file"], {}).update(late)


class AnswerJournal(_Log):
    """The answers that a search has so far, by alpha and place of the prompt."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Start or resume. OutputError if the answers there are of another search."""
        self.answers: dict[Alpha, dict[int, str]] = {}
        self.tokens: dict[Alpha, dict[int, list[int]]] = {}
        self.again: dict[Alpha, dict[int, str]] = {}
        others = (
            f"{path} holds answers of another search (other models, prompts, precision, batches or"
            " settings); give the same options, --batch-size too, or delete it or choose another"
            " place"
        )
        super().__init__(path, "search", fingerprint, others)

    def note(
        self, alpha: Alpha, index: int, answer: str, tokens: list[int], *, again: bool = False
    ) -> None:
        """Append one answer; survives a kill of this process."""
        line = alpha_to_json(alpha) | {"index": index, "answer": answer, "tokens": tokens}
        self._append(line | {"again": True} if again else line)

    def _take(self, line: dict[str, Any]) -> None:
        if "answer" not in line:
            return
        alpha, index = alpha_from_json(line), line["index"]
        if line.get("again"):
            self.again.setdefault(alpha, {})[index] = line["answer"]
        else:
            self.answers.setdefault(alpha, {})[index] = line["answer"]
            self.tokens.setdefault(alpha, {})[index] = line["tokens"]


_STRANGE = "unreadable"


def _fingerprint(path: Path, kind: str) -> str | None:
    """Whose journal lies there; None if there is none or it was cut off in its first line.

    _STRANGE for any other file: it may be somebody's only copy of something.
    """
    try:
        first, end, _ = path.read_bytes().partition(b"\n")
        if end:
            return str(json.loads(first)[kind])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return _STRANGE
    begun = f'{{"{kind}": "'.encode()
    return None if first.startswith(begun) or begun.startswith(first) else _STRANGE


def pending(out: Path) -> str | None:
    """Whose complete merge lies in `out`, its upload unfinished; None if nothing waits there."""
    if (out / WORK / NAME).is_file() or not (out / PENDING).is_file():
        return None
    return _fingerprint(out / PENDING, "merge")
