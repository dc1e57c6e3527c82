"""Processor of a small mPLUG-Owl2: text with `<|image|>` and images to inputs.

The marker is no token of the vocabulary, which Llama's 32000 fill: as in the original, it becomes
an id that no row has, here once for each feature of the image.
"""

# mypy: allow-subclassing-any
from __future__ import annotations

import importlib
from typing import Any

transformers: Any = importlib.import_module("transformers")


class MPLUGOwl2Processor(transformers.ProcessorMixin):
    """Image processor and tokenizer; `num_image_tokens` is the number of features of an image."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 65,
        image_token: str = "<|image|>",
        image_token_index: int = -200,
        chat_template: str | None = None,
        **_: Any,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.image_token_index = image_token_index
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> Any:
        """`input_ids` and `attention_mask` [batch, length]; `images` [images, 3, side, side].

        ValueError if there are not as many markers as images.
        """
        if videos is not None or audio is not None:
            raise ValueError("only text and images")
        texts = [text] if isinstance(text, str) else list(text or ())
        flat = _flat(images)
        if sum(one.count(self.image_token) for one in texts) != len(flat):
            raise ValueError(f"{len(flat)} images for the {self.image_token} of {texts}")
        tensors = kwargs.pop("return_tensors", None)
        special = kwargs.pop("add_special_tokens", True)
        rows = [self._ids(one, special) for one in texts]
        data = dict(self.tokenizer.pad({"input_ids": rows}, **kwargs))
        if flat:
            data["images"] = self.image_processor(flat)["pixel_values"]
        return transformers.BatchFeature(data, tensor_type=tensors)

    def _ids(self, text: str, special: bool) -> list[int]:
        first, *others = text.split(self.image_token)
        ids: list[int] = self.tokenizer(first, add_special_tokens=special).input_ids
        for other in others:
            ids += [self.image_token_index] * self.num_image_tokens
            ids += self.tokenizer(other, add_special_tokens=False).input_ids
        return ids

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "images"]


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [image for one in images for image in _flat(one)]
    return [images]
