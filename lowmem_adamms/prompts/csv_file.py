"""Prompts from a table as CSV or TSV, in UTF-8 with a header."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import PromptError
from ..settings import PromptSettings
from .entry import Prompt, PromptSet
from .table_rows import choose_columns, row_prompt

_LONGEST_CELL = 1 << 28  # tables may hold whole images in base64


def open_csv(ref: str, settings: PromptSettings) -> PromptSet:
    """The rows of a file; images are paths or data: URLs, and an empty cell is none."""
    path = Path(ref)
    header, *rows = read_csv(path) or [[]]
    columns = choose_columns(ref, header, settings)
    if twice := [name for name in columns if header.count(name) > 1]:
        raise PromptError(f"{ref}: two columns are called {twice[0]}; rename one")
    numbered = [(number, row) for number, row in enumerate(rows, 2) if row]

    def read(picks: Sequence[int]) -> Iterator[Prompt]:
        for pick in picks:
            number, row = numbered[pick]
            id = f"{path.name} row {number}"
            if len(row) != len(header):
                raise PromptError(
                    f"{path.parent / id}: found {len(row)} cells, expected {len(header)}"
                )
            cells = {name: cell or None for name, cell in zip(header, row, strict=True)}
            cells[columns[0]] = cells[columns[0]] or ""
            yield row_prompt(cells, columns, path.parent, id)

    return PromptSet(len(numbered), path.parent, read)


def read_csv(path: Path) -> list[list[str]]:
    """All rows of a file, with tabs between the cells if it is a `.tsv`."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PromptError(f"{path}: {error.strerror}") from None
    try:
        text = io.StringIO(raw.decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise PromptError(f"{path}, line {line}: not UTF-8; save the file as that") from None
    dialect = "excel-tab" if path.suffix.lower() == ".tsv" else "excel"
    reader = csv.reader(text, dialect, strict=True)
    usual_limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        return list(reader)
    except csv.Error as error:
        raise PromptError(
            f"{path}, line {reader.line_num}: not a row of a table ({error})"
        ) from None
    finally:
        csv.field_size_limit(usual_limit)
