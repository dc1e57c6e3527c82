"""Settings of a small CogVLM: a Llama decoder with two experts, and an image tower as a dict.

As on the Hub, the class has no `model_type`, and the tower's settings stay a plain dictionary.
"""

# mypy: allow-subclassing-any
from __future__ import annotations

import importlib
from typing import Any

transformers: Any = importlib.import_module("transformers")


class CogVLMConfig(transformers.PreTrainedConfig):
    """What config.json holds; `template_version` is "chat", "vqa" or "base"."""

    _auto_class = "AutoConfig"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        initializer_range: float = 0.02,
        template_version: str = "chat",
        vision_config: dict[str, Any] | None = None,
        pad_token_id: int = 0,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.initializer_range = initializer_range
        self.template_version = template_version
        self.vision_config = vision_config or {}
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self.use_cache = use_cache
        super().__init__(**kwargs)
