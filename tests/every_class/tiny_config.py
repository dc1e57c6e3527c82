"""Tiny configs of any class: the numbers of a default config, made small by rules on their keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Config = dict[str, Any]

HIDDEN, HEADS, LAYERS, VOCAB = 32, 4, 2, 96

_KEPT = re.compile(
    r".*(dropout|drop_path|layerdrop|_eps|epsilon|dtype|id2label|label2id|label_names|norm_mean"
    r"|norm_std|initializer|init_std|init_value|_factor|multiplier|softcap|theta).*"
    r"|chunk_size_feed_forward"
)
_TOKEN = re.compile(r"_?(.*_)?(id|ids|index)")
_LAYER_INDEXES = re.compile(r"(.*_)?(indexes|indices|idxs|layer_ids|cross_attention_layers)")
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size(_per_layer_input|_base)?|vocab_offset", VOCAB),
    (r"codebook_size|num_embeddings|num_embeds", 16),
    (r"(.*_)?(head_dim|dim_head)|d_kv|rotary_dim", 8),
    (r"(.*_)?num_(key_value|key|kv)_heads", 2),
    (r"(.*_)?(output_channels|upsample_initial_channel|upsample_groups|decoder_dim)", HIDDEN),
    (r"resampler_n_latents|latent_query_num|num_query_tokens", HIDDEN),
    (r"(.*_)?(heads|num_value_heads|n_head)", HEADS),
    (r"(.*_)?(layers|depth|num_blocks|n_layer)", LAYERS),
    (r"(.*_)?(intermediate_size(_mlp)?|ffn_dim|mlp_dim|d_ff|expert_dim)", 48),
    (r"(.*_)?rank|hc_lowrank", 16),
    (r"(.*_)?(num_experts|n_routed_experts|num_local_experts|shared_experts)", 4),
    (r"num_experts_per_tok|moe_k|moe_topk", 2),
    (r"n_group|topk_group|first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (
        r"(.*_)?(hidden_sizes?|d_model|(embed|emb|embedding|hidden|in|out)_dim|projection_dim|n_embd)",
        HIDDEN,
    ),
)
"""The most that a number may be, by a pattern of its whole key; the first that fits counts."""


def shrink(config: Config, exceptions: Mapping[str, Any]) -> Config:
    """The config with small numbers. exceptions: values by dotted key, put in as they are."""
    layers = _count_layers(config)
    small: Config = {}
    for key, value in config.items():
        if isinstance(value, dict) and (key.endswith("config") or key in ("encoder", "decoder")):
            inner = {
                name.removeprefix(f"{key}."): exception
                for name, exception in exceptions.items()
                if name.startswith(f"{key}.")
            }
            small[key] = shrink(value, inner)
        else:
            small[key] = _shrink_value(key, value, layers)
    heads, kv_heads = (config.get(f"num_{name}_heads") for name in ("attention", "key_value"))
    if heads is not None and heads == kv_heads:
        small["num_key_value_heads"] = small["num_attention_heads"]
    small.pop("per_layer_config", None)  # made anew from the other keys
    return small | {key: value for key, value in exceptions.items() if "." not in key}


def _count_layers(config: Config) -> int:
    """LAYERS, or one more than there are kinds of layers, so that each kind comes."""
    lists = (value for key, value in config.items() if key.endswith(("_types", "block_type")))
    kinds = max((len(set(values)) for values in lists if values), default=1)
    return LAYERS if kinds == 1 else kinds + 1


def _shrink_value(key: str, value: Any, layers: int) -> Any:
    if key == "rope_parameters" and value:
        return _shrink_rope(value)
    if not isinstance(value, (int, list)) or isinstance(value, bool) or _KEPT.fullmatch(key):
        return value
    if isinstance(value, list):
        return _shrink_list(key, value, layers)
    if _TOKEN.fullmatch(key):
        return value % (VOCAB - 6) if value > 0 else value
    for pattern, most in _SIZES:
        if re.fullmatch(pattern, key):
            return min(value, layers if most == LAYERS else most)
    return value


def _shrink_rope(rope: Config) -> Config:
    """Sections of heads of 8, also where each kind of layer has its own."""
    small = {
        key: _shrink_rope(value) if isinstance(value, dict) else value
        for key, value in rope.items()
    }
    return small | ({"mrope_section": [2, 1, 1]} if "mrope_section" in rope else {})


def _shrink_list(key: str, values: list[Any], layers: int) -> list[Any]:
    if _LAYER_INDEXES.fullmatch(key):
        return list(range(min(len(values), layers)))
    if values and isinstance(values[0], str):
        kinds = list(dict.fromkeys(values))
        return (kinds + kinds[-1:] * layers)[:layers]
    if len(values) > 8:  # one for each layer
        return values[:layers]
    return [_shrink_value(key, value, layers) for value in values]
