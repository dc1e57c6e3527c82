"""Prompts from a dataset on the Hugging Face Hub, by the library `datasets`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import PromptError
from ..settings import PromptSettings
from .entry import Prompt, PromptSet, import_library, one_line
from .table_rows import choose_columns, row_prompt

SPLITS = ("test", "validation", "train")
"""Which split is taken of several; the first that exists."""
DATASET = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.+-]+))?(?:@(\S+))?")
"""`org/name[:config][@revision]`"""


def open_hub_dataset(ref: str, settings: PromptSettings) -> PromptSet:
    """The rows of one split, read through Arrow so that images stay encoded.

    The library's cache and HF_HUB_OFFLINE apply. The returned `ref` holds the commit that was
    taken, which the library also knows of what it finds in its cache.
    """
    datasets = import_library("datasets", "datasets", f"{ref}: a dataset of the Hub")
    match = DATASET.fullmatch(ref)
    assert match is not None
    name, config, revision = match.groups()
    split = settings.split
    try:
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        if split is None and builder.info.splits:  # choose before anything is downloaded
            split = _default_split(ref, list(builder.info.splits))
        builder.download_and_prepare()
        split = split or _default_split(ref, list(builder.info.splits))
        data = builder.as_dataset(split=split)
    except PromptError:
        raise
    except Exception as error:  # the library's, huggingface_hub's, httpx's, fsspec's
        raise PromptError(
            f"{ref}: no such path here, and as a Hub dataset: {one_line(error).rstrip('.')};"
            " check its name and split, the network and HF_HUB_OFFLINE"
        ) from None
    columns = choose_columns(ref, data.column_names, settings)
    table = data.select_columns(columns).with_format("arrow")

    def read(picks: Sequence[int]) -> Iterator[Prompt]:
        for index in picks:
            row = table[index].to_pylist()[0]
            yield row_prompt(row, columns, Path(), f"{ref} {split}[{index}]")

    return PromptSet(len(table), Path(), read, f"{ref.partition('@')[0]}@{builder.hash} {split}")


def _default_split(ref: str, names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    for split in SPLITS:
        if split in names:
            return split
    raise PromptError(f"{ref}: choose one of its splits: {', '.join(names)}")
