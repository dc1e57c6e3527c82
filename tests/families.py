"""True-size layouts (tensor names, dtypes, shapes; no data) of public checkpoint families.

The names come from the ``*.index.json`` files published in Hugging Face repositories, from the
transformers modelling code and, for models with their own code (LLaVA, ShareGPT4V, CogVLM,
mPLUG-Owl2), from that code and the authors' export scripts. Everything is composed from a few
dimensions, so a layout can be read, and checked against a model card, at a glance.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeAlias

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = dict[str, Shape]
Tensors: TypeAlias = dict[str, tuple[str, Shape]]
Config: TypeAlias = dict[str, Any]
Format: TypeAlias = Literal["safetensors", "bin"]

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16"}
CLIP_HIDDEN = 1024
SIGLIP_HIDDEN = 1152
QWEN_VISION_HIDDEN = 1280
EVA_HIDDEN = 1792


@dataclass(frozen=True, slots=True)
class DecoderDims:
    """Dimensions of a Llama-like decoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    head_dim: int = 128
    bias: bool = False
    qk_norm: bool = False
    tied: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """One published checkpoint: its configuration, its tensors and how it is cut into files."""

    name: str
    config: Config
    tensors: Tensors
    shards: int = 1
    format: Format = "safetensors"


LLAMA2_7B = DecoderDims(4096, 11008, 32, 32, 32, 32000)
LLAMA31_8B = DecoderDims(4096, 14336, 32, 32, 8, 128256)
MISTRAL_7B = DecoderDims(4096, 14336, 32, 32, 8, 32000)
QWEN2_05B = DecoderDims(896, 4864, 24, 14, 2, 151936, head_dim=64, bias=True, tied=True)
QWEN2_15B = DecoderDims(1536, 8960, 28, 12, 2, 151936, bias=True, tied=True)
QWEN2_3B = DecoderDims(2048, 11008, 36, 16, 2, 151936, bias=True, tied=True)
QWEN2_7B = DecoderDims(3584, 18944, 28, 28, 4, 152064, bias=True)
QWEN3_17B = DecoderDims(2048, 6144, 28, 16, 8, 151936, qk_norm=True, tied=True)
QWEN3_4B = DecoderDims(2560, 9728, 36, 32, 8, 151936, qk_norm=True, tied=True)
QWEN3_8B = DecoderDims(4096, 12288, 36, 32, 8, 151936, qk_norm=True)


# Building blocks


def weight(name: str, *shape: int) -> Shapes:
    """Return a module that has a weight only."""
    return {f"{name}.weight": shape}


def affine(name: str, *shape: int) -> Shapes:
    """Return a linear layer, convolution or layer norm: a weight, and a bias for its rows."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def stack(name: str, layers: int, block: Shapes) -> Shapes:
    """Repeat a block under ``name.0.``, ``name.1.``, and so on."""
    return {f"{name}.{i}.{key}": shape for i in range(layers) for key, shape in block.items()}


def typed(prefix: str, dtype: str, shapes: Shapes) -> Tensors:
    """Give every tensor the same prefix and dtype."""
    return {prefix + name: (dtype, shape) for name, shape in shapes.items()}


# Language models


def llama_decoder(
    dims: DecoderDims, prefix: str = "model.", head: str = "lm_head", dtype: str = "BF16"
) -> Tensors:
    """Return a Llama, Mistral, Qwen2 or Qwen3 decoder."""
    hidden, rows = dims.hidden, dims.heads * dims.head_dim
    kv_rows = dims.kv_heads * dims.head_dim
    qkv = affine if dims.bias else weight
    block = {
        **weight("input_layernorm", hidden),
        **qkv("self_attn.q_proj", rows, hidden),
        **qkv("self_attn.k_proj", kv_rows, hidden),
        **qkv("self_attn.v_proj", kv_rows, hidden),
        **weight("self_attn.o_proj", hidden, rows),
        **weight("post_attention_layernorm", hidden),
        **gated_mlp("mlp", hidden, dims.intermediate),
    }
    if dims.qk_norm:
        block |= weight("self_attn.q_norm", dims.head_dim)
        block |= weight("self_attn.k_norm", dims.head_dim)
    return decoder_around(block, dims, prefix, head, dtype)


def gated_mlp(
    name: str, hidden: int, intermediate: int, make: Callable[..., Shapes] = weight
) -> Shapes:
    """Return the gate, up and down projections of a SwiGLU block."""
    return {
        **make(f"{name}.gate_proj", intermediate, hidden),
        **make(f"{name}.up_proj", intermediate, hidden),
        **make(f"{name}.down_proj", hidden, intermediate),
    }


def decoder_around(block: Shapes, dims: DecoderDims, prefix: str, head: str, dtype: str) -> Tensors:
    """Put embeddings, final norm and, where it is not tied, the head around the layers."""
    body = {
        **weight("embed_tokens", dims.vocab, dims.hidden),
        **stack("layers", dims.layers, block),
        **weight("norm", dims.hidden),
    }
    output = {} if dims.tied else weight(head, dims.vocab, dims.hidden)
    return typed(prefix, dtype, body) | typed("", dtype, output)


def rotary_buffers(dims: DecoderDims, prefix: str = "model.") -> Tensors:
    """Return the rotary frequencies that older exporters saved, in F32 whatever the model is."""
    buffer: Shapes = {"self_attn.rotary_emb.inv_freq": (dims.head_dim // 2,)}
    return typed(prefix, "F32", stack("layers", dims.layers, buffer))


def cogvlm_decoder(dims: DecoderDims, dtype: str = "BF16") -> Tensors:
    """Return CogVLM's decoder: attention (fused) and MLP exist once per modality."""
    hidden = dims.hidden
    block: Shapes = {}
    for expert in ("vision", "language"):
        block |= weight(f"self_attn.{expert}_expert_query_key_value", 3 * hidden, hidden)
        block |= weight(f"self_attn.{expert}_expert_dense", hidden, hidden)
        block |= gated_mlp(f"mlp.{expert}_mlp", hidden, dims.intermediate)
    block |= weight("input_layernorm", hidden)
    block |= weight("post_attention_layernorm", hidden)
    return decoder_around(block, dims, "model.", "lm_head", dtype)


def mplug_decoder(dims: DecoderDims, dtype: str = "BF16") -> Tensors:
    """Return mPLUG-Owl2's decoder: keys, values and norms exist for text (0) and image (1)."""
    hidden = dims.hidden
    block = {
        **weight("self_attn.q_proj", hidden, hidden),
        **stack("self_attn.k_proj.multiway", 2, {"weight": (hidden, hidden)}),
        **stack("self_attn.v_proj.multiway", 2, {"weight": (hidden, hidden)}),
        **weight("self_attn.o_proj", hidden, hidden),
        **gated_mlp("mlp", hidden, dims.intermediate),
        **stack("input_layernorm.multiway", 2, {"weight": (hidden,)}),
        **stack("post_attention_layernorm.multiway", 2, {"weight": (hidden,)}),
    }
    return decoder_around(block, dims, "model.", "lm_head", dtype) | rotary_buffers(dims)


# Vision towers and connectors


def clip_layers(hidden: int, intermediate: int, layers: int) -> Shapes:
    """Return the encoder layers that CLIP and SigLIP share."""
    block = {
        **affine("layer_norm1", hidden),
        **affine("layer_norm2", hidden),
        **affine("self_attn.q_proj", hidden, hidden),
        **affine("self_attn.k_proj", hidden, hidden),
        **affine("self_attn.v_proj", hidden, hidden),
        **affine("self_attn.out_proj", hidden, hidden),
        **affine("mlp.fc1", intermediate, hidden),
        **affine("mlp.fc2", hidden, intermediate),
    }
    return stack("encoder.layers", layers, block)


def clip_tower(prefix: str, dtype: str = "BF16") -> Tensors:
    """Return CLIP ViT-L/14 at 336 pixels."""
    shapes = {
        "embeddings.class_embedding": (CLIP_HIDDEN,),
        **weight("embeddings.patch_embedding", CLIP_HIDDEN, 3, 14, 14),
        **weight("embeddings.position_embedding", 577, CLIP_HIDDEN),
        **affine("pre_layrnorm", CLIP_HIDDEN),  # spelt so in transformers
        **clip_layers(CLIP_HIDDEN, 4096, 24),
        **affine("post_layernorm", CLIP_HIDDEN),
    }
    return typed(prefix, dtype, shapes)


def siglip_tower(prefix: str, dtype: str = "BF16") -> Tensors:
    """Return SigLIP so400m/14 at 384 pixels, without the last of its 27 layers and its head."""
    shapes = {
        **affine("embeddings.patch_embedding", SIGLIP_HIDDEN, 3, 14, 14),
        **weight("embeddings.position_embedding", 729, SIGLIP_HIDDEN),
        **clip_layers(SIGLIP_HIDDEN, 4304, 26),
        **affine("post_layernorm", SIGLIP_HIDDEN),
    }
    return typed(prefix, dtype, shapes)


def qwen_tower(
    block: Shapes, norm: Callable[..., Shapes], out_hidden: int, prefix: str, dtype: str
) -> Tensors:
    """Return the tower of Qwen2-VL and Qwen2.5-VL around the given block and kind of norm."""
    hidden = QWEN_VISION_HIDDEN
    merged = 4 * hidden  # the merger joins 2 x 2 patches
    layer = {
        **norm("norm1", hidden),
        **norm("norm2", hidden),
        **affine("attn.qkv", 3 * hidden, hidden),
        **affine("attn.proj", hidden, hidden),
        **block,
    }
    shapes = {
        **weight("patch_embed.proj", hidden, 3, 2, 14, 14),
        **stack("blocks", 32, layer),
        **norm("merger.ln_q", hidden),
        **affine("merger.mlp.0", merged, merged),
        **affine("merger.mlp.2", out_hidden, merged),
    }
    return typed(prefix, dtype, shapes)


def qwen2vl_tower(out_hidden: int, prefix: str = "visual.", dtype: str = "BF16") -> Tensors:
    """Return the tower and merger of Qwen2-VL."""
    hidden = QWEN_VISION_HIDDEN
    mlp = affine("mlp.fc1", 4 * hidden, hidden) | affine("mlp.fc2", hidden, 4 * hidden)
    return qwen_tower(mlp, affine, out_hidden, prefix, dtype)


def qwen25vl_tower(out_hidden: int, prefix: str = "visual.", dtype: str = "BF16") -> Tensors:
    """Return the tower and merger of Qwen2.5-VL: RMS norms and a gated MLP."""
    mlp = gated_mlp("mlp", QWEN_VISION_HIDDEN, 3420, affine)
    return qwen_tower(mlp, weight, out_hidden, prefix, dtype)


def eva_tower(prefix: str = "model.vision.", dtype: str = "BF16") -> Tensors:
    """Return CogVLM's EVA2-CLIP-E at 490 pixels with its gated projection to 4096."""
    hidden, out, wide = EVA_HIDDEN, LLAMA2_7B.hidden, LLAMA2_7B.intermediate
    block = {
        **affine("attention.query_key_value", 3 * hidden, hidden),
        **affine("attention.dense", hidden, hidden),
        **affine("input_layernorm", hidden),
        **affine("post_attention_layernorm", hidden),
        **affine("mlp.fc1", 15360, hidden),
        **affine("mlp.fc2", hidden, 15360),
    }
    shapes = {
        "boi": (1, 1, out),
        "eoi": (1, 1, out),
        "patch_embedding.cls_embedding": (1, hidden),
        **affine("patch_embedding.proj", hidden, 3, 14, 14),
        **weight("patch_embedding.position_embedding", 1226, hidden),
        **stack("transformer.layers", 63, block),
        **weight("linear_proj.linear_proj", out, hidden),
        **affine("linear_proj.norm1", out),
        **weight("linear_proj.dense_h_to_4h", wide, out),
        **weight("linear_proj.gate_proj", wide, out),
        **weight("linear_proj.dense_4h_to_h", out, wide),
    }
    return typed(prefix, dtype, shapes)


def mplug_tower(prefix: str = "model.vision_model.", dtype: str = "BF16") -> Tensors:
    """Return mPLUG-Owl2's ViT-L/14 at 448 pixels."""
    hidden = CLIP_HIDDEN
    block = {
        **affine("input_layernorm", hidden),
        **affine("self_attn.query_key_value", 3 * hidden, hidden),
        **affine("self_attn.dense", hidden, hidden),
        **affine("post_attention_layernorm", hidden),
        **affine("mlp.fc1", 4096, hidden),
        **affine("mlp.fc2", hidden, 4096),
    }
    shapes = {
        "embeddings.cls_token": (1, 1, hidden),
        "embeddings.position_embedding": (1, 1025, hidden),
        **weight("embeddings.patch_embed", hidden, 3, 14, 14),
        **affine("embeddings.pre_layernorm", hidden),
        **stack("encoder.layers", 24, block),
        **affine("post_layernorm", hidden),
    }
    return typed(prefix, dtype, shapes)


def abstractor(prefix: str = "model.visual_abstractor.", dtype: str = "BF16") -> Tensors:
    """Return mPLUG-Owl2's visual abstractor: 64 queries, 6 layers of cross-attention."""
    hidden, wide, out = CLIP_HIDDEN, 2816, LLAMA2_7B.hidden
    block = {
        **affine("attention.query", hidden, hidden),
        **affine("attention.key", hidden, hidden),
        **affine("attention.value", hidden, hidden),
        **affine("norm1", hidden),
        **affine("normk", hidden),
        **affine("output.out_proj", hidden, hidden),
        **affine("output.norm2", hidden),
        **affine("output.mlp.w1", wide, hidden),
        **affine("output.mlp.w2", hidden, wide),
        **affine("output.mlp.w3", wide, hidden),
        **affine("output.mlp.ffn_ln", wide),
    }
    cross = {f"crossattention.{name}": shape for name, shape in block.items()}
    shapes = {
        "query_embeds": (1, 64, hidden),
        "vit_eos": (1, 1, out),
        **stack("encoder.layers", 6, cross),
        **affine("visual_fc", out, hidden),
    }
    return typed(prefix, dtype, shapes)


def projector(first: str, second: str, vision: int, hidden: int, dtype: str = "BF16") -> Tensors:
    """Return the two-layer connector of the LLaVA models."""
    return typed("", dtype, affine(first, hidden, vision) | affine(second, hidden, hidden))


# Families


def decoder_config(dims: DecoderDims) -> Config:
    """Return the decoder's part of a config.json."""
    config: Config = {
        "hidden_size": dims.hidden,
        "intermediate_size": dims.intermediate,
        "num_hidden_layers": dims.layers,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_heads,
        "vocab_size": dims.vocab,
    }
    if dims.qk_norm:  # of these families only Qwen3 publishes it
        config["head_dim"] = dims.head_dim
    return config


def model_config(
    model_type: str, architecture: str, dims: DecoderDims, dtype: str, **more: Any
) -> Config:
    """Return a config.json: what every family has, then ``more``."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "tie_word_embeddings": dims.tied,
        "torch_dtype": TORCH_DTYPES[dtype],
        **more,
    }


def flat_config(
    model_type: str, architecture: str, dims: DecoderDims, dtype: str, **more: Any
) -> Config:
    """Return a config.json that has the decoder's sizes at its top level."""
    sizes = decoder_config(dims)
    return model_config(model_type, architecture, dims, dtype, **sizes, **more)


def text_families() -> list[Family]:
    """Return the language models the others descend from."""
    rows: list[tuple[str, str, DecoderDims, str, int, Format]] = [
        ("llama-2-7b", "Llama", LLAMA2_7B, "F16", 2, "safetensors"),
        ("vicuna-7b-v1.5", "Llama", LLAMA2_7B, "F16", 2, "bin"),
        ("llama-3.1-8b", "Llama", LLAMA31_8B, "BF16", 4, "safetensors"),
        ("qwen2-0.5b", "Qwen2", QWEN2_05B, "BF16", 1, "safetensors"),
        ("qwen2-1.5b", "Qwen2", QWEN2_15B, "BF16", 1, "safetensors"),
        ("qwen2-7b", "Qwen2", QWEN2_7B, "BF16", 4, "safetensors"),
        ("qwen2.5-1.5b", "Qwen2", QWEN2_15B, "BF16", 1, "safetensors"),
        ("qwen2.5-3b", "Qwen2", QWEN2_3B, "BF16", 2, "safetensors"),
        ("qwen2.5-7b", "Qwen2", QWEN2_7B, "BF16", 4, "safetensors"),
        # As transformers saves it; the Hub holds a copy of the tied head too, hence two shards.
        ("qwen3-1.7b", "Qwen3", QWEN3_17B, "BF16", 1, "safetensors"),
        ("qwen3-4b", "Qwen3", QWEN3_4B, "BF16", 3, "safetensors"),
        ("qwen3-8b", "Qwen3", QWEN3_8B, "BF16", 5, "safetensors"),
        ("mistral-7b", "Mistral", MISTRAL_7B, "BF16", 3, "safetensors"),
    ]
    families = []
    for name, kind, dims, dtype, shards, form in rows:
        config = flat_config(kind.lower(), f"{kind}ForCausalLM", dims, dtype)
        tensors = llama_decoder(dims, dtype=dtype)
        families.append(Family(name, config, tensors, shards, form))
    return families


def qwen2vl(name: str, dims: DecoderDims, shards: int) -> Family:
    """Return a Qwen2-VL model."""
    vision = {"depth": 32, "embed_dim": QWEN_VISION_HIDDEN, "hidden_size": dims.hidden}
    config = flat_config("qwen2_vl", "Qwen2VLForConditionalGeneration", dims, "BF16")
    config["vision_config"] = vision
    return Family(name, config, llama_decoder(dims) | qwen2vl_tower(dims.hidden), shards)


def qwen25vl(name: str, dims: DecoderDims, shards: int) -> Family:
    """Return a Qwen2.5-VL model."""
    vision = {
        "depth": 32,
        "hidden_size": QWEN_VISION_HIDDEN,
        "intermediate_size": 3420,
        "out_hidden_size": dims.hidden,
    }
    config = flat_config("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", dims, "BF16")
    config["vision_config"] = vision
    return Family(name, config, llama_decoder(dims) | qwen25vl_tower(dims.hidden), shards)


def llava_hf(
    name: str, kind: str, text_type: str, dims: DecoderDims, shards: int, **more: Any
) -> Family:
    """Return a LLaVA model as the llava-hf organisation converted it (all of them in F16)."""
    model_type, architecture = {
        "1.5": ("llava", "LlavaForConditionalGeneration"),
        "next": ("llava_next", "LlavaNextForConditionalGeneration"),
        "onevision": ("llava_onevision", "LlavaOnevisionForConditionalGeneration"),
    }[kind]
    vision: Config = {"model_type": "clip_vision_model", "hidden_size": CLIP_HIDDEN}
    make_tower = clip_tower
    if kind == "onevision":
        vision = {"model_type": "siglip_vision_model", "hidden_size": SIGLIP_HIDDEN}
        make_tower = siglip_tower
    text = {"model_type": text_type, **decoder_config(dims)}
    config = model_config(
        model_type, architecture, dims, "F16", text_config=text, vision_config=vision, **more
    )
    names = "multi_modal_projector.linear_1", "multi_modal_projector.linear_2"
    tensors = {
        **llama_decoder(dims, "language_model.model.", "language_model.lm_head", "F16"),
        **make_tower("vision_tower.vision_model.", "F16"),
        **projector(*names, vision["hidden_size"], dims.hidden, "F16"),
    }
    if kind != "1.5":  # the first LLaVA does not cut images into tiles
        tensors["image_newline"] = ("F16", (dims.hidden,))
    return Family(name, config, tensors, shards)


def llava_hf_families() -> list[Family]:
    """Return the llava-hf conversions; they pad the vocabulary for their image tokens."""
    vicuna = replace(LLAMA2_7B, vocab=32064)
    mistral = replace(MISTRAL_7B, vocab=32064)
    qwen2 = replace(QWEN2_7B, vocab=152128)
    tokens = {"image_token_index": 151646, "video_token_index": 151647}
    clip = {"image_token_index": 32000}
    return [
        llava_hf("llava-1.5-7b-hf", "1.5", "llama", vicuna, 3, **clip),
        llava_hf("llava-v1.6-vicuna-7b-hf", "next", "llama", vicuna, 3, **clip),
        llava_hf("llava-v1.6-mistral-7b-hf", "next", "mistral", mistral, 4, **clip),
        llava_hf("llava-onevision-qwen2-7b-ov-hf", "onevision", "qwen2", qwen2, 4, **tokens),
    ]


def llava_body(dims: DecoderDims, vision: int, dtype: str = "BF16") -> Tensors:
    """Return decoder and projector in the original LLaVA spelling."""
    names = "model.mm_projector.0", "model.mm_projector.2"
    return llama_decoder(dims, dtype=dtype) | projector(*names, vision, dims.hidden, dtype)


def llava_eyes(dims: DecoderDims, make_tower: Callable[[str], Tensors]) -> Tensors:
    """Return what the original LLaVA code saves of the image side since LLaVA-1.6."""
    newline: Tensors = {"model.image_newline": ("BF16", (dims.hidden,))}
    return newline | make_tower("model.vision_tower.vision_tower.vision_model.")


def llava_original_families() -> list[Family]:
    """Return the models of the original LLaVA code and of its descendants."""
    llama = "LlavaLlamaForCausalLM"
    clip = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": CLIP_HIDDEN}
    share = clip | {"mm_vision_tower": "Lin-Chen/ShareGPT4V-7B_Pretrained_vit-large336-l12"}
    siglip = {
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "mm_hidden_size": SIGLIP_HIDDEN,
    }
    v15 = flat_config("llava", llama, LLAMA2_7B, "F16", **clip)
    s4v = flat_config("share4v", "Share4VLlamaForCausalLM", LLAMA2_7B, "F16", **share)
    v16 = flat_config("llava", llama, LLAMA2_7B, "BF16", **clip)
    ov = flat_config("llava", "LlavaQwenForCausalLM", QWEN2_7B, "BF16", **siglip)
    # LLaVA-1.5 and ShareGPT4V leave the tower in a repository of its own.
    blind = llava_body(LLAMA2_7B, CLIP_HIDDEN, "F16")
    v16_tensors = llava_body(LLAMA2_7B, CLIP_HIDDEN) | llava_eyes(LLAMA2_7B, clip_tower)
    ov_tensors = llava_body(QWEN2_7B, SIGLIP_HIDDEN) | llava_eyes(QWEN2_7B, siglip_tower)
    return [
        Family("llava-1.5-7b-orig", v15, blind | rotary_buffers(LLAMA2_7B), 2, "bin"),
        Family("sharegpt4v-7b", s4v, blind, 2, "bin"),
        Family("llava-v1.6-vicuna-7b-orig", v16, v16_tensors, 3),
        Family("llava-onevision-qwen2-7b-ov-lmms", ov, ov_tensors, 4),
    ]


def cogvlm() -> Family:
    """Return CogVLM-chat."""
    config = flat_config("", "CogVLMForCausalLM", LLAMA2_7B, "BF16")
    config["vision_config"] = {
        "hidden_size": EVA_HIDDEN,
        "intermediate_size": 15360,
        "num_hidden_layers": 63,
        "num_positions": 1226,
        "patch_size": 14,
    }
    # Its remote code gives the class no model_type, and knows no grouped queries.
    del config["model_type"], config["num_key_value_heads"]
    return Family("cogvlm-chat-7b", config, cogvlm_decoder(LLAMA2_7B) | eva_tower(), 8)


def mplug_owl2() -> Family:
    """Return mPLUG-Owl2, whose exporter writes 33 files."""
    visual = {
        "visual_model": {"hidden_size": CLIP_HIDDEN, "num_hidden_layers": 24, "image_size": 448},
        "visual_abstractor": {"hidden_size": CLIP_HIDDEN, "num_learnable_queries": 64},
    }
    config = flat_config("mplug_owl2", "MPLUGOwl2LlamaForCausalLM", LLAMA2_7B, "BF16")
    config["visual_config"] = visual
    tensors = mplug_decoder(LLAMA2_7B) | mplug_tower() | abstractor()
    return Family("mplug-owl2-llama2-7b", config, tensors, 33, "bin")


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *text_families(),
        qwen2vl("qwen2-vl-2b", QWEN2_15B, 2),
        qwen2vl("qwen2-vl-7b", QWEN2_7B, 5),
        qwen25vl("qwen2.5-vl-3b", QWEN2_3B, 2),
        qwen25vl("qwen2.5-vl-7b", QWEN2_7B, 5),
        *llava_hf_families(),
        *llava_original_families(),
        cogvlm(),
        mplug_owl2(),
    )
}


# Folders


def tensor_bytes(dtype: str, shape: Shape) -> int:
    """Return the size of a tensor's data."""
    return ITEM_BYTES[dtype] * prod(shape)


def split_shards(tensors: Tensors, shards: int) -> list[Tensors]:
    """Cut the tensors, in order, into at most ``shards`` non-empty parts of about equal bytes."""
    total = sum(tensor_bytes(*spec) for spec in tensors.values())
    parts: list[Tensors] = [{}]
    seen = 0
    for index, (name, spec) in enumerate(tensors.items()):
        unopened = shards - len(parts)
        full = seen * shards >= total * len(parts) or len(tensors) - index <= unopened
        if parts[-1] and unopened and full:
            parts.append({})
        parts[-1][name] = spec
        seen += tensor_bytes(*spec)
    return parts


def write_hollow(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file with a true header and, for its data, a hole of the right size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_headers(folder: Path, family: Family) -> None:
    """Write a folder that looks like the checkpoint, in sparse files that hold no data.

    Families published as pickled ``.bin`` files are written as safetensors as well: reading
    their layout is all a folder without data can be used for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(family.config, indent=2) + "\n")
    parts = split_shards(family.tensors, family.shards)
    if len(parts) == 1:
        write_hollow(folder / "model.safetensors", parts[0])
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file_name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_hollow(folder / file_name, part)
        weight_map |= dict.fromkeys(part, file_name)
    total = sum(tensor_bytes(*spec) for spec in family.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
