"""The journals of a merge and of a search: what a killed run has done, for the next to go on from.

A journal is a file of JSON lines. The first says whose it is, by a fingerprint of everything that
decides the result; a last line cut short by a kill is ignored; the file is locked while in use.

Of a merge, each line fsynced before anything relies on it:
    {"merge": fingerprint}
    {"inputs": digest}                            of bytes sampled from all input files
    {"nonfinite": tensor, "count": n}             so many of its blended values are NaN or infinite
    {"file": name, "upto": n}                     the first n bytes of the file are durable
    {"file": name, "upto": n, "late": {t: hex}}   and these quant states belong at its end
    {"file": name, "size": n, "blake3": digest}   the file is complete and durable
Of a search:
    {"search": fingerprint}
    {"alpha": a, "index": i, "answer": text, "tokens": [ids],      (of several donors [a, b])
     "log_probability": l, "entropy": e}                           (see `Answer`; null: unknown)
the same with "again": true where an alpha was asked twice, to measure the noise, and with
"alphas": {role: a} where layers had their own.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from ..answers import Answer
from ..errors import OutputError

WORK = ".partial"
"""Folder inside OUT that holds unfinished output; what is in OUT itself is complete."""
JOURNAL = ".journal.jsonl"
"""A merge's journal in WORK. Hidden, as no sidecar of a model is."""
ANSWERS = "answers.jsonl"
"""A search's journal; it ends beside the merged model, and scores again with `--answers`."""
PENDING = ".push.json"
"""In OUT beside a complete merge whose upload is not finished: `{"merge": fingerprint, "repo": …}`.
It is made in WORK and moves with the rest."""


class _Journal:
    """A locked file of JSON lines that belongs to one fingerprint. resumed: it was there before."""

    def __init__(self, path: Path, kind: str, fingerprint: str, conflict: str) -> None:
        """conflict: the error's text if the file belongs to another run than this one."""
        self.path, self.fingerprint = path, fingerprint
        found = _read_fingerprint(path, kind)
        if found == _FOREIGN:
            raise OutputError(f"{path} is no journal of a {kind}; choose another place")
        self.resumed = found is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._lock()  # first: what another run is writing now is not to be deleted
        if found not in (None, fingerprint):
            self.close()
            raise OutputError(conflict)
        self._read()
        if found is None:
            self._file.truncate(0)
            self._append({kind: fingerprint})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up the lock; what was noted stays."""
        self._file.close()

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=True).encode() + b"\n")
        self._file.flush()
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        """Keep in memory what a line says."""
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


class Journal(_Journal):
    """The journal of one merge in `out/.partial`, opened and locked.

    upto: how many bytes of an unfinished file are durable. quant_states: those noted with them.
    done: name, size and digest of each complete file, as in the journal's line. nonfinite: how many
    values of a tensor are NaN or infinite.
    """

    def __init__(self, out: Path, fingerprint: str) -> None:
        """Start or resume. OutputError if another merge owns the folder or is running in it."""
        self._inputs: str | None = None
        self.upto: dict[str, int] = {}
        self.quant_states: dict[str, dict[str, bytes]] = {}
        self.done: dict[str, dict[str, Any]] = {}
        self.nonfinite: dict[str, int] = {}
        self._conflict = (
            f"{out} holds an unfinished merge of other inputs or options;"
            f" delete {out / WORK} or choose another `out`"
        )
        super().__init__(out / WORK / JOURNAL, "merge", fingerprint, self._conflict)

    def note_inputs(self, digest: str) -> None:
        """Note what the inputs hold. OutputError if it was noted before and has changed."""
        if self._inputs is None:
            self._append_durably({"inputs": digest})
        elif self._inputs != digest:
            raise OutputError(self._conflict)

    def note_nonfinite(self, tensor: str, count: int) -> None:
        """Note a tensor's values that are NaN or infinite; replaces what was noted of it."""
        self._append({"nonfinite": tensor, "count": count})

    def note_durable(self, file: str, upto: int, quant_states: Mapping[str, bytes]) -> None:
        """Note that the first bytes of a file, and with them these quant states, are safe."""
        line: dict[str, Any] = {"file": file, "upto": upto}
        if quant_states:
            line["late"] = {name: content.hex() for name, content in quant_states.items()}
        self._append_durably(line)

    def note_done(self, file: str, size: int, digest: str) -> None:
        """Note that a file is complete and durable."""
        self._append_durably({"file": file, "size": size, "blake3": digest})

    def forget(self, file: str) -> None:
        """Take a file for not begun, whatever the journal says."""
        self.done.pop(file, None)
        self.upto.pop(file, None)

    def _append_durably(self, line: dict[str, Any]) -> None:
        self._append(line)
        os.fsync(self._file.fileno())

    def _take(self, line: dict[str, Any]) -> None:
        if "blake3" in line:
            self.done[line["file"]] = line
        elif "nonfinite" in line:
            self.nonfinite[line["nonfinite"]] = line["count"]
        elif "inputs" in line:
            self._inputs = line["inputs"]
        elif "upto" in line:
            self.upto[line["file"]] = line["upto"]
            states = {name: bytes.fromhex(digits) for name, digits in line.get("late", {}).items()}
            self.quant_states.setdefault(line["file"], {}).update(states)


Asked = float | tuple[float, ...]
"""The alpha at which an answer was given; one for each of several donors."""


class AnswerJournal(_Journal):
    """The answers that a search has so far, by alpha and place of the prompt."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Start or resume. OutputError if the answers there are of another search."""
        self.answers: dict[Asked, dict[int, Answer]] = {}
        self.again: dict[Asked, dict[int, Answer]] = {}
        self.donor: dict[int, Answer] = {}
        conflict = (
            f"{path} holds answers of another search (other models, prompts, precision, batches or"
            " settings); give the same options, `batch_size` too, or delete it or choose another"
            " place"
        )
        super().__init__(path, "search", fingerprint, conflict)

    def note(
        self,
        alpha: Asked,
        index: int,
        answer: Answer,
        *,
        aside: Literal["again", "donor"] | None = None,
    ) -> None:
        """Append one answer; survives a kill of this process.

        aside: for an answer that is not scored: from a second run at the chosen alpha, or the
        donor's.
        """
        line = {
            "alpha": alpha,
            "index": index,
            "answer": answer.text,
            "tokens": answer.tokens,
            "log_probability": answer.log_probability,
            "entropy": answer.entropy,
        }
        self._append(line | {aside: True} if aside else line)

    def _take(self, line: dict[str, Any]) -> None:
        if "answer" not in line:
            return
        alpha, index = line["alpha"], line["index"]
        if isinstance(alpha, list):
            alpha = tuple(alpha)
        answer = Answer(
            line["answer"],
            tuple(line["tokens"]),
            line.get("log_probability"),
            line.get("entropy"),
        )
        if line.get("again"):
            self.again.setdefault(alpha, {})[index] = answer
        elif line.get("donor"):
            self.donor[index] = answer
        else:
            self.answers.setdefault(alpha, {})[index] = answer


_FOREIGN = "foreign"


def _read_fingerprint(path: Path, kind: str) -> str | None:
    """Whose journal lies there; None if there is none or it was cut off in its first line.

    _FOREIGN for any other file: it may be somebody's only copy of something.
    """
    try:
        first, end, _ = path.read_bytes().partition(b"\n")
        if end:
            return str(json.loads(first)[kind])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return _FOREIGN
    begun = f'{{"{kind}": "'.encode()
    return None if first.startswith(begun) or begun.startswith(first) else _FOREIGN


def find_complete(out: Path) -> str | None:
    """Fingerprint of the complete merge in `out`, if there is one."""
    if (out / WORK / JOURNAL).is_file():
        return None
    try:
        found = json.loads((out / "adamms.json").read_bytes())["merge"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # no merge, or one of a version that noted no fingerprint
    return found if isinstance(found, str) else None


def is_pending(out: Path) -> bool:
    """Whether `out` holds a complete merge whose upload is not finished."""
    return (out / PENDING).is_file() and not (out / WORK / JOURNAL).is_file()
