"""What transformers itself writes for the wider families is recognised, tensor by tensor."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_adamms.architectures.arch import UNKNOWN
from lowmem_adamms.architectures.families import ARCHS
from lowmem_adamms.architectures.recognise import recognise
from lowmem_adamms.checkpoints.checkpoint import open_checkpoint
from lowmem_adamms.live.transformers_model import quiet

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
EARS = {
    "encoder_layers": 1,
    "d_model": 16,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "output_dim": 32,
}
MLLAMA_EYES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_global_layers": 1,
    "attention_heads": 2,
    "image_size": 28,
    "vision_output_dim": 32,
    "intermediate_layers_indices": [0],
}
SQUARE = {**EYES, "image_size": [28, 28], "patch_size": [14, 14]}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}


def around(text: dict[str, Any], eyes: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The settings of a vision model with some of TEXT changed."""
    return {"text_config": TEXT | text, "vision_config": eyes, **more}


QWEN2, LLAMA = {"model_type": "qwen2"}, {"model_type": "llama"}
MLLAMA = {"num_hidden_layers": 3, "cross_attention_layers": [1]}
# class: architecture, then what its configuration is made of
SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    "InternVLForConditionalGeneration": ("Llama-style", around(QWEN2, SQUARE)),
    "Idefics3ForConditionalGeneration": ("Llama-style", around(LLAMA, EYES)),
    "SmolVLMForConditionalGeneration": ("Llama-style", around(LLAMA, EYES)),
    "MllamaForConditionalGeneration": ("Llama-style", around(MLLAMA, MLLAMA_EYES)),
    "Gemma3ForConditionalGeneration": ("Gemma 2-style", around({}, SIGLIP, mm_tokens_per_image=4)),
    "PaliGemmaForConditionalGeneration": ("Llama-style", around({"model_type": "gemma"}, SIGLIP)),
    "Qwen2_5OmniThinkerForConditionalGeneration": (
        "Llama-style",
        around({"rope_parameters": ROPE}, QWEN_EYES, audio_config=EARS),
    ),
    "VideoLlama3ForConditionalGeneration": ("Llama-style", around(QWEN2, EYES)),
    "Phi3ForCausalLM": ("Phi-3", TEXT),
    "Gemma2ForCausalLM": ("Gemma 2", TEXT),
    "Olmo2ForCausalLM": ("OLMo 2", TEXT),
}


@pytest.mark.parametrize("name", SAVED)
def test_what_transformers_saves_is_recognised(tmp_path: Path, name: str) -> None:
    arch, settings = SAVED[name]
    cls = getattr(importlib.import_module("transformers"), name)
    with quiet(), torch.random.fork_rng(devices=[]):
        cls(cls.config_class(**settings)).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    layout = recognise(checkpoint, ARCHS)
    assert (layout.arch, layout.layers) == (arch, 2)
    assert (layout.assumed is None) == (not arch.endswith("-style"))
    assert UNKNOWN not in layout.kinds.values()
    assert set(layout.blocks) | set(layout.kinds) == set(checkpoint.tensors)
