"""Qwen, Qwen2, Qwen2.5 and Qwen3, and what descends from them."""

from __future__ import annotations

from ..layout import Arch
from .spelling import (
    CONNECTOR,
    LLAMA,
    LLAVA_HF,
    LLAVA_ORIGINAL,
    MOLMO,
    NESTED,
    PLAIN,
    QWEN,
    QWEN_TOWER,
    TOWER,
    parts,
)

_AUDIO = {"audio_tower.": "audio tower", "model.audio_tower.": "audio tower"}
_LLM = (("llm.model.", "llm.lm_head.weight"),)

ARCHS = (
    Arch(
        name="Qwen2",
        source="hf.co/Qwen/Qwen2-7B, Qwen2.5-7B: weight index",
        classes=("Qwen2ForCausalLM", "Qwen2Model"),
        spellings=PLAIN,
        decoder=LLAMA,
        others={},
        shared_ids=151646,
    ),
    Arch(
        name="Qwen3",
        source="hf.co/Qwen/Qwen3-8B: weight index; q and k norms per head",
        classes=("Qwen3ForCausalLM", "Qwen3Model"),
        spellings=PLAIN,
        decoder=LLAMA,
        others={},
        shared_ids=151669,
    ),
    Arch(
        name="Qwen and Qwen-VL",
        source="hf.co/Qwen/Qwen-VL: modeling_qwen.py and visual.py; c_attn rows are q, k, v",
        classes=("QWenLMHeadModel",),
        spellings=(("transformer.", "lm_head.weight"),),
        decoder=QWEN,
        others={
            "transformer.visual.": TOWER,
            "transformer.visual.attn_pool.": CONNECTOR,
            "transformer.visual.ln_post.": CONNECTOR,
            "transformer.visual.proj": CONNECTOR,
        },
        shared_ids=151851,
    ),
    Arch(
        name="Qwen2-VL",
        source="hf.co/Qwen/Qwen2-VL-7B-Instruct: weight index",
        classes=("Qwen2VLForConditionalGeneration", "Qwen2VLModel"),
        spellings=(*PLAIN, *NESTED),
        decoder=LLAMA,
        others=QWEN_TOWER,
        shared_ids=151646,
    ),
    Arch(
        name="Qwen2.5-VL",
        source="hf.co/Qwen/Qwen2.5-VL-7B-Instruct: weight index",
        classes=("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel"),
        spellings=(*PLAIN, *NESTED),
        decoder=LLAMA,
        others=QWEN_TOWER,
        shared_ids=151665,
    ),
    Arch(
        name="Qwen3-VL",
        source="hf.co/Qwen/Qwen3-VL-8B-Instruct: weight index",
        classes=("Qwen3VLForConditionalGeneration", "Qwen3VLModel"),
        spellings=NESTED,
        decoder=LLAMA,
        others=QWEN_TOWER,
        shared_ids=151669,
    ),
    Arch(
        name="Qwen2.5-Omni",
        source="transformers, models/qwen2_5_omni; hf.co/Qwen/Qwen2.5-Omni-7B. Its talker is a"
        " second language model, of another ancestor",
        classes=("Qwen2_5OmniModel", "Qwen2_5OmniForConditionalGeneration"),
        spellings=tuple(
            (f"thinker.{prefix}", "thinker.lm_head.weight")
            for prefix in ("model.", "model.language_model.")
        ),
        decoder=LLAMA,
        others={
            **{f"thinker.{name}": kind for name, kind in (QWEN_TOWER | _AUDIO).items()},
            "talker.": "talker",
            "token2wav.": "vocoder",
        },
        shared_ids=151665,
    ),
    Arch(
        name="Qwen2.5-Omni's thinker",
        source="transformers, models/qwen2_5_omni",
        classes=("Qwen2_5OmniThinkerForConditionalGeneration", "Qwen2_5OmniThinkerModel"),
        spellings=(*PLAIN, *NESTED),
        decoder=LLAMA,
        others=QWEN_TOWER | _AUDIO,
        shared_ids=151665,
    ),
    Arch(
        name="LLaVA-OneVision",
        source="hf.co/llava-hf/llava-onevision-qwen2-7b-ov-hf: weight index",
        classes=("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionModel"),
        spellings=NESTED,
        decoder=LLAMA,
        others=LLAVA_HF,
        shared_ids=151646,
    ),
    Arch(
        name="LLaVA-OneVision (lmms-lab)",
        source="hf.co/lmms-lab/llava-onevision-qwen2-7b-ov, LLaVA-Video-7B-Qwen2: weight index",
        classes=("LlavaQwenForCausalLM",),
        spellings=PLAIN,
        decoder=LLAMA,
        others=LLAVA_ORIGINAL,
        shared_ids=151646,
    ),
    Arch(
        name="LLaVA-OneVision-1.5",
        source="hf.co/lmms-lab/LLaVA-OneVision-1.5-8B-Instruct: modeling_llavaonevision1_5.py;"
        " files have the older or the newer of Qwen2.5-VL's two spellings",
        classes=("LLaVAOneVision1_5_ForConditionalGeneration",),
        spellings=(*PLAIN, *NESTED),
        decoder=LLAMA,
        others=QWEN_TOWER,
        shared_ids=151665,
    ),
    Arch(
        name="InternVL",
        source="OpenGVLab/InternVL, modeling_internvl_chat.py: InternVL2, 2.5, 3 and 3.5 around"
        " Qwen2, Qwen2.5, Qwen3 or Llama",
        classes=("InternVLChatModel",),
        spellings=(("language_model.model.", "language_model.lm_head.weight"),),
        decoder=LLAMA,
        others={"vision_model.": TOWER, "mlp1.": CONNECTOR},
        shared_ids=151646,
    ),
    Arch(
        name="InternVL (-hf)",
        source="transformers, models/internvl and conversion_mapping.py;"
        " hf.co/OpenGVLab/InternVL3-8B-hf",
        classes=("InternVLForConditionalGeneration", "InternVLModel"),
        spellings=NESTED,
        decoder=LLAMA,
        others=LLAVA_HF,
        shared_ids=151646,
    ),
    Arch(
        name="MiniCPM-V",
        source="hf.co/openbmb/MiniCPM-V-2_6: weight index (Qwen2); MiniCPM-Llama3-V-2_5 (Llama-3)",
        classes=("MiniCPMV",),
        spellings=_LLM,
        decoder=LLAMA,
        others={"vpm.": TOWER, "resampler.": CONNECTOR},
        shared_ids=151646,
    ),
    Arch(
        name="VideoLLaMA3",
        source="DAMO-NLP-SG/VideoLLaMA3, videollama3_arch.py",
        classes=("Videollama3Qwen2ForCausalLM",),
        spellings=PLAIN,
        decoder=LLAMA,
        others=parts("vision_encoder.", "mm_projector.", prefixes=("model.",)),
        shared_ids=151665,
    ),
    Arch(
        name="VideoLLaMA3 (-hf)",
        source="transformers, models/video_llama_3",
        classes=("VideoLlama3ForConditionalGeneration", "VideoLlama3Model"),
        spellings=NESTED,
        decoder=LLAMA,
        others=parts("vision_model.", "projector."),
        shared_ids=151665,
    ),
    Arch(
        name="Ovis2",
        source="hf.co/AIDC-AI/Ovis2-8B: modeling_ovis.py",
        classes=("Ovis",),
        spellings=_LLM,
        decoder=LLAMA,
        others={"visual_tokenizer.": TOWER, "vte.": CONNECTOR},
        shared_ids=151646,
    ),
    Arch(
        name="Ovis2 (-hf)",
        source="transformers, models/ovis2",
        classes=("Ovis2ForConditionalGeneration", "Ovis2Model"),
        spellings=NESTED,
        decoder=LLAMA,
        others=parts("vision_tower.", "visual_embeddings_table."),
        shared_ids=151646,
    ),
    Arch(
        name="Molmo",
        source="hf.co/allenai/Molmo-7B-D-0924: modeling_molmo.py; att_proj rows are q, k, v and"
        " ff_proj's up, gate",
        classes=("MolmoForCausalLM",),
        spellings=(("model.transformer.", "model.transformer.ff_out.weight"),),
        decoder=MOLMO,
        others={
            **parts("vision_backbone.", "vision_backbone.image_pooling_2d.", prefixes=("model.",)),
            "model.vision_backbone.image_projector.": CONNECTOR,
            "model.vision_backbone.pad_embed": CONNECTOR,
            "model.transformer.wte.new_embedding": "rows of added tokens",
        },
        shared_ids=151646,
    ),
)
