"""Makes a pair that can be run: a Qwen2-VL base and a LLaVA-OneVision donor, random but related.

    python bench/runnable.py PAIR --size small

Unlike synthetic.py's pairs (true names, no sense) these answer: both language models are one
ancestor plus a little noise, tokenizer and chat template are those of the tests' pair; images are
random blocks of colour. The ancestor's layers are random. Its head is made so that most tokens
have one successor and a few have two, between which the layers decide by all that was said and
shown before: a wholly random head would leave every token to chance, where a trained one is nearly
always sure. `distance` and `branching` set how many answers change from one alpha to the next,
which is what drafts live on; bench/search.py reports it. Writes PAIR/base, PAIR/donor,
PAIR/prompts.jsonl and PAIR/images. No model is ever in memory: numbers are drawn and written chunk
by chunk, so that a pair may be larger than the machine (`--size 14b`: 29 GB a side).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import random_pair
from synthetic import split_shards, tensor_bytes, write_json, write_shard

from lowmem_adamms.live.transformers_model import quiet


@dataclass(frozen=True, slots=True)
class Size:
    """Widths and depths; heads are 64 wide. Vision keeps its share of Qwen2-VL-2B's arithmetic."""

    hidden: int
    inner: int
    layers: int
    rows: int
    vision: int
    depth: int
    kv_heads: int = 2


SIZES = {
    "tiny": Size(256, 704, 6, 4096, 128, 4),
    "small": Size(896, 4864, 24, 32768, 640, 16),
    "medium": Size(1536, 8960, 28, 65536, 1280, 32),  # Qwen2-VL-2B but for its vocabulary
    "7b": Size(3584, 18944, 28, 152064, 1280, 32, 8),
    "14b": Size(5120, 13824, 48, 152064, 1280, 32, 16),
}
FIRST = 16  # tokens an answer may begin with
ENDING = 0.01  # of the tokens are followed by the end of the answer
BLOCKS = 8  # colour blocks along the side of an image
WORDS = ["what", "is", "shown", "here", "describe", "the", "colours", "count", "read", "blocks"]
CHUNK = 1 << 24  # numbers drawn at a time
SHARD_BYTES = 2 << 30


def main() -> None:
    """Make the pair."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pair", type=Path)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--layers", type=int, help="instead of those of the size")
    parser.add_argument("--distance", type=float, default=0.1, help="noise, of each tensor's RMS")
    parser.add_argument("--branching", type=float, default=0.2, help="tokens with two successors")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--pixels", type=int, default=224, help="side of an image")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    if arguments.layers:
        size = replace(size, layers=arguments.layers)
    make_pair(arguments.pair, size, arguments.distance, arguments.branching, arguments.seed)
    make_prompts(arguments.pair, arguments.prompts, arguments.pixels, arguments.seed)


def make_pair(pair: Path, size: Size, distance: float, branching: float, seed: int) -> None:
    """Write base and donor in bf16."""
    transformers = importlib.import_module("transformers")
    with quiet():
        tokens = random_pair.write_tokenizer(
            pair / "base", random_pair.BASE_TOKENS, chat_template=random_pair.CHAT_TEMPLATE
        )
        numbers = Numbers(size, seed, 0, _teach(tokens, branching))
        _write(_base(transformers, tokens, size), pair / "base", tokens, numbers)
        tokens = random_pair.write_tokenizer(pair / "donor", random_pair.DONOR_TOKENS)
        numbers = Numbers(size, seed, distance, numbers.lessons)
        _write(_donor(transformers, tokens, size), pair / "donor", tokens, numbers)
        for file in (pair / "donor").glob("tokenizer*"):
            file.unlink()  # so that all rows are joined, not only those of this small vocabulary
    config: dict[str, Any] = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
    config |= {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    write_json(
        pair / "base" / "preprocessor_config.json",
        config | {"min_pixels": 3136, "max_pixels": 1003520},
    )


class Numbers:
    """The numbers of a side: the ancestor's with noise in the language model, else its own.

    distance: of the noise, in units of the numbers' RMS. lessons: of `_teach`.
    """

    def __init__(
        self, size: Size, seed: int, distance: float, lessons: dict[int, list[int]]
    ) -> None:
        self.lessons = lessons
        self._size, self._seed, self._distance = size, seed, distance

    def chunks(self, name: str, shape: tuple[int, ...]) -> Iterator[memoryview]:
        """The bytes of one tensor in bf16, some rows at a time."""
        rows, width = shape[0], int(np.prod(shape[1:]))
        count = max(1, CHUNK // width)
        for first in range(0, rows, count):
            numbers = self._draw(name, first, min(count, rows - first), width, len(shape))
            yield numbers.bfloat16().view(-1).view(torch.uint8).numpy().data

    def _draw(self, name: str, first: int, rows: int, width: int, dims: int) -> torch.Tensor:
        role = name.removeprefix("model.language_model.")
        is_language = role != name or name == "lm_head.weight"
        if name.endswith("bias"):
            return torch.zeros(rows, width)
        if dims == 1:
            numbers = torch.ones(rows, width)
        else:
            random = self._random(role if is_language else f"{self._distance} {name}", first)
            numbers = torch.randn(rows, width, generator=random)
            numbers *= self._scale(role, is_language)
        if name == "lm_head.weight":
            self._follow_lessons(numbers, first)
        if is_language and self._distance:
            scale = self._distance * numbers.square().mean().sqrt()
            random = self._random(f"noise of {role}", first)
            numbers += scale * torch.randn(rows, width, generator=random)
        return numbers

    def _random(self, name: str, first: int) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name} {first}".encode()))

    def _scale(self, role: str, is_language: bool) -> float:
        if role == "embed_tokens.weight":
            return 1.0
        if role == "lm_head.weight":
            return 0.1
        return float((self._size.hidden if is_language else self._size.vision) ** -0.5)

    def _follow_lessons(self, head: torch.Tensor, first: int) -> None:
        """Add to the head's rows the embeddings of the tokens that they follow."""
        count = min(CHUNK // self._size.hidden, self._size.rows)
        random = self._random("embed_tokens.weight", 0)
        embeddings = torch.randn(count, self._size.hidden, generator=random)
        for token, before in self.lessons.items():
            if first <= token < first + len(head):
                head[token - first] += embeddings[before].sum(0)


def _teach(tokens: Any, branching: float) -> dict[int, list[int]]:
    """For each token of the ancestor, which ones it may follow."""
    end_of_turn = tokens.convert_tokens_to_ids(random_pair.SHARED_TOKENS)[-1]
    pieces = tokens.convert_ids_to_tokens(range(len(tokens) - len(random_pair.BASE_TOKENS)))
    words = [i for i, p in enumerate(pieces) if p.startswith("\u0120") or p.isalpha()]
    random = np.random.default_rng(0)
    following = np.array(words)[random.permutation(len(words))].tolist()
    other = np.array(words)[random.permutation(len(words))].tolist()
    lessons: defaultdict[int, list[int]] = defaultdict(list)
    for word, first, second in zip(words, following, other, strict=True):
        lessons[end_of_turn if random.random() < ENDING else first].append(word)
        if random.random() < branching:
            lessons[second].append(word)
    # All prompts end in the same token: what comes first is for image and question to decide
    (last,) = tokens("\n").input_ids
    for word in words[:: len(words) // FIRST]:
        lessons[word].append(last)
    return lessons


def _write(model: Any, folder: Path, tokens: Any, numbers: Numbers) -> None:
    """Write the weights of a model without memory, and its configs."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shards = split_shards(shapes, max(1, sum(map(tensor_bytes, shapes.values())) // SHARD_BYTES))
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, held in zip(files, shards, strict=True):
        write_shard(folder / file, held, "BF16", numbers)
    places = {name: file for file, held in zip(files, shards, strict=True) for name in held}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(folder)
    end_of_text, _, end_of_turn = tokens.convert_tokens_to_ids(random_pair.SHARED_TOKENS)
    ends = {"eos_token_id": [end_of_turn, end_of_text], "pad_token_id": end_of_text}
    write_json(folder / "generation_config.json", {"bos_token_id": end_of_text, **ends})


def _text(tokens: Any, size: Size) -> dict[str, Any]:
    end_of_text, _, end_of_turn = tokens.convert_tokens_to_ids(random_pair.SHARED_TOKENS)
    return {
        "vocab_size": size.rows,
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // 64,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": 4096,
        "initializer_range": 1 / size.hidden**0.5,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_turn,
        "tie_word_embeddings": False,
    }


def _base(transformers: Any, tokens: Any, size: Size) -> Any:
    start, end, _, image, video = tokens.convert_tokens_to_ids(random_pair.BASE_TOKENS)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    config = transformers.Qwen2VLConfig(
        text_config={**_text(tokens, size), "rope_parameters": rope},
        vision_config={
            "depth": size.depth,
            "embed_dim": size.vision,
            "num_heads": size.vision // 64,
            "hidden_size": size.hidden,
            "patch_size": 14,
            "initializer_range": size.vision**-0.5,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    with torch.device("meta"):
        return transformers.Qwen2VLForConditionalGeneration(config)


def _donor(transformers: Any, tokens: Any, size: Size) -> Any:
    image, video = tokens.convert_tokens_to_ids(random_pair.DONOR_TOKENS)
    config = transformers.LlavaOnevisionConfig(
        text_config={**_text(tokens, size), "model_type": "qwen2"},
        vision_config={
            "model_type": "siglip_vision_model",
            "num_hidden_layers": 2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "vision_use_head": False,
        },
        image_token_index=image,
        video_token_index=video,
    )
    with torch.device("meta"):
        return transformers.LlavaOnevisionForConditionalGeneration(config)


def make_prompts(pair: Path, count: int, pixels: int, seed: int) -> None:
    """Questions of five to ten words, each about an image of its own."""
    image_module = importlib.import_module("PIL.Image")
    random = np.random.default_rng(seed)
    (pair / "images").mkdir(exist_ok=True)
    with (pair / "prompts.jsonl").open("w") as lines:
        for index in range(count):
            blocks = random.integers(0, 256, (BLOCKS, BLOCKS, 3), dtype=np.uint8)
            side = pixels // BLOCKS
            name = f"images/{index}.png"
            image_module.fromarray(blocks.repeat(side, 0).repeat(side, 1)).save(pair / name)
            text = " ".join(random.choice(WORDS, random.integers(5, 11)))
            lines.write(json.dumps({"prompt": text + "?", "image": name}) + "\n")


if __name__ == "__main__":
    main()
