"""Recorded answers: what models at several alphas have answered before, for `search --answers`.

Read are our own journal (one file, many alphas), lmms-eval's sample logs and VLMEvalKit's
predictions (one file per alpha, given as ALPHA=FILE). Which one a file is, its records say. Leaves
to others: judging the answers (`search.py`).
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PromptError, RecipeError

SUFFIXES = (".jsonl", ".json", ".tsv", ".csv", ".xlsx")
_LONGEST_FIELD = 1 << 28  # prediction tables may carry whole images in base64
_Record = tuple[str, Mapping[str, Any]]
"""Where it stands, for people ("line 3"), and what it holds."""


@dataclass(frozen=True, slots=True)
class _Answer:
    alpha: float
    id: str
    text: str


def parse_spec(text: str) -> tuple[float | None, Path]:
    """`0.3=FILE` as (0.3, FILE), a plain `FILE` as (None, FILE). RecipeError for alpha not in 0..1.

    Only what stands before the first `=` can be an alpha, and only if it is a number.
    """
    before, equals, after = text.partition("=")
    try:
        alpha = float(before)
    except ValueError:
        return None, Path(text)
    if not equals:
        return None, Path(text)
    if not _is_alpha(alpha) or not after:
        raise RecipeError(f"--answers {text}: expected ALPHA=FILE with an alpha in 0..1")
    return round(alpha, 6), Path(after)


def read(
    sources: Sequence[Path | tuple[float | None, Path]],
) -> tuple[dict[float, list[str]], list[str]]:
    """Answers by ascending alpha, and the ids of the prompts they answer, both in one order.

    sources: files with the alpha they were recorded at, as `parse_spec` gives them; a file that
    names its alphas itself has none. Ids are sorted if they are numbers, else they come in the
    order in which the smallest alpha's stand. PromptError, with file and line, for what cannot be
    read, answers that come twice, and ids that only some of the alphas have.
    """
    texts: dict[float, dict[str, str]] = {}
    places: dict[tuple[float, str], str] = {}
    files: dict[float, Path] = {}
    for source in sources:
        alpha, path = (None, source) if isinstance(source, Path) else source
        found = False
        for where, record in _records(path):
            if record.keys() == {"search"} or record.get("again") or record.get("alphas"):
                continue  # a journal's first line, answers that measure noise, layers' own alphas
            place = f"{path}, {where}"
            answer = _answer(record, alpha, place)
            if first := places.get((answer.alpha, answer.id)):
                raise PromptError(
                    f"{place}: a second answer to {answer.id!r} at alpha {answer.alpha}, after"
                    f" {first}; expected one, of one task through one filter: remove the other"
                )
            places[answer.alpha, answer.id] = place
            texts.setdefault(answer.alpha, {})[answer.id] = answer.text
            files.setdefault(answer.alpha, path)
            found = True
        if not found:
            raise PromptError(f"{path}: no answers in it; expected at least one")
    if not texts:
        raise PromptError("no recorded answers; give files")
    ids = _common_ids(texts, files)
    return {alpha: [texts[alpha][i] for i in ids] for alpha in sorted(texts)}, ids


def _common_ids(texts: Mapping[float, Mapping[str, str]], files: Mapping[float, Path]) -> list[str]:
    every = _ordered(dict.fromkeys(i for alpha in sorted(texts) for i in texts[alpha]))
    for alpha in sorted(texts):
        missing = [i for i in every if i not in texts[alpha]]
        if missing:
            raise PromptError(
                f"{files[alpha]}: no answer to {missing[0]!r} at alpha {alpha}, and to"
                f" {len(missing) - 1} more that other alphas have; expected the same prompts for"
                " all alphas: record the rest, or leave this alpha out"
            )
    return every


def _ordered(ids: Mapping[str, Any]) -> list[str]:
    numbers = all(re.fullmatch(r"-?[0-9]{1,18}", i) for i in ids)
    return sorted(ids, key=int) if numbers else list(ids)


# Records of the formats


def _answer(record: Mapping[str, Any], alpha: float | None, where: str) -> _Answer:
    """What one record says, by the fields that tell the three formats apart."""
    if "doc_id" in record:
        return _Answer(_given(alpha, where), _id(record["doc_id"], where), _response(record, where))
    if "index" in record and "prediction" in record:
        text = _text(record["prediction"], f"{where}: prediction")
        return _Answer(_given(alpha, where), _id(record["index"], where), text)
    if not {"alpha", "index", "answer"} <= record.keys():
        raise PromptError(
            f"{where}: found the fields {', '.join(map(str, list(record)[:8])) or '(none)'};"
            " expected alpha, index and answer (a search's journal), doc_id and filtered_resps"
            " (lmms-eval) or index and prediction (VLMEvalKit)"
        )
    if alpha is not None:
        raise PromptError(f"{where}: names its alpha itself; give the file without {alpha}=")
    own, text = record["alpha"], record["answer"]
    if isinstance(own, bool) or not isinstance(own, int | float) or not _is_alpha(own):
        raise PromptError(f"{where}: alpha is {_short(own)}, expected a number in 0..1")
    if not isinstance(text, str):
        raise PromptError(f"{where}: answer is {_short(text)}, expected a text")
    return _Answer(round(float(own), 6), _id(record["index"], where), text)


def _response(record: Mapping[str, Any], where: str) -> str:
    """lmms-eval's `filtered_resps`, what it scores: a text, since 2026, or a list of one before.

    `resps`, what the filters were given, is left out of the log where it says the same.
    """
    found = record.get("filtered_resps", record.get("resps"))
    while isinstance(found, list) and len(found) == 1:
        found = found[0]
    if isinstance(found, list):
        raise PromptError(
            f"{where}: {len(found)} responses; expected one: a task that generates text, without"
            " repeats"
        )
    if not isinstance(found, str):
        raise PromptError(f"{where}: filtered_resps is {_short(found)}, expected a text")
    return found


def _given(alpha: float | None, where: str) -> float:
    if alpha is None:
        raise PromptError(f"{where}: does not say its alpha; give the file as ALPHA=FILE")
    if not _is_alpha(alpha):
        raise PromptError(f"{where}: given as of alpha {alpha}, expected a number in 0..1")
    return round(alpha, 6)


def _is_alpha(value: float) -> bool:
    return math.isfinite(value) and 0 <= value <= 1


def _id(value: Any, where: str) -> str:
    """An id as text: spreadsheets turn 7 into 7.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise PromptError(f"{where}: the id is {_short(value)}, expected a number or a text")
    return str(value)


def _text(value: Any, where: str) -> str:
    """A table's cell as text; an empty answer is stored as an empty cell or as NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, dict | list):
        raise PromptError(f"{where} is {_short(value)}, expected a text")
    return str(value)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


# Files


def _records(path: Path) -> Iterator[_Record]:
    suffix = path.suffix.lower()
    if suffix in (".pkl", ".pickle"):
        raise PromptError(
            f"{path}: a pickle can run code when it is read, so it is not; have VLMEvalKit write"
            " xlsx, tsv or json (PRED_FORMAT)"
        )
    if suffix not in SUFFIXES:
        raise PromptError(f"{path}: found {suffix or 'no suffix'}, expected {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise PromptError(f"{path}: no such file")
    readers = {".jsonl": _jsonl, ".json": _json, ".xlsx": _xlsx}
    return readers.get(suffix, _csv)(path)


def _jsonl(path: Path) -> Iterator[_Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"line {number}"
                yield where, _fields(_parsed(line, path, where), path, where)


def _json(path: Path) -> Iterator[_Record]:
    records = _parsed(path.read_bytes(), path, "")
    if isinstance(records, dict) and "logs" in records:  # lmms-eval until September 2024
        records = records["logs"]
    if not isinstance(records, list):
        raise PromptError(f"{path}: found {_short(records)}, expected a list of records")
    for number, record in enumerate(records, 1):
        yield f"record {number}", _fields(record, path, f"record {number}")


def _parsed(raw: bytes, path: Path, where: str) -> Any:
    text = _decoded(raw, path, where)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = where or f"line {error.lineno}"
        raise PromptError(f"{path}, {line}: not JSON ({error.msg}); mend or remove it") from None
    except (ValueError, RecursionError) as error:  # numbers and nesting beyond Python's limits
        place = f"{path}, {where}" if where else str(path)
        raise PromptError(f"{place}: JSON that cannot be read ({error})") from None


def _decoded(raw: bytes, path: Path, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        line = where or f"line {number}"
        raise PromptError(f"{path}, {line}: not UTF-8; save the file as that") from None


def _fields(record: Any, path: Path, where: str) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise PromptError(f"{path}, {where}: found {_short(record)}, expected an object")
    return record


def _csv(path: Path) -> Iterator[_Record]:
    text = _decoded(path.read_bytes(), path, "")
    tabs = path.suffix.lower() == ".tsv"
    reader = csv.reader(
        io.StringIO(text, newline=""), "excel-tab" if tabs else "excel", strict=True
    )
    limit = csv.field_size_limit(_LONGEST_FIELD)
    line = 1  # where a row begins: it may hold line breaks
    try:
        header = next(reader, [])
        _check_header(header, path)
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise PromptError(
                    f"{path}, line {line}: found {len(cells)} cells, expected {len(header)}"
                )
            if cells:
                yield f"line {line}", dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise PromptError(f"{path}, line {line}: not a row of a table ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _xlsx(path: Path) -> Iterator[_Record]:
    try:
        openpyxl: Any = importlib.import_module("openpyxl")
    except ImportError:
        raise PromptError(
            f"{path}: reading xlsx needs openpyxl: pip install openpyxl, or save it as csv"
        ) from None
    try:
        with path.open("rb") as file:
            # Formulas as they stand: an answer that begins with = is one to a spreadsheet.
            book = openpyxl.load_workbook(file, read_only=True, data_only=False)
            rows = [list(row) for row in book.worksheets[0].iter_rows(values_only=True)]
    except Exception as error:  # a broken archive or sheet ends in anything at all
        raise PromptError(f"{path}: not a readable xlsx file ({error})") from None
    header = [str(cell) for cell in rows[0]] if rows else []
    _check_header(header, path)
    for number, row in enumerate(rows[1:], 2):
        if any(cell is not None for cell in row):
            yield f"row {number}", dict(zip(header, row, strict=False))


def _check_header(header: Sequence[str], path: Path) -> None:
    for name in ("index", "prediction"):
        if name not in header:
            raise PromptError(
                f"{path}: found the columns {', '.join(header) or '(none)'}, expected index and"
                " prediction, as VLMEvalKit writes them"
            )
