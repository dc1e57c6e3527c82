"""Prompt sets for the search: JSON Lines, a folder of images, Parquet, Hub datasets.

Everything is read and checked before a model is loaded; an error names file and line. Leaves to
others: chat templates and pixels (`generate.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Prompt:
    """One unlabelled question: its text, its images (a path, or an encoded file's bytes), in order.

    id: where it stands, for people: "prompts.jsonl:3".
    """

    text: str
    images: tuple[Path | bytes, ...] = ()
    id: str = ""
