"""One entry of a prompt set, the checks of its parts, and the words for what is wrong with one."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PromptError

_URL = re.compile(r"(data:|[a-z][a-z0-9+.-]*://)", re.IGNORECASE)


Image = Path | bytes
"""A path, or the bytes of an encoded image file."""
Sound = Path | bytes
"""A path, or the bytes of a WAV file."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One unlabelled question.

    images, audio: in order. id: where the prompt stands, for people: "prompts.jsonl:3".
    """

    text: str
    images: tuple[Image, ...] = ()
    id: str = ""
    audio: tuple[Sound, ...] = ()


class Prompts(tuple[Prompt, ...]):
    """The prompts taken from a set.

    ref: which set: the path that was given, or `org/name[:config]@commit split`.
    """

    ref: str


@dataclass(frozen=True, slots=True)
class PromptSet:
    """What a reader returns: how many entries the set has, and a way to read some of them.

    read: takes ascending indices. Only the entries that it reads are held in memory.
    folder: `folder / prompt.id` names an entry in errors.
    ref: replaces the reference that the user gave, where that does not pin the content.
    """

    count: int
    folder: Path
    read: Callable[[Sequence[int]], Iterable[Prompt]]
    ref: str | None = None


def listed(prompts: Sequence[Prompt], folder: Path) -> PromptSet:
    """The set of prompts that a reader holds all of."""
    return PromptSet(len(prompts), folder, lambda picks: (prompts[pick] for pick in picks))


def check_text(value: object, name: str, where: str) -> str:
    """Return a prompt's text unchanged; PromptError unless it can be asked."""
    if not isinstance(value, str):
        raise PromptError(f'{where}: "{name}" is {show_value(value)}; expected a text')
    if not value.strip():
        raise PromptError(f'{where}: "{name}" is empty; write it or take the entry out')
    if re.search("[\ud800-\udfff]", value):  # JSON can spell what UTF-8 cannot encode
        raise PromptError(f'{where}: "{name}" holds half a surrogate pair; write it as UTF-8')
    return value


def check_path(value: object, folder: Path, where: str, kind: str = "image") -> Path:
    """The file that an entry names, relative to `folder` unless it is absolute or begins with `~`.

    Raises PromptError for a URL and for anything that is not text. The file need not exist.
    """
    if not isinstance(value, str) or not value:
        article = "an" if kind == "image" else "a"
        raise PromptError(
            f"{where}: {article} {kind} is {show_value(value)}; expected a file's path"
        )
    if _URL.match(value):
        raise PromptError(
            f"{where}: {kind} {one_line(value, 80)} is a URL; download it and give the path"
        )
    return folder / Path(value).expanduser()


def import_library(module: str, package: str, purpose: str) -> Any:
    """An optional library; PromptError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PromptError(
            f"{purpose} needs {package} ({one_line(error)}): pip install {package}"
        ) from None


def one_line(message: object, limit: int = 300) -> str:
    """A message as one printable line of limited length."""
    text = " ".join(str(message).split()) or repr(message)
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def show_value(value: object) -> str:
    """A value as Python writes it, shortened for an error."""
    return one_line(repr(value), 40)
