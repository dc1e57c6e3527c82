"""Prompt sets: the unlabelled questions that a search asks.

entry         one prompt, and the checks of its parts
images        image files decoded to RGB
sounds        WAV files as samples
image_folder  a folder of images and one question
records       a prompt as a JSON object: ours, LLaVA's conversations, OpenAI's messages
json_files    a file with an object a line, or an array of them
table_rows    what the readers of tables share
csv_file      CSV and TSV
parquet       a Parquet file
hub_dataset   a dataset of the Hub
load          `load_prompts`, which picks the reader and the sample; digests
"""

from __future__ import annotations

from .entry import Prompt, Prompts
from .images import open_image
from .load import as_prompt, digest, load_prompts
from .sounds import open_sound

__all__ = ["Prompt", "Prompts", "as_prompt", "digest", "load_prompts", "open_image", "open_sound"]
