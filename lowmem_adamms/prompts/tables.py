"""Prompt sets of tables: Parquet files (by pyarrow) and Hub datasets (by datasets).

Only the picked rows are read and checked; images stay as they are encoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import PromptError
from .entry import (
    Columns,
    Prompt,
    PromptSet,
    checked_path,
    checked_text,
    library,
    one_line,
    type_name,
)

TEXT_COLUMNS = ("prompt", "question", "query", "instruction", "text")
"""Where a table's prompts are looked for; the first that is there is taken."""
SPLITS = ("test", "validation", "train")
"""Which split of a Hub dataset with several is taken; the first that is there."""

HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.+-]+))?(?:@(\S+))?")
"""A dataset's name, configuration and revision."""

_IMAGE_COLUMN = re.compile(r"images?|image_(\d+)")
_BATCH = 16  # rows of a Parquet file that are held at a time; each may hold several images


def parquet_set(path: Path, columns: Columns) -> PromptSet:
    """The rows of a Parquet file."""
    parquet = library("pyarrow.parquet", "pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            names, count = file.schema_arrow.names, file.metadata.num_rows
    except Exception as error:  # pyarrow's own kinds, and Python's
        raise _bad_parquet(path, error) from None
    text, images = _choose(path, names, columns)

    def read(picks: Sequence[int]) -> Iterator[Prompt]:
        for index, row in _parquet_rows(path, [text, *images], picks):
            yield _row_prompt(row, text, images, path.parent, f"{path.name}[{index}]")

    return PromptSet(count, path.parent, read)


def _parquet_rows(
    path: Path, columns: list[str], picks: Sequence[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The picked rows, counted from 0; row groups without one are not read."""
    parquet = library("pyarrow.parquet", "pyarrow")
    wanted = set(picks)
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            start = 0
            for group in range(file.num_row_groups):
                stop = start + file.metadata.row_group(group).num_rows
                if wanted.isdisjoint(range(start, stop)):
                    start = stop
                    continue
                for batch in file.iter_batches(_BATCH, [group], columns):
                    for offset in range(len(batch)):
                        if start + offset in wanted:
                            yield start + offset, batch.slice(offset, 1).to_pylist()[0]
                    start += len(batch)
    except Exception as error:
        raise _bad_parquet(path, error) from None


def _bad_parquet(path: Path, error: Exception) -> PromptError:
    return PromptError(
        f"{path}: not a Parquet file that can be read ({one_line(error)}); download it again"
    )


def hub_set(source: str, split: str | None, columns: Columns) -> PromptSet:
    """The rows of a Hub dataset; through Arrow, so that its Image columns stay encoded.

    The builder knows the commit that it took, also of what it finds in its cache.
    """
    datasets = library("datasets", "datasets")
    known = HUB.fullmatch(source)
    assert known is not None
    name, config, revision = known.groups()
    try:
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        if split is None and builder.info.splits:  # before anything is downloaded
            split = _default_split(source, list(builder.info.splits))
        builder.download_and_prepare()
        split = split or _default_split(source, list(builder.info.splits))
        data = builder.as_dataset(split=split)
    except PromptError:
        raise
    except Exception as error:  # the library's, huggingface_hub's, httpx's, fsspec's
        raise PromptError(
            f"{source}: no such path here, and as a Hub dataset: {one_line(error).rstrip('.')};"
            " check its name and split, the network and HF_HUB_OFFLINE"
        ) from None
    text, images = _choose(source, data.column_names, columns)
    table = data.select_columns([text, *images]).with_format("arrow")

    def read(picks: Sequence[int]) -> Iterator[Prompt]:
        for index in picks:
            row = table[index].to_pylist()[0]
            yield _row_prompt(row, text, images, Path(), f"{source} {split}[{index}]")

    ref = f"{source.partition('@')[0]}@{builder.hash} {split}"
    return PromptSet(len(table), Path(), read, ref)


def _default_split(source: str, names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    for split in SPLITS:
        if split in names:
            return split
    raise PromptError(f"{source}: choose one of its splits: {', '.join(names)}")


def _choose(
    source: str | Path, names: Sequence[str], columns: Columns
) -> tuple[str, tuple[str, ...]]:
    """The text column and the image columns of a table."""
    text = columns.text or next((name for name in TEXT_COLUMNS if name in names), None)
    images = columns.images
    if images is None:
        if "image" in names and "images" in names:
            raise PromptError(f"{source}: both a column image and images; name the one to use")
        matches = [match for name in names if (match := _IMAGE_COLUMN.fullmatch(name))]
        images = tuple(m[0] for m in sorted(matches, key=lambda m: int(m[1] or 0)))
    if text is None:
        raise PromptError(
            f"{source}: no column called {', '.join(TEXT_COLUMNS)};"
            f" name the one with the prompts: {', '.join(names)}"
        )
    for name in (text, *images):
        if name not in names:
            raise PromptError(f"{source}: no column {name}; there are {', '.join(names)}")
    return text, images


def _row_prompt(
    row: dict[str, Any], text: str, images: Sequence[str], place: Path, id: str
) -> Prompt:
    where = str(place / id)
    found = [image for name in images for image in _cell_images(row[name], name, place, where)]
    return Prompt(checked_text(row[text], text, where), tuple(found), id)


def _cell_images(value: object, name: str, folder: Path, where: str) -> Iterator[Path | bytes]:
    """The images in one cell: none, one, or a list of them."""
    if isinstance(value, list):
        for item in value:
            yield from _cell_images(item, name, folder, where)
    elif isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        yield value["bytes"]
    elif isinstance(value, dict) and isinstance(value.get("path"), str):
        yield checked_path(value["path"], folder, where)
    elif isinstance(value, bytes):
        yield value
    elif isinstance(value, str):
        yield checked_path(value, folder, where)
    elif value is not None:
        raise PromptError(
            f'{where}: "{name}" is {type_name(value)}; expected an image:'
            " a struct of bytes and path, bytes, a path, or a list of those"
        )
