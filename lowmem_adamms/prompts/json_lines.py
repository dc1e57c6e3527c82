"""Prompts from JSON Lines: `{"prompt": text, "image": path}` or `"images": [paths]`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import PromptError
from ..settings import PromptSettings
from .entry import Prompt, PromptSet, check_path, check_text, listed, one_line, show_value


def open_json_lines(ref: str, settings: PromptSettings) -> PromptSet:
    """The prompts of a file. All lines are checked; blank lines are skipped."""
    path = Path(ref)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise PromptError(f"{path}: {error.strerror}") from None
    prompts = [
        _read_prompt(line, path, number) for number, line in enumerate(lines, 1) if line.strip()
    ]
    return listed(prompts, path.parent)


def _read_prompt(line: bytes, path: Path, number: int) -> Prompt:
    where = f"{path}:{number}"
    entry = parse_json(line, where)
    if not isinstance(entry, dict):
        raise PromptError(f"{where}: found {show_value(entry)}, expected an object on each line")
    if "prompt" not in entry:
        keys = ", ".join(map(one_line, entry)) or "nothing"
        raise PromptError(f'{where}: no "prompt" in it, found {keys}; call the text so')
    text = check_text(entry["prompt"], "prompt", where)
    return Prompt(text, _image_paths(entry, path.parent, where), f"{path.name}:{number}")


def _image_paths(entry: dict[str, Any], folder: Path, where: str) -> tuple[Path, ...]:
    image, images = entry.get("image"), entry.get("images")
    if image is not None and images is not None:
        raise PromptError(f'{where}: both "image" and "images"; keep one of them')
    if images is None:
        images = [] if image is None else [image]
    if not isinstance(images, list):
        raise PromptError(f'{where}: "images" is {show_value(images)}; expected a list of paths')
    return tuple(check_path(value, folder, where) for value in images)


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
