"""Bit patterns of bf16, fp16 and fp32, and their exact values, from the formats' definitions."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
from lowmem_adamms.kernels import reference

Bits = npt.NDArray[Any]
Triple = tuple[str, str, str]

DTYPES = ("BF16", "F16", "F32")
# Base, donor and output; every two of a triple's three places see every combination of dtypes
TRIPLES: list[Triple] = [
    (base, donor, DTYPES[2 * (i + j) % 3])
    for (i, base), (j, donor) in itertools.product(enumerate(DTYPES), repeat=2)
]
SAME: list[Triple] = [(dtype, dtype, dtype) for dtype in DTYPES]
ALPHAS = (0.0, 5e-324, 1e-9, 0.1, 0.3, 0.5, 2 / 3, math.nextafter(1, 0), 1.0)
# Explicit fraction bits, smallest and largest exponent of a normal number
FORMATS = {"BF16": (7, -126, 127), "F16": (10, -14, 15), "F32": (23, -126, 127)}
WIDTH = {"BF16": 16, "F16": 16, "F32": 32}


def fields(dtype: str) -> tuple[int, int, int]:
    """Fraction bits, exponent's bias, and the exponent field that means infinity or NaN."""
    fraction, _, largest = FORMATS[dtype]
    return fraction, largest, 2 * largest + 1


def specials(dtype: str) -> Bits:
    """Bit patterns where things go wrong: zeros, subnormals, the ends, infinities, NaNs, ones."""
    fraction, bias, top = fields(dtype)
    positive = [
        0,
        1,
        (1 << fraction) - 1,  # the largest subnormal
        1 << fraction,  # the smallest normal
        (bias << fraction) - 1,
        bias << fraction,  # 1
        (bias << fraction) + 1,
        (top << fraction) - 1,  # the largest number
        top << fraction,  # infinity
        (top << fraction) + 1,  # a signalling NaN
        (top << fraction) + (1 << fraction - 1),  # the quiet NaN
        (top << fraction) + (1 << fraction) - 1,
    ]
    sign = 1 << WIDTH[dtype] - 1
    return np.array(positive + [sign | bits for bits in positive], reference.STORAGE[dtype])


def patterns(dtype: str, count: int, seed: int) -> Bits:
    """Random bit patterns, so of all magnitudes and with NaN and infinity among them."""
    random = np.random.default_rng(seed)
    return random.integers(0, 1 << WIDTH[dtype], count).astype(reference.STORAGE[dtype])


def pair(dtypes: Triple, count: int, seed: int) -> tuple[Bits, Bits]:
    return patterns(dtypes[0], count, seed), patterns(dtypes[1], count, seed + 1)


def special_pairs(dtypes: Triple) -> tuple[Bits, Bits]:
    """Every special pattern beside every other."""
    base, donor = specials(dtypes[0]), specials(dtypes[1])
    return np.repeat(base, donor.size), np.tile(donor, base.size)


def weights(dtype: str, count: int, seed: int) -> Bits:
    """Weights as models have them: about normal, sigma 0.02."""
    bits: Bits = reference.narrow(np.random.default_rng(seed).normal(0, 0.02, count), dtype)
    return bits


def bits_of(value: float, dtype: str) -> Bits:
    bits: Bits = reference.narrow(np.array([value]), dtype)
    assert reference.widen(bits, dtype).tolist() == [value]
    return bits


def is_finite(bits: Bits, dtype: str) -> npt.NDArray[np.bool_]:
    fraction, _, top = fields(dtype)
    mask: npt.NDArray[np.bool_] = (bits >> fraction) & top != top
    return mask


def exact_values(bits: Bits, dtype: str) -> list[Fraction]:
    """Of finite bit patterns."""
    fraction, bias, _ = fields(dtype)
    out = []
    for word in map(int, bits):
        sign, exponent = word >> WIDTH[dtype] - 1, (word >> fraction) & (2 * bias + 1)
        size = word & ((1 << fraction) - 1)
        if exponent:
            size |= 1 << fraction
        scale = Fraction(2) ** (max(exponent, 1) - bias - fraction)
        out.append(size * scale * (-1 if sign else 1))
    return out


def rounded(value: Fraction, dtype: str) -> int:
    """The bits of the nearest number, ties to even; without the sign of a zero."""
    fraction, smallest, largest = FORMATS[dtype]
    size = abs(value)
    sign = (1 << WIDTH[dtype] - 1) if value < 0 else 0
    exponent = smallest
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    steps = size / Fraction(2) ** (exponent - fraction)
    whole = round(steps)  # of a Fraction: to nearest, ties to even
    if whole == 1 << fraction + 1:
        whole, exponent = 1 << fraction, exponent + 1
    if exponent > largest:
        return sign | fields(dtype)[2] << fraction
    if whole < 1 << fraction:
        return sign | whole
    return sign | (exponent + largest) << fraction | (whole & ((1 << fraction) - 1))


def ordered(bits: Bits | int, dtype: str) -> Any:
    """Bit patterns as integers in the order of their values (both zeros are 0)."""
    wide = np.asarray(bits).astype(np.int64)
    sign = 1 << WIDTH[dtype] - 1
    return np.where(wide & sign, -(wide & (sign - 1)), wide)
