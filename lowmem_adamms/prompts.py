"""Prompt sets for the search: JSON Lines, a folder of images, Parquet, Hub datasets.

Every set is a count and a way to read chosen entries, so that of a large one only the sample is
held. Everything is read and checked before a model is loaded: an error names file, line and image.
Images stay as they are encoded until `open_image`. Leaves to others: chat templates and pixels
(`generate.py`).
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import random
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import PromptError, RecipeError

if TYPE_CHECKING:
    from PIL import Image

LINES = (".jsonl", ".ndjson")
TEXT_COLUMNS = ("prompt", "question", "query", "instruction", "text")
"""Where a table's prompts are looked for; the first that is there is taken."""
SPLITS = ("test", "validation", "train")
"""Which split of a Hub dataset with several is taken; the first that is there."""
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Pillow's names. Not all that it reads: it hands EPS, for one, to Ghostscript to run."""

_IMAGE_COLUMN = re.compile(r"images?|image_(\d+)")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.+-]+)?")
_URL = re.compile(r"(data:|[a-z][a-z0-9+.-]*://)", re.IGNORECASE)
_BATCH = 16  # rows of a Parquet file that are held at a time; each may hold several images
_decoding = threading.Lock()  # the filters for warnings belong to the process, not to the thread


@dataclass(frozen=True, slots=True)
class Prompt:
    """One unlabelled question: its text, its images (a path, or an encoded file's bytes), in order.

    id: where it stands, for people: "prompts.jsonl:3".
    """

    text: str
    images: tuple[Path | bytes, ...] = ()
    id: str = ""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a table hold the text and the images; None: found by their usual names.

    Text: the first of TEXT_COLUMNS. Images: `image` or `images`, then `image_1`, `image_2` and so
    on, as many as there are; () leaves all images out.
    """

    text: str | None = None
    images: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class _Set:
    """How many entries a set has and how to read some; `place / prompt.id` names one in errors."""

    count: int
    place: Path
    read: Callable[[Sequence[int]], Iterable[Prompt]]


def load_prompts(
    source: str | Path,
    *,
    question: str | None = None,
    sample: int | None = 100,
    seed: int = 0,
    split: str | None = None,
    columns: Columns | None = None,
) -> tuple[Prompt, ...]:
    """Read and check a prompt set, or `sample` entries of it (None: all), in the set's order.

    - `.jsonl`, `.ndjson`: a line is {"prompt": str, "image": path} or {"prompt": str, "images":
      [paths]}; null is the same as no key, other keys are ignored, paths are relative to the
      file's folder, blank lines are skipped. Every line is checked, and the sample's images.
    - a folder: one prompt, `question`, for each image in it and its subfolders, by name; hidden
      files and folders are left out.
    - `.parquet` (needs pyarrow): `columns` or the usual names; an image is a Hub struct of bytes
      and path, bare bytes or a path, or a list of those. Only the sample's rows are checked.
    - `org/name` or `org/name:config`, where no such path exists: that Hub dataset (needs datasets),
      its `split`, or its only one, or the first of SPLITS. The library's cache and HF_HUB_OFFLINE
      apply.

    The sample is the same for a seed on every machine. PromptError: what is wrong, where, and what
    to do, in one line. RecipeError: an option that is out of range or not for this kind of set.
    """
    if sample is not None and sample < 1:
        raise RecipeError(f"a sample of {sample} prompts; expected at least 1, or none for all")
    kind = _kind(source)
    for option, value, home in (
        ("question", question, ("folder",)),
        ("split", split, ("hub",)),
        ("columns", columns, ("parquet", "hub")),
    ):
        if value is not None and kind not in home:
            raise RecipeError(f"{source}: {option} does not go with this kind of prompt set")
    found = _open(kind, source, question, split, columns or Columns())
    if not found.count:
        raise PromptError(f"{source}: no prompts in it")
    prompts = []
    checked: set[Path] = set()
    for prompt in found.read(_pick(found.count, sample, seed)):
        _check_images(prompt, str(found.place / prompt.id), checked)
        prompts.append(prompt)
    return tuple(prompts)


def open_image(image: Path | bytes) -> Image.Image:
    """Decode an image file's first frame: RGB, upright by its EXIF orientation.

    Transparent parts turn white, as on a page; 16-bit grey is scaled to 8 bits. PromptError if it
    is missing, broken, of a format not in FORMATS, or larger than Pillow's MAX_IMAGE_PIXELS.
    """
    name = f"image {image}" if isinstance(image, Path) else f"an image of {len(image)} bytes"
    return _decode(image, name)


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
    content = hashlib.sha256()
    try:
        with image.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
    except OSError as error:
        raise PromptError(f"image {image}: {error.strerror}; put it back") from None
    return content.digest()


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
    if not named and _HUB.fullmatch(str(source)):
        return "hub"
    raise PromptError(f"{source}: no such file or folder, nor a Hub dataset's name (org/name)")


def _open(
    kind: str, source: str | Path, question: str | None, split: str | None, columns: Columns
) -> _Set:
    if kind == "folder":
        return _listed(_folder_prompts(Path(source), question), Path(source))
    if kind == "lines":
        return _listed(list(_line_prompts(Path(source))), Path(source).parent)
    if kind == "parquet":
        return _parquet_set(Path(source), columns)
    return _hub_set(str(source), split, columns)


def _listed(prompts: Sequence[Prompt], place: Path) -> _Set:
    return _Set(len(prompts), place, lambda picks: (prompts[pick] for pick in picks))


def _pick(count: int, sample: int | None, seed: int) -> Sequence[int]:
    """Ascending indices of the sample, by Python's own generator and not numpy's or torch's."""
    if sample is None or sample >= count:
        return range(count)
    return sorted(random.Random(seed).sample(range(count), sample))


# A folder of images


def _folder_prompts(folder: Path, question: str | None) -> list[Prompt]:
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


# JSON Lines


def _line_prompts(path: Path) -> Iterator[Prompt]:
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise PromptError(f"{path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}:{number}"
            entry = _entry(line, where)
            if "prompt" not in entry:
                keys = ", ".join(map(_line, entry)) or "nothing"
                raise PromptError(f'{where}: no "prompt" in it, found {keys}; call the text so')
            images = _line_images(entry, path.parent, where)
            yield Prompt(
                _text(entry.get("prompt"), "prompt", where), images, f"{path.name}:{number}"
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
        raise PromptError(f"{where}: not JSON that can be read: {_line(error)}") from None
    if not isinstance(entry, dict):
        raise PromptError(f'{where}: found {_type(entry)}, expected an object: {{"prompt": …}}')
    return entry


def _line_images(entry: dict[str, Any], folder: Path, where: str) -> tuple[Path, ...]:
    one, several = entry.get("image"), entry.get("images")
    if one is not None and several is not None:
        raise PromptError(f'{where}: both "image" and "images"; keep one of them')
    if several is not None and not isinstance(several, list):
        raise PromptError(f'{where}: "images" is {_type(several)}; expected a list of paths')
    paths = [one] if one is not None else several or []
    return tuple(_path(value, folder, where) for value in paths)


def _text(value: object, name: str, where: str) -> str:
    """A prompt's text, as it stands. Lone surrogates can be written in JSON but not encoded."""
    if value is None:
        raise PromptError(f'{where}: no "{name}"; expected a text there')
    if not isinstance(value, str):
        raise PromptError(f'{where}: "{name}" is {_type(value)}; expected a text')
    if not value.strip():
        raise PromptError(f'{where}: "{name}" is empty; write it or take the entry out')
    if re.search("[\ud800-\udfff]", value):
        raise PromptError(f'{where}: "{name}" holds half a surrogate pair; write it as UTF-8')
    return value


def _path(value: object, folder: Path, where: str) -> Path:
    if not isinstance(value, str) or not value:
        found = _type(value) if not isinstance(value, str) else "empty"
        raise PromptError(f"{where}: an image is {found}; expected a file's path")
    if _URL.match(value):
        raise PromptError(
            f"{where}: image {_line(value, 80)} is a URL; download it and give the path"
        )
    return folder / value


# Tables


def _parquet_set(path: Path, columns: Columns) -> _Set:
    parquet = _library("pyarrow.parquet", "pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            names, count = file.schema_arrow.names, file.metadata.num_rows
    except Exception as error:  # pyarrow's own kinds, and Python's
        raise _bad_parquet(path, error) from None
    text, images = _choose(path, names, columns)

    def read(picks: Sequence[int]) -> Iterator[Prompt]:
        for index, row in _parquet_rows(path, [text, *images], picks):
            yield _row_prompt(row, text, images, path.parent, f"{path.name}[{index}]")

    return _Set(count, path.parent, read)


def _parquet_rows(
    path: Path, columns: list[str], picks: Sequence[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The picked rows, counted from 0; row groups without one are not read."""
    parquet = _library("pyarrow.parquet", "pyarrow")
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
        f"{path}: not a Parquet file that can be read ({_line(error)}); download it again"
    )


def _hub_set(source: str, split: str | None, columns: Columns) -> _Set:
    """Rows come through Arrow, so that the library's Image columns stay encoded."""
    datasets = _library("datasets", "datasets")
    name, _, config = source.partition(":")
    try:
        if split is None:
            split = _default_split(source, datasets.get_dataset_split_names(name, config or None))
        data = datasets.load_dataset(name, config or None, split=split)
    except PromptError:
        raise
    except Exception as error:  # the library's, huggingface_hub's, httpx's, fsspec's
        raise PromptError(
            f"{source}: no such path here, and as a Hub dataset: {_line(error).rstrip('.')};"
            " check its name and split, the network and HF_HUB_OFFLINE"
        ) from None
    text, images = _choose(source, data.column_names, columns)
    table = data.select_columns([text, *images]).with_format("arrow")

    def read(picks: Sequence[int]) -> Iterator[Prompt]:
        for index in picks:
            row = table[index].to_pylist()[0]
            yield _row_prompt(row, text, images, Path(), f"{source} {split}[{index}]")

    return _Set(len(table), Path(), read)


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
    return Prompt(_text(row[text], text, where), tuple(found), id)


def _cell_images(value: object, name: str, folder: Path, where: str) -> Iterator[Path | bytes]:
    """The images in one cell: none, one, or a list of them."""
    if isinstance(value, list):
        for item in value:
            yield from _cell_images(item, name, folder, where)
    elif isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        yield value["bytes"]
    elif isinstance(value, dict) and isinstance(value.get("path"), str):
        yield _path(value["path"], folder, where)
    elif isinstance(value, bytes):
        yield value
    elif isinstance(value, str):
        yield _path(value, folder, where)
    elif value is not None:
        raise PromptError(
            f'{where}: "{name}" is {_type(value)}; expected an image:'
            " a struct of bytes and path, bytes, a path, or a list of those"
        )


# Images


def _check_images(prompt: Prompt, where: str, checked: set[Path]) -> None:
    """Decode each image once and let it go. PromptError names the entry and the image."""
    for number, image in enumerate(prompt.images, 1):
        if isinstance(image, bytes):
            _decode(image, f"{where}: image {number} of {len(prompt.images)}")
        elif image not in checked:
            name = str(image)
            _decode(image, name if name == where else f"{where}: image {_line(name)}")
            checked.add(image)


def _decode(image: Path | bytes, name: str) -> Image.Image:
    """`open_image`, with the image's name in messages. Whatever a decoder raises is the image's."""
    pillow, pil = _library("PIL.Image", "pillow"), _library("PIL", "pillow")
    try:
        with _decoding, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            source = io.BytesIO(image) if isinstance(image, bytes) else image
            with pillow.open(source, formats=FORMATS) as file:
                file.load()
                return _rgb(_upright(file))
    except FileNotFoundError:
        reason = "no such file; correct the path (a relative one starts at the set's folder)"
    except pil.UnidentifiedImageError:
        reason = "not an image; expected JPEG, PNG, WebP, GIF, BMP or TIFF"
    except (pillow.DecompressionBombWarning, pillow.DecompressionBombError):
        reason = f"more than {pillow.MAX_IMAGE_PIXELS} pixels; scale it down"
    except Exception as error:
        detail = _line(getattr(error, "strerror", None) or error)
        reason = f"cannot be read ({detail}); replace it or take the entry out"
    raise PromptError(f"{_line(name, 1000)}: {reason}")


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF block says; as it lies if that block is broken, as viewers do."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _rgb(image: Image.Image) -> Image.Image:
    """Pillow's own conversions would clip 16-bit grey at 255 and bare what transparency hides."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value * (1 / 257)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


# Words


def _library(module: str, package: str) -> Any:
    """An optional library, without its types: pyarrow and datasets have none."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PromptError(
            f"this prompt set needs {package} ({_line(error)}): pip install {package}"
        ) from None


def _line(message: object, limit: int = 300) -> str:
    """A message as one printable line of limited length."""
    text = " ".join(str(message).split()) or repr(message)
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _type(value: object) -> str:
    """What a JSON or Arrow value is, for people."""
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    return names.get(type(value), f"of type {type(value).__name__}")
