"""The formula in numpy, slow and plain: every kernel must give these bits.

    out = round((1 - alpha) * base + alpha * donor)

evaluated in float64 and rounded once, to nearest, ties to even. Every bf16, fp16 and fp32 value is
exact in float64, so the only other error is that of the float64 sum (2**-52 of its larger term).

Exceptions: alpha 0 gives the base and alpha 1 the donor exactly, even where the other side is NaN
or infinite. Where base and donor have equal bits and the output has their dtype, these bits come
out unchanged. Any other NaN becomes the dtype's quiet NaN (0x7fc0, 0x7e00, 0x7fc00000).

Tensors are handled as storage arrays: uint16 for BF16 and F16, uint32 for F32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
Triple = tuple[str, str, str]
"""Dtypes of base, donor and output: "BF16", "F16" or "F32"."""
Bits = npt.NDArray[np.unsignedinteger[Any]]
Floats = npt.NDArray[np.float64]

STORAGE: dict[str, type[np.unsignedinteger[Any]]] = {
    "BF16": np.uint16,
    "F16": np.uint16,
    "F32": np.uint32,
}
QUIET_NAN = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000}


def blend(base: Bits, donor: Bits, dtypes: Triple, alpha: float) -> Bits:
    """Blend two storage arrays of one shape into a third."""
    base_dtype, donor_dtype, out_dtype = dtypes
    if alpha == 0:
        return cast(base, base_dtype, out_dtype)
    if alpha == 1:
        return cast(donor, donor_dtype, out_dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        mixed = (1.0 - alpha) * widen(base, base_dtype) + alpha * widen(donor, donor_dtype)
    out = narrow(mixed, out_dtype)
    if base_dtype == donor_dtype == out_dtype:
        return np.where(base == donor, base, out)
    return out


def without_ends(
    parts: Sequence[tuple[T, T, T]], dtypes: Triple, alpha: float
) -> tuple[Sequence[tuple[T, T, T]], Triple, float]:
    """Express alpha 0 and 1 as alpha 0.5 of one side with itself, which is that side exactly.

    A kernel that is given this needs no loop of its own for the ends. Parts are (base, donor, out).
    """
    if alpha not in (0, 1):
        return parts, dtypes, alpha
    side = int(alpha)
    parts = [(part[side], part[side], part[2]) for part in parts]
    return parts, (dtypes[side], dtypes[side], dtypes[2]), 0.5


def cast(bits: Bits, dtype: str, out_dtype: str) -> Bits:
    """Change the dtype; the same dtype keeps every bit."""
    return bits.copy() if dtype == out_dtype else narrow(widen(bits, dtype), out_dtype)


def widen(bits: Bits, dtype: str) -> Floats:
    """Exact float64 values of a storage array."""
    if dtype == "BF16":
        bits, dtype = np.left_shift(bits, np.uint32(16), dtype=np.uint32), "F32"
    with np.errstate(invalid="ignore"):
        return bits.view(np.float16 if dtype == "F16" else np.float32).astype(np.float64)


def narrow(values: Floats, dtype: str) -> Bits:
    """Round float64 to nearest, ties to even, in one step; overflow gives infinity."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if dtype == "BF16":
            bits: Bits = _narrow_bf16(values)
        elif dtype == "F16":
            bits = values.astype(np.float16).view(np.uint16)
        else:
            bits = values.astype(np.float32).view(np.uint32)
    quiet = STORAGE[dtype](QUIET_NAN[dtype])
    return np.where(np.isnan(values), quiet, bits)


def _narrow_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """Choose between the two bf16 values around each value, by their midpoint."""
    size = np.abs(values)
    single = size.astype(np.float32)
    below = np.where(single.astype(np.float64) > size, np.nextafter(single, np.float32(0)), single)
    lower = (below.view(np.uint32) >> 16).astype(np.uint16)
    lower = np.where(np.isinf(size), np.uint16(0x7F80), lower)
    upper = np.where(lower == 0x7F7F, 2.0**128, widen(lower + np.uint16(1), "BF16"))
    middle = (widen(lower, "BF16") + upper) / 2
    up = (size > middle) | ((size == middle) & (lower & 1 == 1))
    up &= ~np.isinf(size)
    sign = np.signbit(values).astype(np.uint16) << np.uint16(15)
    rounded: npt.NDArray[np.uint16] = (lower + up.astype(np.uint16)) | sign
    return rounded
