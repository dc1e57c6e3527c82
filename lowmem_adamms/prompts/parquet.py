"""Prompts from a Parquet file, by pyarrow. Only the sampled rows are read and checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import PromptError
from ..settings import PromptSettings
from .entry import Prompt, PromptSet, import_library, one_line
from .table_rows import choose_columns, row_prompt

_ROWS_HELD = 16  # at a time; each may hold several images


def open_parquet(ref: str, settings: PromptSettings) -> PromptSet:
    """The rows of a file; images stay encoded."""
    path = Path(ref)
    parquet = import_library("pyarrow.parquet", "pyarrow", f"{path}: reading Parquet")
    try:
        file = parquet.ParquetFile(path, memory_map=True)
    except Exception as error:  # pyarrow's own kinds, and Python's
        raise _unreadable(path, error) from None
    columns = choose_columns(ref, file.schema_arrow.names, settings)

    def read(picks: Sequence[int]) -> Iterator[Prompt]:
        for index, row in _read_rows(file, path, columns, set(picks)):
            yield row_prompt(row, columns, path.parent, f"{path.name}[{index}]")

    return PromptSet(file.metadata.num_rows, path.parent, read)


def _read_rows(
    file: Any, path: Path, columns: list[str], wanted: set[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The wanted rows with their indices; row groups without one are not read."""
    try:
        start = 0
        for group in range(file.num_row_groups):
            rows = range(start, start + file.metadata.row_group(group).num_rows)
            if not wanted.isdisjoint(rows):
                for batch in file.iter_batches(_ROWS_HELD, [group], columns):
                    for offset in range(len(batch)):
                        if start + offset in wanted:
                            yield start + offset, batch.slice(offset, 1).to_pylist()[0]
                    start += len(batch)
            start = rows.stop
    except Exception as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> PromptError:
    return PromptError(
        f"{path}: not a Parquet file that can be read ({one_line(error)}); download it again"
    )
