"""Prompts from JSON: an object on each line, or one array of objects. All of them are checked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import PromptError
from ..settings import PromptSettings
from .entry import Prompt, PromptSet, one_line, show_value
from .records import read_record


def open_json_lines(ref: str, settings: PromptSettings) -> PromptSet:
    """The prompts of a file with an object on each line; blank lines are skipped."""
    path = Path(ref)
    count = sum(1 for _ in _read_lines(path))

    def read(picks: Sequence[int]) -> Iterator[Prompt]:
        wanted = set(picks)
        return (prompt for place, prompt in enumerate(_read_lines(path)) if place in wanted)

    return PromptSet(count, path.parent, read)


def _read_lines(path: Path) -> Iterator[Prompt]:
    for number, record in read_json_lines(path):
        where, id = f"{path}:{number}", f"{path.name}:{number}"
        yield read_record(record, path.parent, where, id)


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The number of each line that is not blank, and what it holds."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, parse_json(line, f"{path}:{number}")
    except OSError as error:
        raise PromptError(f"{path}: {error.strerror}") from None


def open_json_array(ref: str, settings: PromptSettings) -> PromptSet:
    """The prompts of a file that is one array of objects."""
    path = Path(ref)
    try:
        records = parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise PromptError(f"{path}: {error.strerror}") from None
    if not isinstance(records, list):
        raise PromptError(
            f"{path}: found {show_value(records)}, expected an array of objects; with an object on"
            " each line, call it .jsonl"
        )

    def read(picks: Sequence[int]) -> Iterator[Prompt]:
        for pick in picks:
            id = f"{path.name}[{pick}]"
            yield read_record(records[pick], path.parent, str(path.parent / id), id)

    for _ in read(range(len(records))):
        pass
    return PromptSet(len(records), path.parent, read)


def parse_json(raw: bytes, where: str) -> Any:
    """Parse a JSON document in UTF-8; PromptError that names the place."""
    try:
        return json.loads(raw.decode("utf-8-sig"))  # without a byte order mark
    except UnicodeDecodeError as error:
        reason = f"byte {error.start + 1} is not UTF-8; save it as such"
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        reason = f"not JSON: {error.msg} at {line}column {error.colno}"
    except (ValueError, RecursionError) as error:  # numbers and nesting beyond Python's limits
        reason = f"not JSON that can be read: {one_line(error)}"
    raise PromptError(f"{where}: {reason}")
