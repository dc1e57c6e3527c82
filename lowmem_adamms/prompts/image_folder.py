"""Prompts from a folder of images: the same question about each."""

from __future__ import annotations

from pathlib import Path

from ..errors import PromptError
from ..settings import PromptSettings
from .entry import Prompt, PromptSet, listed

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def open_image_folder(ref: str, settings: PromptSettings) -> PromptSet:
    """One prompt for each image in the folder and its subfolders, by name; hidden ones left out."""
    folder, question = Path(ref), settings.question
    if question is None or not question.strip():
        raise PromptError(
            f"{folder}: a folder of images needs a question to ask about each: `question`"
            " (or name a .jsonl or .parquet file in it)"
        )
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
    prompts = [
        Prompt(question, (folder / name,), name)
        for name in names
        if not any(part.startswith(".") for part in name.split("/"))
    ]
    if not prompts:
        raise PromptError(f"{folder}: no images in it; expected {', '.join(IMAGE_SUFFIXES)}")
    return listed(prompts, folder)
