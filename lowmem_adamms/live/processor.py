"""Load the processor of a checkpoint, or its tokenizer where it has no processor."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from ..errors import FormatError, RecipeError, first_line
from .transformers_model import quiet, refuse_remote_code

SMALLEST_VOCABULARY = 64
"""Tokens that any real one has: where there is no file, transformers makes up a smaller one."""

_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_TOKENIZER_FILES = "tokenizer_config.json and tokenizer.json or tokenizer.model"


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the processor of a checkpoint, or its tokenizer where it has no processor.

    Some processors are refused where torchvision is missing, although only videos need it: those
    are put together without their video part.

    Raises FormatError if there is neither, or if it cannot be read, and RecipeError if it is code
    that was not allowed or needs a package that is missing.
    """
    refuse_remote_code(folder, trust_remote_code)
    transformers = importlib.import_module("transformers")
    has_processor = any((folder / name).is_file() for name in _PROCESSOR_FILES)
    auto_class = transformers.AutoProcessor if has_processor else transformers.AutoTokenizer
    try:
        with quiet():
            try:
                processor = auto_class.from_pretrained(folder, trust_remote_code=trust_remote_code)
            except (ImportError, ValueError) as error:  # some processors say it with a ValueError
                if "torchvision" not in str(error).lower():
                    raise
                processor = _build_without_videos(transformers, folder, trust_remote_code)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise RecipeError(
            f"{folder}: its processor needs what is not installed: {reason}"
        ) from None
    except (OSError, ValueError) as error:
        if has_processor:
            reason = first_line(error)
            raise FormatError(f"{folder}: its processor cannot be read ({reason})") from None
        raise FormatError(
            f"{folder}: no tokenizer that can be read in it; copy {_TOKENIZER_FILES} there"
        ) from None
    if len(getattr(processor, "tokenizer", processor)) < SMALLEST_VOCABULARY:
        raise FormatError(f"{folder}: no tokenizer in it; copy {_TOKENIZER_FILES} there")
    return processor


def _build_without_videos(transformers: Any, folder: Path, trust_remote_code: bool) -> Any:
    """The processor of a known class from its parts, with `_NoVideos` as its video processor."""
    files = [folder / file for file in (*_PROCESSOR_FILES, "tokenizer_config.json")]
    found = [
        json.loads(path.read_bytes()).get("processor_class") for path in files if path.is_file()
    ]
    name = next(filter(None, found), None)
    if name is None:
        raise FormatError(f"{folder}: none of its files names its processor_class")
    processor_class = getattr(transformers, name)
    # Its own check would refuse a part that is None
    lenient_class: Any = type(
        name, (processor_class,), {"check_argument_for_proper_class": lambda *_: None}
    )
    loaders = {
        "image_processor": transformers.AutoImageProcessor,
        "tokenizer": transformers.AutoTokenizer,
    }
    parts = {
        part: loaders[part].from_pretrained(folder, trust_remote_code=trust_remote_code)
        if part in loaders
        else None
        for part in processor_class.get_attributes()
    }
    settings, _ = processor_class.get_processor_dict(folder)
    processor = lenient_class.from_args_and_dict(list(parts.values()), settings)
    for part in parts.keys() - loaders.keys():
        setattr(processor, part, _NoVideos())  # SmolVLM asks it for settings, whatever is shown
    return processor


class _NoVideos:
    """Stands for a video processor; all of its settings are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
