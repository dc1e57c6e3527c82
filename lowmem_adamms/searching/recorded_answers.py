"""Recorded answers: what models at several alphas have answered before, for `search --answers`.

Three formats are read: our own answers.jsonl (one file, many alphas), lmms-eval's sample logs and
VLMEvalKit's predictions (one file for each alpha). The fields of a record tell which one it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PromptError, RecipeError
from ..prompts.csv_file import read_csv
from ..prompts.entry import import_library, one_line, show_value
from ..prompts.json_files import parse_json

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """One recorded answer. id: of the prompt. where: file and line, for errors."""

    alpha: float
    id: str
    text: str
    path: Path
    where: str


def parse_spec(text: str) -> tuple[float | None, Path]:
    """`0.3=FILE` as (0.3, FILE), a plain `FILE` as (None, FILE).

    Only a number before the first `=` is an alpha; RecipeError if it is not in 0..1.
    """
    before, equals, file = text.partition("=")
    try:
        alpha = float(before)
    except ValueError:
        return None, Path(text)
    if not equals:
        return None, Path(text)
    if not 0 <= alpha <= 1 or not file:
        raise RecipeError(f"`answers` {text}: expected ALPHA=FILE with an alpha in 0..1")
    return round(alpha, 6), Path(file)


def read_answers(
    sources: Sequence[Path | tuple[float | None, Path]],
) -> tuple[dict[float, list[str]], list[str]]:
    """Read recorded answers from files, each with the alpha of its answers unless they name it.

    Returns the answers by ascending alpha, and the ids of the prompts that they answer, in one
    order: by number if all ids are numbers, else as the smallest alpha's answers stand in their
    file. PromptError for a file that cannot be read, an answer that comes twice, and an alpha that
    lacks answers which others have.
    """
    answers: dict[float, dict[str, Answer]] = {}
    for source in sources:
        alpha, path = (None, source) if isinstance(source, Path) else source
        found = list(_read_file(path, alpha))
        if not found:
            raise PromptError(f"{path}: no answers in it; expected at least one")
        for answer in found:
            first = answers.setdefault(answer.alpha, {}).setdefault(answer.id, answer)
            if first is not answer:
                raise PromptError(
                    f"{answer.where}: a second answer to {answer.id!r} at alpha {answer.alpha},"
                    f" after {first.where}; expected one, of one task through one filter: remove"
                    " the other"
                )
    if not answers:
        raise PromptError("no recorded answers; give files")
    answers = dict(sorted(answers.items()))
    ids = list(dict.fromkeys(i for by_id in answers.values() for i in by_id))
    if all(re.fullmatch(r"-?[0-9]{1,18}", i) for i in ids):
        ids.sort(key=int)
    for alpha, by_id in answers.items():
        if missing := [i for i in ids if i not in by_id]:
            path = next(iter(by_id.values())).path
            raise PromptError(
                f"{path}: no answer to {missing[0]!r} at alpha {alpha}, and to {len(missing) - 1}"
                " more that other alphas have; expected the same prompts for all alphas: record the"
                " rest, or leave this alpha out"
            )
    return {alpha: [by_id[i].text for i in ids] for alpha, by_id in answers.items()}, ids


# Records of the three formats


def _read_file(path: Path, given_alpha: float | None) -> Iterator[Answer]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        found = path.suffix or "no suffix"
        raise PromptError(f"{path}: found {found}, expected {', '.join(_READERS)}")
    if not path.is_file():
        raise PromptError(f"{path}: no such file")
    for place, record in reader(path):
        where = f"{path}, {place}"
        if not isinstance(record, dict):
            raise PromptError(f"{where}: found {show_value(record)}, expected an object")
        # Our own first line, and answers that are not scored
        if record.keys() == {"search"} or record.get("again") or record.get("donor"):
            continue
        id, alpha, text = _parse_record(record, where)
        yield Answer(_only_alpha(alpha, given_alpha, where), _id_text(id, where), text, path, where)


def _parse_record(record: Record, where: str) -> tuple[Any, Any, str]:
    """The id, the alpha if the record names it, and the answer."""
    alpha = None
    if "doc_id" in record:
        id, name, text = record["doc_id"], "filtered_resps", _single_response(record, where)
    elif {"index", "prediction"} <= record.keys():
        id, name, text = record["index"], "prediction", _cell_text(record["prediction"])
    elif {"alpha", "index", "answer"} <= record.keys():
        id, name, text = record["index"], "answer", record["answer"]
        alpha = record["alpha"]
    else:
        raise PromptError(
            f"{where}: found the fields {', '.join(map(str, list(record)[:8])) or '(none)'};"
            " expected alpha, index and answer (a search's journal), doc_id and filtered_resps"
            " (lmms-eval) or index and prediction (VLMEvalKit)"
        )
    if not isinstance(text, str):
        raise PromptError(f"{where}: {name} is {show_value(text)}, expected a text")
    return id, alpha, text


def _only_alpha(recorded: Any, given: float | None, where: str) -> float:
    """The alpha that the record names or that the file was given with, to 6 decimals."""
    if recorded is None and given is None:
        raise PromptError(f"{where}: does not say its alpha; give the file as ALPHA=FILE")
    if recorded is not None and given is not None:
        raise PromptError(f"{where}: names its alpha itself; give the file without {given}=")
    alpha = given if recorded is None else recorded
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise PromptError(f"{where}: alpha is {show_value(alpha)}, expected a number in 0..1")
    return round(float(alpha), 6)


def _id_text(value: Any, where: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # spreadsheets turn 7 into 7.0
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise PromptError(f"{where}: the id is {show_value(value)}, expected a number or a text")
    return str(value)


def _single_response(record: Record, where: str) -> Any:
    """lmms-eval's `filtered_resps`, what it scores: a text since 2026, before that a list of one.

    Without it `resps`, what the filters were given; it is left out of the log if both are equal.
    """
    found = record.get("filtered_resps", record.get("resps"))
    while isinstance(found, list) and len(found) == 1:
        found = found[0]
    if isinstance(found, list):
        raise PromptError(
            f"{where}: {len(found)} responses; expected one: a task that generates text, without"
            " repeats"
        )
    return found


def _cell_text(value: Any) -> Any:
    """A table's cell as text; an empty answer is stored as an empty cell or as NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return value if isinstance(value, dict | list) else str(value)


# Files


def _read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", parse_json(line, f"{path}, line {number}")


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    records = parse_json(path.read_bytes(), str(path))
    if isinstance(records, dict) and "logs" in records:  # lmms-eval until September 2024
        records = records["logs"]
    if not isinstance(records, list):
        raise PromptError(f"{path}: found {show_value(records)}, expected a list of records")
    for number, record in enumerate(records, 1):
        yield f"record {number}", record


def _read_table(path: Path) -> Iterator[tuple[str, Any]]:
    is_xlsx = path.suffix.lower() == ".xlsx"
    rows: Sequence[Sequence[Any]] = _xlsx_rows(path) if is_xlsx else read_csv(path)
    header = [str(cell) for cell in rows[0]] if rows else []
    if not {"index", "prediction"} <= set(header):
        raise PromptError(
            f"{path}: found the columns {', '.join(header) or '(none)'}, expected index and"
            " prediction, as VLMEvalKit writes them"
        )
    for number, cells in enumerate(rows[1:], 2):
        if all(cell is None for cell in cells):
            continue
        if len(cells) != len(header):
            raise PromptError(
                f"{path}, row {number}: found {len(cells)} cells, expected {len(header)}"
            )
        yield f"row {number}", dict(zip(header, cells, strict=True))


def _xlsx_rows(path: Path) -> list[tuple[Any, ...]]:
    openpyxl = import_library("openpyxl", "openpyxl", f"{path}: reading xlsx")
    try:
        with path.open("rb") as file:
            # Formulas as they stand: an answer that begins with = is one to a spreadsheet
            return list(openpyxl.load_workbook(file).worksheets[0].values)
    except Exception as error:  # a broken archive or sheet ends in anything at all
        raise PromptError(f"{path}: not a readable xlsx file ({one_line(error)})") from None


_READERS = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".tsv": _read_table,
    ".csv": _read_table,
    ".xlsx": _read_table,
}
