"""InternLM2, Phi-3, Gemma 2, OLMo 2 and others that spell their decoders in ways of their own."""

from __future__ import annotations

from ..arch import Arch
from .spelling import (
    ERNIE_VL,
    GEMMA2,
    GPT_OSS,
    GPT_OSS_INTERLEAVED,
    INKLING,
    INKLING_INTERLEAVED,
    INTERNLM2,
    INTERNLM2_INTERLEAVED,
    NESTED,
    OLMO2,
    PHI3,
    PLAIN,
)

ARCHS = (
    Arch(
        name="InternLM2",
        source="hf.co/internlm/internlm2_5-7b-chat: weight index and modeling_internlm2.py;"
        " every published size has heads of 128",
        classes=("InternLM2ForCausalLM", "InternLM2Model"),
        spellings=(("model.", "output.weight"), ("", "output.weight")),
        decoder=INTERNLM2,
        shared_ids=92544,
        interleaved=INTERNLM2_INTERLEAVED,
        head_dim=128,
    ),
    Arch(
        name="Phi-3",
        source="transformers, models/phi3: qkv_proj rows are q, k, v and gate_up_proj's gate, up",
        classes=("Phi3ForCausalLM", "Phi3Model"),
        spellings=PLAIN,
        decoder=PHI3,
        shared_ids=32011,
    ),
    Arch(
        name="Gemma 2",
        source="transformers, models/gemma2",
        classes=("Gemma2ForCausalLM", "Gemma2Model"),
        spellings=PLAIN,
        decoder=GEMMA2,
        shared_ids=256000,
    ),
    Arch(
        name="OLMo 2",
        source="transformers, models/olmo2; Molmo-7B-O descends from its like",
        classes=("Olmo2ForCausalLM", "Olmo2Model"),
        spellings=PLAIN,
        decoder=OLMO2,
    ),
    Arch(
        name="Inkling",
        source="transformers, models/inkling_mm_model and conversion_mapping.py: gate and up"
        " alternate row by row",
        classes=("InklingForConditionalGeneration",),
        spellings=(("model.llm.", "model.llm.unembed.weight"),),
        decoder=INKLING,
        interleaved=INKLING_INTERLEAVED,
    ),
    Arch(
        name="ERNIE 4.5 VL",
        source="transformers, models/ernie4_5_vl_moe and conversion_mapping.py;"
        " hf.co/baidu/ERNIE-4.5-VL-28B-A3B-PT",
        classes=(
            "Ernie4_5_VLMoeForConditionalGeneration",
            "Ernie4_5_VL_MoeForConditionalGeneration",
            "Ernie4_5_VLMoeModel",
        ),
        spellings=(*PLAIN, *NESTED),
        decoder=ERNIE_VL,
    ),
    Arch(
        name="gpt-oss",
        source="transformers, models/gpt_oss: gate is every second column from 0, up from 1",
        classes=("GptOssForCausalLM", "GptOssModel"),
        spellings=PLAIN,
        decoder=GPT_OSS,
        shared_ids=199998,
        interleaved=GPT_OSS_INTERLEAVED,
    ),
)
