"""One entry of a prompt set, its parts checked, and the words that say what is wrong with one."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PromptError
from ..home import at_home

_URL = re.compile(r"(data:|[a-z][a-z0-9+.-]*://)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One unlabelled question: its text, its images (a path, or an encoded file's bytes), in order.

    id: where it stands, for people: "prompts.jsonl:3".
    """

    text: str
    images: tuple[Path | bytes, ...] = ()
    id: str = ""


class Prompts(tuple[Prompt, ...]):
    """The prompts that were taken of a set.

    ref: which set: the path that was given, or `org/name[:config]@commit split`.
    """

    ref: str


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a table hold the text and the images; None: found by their usual names.

    Text: the first of TEXT_COLUMNS. Images: `image` or `images`, then `image_1`, `image_2` and so
    on, as many as there are; () leaves all images out.
    """

    text: str | None = None
    images: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class PromptSet:
    """How many entries a set has and how to read some; `place / prompt.id` names one in errors.

    ref: which set it is, if what was asked for does not say.
    """

    count: int
    place: Path
    read: Callable[[Sequence[int]], Iterable[Prompt]]
    ref: str | None = None


def checked_text(value: object, name: str, where: str) -> str:
    """A prompt's text, as it stands. Lone surrogates can be written in JSON but not encoded."""
    if value is None:
        raise PromptError(f'{where}: no "{name}"; expected a text there')
    if not isinstance(value, str):
        raise PromptError(f'{where}: "{name}" is {type_name(value)}; expected a text')
    if not value.strip():
        raise PromptError(f'{where}: "{name}" is empty; write it or take the entry out')
    if re.search("[\ud800-\udfff]", value):
        raise PromptError(f'{where}: "{name}" holds half a surrogate pair; write it as UTF-8')
    return value


def checked_path(value: object, folder: Path, where: str) -> Path:
    """A file that an entry names, relative to `folder` or to the home folder; not a URL."""
    if not isinstance(value, str) or not value:
        found = type_name(value) if not isinstance(value, str) else "empty"
        raise PromptError(f"{where}: an image is {found}; expected a file's path")
    if _URL.match(value):
        raise PromptError(
            f"{where}: image {one_line(value, 80)} is a URL; download it and give the path"
        )
    return folder / at_home(value)


def library(module: str, package: str) -> Any:
    """An optional library, without its types: pyarrow and datasets have none."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PromptError(
            f"this prompt set needs {package} ({one_line(error)}): pip install {package}"
        ) from None


def one_line(message: object, limit: int = 300) -> str:
    """A message as one printable line of limited length."""
    text = " ".join(str(message).split()) or repr(message)
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def type_name(value: object) -> str:
    """What a JSON or Arrow value is, for people."""
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    return names.get(type(value), f"of type {type(value).__name__}")
