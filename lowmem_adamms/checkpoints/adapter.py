"""A LoRA adapter as peft saves it: a product of two thin matrices for each changed one.

`adapter_config.json` tells the scale, `adapter_model.safetensors` holds the matrices, named by the
modules that they change.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FormatError
from .coded import CodedSpan, LowRank
from .span import Span

_PREFIX = "base_model.model."
_WRAPPER = re.compile(r"\.(modules_to_save|base_layer)\.")
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")
_REFUSED = (
    *("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora", "layer_replication"),
    *("target_parameters", "trainable_token_indices", "alora_invocation_tokens"),
    *("megatron_config", "use_bdlora", "arrow_config", "velora_config"),
)
"""Settings that make an adapter more than a product to be added."""
_ADVICE = "merge the adapter into its model (peft's merge_and_unload) and give that"
_PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal")
"""Of `init_lora_weights`: those that leave the model's own weights as they are."""


def read_adapter(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, Span]
) -> dict[str, Span]:
    """What an adapter holds: `module.weight` as the product to add, other tensors as they are.

    FormatError for any other kind of adapter, and for factors that do not fit.
    """
    _check_kind(path, config)
    out: dict[str, Span] = {}
    factors: dict[str, dict[str, Span]] = {}
    for name, span in tensors.items():
        own_name = _WRAPPER.sub(".", name.removeprefix(_PREFIX))
        if factor := _FACTOR.fullmatch(own_name):
            factors.setdefault(factor[1], {})[factor[2]] = span
        elif ".lora_" in own_name:
            raise FormatError(f"{path}: {name} is of no plain LoRA; {_ADVICE}")
        else:
            out[own_name] = span
    for module, pair in factors.items():
        out[f"{module}.weight"] = _multiply(path, config, module, pair)
    return out


def _check_kind(path: Path, config: Mapping[str, Any]) -> None:
    kind, start = config.get("peft_type"), config.get("init_lora_weights", True)
    if kind != "LORA":
        raise FormatError(f"{path}: an adapter of type {kind}; expected LORA; {_ADVICE}")
    for setting in _REFUSED:
        if config.get(setting):
            name = "DoRA" if setting == "use_dora" else f"LoRA with {setting}"
            raise FormatError(f"{path}: {name} is more than a product of two matrices; {_ADVICE}")
    if start not in _PLAIN_INIT:
        raise FormatError(
            f"{path}: init_lora_weights {start!r} may have changed the weights that the adapter is"
            f" added to; {_ADVICE}"
        )


def _multiply(
    path: Path, config: Mapping[str, Any], module: str, pair: Mapping[str, Span]
) -> CodedSpan:
    if len(pair) < 2:
        raise FormatError(f"{path}: {module} has no lora_{'B' if 'A' in pair else 'A'}")
    left, right = pair["B"], pair["A"]
    dims = len(left.shape), len(right.shape)
    if dims != (2, 2) or left.shape[1] != right.shape[0]:
        raise FormatError(
            f"{path}: the factors of {module} are {list(left.shape)} and {list(right.shape)};"
            " expected [rows, rank] and [rank, columns]"
        )
    for span in (left, right):
        if not span.dtype.blendable:
            raise FormatError(f"{path}: {module} is {span.dtype.name}; expected BF16, F16 or F32")
    scale = _read_scale(path, config, module, left.shape[1])
    shape = (left.shape[0], right.shape[1])
    return CodedSpan.whole(left, shape, LowRank(None, left, right, scale))


def _read_scale(path: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    """lora_alpha over the rank, or its root, where a module may have an alpha of its own."""
    patterns, alpha = config.get("alpha_pattern") or {}, config.get("lora_alpha")
    try:
        matching = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
        alpha = patterns.get(next(matching, None), alpha)
    except (re.error, AttributeError):
        raise FormatError(f"{path}: alpha_pattern {patterns!r} is none") from None
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not rank:
        raise FormatError(f"{path}: lora_alpha of {module} is {alpha!r}, its rank {rank}")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
