"""Config settings that affect the output but leave no trace in the weights: rotary base, eps, ….

Weights trained with one value fit the names and shapes of another: DeepSeek-R1-Distill-Qwen-7B has
a rotary base of 10 000, Qwen2.5-VL-7B one of 1 000 000. The output has the base's config; the plan
says where the donor's differs. Keys are those of transformers' configs, and of Qwen's and Molmo's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..checkpoints.checkpoint import Checkpoint

_NUMBERS = {
    "num_attention_heads": ("num_attention_heads",),
    "num_key_value_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor",),
    "rms_norm_eps": ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"),
    "query_pre_attn_scalar": ("query_pre_attn_scalar",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "embedding_multiplier": ("embedding_multiplier", "scale_emb"),
    "residual_multiplier": ("residual_multiplier", "scale_depth"),
    "attention_multiplier": ("attention_multiplier",),
    "logits_scaling": ("logits_scaling",),
}
"""Settings that are compared where both configs give a number, and the keys they may have."""
_PLAIN_ROPE = ("default", "mrope", "dynamic")
"""Rotary scalings that change nothing at the lengths a model was trained for."""


def describe_differences(base: Checkpoint, donor: Checkpoint) -> Iterator[str]:
    """A note on the settings in which the two configs differ, if there are any."""
    base_settings, donor_settings = _read_settings(base), _read_settings(donor)
    found = [
        f"{key} is {value} in the base's config, {donor_settings[key]} in the donor's"
        for key, value in base_settings.items()
        if donor_settings.get(key, value) != value
    ]
    if found:
        yield (
            f"{'; '.join(found)}: the output keeps the base's, and the donor's weights were trained"
            " with the other"
        )


def _read_settings(checkpoint: Checkpoint) -> dict[str, str]:
    """The settings of the language model, as they are shown."""
    config: dict[str, Any] = {}
    for level in checkpoint.config_levels:  # the inner ones are about the language model alone
        config |= level
    rope = _read_rope(config)
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    settings: dict[str, str] = {}
    for name, keys in _NUMBERS.items():
        numbers = [config[key] for key in keys if _is_number(config.get(key))]
        if numbers:
            settings[name] = f"{numbers[0]:.12g}"
    if "rope_theta" in settings:  # a config that tells the base also tells a scaling, if any
        settings["rope_scaling"] = _describe_scaling(rope)
    if any("sliding_window" in level for level in checkpoint.config_levels):
        window = config.get("sliding_window")
        used = config.get("use_sliding_window", True) and _is_number(window)
        settings["sliding_window"] = str(window) if used else "none"
    return settings


def _read_rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary settings: rope_parameters in transformers 5, rope_scaling before.

    Where kinds of layers have their own, those of full attention.
    """
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if isinstance(rope, dict):
            full = rope.get("full_attention")
            return full if isinstance(full, dict) else rope
    return {}


def _describe_scaling(rope: Mapping[str, Any]) -> str:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind in _PLAIN_ROPE or not isinstance(kind, str):
        return "none"
    name = "longrope" if kind == "su" else kind  # its name in early Phi-3 configs
    factor = rope.get("factor")
    return f"{name} by {factor:g}" if _is_number(factor) else name


def _is_number(value: object) -> bool:
    """Whether a value can be shown as a number: JSON has integers that no float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
