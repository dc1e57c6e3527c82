"""The arithmetic: the reference against exact fractions, the compiled kernel against the reference.

The exact side is written here from the formats' definitions, with no floating point in it.
"""

from __future__ import annotations

import importlib
import itertools
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowmem_adamms.kernels import cpu, reference, select

Bits = npt.NDArray[Any]
Triple = tuple[str, str, str]

DTYPES = ("BF16", "F16", "F32")
PAIRS = list(itertools.product(DTYPES, repeat=2))
TRIPLES = list(itertools.product(DTYPES, repeat=3))
ALPHAS = (0.0, 5e-324, 1e-9, 0.1, 0.3, 0.5, 2 / 3, math.nextafter(1, 0), 1.0)
# Explicit fraction bits, smallest and largest exponent of a normal number
FORMATS = {"BF16": (7, -126, 127), "F16": (10, -14, 15), "F32": (23, -126, 127)}
WIDTH = {"BF16": 16, "F16": 16, "F32": 32}


def fields(dtype: str) -> tuple[int, int, int]:
    """Fraction bits, exponent's bias, and the exponent field that means infinity or NaN."""
    fraction, _, largest = FORMATS[dtype]
    return fraction, largest, 2 * largest + 1


def specials(dtype: str) -> list[int]:
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
    return positive + [sign | bits for bits in positive]


def patterns(dtype: str, count: int, seed: int) -> Bits:
    """Random bit patterns, so of all magnitudes and with NaN and infinity among them."""
    random = np.random.default_rng(seed)
    return random.integers(0, 1 << WIDTH[dtype], count).astype(reference.STORAGE[dtype])


def values(bits: Bits, dtype: str) -> list[Fraction]:
    """Exact values of finite bit patterns."""
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


def finite(bits: Bits, dtype: str) -> npt.NDArray[np.bool_]:
    fraction, _, top = fields(dtype)
    mask: npt.NDArray[np.bool_] = (bits >> fraction) & top != top
    return mask


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


def run(
    parts: list[tuple[Bits, Bits]], dtypes: Triple, alpha: float, kernel: Any = cpu.blend
) -> list[Bits]:
    """The kernel's results for storage arrays, in buffers that are filled with rubbish before."""
    outs = [np.full(base.size, 0xA5, reference.STORAGE[dtypes[2]]) for base, _ in parts]
    kernel(
        [
            (base.view(np.uint8), donor.view(np.uint8), out.view(np.uint8))
            for (base, donor), out in zip(parts, outs, strict=True)
        ],
        dtypes,
        alpha,
    )
    return outs


def pair(dtypes: Triple, count: int, seed: int) -> tuple[Bits, Bits]:
    return patterns(dtypes[0], count, seed), patterns(dtypes[1], count, seed + 1)


# The kernel against the reference


@pytest.mark.parametrize("dtypes", TRIPLES, ids="-".join)
def test_kernel_equals_reference_on_any_bits(dtypes: Triple) -> None:
    grid = list(itertools.product(specials(dtypes[0]), specials(dtypes[1])))
    ends = tuple(
        np.array(column, reference.STORAGE[dtype])
        for column, dtype in zip(zip(*grid, strict=True), dtypes, strict=False)
    )
    sides = [np.concatenate(both) for both in zip(pair(dtypes, 40_000, 3), ends, strict=True)]
    for alpha in ALPHAS:
        expected = reference.blend(sides[0], sides[1], dtypes, alpha)
        (found,) = run([(sides[0], sides[1])], dtypes, alpha)
        different = np.flatnonzero(found != expected)
        assert not different.size, (
            alpha,
            [hex(side[different[0]]) for side in (*sides, found, expected)],
        )


@pytest.mark.parametrize("dtypes", [("BF16",) * 3, ("F16",) * 3], ids="-".join)
@pytest.mark.parametrize("alpha", [0.3, 0.5])
def test_kernel_equals_reference_on_every_16_bit_base(dtypes: Triple, alpha: float) -> None:
    base = np.arange(1 << 16, dtype=np.uint16)
    for donor in (patterns(dtypes[1], base.size, 1), base[::-1].copy(), base):
        (found,) = run([(base, donor)], dtypes, alpha)
        assert np.array_equal(found, reference.blend(base, donor, dtypes, alpha))


def test_many_parts_of_awkward_sizes_in_one_call() -> None:
    sizes = [1, cpu.BLOCK - 1, 0, cpu.BLOCK, 3, cpu.BLOCK + 1, 2 * cpu.BLOCK + 7, 0, 1]
    for dtypes in (("BF16", "BF16", "BF16"), ("BF16", "F16", "F32"), ("F32", "F32", "BF16")):
        parts = [pair(dtypes, size, 10 * i) for i, size in enumerate(sizes)]
        for found, (base, donor) in zip(run(parts, dtypes, 0.3), parts, strict=True):
            assert np.array_equal(found, reference.blend(base, donor, dtypes, 0.3))


def test_only_the_output_buffers_are_written() -> None:
    dtypes = ("BF16", "BF16", "BF16")
    base, donor = pair(dtypes, cpu.BLOCK + 5, 0)
    before = base.copy(), donor.copy()
    around = np.full(base.size + 20, 0x1234, np.uint16)
    cpu.blend(
        [(base.view(np.uint8), donor.view(np.uint8), around[10:-10].view(np.uint8))], dtypes, 0.3
    )
    assert (around[:10] == 0x1234).all()
    assert (around[-10:] == 0x1234).all()
    assert np.array_equal(base, before[0])
    assert np.array_equal(donor, before[1])


def test_read_only_inputs_are_accepted() -> None:
    dtypes = ("F16", "F16", "F16")
    base, donor = pair(dtypes, 100, 0)
    expected = reference.blend(base, donor, dtypes, 0.3)
    base.flags.writeable = donor.flags.writeable = False
    assert np.array_equal(run([(base, donor)], dtypes, 0.3)[0], expected)


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from([("BF16",) * 3, ("F16",) * 3, ("F32",) * 3, ("BF16", "F16", "BF16")]),
    st.floats(0, 1),
    st.data(),
)
def test_kernel_equals_reference_element_by_element(
    dtypes: Triple, alpha: float, data: st.DataObject
) -> None:
    base, donor = (
        np.array([data.draw(st.integers(0, (1 << WIDTH[dtype]) - 1))], reference.STORAGE[dtype])
        for dtype in dtypes[:2]
    )
    (found,) = run([(base, donor)], dtypes, alpha)
    assert found.tolist() == reference.blend(base, donor, dtypes, alpha).tolist()


def test_two_threads_may_call_at_once() -> None:
    dtypes = ("BF16", "BF16", "BF16")
    sides = [pair(dtypes, 3 * cpu.BLOCK, seed) for seed in range(4)]
    expected = [reference.blend(*side, dtypes, 0.3) for side in sides]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            found = pool.map(lambda side: run([side], dtypes, 0.3)[0], sides)
            assert all(map(np.array_equal, found, expected))


# The reference against exact arithmetic


@pytest.mark.parametrize("dtype", DTYPES)
def test_widen_is_exact(dtype: str) -> None:
    bits = np.concatenate([patterns(dtype, 2000, 0), np.array(specials(dtype))])
    bits = bits.astype(reference.STORAGE[dtype])
    bits = bits[finite(bits, dtype)]
    assert [Fraction(x) for x in reference.widen(bits, dtype).tolist()] == values(bits, dtype)


def interesting(dtype: str) -> list[Fraction]:
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
    drawn = random.standard_normal(3000) * 2.0 ** random.integers(-middle - 25, middle + 2, 3000)
    exact = interesting(dtype) + [Fraction(x) for x in drawn.tolist()]
    found = reference.narrow(np.array([float(x) for x in exact]), dtype)
    assert ordered(found, dtype).tolist() == [int(ordered(rounded(x, dtype), dtype)) for x in exact]


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_keeps_the_sign_of_zero_and_makes_nan_quiet(dtype: str) -> None:
    found = reference.narrow(np.array([0.0, -0.0, -1e-300, np.nan, -np.nan]), dtype).tolist()
    sign = 1 << WIDTH[dtype] - 1
    quiet = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000}[dtype]
    assert found == [0, sign, sign, quiet, quiet]


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_agrees_with_numpy_and_torch(dtype: str) -> None:
    single = patterns("F32", 200_000, 5).view(np.float32)
    single = single[~np.isnan(single)]
    found = reference.narrow(single.astype(np.float64), dtype)
    torch_dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    word = torch.int16 if WIDTH[dtype] == 16 else torch.int32
    by_torch = torch.tensor(single).to(torch_dtype).view(word).numpy()
    assert np.array_equal(found, by_torch.view(reference.STORAGE[dtype]))
    if dtype != "BF16":
        with np.errstate(over="ignore", under="ignore"):
            by_numpy = single.astype(np.float16 if dtype == "F16" else np.float32)
        assert np.array_equal(found, by_numpy.view(reference.STORAGE[dtype]))


def scaled(dtype: str, count: int, seed: int) -> Bits:
    """Weights as they are: about normal, sigma 0.02."""
    bits: Bits = reference.narrow(np.random.default_rng(seed).normal(0, 0.02, count), dtype)
    return bits


def assert_correctly_rounded(base: Bits, donor: Bits, dtypes: Triple, alpha: float) -> None:
    """The result lies between the roundings of the exact sum less and plus float64's own error.

    That error is at most 2**-51 of the larger input; it is none where alpha is a power of two and
    the sum a float64. Nearly always the two roundings are one: the correctly rounded result.
    """
    out = reference.blend(base, donor, dtypes, alpha)
    weight = Fraction(alpha)
    unique = 0
    for b, d, bits in zip(
        values(base, dtypes[0]), values(donor, dtypes[1]), out.tolist(), strict=True
    ):
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
def test_reference_is_correctly_rounded_on_weights(dtypes: Triple) -> None:
    base, donor = scaled(dtypes[0], 500, 0), scaled(dtypes[1], 500, 1)
    for alpha in (0.1, 0.3, 0.5):
        assert_correctly_rounded(base, donor, dtypes, alpha)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_correctly_rounded_at_all_magnitudes(dtype: str) -> None:
    """Of like size, so that both sides matter; subnormals and the overflow to infinity included."""
    random = np.random.default_rng(2)
    base = patterns(dtype, 1000, 7)
    base = np.concatenate([base, np.array(specials(dtype), base.dtype)])
    donor = (base + random.integers(-4, 5, base.size)).astype(base.dtype)
    both = finite(base, dtype) & finite(donor, dtype)
    for alpha in (0.3, 0.5):
        assert_correctly_rounded(base[both], donor[both], (dtype, dtype, dtype), alpha)


def bits_of(value: float, dtype: str) -> Bits:
    bits: Bits = reference.narrow(np.array([value]), dtype)
    assert reference.widen(bits, dtype).tolist() == [value]
    return bits


def test_cancellation_keeps_only_float64s_error() -> None:
    """0.7 * 3 - 0.3 * 7 is 0 but for the rounding of 0.3: a float32 sum would leave 1e-7."""
    for dtype in DTYPES:
        out = reference.blend(bits_of(3, dtype), bits_of(-7, dtype), (dtype, dtype, "F32"), 0.3)
        assert abs(float(reference.widen(out, "F32")[0])) <= 7 * 2.0**-51


@pytest.mark.parametrize("kernel", [cpu.blend, select._plain], ids=["numba", "numpy"])
@pytest.mark.parametrize(
    ("dtypes", "base", "donor", "expected"),
    [
        # Halfway between 1 and the next number: the even one below; between the next two: above
        (("BF16",) * 3, 1.0, 1 + 2**-7, 1.0),
        (("BF16",) * 3, 1 + 2**-7, 1 + 2**-6, 1 + 2**-6),
        (("F16",) * 3, 1.0, 1 + 2**-10, 1.0),
        (("F16",) * 3, 1 + 2**-10, 1 + 2**-9, 1 + 2**-9),
        (("F32",) * 3, 1.0, 1 + 2**-23, 1.0),
        # A hair above a tie: 1 + 2**-8 + 2**-24. Rounding by way of float32 would lose the hair
        (("F32", "F32", "BF16"), 1.0, 1 + 2**-7 + 2**-23, 1 + 2**-7),
        (("F32", "F32", "F16"), 1.0, 1 + 2**-10 + 2**-23, 1 + 2**-10),
        # Subnormal results: half of the smallest ties to zero, three halves to two
        (("BF16",) * 3, 2.0**-133, 0.0, 0.0),
        (("BF16",) * 3, 2.0**-133, 2.0**-132, 2.0**-132),
        (("F16",) * 3, 2.0**-24, 0.0, 0.0),
        (("F16",) * 3, 2.0**-24, 2.0**-23, 2.0**-23),
        (("F32",) * 3, 2.0**-149, 0.0, 0.0),
        (("F32", "F32", "F16"), 2.0**-24 + 2.0**-40, 0.0, 2.0**-24),
        # Overflow: into fp16 from values it cannot hold; 65519 still rounds down to 65504
        (("F32", "F32", "F16"), 65520.0, 65520.0, math.inf),
        (("F32", "F32", "F16"), 65519.0, 65519.0, 65504.0),
    ],
)
def test_ties_subnormals_and_overflow_at_half(
    kernel: Any, dtypes: Triple, base: float, donor: float, expected: float
) -> None:
    sides = bits_of(base, dtypes[0]), bits_of(donor, dtypes[1])
    (found,) = run([sides], dtypes, 0.5, kernel)
    assert reference.widen(found, dtypes[2]).tolist() == [expected]


@pytest.mark.parametrize("kernel", [cpu.blend, select._plain], ids=["numba", "numpy"])
def test_largest_float32_overflows_bf16(kernel: Any) -> None:
    top = np.array([np.finfo(np.float32).max], np.float32).view(np.uint32)
    (found,) = run([(top, top)], ("F32", "F32", "BF16"), 0.3, kernel)
    assert found.tolist() == [0x7F80]


# The exceptions of the formula


@pytest.mark.parametrize("kernel", [cpu.blend, select._plain], ids=["numba", "numpy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_give_one_sides_bytes_beside_nan_and_infinity(kernel: Any, dtype: str) -> None:
    grid = itertools.product(specials(dtype), repeat=2)
    base, donor = np.array(list(grid), reference.STORAGE[dtype]).T.copy()
    for alpha, side in ((0.0, base), (1.0, donor)):
        (found,) = run([(base, donor)], (dtype, dtype, dtype), alpha, kernel)
        assert np.array_equal(found, side)


@pytest.mark.parametrize("kernel", [cpu.blend, select._plain], ids=["numba", "numpy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_inputs_come_out_unchanged(kernel: Any, dtype: str) -> None:
    bits = np.concatenate([patterns(dtype, 20_000, 0), np.array(specials(dtype))])
    bits = bits.astype(reference.STORAGE[dtype])
    for alpha in ALPHAS:
        assert np.array_equal(run([(bits, bits)], (dtype,) * 3, alpha, kernel)[0], bits)


@pytest.mark.parametrize("dtypes", TRIPLES, ids="-".join)
def test_nan_on_either_side_is_written_quiet(dtypes: Triple) -> None:
    nan = [np.array([specials(dtype)[9]], reference.STORAGE[dtype]) for dtype in dtypes]
    one = [bits_of(1, dtype) for dtype in dtypes]
    quiet = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000}[dtypes[2]]
    for base, donor in ((nan[0], one[1]), (one[0], nan[1])):
        assert run([(base, donor)], dtypes, 0.3)[0].tolist() == [quiet]


@pytest.mark.parametrize("dtypes", [(d, d, d) for d in DTYPES] + [("BF16", "F16", "BF16")])
def test_a_million_weights_lie_within_one_ulp_of_float64(dtypes: Triple) -> None:
    base, donor = scaled(dtypes[0], 1 << 20, 0), scaled(dtypes[1], 1 << 20, 1)
    (out,) = run([(base, donor)], dtypes, 0.3)
    wide = 0.7 * reference.widen(base, dtypes[0]) + 0.3 * reference.widen(donor, dtypes[1])
    fraction, smallest, _ = FORMATS[dtypes[2]]
    _, exponent = np.frexp(wide)
    ulp = 2.0 ** (np.maximum(exponent - 1, smallest) - fraction)
    error = np.abs(reference.widen(out, dtypes[2]) - wide) / ulp
    assert error.max() <= 0.5 + 1e-6  # better than promised: correctly rounded, not only close


# Selection


def test_numba_is_chosen_where_it_works() -> None:
    kernel, why = select.select()
    assert kernel is cpu.blend
    assert "numba" in why


def test_without_numba_numpy_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    package = importlib.import_module("lowmem_adamms.kernels")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "numba", None)
        without.delitem(sys.modules, "lowmem_adamms.kernels.cpu")
        without.delattr(package, "cpu")
        kernel, why = select.select()
    assert kernel is not cpu.blend
    assert why.startswith("numpy: numba cannot be imported")
    for dtypes in (("BF16", "BF16", "BF16"), ("F32", "F16", "BF16"), ("F16", "F32", "F32")):
        parts = [pair(dtypes, size, size) for size in (1, 1000, 0, 77)]
        for alpha in (0.0, 0.3, 1.0):
            plain, compiled = (run(parts, dtypes, alpha, k) for k in (kernel, cpu.blend))
            assert all(map(np.array_equal, plain, compiled))


# How two sides relate


@pytest.mark.parametrize("dtypes", PAIRS, ids="-".join)
def test_relation_agrees_with_exact_arithmetic(dtypes: tuple[str, str]) -> None:
    a, b = (
        np.concatenate([patterns(dtype, 300, seed), np.array(specials(dtype))]).astype(
            reference.STORAGE[dtype]
        )
        for seed, dtype in enumerate(dtypes)
    )
    a, b = a[: min(a.size, b.size)], b[: min(a.size, b.size)]
    a[5:9] = a[0] if dtypes[0] == dtypes[1] else 0
    b[5:9] = a[5:9]
    odd = [~finite(side, dtype) for side, dtype in zip((a, b), dtypes, strict=True)]
    fine = ~(odd[0] | odd[1])
    x, y = values(a[fine], dtypes[0]), values(b[fine], dtypes[1])
    found = dict(zip(reference.SUMS, reference.relate(a, b, dtypes).tolist(), strict=True))
    assert (found["read"], found["finite"]) == (a.size, fine.sum())
    assert (found["odd_a"], found["odd_b"]) == (odd[0].sum(), odd[1].sum())
    size = float(max(sum(v * v for v in x), sum(w * w for w in y)))
    for name, exact in (
        ("ab", sum(v * w for v, w in zip(x, y, strict=True))),
        ("aa", sum(v * v for v in x)),
        ("bb", sum(w * w for w in y)),
        ("dd", sum((v - w) ** 2 for v, w in zip(x, y, strict=True))),
    ):
        assert found[name] == pytest.approx(float(exact), rel=1e-12, abs=1e-12 * size)
    assert found["equal"] >= 4


@pytest.mark.parametrize("relate", [cpu.relate, select._plain_relation])
@pytest.mark.parametrize("dtypes", PAIRS, ids="-".join)
def test_every_relation_gives_the_reference_s_sums(dtypes: tuple[str, str], relate: Any) -> None:
    for count in (0, 1, cpu.BLOCK - 1, 3 * cpu.BLOCK + 7):
        a, b = (patterns(dtype, count, seed) for seed, dtype in enumerate(dtypes))
        a[::3] = 0x3F80 if dtypes[0] == "BF16" else 0x3C00  # equal elements among the others
        b[::3] = a[::3] if dtypes[0] == dtypes[1] else 0
        expected = reference.relate(a, b, dtypes)
        found = relate(a.view(np.uint8), b.view(np.uint8), dtypes)
        assert found[:5].tolist() == expected[:5].tolist()
        assert found[5:] == pytest.approx(expected[5:], rel=1e-9, abs=1e-12 * expected[6:8].sum())


def test_equal_means_the_same_bits_or_the_same_value() -> None:
    def equal(a: list[int], b: list[int], dtypes: tuple[str, str]) -> list[float]:
        sides = [
            np.array(bits, reference.STORAGE[dtype])
            for bits, dtype in zip((a, b), dtypes, strict=True)
        ]
        raw = [side.view(np.uint8) for side in sides]
        return [
            float(relate(*raw, dtypes)[2]) for relate in (cpu.relate, select._plain_relation)
        ] + [float(reference.relate(sides[0], sides[1], dtypes)[2])]

    assert equal([0, 0x7FC0], [0x8000, 0x7FC1], ("BF16", "BF16")) == [0] * 3  # -0, another NaN
    assert equal([0x3F80, 0x7FC0], [0x3F80, 0x7FC0], ("BF16", "BF16")) == [2] * 3
    wide = [0x3F800000, 0x7FC00001, 0x80000000]
    assert equal([0x3F80, 0x7FC0, 0], wide, ("BF16", "F32")) == [3] * 3
    assert equal([0x3C00], [0x3F800001], ("F16", "F32")) == [0] * 3


def test_relating_does_not_hang_on_the_number_of_threads() -> None:
    import numba

    a, b = (patterns("BF16", 5 * cpu.BLOCK + 3, seed).view(np.uint8) for seed in (1, 2))
    every = cpu.relate(a, b, ("BF16", "BF16"))
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        assert cpu.relate(a, b, ("BF16", "BF16")).tolist() == every.tolist()
    finally:
        numba.set_num_threads(before)
