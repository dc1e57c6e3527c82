"""A tiny random pair, made on the spot: a Qwen2-VL base and a LLaVA-OneVision donor.

Both language models descend from one random ancestor, as the real pair descends from Qwen2, and
the pair has the real one's traps: the spelling of the names differs, the vocabularies have
different numbers of rows, and the first added token ids mean different things on each side. The
models know nothing; the demo's pair does (`lowmem_adamms/demo`).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_adamms.live.transformers_model import quiet

if TYPE_CHECKING:
    from torch import Tensor

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS = 3, 64, 128, 4, 2
BASE_ROWS, DONOR_ROWS = 512, 576
SHARED_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BASE_TOKENS = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
DONOR_TOKENS = ("<image>", "<video>")
PATCH, SIDE = 14, 56
NOISE = 0.1  # a descendant's distance from the ancestor, in units of the tensor's RMS: cosine 0.995
SHARD_SIZE = "200KB"  # small enough that both models need several shards and so an index

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""

CORPUS = """\
The picture shows a small red house beside a quiet river under a bright blue sky.
What color is the large car in front of the building? The car is yellow and black.
How many people are standing near the table? There are three people and one little dog.
Describe this image in detail. A woman with an umbrella walks along the street at night.
Which animal is on the left side of the photo? It looks like a brown horse eating green grass.
Is the door open or closed? Answer yes or no. Read the text on the sign and explain it.
The chart compares water, light and paper; the second bar is higher than the first one.
Where was this taken? Perhaps on a mountain trail, because snow covers the trees and rocks.
"""


def write_tokenizer(
    folder: Path, added: Sequence[str], *, size: int = 480, chat_template: str | None = None
) -> Any:
    """Write a byte-level BPE of `size` tokens, the three shared added tokens, then `added`.

    Deterministic, so that two folders written with one `size` share every id below `added`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(CORPUS.splitlines(), trainer)
    if bpe.get_vocab_size() != size:
        raise ValueError(f"the embedded text yields {bpe.get_vocab_size()} tokens, not {size}")
    bpe.add_special_tokens([*SHARED_TOKENS, *added])
    tokenizer = _transformers().PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=SHARED_TOKENS[2], pad_token=SHARED_TOKENS[0]
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_pair(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write `folder`/base (Qwen2-VL) and `folder`/donor (LLaVA-OneVision), both bf16 and sharded.

    The same seed gives the same bytes.
    """
    import torch

    base, donor = folder / "base", folder / "donor"
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokens = write_tokenizer(base, BASE_TOKENS, chat_template=CHAT_TEMPLATE)
        ancestor = _ancestor(tokens)
        _save(_base_model(tokens), ancestor, tokens, base)
        _write_json(
            base / "preprocessor_config.json",
            {
                "image_processor_type": "Qwen2VLImageProcessor",
                "processor_class": "Qwen2VLProcessor",
                "patch_size": PATCH,
                "temporal_patch_size": 2,
                "merge_size": 2,
                "min_pixels": SIDE * SIDE,
                "max_pixels": SIDE * SIDE,
            },
        )
        tokens = write_tokenizer(donor, DONOR_TOKENS)
        _save(_donor_model(tokens), ancestor, tokens, donor)
        _write_json(
            donor / "preprocessor_config.json",
            {
                "image_processor_type": "LlavaOnevisionImageProcessor",
                "processor_class": "LlavaOnevisionProcessor",
                "size": {"height": SIDE, "width": SIDE},
                "image_grid_pinpoints": [[SIDE, SIDE]],
            },
        )
    return base, donor


def _transformers() -> Any:
    """The library without its types: they are partial, and mypy reads them for most of a minute."""
    return importlib.import_module("transformers")


def _text_config(tokens: Any, rows: int) -> dict[str, Any]:
    end_of_text, _, end_of_turn = tokens.convert_tokens_to_ids(SHARED_TOKENS)
    return {
        "vocab_size": rows,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        # Each class has its own defaults, but descendants of one model have its values
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        # Far above the usual 0.02, so that a decoder this narrow still reacts to its input
        "initializer_range": 0.125,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_turn,
        "pad_token_id": end_of_text,
        "tie_word_embeddings": False,
    }


def _ancestor(tokens: Any) -> dict[str, Tensor]:
    """The common language model, with one row for each token that both descendants share."""
    import torch

    transformers = _transformers()
    rows = len(tokens) - len(BASE_TOKENS)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_text_config(tokens, rows)))
    for name, weight in model.named_parameters():
        # A fresh model has zero biases and unit norms, which would hide a mix-up between layers
        if weight.dim() == 1:
            weight.data.add_(0.1 * torch.randn(weight.shape))
        # Short rows seldom win the argmax, which keeps answers to words instead of lone bytes
        if name == "lm_head.weight":
            words = [len(t.lstrip("Ġ")) > 2 for t in tokens.convert_ids_to_tokens(range(rows))]
            words[-len(SHARED_TOKENS) :] = [False] * len(SHARED_TOKENS)
            weight.data[~torch.tensor(words)] *= 0.2
    return {
        name.removeprefix("model."): weight.detach() for name, weight in model.named_parameters()
    }


def _base_model(tokens: Any) -> Any:
    transformers = _transformers()
    start, end, _, image, video = tokens.convert_tokens_to_ids(BASE_TOKENS)
    # The three shares of the rotary dimensions: time, height, width; together half a head
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "hidden_size": HIDDEN,
        "patch_size": PATCH,
        "initializer_range": 0.125,
    }
    config = transformers.Qwen2VLConfig(
        text_config={**_text_config(tokens, BASE_ROWS), "rope_parameters": rope},
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def _donor_model(tokens: Any) -> Any:
    transformers = _transformers()
    image, video = tokens.convert_tokens_to_ids(DONOR_TOKENS)
    vision = {
        "model_type": "siglip_vision_model",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "vision_use_head": False,
    }
    config = transformers.LlavaOnevisionConfig(
        text_config={**_text_config(tokens, DONOR_ROWS), "model_type": "qwen2"},
        vision_config=vision,
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=[[SIDE, SIDE]],
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def _save(model: Any, ancestor: dict[str, Tensor], tokens: Any, folder: Path) -> None:
    """Turn `model` into a descendant and write it; rows that it does not share stay its own."""
    import torch

    language = model.model.language_model
    mine = {**dict(language.named_parameters()), "lm_head.weight": model.lm_head.weight}
    for name, parent in ancestor.items():
        noise = NOISE * parent.square().mean().sqrt() * torch.randn(parent.shape)
        mine[name].data[: len(parent)] = parent + noise
        if name == "lm_head.weight":
            mine[name].data[len(parent) :] *= 0.2
    end_of_text, _, end_of_turn = tokens.convert_tokens_to_ids(SHARED_TOKENS)
    model.generation_config = _transformers().GenerationConfig(
        bos_token_id=end_of_text, eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text
    )
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD_SIZE)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
