"""The tiny models run: batches with images and left padding, greedy answers, remote code.

What the search is tested with must itself be sound: each folder loads without a tensor missing or
left over, answers the same alone and in a batch, and answers differently to other images and
other questions. CogVLM and mPLUG-Owl2, whose code is ours, must be Llama as long as there is no
image.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

from lowmem_adamms.live.transformers_model import quiet

VISION = {
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "llava_onevision": "qwen2",
    "llava": "llama",
    "llava_next": "llama",
}
REMOTE = ("cogvlm", "mplug_owl2")
ALL = (*VISION, *REMOTE)
QUESTIONS = (
    "What color is the car?",
    "Describe this image in detail. A woman with an umbrella walks along the street at night.",
    "Is the door open?",
    "Read the text on the sign.",
    "How many people are there?",
)
NEW = 12  # tokens of an answer, at most


def pictures() -> list[Image.Image]:
    """Two plain ones and three of noise, of different sizes."""
    random = torch.Generator().manual_seed(0)
    out = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    for height, width in ((28, 28), (56, 40), (30, 80)):
        raw = torch.randint(0, 256, (height, width, 3), generator=random, dtype=torch.uint8)
        out.append(Image.frombytes("RGB", (width, height), bytes(raw.flatten().tolist())))
    return out


PICTURES = pictures()
Question = tuple[str, "Image.Image | None"]
ASKED: list[Question] = [(text, picture) for picture in PICTURES for text in QUESTIONS]


def transformers() -> Any:
    return importlib.import_module("transformers")


def processor_of(folder: Path) -> Any:
    """The folder's processor; where torchvision is missing, without the part for videos."""
    library = transformers()
    try:
        return library.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    except ImportError:
        settings = json.loads((folder / "preprocessor_config.json").read_text())
    family = getattr(library, settings["processor_class"])

    class Lenient(family):  # type: ignore[misc, valid-type]
        """Takes None for a part."""

        def check_argument_for_proper_class(self, name: str, part: Any) -> Any:
            return part and super().check_argument_for_proper_class(name, part)

    parts = {
        "image_processor": library.AutoImageProcessor,
        "tokenizer": library.AutoTokenizer,
    }
    made = [
        parts[n].from_pretrained(folder) if n in parts else None for n in family.get_attributes()
    ]
    return Lenient.from_args_and_dict(made, family.get_processor_dict(folder)[0])


@dataclass(frozen=True, slots=True)
class Ready:
    """A loaded tiny model in float32, with what turns questions into its inputs."""

    folder: Path
    model: Any
    processor: Any
    tokenizer: Any

    def conversation(self, question: Question) -> list[dict[str, Any]]:
        text, picture = question
        shown = [] if picture is None else [{"type": "image", "image": picture}]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]

    def inputs(self, questions: Sequence[Question]) -> dict[str, Any]:
        """A batch, padded on the left."""
        if self.processor is None:
            return self._cogvlm_inputs(questions)
        made = self.processor.apply_chat_template(
            [self.conversation(question) for question in questions],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        return dict(made)

    def _cogvlm_inputs(self, questions: Sequence[Question]) -> dict[str, Any]:
        rows = [
            self.model.build_conversation_input_ids(
                self.tokenizer, query=text, images=None if picture is None else [picture]
            )
            for text, picture in questions
        ]
        names = ("input_ids", "token_type_ids", "attention_mask")
        return {
            **{
                name: torch.nn.utils.rnn.pad_sequence(
                    [row[name] for row in rows], batch_first=True, padding_side="left"
                )
                for name in names
            },
            "images": [row["images"] or [] for row in rows],
        }

    def answers(self, questions: Sequence[Question]) -> list[list[int]]:
        """The new tokens for each question, up to and including the one that ends the answer."""
        inputs = self.inputs(questions)
        with quiet(), torch.inference_mode():
            made = self.model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
        return [self._until_end(row) for row in made[:, inputs["input_ids"].shape[1] :].tolist()]

    def ends(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return {ends} if isinstance(ends, int) else set(ends)

    def _until_end(self, row: list[int]) -> list[int]:
        stop = next((place for place, token in enumerate(row) if token in self.ends()), len(row))
        return row[: stop + 1]

    def logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        with torch.inference_mode():
            out: torch.Tensor = self.model(**inputs).logits
        return out


def make(family: str, folder: Path, ancestors: dict[str, tiny.Tensors]) -> Path:
    tiny.make(family, folder, ancestor=ancestors[VISION.get(family, "llama")])
    tiny.add_processor(folder)
    return tiny.add_remote_code(folder) if family in REMOTE else folder


def load(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The model through its auto class, and transformers' report on what did not fit."""
    auto = "AutoModelForCausalLM" if family in REMOTE else "AutoModelForImageTextToText"
    with quiet():
        model, report = getattr(transformers(), auto).from_pretrained(
            folder, dtype=dtype, trust_remote_code=True, output_loading_info=True
        )
    return model.eval(), report


@pytest.fixture(scope="session")
def made(
    tmp_path_factory: pytest.TempPathFactory, ancestors: dict[str, tiny.Tensors]
) -> dict[str, Ready]:
    """Every family, complete and loaded. Read only."""
    root = tmp_path_factory.mktemp("ready")
    out = {}
    for family in ALL:
        folder = make(family, root / family, ancestors)
        model, report = load(folder, family)
        assert not any(report.values()), (family, report)
        with quiet():
            processor = None if family == "cogvlm" else processor_of(folder)
            tokenizer = transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        out[family] = Ready(folder, model, processor, tokenizer)
    return out


@pytest.mark.parametrize("family", ALL)
def test_answers_in_a_padded_batch_equal_those_alone(made: dict[str, Ready], family: str) -> None:
    """Of questions with and without an image."""
    ready = made[family]
    batch: list[Question] = [*((QUESTIONS[i], PICTURES[i + 1]) for i in range(3))]
    batch.append((QUESTIONS[3], None))
    lengths = ready.inputs(batch)["attention_mask"].sum(-1)
    assert len(set(lengths.tolist())) > 1
    assert ready.answers(batch) == [ready.answers([question])[0] for question in batch]


@pytest.mark.parametrize("family", ALL)
def test_answers_depend_on_image_and_question_and_some_end(
    made: dict[str, Ready], family: str
) -> None:
    ready = made[family]
    answers = dict(zip(range(len(ASKED)), ready.answers(ASKED), strict=True))
    count = len(QUESTIONS)
    for text in range(count):
        assert len({tuple(answers[i]) for i in answers if i % count == text}) >= 3
    for picture in range(len(PICTURES)):
        assert len({tuple(answers[i]) for i in answers if i // count == picture}) >= 3
    ended = [answer for answer in answers.values() if answer[-1] in ready.ends()]
    assert 0 < len(ended) < len(ASKED)


@pytest.mark.parametrize("place", [0, 1])
def test_deepstack_features_reach_the_answer(made: dict[str, Ready], place: int) -> None:
    ready = made["qwen3_vl"]
    inputs = ready.inputs([(QUESTIONS[0], PICTURES[2])])
    changed, _ = load(ready.folder, "qwen3_vl")
    for weight in changed.model.visual.deepstack_merger_list[place].parameters():
        weight.data.zero_()
    with torch.inference_mode():
        assert not torch.allclose(changed(**inputs).logits, ready.logits(inputs), atol=1e-3)


# Remote code


def llama_of(ready: Ready, family: str) -> Any:
    """Transformers' own Llama with the text weights of a CogVLM or mPLUG-Owl2."""
    config = json.loads((ready.folder / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    sizes = {name: config[name] for name in (*names, "num_attention_heads")}
    eps = ready.model.config.rms_norm_eps
    model = transformers().LlamaForCausalLM(
        transformers().LlamaConfig(**sizes, rms_norm_eps=eps, pad_token_id=0)
    )
    spelled = {}
    for name, tensor in tiny.load(ready.folder).items():
        parts = name.replace(".multiway.0", "").replace("mlp.language_mlp", "mlp")
        if "language_expert_query_key_value" in parts:
            for role, rows in zip("qkv", tensor.chunk(3), strict=True):
                stem = parts.replace("language_expert_query_key_value", f"{role}_proj")
                spelled[stem] = rows
        else:
            spelled[parts.replace("language_expert_dense", "o_proj")] = tensor
    wanted = model.state_dict().keys()
    model.load_state_dict({name: spelled[name].float() for name in wanted})
    return model.eval()


@pytest.mark.parametrize("family", REMOTE)
def test_without_an_image_remote_models_are_llama(made: dict[str, Ready], family: str) -> None:
    ready = made[family]
    inputs = ready.inputs([(QUESTIONS[0], None), (QUESTIONS[1], None)])
    known = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    # Llama counts padding in its positions, unless told the real ones
    known["position_ids"] = (known["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        expected = llama_of(ready, family)(**known).logits
    real = known["attention_mask"].bool()
    torch.testing.assert_close(ready.logits(inputs)[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("cogvlm", "vision_expert_query_key_value"),
        ("cogvlm", "vision_expert_dense"),
        ("cogvlm", "vision_mlp"),
        ("cogvlm", "boi"),
        ("cogvlm", "eoi"),
        ("cogvlm", "linear_proj"),
        ("mplug_owl2", "k_proj.multiway.1"),
        ("mplug_owl2", "v_proj.multiway.1"),
        ("mplug_owl2", "input_layernorm.multiway.1"),
        ("mplug_owl2", "post_attention_layernorm.multiway.1"),
        ("mplug_owl2", "query_embeds"),
        ("mplug_owl2", "crossattention.attention.key"),
        ("mplug_owl2", "vit_eos"),
    ],
)
def test_only_images_use_the_weights_for_images(
    made: dict[str, Ready], family: str, part: str
) -> None:
    ready = made[family]
    with_image = ready.inputs([(QUESTIONS[0], PICTURES[2])])
    without = ready.inputs([(QUESTIONS[0], None)])
    changed, _ = load(ready.folder, family)
    touched = [weight for name, weight in changed.named_parameters() if part in name]
    assert touched
    for weight in touched:
        weight.data.zero_()
    with torch.inference_mode():
        assert not torch.allclose(changed(**with_image).logits, ready.logits(with_image), atol=1e-3)
        assert torch.equal(changed(**without).logits, ready.logits(without))


@pytest.mark.parametrize("family", REMOTE)
def test_cached_chunks_give_the_logits_of_the_whole(made: dict[str, Ready], family: str) -> None:
    """A prompt, then three tokens at once after the cache, then again after cutting it back."""
    ready = made[family]
    prompt = ready.inputs([(QUESTIONS[0], PICTURES[2]), (QUESTIONS[1], PICTURES[3])])
    start, more = prompt["input_ids"].shape[1], torch.tensor([[40, 41, 42], [50, 51, 52]])
    whole = {**prompt, "input_ids": torch.cat((prompt["input_ids"], more), dim=1)}
    for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
        if name in whole:
            whole[name] = torch.cat((whole[name], torch.full_like(more, value)), dim=1)
    expected = ready.logits(ready.model.prepare_inputs_for_generation(**whole, use_cache=False))
    cache = transformers().DynamicCache(config=ready.model.config)
    first = ready.model.prepare_inputs_for_generation(
        **prompt, past_key_values=cache, is_first_iteration=True, use_cache=True
    )
    parts = [ready.logits(first)]
    for _ in range(2):
        if (surplus := cache.get_seq_length() - start) > 0:
            cache.crop(-surplus)
        rest = ready.model.prepare_inputs_for_generation(
            **whole, past_key_values=cache, next_sequence_length=3, use_cache=True
        )
        assert rest["input_ids"].shape[1] == 3
        assert rest["images"] is None
        parts[1:] = [ready.logits(rest)]
    torch.testing.assert_close(
        torch.cat(parts, dim=1)[:, start - 1 :], expected[:, start - 1 :], atol=1e-4, rtol=1e-4
    )
