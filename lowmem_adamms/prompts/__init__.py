"""Prompt sets for the search: JSON Lines, a folder of images, Parquet, Hub datasets.

Every set is a count and a way to read chosen entries, so that of a large one only the sample is
held. Everything is read and checked before a model is loaded: an error names file, line and image.
Images stay as they are encoded until `open_image`. Leaves to others: each kind of set (`files.py`,
`tables.py`), decoding (`images.py`), chat templates and pixels (`encode.py` of the package).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..checkpoints.mapped_files import file_digest
from ..errors import PromptError, RecipeError
from .entry import Columns, Prompt, Prompts, PromptSet
from .files import folder_prompts, line_prompts
from .images import check_images, open_image
from .tables import HUB, hub_set, parquet_set

__all__ = ["Columns", "Prompt", "Prompts", "digest", "load_prompts", "open_image"]

LINES = (".jsonl", ".ndjson")


def load_prompts(
    source: str | Path,
    *,
    question: str | None = None,
    sample: int | None = 100,
    seed: int = 0,
    split: str | None = None,
    columns: Columns | None = None,
) -> Prompts:
    """Read and check a prompt set, or `sample` entries of it (None: all), in the set's order.

    - `.jsonl`, `.ndjson`: a line is {"prompt": str, "image": path} or {"prompt": str, "images":
      [paths]}; null is the same as no key, other keys are ignored, paths are relative to the
      file's folder or begin with `~/`, blank lines are skipped. Every line is checked, and the
      sample's images.
    - a folder: one prompt, `question`, for each image in it and its subfolders, by name; hidden
      files and folders are left out.
    - `.parquet` (needs pyarrow): `columns` or the usual names; an image is a Hub struct of bytes
      and path, bare bytes or a path, or a list of those. Only the sample's rows are checked.
    - `org/name[:config][@revision]`, where no such path exists: that Hub dataset (needs datasets),
      its `split`, or its only one, or the first of SPLITS. The library's cache and HF_HUB_OFFLINE
      apply.

    The sample is the same for a seed on every machine. PromptError: what is wrong, where, and what
    to do, in one line. RecipeError: an option that is out of range or not for this kind of set.
    """
    if sample is not None and sample < 1:
        raise RecipeError(f"a sample of {sample} prompts; expected at least 1, or none for all")
    kind = _kind(source)
    homes = {"question": ("folder",), "split": ("hub",), "columns": ("parquet", "hub")}
    for option, value in (("question", question), ("split", split), ("columns", columns)):
        if value is not None and kind not in homes[option]:
            raise RecipeError(f"{source}: {option} does not go with this kind of prompt set")
    found = _open(kind, source, question, split, columns or Columns())
    if not found.count:
        raise PromptError(f"{source}: no prompts in it")
    prompts = []
    checked: set[Path] = set()
    for prompt in found.read(_pick(found.count, sample, seed)):
        check_images(prompt, str(found.place / prompt.id), checked)
        prompts.append(prompt)
    taken = Prompts(prompts)
    taken.ref = found.ref or str(source)
    return taken


def digest(prompts: Iterable[Prompt]) -> str:
    """A sha256 in hex over texts and image contents in order: one set, wherever its files lie."""
    total = hashlib.sha256()
    for prompt in prompts:
        text = prompt.text.encode()
        total.update(b"%d %d\n" % (len(text), len(prompt.images)) + text)
        for image in prompt.images:
            total.update(_content_hash(image))
    return total.hexdigest()


def _content_hash(image: Path | bytes) -> bytes:
    if isinstance(image, bytes):
        return hashlib.sha256(image).digest()
    try:
        return bytes.fromhex(file_digest(image, hashlib.sha256()))
    except OSError as error:
        raise PromptError(f"image {image}: {error.strerror}; put it back") from None


def _kind(source: str | Path) -> str:
    """lines, folder, parquet or hub; PromptError for anything else."""
    path = Path(source)
    suffix = path.suffix.lower()
    if path.is_dir():
        return "folder"
    named = "lines" if suffix in LINES else "parquet" if suffix == ".parquet" else ""
    if path.is_file():
        if named:
            return named
        raise PromptError(
            f"{source}: not a prompt set; expected .jsonl (a JSON object on each line), .parquet,"
            " a folder of images or a Hub dataset"
        )
    if not named and HUB.fullmatch(str(source)):
        return "hub"
    raise PromptError(f"{source}: no such file or folder, nor a Hub dataset's name (org/name)")


def _open(
    kind: str, source: str | Path, question: str | None, split: str | None, columns: Columns
) -> PromptSet:
    if kind == "folder":
        return _listed(folder_prompts(Path(source), question), Path(source))
    if kind == "lines":
        return _listed(list(line_prompts(Path(source))), Path(source).parent)
    if kind == "parquet":
        return parquet_set(Path(source), columns)
    return hub_set(str(source), split, columns)


def _listed(prompts: Sequence[Prompt], place: Path) -> PromptSet:
    return PromptSet(len(prompts), place, lambda picks: (prompts[pick] for pick in picks))


def _pick(count: int, sample: int | None, seed: int) -> Sequence[int]:
    """Ascending indices of the sample, by Python's own generator and not numpy's or torch's."""
    if sample is None or sample >= count:
        return range(count)
    return sorted(random.Random(seed).sample(range(count), sample))
