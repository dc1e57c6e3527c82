"""The formula, in numpy: what every kernel must give, bit for bit. Slow and plain on purpose.

    out = round((1 - alpha) * base + alpha * donor)

evaluated in float64, rounded once, to nearest, ties to even. Every bf16, fp16 and fp32 value is
exact in float64, so the only error left is that of the sum (2**-52 relative to its larger term):
what is written is that float64 correctly rounded, where base and donor nearly cancel as well.

Exceptions, so that nothing is lost at the ends: alpha 0 gives the base and alpha 1 the donor, also
beside NaN or infinity; where base and donor have equal bits of the output's dtype, these come out
unchanged. Any other NaN is written as the dtype's quiet NaN (0x7fc0, 0x7e00, 0x7fc00000).

Tensors are handled as storage arrays: uint16 for BF16 and F16, uint32 for F32.
Leaves to others: speed (`cpu.py`) and which kernel runs (`select.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
Bits = npt.NDArray[np.unsignedinteger[Any]]
Floats = npt.NDArray[np.float64]

STORAGE: dict[str, type[np.unsignedinteger[Any]]] = {
    "BF16": np.uint16,
    "F16": np.uint16,
    "F32": np.uint32,
}
SUMS = ("read", "finite", "equal", "odd_a", "odd_b", "ab", "aa", "bb", "dd")
"""What `relate` gives: counts of elements (odd: not finite), then sums of products; d is a - b."""
QUIET_NAN = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000}


def blend(base: Bits, donor: Bits, dtypes: tuple[str, str, str], alpha: float) -> Bits:
    """Blend two storage arrays of one shape. dtypes: of base, donor and output."""
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
    parts: Sequence[tuple[T, T, T]], dtypes: tuple[str, str, str], alpha: float
) -> tuple[Sequence[tuple[T, T, T]], tuple[str, str, str], float]:
    """Alpha 0 and 1 as a half: half of one side and half of the same is that side exactly.

    parts: base, donor and output; a kernel that is given them so needs no other loop for the ends.
    """
    if alpha not in (0, 1):
        return parts, dtypes, alpha
    side = int(alpha)
    parts = [(part[side], part[side], part[2]) for part in parts]
    return parts, (dtypes[side], dtypes[side], dtypes[2]), 0.5


def cast(bits: Bits, dtype: str, out_dtype: str) -> Bits:
    """Change of dtype alone; the same dtype keeps every bit."""
    return bits.copy() if dtype == out_dtype else narrow(widen(bits, dtype), out_dtype)


def widen(bits: Bits, dtype: str) -> Floats:
    """Exact float64 values of a storage array."""
    if dtype == "BF16":
        bits, dtype = np.left_shift(bits, np.uint32(16), dtype=np.uint32), "F32"
    with np.errstate(invalid="ignore"):
        return bits.view(np.float16 if dtype == "F16" else np.float32).astype(np.float64)


def relate(a: Bits, b: Bits, dtypes: tuple[str, str]) -> Floats:
    """How two storage arrays of one shape relate: the nine sums that SUMS names, in float64.

    Sums of products are over the elements that are finite on both sides. Elements are equal if
    their bits are; of different dtypes if their values are, or both are NaN.
    """
    x, y = widen(a, dtypes[0]), widen(b, dtypes[1])
    equal = a == b if dtypes[0] == dtypes[1] else (x == y) | (np.isnan(x) & np.isnan(y))
    fine_x, fine_y = np.isfinite(x), np.isfinite(y)
    fine = fine_x & fine_y
    counts = (x.size, fine.sum(), equal.sum(), x.size - fine_x.sum(), x.size - fine_y.sum())
    x, y = x[fine], y[fine]
    return np.array([*counts, x @ y, x @ x, y @ y, (x - y) @ (x - y)], np.float64)


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
    """bf16 by its two neighbours: the one below in magnitude, the one above, and their midpoint."""
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
