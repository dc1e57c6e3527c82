"""The processor of a checkpoint, or its tokenizer where it has none, and its chat template."""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import FormatError, PromptError, RecipeError, first_line
from ..prompts import Prompt
from .transformers_model import quiet, refuse_remote_code

SMALLEST_VOCABULARY = 64
"""Tokens that any real one has: where there is no file, transformers makes up a smaller one."""

TEMPLATE_SECONDS = 10.0
"""A chat template that takes longer for one question does not end."""

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


# What it makes of prompts


def write_text(processor: Any, prompt: Prompt, folder: Path) -> str:
    """The prompt in the words of the chat template, ready for the model's answer."""
    template = _find_template(processor)
    if not template:
        marker, sound_marker = (
            getattr(processor, f"{kind}_token", "") for kind in ("image", "audio")
        )
        marks = [marker] * len(prompt.images) + [sound_marker] * len(prompt.audio)
        return "".join(f"{mark}\n" for mark in marks) + prompt.text
    content: Any = prompt.text
    if hasattr(processor, "image_processor") or hasattr(processor, "feature_extractor"):
        content = [{"type": "image"} for _ in prompt.images]
        content += [
            {"type": "audio", "audio": ""} for _ in prompt.audio
        ]  # templates ask for either
        content.append({"type": "text", "text": prompt.text})
    try:
        text: str = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=template,  # a processor does not look for its tokenizer's
            tokenize=False,
            add_generation_prompt=True,
        )
    except importlib.import_module("jinja2").TemplateError as error:
        raise FormatError(f"{folder}: its chat template fails: {error}") from None
    return text


def check_takes_files(processor: Any, prompts: Sequence[Prompt], folder: Path) -> None:
    """Raise PromptError if a prompt has an image or sound and no processor takes it."""
    for prompt in prompts:
        if prompt.audio and not hasattr(processor, "feature_extractor"):
            raise PromptError(f"{prompt.id}: has a sound, but {folder} hears none")
        if prompt.images and not hasattr(processor, "image_processor"):
            raise PromptError(
                f"{prompt.id}: has an image, but {folder} is text-only"
                " (there is no preprocessor_config.json in it)"
            )


def check_template(processor: Any, folder: Path) -> None:
    """Raise FormatError if there is no chat template, or if it does not end.

    It is code that comes with the model: a question is written with it in a thread, which is left
    behind if it takes longer than TEMPLATE_SECONDS.
    """
    if not _find_template(processor):
        raise FormatError(
            f"{folder}: no chat template in it, so that its answers would mean little; copy"
            " chat_template.jinja or tokenizer_config.json from the instruction-tuned model, or"
            " ask it without one (force)"
        )
    errors: list[BaseException] = []

    def write() -> None:
        try:
            write_text(processor, Prompt("What is this?"), folder)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(TEMPLATE_SECONDS)
    if thread.is_alive():
        raise FormatError(
            f"{folder}: its chat template does not end within {TEMPLATE_SECONDS:g} s; replace it"
        )
    if errors:
        raise errors[0]


def _find_template(processor: Any) -> Any:
    tokenizer = getattr(processor, "tokenizer", processor)
    return getattr(processor, "chat_template", None) or tokenizer.chat_template
