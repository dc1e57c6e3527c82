"""The tiny CogVLM and mPLUG-Owl2 run on code of ours.

What the search is tested with must itself be sound: only images use the weights for images, and a
cache gives the logits of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import talk
import torch

from lowmem_adamms.live.transformers_model import quiet
from lowmem_adamms.prompts import Prompt

REMOTE = ("cogvlm", "mplug_owl2")
TEXT = "What color is the car?"


def transformers() -> Any:
    import transformers

    return transformers


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model through its auto class, which must miss nothing and leave nothing over."""
    with quiet():
        model, report = transformers().AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=True, output_loading_info=True
        )
    assert not any(report.values()), report
    return model.eval()


@pytest.fixture(scope="module", params=REMOTE)
def folder(request: pytest.FixtureRequest, talking: dict[str, Path]) -> Path:
    return talking[request.param]


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder)


@pytest.fixture(scope="module")
def encode(
    folder: Path, model: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """Makes the inputs of a question, with an image or without."""
    image, *_ = talk.draw_images(tmp_path_factory.mktemp("pictures"))

    def encode(*, with_image: bool) -> dict[str, Any]:
        prompt = Prompt(TEXT, (image,) if with_image else (), "set:1")
        return talk.inputs_of(model, talk.processor_of(folder), prompt)

    return encode


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(**inputs).logits
    return out


IMAGE_PARTS = {
    "cogvlm": ("vision_expert_query_key_value", "vision_mlp", "boi", "linear_proj"),
    "mplug_owl2": ("k_proj.multiway.1", "input_layernorm.multiway.1", "query_embeds"),
}


def test_only_images_use_the_weights_for_images(
    folder: Path, model: Any, encode: Callable[..., dict[str, Any]]
) -> None:
    with_image, without = encode(with_image=True), encode(with_image=False)
    expected = logits(model, with_image), logits(model, without)
    changed = load(folder)
    for part in IMAGE_PARTS[folder.name]:
        weights = {n: w.data.clone() for n, w in changed.named_parameters() if part in n}
        assert weights, part
        for name in weights:
            changed.get_parameter(name).data.zero_()
        assert not torch.allclose(logits(changed, with_image), expected[0], atol=1e-3), part
        assert torch.equal(logits(changed, without), expected[1]), part
        for name, weight in weights.items():
            changed.get_parameter(name).data.copy_(weight)


def test_cached_chunks_give_the_logits_of_the_whole(
    model: Any, encode: Callable[..., dict[str, Any]]
) -> None:
    """A prompt, then three tokens at once after the cache, then again after cutting it back."""
    prompt = encode(with_image=True)
    start, more = prompt["input_ids"].shape[1], torch.tensor([[40, 41, 42]])
    whole = {**prompt, "input_ids": torch.cat((prompt["input_ids"], more), dim=1)}
    for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
        if name in whole:
            whole[name] = torch.cat((whole[name], torch.full_like(more, value)), dim=1)
    prepare = model.prepare_inputs_for_generation
    expected = logits(model, prepare(**whole, use_cache=False))[:, start:]
    cache = transformers().DynamicCache(config=model.config)
    options = {"past_key_values": cache, "use_cache": True}
    logits(model, prepare(**prompt, **options, is_first_iteration=True))
    for _ in range(2):
        rest = prepare(**whole, **options, next_sequence_length=3)
        assert rest["input_ids"].shape[1] == 3
        assert rest["images"] is None
        torch.testing.assert_close(logits(model, rest), expected, atol=1e-4, rtol=1e-4)
        cache.crop(-3)
