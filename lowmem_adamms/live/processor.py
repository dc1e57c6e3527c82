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
    options = {"trust_remote_code": trust_remote_code}
    with quiet():
        try:
            processor = transformers.AutoProcessor.from_pretrained(folder, **options)
        except ImportError as error:
            processor = _load_without_videos(transformers, folder, options, error)
        except (OSError, ValueError) as error:
            if "torchvision" in str(error):  # some processors say so with a ValueError
                processor = _load_without_videos(transformers, folder, options, error)
            elif any((folder / name).is_file() for name in _PROCESSOR_FILES):
                reason = first_line(error)
                raise FormatError(f"{folder}: its processor cannot be read ({reason})") from None
            else:
                processor = _load_tokenizer(transformers, folder, options)
    if len(getattr(processor, "tokenizer", processor)) < SMALLEST_VOCABULARY:
        raise FormatError(f"{folder}: no tokenizer in it; copy {_TOKENIZER_FILES} there")
    return processor


def _load_tokenizer(transformers: Any, folder: Path, options: dict[str, Any]) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError):
        raise FormatError(
            f"{folder}: no tokenizer that can be read in it; copy {_TOKENIZER_FILES} there"
        ) from None


def _load_without_videos(
    transformers: Any, folder: Path, options: dict[str, Any], missing: Exception
) -> Any:
    """The processor without its video part, if torchvision is all that is missing."""
    try:
        if "torchvision" in str(missing).lower():
            return _build_without_videos(transformers, folder, options)
    except ImportError as error:
        missing = error
    reason = " ".join(str(missing).split())
    raise RecipeError(f"{folder}: its processor needs what is not installed: {reason}")


def _build_without_videos(transformers: Any, folder: Path, options: dict[str, Any]) -> Any:
    """The processor from its parts, with `_NoVideos` as its video processor."""
    name = _read_processor_class(folder)
    if name is None:
        raise FormatError(f"{folder}: none of its files names its processor_class")
    processor_class = getattr(transformers, name)

    def check_argument(self: Any, attribute: str, argument: Any) -> Any:
        if argument is None:
            return None
        return processor_class.check_argument_for_proper_class(self, attribute, argument)

    lenient_class: Any = type(
        name, (processor_class,), {"check_argument_for_proper_class": check_argument}
    )
    loaders = {
        "image_processor": transformers.AutoImageProcessor,
        "tokenizer": transformers.AutoTokenizer,
    }
    parts = processor_class.get_attributes()
    arguments = [
        loaders[part].from_pretrained(folder, **options) if part in loaders else None
        for part in parts
    ]
    settings, _ = processor_class.get_processor_dict(folder)
    processor = lenient_class.from_args_and_dict(arguments, settings)
    for part in set(parts) - set(loaders):
        setattr(processor, part, _NoVideos())  # SmolVLM asks it for settings, whatever is shown
    return processor


class _NoVideos:
    """Stands for a video processor; all of its settings are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _read_processor_class(folder: Path) -> str | None:
    for file in (*_PROCESSOR_FILES, "tokenizer_config.json"):
        path = folder / file
        if path.is_file() and (name := json.loads(path.read_bytes()).get("processor_class")):
            return str(name)
    return None
