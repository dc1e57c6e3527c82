"""InternLM2, Phi-3, Gemma and OLMo 2, and what descends from them."""

from __future__ import annotations

from ..layout import Arch
from .spelling import (
    CONNECTOR,
    GEMMA2,
    INTERNLM2,
    INTERNLM2_INTERLEAVED,
    LLAMA,
    LLAVA_HF,
    NESTED,
    OLMO2,
    PHI3,
    PLAIN,
    TOWER,
)

_INTERNVL = {"vision_model.": TOWER, "mlp1.": CONNECTOR}
_PALIGEMMA = ("PaliGemmaForConditionalGeneration", "PaliGemmaModel")

ARCHS = (
    Arch(
        name="InternLM2",
        source="hf.co/internlm/internlm2_5-7b-chat: weight index and modeling_internlm2.py;"
        " every published size has heads of 128",
        classes=("InternLM2ForCausalLM", "InternLM2Model"),
        spellings=(("model.", "output.weight"), ("", "output.weight")),
        decoder=INTERNLM2,
        others={},
        shared_ids=92544,
        interleaved=INTERNLM2_INTERLEAVED,
        head_dim=128,
    ),
    Arch(
        name="InternVL (InternLM2)",
        source="OpenGVLab/InternVL, modeling_internvl_chat.py and modeling_internlm2.py",
        classes=("InternVLChatModel",),
        spellings=(("language_model.model.", "language_model.output.weight"),),
        decoder=INTERNLM2,
        others=_INTERNVL,
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
        others={},
        shared_ids=32011,
    ),
    Arch(
        name="Phi-3-vision",
        source="hf.co/microsoft/Phi-3-vision-128k-instruct: weight index; Phi-3.5-vision is alike",
        classes=("Phi3VForCausalLM",),
        spellings=PLAIN,
        decoder=PHI3,
        others={
            "model.vision_embed_tokens.": CONNECTOR,
            "model.vision_embed_tokens.img_processor.": TOWER,
        },
        shared_ids=32011,
    ),
    Arch(
        name="InternVL (Phi-3)",
        source="OpenGVLab/InternVL, modeling_internvl_chat.py: InternVL2-4B",
        classes=("InternVLChatModel",),
        spellings=(("language_model.model.", "language_model.lm_head.weight"),),
        decoder=PHI3,
        others=_INTERNVL,
        shared_ids=32011,
    ),
    Arch(
        name="Gemma",
        source="transformers, models/gemma",
        classes=("GemmaForCausalLM", "GemmaModel"),
        spellings=PLAIN,
        decoder=LLAMA,
        others={},
        shared_ids=256000,
    ),
    Arch(
        name="Gemma 2",
        source="transformers, models/gemma2",
        classes=("Gemma2ForCausalLM", "Gemma2Model"),
        spellings=PLAIN,
        decoder=GEMMA2,
        others={},
        shared_ids=256000,
    ),
    Arch(
        name="PaliGemma",
        source="transformers, models/paligemma and conversion_mapping.py: around Gemma",
        classes=_PALIGEMMA,
        spellings=NESTED,
        decoder=LLAMA,
        others=LLAVA_HF,
        shared_ids=256000,
    ),
    Arch(
        name="PaliGemma 2",
        source="transformers, models/paligemma and conversion_mapping.py: around Gemma 2",
        classes=_PALIGEMMA,
        spellings=NESTED,
        decoder=GEMMA2,
        others=LLAVA_HF,
        shared_ids=256000,
    ),
    Arch(
        name="Gemma 3 (text)",
        source="transformers, models/gemma3",
        classes=("Gemma3ForCausalLM", "Gemma3TextModel"),
        spellings=PLAIN,
        decoder=GEMMA2,
        others={},
        shared_ids=262144,
    ),
    Arch(
        name="Gemma 3",
        source="transformers, models/gemma3 and conversion_mapping.py; hf.co/google/gemma-3-4b-it",
        classes=("Gemma3ForConditionalGeneration", "Gemma3Model"),
        spellings=NESTED,
        decoder=GEMMA2,
        others=LLAVA_HF,
        shared_ids=262144,
    ),
    Arch(
        name="OLMo 2",
        source="transformers, models/olmo2; Molmo-7B-O descends from its like",
        classes=("Olmo2ForCausalLM", "Olmo2Model"),
        spellings=PLAIN,
        decoder=OLMO2,
        others={},
    ),
)
