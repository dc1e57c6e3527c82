"""The formulas in numpy, slow and plain: every kernel must give these bits.

Of two models, `blend`:

    out = round((1 - alpha) * base + alpha * donor)

evaluated in float64 and rounded once. Every bf16, fp16 and fp32 value is exact in float64, so the
only other error is that of the float64 sum (2**-52 of its larger term).

It is rounded to nearest, ties to even, or stochastically: see `round_stochastically`.

Exceptions: alpha 0 gives the base and alpha 1 the donor exactly, even where the other side is NaN
or infinite. Where base and donor have equal bits and the output has their dtype, these bits come
out unchanged. Any other NaN becomes the dtype's quiet NaN (0x7fc0, 0x7e00, 0x7fc00000).

Of any number of models, `mix`, with the first pass that some methods need: `count_magnitudes`,
`sum_products`.

Tensors are handled as storage arrays: uint16 for BF16 and F16, uint32 for F32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
CUT_BITS = {"BF16": 45, "F16": 42}
"""By how many bits a float64's fraction is longer than that of a dtype of 16 bits."""
GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio: its multiples are spread evenly


def blend(base: Bits, donor: Bits, dtypes: Triple, alpha: float, stochastic: bool = False) -> Bits:
    """Blend two storage arrays of one shape into a third."""
    base_dtype, donor_dtype, out_dtype = dtypes
    if alpha == 0:
        return cast(base, base_dtype, out_dtype)
    if alpha == 1:
        return cast(donor, donor_dtype, out_dtype)
    values = widen(base, base_dtype), widen(donor, donor_dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        mixed = (1.0 - alpha) * values[0] + alpha * values[1]
    if stochastic:
        mixed = round_stochastically(mixed, values, out_dtype)
    out = narrow(mixed, out_dtype)
    if base_dtype == donor_dtype == out_dtype:
        return np.where(base == donor, base, out)
    return out


def without_ends(
    parts: Sequence[tuple[T, T, T]], dtypes: Triple, alpha: float, stochastic: bool
) -> tuple[Sequence[tuple[T, T, T]], Triple, float, bool]:
    """Express alpha 0 and 1 as alpha 0.5 of one side with itself, which is that side exactly.

    A kernel that is given this needs no loop of its own for the ends. Parts are (base, donor, out).
    """
    if alpha not in (0, 1):
        return parts, dtypes, alpha, stochastic
    side = int(alpha)
    parts = [(part[side], part[side], part[2]) for part in parts]
    return parts, (dtypes[side], dtypes[side], dtypes[2]), 0.5, False


def cast(bits: Bits, dtype: str, out_dtype: str) -> Bits:
    """Change the dtype; the same dtype keeps every bit."""
    return bits.copy() if dtype == out_dtype else narrow(widen(bits, dtype), out_dtype)


def widen(bits: Bits, dtype: str) -> Floats:
    """Exact float64 values of a storage array."""
    if dtype == "BF16":
        bits, dtype = np.left_shift(bits, np.uint32(16), dtype=np.uint32), "F32"
    with np.errstate(invalid="ignore"):
        return bits.view(np.float16 if dtype == "F16" else np.float32).astype(np.float64)


def round_stochastically(mixed: Floats, values: Sequence[Floats], dtype: str) -> Floats:
    """Round to one of the two neighbours in a dtype, to the nearer one more often.

    So the mean of many is right (Gupta et al., "Deep learning with limited numerical precision",
    2015, on sums of small gradients). Fine-tuned bf16 weights are often one step apart: to nearest,
    all of these stay the base's up to alpha 0.5 and are the donor's from there on; like this, a
    share alpha of them is the donor's. A hash of the values that are mixed chooses, not their place
    or a seed, so that a tensor comes out the same however it is cut or laid out. What the dtype
    holds exactly stays as it is, and so does F32, whose steps are small.
    """
    if dtype not in CUT_BITS:
        return mixed
    cut = CUT_BITS[dtype]
    word = np.zeros(mixed.shape, np.uint32)
    with np.errstate(invalid="ignore", over="ignore"):
        for value in values:
            word = (word + narrow(value, "F32")) * np.uint32(GOLDEN)
    bits = mixed.view(np.uint64) + (word.astype(np.uint64) << np.uint64(cut - 32))
    rounded = (bits >> np.uint64(cut) << np.uint64(cut)).view(np.float64)
    return np.where(np.isnan(mixed), mixed, rounded)


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


# Any number of models

SUM_BLOCK = 1 << 15
"""Elements whose products are added one after the other. Sums of blocks are added without error, so
that a total does not depend on how a tensor is cut, if it is cut at multiples of this."""
ALL_KEPT = 1 << 53
"""`Term.kept` where no value is dropped at random."""
COARSE_BITS = 16
"""Magnitudes of F32 are counted by their upper 16 bits, then by the lower 16 of one of these."""


@dataclass(frozen=True, slots=True)
class Term:
    """What one model adds to a mixture.

    factor: of its value, or of its difference from the ancestor. weight: in the mean.
    low, high: magnitudes outside of these are left out. kept: of 2**53 values, how many the random
    choice keeps. key: of that choice.
    """

    factor: float = 1.0
    weight: float = 1.0
    low: float = 0.0
    high: float = math.inf
    kept: int = ALL_KEPT
    key: int = 0


@dataclass(frozen=True, slots=True)
class Mixing:
    """How several models become one.

        out = round(ancestor + scale * sum of factor * (model - ancestor))

    relative: the last stream is the ancestor; without one it is zero.
    elect: only what has the sign of the sum counts, in each element; a zero never does.
    mean: the sum is divided by the weights of what counts.
    keeps_equal: what all streams hold alike comes out as it is.
    stochastic: the result is rounded stochastically, not to nearest.
    """

    terms: tuple[Term, ...]
    scale: float = 1.0
    relative: bool = False
    elect: bool = False
    mean: bool = False
    keeps_equal: bool = True
    stochastic: bool = False


def mix(streams: Sequence[Bits], dtypes: Sequence[str], mixing: Mixing, first: int = 0) -> Bits:
    """Mix storage arrays of one length into another.

    Args:
        streams: One for each term, then the ancestor's if the mixing is relative.
        dtypes: Of the streams, then of the output.
        mixing: What is computed.
        first: Number of the first element in its tensor, for the random choice.
    """
    values = [widen(bits, dtype) for bits, dtype in zip(streams, dtypes, strict=False)]
    index = np.arange(first, first + len(values[0]), dtype=np.uint64)
    with np.errstate(invalid="ignore", over="ignore"):
        zeros = np.zeros(len(values[0]))
        mixed = mix_values(values, zeros, mixing, lambda key: draw(key, index), np.where)
    if mixing.stochastic:
        mixed = round_stochastically(mixed, values, dtypes[len(streams)])
    return narrow(mixed, dtypes[len(streams)])


def mix_values(
    values: Sequence[Any],
    zeros: Any,
    mixing: Mixing,
    draw: Callable[[int], Any],
    where: Callable[[Any, Any, Any], Any],
) -> Any:
    """What `mix` computes before it is rounded, on float64 arrays of numpy or of torch.

    zeros: as many. draw: from a key a random number for each element. where: numpy's or torch's.
    """
    origin = values[-1] if mixing.relative else zeros
    counts, added = [], []
    for value, term in zip(values, mixing.terms, strict=False):
        delta = value - origin
        size = abs(delta)
        is_counted = ~((size < term.low) | (size > term.high))  # in these words a NaN counts
        if term.kept != ALL_KEPT:
            is_counted = is_counted & (draw(term.key) < term.kept)
        counts.append(is_counted)
        added.append(where(is_counted, term.factor * delta, zeros))
    if mixing.elect:
        is_positive = sum(added, zeros) >= 0
        counts = [~where(is_positive, each <= 0, each >= 0) for each in added]
        added = [where(count, each, zeros) for each, count in zip(added, counts, strict=True)]
    total = sum(added, zeros)
    if mixing.mean:
        weights = zip(counts, mixing.terms, strict=True)
        divisor = sum((where(count, term.weight, zeros) for count, term in weights), zeros)
        total = total / where(divisor == 0, 1.0, divisor)
    mixed = origin + mixing.scale * total
    if not mixing.keeps_equal:
        return mixed
    is_equal = values[0] == values[0]
    for value in values[1:]:
        is_equal = is_equal & (value == values[0])
    return where(is_equal, values[0], mixed)


def draw(key: int, index: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A random number of 53 bits for each element: the finalizer of SplitMix64 of its place.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    with np.errstate(over="ignore"):
        word = np.uint64(key) + (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (word ^ (word >> np.uint64(31))) >> np.uint64(11)


# The first pass


def count_magnitudes(
    model: Bits,
    ancestor: Bits,
    dtypes: Triple,
    counts: npt.NDArray[np.int64],
    prefix: int = -1,
) -> None:
    """Count the magnitudes of model - ancestor, as the dtype dtypes[2] holds them.

    counts: is added to. Of BF16 and F16 it has an entry for each magnitude's bits; of F32 for their
    upper 16 bits, or for the lower 16 of those magnitudes whose upper bits are `prefix`.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        delta = widen(model, dtypes[0]) - widen(ancestor, dtypes[1])
    words = narrow(np.abs(delta), dtypes[2]).astype(np.int64)
    if dtypes[2] == "F32":
        upper, lower = words >> COARSE_BITS, words & ((1 << COARSE_BITS) - 1)
        words = upper if prefix < 0 else lower[upper == prefix]
    counts += np.bincount(words, minlength=len(counts))


def sum_products(
    streams: Sequence[Bits], dtypes: Sequence[str], pairs: Sequence[tuple[int, int]], relative: bool
) -> Floats:
    """Sums of products of two streams each, one row for each block of SUM_BLOCK elements.

    pairs: which streams are multiplied. relative: the last stream is subtracted from the others.
    """
    values = [widen(bits, dtype) for bits, dtype in zip(streams, dtypes, strict=True)]
    with np.errstate(invalid="ignore", over="ignore"):
        if relative:
            values = [value - values[-1] for value in values[:-1]]
        starts = range(0, len(values[0]), SUM_BLOCK)
        return np.array(
            [
                [
                    np.cumsum(values[a][i : i + SUM_BLOCK] * values[b][i : i + SUM_BLOCK])[-1]
                    for a, b in pairs
                ]
                for i in starts
            ]
        ).reshape(-1, len(pairs))


def smallest_rounded_to(word: int, dtype: str) -> float:
    """The smallest magnitude that is rounded to these bits of a dtype, or above them."""
    if word == 0:
        return 0.0
    kind = STORAGE[dtype]
    below, value = widen(np.array([word - 1, word], kind), dtype)
    middle = float(below + (value - below) / 2)
    if np.isinf(value):  # from where on a dtype rounds to infinity: as if its exponents went on
        step = below - widen(np.array([word - 2], kind), dtype)[0]
        middle = float(below + step / 2)
    is_reached = narrow(np.array([middle]), dtype)[0] >= word
    return middle if is_reached else math.nextafter(middle, math.inf)
