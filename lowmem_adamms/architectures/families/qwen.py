"""Qwen, Qwen2, Qwen2.5 and Qwen3, and what descends from them."""

from __future__ import annotations

from ..arch import Arch
from .spelling import (
    LLAMA,
    MOLMO,
    NESTED,
    PLAIN,
    QIANFAN_OCR,
    QWEN,
)

ARCHS = (
    Arch(
        name="Qwen2",
        source="hf.co/Qwen/Qwen2-7B, Qwen2.5-7B: weight index",
        classes=("Qwen2ForCausalLM", "Qwen2Model"),
        spellings=PLAIN,
        decoder=LLAMA,
        shared_ids=151646,
    ),
    Arch(
        name="Qwen3",
        source="hf.co/Qwen/Qwen3-8B: weight index; q and k norms per head",
        classes=("Qwen3ForCausalLM", "Qwen3Model"),
        spellings=PLAIN,
        decoder=LLAMA,
        shared_ids=151669,
    ),
    Arch(
        name="Qwen and Qwen-VL",
        source="hf.co/Qwen/Qwen-VL: modeling_qwen.py and visual.py; c_attn rows are q, k, v",
        classes=("QWenLMHeadModel",),
        spellings=(("transformer.", "lm_head.weight"),),
        decoder=QWEN,
        others={
            "transformer.visual.": "vision tower",
            "transformer.visual.attn_pool.": "connector",
            "transformer.visual.ln_post.": "connector",
            "transformer.visual.proj": "connector",
        },
        shared_ids=151851,
    ),
    Arch(
        name="Qwen2-VL",
        source="hf.co/Qwen/Qwen2-VL-7B-Instruct: weight index",
        classes=("Qwen2VLForConditionalGeneration", "Qwen2VLModel"),
        spellings=(*PLAIN, *NESTED),
        decoder=LLAMA,
        shared_ids=151646,
    ),
    Arch(
        name="Qwen2.5-VL",
        source="hf.co/Qwen/Qwen2.5-VL-7B-Instruct: weight index",
        classes=("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel"),
        spellings=(*PLAIN, *NESTED),
        decoder=LLAMA,
        shared_ids=151665,
    ),
    Arch(
        name="Qwen3-VL",
        source="hf.co/Qwen/Qwen3-VL-8B-Instruct: weight index",
        classes=("Qwen3VLForConditionalGeneration", "Qwen3VLModel"),
        spellings=NESTED,
        decoder=LLAMA,
        shared_ids=151669,
    ),
    Arch(
        name="LLaVA-OneVision",
        source="hf.co/llava-hf/llava-onevision-qwen2-7b-ov-hf: weight index",
        classes=("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionModel"),
        spellings=NESTED,
        decoder=LLAMA,
        shared_ids=151646,
    ),
    Arch(
        name="LLaVA-OneVision (lmms-lab)",
        source="hf.co/lmms-lab/llava-onevision-qwen2-7b-ov, LLaVA-Video-7B-Qwen2: weight index",
        classes=("LlavaQwenForCausalLM",),
        spellings=PLAIN,
        decoder=LLAMA,
        shared_ids=151646,
    ),
    Arch(
        name="Qianfan-OCR",
        source="transformers, models/qianfan_ocr; save_pretrained calls the layers encoder.layers",
        classes=("QianfanOCRForConditionalGeneration",),
        spellings=(("language_model.model.", "language_model.lm_head.weight"),),
        decoder=QIANFAN_OCR,
        shared_ids=151669,
    ),
    Arch(
        name="InternVL",
        source="OpenGVLab/InternVL, modeling_internvl_chat.py: InternVL2, 2.5, 3 and 3.5 around"
        " Qwen2, Qwen2.5, Qwen3, Llama, InternLM2 or Phi-3",
        classes=("InternVLChatModel",),
        spellings=(
            ("language_model.model.", "language_model.lm_head.weight"),
            ("language_model.model.", "language_model.output.weight"),  # InternLM2's
        ),
        decoder=LLAMA,
    ),
    Arch(
        name="Molmo",
        source="hf.co/allenai/Molmo-7B-D-0924: modeling_molmo.py; att_proj rows are q, k, v and"
        " ff_proj's up, gate",
        classes=("MolmoForCausalLM",),
        spellings=(("model.transformer.", "model.transformer.ff_out.weight"),),
        decoder=MOLMO,
        others={"model.transformer.wte.new_embedding": "rows of added tokens"},
        shared_ids=151646,
    ),
)
