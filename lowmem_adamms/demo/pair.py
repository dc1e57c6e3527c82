"""The pair as it lies in the package, and writing it to a folder."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputError

HERE = Path(__file__).parent
QUESTIONS = "questions.zip"  # prompts.jsonl, eval.jsonl and images/


@dataclass(frozen=True, slots=True)
class Pair:
    """Where an exported demo lies."""

    base: Path
    donor: Path
    prompts: Path
    exam: Path


def export_demo(folder: Path) -> Pair:
    """Write base, donor, prompts.jsonl, eval.jsonl and images to a new or empty folder.

    OutputError if it is a file or has anything in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "is not empty" if folder.is_dir() else "is a file"
        raise OutputError(f"{folder} {what}; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for side in ("base", "donor"):
        shutil.copytree(HERE / side, folder / side, copy_function=shutil.copyfile)
    with zipfile.ZipFile(HERE / QUESTIONS) as questions:
        questions.extractall(folder)
    return Pair(folder / "base", folder / "donor", folder / "prompts.jsonl", folder / "eval.jsonl")
