"""Bases that answer, and what transformers itself answers, for the tests of answering.

`Talker` is a loaded tiny pair in float32 on the CPU; `reference` asks transformers' own greedy
search, one prompt at a time, with inputs that its own chat templates made.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from random_pair import SHARED_TOKENS

from lowmem_adamms import LiveModel, make_plan
from lowmem_adamms.answers import Answer
from lowmem_adamms.live.processor import load_processor
from lowmem_adamms.live.transformers_model import quiet
from lowmem_adamms.prompts import Prompt, open_image

DONORS = {
    "qwen2_vl": "llava_onevision",
    "qwen2_5_vl": "llava_onevision",
    "qwen3_vl": "qwen3",
    "llava": "llava_next",
    "llava_next": "llava",
    "llava_onevision": "qwen2_vl",
    "qwen2": "qwen2_5_vl",
    "llama": "llava",
    "cogvlm": "llava",
    "mplug_owl2": "cogvlm",
    "idefics3": "llava",
}
"""A donor of the same line for every base."""
TEXT_ONLY = ("qwen2", "llama", "mistral")
REMOTE = ("cogvlm", "mplug_owl2")
TEXTS = (
    "Is the door open?",
    "Describe this image in detail. A woman with an umbrella walks along the street at night.",
    "Read the text on the sign.",
    "What color is the car?",
    "Hm?",
    "How many people are there? Count those behind the fence as well.",
)
NEW = 10
"""Tokens of an answer, at most: some end by themselves, some do not."""


def draw_images(folder: Path) -> tuple[Path, ...]:
    """Two images of noise and a plain one, of different sizes, as files."""
    from PIL import Image

    random = torch.Generator().manual_seed(0)
    for place, (height, width) in enumerate(((28, 28), (56, 40))):
        raw = torch.randint(0, 256, (height, width, 3), generator=random, dtype=torch.uint8)
        image = Image.frombytes("RGB", (width, height), bytes(raw.flatten().tolist()))
        image.save(folder / f"{place}.png")
    Image.new("RGB", (40, 40), "red").save(folder / "2.png")
    return tuple(folder / f"{place}.png" for place in range(3))


def ask(family: str, images: Sequence[Path]) -> tuple[Prompt, ...]:
    """Prompts of mixed length with one image, none and two, as far as the family allows."""
    a, b, c = images
    shown: tuple[tuple[Path, ...], ...] = ((a,), (b,), (), (a, c), (c,), (b, a))
    if family in TEXT_ONLY:
        shown = ((),) * len(TEXTS)
    elif family == "cogvlm":
        shown = tuple(row[:1] for row in shown)
    return tuple(
        Prompt(text, row, f"set:{place + 1}")
        for place, (text, row) in enumerate(zip(TEXTS, shown, strict=True))
    )


def complete(folder: Path, out: Path) -> Path:
    """A copy of a tiny checkpoint with all that it needs to answer."""
    shutil.copytree(folder, out)
    tiny.add_processor(out)
    if out.name in ("llama", "qwen2", "mistral"):
        start = tiny.KINDS[out.name].tokens - len(SHARED_TOKENS)
        ends = {"bos_token_id": start, "eos_token_id": [start, start + len(SHARED_TOKENS) - 1]}
        (out / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    return tiny.add_remote_code(out) if out.name in REMOTE else out


def load(base: Path, donor: Path, dtype: str = "fp32") -> LiveModel:
    """The pair's live model on the CPU."""
    return LiveModel(make_plan(base, donor), device="cpu", dtype=dtype, trust_remote_code=True)


@functools.cache
def processor_of(folder: Path) -> Any:
    """A folder's processor or tokenizer, which takes long to load."""
    return load_processor(folder, trust_remote_code=True)


def reference(live: LiveModel, prompts: Sequence[Prompt], new: int = NEW) -> list[list[int]]:
    """The tokens of transformers' own greedy answers, end token included."""
    return [list(answer.tokens) for answer in reference_answers(live, prompts, new)]


def reference_answers(live: LiveModel, prompts: Sequence[Prompt], new: int = NEW) -> list[Answer]:
    """Transformers' own greedy answers without their texts, and how sure the model was of them."""
    folder, model = live.plan.base.path, live.model
    processor = processor_of(folder)
    answers = []
    for prompt in prompts:
        with quiet(), torch.inference_mode():
            inputs = inputs_of(model, processor, prompt)
            made = model.generate(
                **inputs,
                do_sample=False,
                repetition_penalty=1.0,
                max_new_tokens=new,
                return_dict_in_generate=True,
                output_logits=True,
            )
        tokens = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logs = torch.cat(made.logits).double().log_softmax(-1)
        chosen = logs[range(len(tokens)), tokens]
        entropies = torch.special.entr(logs.exp()).sum(-1)
        answers.append(Answer("", tuple(tokens), chosen.mean().item(), entropies.mean().item()))
    return answers


def take_confidences(document: dict[str, Any]) -> list[float]:
    """Remove from a search's document what another order of sums changes a little; returns it."""
    names = ("entropy", "log_probability")
    return [candidate.pop(name) for candidate in document["candidates"] for name in names]


def inputs_of(model: Any, processor: Any, prompt: Prompt) -> dict[str, Any]:
    """One prompt as transformers itself encodes it."""
    images = [open_image(image) for image in prompt.images]
    if hasattr(model, "build_conversation_input_ids"):
        row = model.build_conversation_input_ids(processor, query=prompt.text, images=images)
        out = {name: value[None] for name, value in row.items() if name != "images"}
        return out | ({"images": [row["images"]]} if images else {})
    if not hasattr(processor, "image_processor"):
        template, text = processor.chat_template, prompt.text
        if template:
            messages = [{"role": "user", "content": text}]
            text = processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        return dict(processor(text, return_tensors="pt", add_special_tokens=not template))
    content = [{"type": "image", "image": image} for image in images]
    return dict(
        processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": prompt.text}]}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
    )


@contextlib.contextmanager
def counted(module: Any) -> Iterator[list[int]]:
    """A list that grows by one at each forward pass of a module inside the block."""
    calls: list[int] = []
    hook = module.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        hook.remove()


def eye(model: Any) -> Any:
    """A module that every forward pass of the vision tower runs once, the first one in it."""
    names = ("visual", "vision_tower", "vision", "vision_model")
    tower = next(getattr(model.model, name) for name in names if hasattr(model.model, name))
    return next(module for module in tower.modules() if type(module).__name__[:4] == "Conv")
