"""InternVL-hf, Idefics3 and SmolVLM, live: what they hold, what they answer, what they remember.

The expectation is transformers' own: the folder that `merge` writes, loaded, and its greedy search.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import talk
import tiny
import torch
from test_answerer import VARIANTS, patched, tokens_of
from tiny import raw

from lowmem_adamms import LiveModel, make_plan, merge
from lowmem_adamms.errors import RecipeError
from lowmem_adamms.live import transformers_model as loading
from lowmem_adamms.live.answerer import Answerer
from lowmem_adamms.live.prompt_encoder import load_processor
from lowmem_adamms.prompts import Prompt

pytestmark = pytest.mark.usefixtures("one_thread", "speaking")

DONORS = {"internvl": "llava_onevision", "idefics3": "llava", "smolvlm": "cogvlm"}
LINES = {"internvl": "qwen2", "idefics3": "llama", "smolvlm": "llama"}
Contents = dict[str, tuple[torch.dtype, bytes]]


@pytest.fixture(scope="module")
def speaking() -> Iterator[None]:
    """SmolVLM's processor needs num2words, for videos alone; its absence is another test."""
    module = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "num2words", str)
        yield


@pytest.fixture(scope="module")
def bases(
    tmp_path_factory: pytest.TempPathFactory, ancestors: dict[str, tiny.Tensors]
) -> dict[str, Path]:
    """Each family with tokenizer and processor, in bfloat16. Read only."""
    made = tiny.make_all(tmp_path_factory.mktemp("bases"), LINES, ancestors)
    for folder in made.values():
        tiny.add_processor(folder)
    return made


def contents(model: torch.nn.Module) -> Contents:
    """Every parameter and buffer."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (tensor.dtype, raw(tensor)) for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", DONORS)
def test_after_any_applies_it_is_the_written_checkpoint(
    family: str, bases: dict[str, Path], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    plan = make_plan(bases[family], tiny_models[DONORS[family]])
    assert sum(step.action == "interpolate" for step in plan.steps) >= 2 * 9
    folder = merge(plan, 0.3, tmp_path / "out")
    config = json.loads((folder / "config.json").read_bytes())
    loader = getattr(importlib.import_module("transformers"), config["architectures"][0])
    with loading.quiet():
        expected = contents(loader.from_pretrained(folder, dtype="auto").eval())
    with LiveModel(plan, device="cpu") as live:
        live.apply(1.0)
        assert contents(live.model) != expected
        live.apply(0.3)
        assert contents(live.model) == expected


@pytest.mark.parametrize("family", DONORS)
def test_answers_are_those_of_transformers_and_images_are_seen_once(
    family: str, bases: dict[str, Path], tiny_models: dict[str, Path], images: tuple[Path, ...]
) -> None:
    prompts = talk.ask(family, images)
    with talk.load(bases[family], tiny_models[DONORS[family]]) as live:
        names = ("everything, by threes", "nothing")
        answerers = {name: Answerer(live, VARIANTS[name]) for name in names}
        seen: dict[float, list[list[int]]] = {}
        looks: list[int] = []
        for alpha in (0.0, 0.3, 0.6):
            live.apply(alpha)
            seen[alpha] = talk.reference(live, prompts)
            for name, answerer in answerers.items():
                with talk.counted(talk.eye(live.model)) as calls:
                    assert tokens_of(answerer, prompts) == seen[alpha], (name, alpha)
                if name != "nothing":
                    looks.append(len(calls))
        assert looks[0] > 0
        assert looks[1:] == [0, 0]
        assert patched(live.model) == []
    flat = {tuple(answer) for answers in seen.values() for answer in answers}
    assert len(flat) >= 6, "too few different answers to show anything"


def test_images_matter(
    bases: dict[str, Path], tiny_models: dict[str, Path], images: tuple[Path, ...]
) -> None:
    """The same question about another image reaches the decoder as something else."""
    for family, donor in DONORS.items():
        with talk.load(bases[family], tiny_models[donor]) as live:
            processor = load_processor(bases[family])
            logits = []
            for image in images[:2]:
                prompt = Prompt("Is the door open?", (image,))
                inputs = talk.inputs_of(live.model, processor, prompt)
                with torch.inference_mode():
                    logits.append(live.model(**inputs).logits[0, -1])
            assert not torch.equal(*logits), family


def test_what_a_processor_needs_is_named_in_one_line(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
    monkeypatch.setattr(module, "num2words", None)
    with pytest.raises(RecipeError, match=r"needs what is not installed: .*num2words"):
        load_processor(bases["smolvlm"])
