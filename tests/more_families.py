"""More true-size layouts, as in families.py: fused decoders, InternVL, MiniCPM-V, Gemma, others.

Sources as there. Of towers and connectors only some tensors are listed, enough to tell what is
what.
"""

from __future__ import annotations

from dataclasses import replace

from families import (
    LLAMA31_8B,
    QWEN2_3B,
    QWEN2_7B,
    QWEN2_15B,
    QWEN3_4B,
    QWEN3_8B,
    QWEN3_17B,
    DecoderDims,
    Family,
    Shapes,
    Tensors,
    affine,
    cogvlm,
    decoder_config,
    flat_config,
    gated_mlp,
    llama_decoder,
    llava_hf,
    model_config,
    qwen25vl_tower,
    stack,
    typed,
    weight,
)

QWEN2_05B_UNTIED = DecoderDims(896, 4864, 24, 14, 2, 151674, head_dim=64, bias=True)
QWEN_7B = DecoderDims(4096, 11008, 32, 32, 32, 151936, bias=True)
INTERNLM2_7B = DecoderDims(4096, 14336, 32, 32, 8, 92544)
PHI3_MINI = DecoderDims(3072, 8192, 32, 32, 32, 32064, head_dim=96)
SMOLLM2_17B = DecoderDims(2048, 8192, 24, 32, 32, 49152, head_dim=64, tied=True)
GEMMA_2B = DecoderDims(2048, 16384, 18, 8, 1, 256000, head_dim=256, tied=True)
GEMMA2_2B = DecoderDims(2304, 9216, 26, 8, 4, 256000, head_dim=256, tied=True)
GEMMA3_4B = DecoderDims(2560, 10240, 34, 8, 4, 262208, head_dim=256, qk_norm=True, tied=True)
CROSS_LAYERS = range(3, 40, 5)

# Language models


def qkv_rows(dims: DecoderDims) -> int:
    """Return the rows of a fused q, k, v."""
    return (dims.heads + 2 * dims.kv_heads) * dims.head_dim


def internlm2_decoder(dims: DecoderDims, prefix: str = "model.", head: str = "output") -> Tensors:
    """Return InternLM2's decoder: q, k and v interleaved by key-value head."""
    hidden, inner = dims.hidden, dims.intermediate
    block = {
        **weight("attention.wqkv", qkv_rows(dims), hidden),
        **weight("attention.wo", hidden, dims.heads * dims.head_dim),
        **weight("feed_forward.w1", inner, hidden),
        **weight("feed_forward.w2", hidden, inner),
        **weight("feed_forward.w3", inner, hidden),
        **weight("attention_norm", hidden),
        **weight("ffn_norm", hidden),
    }
    body = {
        **weight("tok_embeddings", dims.vocab, hidden),
        **stack("layers", dims.layers, block),
        **weight("norm", hidden),
    }
    return typed(prefix, "BF16", body) | typed("", "BF16", weight(head, dims.vocab, hidden))


def phi3_decoder(dims: DecoderDims, prefix: str = "model.", head: str = "lm_head") -> Tensors:
    """Return Phi-3's decoder: q, k, v in one tensor, gate and up in another."""
    hidden = dims.hidden
    block = {
        **weight("input_layernorm", hidden),
        **weight("self_attn.qkv_proj", qkv_rows(dims), hidden),
        **weight("self_attn.o_proj", hidden, dims.heads * dims.head_dim),
        **weight("post_attention_layernorm", hidden),
        **weight("mlp.gate_up_proj", 2 * dims.intermediate, hidden),
        **weight("mlp.down_proj", hidden, dims.intermediate),
    }
    body = {
        **weight("embed_tokens", dims.vocab, hidden),
        **stack("layers", dims.layers, block),
        **weight("norm", hidden),
    }
    return typed(prefix, "BF16", body) | typed("", "BF16", weight(head, dims.vocab, hidden))


def molmo_decoder(dims: DecoderDims, dtype: str = "F32") -> Tensors:
    """Return Molmo's decoder: q, k, v in one tensor, up and gate in another."""
    hidden, inner = dims.hidden, dims.intermediate
    block = {
        **affine("att_proj", qkv_rows(dims), hidden),
        **weight("attn_out", hidden, dims.heads * dims.head_dim),
        **weight("ff_proj", 2 * inner, hidden),
        **weight("ff_out", hidden, inner),
        **weight("attn_norm", hidden),
        **weight("ff_norm", hidden),
    }
    shapes = {
        "wte.embedding": (dims.vocab, hidden),
        "wte.new_embedding": (128, hidden),
        **stack("blocks", dims.layers, block),
        **weight("ln_f", hidden),
        **weight("ff_out", dims.vocab, hidden),
    }
    return typed("model.transformer.", dtype, shapes)


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
    body = {
        **weight("wte", dims.vocab, hidden),
        **stack("h", dims.layers, block),
        **weight("ln_f", hidden),
    }
    head = weight("lm_head", dims.vocab, hidden)
    return typed("transformer.", "BF16", body) | typed("", "BF16", head)


def gemma2_decoder(dims: DecoderDims, prefix: str = "model.") -> Tensors:
    """Return the decoder of Gemma 2 and 3: two more norms a layer than Llama."""
    more = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    shapes: Shapes = {
        f"layers.{layer}.{name}.weight": (dims.hidden,)
        for layer in range(dims.layers)
        for name in more
    }
    return llama_decoder(dims, prefix) | typed(prefix, "BF16", shapes)


def mllama_decoder(dims: DecoderDims) -> Tensors:
    """Return Mllama's 40 layers: Llama's 32, and one of its own after every fourth or so."""
    text = llama_decoder(
        replace(dims, layers=40), "language_model.model.", "language_model.lm_head"
    )
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
        stem = f"language_model.model.layers.{layer}."
        text = {name: spec for name, spec in text.items() if f"{stem}self_attn." not in name}
        text |= typed(stem, "BF16", cross)
    text["language_model.model.embed_tokens.weight"] = ("BF16", (dims.vocab + 8, dims.hidden))
    return text


def cogvlm2_decoder() -> Tensors:
    """Return CogVLM2's decoder: grouped queries, a bias for the vision expert alone."""
    dims = LLAMA31_8B
    rows = qkv_rows(dims)
    block: Shapes = {}
    for expert in ("vision", "language"):
        qkv = affine if expert == "vision" else weight
        block |= qkv(f"self_attn.{expert}_expert_query_key_value", rows, dims.hidden)
        block |= weight(f"self_attn.{expert}_expert_dense", dims.hidden, dims.hidden)
        block |= gated_mlp(f"mlp.{expert}_mlp", dims.hidden, dims.intermediate)
    block |= weight("input_layernorm", dims.hidden)
    block |= weight("post_attention_layernorm", dims.hidden)
    body = {
        **weight("embed_tokens", dims.vocab, dims.hidden),
        **stack("layers", dims.layers, block),
        **weight("norm", dims.hidden),
    }
    head = weight("lm_head", dims.vocab, dims.hidden)
    return typed("model.", "BF16", body) | typed("", "BF16", head)


# Towers and connectors


def some_of(names: str, prefix: str = "") -> Tensors:
    """Return small stand-ins for some tensors of a tower, enough to tell what is what."""
    return {f"{prefix}{name}": ("BF16", (16, 16)) for name in names.split()}


EVA = some_of("boi patch_embedding.proj.weight conv.bias linear_proj.norm1.bias", "model.vision.")
SIGLIP = some_of("embeddings.patch_embedding.bias encoder.layers.26.mlp.fc1.weight")
IDEFICS3 = some_of("vision_model.post_layernorm.bias", "model.") | some_of(
    "model.connector.modality_projection.proj.weight"
)
INTERN_VIT = some_of("vision_model.encoder.layers.23.ls1 mlp1.0.weight mlp1.3.bias")
INTERN_VIT_HF = some_of(
    "vision_tower.encoder.layer.23.lambda_1 multi_modal_projector.layer_norm.weight"
)
MINICPM = some_of("vpm.embeddings.position_embedding.weight resampler.query resampler.attn.bias")
MLLAMA = some_of(
    "vision_model.class_embedding vision_model.global_transformer.layers.7.gate_ffn"
    " multi_modal_projector.weight"
)
MOLMO = some_of(
    "pad_embed image_pooling_2d.wq.weight image_projector.w1.weight image_vit.class_embedding"
    " image_vit.transformer.resblocks.22.attention.wq.bias",
    "model.vision_backbone.",
)
PHI3_VISION = some_of(
    "glb_GN img_projection.0.weight img_processor.vision_model.post_layernorm.bias",
    "model.vision_embed_tokens.",
)
QWEN3_VL = some_of(
    "pos_embed.weight blocks.23.attn.qkv.weight merger.norm.weight"
    " deepstack_merger_list.2.linear_fc2.bias",
    "model.visual.",
)
SIGLIP_HF = {f"vision_tower.vision_model.{name}": spec for name, spec in SIGLIP.items()}
LINEAR = some_of("multi_modal_projector.linear.weight multi_modal_projector.linear.bias")


# Families


def internvl(name: str, dims: DecoderDims, shards: int) -> Family:
    """Return an InternVL2, 2.5, 3 or 3.5 as OpenGVLab publishes it."""
    dims = replace(dims, tied=False)
    prefix, head = "language_model.model.", "language_model"
    kind = "Qwen3" if dims.qk_norm else "Qwen2"
    tensors = dict(INTERN_VIT)
    if dims.hidden == INTERNLM2_7B.hidden and not dims.qk_norm:
        kind, tensors = "InternLM2", tensors | internlm2_decoder(dims, prefix, f"{head}.output")
    elif dims.hidden == PHI3_MINI.hidden:
        kind, tensors = "Phi3", tensors | phi3_decoder(dims, prefix, f"{head}.lm_head")
    else:
        tensors |= llama_decoder(dims, prefix, f"{head}.lm_head")
    text = {"architectures": [f"{kind}ForCausalLM"], **decoder_config(dims)}
    config = model_config("internvl_chat", "InternVLChatModel", dims, "BF16", llm_config=text)
    return Family(name, config, tensors, shards)


def internvl_hf(name: str, dims: DecoderDims, shards: int) -> Family:
    """Return the same as converted for transformers."""
    tensors = llama_decoder(dims, "language_model.model.", "language_model.lm_head")
    config = nested("internvl", "InternVLForConditionalGeneration", dims)
    return Family(name, config, tensors | INTERN_VIT_HF, shards)


def nested(model_type: str, architecture: str, dims: DecoderDims) -> dict[str, object]:
    """Return a config.json that has the decoder's sizes in `text_config`."""
    text = decoder_config(dims)
    return model_config(model_type, architecture, dims, "BF16", text_config=text)


def flat(
    name: str, architecture: str, dims: DecoderDims, tensors: Tensors, shards: int = 2
) -> Family:
    """Return a model whose config.json has the decoder's sizes at its top level."""
    dtype = next(iter(tensors.values()))[0]
    kind = architecture.partition("For")[0].lower()
    dtype = "BF16" if dtype == "F32" else dtype
    return Family(name, flat_config(kind, architecture, dims, dtype), tensors, shards)


def deep(
    name: str, architecture: str, dims: DecoderDims, tensors: Tensors, shards: int = 2
) -> Family:
    """Return a model whose config.json has the decoder's sizes in `text_config`."""
    kind = architecture.partition("For")[0].lower()
    return Family(name, nested(kind, architecture, dims), tensors, shards)


def llama_families() -> list[Family]:
    """Return Llama-3 and SmolLM2, and what descends from them."""
    llama3, smol = LLAMA31_8B, SMOLLM2_17B
    cog = dict(cogvlm().config, **decoder_config(llama3))
    idefics = replace(llama3, vocab=128259)
    smolvlm = replace(smol, vocab=49155, tied=False)
    text = "model.text_model."
    next8b = replace(llama3, vocab=128320)
    return [
        flat("llama-3-8b", "LlamaForCausalLM", llama3, llama_decoder(llama3), 4),
        flat("smollm2-1.7b", "LlamaForCausalLM", smol, llama_decoder(smol), 1),
        Family("cogvlm2-llama3-chat-19b", cog, cogvlm2_decoder() | EVA, 8),
        llava_hf("llama3-llava-next-8b-hf", "next", "llama", next8b, 4),
        flat(
            "minicpm-llama3-v-2_5",
            "MiniCPMV",
            llama3,
            llama_decoder(llama3, "llm.model.", "llm.lm_head") | MINICPM,
        ),
        deep(
            "idefics3-8b",
            "Idefics3ForConditionalGeneration",
            idefics,
            llama_decoder(idefics, text) | IDEFICS3,
            4,
        ),
        deep(
            "smolvlm-instruct",
            "SmolVLMForConditionalGeneration",
            smolvlm,
            llama_decoder(smolvlm, text) | IDEFICS3,
            1,
        ),
        deep(
            "mllama-11b",
            "MllamaForConditionalGeneration",
            llama3,
            mllama_decoder(llama3) | MLLAMA,
            5,
        ),
    ]


def qwen_families() -> list[Family]:
    """Return more descendants of Qwen2, Qwen2.5 and Qwen3."""
    nested_prefix, seven = "model.language_model.", QWEN2_7B
    intern = replace(seven, vocab=151674)
    minicpm = replace(seven, vocab=151666)
    qwen3vl = "Qwen3VLForConditionalGeneration"
    thinker = llama_decoder(seven) | qwen25vl_tower(3584) | some_of("audio_tower.conv1.weight")
    talker = llama_decoder(QWEN2_05B_UNTIED, "talker.model.", "talker.codec_head")
    omni = {f"thinker.{name}": spec for name, spec in thinker.items()}
    omni |= talker | some_of("token2wav.code2wav_dit_model.proj_out.weight")
    ov15 = llama_decoder(QWEN3_8B) | some_of(
        "visual.blocks.0.attn.qkv.weight visual.merger.ln_q.weight"
    )
    eyes3 = some_of("vision_encoder.encoder.layers.0.mlp.fc1.weight mm_projector.readout.0.weight")
    videollama = llama_decoder(seven) | {f"model.{name}": spec for name, spec in eyes3.items()}
    videollama_hf = llama_decoder(seven, nested_prefix) | some_of(
        "model.vision_model.encoder.layers.0.mlp.fc1.weight model.projector.readout.0.weight"
    )
    ovis = llama_decoder(seven, "llm.model.", "llm.lm_head") | some_of(
        "visual_tokenizer.backbone.preprocessor.pos_embed visual_tokenizer.head.0.weight vte.weight"
    )
    ovis_hf = llama_decoder(seven, nested_prefix) | some_of(
        "model.vision_tower.head_linear.weight model.visual_embeddings_table.weight"
    )
    omni_config = model_config("qwen2_5_omni", "Qwen2_5OmniModel", seven, "BF16")
    omni_config["thinker_config"] = {"text_config": decoder_config(seven)}
    return [
        internvl("internvl2_5-1b", QWEN2_05B_UNTIED, 1),
        internvl("internvl2_5-4b", replace(QWEN2_3B, vocab=151674), 2),
        internvl("internvl3-2b", replace(QWEN2_15B, vocab=151674), 1),
        internvl("internvl3-8b", intern, 4),
        internvl_hf("internvl3-8b-hf", intern, 4),
        internvl("internvl3_5-8b", QWEN3_8B, 4),
        internvl_hf("internvl3_5-8b-hf", QWEN3_8B, 4),
        flat(
            "minicpm-v-2_6",
            "MiniCPMV",
            minicpm,
            llama_decoder(minicpm, "llm.model.", "llm.lm_head") | MINICPM,
            4,
        ),
        *(
            deep(name, qwen3vl, dims, llama_decoder(dims, nested_prefix) | QWEN3_VL)
            for name, dims in (
                ("qwen3-vl-2b", QWEN3_17B),
                ("qwen3-vl-4b", QWEN3_4B),
                ("qwen3-vl-8b", QWEN3_8B),
            )
        ),
        Family("qwen2.5-omni-7b", omni_config, omni, 5),
        deep("qwen2.5-omni-thinker", "Qwen2_5OmniThinkerForConditionalGeneration", seven, thinker),
        deep(
            "llava-onevision-1.5-8b", "LLaVAOneVision1_5_ForConditionalGeneration", QWEN3_8B, ov15
        ),
        flat("videollama3-7b", "Videollama3Qwen2ForCausalLM", seven, videollama),
        deep("videollama3-7b-hf", "VideoLlama3ForConditionalGeneration", seven, videollama_hf),
        flat("ovis2-8b", "Ovis", seven, ovis),
        deep("ovis2-8b-hf", "Ovis2ForConditionalGeneration", seven, ovis_hf),
        flat(
            "molmo-7b-d",
            "MolmoForCausalLM",
            seven,
            molmo_decoder(seven) | MOLMO,
            7,
        ),
        flat("qwen-7b", "QWenLMHeadModel", QWEN_7B, qwen_decoder(QWEN_7B), 8),
        flat(
            "qwen-vl",
            "QWenLMHeadModel",
            QWEN_7B,
            qwen_decoder(QWEN_7B)
            | some_of(
                "transformer.visual.transformer.resblocks.0.attn.in_proj_weight"
                " transformer.visual.conv1.weight transformer.visual.attn_pool.query"
                " transformer.visual.ln_post.weight transformer.visual.proj"
            ),
            10,
        ),
    ]


def other_families() -> list[Family]:
    """Return InternLM2, Phi-3, Gemma, and what descends from them."""
    lm2, phi, hf = INTERNLM2_7B, PHI3_MINI, "language_model.model."
    pali, pali2 = replace(GEMMA_2B, vocab=257216), replace(GEMMA2_2B, vocab=257216)
    paligemma, gemma3 = "PaliGemmaForConditionalGeneration", "Gemma3ForConditionalGeneration"
    soft = some_of(
        "multi_modal_projector.mm_input_projection_weight"
        " multi_modal_projector.mm_soft_emb_norm.weight"
    )

    return [
        flat("internlm2_5-7b-chat", "InternLM2ForCausalLM", lm2, internlm2_decoder(lm2), 8),
        internvl("internvl2_5-8b", replace(lm2, vocab=92553), 4),
        flat("phi-3.5-mini", "Phi3ForCausalLM", phi, phi3_decoder(phi)),
        flat("phi-3.5-vision", "Phi3VForCausalLM", phi, phi3_decoder(phi) | PHI3_VISION),
        internvl("internvl2-4b", replace(phi, vocab=32020), 2),
        flat("gemma-2b", "GemmaForCausalLM", GEMMA_2B, llama_decoder(GEMMA_2B)),
        deep("paligemma-3b", paligemma, pali, llama_decoder(pali, hf) | SIGLIP_HF | LINEAR),
        flat("gemma-2-2b", "Gemma2ForCausalLM", GEMMA2_2B, gemma2_decoder(GEMMA2_2B)),
        deep("paligemma2-3b", paligemma, pali2, gemma2_decoder(pali2, hf) | SIGLIP_HF | LINEAR),
        flat("gemma-3-4b-text", "Gemma3ForCausalLM", GEMMA3_4B, gemma2_decoder(GEMMA3_4B)),
        deep("gemma-3-4b", gemma3, GEMMA3_4B, gemma2_decoder(GEMMA3_4B, hf) | SIGLIP_HF | soft),
    ]


MORE: dict[str, Family] = {
    family.name: family for family in (*llama_families(), *qwen_families(), *other_families())
}
