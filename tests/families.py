"""True-size layouts (tensor names, dtypes, shapes; no data) of public checkpoint families.

The names come from the ``*.index.json`` files published in Hugging Face repositories, from the
transformers modelling code and, for models with their own code (LLaVA, ShareGPT4V, CogVLM,
mPLUG-Owl2), from that code and the authors' export scripts. Everything is composed from a few
dimensions, so a layout can be read, and checked against a model card, at a glance. Of most towers
and connectors only some tensors are listed, enough to tell what is what.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

from lowmem_adamms.checkpoints.dtypes import DTYPES
from lowmem_adamms.checkpoints.safetensors_header import build_header

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = dict[str, Shape]
Tensors: TypeAlias = dict[str, tuple[str, Shape]]
Config: TypeAlias = dict[str, Any]

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8}
TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16"}
CLIP_HIDDEN = 1024
SIGLIP_HIDDEN = 1152
QWEN_VISION_HIDDEN = 1280


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

    @property
    def qkv_rows(self) -> int:
        """The rows of a fused q, k, v."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True)
class Family:
    """One published checkpoint: its configuration and its tensors."""

    name: str
    config: Config
    tensors: Tensors


LLAMA2_7B = DecoderDims(4096, 11008, 32, 32, 32, 32000)
LLAMA3_8B = DecoderDims(4096, 14336, 32, 32, 8, 128256)
MISTRAL_7B = DecoderDims(4096, 14336, 32, 32, 8, 32000)
QWEN_7B = DecoderDims(4096, 11008, 32, 32, 32, 151936, bias=True)
QWEN2_15B = DecoderDims(1536, 8960, 28, 12, 2, 151936, bias=True, tied=True)
QWEN2_3B = DecoderDims(2048, 11008, 36, 16, 2, 151936, bias=True, tied=True)
QWEN2_7B = DecoderDims(3584, 18944, 28, 28, 4, 152064, bias=True)
QWEN3_8B = DecoderDims(4096, 12288, 36, 32, 8, 151936, qk_norm=True)
INTERNLM2_7B = DecoderDims(4096, 14336, 32, 32, 8, 92544)
PHI3_MINI = DecoderDims(3072, 8192, 32, 32, 32, 32064, head_dim=96)
GEMMA3_4B = DecoderDims(2560, 10240, 34, 8, 4, 262208, head_dim=256, qk_norm=True, tied=True)
CROSS_LAYERS = range(3, 40, 5)
"""Mllama's own layers, one after every fourth or so of Llama's 32."""


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


def some_of(names: str, prefix: str = "") -> Tensors:
    """Return small stand-ins for some tensors of a tower."""
    return {f"{prefix}{name}": ("BF16", (16, 16)) for name in names.split()}


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


def decoder_around(
    block: Shapes,
    dims: DecoderDims,
    prefix: str = "model.",
    head: str = "lm_head",
    dtype: str = "BF16",
    names: tuple[str, str, str] = ("embed_tokens.weight", "layers", "norm"),
) -> Tensors:
    """Put embeddings, final norm and, where it is not tied, the head around the layers."""
    embed, layers, norm = names
    body = {
        embed: (dims.vocab, dims.hidden),
        **stack(layers, dims.layers, block),
        **weight(norm, dims.hidden),
    }
    output = {} if dims.tied else weight(head, dims.vocab, dims.hidden)
    return typed(prefix, dtype, body) | typed("", dtype, output)


def rotary_buffers(dims: DecoderDims, prefix: str = "model.") -> Tensors:
    """Return the rotary frequencies that older exporters saved, in F32 whatever the model is."""
    buffer: Shapes = {"self_attn.rotary_emb.inv_freq": (dims.head_dim // 2,)}
    return typed(prefix, "F32", stack("layers", dims.layers, buffer))


def cogvlm_decoder(dims: DecoderDims, *, vision_bias: bool = False) -> Tensors:
    """Return CogVLM's decoder: attention (fused) and MLP exist once per modality.

    vision_bias: as in CogVLM2, of the fused q, k, v.
    """
    hidden = dims.hidden
    block: Shapes = {}
    for expert in ("vision", "language"):
        qkv = affine if vision_bias and expert == "vision" else weight
        block |= qkv(f"self_attn.{expert}_expert_query_key_value", dims.qkv_rows, hidden)
        block |= weight(f"self_attn.{expert}_expert_dense", hidden, hidden)
        block |= gated_mlp(f"mlp.{expert}_mlp", hidden, dims.intermediate)
    block |= weight("input_layernorm", hidden)
    block |= weight("post_attention_layernorm", hidden)
    return decoder_around(block, dims)


def mplug_decoder(dims: DecoderDims) -> Tensors:
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
    return decoder_around(block, dims) | rotary_buffers(dims)


def internlm2_decoder(dims: DecoderDims, prefix: str = "model.", head: str = "output") -> Tensors:
    """Return InternLM2's decoder: q, k and v interleaved by key-value head."""
    hidden, inner = dims.hidden, dims.intermediate
    block = {
        **weight("attention.wqkv", dims.qkv_rows, hidden),
        **weight("attention.wo", hidden, dims.heads * dims.head_dim),
        **weight("feed_forward.w1", inner, hidden),
        **weight("feed_forward.w2", hidden, inner),
        **weight("feed_forward.w3", inner, hidden),
        **weight("attention_norm", hidden),
        **weight("ffn_norm", hidden),
    }
    names = ("tok_embeddings.weight", "layers", "norm")
    return decoder_around(block, dims, prefix, head, names=names)


def phi3_decoder(dims: DecoderDims) -> Tensors:
    """Return Phi-3's decoder: q, k, v in one tensor, gate and up in another."""
    hidden = dims.hidden
    block = {
        **weight("input_layernorm", hidden),
        **weight("self_attn.qkv_proj", dims.qkv_rows, hidden),
        **weight("self_attn.o_proj", hidden, dims.heads * dims.head_dim),
        **weight("post_attention_layernorm", hidden),
        **weight("mlp.gate_up_proj", 2 * dims.intermediate, hidden),
        **weight("mlp.down_proj", hidden, dims.intermediate),
    }
    return decoder_around(block, dims)


def molmo_decoder(dims: DecoderDims) -> Tensors:
    """Return Molmo's decoder: q, k, v in one tensor, up and gate in another."""
    hidden, prefix = dims.hidden, "model.transformer."
    block = {
        **affine("att_proj", dims.qkv_rows, hidden),
        **weight("attn_out", hidden, dims.heads * dims.head_dim),
        **weight("ff_proj", 2 * dims.intermediate, hidden),
        **weight("ff_out", hidden, dims.intermediate),
        **weight("attn_norm", hidden),
        **weight("ff_norm", hidden),
    }
    names = ("wte.embedding", "blocks", "ln_f")
    added = typed(prefix, "F32", {"wte.new_embedding": (128, hidden)})
    return decoder_around(block, dims, prefix, f"{prefix}ff_out", "F32", names) | added


def qwen_decoder(dims: DecoderDims) -> Tensors:
    """Return the first Qwen's decoder: only the fused q, k, v have a bias."""
    hidden, inner = dims.hidden, dims.intermediate
    block = {
        **weight("ln_1", hidden),
        **affine("attn.c_attn", 3 * hidden, hidden),
        **weight("attn.c_proj", hidden, hidden),
        **weight("ln_2", hidden),
        **weight("mlp.w1", inner, hidden),
        **weight("mlp.w2", inner, hidden),
        **weight("mlp.c_proj", hidden, inner),
    }
    return decoder_around(block, dims, "transformer.", names=("wte.weight", "h", "ln_f"))


def gemma2_decoder(dims: DecoderDims, prefix: str = "model.") -> Tensors:
    """Return the decoder of Gemma 2 and 3: two more norms a layer than Llama."""
    norms: Shapes = {
        f"{name}_feedforward_layernorm.weight": (dims.hidden,) for name in ("pre", "post")
    }
    more = typed(prefix, "BF16", stack("layers", dims.layers, norms))
    return llama_decoder(dims, prefix) | more


def mllama_decoder(dims: DecoderDims) -> Tensors:
    """Return Mllama's 40 layers: Llama's 32, and CROSS_LAYERS of its own."""
    prefix = "language_model.model."
    text = llama_decoder(replace(dims, layers=40), prefix, "language_model.lm_head")
    kv_rows = dims.kv_heads * dims.head_dim
    cross: Shapes = {
        **weight("cross_attn.q_proj", dims.hidden, dims.hidden),
        **weight("cross_attn.k_proj", kv_rows, dims.hidden),
        **weight("cross_attn.v_proj", kv_rows, dims.hidden),
        **weight("cross_attn.o_proj", dims.hidden, dims.hidden),
        **weight("cross_attn.q_norm", dims.head_dim),
        **weight("cross_attn.k_norm", dims.head_dim),
        "cross_attn_attn_gate": (1,),
        "cross_attn_mlp_gate": (1,),
    }
    for layer in CROSS_LAYERS:
        stem = f"{prefix}layers.{layer}."
        text = {name: spec for name, spec in text.items() if f"{stem}self_attn." not in name}
        text |= typed(stem, "BF16", cross)
    text[f"{prefix}embed_tokens.weight"] = ("BF16", (dims.vocab + 8, dims.hidden))
    return text


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
    model_type: str, architecture: str, dims: DecoderDims, dtype: str = "BF16", **more: Any
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
    model_type: str, architecture: str, dims: DecoderDims, dtype: str = "BF16"
) -> Config:
    """Return a config.json that has the decoder's sizes at its top level."""
    return model_config(model_type, architecture, dims, dtype, **decoder_config(dims))


def flat(name: str, architecture: str, dims: DecoderDims, tensors: Tensors) -> Family:
    """Return a model whose config.json has the decoder's sizes at its top level."""
    kind = architecture.partition("For")[0].lower()
    return Family(name, flat_config(kind, architecture, dims), tensors)


def text_families() -> list[Family]:
    """Return the language models the others descend from."""
    rows = [
        ("llama-2-7b", "Llama", LLAMA2_7B, "F16"),
        ("llama-3-8b", "Llama", LLAMA3_8B, "BF16"),
        ("qwen2-1.5b", "Qwen2", QWEN2_15B, "BF16"),
        ("qwen2-7b", "Qwen2", QWEN2_7B, "BF16"),
        ("qwen2.5-3b", "Qwen2", QWEN2_3B, "BF16"),
        ("qwen3-8b", "Qwen3", QWEN3_8B, "BF16"),
        ("mistral-7b", "Mistral", MISTRAL_7B, "BF16"),
    ]
    families = []
    for name, kind, dims, dtype in rows:
        config = flat_config(kind.lower(), f"{kind}ForCausalLM", dims, dtype)
        families.append(Family(name, config, llama_decoder(dims, dtype=dtype)))
    return families


def qwen2vl(name: str, dims: DecoderDims) -> Family:
    """Return a Qwen2-VL model."""
    tensors = llama_decoder(dims) | qwen2vl_tower(dims.hidden)
    return flat(name, "Qwen2VLForConditionalGeneration", dims, tensors)


def qwen25vl(name: str, dims: DecoderDims) -> Family:
    """Return a Qwen2.5-VL model."""
    tensors = llama_decoder(dims) | qwen25vl_tower(dims.hidden)
    return flat(name, "Qwen2_5_VLForConditionalGeneration", dims, tensors)


def llava_hf(name: str, kind: str, text_type: str, dims: DecoderDims, **more: Any) -> Family:
    """Return a LLaVA model as the llava-hf organisation converted it (all of them in F16)."""
    model_type, architecture = {
        "1.5": ("llava", "LlavaForConditionalGeneration"),
        "next": ("llava_next", "LlavaNextForConditionalGeneration"),
        "onevision": ("llava_onevision", "LlavaOnevisionForConditionalGeneration"),
    }[kind]
    make_tower, width = clip_tower, CLIP_HIDDEN
    if kind == "onevision":
        make_tower, width = siglip_tower, SIGLIP_HIDDEN
    text = {"model_type": text_type, **decoder_config(dims)}
    config = model_config(model_type, architecture, dims, "F16", text_config=text, **more)
    names = "multi_modal_projector.linear_1", "multi_modal_projector.linear_2"
    tensors = {
        **llama_decoder(dims, "language_model.model.", "language_model.lm_head", "F16"),
        **make_tower("vision_tower.vision_model.", "F16"),
        **projector(*names, width, dims.hidden, "F16"),
    }
    if kind != "1.5":  # the first LLaVA does not cut images into tiles
        tensors["image_newline"] = ("F16", (dims.hidden,))
    return Family(name, config, tensors)


def llava_hf_families() -> list[Family]:
    """Return the llava-hf conversions; they pad the vocabulary for their image tokens."""
    vicuna = replace(LLAMA2_7B, vocab=32064)
    mistral = replace(MISTRAL_7B, vocab=32064)
    qwen2 = replace(QWEN2_7B, vocab=152128)
    tokens = {"image_token_index": 151646, "video_token_index": 151647}
    clip = {"image_token_index": 32000}
    return [
        llava_hf("llava-1.5-7b-hf", "1.5", "llama", vicuna, **clip),
        llava_hf("llava-v1.6-mistral-7b-hf", "next", "mistral", mistral, **clip),
        llava_hf("llava-onevision-qwen2-7b-ov-hf", "onevision", "qwen2", qwen2, **tokens),
    ]


def llava_original_families() -> list[Family]:
    """Return the models of the original LLaVA code and of its descendants."""
    projectors = "model.mm_projector.0", "model.mm_projector.2"
    # LLaVA-1.5 and ShareGPT4V leave the tower in a repository of its own
    blind = llama_decoder(LLAMA2_7B, dtype="F16")
    blind |= projector(*projectors, CLIP_HIDDEN, LLAMA2_7B.hidden, "F16")
    share = flat_config("share4v", "Share4VLlamaForCausalLM", LLAMA2_7B, "F16")
    llava = flat_config("llava", "LlavaLlamaForCausalLM", LLAMA2_7B, "F16")
    onevision: Tensors = {
        **llama_decoder(QWEN2_7B),
        **projector(*projectors, SIGLIP_HIDDEN, QWEN2_7B.hidden),
        "model.image_newline": ("BF16", (QWEN2_7B.hidden,)),
        **siglip_tower("model.vision_tower.vision_tower.vision_model."),
    }
    return [
        Family("llava-1.5-7b-orig", llava, blind | rotary_buffers(LLAMA2_7B)),
        Family("sharegpt4v-7b", share, blind),
        flat("llava-onevision-qwen2-7b-ov-lmms", "LlavaQwenForCausalLM", QWEN2_7B, onevision),
    ]


def cogvlm_families() -> list[Family]:
    """Return CogVLM-chat and CogVLM2-chat."""
    vision = some_of("boi patch_embedding.proj.weight linear_proj.norm1.bias", "model.vision.")
    families = []
    for name, dims in (("cogvlm-chat-7b", LLAMA2_7B), ("cogvlm2-llama3-chat-19b", LLAMA3_8B)):
        config = flat_config("", "CogVLMForCausalLM", dims)
        # CogVLM's remote code gives the class no model_type, and knows no grouped queries
        del config["model_type"]
        if dims == LLAMA2_7B:
            del config["num_key_value_heads"]
        tensors = cogvlm_decoder(dims, vision_bias=dims == LLAMA3_8B) | vision
        families.append(Family(name, config, tensors))
    return families


def mplug_owl2() -> Family:
    """Return mPLUG-Owl2."""
    eyes = some_of("vision_model.post_layernorm.bias visual_abstractor.query_embeds", "model.")
    tensors = mplug_decoder(LLAMA2_7B) | eyes
    return flat("mplug-owl2-llama2-7b", "MPLUGOwl2LlamaForCausalLM", LLAMA2_7B, tensors)


def internvl(name: str, kind: str, dims: DecoderDims, decoder: Tensors) -> Family:
    """Return an InternVL as OpenGVLab publishes it."""
    tower = some_of("vision_model.encoder.layers.23.ls1 mlp1.0.weight mlp1.3.bias")
    text = {"architectures": [f"{kind}ForCausalLM"], **decoder_config(dims)}
    config = model_config("internvl_chat", "InternVLChatModel", dims, llm_config=text)
    return Family(name, config, decoder | tower)


def internvl_families() -> list[Family]:
    """Return an InternVL of Qwen2.5 and one of InternLM2."""
    # InternVL stores its head although Qwen2.5-3B ties it
    qwen, lm2 = replace(QWEN2_3B, vocab=151674, tied=False), replace(INTERNLM2_7B, vocab=92553)
    prefix = "language_model.model."
    qwen_text = llama_decoder(qwen, prefix, "language_model.lm_head")
    lm2_text = internlm2_decoder(lm2, prefix, "language_model.output")
    return [
        internvl("internvl2_5-4b", "Qwen2", qwen, qwen_text),
        internvl("internvl2_5-8b", "InternLM2", lm2, lm2_text),
    ]


def nested_families() -> list[Family]:
    """Return Mllama, Gemma 3 and Qwen2.5-Omni, whose configs have the sizes further in."""
    mllama = mllama_decoder(LLAMA3_8B) | some_of(
        "vision_model.class_embedding vision_model.global_transformer.layers.7.gate_ffn"
        " multi_modal_projector.weight"
    )
    gemma = gemma2_decoder(GEMMA3_4B, "language_model.model.") | some_of(
        "vision_tower.vision_model.encoder.layers.26.mlp.fc1.weight"
        " multi_modal_projector.mm_soft_emb_norm.weight"
    )
    thinker = llama_decoder(QWEN2_7B) | some_of(
        "visual.blocks.0.norm1.weight visual.merger.ln_q.weight audio_tower.conv1.weight"
    )
    talker = DecoderDims(896, 4864, 24, 14, 2, 151674, head_dim=64, bias=True)
    omni = {
        **{f"thinker.{name}": spec for name, spec in thinker.items()},
        **llama_decoder(talker, "talker.model.", "talker.codec_head"),
        **some_of("token2wav.code2wav_dit_model.proj_out.weight"),
    }
    families = []
    for name, cls, dims, tensors in (
        ("mllama-11b", "MllamaForConditionalGeneration", LLAMA3_8B, mllama),
        ("gemma-3-4b", "Gemma3ForConditionalGeneration", GEMMA3_4B, gemma),
        ("qwen2.5-omni-7b", "Qwen2_5OmniModel", QWEN2_7B, omni),
    ):
        text = {"text_config": decoder_config(dims)}
        inner = {"thinker_config": text} if cls == "Qwen2_5OmniModel" else text
        families.append(Family(name, model_config("", cls, dims, **inner), tensors))
    return families


def other_families() -> list[Family]:
    """Return Molmo, the first Qwen, InternLM2, Phi-3 and Gemma 3."""
    molmo = molmo_decoder(QWEN2_7B) | some_of(
        "pad_embed image_pooling_2d.wq.weight image_projector.w1.weight image_vit.class_embedding",
        "model.vision_backbone.",
    )
    qwen = qwen_decoder(QWEN_7B)
    qwen_vl = qwen | some_of(
        "conv1.weight attn_pool.query ln_post.weight proj", "transformer.visual."
    )
    phi = phi3_decoder(PHI3_MINI)
    phi_vision = phi | some_of(
        "glb_GN img_processor.vision_model.post_layernorm.bias", "model.vision_embed_tokens."
    )
    lm2 = internlm2_decoder(INTERNLM2_7B)
    return [
        flat("molmo-7b-d", "MolmoForCausalLM", QWEN2_7B, molmo),
        flat("qwen-7b", "QWenLMHeadModel", QWEN_7B, qwen),
        flat("qwen-vl", "QWenLMHeadModel", QWEN_7B, qwen_vl),
        flat("internlm2_5-7b-chat", "InternLM2ForCausalLM", INTERNLM2_7B, lm2),
        flat("phi-3.5-mini", "Phi3ForCausalLM", PHI3_MINI, phi),
        flat("phi-3.5-vision", "Phi3VForCausalLM", PHI3_MINI, phi_vision),
        flat("gemma-3-4b-text", "Gemma3ForCausalLM", GEMMA3_4B, gemma2_decoder(GEMMA3_4B)),
    ]


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *text_families(),
        qwen2vl("qwen2-vl-7b", QWEN2_7B),
        qwen25vl("qwen2.5-vl-3b", QWEN2_3B),
        qwen25vl("qwen2.5-vl-7b", QWEN2_7B),
        *llava_hf_families(),
        *llava_original_families(),
        *cogvlm_families(),
        mplug_owl2(),
        *internvl_families(),
        *nested_families(),
        *other_families(),
    )
}


# Folders


def tensor_bytes(dtype: str, shape: Shape) -> int:
    """Return the size of a tensor's data."""
    return ITEM_BYTES[dtype] * prod(shape)


def write_headers(folder: Path, family: Family) -> None:
    """Write a folder that looks like the checkpoint: a true header, for its data a hole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(family.config))
    specs = [(name, DTYPES[dtype], shape) for name, (dtype, shape) in family.tensors.items()]
    header = build_header(specs, {"format": "pt"})
    nbytes = sum(tensor_bytes(*spec) for spec in family.tensors.values())
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + nbytes)
