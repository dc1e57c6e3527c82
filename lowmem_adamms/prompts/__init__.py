"""Prompt sets: the unlabelled questions that a search asks.

Files, in reading order:
- entry.py: one prompt, and the checks of its parts
- images.py: image files decoded to RGB
- image_folder.py, json_lines.py, parquet.py, hub_dataset.py: one reader for each format
- table_rows.py: what the readers of tables share
- load.py: `load_prompts`, which picks the reader and the sample, and the digest of a set
"""

from __future__ import annotations

from .entry import Prompt, Prompts
from .images import open_image
from .load import digest, load_prompts

__all__ = ["Prompt", "Prompts", "digest", "load_prompts", "open_image"]
