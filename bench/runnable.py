"""Makes a pair that can be run: a Qwen2-VL base and a LLaVA-OneVision donor, random but related.

    python bench/runnable.py PAIR --size small

Unlike synthetic.py's pairs (true names, no sense) these answer: both language models are one
ancestor plus a little noise, tokenizer and chat template are those of the tests' pair; images are
random blocks of colour. The ancestor's layers are random. Its head is made so that most tokens
have one successor and a few have two, between which the layers decide by all that was said and
shown before: a wholly random head would leave every token to chance, where a trained one is nearly
always sure. `distance` and `branching` set how many answers change from one alpha to the next,
which is what drafts live on; bench/search.py reports it. Writes PAIR/base, PAIR/donor,
PAIR/prompts.jsonl and PAIR/images.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import random_pair

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


SIZES = {
    "tiny": Size(256, 704, 6, 4096, 128, 4),
    "small": Size(896, 4864, 24, 32768, 640, 16),
    "medium": Size(1536, 8960, 28, 65536, 1280, 32),  # Qwen2-VL-2B but for its vocabulary
}
FIRST = 16  # tokens an answer may begin with
ENDING = 0.01  # of the tokens are followed by the end of the answer
BLOCKS = 8  # colour blocks along the side of an image
WORDS = ["what", "is", "shown", "here", "describe", "the", "colours", "count", "read", "blocks"]


def main() -> None:
    """Make the pair."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pair", type=Path)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--distance", type=float, default=0.1, help="noise, of each tensor's RMS")
    parser.add_argument("--branching", type=float, default=0.2, help="tokens with two successors")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--pixels", type=int, default=224, help="side of an image")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    make_pair(arguments.pair, size, arguments.distance, arguments.branching, arguments.seed)
    make_prompts(arguments.pair, arguments.prompts, arguments.pixels, arguments.seed)


def make_pair(pair: Path, size: Size, distance: float, branching: float, seed: int) -> None:
    """Write base and donor in bf16."""
    transformers = importlib.import_module("transformers")
    torch.manual_seed(seed)
    with quiet():
        tokens = random_pair.write_tokenizer(
            pair / "base", random_pair.BASE_TOKENS, chat_template=random_pair.CHAT_TEMPLATE
        )
        base = _base(transformers, tokens, size)
        _teach(base, tokens, branching)
        language = base.model.language_model
        ancestor = {name: p.detach().clone() for name, p in language.named_parameters()}
        ancestor["lm_head.weight"] = base.lm_head.weight.detach().clone()
        _write(base, pair / "base", tokens, transformers)
        del base, language
        tokens = random_pair.write_tokenizer(pair / "donor", random_pair.DONOR_TOKENS)
        donor = _donor(transformers, tokens, size)
        mine = dict(donor.model.language_model.named_parameters())
        mine["lm_head.weight"] = donor.lm_head.weight
        for name, parent in ancestor.items():
            scale = distance * parent.float().square().mean().sqrt()
            mine[name].data.copy_(parent + scale * torch.randn(parent.shape))
        _write(donor, pair / "donor", tokens, transformers)
        for file in (pair / "donor").glob("tokenizer*"):
            file.unlink()  # so that all rows are joined, not only those of this small vocabulary
    config: dict[str, Any] = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
    config |= {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    path = pair / "base" / "preprocessor_config.json"
    path.write_text(json.dumps(config | {"min_pixels": 3136, "max_pixels": 1003520}))


def _text(tokens: Any, size: Size) -> dict[str, Any]:
    end_of_text, _, end_of_turn = tokens.convert_tokens_to_ids(random_pair.SHARED_TOKENS)
    return {
        "vocab_size": size.rows,
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // 64,
        "num_key_value_heads": 2,
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
    with torch.device("cpu"):
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
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def _teach(model: Any, tokens: Any, branching: float) -> None:
    """Embedding and head of the ancestor: which tokens may follow which."""
    embed = model.model.language_model.embed_tokens.weight.data
    embed.normal_()
    end_of_turn = tokens.convert_tokens_to_ids(random_pair.SHARED_TOKENS)[-1]
    pieces = tokens.convert_ids_to_tokens(range(len(tokens) - len(random_pair.BASE_TOKENS)))
    words = [i for i, p in enumerate(pieces) if p.startswith("\u0120") or p.isalpha()]
    random = np.random.default_rng(0)
    following = np.array(words)[random.permutation(len(words))]
    other = np.array(words)[random.permutation(len(words))]
    head = 0.1 * torch.randn_like(embed)
    for word, first, second in zip(words, following, other, strict=True):
        head[end_of_turn if random.random() < ENDING else first] += embed[word]
        if random.random() < branching:
            head[second] += embed[word]
    # All prompts end in the same token: what comes first is for image and question to decide
    (last,) = tokens("\n").input_ids
    for word in words[:: len(words) // FIRST]:
        head[word] += embed[last]
    model.lm_head.weight.data.copy_(head)


def _write(model: Any, folder: Path, tokens: Any, transformers: Any) -> None:
    end_of_text, _, end_of_turn = tokens.convert_tokens_to_ids(random_pair.SHARED_TOKENS)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=end_of_text, eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text
    )
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="2GB")


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
