"""Which tensors of a checkpoint are quantized, and how their numbers are computed.

Dequantized are FP8 with scales (DeepSeek, Qwen, compressed-tensors) and MXFP4 (gpt-oss), to what
transformers makes of them. Any other kind is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from ..errors import FormatError
from .coded import GROUP, BlockScaled, CodedSpan, PackedFP4
from .span import Span

METHODS = ("fp8", "compressed-tensors", "mxfp4")
"""What `quant_method` may say."""
_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("BF16", "F16", "F32", "F8_E8M0", "U8")
_BLOCK = 128
_OTHER_METHODS = re.compile(
    r"\.(qweight|qzeros|g_idx|absmax|quant_map|quant_state\.\w+|SCB|weight_scale(_inv)?"
    r"|weight_(packed|global_scale|zero_point))$|\.experts\.\w+_(blocks|scales)$"
)
"""What is left over of GPTQ, AWQ, bitsandbytes and others when all known pairs were found."""
_OF_ACTIVATIONS = re.compile(r"\.(input|activation|output|[qkv])_scale(_inv)?$")
"""Scales of what goes in and out, which unquantized weights do without."""


def dequantize(path: Path, tensors: Mapping[str, Span]) -> dict[str, Span]:
    """A checkpoint's tensors with those that are quantized as `CodedSpan`, without their scales.

    FormatError for a kind that is not known, and for scales that do not fit.
    """
    found: dict[str, Span] = {}
    used: set[str] = set()
    for name, span in tensors.items():
        stem = name.removesuffix("_blocks")
        scale = next((n for n in (f"{name}_scale_inv", f"{name}_scale") if n in tensors), None)
        if span.dtype.name in _FP8 and scale:
            found[name] = _scale_blocks(path, name, span, tensors[scale])
            used.add(scale)
        elif stem != name and span.dtype.name == "U8" and f"{stem}_scales" in tensors:
            found[stem] = _unpack(path, name, span, tensors[f"{stem}_scales"])
            used.add(f"{stem}_scales")
        else:
            found[name] = span
    left = {
        name: span
        for name, span in found.items()
        if name not in used and not (used and _OF_ACTIVATIONS.search(name))
    }
    for name, span in left.items():
        is_integer = name.endswith(".weight") and span.dtype.name in ("I8", "U8")
        if _OTHER_METHODS.search(name) or span.dtype.name.startswith("F8_") or is_integer:
            raise _refuse(path, f"tensor {name} ({span.dtype.name})")
    return left


def find_settings(config: Mapping[str, Any]) -> Any:
    """The quantization_config of a config, or of the part about its language model."""
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, dict) else None
    return config.get("quantization_config") or inner


def without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says nothing of quantization."""
    return {
        key: without_settings(value) if key == "text_config" and isinstance(value, dict) else value
        for key, value in config.items()
        if key != "quantization_config"
    }


def check_method(path: Path, config: Mapping[str, Any]) -> None:
    """Raise FormatError if a config says that the weights are quantized in an unknown way."""
    if settings := find_settings(config):
        method = settings.get("quant_method", "?") if isinstance(settings, dict) else "?"
        if method not in METHODS:
            raise _refuse(path, f"config.json has a quantization_config ({method})")


def _refuse(path: Path, sign: str) -> FormatError:
    return FormatError(
        f"{path}: weights quantized in this way cannot be blended: {sign}; expected bf16, fp16,"
        " fp32, FP8 with scales or MXFP4. Merge the unquantized checkpoint and quantize the result"
    )


def _scale_blocks(path: Path, name: str, span: Span, scales: Span) -> CodedSpan:
    """FP8 numbers with one scale, one for each row or one for each block."""
    leading, matrix = span.shape[:-2], (1, *span.shape)[-2:]
    grid = (prod(scales.shape), 1)
    if len(scales.shape) > 1:
        grid = scales.shape[-2], scales.shape[-1]
    rows, columns = map(_block_size, matrix, grid)
    fits = prod(scales.shape) == prod(leading) * grid[0] * grid[1]
    if not (rows and columns and fits and scales.dtype.name in _SCALES):
        raise FormatError(
            f"{path}: {name} is {list(span.shape)}, its scales are {scales.dtype.name}"
            f" {list(scales.shape)}; expected a number for all, for each row, or for each block of"
            f" {_BLOCK} x {_BLOCK}"
        )
    return CodedSpan.whole(span, span.shape, BlockScaled(span, scales, grid, (rows, columns)))


def _block_size(length: int, count: int) -> int | None:
    """How long a block is of which there are `count` in a length; None if that does not fit."""
    if count in (1, length):
        return max(1, length // count)
    if -(-length // _BLOCK) == count:
        return _BLOCK
    return length // count if count and length % count == 0 else None


def _unpack(path: Path, name: str, span: Span, scales: Span) -> CodedSpan:
    """MXFP4 numbers, two in each byte."""
    if len(span.shape) != 4 or span.shape[3] != GROUP // 2 or scales.shape != span.shape[:3]:
        raise FormatError(
            f"{path}: {name} is {list(span.shape)}, its scales are {list(scales.shape)}; expected"
            f" [experts, rows, groups, {GROUP // 2}] and [experts, rows, groups]"
        )
    experts, rows, groups, _ = span.shape
    return CodedSpan.whole(span, (experts, groups * GROUP, rows), PackedFP4(span, scales))
