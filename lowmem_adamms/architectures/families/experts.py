"""Mixtures of experts: what their experts are called, all families share (`..experts`)."""

from __future__ import annotations

from ..layout import Arch
from .spelling import LLAMA, NESTED, PLAIN, QWEN_TOWER, fused, parts

_OMNI = {
    **QWEN_TOWER,
    "audio_tower.": "audio tower",
    "model.audio_tower.": "audio tower",
}

_GATE_UP = "layers.#.mlp.experts.gate_up_proj"
_GPT_OSS = LLAMA | {
    f"{_GATE_UP}{suffix}": f"layers.#.{fused('mlp.experts.*.gate', kind=kind)}"
    f" layers.#.{fused('mlp.experts.*.up', kind=kind)}"
    for suffix, kind in (("", "weight"), ("_bias", "bias"))
}
"""Its stacks alone have biases, by which they are told from those of the same names whose gate and
up do not alternate."""

_LLAMA4 = {name.replace(".mlp.", ".feed_forward."): roles for name, roles in LLAMA.items()}

_ERNIE_VL = LLAMA | {
    **{
        f"layers.#.mlp.experts.*.{part}_proj.weight": " ".join(
            f"layers.#.mlp.experts.*.{part}.weight@{stream}" for stream in ("text", "vision_expert")
        )
        for part in ("gate", "up", "down")
    },
    "layers.#.mlp.gate.weight": "layers.#.mlp.router.weight@text",
    "layers.#.mlp.gate.weight_1": "layers.#.mlp.router.weight@vision_expert",
    "layers.#.mlp.moe_statics.e_score_correction_bias": " ".join(
        f"layers.#.mlp.router.correction_bias@{stream}" for stream in ("text", "vision_expert")
    ),
}

ARCHS = (
    Arch(
        name="Qwen3-MoE",
        source="hf.co/Qwen/Qwen3-30B-A3B: weight index",
        classes=("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
        spellings=PLAIN,
        decoder=LLAMA,
        others={},
        shared_ids=151669,
    ),
    Arch(
        name="Qwen3-VL-MoE",
        source="transformers, models/qwen3_vl_moe; hf.co/Qwen/Qwen3-VL-30B-A3B-Instruct, whose"
        " stacks are transposed",
        classes=("Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeModel"),
        spellings=NESTED,
        decoder=LLAMA,
        others=QWEN_TOWER,
        shared_ids=151669,
    ),
    Arch(
        name="Qwen3-Omni",
        source="transformers, models/qwen3_omni_moe; hf.co/Qwen/Qwen3-Omni-30B-A3B-Instruct. Its"
        " talker is a second language model",
        classes=("Qwen3OmniMoeForConditionalGeneration",),
        spellings=tuple(
            (f"thinker.{prefix}", "thinker.lm_head.weight")
            for prefix in ("model.", "model.language_model.")
        ),
        decoder=LLAMA,
        others={
            **{f"thinker.{name}": kind for name, kind in _OMNI.items()},
            "talker.": "talker",
            "code2wav.": "vocoder",
        },
        shared_ids=151669,
    ),
    Arch(
        name="Qwen3-Omni's thinker",
        source="transformers, models/qwen3_omni_moe",
        classes=("Qwen3OmniMoeThinkerForConditionalGeneration", "Qwen3OmniMoeThinkerModel"),
        spellings=(*PLAIN, *NESTED),
        decoder=LLAMA,
        others=_OMNI,
        shared_ids=151669,
    ),
    Arch(
        name="Qwen3.5-MoE (text)",
        source="transformers, models/qwen3_5_moe",
        classes=("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextModel"),
        spellings=PLAIN,
        decoder=LLAMA,
        others={"mtp.": "multi-token prediction"},
        shared_ids=248044,
    ),
    Arch(
        name="Qwen3.5-MoE",
        source="transformers, models/qwen3_5_moe; hf.co/Qwen/Qwen3.5-35B-A3B",
        classes=("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeModel"),
        spellings=NESTED,
        decoder=LLAMA,
        others={**QWEN_TOWER, "mtp.": "multi-token prediction"},
        shared_ids=248044,
    ),
    Arch(
        name="GLM-4.5",
        source="transformers, models/glm4_moe; hf.co/zai-org/GLM-4.5-Air: weight index",
        classes=("Glm4MoeForCausalLM", "Glm4MoeModel"),
        spellings=PLAIN,
        decoder=LLAMA,
        others={},
    ),
    Arch(
        name="GLM-4.5V",
        source="transformers, models/glm4v_moe; hf.co/zai-org/GLM-4.5V: weight index",
        classes=("Glm4vMoeForConditionalGeneration", "Glm4vMoeModel"),
        spellings=NESTED,
        decoder=LLAMA,
        others=QWEN_TOWER,
    ),
    Arch(
        name="DeepSeek-V3",
        source="transformers, models/deepseek_v3; hf.co/moonshotai/Moonlight-16B-A3B: weight index",
        classes=("DeepseekV3ForCausalLM", "DeepseekV3Model"),
        spellings=PLAIN,
        decoder=LLAMA,
        others={},
    ),
    Arch(
        name="Kimi-VL",
        source="hf.co/moonshotai/Kimi-VL-A3B-Instruct: weight index and modeling_kimi_vl.py",
        classes=("KimiVLForConditionalGeneration",),
        spellings=NESTED,
        decoder=LLAMA,
        others=parts("vision_tower.", "multi_modal_projector."),
    ),
    Arch(
        name="Llama 4 (text)",
        source="transformers, models/llama4",
        classes=("Llama4ForCausalLM", "Llama4TextModel"),
        spellings=PLAIN,
        decoder=_LLAMA4,
        others={},
        shared_ids=200000,
    ),
    Arch(
        name="Llama 4",
        source="transformers, models/llama4; hf.co/meta-llama/Llama-4-Scout-17B-16E-Instruct",
        classes=("Llama4ForConditionalGeneration",),
        spellings=NESTED,
        decoder=_LLAMA4,
        others=parts("vision_model.", "multi_modal_projector."),
        shared_ids=200000,
    ),
    Arch(
        name="ERNIE 4.5",
        source="transformers, models/ernie4_5_moe; hf.co/baidu/ERNIE-4.5-21B-A3B-PT",
        classes=("Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeModel"),
        spellings=PLAIN,
        decoder=LLAMA,
        others={"model.mtp_": "multi-token prediction"},
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
        decoder=_ERNIE_VL,
        others={
            **parts("vision_model. vision_tower.", "resampler_model."),
            "model.mtp_": "multi-token prediction",
        },
    ),
    Arch(
        name="gpt-oss",
        source="transformers, models/gpt_oss: gate is every second column from 0, up from 1",
        classes=("GptOssForCausalLM", "GptOssModel"),
        spellings=PLAIN,
        decoder=_GPT_OSS,
        others={},
        shared_ids=199998,
        interleaved=(_GATE_UP, f"{_GATE_UP}_bias"),
    ),
)
