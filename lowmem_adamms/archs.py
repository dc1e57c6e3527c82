"""The declarations: every architecture we know, as data. A new family is one more entry in ARCHS.

Each entry tells how its checkpoints are spelled on the Hub and by transformers' save_pretrained
(`arch.Arch` explains the fields), with the source of its names beside it. `shared_ids` come from
the tokenizers of the ancestors: how many leading ids no descendant has reassigned.
"""

from __future__ import annotations

from collections.abc import Mapping

from .arch import Arch

_BLOCK = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "mlp_norm.weight",
    **{
        f"self_attn.{part}_proj.{kind}": f"attn.{part}.{kind}"
        for part in "qkvo"
        for kind in ("weight", "bias")
    },
    "self_attn.q_norm.weight": "attn.q_norm.weight",
    "self_attn.k_norm.weight": "attn.k_norm.weight",
    **{
        f"mlp.{part}_proj.{kind}": f"mlp.{part}.{kind}"
        for part in ("gate", "up", "down")
        for kind in ("weight", "bias")
    },
    "self_attn.rotary_emb.inv_freq": "",
}


def _decoder(block: Mapping[str, str]) -> dict[str, str]:
    """A whole decoder whose layers are spelled as in `block` (name -> roles within the layer)."""
    layers = {
        f"layers.#.{name}": " ".join(f"layers.#.{role}" for role in roles.split())
        for name, roles in block.items()
    }
    return {"embed_tokens.weight": "embed", "norm.weight": "norm", **layers}


LLAMA = _decoder(_BLOCK)
"""Llama, Vicuna, Mistral, Qwen2 (biases) and Qwen3 (q and k norms) spell their layers alike:
transformers, models/llama/modeling_llama.py and its copies."""

COGVLM = _decoder(
    {
        "input_layernorm.weight": "attn_norm.weight",
        "post_attention_layernorm.weight": "mlp_norm.weight",
        **{
            f"self_attn.{expert}_expert_query_key_value.weight": (
                f"attn.q.weight@{stream} attn.k.weight@{stream} attn.v.weight@{stream}"
            )
            for expert, stream in (("language", "text"), ("vision", "vision"))
        },
        **{
            f"self_attn.{expert}_expert_dense.weight": f"attn.o.weight@{stream}"
            for expert, stream in (("language", "text"), ("vision", "vision"))
        },
        **{
            f"mlp.{expert}_mlp.{part}_proj.weight": f"mlp.{part}.weight@{stream}"
            for expert, stream in (("language", "text"), ("vision", "vision"))
            for part in ("gate", "up", "down")
        },
        "self_attn.rotary_emb.inv_freq": "",
    }
)

_MULTIWAY = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
}
MPLUG_OWL2 = _decoder(
    {name: role for name, role in _BLOCK.items() if name.rpartition(".")[0] not in _MULTIWAY}
    | {
        f"{name}.multiway.{way}.weight": f"{role}.weight@{stream}"
        for name, role in _MULTIWAY.items()
        for way, stream in enumerate(("text", "vision"))
    }
)

PLAIN = (
    ("model.", "lm_head.weight"),  # the Hub, and save_pretrained of the …ForCausalLM class
    ("", "lm_head.weight"),  # save_pretrained of the …Model class
)
NESTED = (
    ("model.language_model.", "lm_head.weight"),  # transformers 5's own module names
    ("language_model.model.", "language_model.lm_head.weight"),  # the Hub, transformers 4
    ("language_model.model.", "lm_head.weight"),  # a …Model file loaded and saved with its head
    ("language_model.", "lm_head.weight"),  # save_pretrained of the …Model class
)

_QWEN_TOWER = {
    "visual.": "vision tower",
    "visual.merger.": "connector",
    "model.visual.": "vision tower",
    "model.visual.merger.": "connector",
    "model.visual.deepstack_merger_list.": "connector",
}
_LLAVA_HF = {
    "vision_tower.": "vision tower",
    "model.vision_tower.": "vision tower",
    "multi_modal_projector.": "connector",
    "model.multi_modal_projector.": "connector",
    "image_newline": "image newline",
    "model.image_newline": "image newline",
}
_LLAVA_ORIGINAL = {
    "model.vision_tower.": "vision tower",
    "model.mm_projector.": "connector",
    "model.vision_resampler.": "connector",
    "model.image_newline": "image newline",
}

ARCHS = (
    Arch(
        name="Llama",
        source="hf.co/meta-llama/Llama-2-7b-hf, lmsys/vicuna-7b-v1.5: weight index",
        classes=("LlamaForCausalLM", "LlamaModel"),
        spellings=PLAIN,
        decoder=LLAMA,
        others={},
    ),
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
        name="Mistral",
        source="hf.co/mistralai/Mistral-7B-v0.1: weight index",
        classes=("MistralForCausalLM", "MistralModel"),
        spellings=PLAIN,
        decoder=LLAMA,
        others={},
        shared_ids=32000,
    ),
    Arch(
        name="Qwen2-VL",
        source="hf.co/Qwen/Qwen2-VL-7B-Instruct: weight index",
        classes=("Qwen2VLForConditionalGeneration", "Qwen2VLModel"),
        spellings=(*PLAIN, *NESTED),
        decoder=LLAMA,
        others=_QWEN_TOWER,
        shared_ids=151646,
    ),
    Arch(
        name="Qwen2.5-VL",
        source="hf.co/Qwen/Qwen2.5-VL-7B-Instruct: weight index",
        classes=("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel"),
        spellings=(*PLAIN, *NESTED),
        decoder=LLAMA,
        others=_QWEN_TOWER,
        shared_ids=151665,
    ),
    Arch(
        name="Qwen3-VL",
        source="hf.co/Qwen/Qwen3-VL-8B-Instruct: weight index",
        classes=("Qwen3VLForConditionalGeneration", "Qwen3VLModel"),
        spellings=NESTED,
        decoder=LLAMA,
        others=_QWEN_TOWER,
        shared_ids=151669,
    ),
    Arch(
        name="LLaVA-OneVision",
        source="hf.co/llava-hf/llava-onevision-qwen2-7b-ov-hf: weight index",
        classes=("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionModel"),
        spellings=NESTED,
        decoder=LLAMA,
        others=_LLAVA_HF,
        shared_ids=151646,
    ),
    Arch(
        name="LLaVA-OneVision (lmms-lab)",
        source="hf.co/lmms-lab/llava-onevision-qwen2-7b-ov: weight index",
        classes=("LlavaQwenForCausalLM",),
        spellings=PLAIN,
        decoder=LLAMA,
        others=_LLAVA_ORIGINAL,
        shared_ids=151646,
    ),
    Arch(
        name="LLaVA",
        source="hf.co/llava-hf/llava-1.5-7b-hf: weight index",
        classes=("LlavaForConditionalGeneration", "LlavaModel"),
        spellings=NESTED,
        decoder=LLAMA,
        others=_LLAVA_HF,
        shared_ids=32000,
    ),
    Arch(
        name="LLaVA-NeXT",
        source="hf.co/llava-hf/llava-v1.6-vicuna-7b-hf: weight index",
        classes=("LlavaNextForConditionalGeneration", "LlavaNextModel"),
        spellings=NESTED,
        decoder=LLAMA,
        others=_LLAVA_HF,
        shared_ids=32000,
    ),
    Arch(
        name="LLaVA (liuhaotian)",
        source="hf.co/liuhaotian/llava-v1.5-7b, llava-v1.6-vicuna-7b: weight index",
        classes=("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM"),
        spellings=PLAIN,
        decoder=LLAMA,
        others=_LLAVA_ORIGINAL,
        shared_ids=32000,
    ),
    Arch(
        name="ShareGPT4V",
        source="hf.co/Lin-Chen/ShareGPT4V-7B: weight index; its vision tower is another repository",
        classes=("Share4VLlamaForCausalLM",),
        spellings=PLAIN,
        decoder=LLAMA,
        others=_LLAVA_ORIGINAL,
        shared_ids=32000,
    ),
    Arch(
        name="CogVLM",
        source="hf.co/THUDM/cogvlm-chat-hf: modeling_cogvlm.py, VisionExpertAttention and MLP;"
        " fused rows are q, k, v",
        classes=("CogVLMForCausalLM",),
        spellings=PLAIN,
        decoder=COGVLM,
        others={"model.vision.": "vision tower", "model.vision.linear_proj.": "connector"},
        shared_ids=32000,
    ),
    Arch(
        name="mPLUG-Owl2",
        source="hf.co/MAGAer13/mplug-owl2-llama2-7b and X-PLUG/mPLUG-Owl, modeling_llama2.py:"
        " multiway 0 is text, 1 is image",
        classes=("MPLUGOwl2LlamaForCausalLM",),
        spellings=PLAIN,
        decoder=MPLUG_OWL2,
        others={"model.vision_model.": "vision tower", "model.visual_abstractor.": "connector"},
        shared_ids=32000,
    ),
)
