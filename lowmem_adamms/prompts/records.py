"""A prompt as a JSON object or Python dict, in each of the forms that people have.

    {"prompt": text}                                               ours
    {"conversations": [{"from": "human", "value": text}, …]}       LLaVA's
    {"messages": [{"role": "user", "content": text or parts}, …]}  OpenAI's

each with "image" or "images" beside it if the parts of a message do not hold them, and with "audio"
for sounds. Of a conversation its first question is asked, after the system's words if there are
any. Sounds and images go before the text: marks that say where an image stands are removed from its
ends, and numbered inside it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import PromptError
from .entry import Image, Prompt, check_text, one_line, show_value
from .images import read_image
from .sounds import read_sounds

IMAGE_MARK = "<image>"
_FIRST_MARKS = re.compile(r"\A\s*(?:<image \d+>\s*)*")
_LAST_MARK = re.compile(r"<image \d+>\Z")
_SYSTEM = ("system", "developer")
_USER = ("human", "user")

Content = tuple[str, list[Image]]
"""Text with IMAGE_MARK where an image stands, and the images that came with it."""


def read_record(record: object, folder: Path, where: str, id: str) -> Prompt:
    """The prompt in a record. Relative paths start at `folder`; `where` names it in errors."""
    if not isinstance(record, dict):
        raise PromptError(f"{where}: found {show_value(record)}, expected an object")
    names = [name for name in _FORMS if name in record]
    if not names:
        keys = ", ".join(map(one_line, record)) or "nothing"
        raise PromptError(f'{where}: no "prompt" in it, found {keys}; call the text so')
    if len(names) > 1:
        raise PromptError(f"{where}: found {' and '.join(names)}; keep one of them")
    text, images = _FORMS[names[0]](record[names[0]], folder, where)
    if images and (beside := _images_beside(record, folder, where)):
        raise PromptError(f"{where}: {len(beside)} images beside a message that has its own")
    images = images or _images_beside(record, folder, where)
    if names[0] != "prompt":
        text = check_text(_place_marks(text, len(images), where), names[0], where)
    return Prompt(text, tuple(images), id, tuple(read_sounds(record, folder, where)))


def _images_beside(record: Mapping[str, Any], folder: Path, where: str) -> list[Image]:
    image, images = record.get("image"), record.get("images")
    if image is not None and images is not None:
        raise PromptError(f'{where}: both "image" and "images"; keep one of them')
    if isinstance(image, list):  # LLaVA's way of giving several
        images = image
    elif images is None:
        images = [] if image is None else [image]
    if not isinstance(images, list):
        raise PromptError(f'{where}: "images" is {show_value(images)}; expected a list of paths')
    return [read_image(value, folder, where) for value in images]


def _place_marks(text: str, images: int, where: str) -> str:
    """The text with its marks removed from both ends, and numbered inside."""
    marks = text.count(IMAGE_MARK)
    if not marks:
        return text
    if marks != images:
        raise PromptError(
            f"{where}: {marks} marks {IMAGE_MARK}, {images} images; expected one each"
        )
    numbers = itertools.count(1)
    numbered = re.sub(IMAGE_MARK, lambda _: f"<image {next(numbers)}>", text)
    text = _FIRST_MARKS.sub("", numbered).rstrip()
    while last := _LAST_MARK.search(text[-20:]):
        text = text[: -len(last[0])].rstrip()
    return text


# Forms


def _read_plain(value: object, folder: Path, where: str) -> Content:
    return check_text(value, "prompt", where), []


def _read_turns(keys: tuple[str, str], turns: object, folder: Path, where: str) -> Content:
    """The first question of a conversation. keys: how its turns call speaker and words."""
    speaker_key, words_key = keys
    texts: list[str] = []
    images: list[Image] = []
    for turn in turns if isinstance(turns, list) else [turns]:
        speaker = turn.get(speaker_key) if isinstance(turn, dict) else None
        if not isinstance(turn, dict) or speaker not in (*_SYSTEM, *_USER):
            raise PromptError(
                f"{where}: found {show_value(turn)}, expected a conversation that begins with"
                f" a question: {speaker_key} is one of {', '.join((*_USER, *_SYSTEM))}"
            )
        text, found = _read_words(turn.get(words_key), words_key, folder, where)
        texts.append(text)
        images += found
        if speaker in _USER:
            return "\n\n".join(texts), images
    raise PromptError(f"{where}: no question in its conversation; expected one")


def _read_words(words: object, name: str, folder: Path, where: str) -> Content:
    """What one turn says: a text, or a list of parts."""
    if not isinstance(words, list):
        return check_text(words, name, where), []
    texts: list[str] = []
    images: list[Image] = []
    for part in words:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in _PARTS:
            raise PromptError(
                f"{where}: a part is {show_value(part)}; expected one of the types"
                f" {', '.join(_PARTS)}"
            )
        text, found = _PARTS[kind](part, folder, where)
        texts.append(text)
        images += found
    return "\n".join(texts), images


def _read_text_part(part: Mapping[str, Any], folder: Path, where: str) -> Content:
    return check_text(part.get("text"), "text", where), []


def _read_image_part(part: Mapping[str, Any], folder: Path, where: str) -> Content:
    """An image, or a mark for one of those beside the conversation."""
    keys = ("image_url", "image", "path", "url")
    source = next((part[key] for key in keys if part.get(key) is not None), None)
    if isinstance(source, dict):
        source = source.get("url", source)
    return IMAGE_MARK, [] if source is None else [read_image(source, folder, where)]


_FORMS: dict[str, Callable[[object, Path, str], Content]] = {
    "prompt": _read_plain,
    "conversations": partial(_read_turns, ("from", "value")),
    "messages": partial(_read_turns, ("role", "content")),
}
"""By the key that tells the form: how its value is read."""
_PARTS: dict[str, Callable[[Mapping[str, Any], Path, str], Content]] = {
    "text": _read_text_part,
    "image_url": _read_image_part,
    "image": _read_image_part,
    "input_text": _read_text_part,
    "input_image": _read_image_part,
}
"""By its type: how a part of a message is read."""
