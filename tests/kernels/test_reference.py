"""The reference against exact fractions, in which there is no floating point."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from bits import (
    DTYPES,
    FORMATS,
    SAME,
    TRIPLES,
    WIDTH,
    Bits,
    Triple,
    bits_of,
    exact_values,
    is_finite,
    ordered,
    patterns,
    rounded,
    specials,
    weights,
)
from lowmem_adamms.kernels import reference


@pytest.mark.parametrize("dtype", DTYPES)
def test_widen_is_exact(dtype: str) -> None:
    bits = np.concatenate([patterns(dtype, 2000, 0), specials(dtype)])
    bits = bits[is_finite(bits, dtype)]
    found = [Fraction(x) for x in reference.widen(bits, dtype).tolist()]
    assert found == exact_values(bits, dtype)


def near_ties_and_ends(dtype: str) -> list[Fraction]:
    """Values at, and next to, ties and the format's ends; every one a float64."""
    fraction, smallest, largest = FORMATS[dtype]
    unit = Fraction(2) ** (smallest - fraction)  # the smallest subnormal
    top = (2 - Fraction(2) ** -fraction) * Fraction(2) ** largest
    out = [unit * step / 4 for step in range(-9, 10)]
    out += [unit * ((1 << fraction) + Fraction(step, 2)) for step in range(-5, 6)]
    out += [top + Fraction(2) ** (largest - fraction) * step / 4 for step in range(-4, 5)]
    out += [1 + Fraction(step, 4) / (1 << fraction) for step in range(-9, 10)]
    assert all(x == Fraction(float(x)) for x in out)
    near = [math.nextafter(float(x), side) for x in out for side in (-math.inf, math.inf)]
    return out + [Fraction(x) for x in near]


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_rounds_once_to_nearest_even(dtype: str) -> None:
    random = np.random.default_rng(0)
    middle = FORMATS[dtype][2]
    drawn = random.standard_normal(900) * 2.0 ** random.integers(-middle - 25, middle + 2, 900)
    exact = near_ties_and_ends(dtype) + [Fraction(x) for x in drawn.tolist()]
    found = reference.narrow(np.array([float(x) for x in exact]), dtype)
    assert ordered(found, dtype).tolist() == [int(ordered(rounded(x, dtype), dtype)) for x in exact]


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_keeps_the_sign_of_zero_and_makes_nan_quiet(dtype: str) -> None:
    found = reference.narrow(np.array([0.0, -0.0, -1e-300, np.nan, -np.nan]), dtype).tolist()
    sign = 1 << WIDTH[dtype] - 1
    quiet = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000}[dtype]
    assert found == [0, sign, sign, quiet, quiet]


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_agrees_with_torch(dtype: str) -> None:
    single = patterns("F32", 200_000, 5).view(np.float32)
    single = single[~np.isnan(single)]
    found = reference.narrow(single.astype(np.float64), dtype)
    torch_dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    word = torch.int16 if WIDTH[dtype] == 16 else torch.int32
    by_torch = torch.tensor(single).to(torch_dtype).view(word).numpy()
    assert np.array_equal(found, by_torch.view(reference.STORAGE[dtype]))


def assert_correctly_rounded(base: Bits, donor: Bits, dtypes: Triple, alpha: float) -> None:
    """The result lies between the roundings of the exact sum less and plus float64's own error.

    That error is at most 2**-51 of the larger input; it is none where alpha is a power of two and
    the sum a float64. Nearly always the two roundings are one: the correctly rounded result.
    """
    out = reference.blend(base, donor, dtypes, alpha)
    weight = Fraction(alpha)
    unique = 0
    sides = exact_values(base, dtypes[0]), exact_values(donor, dtypes[1])
    for b, d, bits in zip(*sides, out.tolist(), strict=True):
        exact = (1 - weight) * b + weight * d
        no_error = weight.numerator == 1 and Fraction(float(exact)) == exact
        slack = 0 if no_error else max(abs(b), abs(d)) / (1 << 51)
        low, high = (
            int(ordered(rounded(exact + side * slack, dtypes[2]), dtypes[2])) for side in (-1, 1)
        )
        assert low <= int(ordered(bits, dtypes[2])) <= high, (float(b), float(d), hex(bits))
        unique += low == high
    assert unique > 0.9 * out.size


@pytest.mark.parametrize("dtypes", TRIPLES, ids="-".join)
def test_the_blend_is_correctly_rounded_on_weights(dtypes: Triple) -> None:
    base, donor = weights(dtypes[0], 150, 0), weights(dtypes[1], 150, 1)
    for alpha in (0.1, 0.3, 0.5):
        assert_correctly_rounded(base, donor, dtypes, alpha)


@pytest.mark.parametrize("dtypes", SAME, ids="-".join)
def test_the_blend_is_correctly_rounded_at_all_magnitudes(dtypes: Triple) -> None:
    """Of like size, so that both sides matter; subnormals and the overflow to infinity included."""
    random = np.random.default_rng(2)
    base = np.concatenate([patterns(dtypes[0], 300, 7), specials(dtypes[0])])
    donor = (base + random.integers(-4, 5, base.size)).astype(base.dtype)
    both = is_finite(base, dtypes[0]) & is_finite(donor, dtypes[1])
    for alpha in (0.3, 0.5):
        assert_correctly_rounded(base[both], donor[both], dtypes, alpha)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cancellation_keeps_only_float64s_error(dtype: str) -> None:
    """0.7 * 3 - 0.3 * 7 is 0 but for the rounding of 0.3: a float32 sum would leave 1e-7."""
    out = reference.blend(bits_of(3, dtype), bits_of(-7, dtype), (dtype, dtype, "F32"), 0.3)
    assert abs(float(reference.widen(out, "F32")[0])) <= 7 * 2.0**-51


# Stochastic rounding


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_stochastic_rounding_takes_a_neighbour_and_keeps_what_is_exact(dtype: str) -> None:
    base, donor = weights(dtype, 9000, 0), weights(dtype, 9000, 1)
    exact = reference.widen(base, dtype) * 0.7 + reference.widen(donor, dtype) * 0.3
    out, nearest = (
        reference.blend(base, donor, (dtype,) * 3, 0.3, True),
        reference.narrow(exact, dtype),
    )
    assert np.abs(ordered(out, dtype) - ordered(nearest, dtype)).max() == 1
    above = [reference.widen(bits, dtype) > exact for bits in (out, nearest)]
    assert np.array_equal(out != nearest, above[0] != above[1])
    even = base & np.uint16(0xFFFC)  # so that two steps on the exponent is the same
    halfway = reference.blend(even, even + np.uint16(2), (dtype,) * 3, 0.5, True)
    assert np.array_equal(halfway, even + np.uint16(1))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_stochastic_rounding_is_right_in_the_mean(dtype: str, steps: int) -> None:
    """Of weights a few steps apart; to nearest, those one step apart stay the base's."""
    base = weights(dtype, 100_000, 0)
    donor = (base + np.uint16(steps)).astype(np.uint16)
    for alpha in (0.1, 0.3, 0.45):
        for stochastic in (True, False):
            out = reference.blend(base, donor, (dtype,) * 3, alpha, stochastic)
            moved = float((out - base).astype(np.int16).mean()) / steps
            if stochastic or steps == 1:
                assert (abs(moved - alpha) < 0.005) == stochastic


def test_stochastic_rounding_leaves_f32_alone() -> None:
    base, donor = weights("F32", 900, 0), weights("F32", 900, 1)
    both = [reference.blend(base, donor, ("F32",) * 3, 0.3, way) for way in (True, False)]
    assert np.array_equal(*both)
