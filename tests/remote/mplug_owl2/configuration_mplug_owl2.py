"""Settings of a small mPLUG-Owl2: Llama's, and the tower's and abstractor's as a dictionary."""

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
    "visual_config": {},
    "image_token_index": -200,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "use_cache": True,
}


class MPLUGOwl2Config(transformers.PreTrainedConfig):
    """What config.json holds; `visual_config` has `visual_model` and `visual_abstractor`."""

    model_type = "mplug_owl2"
    _auto_class = "AutoConfig"

    def __init__(self, **kwargs: Any) -> None:
        for name, default in DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, default))
        self.num_key_value_heads = kwargs.pop("num_key_value_heads", self.num_attention_heads)
        super().__init__(**kwargs)
