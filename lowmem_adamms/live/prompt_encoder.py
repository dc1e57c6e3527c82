"""Prompts to model inputs: the base's own processor and chat template, in batches by length.

A base takes prompts through its processor, through its tokenizer if it is text-only, or, like
CogVLM, through a method of its remote code. Which one is found out by what the base has, not by its
name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import PromptError, first_line
from ..prompts import Prompt, open_image, open_sound
from ..values import Tags
from .processor import check_takes_files, load_processor, write_text
from .transformers_model import quiet

KEPT_BYTES = 256 << 20
"""Bytes of encoded batches kept for the next alpha; those beyond are encoded again."""
Inputs = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts that are answered together: their places in the set, and the longest's tokens."""

    places: tuple[int, ...]
    longest_tokens: int


class Encoder:
    """Encodes prompts for one loaded model, and remembers what it encoded.

    model: a transformers module. folder: its checkpoint, with tokenizer and processor files.
    processor: of `load_processor` for the folder, if it was loaded before.
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
            self._encode = self._encode_by_model
        elif any(
            hasattr(self.processor, part) for part in ("image_processor", "feature_extractor")
        ):
            self._encode = self._encode_by_processor
        else:
            self._encode = self._encode_by_tokenizer
        self._kept: dict[tuple[Prompt, ...], Inputs] = {}
        self._free_bytes = KEPT_BYTES
        self._token_counts: dict[Prompt, int] = {}

    def split_into_batches(self, prompts: Sequence[Prompt], size: int) -> tuple[Batch, ...]:
        """Batches of at most `size` prompts of similar length, the longest first.

        Raises PromptError for a prompt that the model's own code does not take.
        """
        counts = [self._count_tokens(prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda place: (-counts[place], place))
        return tuple(
            Batch(tuple(order[start : start + size]), counts[order[start]])
            for start in range(0, len(order), size)
        )

    def _count_tokens(self, prompt: Prompt) -> int:
        """Tokens of one prompt. Its encoding is not kept: it is needed in its batch, padded."""
        if prompt not in self._token_counts:
            try:
                with quiet():
                    ids = self._encode([prompt])["input_ids"]
            except (ValueError, IndexError, KeyError, TypeError) as error:
                raise PromptError(
                    f"{prompt.id or prompt.text[:40]!r}: {self._folder} does not take it"
                    f" ({first_line(error)})"
                ) from None
            self._token_counts[prompt] = int(ids.shape[1])
        return self._token_counts[prompt]

    def encode(self, prompts: Sequence[Prompt]) -> Inputs:
        """Model inputs for prompts, padded on the left; floats in the model's dtype and device."""
        key = tuple(prompts)
        if key in self._kept:
            return self._kept[key]
        with quiet():
            encoded = self._encode(prompts)
        inputs: Inputs = _move(encoded, self._model.device, self._model.dtype)
        if "attention_mask" not in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        nbytes = tensor_bytes(inputs)
        if nbytes <= self._free_bytes:
            self._kept[key] = inputs
            self._free_bytes -= nbytes
        return inputs

    def read_answer(self, prompt: Prompt, tokens: Sequence[int], tags: Tags | None) -> str:
        """The text of an answer, with the tag that opens its reasoning.

        Some chat templates write that tag themselves, so that it is none of the answer's tokens.
        """
        text = self.decode(tokens, tags)
        if tags and write_text(self.processor, prompt, self._folder).rstrip().endswith(tags[0]):
            text = f"{tags[0]}\n{text}"
        return text

    def decode(self, tokens: Sequence[int], tags: Tags | None = None) -> str:
        """The text of tokens, without special ones other than these tags."""
        special = set(self.tokenizer.all_special_ids)
        kept = special.intersection(map(self.tokenizer.convert_tokens_to_ids, tags or ()))
        if kept:
            tokens = [token for token in tokens if token in kept or token not in special]
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=not kept)
        return text.strip()

    def _encode_by_processor(self, prompts: Sequence[Prompt]) -> Inputs:
        """The usual way: a processor with a chat template, or its image token before the text."""
        texts = [write_text(self.processor, prompt, self._folder) for prompt in prompts]
        images = [[open_image(image) for image in prompt.images] for prompt in prompts]
        options: dict[str, Any] = {"text": texts, "padding": True, "return_tensors": "pt"}
        start_token = self.tokenizer.bos_token
        if start_token and texts[0].startswith(start_token):
            options["add_special_tokens"] = False  # the chat template has written it already
        if any(prompt.audio for prompt in prompts):
            rate = self.processor.feature_extractor.sampling_rate
            options["sampling_rate"] = rate
            options["audio"] = [open_sound(it, rate) for prompt in prompts for it in prompt.audio]
        # A list for each prompt: some families ask for it, the others flatten it
        with_images = [row for row in images if row]
        if not with_images:
            return dict(self.processor(**options))
        try:
            return dict(self.processor(images=with_images, **options))
        except ValueError:
            if len(with_images) == len(images):
                raise
            # Idefics3 counts by prompt: it wants an empty list for one without an image
            return dict(self.processor(images=images, **options))

    def _encode_by_tokenizer(self, prompts: Sequence[Prompt]) -> Inputs:
        check_takes_files(self.processor, prompts, self._folder)
        return dict(
            self.tokenizer(
                [write_text(self.processor, prompt, self._folder) for prompt in prompts],
                padding=True,
                return_tensors="pt",
                add_special_tokens=not self.tokenizer.chat_template,  # which writes its own
            )
        )

    def _encode_by_model(self, prompts: Sequence[Prompt]) -> Inputs:
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
        fillers = {
            "input_ids": self.tokenizer.pad_token_id or 0,
            "token_type_ids": 0,
            "attention_mask": 0,
        }
        inputs: Inputs = {
            name: _pad_left([row[name] for row in rows], filler) for name, filler in fillers.items()
        }
        if any(row.get("images") for row in rows):
            inputs["images"] = [row.get("images") or [] for row in rows]
        return inputs


def _pad_left(rows: Sequence[torch.Tensor], filler: int) -> torch.Tensor:
    width = max(map(len, rows))
    pad = torch.nn.functional.pad
    return torch.stack([pad(row, (width - len(row), 0), value=filler) for row in rows])


def _move(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Tensors on the device, floats in the dtype, through lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {name: _move(item, device, dtype) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_move(item, device, dtype) for item in value]
    return value


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in it."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0
