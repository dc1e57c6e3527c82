"""Load a prompt set: find its format, draw the sample, and check it before a model is loaded."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import PromptError, RecipeError
from ..settings import PromptSettings
from .csv_file import open_csv
from .entry import Prompt, Prompts, PromptSet, listed, show_value
from .hub_dataset import DATASET, open_hub_dataset
from .image_folder import open_image_folder
from .images import check_images
from .json_files import open_json_array, open_json_lines
from .parquet import open_parquet
from .records import read_record
from .sounds import check_sounds


@dataclass(frozen=True, slots=True)
class Format:
    """One kind of prompt set: its reader, and the settings that only some formats take."""

    open: Callable[[str, PromptSettings], PromptSet]
    settings: frozenset[str] = frozenset()


IMAGE_FOLDER = Format(open_image_folder, frozenset({"question"}))
HUB_DATASET = Format(open_hub_dataset, frozenset({"split", "text_column", "image_column"}))
_COLUMNS = frozenset({"text_column", "image_column"})
FILES = {
    ".jsonl": Format(open_json_lines),
    ".ndjson": Format(open_json_lines),
    ".json": Format(open_json_array),
    ".csv": Format(open_csv, _COLUMNS),
    ".tsv": Format(open_csv, _COLUMNS),
    ".parquet": Format(open_parquet, _COLUMNS),
}
"""Formats of files by suffix."""


def load_prompts(
    ref: str | Path | Iterable[Prompt | str | Mapping[str, Any]],
    settings: PromptSettings = PromptSettings(),
) -> Prompts:
    """Read and check a prompt set, or a sample of it, in the set's order.

    The sample is the same for a seed on every machine. Of JSON everything is checked, of tables
    only the sampled rows; of images only those of the sample, which are decoded once.

    Args:
        ref: One of
            - a `.jsonl` or `.ndjson` file with an object on each line, or a `.json` file with an
              array of them: `{"prompt": str, "image": path}` or `"images": [paths]`, LLaVA's
              `conversations` or OpenAI's `messages` (see `records.py`), each with `"audio"`, a WAV
              file or several, for bases that hear. Other keys are ignored.
              Paths are relative to the file's folder, or begin with `~/`; data: URLs are read;
            - a folder: one prompt, `settings.question`, for each image in it and its subfolders;
            - a `.csv` or `.tsv` file with a header, whose images are paths;
            - a `.parquet` file (needs pyarrow); an image is a Hub struct of bytes and path, bare
              bytes, a path, or a list of those;
            - `org/name[:config][@revision]`: that dataset of the Hub (needs datasets);
            - a list of texts, `Prompt`s, or dicts like the objects above, whose images may be
              Pillow's or bytes as well.
        settings: Which sample, columns and split. Of a smaller set than `samples` all is taken.

    Raises:
        PromptError: The set cannot be read or used; in one line what is wrong, where, and what
            to do.
        RecipeError: A setting is out of range or does not go with this kind of set.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("prompts.jsonl").write_text('{"prompt": "What is two plus two?"}')
        >>> load_prompts("prompts.jsonl")[0]
        Prompt(text='What is two plus two?', images=(), id='prompts.jsonl:1', audio=())
    """
    if settings.samples < 1:
        raise RecipeError(f"a sample of {settings.samples} prompts; expected at least 1")
    found = _open(ref, settings)
    name = found.ref or str(ref)
    if not found.count:
        raise PromptError(f"{name}: no prompts in it")
    prompts = []
    checked_images: set[Path] = set()
    for prompt in found.read(_draw(found.count, settings.samples, settings.seed)):
        check_images(prompt, str(found.folder / prompt.id), checked_images)
        check_sounds(prompt, str(found.folder / prompt.id))
        prompts.append(prompt)
    taken = Prompts(prompts)
    taken.ref = name
    return taken


def as_prompt(entry: Prompt | str | Mapping[str, Any], id: str = "") -> Prompt:
    """A prompt from a text, or from a dict with `prompt` and `image` (see `load_prompts`).

    Example:
        >>> as_prompt({"prompt": "What is this?", "image": "cat.png"})
        Prompt(text='What is this?', images=(PosixPath('cat.png'),), id='', audio=())
    """
    if isinstance(entry, Prompt):
        return entry
    record = {"prompt": entry} if isinstance(entry, str) else entry
    return read_record(record, Path(), id or "a prompt", id)


def _open(
    ref: str | Path | Iterable[Prompt | str | Mapping[str, Any]], settings: PromptSettings
) -> PromptSet:
    if isinstance(ref, str | Path):
        format = _find_format(ref)
        _check_settings(ref, settings, format.settings)
        return format.open(str(ref), settings)
    if not isinstance(ref, Iterable) or isinstance(ref, Mapping | bytes):
        raise TypeError(f"prompts are {show_value(ref)}, expected a path or a list of prompts")
    name = "prompts given in Python"
    _check_settings(name, settings, frozenset())
    prompts = [as_prompt(entry, f"prompt {number}") for number, entry in enumerate(ref, 1)]
    return replace(listed(prompts, Path()), ref=name)


def _find_format(ref: str | Path) -> Format:
    path = Path(ref)
    if path.is_dir():
        return IMAGE_FOLDER
    format = FILES.get(path.suffix.lower())
    if path.is_file():
        if format:
            return format
        raise PromptError(
            f"{ref}: not a prompt set; expected {', '.join(FILES)}, a folder of images or a Hub"
            " dataset"
        )
    if not format and DATASET.fullmatch(str(ref)):
        return HUB_DATASET
    raise PromptError(f"{ref}: no such file or folder, nor a Hub dataset's name (org/name)")


def _check_settings(ref: str | Path, settings: PromptSettings, allowed: frozenset[str]) -> None:
    """RecipeError for a setting that this format has no use for."""
    for name in ("question", "split", "text_column", "image_column"):
        if getattr(settings, name) not in (None, ()) and name not in allowed:
            raise RecipeError(f"{ref}: {name} does not go with this kind of prompt set")


def _draw(count: int, samples: int, seed: int) -> Sequence[int]:
    """Ascending indices of the sample; by Python's own generator, which no library changes."""
    if samples >= count:
        return range(count)
    return sorted(random.Random(seed).sample(range(count), samples))


def digest(prompts: Iterable[Prompt]) -> str:
    """A sha256 in hex over texts, images and sounds in order, wherever the files lie."""
    total = hashlib.sha256()
    for prompt in prompts:
        text = prompt.text.encode()
        sounds = b" %d" % len(prompt.audio) if prompt.audio else b""
        total.update(b"%d %d%b\n" % (len(text), len(prompt.images), sounds) + text)
        for file in (*prompt.images, *prompt.audio):
            total.update(_content_hash(file))
    return total.hexdigest()


def _content_hash(content: Path | bytes) -> bytes:
    if isinstance(content, bytes):
        return hashlib.sha256(content).digest()
    try:
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise PromptError(f"{content}: {error.strerror}; put it back") from None
