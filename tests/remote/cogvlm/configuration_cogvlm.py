"""Settings of a small CogVLM: a Llama decoder with two experts, and an image tower as a dict.

As on the Hub, the class has no `model_type`, and the tower's settings stay a plain dictionary.
"""

# mypy: allow-subclassing-any
from __future__ import annotations

import importlib
from typing import Any

transformers: Any = importlib.import_module("transformers")

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
    "template_version": "chat",
    "vision_config": {},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "use_cache": True,
}


class CogVLMConfig(transformers.PreTrainedConfig):
    """What config.json holds; `template_version` is "chat", "vqa" or "base"."""

    _auto_class = "AutoConfig"

    def __init__(self, **kwargs: Any) -> None:
        for name, default in DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, default))
        super().__init__(**kwargs)
