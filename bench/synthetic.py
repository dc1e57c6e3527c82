"""Makes a pair of synthetic checkpoints: true names, shapes, shards, configs and tokenizers.

    python bench/synthetic.py OUT [--size full|5gb|1gb|small] [--kind vlm|qwen2] [--donor-dtype F16]
        [--ancestor]

writes OUT/base and OUT/donor, and OUT/ancestor, the language model that both differ from. Kind
`vlm` is Qwen2-VL-7B-Instruct and LLaVA-OneVision-7B in the llava-hf spelling; kind `qwen2` is two
plain Qwen2-7B checkpoints, for mergers that need equal architectures. The smaller sizes keep the
names and scale layers, widths and vocabulary.

The values are seeded noise. Tensors with the same role in both language models come from the same
place of one noise pool, the donor's with a little noise on top, so a pair is kin (cosine 0.99) and
its other parts are strangers. The weights compute nothing: whoever needs answers from a model, or
a processor for images, must look elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from measure import ROOT
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

sys.path.insert(0, str(ROOT / "tests"))

from families import DecoderDims, affine, llama_decoder, stack, weight
from lowmem_adamms.kernels.reference import narrow

from lowmem_adamms.checkpoints.dtypes import DTYPES
from lowmem_adamms.checkpoints.safetensors_header import build_header

Bits = npt.NDArray[np.uint16]
Shapes = dict[str, tuple[int, ...]]

STD = 0.02
DRIFT = 0.14 * STD  # the donor's distance from the base: cosine 1 / sqrt(1 + 0.14²) = 0.990
POOL, NORMS = 8_388_593, 65_521  # primes, so that no row of a matrix ever repeats
HEAD_DIM = 128
UNUSED_ROWS = 421  # vocabulary rows above the plain tokens: 152064 - 151643
CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BASE_TOKENS = [
    *(f"<|{kind}_{end}|>" for kind in ("object_ref", "box", "quad") for end in ("start", "end")),
    *(f"<|{kind}|>" for kind in ("vision_start", "vision_end", "vision_pad")),
    *(f"<|{kind}_pad|>" for kind in ("image", "video")),
]
DONOR_TOKENS = ["<image>", "<video>"]
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Size:
    """Widths and depths of a pair: the language model's, the base's ViT's, the donor's SigLIP's."""

    hidden: int
    ffn: int
    layers: int
    kv_heads: int
    vocab: int
    vit: int
    siglip: int
    siglip_ffn: int

    @property
    def tokens(self) -> int:
        """How many plain tokens the tokenizer has: the id of the first added one."""
        return self.vocab - UNUSED_ROWS


SIZES = {
    "full": Size(3584, 18944, 28, 4, 152064, 1280, 1152, 4304),
    "5gb": Size(2048, 10752, 26, 2, 100000, 1280, 1152, 4304),
    "1gb": Size(1024, 5376, 15, 2, 48000, 512, 512, 1904),
    "small": Size(256, 1344, 12, 1, 16000, 128, 128, 480),
}
VIT_DEPTH, SIGLIP_DEPTH = 32, 26


@dataclass(frozen=True)
class Side:
    """One checkpoint to write."""

    shapes: Shapes
    config: dict[str, Any]
    shards: int
    dtype: str
    added_tokens: list[str]


# --- names and shapes ---------------------------------------------------------------------------


def language(size: Size, vocab: int, prefix: str = "") -> Shapes:
    """The decoder of Qwen2."""
    heads = size.hidden // HEAD_DIM
    dims = DecoderDims(
        size.hidden, size.ffn, size.layers, heads, size.kv_heads, vocab, HEAD_DIM, bias=True
    )
    tensors = llama_decoder(dims, prefix=f"{prefix}model.", head=f"{prefix}lm_head")
    return {name: shape for name, (_, shape) in tensors.items()}


def qwen2_vl(size: Size) -> Shapes:
    """Qwen2-VL as it lies on the Hub."""
    vit, merged = size.vit, 4 * size.vit
    block = {
        **affine("norm1", vit),
        **affine("norm2", vit),
        **affine("attn.qkv", 3 * vit, vit),
        **affine("attn.proj", vit, vit),
        **affine("mlp.fc1", 4 * vit, vit),
        **affine("mlp.fc2", vit, 4 * vit),
    }
    return {
        **weight("visual.patch_embed.proj", vit, 3, 2, 14, 14),
        **stack("visual.blocks", VIT_DEPTH, block),
        **affine("visual.merger.ln_q", vit),
        **affine("visual.merger.mlp.0", merged, merged),
        **affine("visual.merger.mlp.2", size.hidden, merged),
        **language(size, size.vocab),
    }


def llava_onevision(size: Size) -> Shapes:
    """LLaVA-OneVision as llava-hf spells it on the Hub."""
    width, ffn, tower = size.siglip, size.siglip_ffn, "vision_tower.vision_model."
    block = {
        **affine("layer_norm1", width),
        **affine("layer_norm2", width),
        **affine("self_attn.q_proj", width, width),
        **affine("self_attn.k_proj", width, width),
        **affine("self_attn.v_proj", width, width),
        **affine("self_attn.out_proj", width, width),
        **affine("mlp.fc1", ffn, width),
        **affine("mlp.fc2", width, ffn),
    }
    return {
        **affine(f"{tower}embeddings.patch_embedding", width, 3, 14, 14),
        **weight(f"{tower}embeddings.position_embedding", 729, width),
        **stack(f"{tower}encoder.layers", SIGLIP_DEPTH, block),
        **affine(f"{tower}post_layernorm", width),
        **affine("multi_modal_projector.linear_1", size.hidden, width),
        **affine("multi_modal_projector.linear_2", size.hidden, size.hidden),
        "image_newline": (size.hidden,),
        **language(size, size.vocab + 64, "language_model."),
    }


# --- configs ------------------------------------------------------------------------------------


def qwen2_config(size: Size, vocab: int, dtype: str) -> dict[str, Any]:
    """A config.json of Qwen2ForCausalLM."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": size.hidden,
        "intermediate_size": size.ffn,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // HEAD_DIM,
        "num_key_value_heads": size.kv_heads,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": {"BF16": "bfloat16", "F16": "float16"}[dtype],
        "bos_token_id": size.tokens,
        "eos_token_id": size.tokens + 2,
    }


def qwen2_vl_config(size: Size) -> dict[str, Any]:
    """A config.json of Qwen2VLForConditionalGeneration."""
    return qwen2_config(size, size.vocab, "BF16") | {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_start_token_id": size.tokens + 9,
        "vision_end_token_id": size.tokens + 10,
        "vision_token_id": size.tokens + 11,
        "image_token_id": size.tokens + 12,
        "video_token_id": size.tokens + 13,
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": VIT_DEPTH,
            "embed_dim": size.vit,
            "hidden_size": size.hidden,
            "num_heads": 16,
            "mlp_ratio": 4,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
        },
    }


def llava_onevision_config(size: Size, dtype: str) -> dict[str, Any]:
    """A config.json of LlavaOnevisionForConditionalGeneration."""
    text = qwen2_config(size, size.vocab + 64, dtype)
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "hidden_size": size.hidden,
        "image_token_index": size.tokens + 3,
        "video_token_index": size.tokens + 4,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": False,
        "torch_dtype": text["torch_dtype"],
        "text_config": text,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": size.siglip,
            "intermediate_size": size.siglip_ffn,
            "num_hidden_layers": SIGLIP_DEPTH,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }


# --- tokenizer ----------------------------------------------------------------------------------


def grow_vocabulary(tokens: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A consistent byte-level BPE: every further token is the merge of two earlier ones."""
    chance = random.Random(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: place for place, token in enumerate(alphabet)}
    pieces = [*8 * "etaoinshrdlcumwfgypbvk", *alphabet]
    merges: list[tuple[str, str]] = []
    while len(vocab) < tokens:
        left = "Ġ" if chance.random() < 0.25 else pieces[int(chance.random() ** 3 * len(pieces))]
        right = pieces[int(chance.random() ** 3 * len(pieces))]
        word = left + right
        if word in vocab or len(word) > 12 or "Ġ" in right:
            continue
        vocab[word] = len(vocab)
        merges.append((left, right))
        pieces.append(word)
    return vocab, merges


def write_tokenizer(folder: Path, tokens: int, added: list[str]) -> None:
    """Writes tokenizer.json and tokenizer_config.json as transformers 5 does for Qwen2."""
    vocab, merges = grow_vocabulary(tokens)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(added)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": added[2], "pad_token": added[0]}
    write_json(folder / "tokenizer_config.json", settings)


# --- values and shards --------------------------------------------------------------------------


class Values(Protocol):
    """What is written."""

    def chunks(self, name: str, shape: tuple[int, ...]) -> Iterator[memoryview]:
        """The bytes of one tensor."""


class Noise:
    """Endless values for tensors: a pool of noise read from a place that the role decides."""

    def __init__(self, dtype: str, drift: float, seed: int = 1) -> None:
        self.weights = self._pool(POOL, 0.0, dtype, drift, seed)
        self.norms = self._pool(NORMS, 1.0, dtype, drift, seed)

    @staticmethod
    def _pool(length: int, mean: float, dtype: str, drift: float, seed: int) -> Bits:
        kept, added = np.random.default_rng([0, length]), np.random.default_rng([seed, length])
        pool = np.empty(length, np.uint16)
        for start in range(0, length, 1 << 20):
            count = min(1 << 20, length - start)
            values = np.float32(mean) + np.float32(STD) * kept.standard_normal(count, np.float32)
            values += np.float32(drift) * added.standard_normal(count, np.float32)
            pool[start : start + count] = narrow(values.astype(np.float64), dtype)
        return pool

    def chunks(self, name: str, shape: tuple[int, ...]) -> Iterator[memoryview]:
        """The values of one tensor, as views of the pool."""
        is_norm = len(shape) == 1 and name.endswith(".weight")
        pool = self.norms if is_norm else self.weights
        role = name.removeprefix("language_model.")
        place, left = zlib.crc32(role.encode()) % len(pool), int(np.prod(shape))
        while left:
            part = pool[place : place + left]
            yield part.data
            place, left = 0, left - len(part)


def split_shards(shapes: Shapes, count: int) -> list[Shapes]:
    """Fills shard after shard in order, as transformers does; the last one gets what is left."""
    limit = 1.2 * sum(map(tensor_bytes, shapes.values())) / count
    shards: list[Shapes] = [{}]
    filled = 0
    for name, shape in shapes.items():
        if filled + tensor_bytes(shape) > limit and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += tensor_bytes(shape)
    return shards


def tensor_bytes(shape: tuple[int, ...]) -> int:
    """The size of a tensor of 16-bit elements."""
    return 2 * int(np.prod(shape))


def write_shard(path: Path, shapes: Shapes, dtype: str, noise: Values) -> None:
    """Streams one safetensors file."""
    specs = [(name, DTYPES[dtype], shape) for name, shape in shapes.items()]
    header = build_header(specs, {"format": "pt"})
    with path.open("wb") as file:
        size = len(header) + sum(map(tensor_bytes, shapes.values()))
        os.posix_fallocate(file.fileno(), 0, size)
        file.write(header)
        for name, shape in shapes.items():
            for chunk in noise.chunks(name, shape):
                file.write(chunk)
                push_to_disk(file, len(chunk))
        file.flush()
        os.fsync(file.fileno())


def push_to_disk(file: BufferedWriter, fresh: int) -> None:
    """Starts the disk on what was just written, and lets go of what has already arrived there."""
    end = file.tell()
    start = max(0, end - fresh - (64 << 20))
    os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)


def write_json(path: Path, document: object) -> None:
    """Writes readable JSON."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=2, ensure_ascii=False)


def write_checkpoint(folder: Path, side: Side, size: Size, noise: Noise) -> int:
    """Writes one folder; returns the bytes of its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = split_shards(side.shapes, side.shards)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file_name, shapes in zip(names, shards, strict=True):
        write_shard(folder / file_name, dict(sorted(shapes.items())), side.dtype, noise)
    total = sum(map(tensor_bytes, side.shapes.values()))
    places = {name: file for file, shapes in zip(names, shards, strict=True) for name in shapes}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", side.config)
    generation = {"bos_token_id": size.tokens, "eos_token_id": [size.tokens + 2, size.tokens]}
    write_json(folder / "generation_config.json", generation | {"do_sample": False})
    write_tokenizer(folder, size.tokens, CHAT_TOKENS + side.added_tokens)
    return total


# --- the pair -----------------------------------------------------------------------------------


def make_sides(kind: str, size: Size, donor_dtype: str) -> tuple[Side, Side]:
    """Base and donor of a kind."""
    if kind == "qwen2":
        shapes = language(size, size.vocab)
        base_config = qwen2_config(size, size.vocab, "BF16")
        donor_config = qwen2_config(size, size.vocab, donor_dtype)
        base = Side(shapes, base_config, 4, "BF16", [])
        return base, Side(shapes, donor_config, 4, donor_dtype, [])
    base = Side(qwen2_vl(size), qwen2_vl_config(size), 5, "BF16", BASE_TOKENS)
    config = llava_onevision_config(size, donor_dtype)
    return base, Side(llava_onevision(size), config, 4, donor_dtype, DONOR_TOKENS)


def main() -> None:
    """Writes the pair that the command line asks for."""
    parser = argparse.ArgumentParser(description="Make a pair of synthetic checkpoints.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--kind", choices=("vlm", "qwen2"), default="vlm")
    parser.add_argument("--donor-dtype", choices=("BF16", "F16"), default="BF16")
    parser.add_argument("--ancestor", action="store_true")
    args = parser.parse_args()
    size = SIZES[args.size]
    base, donor = make_sides(args.kind, size, args.donor_dtype)
    sides = {"base": (base, 0.0, 1), "donor": (donor, DRIFT, 1)}
    if args.ancestor:  # the noise without any drift; the base then drifts as far as the donor
        text, _ = make_sides("qwen2", size, "BF16")
        sides = sides | {"base": (base, DRIFT, 2), "ancestor": (text, 0.0, 1)}
    for name, (side, drift, seed) in sides.items():
        total = write_checkpoint(args.out / name, side, size, Noise(side.dtype, drift, seed))
        print(f"{args.out / name}: {len(side.shapes)} tensors, {total / 1e9:.2f} GB {side.dtype}")


if __name__ == "__main__":
    main()
