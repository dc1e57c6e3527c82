"""Prompts to inputs: padding, batches, templates, and folders that lack something."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem_adamms.errors import FormatError, PromptError, RecipeError
from lowmem_adamms.live import prompt_encoder
from lowmem_adamms.live.processor import load_processor
from lowmem_adamms.live.prompt_encoder import Encoder
from lowmem_adamms.prompts import Prompt, open_image

if TYPE_CHECKING:
    from conftest import Talkers


class Stub:
    """Of a model, what an encoder looks at."""

    device = torch.device("cpu")
    dtype = torch.bfloat16


@pytest.fixture
def copied(talking: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Gives a family's folder to change, without its weights."""

    def copy(family: str) -> Path:
        ignored = shutil.ignore_patterns("*.safetensors")
        return Path(shutil.copytree(talking[family], tmp_path / family, ignore=ignored))

    return copy


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    document = {**json.loads(path.read_text(encoding="utf-8")), **values}
    kept = {key: value for key, value in document.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


def take_template(folder: Path) -> str:
    """Remove a folder's chat template, wherever it is."""
    (found,) = folder.glob("chat_template.*")
    text = found.read_text(encoding="utf-8")
    found.unlink()
    return str(json.loads(text)["chat_template"]) if found.suffix == ".json" else text


@pytest.mark.parametrize("family", ["qwen2_vl", "cogvlm"])
def test_pixels_are_in_the_models_dtype_and_ids_stay_whole_numbers(
    talker: Talkers, images: tuple[Path, ...], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = talker(family)
    encoder = Encoder(live.model, live.plan.base.path, trust_remote_code=True)
    monkeypatch.setattr(type(live.model), "dtype", torch.bfloat16)
    inputs = encoder.encode([Prompt("?", images[:1])])
    found = [inputs.get("pixel_values"), inputs.get("images")]
    (pixels,) = (value for value in found if value is not None)
    while isinstance(pixels, list):
        (pixels,) = pixels
    assert pixels.dtype == torch.bfloat16
    assert inputs["input_ids"].dtype == inputs["attention_mask"].dtype == torch.int64


# Batches


@given(lengths=st.lists(st.integers(0, 12), max_size=15), size=st.integers(1, 6))
def test_batches_hold_every_prompt_once_the_longest_first_equals_in_order(
    talking: dict[str, Path], lengths: list[int], size: int
) -> None:
    encoder = _encoders.setdefault("llava", Encoder(Stub(), talking["llava"]))
    prompts = [Prompt("9" * length) for length in lengths]
    batches = encoder.split_into_batches(prompts, size)
    order = [place for batch in batches for place in batch.places]
    assert order == sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    assert all(len(batch.places) == size for batch in batches[:-1])
    for batch in batches:
        found = encoder.encode([prompts[place] for place in batch.places])
        assert found["input_ids"].shape == (len(batch.places), batch.longest_tokens)


_encoders: dict[str, Encoder] = {}


@pytest.mark.parametrize(("batches", "openings"), [(0, [4, 4, 4]), (1, [4, 2, 2]), (2, [4, 0, 0])])
def test_encoded_batches_are_kept_as_far_as_memory_allows(
    talking: dict[str, Path],
    images: tuple[Path, ...],
    monkeypatch: pytest.MonkeyPatch,
    batches: int,
    openings: list[int],
) -> None:
    prompts = [Prompt("What is it?", images[:1], f"set:{place}") for place in range(4)]
    size = prompt_encoder.tensor_bytes(Encoder(Stub(), talking["llava"]).encode(prompts[:2]))
    monkeypatch.setattr(prompt_encoder, "KEPT_BYTES", batches * size + 1)
    encoder = Encoder(Stub(), talking["llava"])
    # Finding the batches, prompt by prompt, must not use the room up
    assert [batch.places for batch in encoder.split_into_batches(prompts, 2)] == [(0, 1), (2, 3)]
    opened: list[Any] = []

    def open_and_note(image: Any) -> Any:
        opened.append(image)
        return open_image(image)

    monkeypatch.setattr(prompt_encoder, "open_image", open_and_note)
    for count in openings:
        opened.clear()
        encoder.encode(prompts[:2])
        encoder.encode(prompts[2:])
        assert len(opened) == count


# Templates


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_chat_template_counts_wherever_a_folder_keeps_it(
    copied: Callable[[str], Path], images: tuple[Path, ...], family: str
) -> None:
    folder = copied(family)
    prompt = Prompt("What is it?", images[:1])
    expected = Encoder(Stub(), folder).encode([prompt])["input_ids"].tolist()
    template = take_template(folder)
    for name, content in (
        ("chat_template.jinja", template),
        ("chat_template.json", json.dumps({"chat_template": template})),
    ):
        (folder / name).write_text(content, encoding="utf-8")
        assert Encoder(Stub(), folder).encode([prompt])["input_ids"].tolist() == expected
        take_template(folder)
    change(folder / "tokenizer_config.json", chat_template=template)
    assert Encoder(Stub(), folder).encode([prompt])["input_ids"].tolist() == expected


def test_without_a_template_images_stand_before_the_text(
    copied: Callable[[str], Path], images: tuple[Path, ...]
) -> None:
    folder = copied("llava")
    take_template(folder)
    encoder = Encoder(Stub(), folder)
    ids = encoder.encode([Prompt("What is it?", images[:2])])["input_ids"]
    patches = "<image>" * 4
    expected = encoder.tokenizer(f"{patches}\n{patches}\nWhat is it?").input_ids
    assert ids.tolist() == [expected]
    assert encoder.encode([Prompt("Hm?")])["input_ids"].tolist() == [
        encoder.tokenizer("Hm?").input_ids
    ]


def test_without_a_template_a_text_only_base_gets_the_text_and_its_special_tokens(
    copied: Callable[[str], Path],
) -> None:
    folder = copied("llama")
    change(folder / "tokenizer_config.json", chat_template=None)
    encoder = Encoder(Stub(), folder)
    ids = encoder.encode([Prompt("What is it?")])["input_ids"]
    assert ids.tolist() == [encoder.tokenizer("What is it?").input_ids]


def test_a_start_token_that_the_template_writes_is_not_added_once_more(
    copied: Callable[[str], Path], images: tuple[Path, ...]
) -> None:
    folder = copied("llava")
    start = "<|endoftext|>"
    change(folder / "tokenizer_config.json", bos_token=start, eos_token="<|im_end|>")
    path = folder / "tokenizer.json"
    number = Encoder(Stub(), folder).tokenizer.convert_tokens_to_ids(start)
    one = {"SpecialToken": {"id": start, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    added = {
        "type": "TemplateProcessing",
        "single": [one, text],
        "pair": [one, text, text],
        "special_tokens": {start: {"id": start, "ids": [number], "tokens": [start]}},
    }
    change(path, post_processor=added)
    prompts = [Prompt("What is it?", images[:1]), Prompt("Hm?")]
    plain = Encoder(Stub(), folder)
    assert plain.tokenizer("x").input_ids[0] == number, "the tokenizer must add it for this test"
    expected = plain.encode(prompts)["input_ids"]
    assert int((expected[0] == number).sum()) == 1
    template = take_template(folder)
    (folder / "chat_template.jinja").write_text("{{- bos_token -}}" + template, encoding="utf-8")
    assert Encoder(Stub(), folder).encode(prompts[:1])["input_ids"].tolist() == [
        row.tolist() for row in plain.encode(prompts[:1])["input_ids"]
    ]


# What cannot be encoded


def test_an_image_for_a_text_only_base_is_an_error_that_names_the_prompt(
    talking: dict[str, Path], images: tuple[Path, ...]
) -> None:
    prompts = [Prompt("?", (), "set.jsonl:1"), Prompt("?", images[:1], "set.jsonl:2")]
    encoder = Encoder(Stub(), talking["llama"])
    with pytest.raises(PromptError, match=r"set\.jsonl:2: has an image, but .*llama is text-only"):
        encoder.split_into_batches(prompts, 2)


def test_a_prompt_that_the_models_own_code_refuses_is_an_error_that_names_it(
    talker: Talkers, images: tuple[Path, ...]
) -> None:
    live = talker("cogvlm")
    encoder = Encoder(live.model, live.plan.base.path, trust_remote_code=True)
    prompts = [Prompt("?", images[:1], "set:1"), Prompt("?", images[:2], "set:2")]
    with pytest.raises(PromptError, match=r"set:2.*not more than one image"):
        encoder.split_into_batches(prompts, 8)


def test_an_image_marker_in_the_text_is_an_error_that_names_the_prompt(
    talking: dict[str, Path], images: tuple[Path, ...]
) -> None:
    prompts = [Prompt("What is <image>?", images[:1], "set:9")]
    with pytest.raises(PromptError, match="set:9") as caught:
        Encoder(Stub(), talking["llava_next"]).split_into_batches(prompts, 1)
    assert "\n" not in str(caught.value)


# Folders


@pytest.mark.parametrize(
    ("family", "kind"), [("qwen2_vl", ImportError), ("llava_onevision", ValueError)]
)
def test_a_processor_needs_torchvision_for_videos_alone(
    talking: dict[str, Path],
    images: tuple[Path, ...],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    kind: type[Exception],
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise kind("requires the Torchvision library but it was not")

    auto = importlib.import_module("transformers").AutoProcessor
    monkeypatch.setattr(auto, "from_pretrained", refuse)
    encoder = Encoder(Stub(), talking[family])
    assert encoder.processor.video_processor.fps is None
    inputs = encoder.encode([Prompt("?", images[:1])])
    marker = encoder.processor.image_token_id
    assert int((inputs["input_ids"] == marker).sum()) > 0
    assert "pixel_values" in inputs


def test_another_library_that_is_missing_is_not_passed_over(
    talking: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("this processor needs sentencepiece")

    auto = importlib.import_module("transformers").AutoProcessor
    monkeypatch.setattr(auto, "from_pretrained", refuse)
    with pytest.raises(RecipeError, match="not installed: this processor needs sentencepiece"):
        load_processor(talking["llava"])


@pytest.mark.parametrize(
    ("family", "pattern", "content"),
    [
        *((family, "tokenizer*", None) for family in ("qwen2_vl", "llama", "cogvlm")),
        ("llava", "preprocessor_config.json", "{"),
        ("llava", "tokenizer.json", "{"),
        ("llama", "tokenizer_config.json", "{"),
    ],
)
def test_a_file_that_is_broken_or_lacks_is_refused_in_one_line(
    copied: Callable[[str], Path], family: str, pattern: str, content: str | None
) -> None:
    folder = copied(family)
    for path in folder.glob(pattern):
        if content is None:
            path.unlink()
        else:
            path.write_text(content, encoding="utf-8")
    with pytest.raises(FormatError, match=str(folder)) as caught:
        load_processor(folder, trust_remote_code=True)
    assert "\n" not in str(caught.value)


def test_without_a_pad_token_the_end_token_pads(copied: Callable[[str], Path]) -> None:
    folder = copied("llava")
    change(folder / "tokenizer_config.json", pad_token=None)
    encoder = Encoder(Stub(), folder)
    assert encoder.tokenizer.pad_token == encoder.tokenizer.eos_token
    assert encoder.encode([Prompt("?"), Prompt("Which?")])["attention_mask"].tolist()[0][0] == 0


def test_special_tokens_are_no_part_of_an_answers_text(talking: dict[str, Path]) -> None:
    encoder = Encoder(Stub(), talking["llava"])
    ids = encoder.tokenizer(" a b <|im_end|>").input_ids
    assert encoder.decode(ids) == "a b"
    assert encoder.decode([], ("<think>", "</think>")) == ""


def test_tags_of_reasoning_stay_also_where_they_are_special_tokens(
    talking: dict[str, Path],
) -> None:
    encoder = Encoder(Stub(), talking["llava"])
    ids = encoder.tokenizer("<|im_start|>a<|im_end|> b<|endoftext|>").input_ids
    tags = ("<|im_start|>", "<|im_end|>")
    assert encoder.decode(ids, tags) == "<|im_start|>a<|im_end|> b"
    assert encoder.decode(ids, ("<think>", "</think>")) == "a b"


def test_an_answer_begins_with_the_tag_that_the_template_has_written(
    copied: Callable[[str], Path],
) -> None:
    folder = copied("llava")
    template = take_template(folder)
    (folder / "chat_template.jinja").write_text(template + "<think>\n", encoding="utf-8")
    encoder = Encoder(Stub(), folder)
    ids = encoder.tokenizer("a b").input_ids
    assert encoder.read_answer(Prompt("?"), ids, ("<think>", "</think>")) == "<think>\na b"
    assert encoder.read_answer(Prompt("?"), ids, ("[T]", "[/T]")) == "a b"
    assert encoder.read_answer(Prompt("?"), ids, None) == "a b"
