"""What two configs make of the same weights (rotary base, heads, eps, …), and how they differ.

None of these is in a tensor, so weights trained with one value fit names and shapes of another:
DeepSeek-R1-Distill-Qwen-7B turns queries and keys with a rotary base of 10 000, Qwen2.5-VL-7B with
one of 1 000 000. The output has the base's config; the plan says where the donor's differs. Keys
are those of transformers' configs, and of Qwen's and Molmo's own.
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
"""What is compared where both configs give a number, and how it may be spelled."""
_PLAIN_ROPE = ("default", "mrope", "dynamic")
"""Rotary scalings that, at the lengths a model was trained for, are none."""


def describe_differences(base: Checkpoint, donor: Checkpoint) -> Iterator[str]:
    """A note on what the two configs say otherwise, if there is anything."""
    ours, theirs = _settings(base), _settings(donor)
    found = [
        f"{key} is {ours[key]} in the base's config, {theirs[key]} in the donor's"
        for key in ours
        if key in theirs and ours[key] != theirs[key]
    ]
    if found:
        yield (
            f"{'; '.join(found)}: the output keeps the base's, and the donor's weights were trained"
            " with the other"
        )


def _settings(checkpoint: Checkpoint) -> dict[str, str]:
    """What a config says of its language model, as it is shown; what it leaves open is left out."""
    said: dict[str, Any] = {}
    for level in checkpoint.config_levels:  # the inner ones are about the language model alone
        said |= {key: value for key, value in level.items() if value is not None}
    rope = _rope(said)
    said |= {key: value for key, value in rope.items() if key == "rope_theta"}
    found = {
        key: f"{said[word]:.12g}"
        for key, spellings in _NUMBERS.items()
        for word in reversed(spellings)  # the first that is there counts
        if _is_number(said.get(word))
    }
    if "rope_theta" in found:  # such a config says all there is to say of the rotation
        found["rope_scaling"] = _scaling(rope)
    if any("sliding_window" in level for level in checkpoint.config_levels):
        windowed = said.get("use_sliding_window", True) and _is_number(said.get("sliding_window"))
        found["sliding_window"] = str(said["sliding_window"]) if windowed else "none"
    return found


def _rope(said: Mapping[str, Any]) -> Mapping[str, Any]:
    """Under rope_parameters (transformers 5) or rope_scaling; of two kinds of layers, the full."""
    for key in ("rope_parameters", "rope_scaling"):
        found = said.get(key)
        if isinstance(found, dict):
            full = found.get("full_attention")
            return full if isinstance(full, dict) else found
    return {}


def _scaling(rope: Mapping[str, Any]) -> str:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind in _PLAIN_ROPE or not isinstance(kind, str):
        return "none"
    name = {"su": "longrope"}.get(kind, kind)
    factor = rope.get("factor")
    return f"{name} by {factor:g}" if _is_number(factor) else name


def _is_number(value: object) -> bool:
    """Whether it is one that can be shown: JSON knows integers that no float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
