"""Prompt sets of plain files: JSON Lines, and a folder of images with one question for all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import PromptError
from .entry import Prompt, checked_path, checked_text, one_line, type_name

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def folder_prompts(folder: Path, question: str | None) -> list[Prompt]:
    """One for each image in a folder and its subfolders, by name."""
    if question is None or not question.strip():
        raise PromptError(
            f"{folder}: a folder of images needs a question to ask about each: --question TEXT"
            " (or name a .jsonl or .parquet file in it)"
        )
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = sorted(
        path.as_posix()
        for path in found
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.parts)
    )
    if not names:
        raise PromptError(f"{folder}: no images in it; expected {', '.join(IMAGE_SUFFIXES)}")
    return [Prompt(question, (folder / name,), name) for name in names]


def line_prompts(path: Path) -> Iterator[Prompt]:
    """Those of a file of JSON Lines, each checked but for its images' contents."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise PromptError(f"{path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}:{number}"
            entry = _entry(line, where)
            if "prompt" not in entry:
                keys = ", ".join(map(one_line, entry)) or "nothing"
                raise PromptError(f'{where}: no "prompt" in it, found {keys}; call the text so')
            images = _line_images(entry, path.parent, where)
            yield Prompt(
                checked_text(entry.get("prompt"), "prompt", where), images, f"{path.name}:{number}"
            )


def _entry(line: bytes, where: str) -> dict[str, Any]:
    """One line's object."""
    try:
        entry = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{where}: byte {error.start + 1} is not UTF-8; save it as such"
        ) from None
    except json.JSONDecodeError as error:
        raise PromptError(
            f"{where}: not JSON: {error.msg} at column {error.colno};"
            " expected one whole object on each line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: not JSON that can be read: {one_line(error)}") from None
    if not isinstance(entry, dict):
        raise PromptError(f'{where}: found {type_name(entry)}, expected an object: {{"prompt": …}}')
    return entry


def _line_images(entry: dict[str, Any], folder: Path, where: str) -> tuple[Path, ...]:
    one, several = entry.get("image"), entry.get("images")
    if one is not None and several is not None:
        raise PromptError(f'{where}: both "image" and "images"; keep one of them')
    if several is not None and not isinstance(several, list):
        raise PromptError(f'{where}: "images" is {type_name(several)}; expected a list of paths')
    paths = [one] if one is not None else several or []
    return tuple(checked_path(value, folder, where) for value in paths)
