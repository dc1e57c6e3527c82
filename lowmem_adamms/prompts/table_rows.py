"""Rows of tables as prompts: which columns hold text and images, and what a cell may hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..errors import PromptError
from ..settings import PromptSettings
from .entry import Image, Prompt, check_text, show_value
from .images import read_image

TEXT_COLUMNS = ("prompt", "question", "query", "instruction", "text")
"""Where a table's prompts are looked for; the first that exists is taken."""
_IMAGE_COLUMN = re.compile(r"images?|image_(\d+)")


def choose_columns(ref: str, names: Sequence[str], settings: PromptSettings) -> list[str]:
    """The column of the text, then those of the images: as the user named them, or the usual ones.

    Text: the first of TEXT_COLUMNS. Images: `image` or `images`, then `image_1`, `image_2`, ...
    """
    text = settings.text_column or next((name for name in TEXT_COLUMNS if name in names), None)
    if text is None:
        raise PromptError(
            f"{ref}: no column called {', '.join(TEXT_COLUMNS)};"
            f" name the one with the prompts: {', '.join(names)}"
        )
    columns = [text, *(settings.image_column or _usual_image_columns(ref, names))]
    for name in columns:
        if name not in names:
            raise PromptError(f"{ref}: no column {name}; there are {', '.join(names)}")
    return columns


def _usual_image_columns(ref: str, names: Sequence[str]) -> list[str]:
    if "image" in names and "images" in names:
        raise PromptError(f"{ref}: both a column image and images; name the one to use")
    matches = [match for name in names if (match := _IMAGE_COLUMN.fullmatch(name))]
    return [match[0] for match in sorted(matches, key=lambda match: int(match[1] or 0))]


def row_prompt(row: Mapping[str, object], columns: Sequence[str], folder: Path, id: str) -> Prompt:
    """The prompt in one row; paths of images are relative to `folder`."""
    where = str(folder / id)
    text_column, *image_columns = columns
    text = check_text(row[text_column], text_column, where)
    images: list[Image] = []
    for name in image_columns:
        images += _cell_images(row[name], name, folder, where)
    return Prompt(text, tuple(images), id)


def _cell_images(value: object, name: str, folder: Path, where: str) -> Iterator[Image]:
    """The images in one cell: none, one, or a list of them."""
    if isinstance(value, dict):  # how the Hub stores an image; the bytes count if both are there
        value = (
            value["bytes"] if isinstance(value.get("bytes"), bytes) else value.get("path", value)
        )
    if isinstance(value, list):
        for item in value:
            yield from _cell_images(item, name, folder, where)
    elif isinstance(value, bytes):
        yield value
    elif isinstance(value, str):
        yield read_image(value, folder, where)
    elif value is not None:
        raise PromptError(
            f'{where}: "{name}" is {show_value(value)}; expected an image:'
            " a struct of bytes and path, bytes, a path, or a list of those"
        )
