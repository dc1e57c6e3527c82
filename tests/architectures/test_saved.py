"""What transformers itself writes for the wider families is recognised, tensor by tensor."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_adamms.architectures.families import ARCHS
from lowmem_adamms.architectures.layout import UNKNOWN
from lowmem_adamms.architectures.recognise import recognise
from lowmem_adamms.checkpoints.checkpoint import open_checkpoint
from lowmem_adamms.live.transformers_model import quiet
from lowmem_adamms.mapping.join import make_plan

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
EYES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SIGLIP = {**EYES, "model_type": "siglip_vision_model", "vision_use_head": False}
QWEN_EYES = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "fullatt_block_indexes": [0],
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}

# class: architecture, then what its configuration is made of
SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    "InternVLForConditionalGeneration": (
        "InternVL (-hf)",
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {**EYES, "image_size": [28, 28], "patch_size": [14, 14]},
        },
    ),
    "Idefics3ForConditionalGeneration": (
        "Idefics3",
        {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": EYES},
    ),
    "SmolVLMForConditionalGeneration": (
        "SmolVLM",
        {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": EYES},
    ),
    "MllamaForConditionalGeneration": (
        "Mllama",
        {
            "text_config": {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 28,
                "vision_output_dim": 32,
                "intermediate_layers_indices": [0],
            },
        },
    ),
    "Gemma3ForConditionalGeneration": (
        "Gemma 3",
        {"text_config": TEXT, "vision_config": SIGLIP, "mm_tokens_per_image": 4},
    ),
    "PaliGemmaForConditionalGeneration": (
        "PaliGemma",
        {"text_config": {**TEXT, "model_type": "gemma"}, "vision_config": SIGLIP},
    ),
    "Qwen2_5OmniThinkerForConditionalGeneration": (
        "Qwen2.5-Omni's thinker",
        {
            "text_config": {**TEXT, "rope_parameters": ROPE},
            "vision_config": QWEN_EYES,
            "audio_config": {
                "encoder_layers": 1,
                "d_model": 16,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "output_dim": 32,
            },
        },
    ),
    "VideoLlama3ForConditionalGeneration": (
        "VideoLLaMA3 (-hf)",
        {"text_config": {**TEXT, "model_type": "qwen2"}, "vision_config": EYES},
    ),
    "Phi3ForCausalLM": ("Phi-3", TEXT),
    "Gemma2ForCausalLM": ("Gemma 2", TEXT),
    "Olmo2ForCausalLM": ("OLMo 2", TEXT),
}


def save(name: str, folder: Path, settings: dict[str, Any]) -> Path:
    transformers = importlib.import_module("transformers")
    cls = getattr(transformers, name)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cls(cls.config_class(**settings)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SAVED)
def test_what_transformers_saves_is_recognised(tmp_path: Path, name: str) -> None:
    arch, settings = SAVED[name]
    checkpoint = open_checkpoint(save(name, tmp_path / "m", settings))
    layout = recognise(checkpoint, ARCHS)
    assert (layout.arch, layout.layers, layout.assumed) == (arch, 2, None)
    assert UNKNOWN not in layout.kinds.values()
    assert set(layout.blocks) | set(layout.kinds) == set(checkpoint.tensors)
    plan = make_plan(checkpoint, checkpoint)
    assert plan.leftover.keys() == layout.kinds.keys()
