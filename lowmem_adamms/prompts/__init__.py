"""Prompt sets: the unlabelled questions that a search asks.

entry         one prompt, and the checks of its parts
images        image files decoded to RGB
image_folder  a folder of images and one question
json_lines    a file with a prompt a line
table_rows    what the readers of tables share
parquet       a Parquet file
hub_dataset   a dataset of the Hub
load          `load_prompts`, which picks the reader and the sample; the digest of a set
"""

from __future__ import annotations

from .entry import Prompt, Prompts
from .images import open_image
from .load import digest, load_prompts

__all__ = ["Prompt", "Prompts", "digest", "load_prompts", "open_image"]
