"""Prompts to model inputs: the base's own processor and chat template, in batches by length.

A base speaks through its processor, through its tokenizer if it is text-only, or, like CogVLM,
through a method of its remote code. Which one is found out by what the base has, not by its name.
Leaves to others: reading prompt sets (`prompts/`), generating (`generate.py`).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import FormatError, PromptError, RecipeError, first_line
from ..prompts import Prompt, open_image
from .transformers_model import quiet, refuse_remote_code

KEEP = 256 << 20
"""Bytes of encoded batches held for the next alpha; those beyond are encoded again."""
FEWEST = 64
"""Tokens that any vocabulary has: transformers makes up a smaller one where there is no file."""
Inputs = dict[str, Any]

_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_TOKENIZER_FILES = "tokenizer_config.json and tokenizer.json or tokenizer.model"


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts that are answered together: their places in the set, and their longest length."""

    places: tuple[int, ...]
    length: int


class Encoder:
    """Encodes prompts for one loaded model.

    model: a transformers module. folder: its checkpoint, with tokenizer and processor files.
    processor: what `load_processor` gave for the folder, if it was read before.
    """

    def __init__(
        self,
        model: Any,
        folder: Path,
        *,
        processor: Any = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.processor = processor or load_processor(folder, trust_remote_code=trust_remote_code)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        self._model = model
        self._folder = folder
        self._encode: Callable[[Sequence[Prompt]], Inputs]
        if hasattr(model, "build_conversation_input_ids"):
            self._encode = self._by_conversation
        elif hasattr(self.processor, "image_processor"):
            self._encode = self._by_processor
        else:
            self._encode = self._by_tokenizer
        self._kept: dict[tuple[Prompt, ...], Inputs] = {}
        self._lengths: dict[Prompt, int] = {}
        self._room = KEEP

    def batches(self, prompts: Sequence[Prompt], size: int) -> tuple[Batch, ...]:
        """All prompts in batches of at most `size`, the longest first, alike in length.

        PromptError for a prompt that the model's own code does not take.
        """
        lengths = [self._length(prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda place: (-lengths[place], place))
        return tuple(
            Batch(tuple(places), lengths[places[0]])
            for places in (order[i : i + size] for i in range(0, len(order), size))
        )

    def __call__(self, prompts: Sequence[Prompt]) -> Inputs:
        """Model inputs for prompts, padded on the left; floats in the model's dtype and device."""
        key = tuple(prompts)
        if key in self._kept:
            return self._kept[key]
        with quiet():
            encoded = self._encode(prompts)
        inputs: Inputs = _moved(encoded, self._model.device, self._model.dtype)
        if "attention_mask" not in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if (size := size_of(inputs)) <= self._room:
            self._kept[key] = inputs
            self._room -= size
        return inputs

    def _length(self, prompt: Prompt) -> int:
        """Tokens of one prompt; the encoding is not kept, as it is answered beside others."""
        if prompt in self._lengths:
            return self._lengths[prompt]
        try:
            with quiet():
                ids = self._encode([prompt])["input_ids"]
        except (ValueError, IndexError, KeyError, TypeError) as error:
            reason = first_line(error)
            raise PromptError(
                f"{prompt.id or prompt.text[:40]!r}: {self._folder} does not take it ({reason})"
            ) from None
        self._lengths[prompt] = int(ids.shape[1])
        return self._lengths[prompt]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer's tokens, special ones left out."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text.strip()

    def _by_processor(self, prompts: Sequence[Prompt]) -> Inputs:
        """The usual way: a processor with a chat template, or its image token before the text."""
        images = [[open_image(image) for image in prompt.images] for prompt in prompts]
        text = [self._text(prompt) for prompt in prompts]
        # Nested by prompt: some families ask for it, the others flatten it.
        given = [row for row in images if row] or None
        first = self.tokenizer.bos_token
        options = {"padding": True, "return_tensors": "pt"}
        if first and text[0].startswith(first):
            options["add_special_tokens"] = False  # the chat template has written it already
        try:
            return dict(self.processor(text=text, images=given, **options))
        except ValueError:
            if given is None or len(given) == len(images):
                raise
            # Idefics3 counts by prompt: it wants an empty row for one without an image
            return dict(self.processor(text=text, images=images, **options))

    def _text(self, prompt: Prompt) -> str:
        template = getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template
        if not template:
            marker = getattr(self.processor, "image_token", "")
            return "".join(f"{marker}\n" for _ in prompt.images) + prompt.text
        content: Any = prompt.text
        if hasattr(self.processor, "image_processor"):
            content = [{"type": "image"} for _ in prompt.images]
            content.append({"type": "text", "text": prompt.text})
        try:
            text: str = self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=template,  # a processor does not look for its tokenizer's
                tokenize=False,
                add_generation_prompt=True,
            )
        except importlib.import_module("jinja2").TemplateError as error:
            raise FormatError(f"{self._folder}: its chat template fails: {error}") from None
        return text

    def _by_tokenizer(self, prompts: Sequence[Prompt]) -> Inputs:
        for prompt in prompts:
            if prompt.images:
                raise PromptError(
                    f"{prompt.id}: has an image, but {self._folder} is text-only"
                    " (there is no preprocessor_config.json in it)"
                )
        # A chat template brings its own special tokens.
        return dict(
            self.tokenizer(
                [self._text(prompt) for prompt in prompts],
                padding=True,
                return_tensors="pt",
                add_special_tokens=not self.tokenizer.chat_template,
            )
        )

    def _by_conversation(self, prompts: Sequence[Prompt]) -> Inputs:
        """CogVLM's way: a method of the model encodes one prompt; rows are padded here."""
        rows: list[Inputs] = [
            self._model.build_conversation_input_ids(
                self.tokenizer,
                query=prompt.text,
                history=[],
                images=[open_image(image) for image in prompt.images],
            )
            for prompt in prompts
        ]
        width = max(len(row["input_ids"]) for row in rows)
        pad = {"input_ids": self.tokenizer.pad_token_id or 0}
        inputs: Inputs = {}
        for name in ("input_ids", "token_type_ids", "attention_mask"):
            columns = [row[name] for row in rows]
            inputs[name] = torch.stack(
                [
                    torch.nn.functional.pad(
                        column, (width - len(column), 0), value=pad.get(name, 0)
                    )
                    for column in columns
                ]
            )
        if any(row.get("images") for row in rows):
            inputs["images"] = [row.get("images") or [] for row in rows]
        return inputs


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The processor of a checkpoint, or its tokenizer where it has no processor.

    Some families' processors are refused where torchvision is missing, only because of videos:
    those are put together without that part. FormatError if there is neither, or if what is there
    cannot be read; RecipeError if it is code that was not allowed.
    """
    refuse_remote_code(folder, trust_remote_code)
    found = _load_processor(folder, trust_remote_code)
    if len(getattr(found, "tokenizer", found)) < FEWEST:
        raise FormatError(f"{folder}: no tokenizer in it; copy {_TOKENIZER_FILES} there")
    return found


def _load_processor(folder: Path, trust_remote_code: bool) -> Any:
    transformers = importlib.import_module("transformers")
    options = {"trust_remote_code": trust_remote_code}
    with quiet():
        try:
            return transformers.AutoProcessor.from_pretrained(folder, **options)
        except (ImportError, OSError, ValueError) as error:
            # Some families say with a ValueError that torchvision is missing
            if isinstance(error, ImportError) or "torchvision" in str(error):
                return _without_video(transformers, folder, options, error)
            reason = first_line(error)
            if any((folder / name).is_file() for name in _PROCESSOR_FILES):
                raise FormatError(f"{folder}: its processor cannot be read ({reason})") from None
            try:
                return transformers.AutoTokenizer.from_pretrained(folder, **options)
            except (OSError, ValueError):
                pass
            raise FormatError(
                f"{folder}: no tokenizer that can be read in it; copy {_TOKENIZER_FILES} there"
            ) from None


def _without_video(
    transformers: Any, folder: Path, options: dict[str, Any], missing: Exception
) -> Any:
    """The checkpoint's processor without its video part, if that is what is missing."""
    try:
        if "torchvision" in str(missing).lower():
            return _put_together(transformers, folder, options)
    except ImportError as error:
        missing = error
    reason = " ".join(str(missing).split())
    raise RecipeError(f"{folder}: its processor needs what is not installed: {reason}")


class _NoVideos:
    """Stands for a video processor: has no settings, and can do nothing."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _put_together(transformers: Any, folder: Path, options: dict[str, Any]) -> Any:
    """The checkpoint's processor from its parts, `_NoVideos` for its video processor."""
    name = _processor_class(folder)
    if name is None:
        raise FormatError(f"{folder}: none of its files names its processor_class")
    family = getattr(transformers, name)

    def check(self: Any, attribute: str, argument: Any) -> Any:
        if argument is None:
            return None
        return family.check_argument_for_proper_class(self, attribute, argument)

    lenient: Any = type(name, (family,), {"check_argument_for_proper_class": check})
    parts = {
        "image_processor": transformers.AutoImageProcessor,
        "tokenizer": transformers.AutoTokenizer,
    }
    arguments = [
        parts[part].from_pretrained(folder, **options) if part in parts else None
        for part in family.get_attributes()
    ]
    settings, _ = family.get_processor_dict(folder)
    made = lenient.from_args_and_dict(arguments, settings)
    for part in set(family.get_attributes()) - set(parts):
        setattr(made, part, _NoVideos())  # SmolVLM asks it for settings, whatever is shown
    return made


def _processor_class(folder: Path) -> str | None:
    for file in (*_PROCESSOR_FILES, "tokenizer_config.json"):
        path = folder / file
        if path.is_file() and (name := json.loads(path.read_bytes()).get("processor_class")):
            return str(name)
    return None


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Tensors on the device, floats in the dtype, through lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {name: _moved(item, device, dtype) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_moved(item, device, dtype) for item in value]
    return value


def size_of(value: Any) -> int:
    """Bytes of all tensors in it."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(size_of, value.values()))
    return sum(map(size_of, value)) if isinstance(value, (list, tuple)) else 0
