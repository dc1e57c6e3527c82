"""The kernels for torch tensors on one device: in Triton, or in plain torch without Triton.

The bits are those of `reference.py`: float64 arithmetic without fused multiply-add, then one
rounding, as in `cpu.py` by way of a float32 that is rounded to odd. They take what `cpu.blend` and
`cpu.mix` take, with flat uint8 tensors for the buffers; work is queued on the current stream.
Elements are handled as int16 or int32 words, which torch and Triton compare and mask on every
device.
"""

# What Triton compiles it also types, by annotations of its own.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined"

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from . import reference
from .reference import ALL_KEPT, CUT_BITS, GOLDEN, Mixing, Term, Triple

Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Kernel = Callable[[Sequence[Part], Triple, float, bool], None]
"""kernel(parts, dtypes, alpha, stochastic): see `blend_torch`."""
MixKernel = Callable[[Sequence[Sequence[torch.Tensor]], Sequence[str], Mixing, Sequence[int]], None]
"""kernel(parts, dtypes, mixing, firsts): see `cpu.mix`."""

CHUNK = 1 << 20
"""Elements `blend_torch` takes at a time; it holds up to 32 bytes of temporaries for each."""

BLOCK = 1 << 10
"""Elements of one Triton program: eight a thread, one 16-byte load of bf16."""

MIN_CAPABILITY = (8, 0)
"""What current Triton compiles for; older cards take the torch path."""

_FLOAT = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_WORD = {"BF16": torch.int16, "F16": torch.int16, "F32": torch.int32}
_FORMAT = {"BF16": (7, 8), "F16": (10, 5), "F32": (23, 8)}  # bits of fraction and exponent

_OPTIONS = {"enable_fp_fusion": False}  # a fused multiply-add would leave out one rounding

# Bits of a float64 beyond its first 13 significant ones: two more than fp16 has, so that what
# follows is the only rounding; few enough for float32 to be exact down to where bf16 is all zero.
_LOW = (1 << 40) - 1

_jit: Callable[[Callable[..., Any]], Any]
try:
    triton: Any = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")
    _jit = triton.jit
    _no_triton = ""
except ImportError as error:
    _no_triton = str(error)

    def _jit(function: Callable[..., Any]) -> Any:
        return function


def select_kernel(
    device: torch.device | str, triples: Iterable[Triple] = (("BF16", "BF16", "BF16"),)
) -> tuple[Kernel, str]:
    """The faster kernel that works on this device, and why it was chosen.

    Triton is chosen on a CUDA (or ROCm) device of compute capability 8.0 or more if it can be
    imported, compiles the kernels of `triples` there, and these give the reference's bits in a
    short test, which notices a compiler that fuses multiply and add or flushes subnormals.
    """
    device = torch.device(device)
    checks = {
        "-".join(dtypes): partial(matches_reference, blend_triton, device, dtypes)
        for dtypes in triples
    }
    obstacle = _why_not_triton(device, checks)
    if obstacle:
        return blend_torch, f"torch: {obstacle}"
    major, minor = torch.cuda.get_device_capability(device)
    return blend_triton, f"triton: compute capability {major}.{minor}, bits checked on the card"


def mix(
    parts: Sequence[Sequence[torch.Tensor]],
    dtypes: Sequence[str],
    mixing: Mixing,
    firsts: Sequence[int],
) -> None:
    """Mix parts of the same dtypes with the faster kernel that works here; see `cpu.mix`."""
    kernel = _select_mix(parts[0][-1].device, tuple(dtypes), _make_trial(mixing))
    kernel(parts, dtypes, mixing, firsts)


@cache
def _select_mix(device: torch.device, dtypes: Sequence[str], trial: Mixing) -> MixKernel:
    check = partial(mix_matches_reference, mix_triton, device, dtypes, trial)
    return mix_torch if _why_not_triton(device, {"-".join(dtypes): check}) else mix_triton


def _make_trial(mixing: Mixing) -> Mixing:
    """A mixing for which Triton compiles the same code, with numbers to try that with."""
    kept = ALL_KEPT // 2 if _is_random(mixing) else ALL_KEPT
    factors = (0.7, 0.3, *[0.2] * len(mixing.terms))
    terms = (Term(factor, factor, 1e-30, 1e30, kept) for factor in factors)
    return replace(mixing, terms=tuple(terms)[: len(mixing.terms)], scale=0.9)


def _is_random(mixing: Mixing) -> bool:
    """Whether values are dropped at random."""
    return any(term.kept != ALL_KEPT for term in mixing.terms)


def _why_not_triton(device: torch.device, checks: Mapping[str, Callable[[], bool]]) -> str:
    """Why Triton cannot be used; empty if it can.

    checks: by their dtypes, calls that say whether a kernel gives the reference's bits.
    """
    if device.type != "cuda":
        return f"Triton needs a CUDA device, this is {device.type}"
    if _no_triton:
        return f"Triton cannot be imported ({_no_triton})"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        needed = ".".join(map(str, MIN_CAPABILITY))
        return f"compute capability {'.'.join(map(str, capability))}, Triton needs {needed}"
    for dtypes, check in checks.items():
        try:
            same = check()
        except Exception as error:  # a missing C compiler, driver or ptxas: each its own type
            return f"Triton does not work here ({' '.join(str(error).split()) or repr(error)})"
        if not same:
            return f"Triton's results for {dtypes} differ from the reference"
    return ""


def matches_reference(blend: Kernel, device: torch.device, dtypes: Triple) -> bool:
    """Whether a kernel gives the reference's bits at alpha 0.3 on this device, both roundings."""
    base, donor = _make_words(dtypes[:2], dtypes[2])

    def agrees(stochastic: bool) -> bool:
        arrays = [base, donor, reference.blend(base, donor, dtypes, 0.3, stochastic)]
        return _gives_last(
            lambda parts: blend(parts, dtypes, 0.3, stochastic), arrays, dtypes, device
        )

    return agrees(False) and agrees(True)


def mix_matches_reference(
    kernel: MixKernel, device: torch.device, dtypes: Sequence[str], mixing: Mixing
) -> bool:
    """Whether a kernel gives the reference's bits of a mixing on this device."""
    streams = _make_words(dtypes[:-1], dtypes[-1])
    arrays = [*streams, reference.mix(streams, dtypes, mixing)]
    return _gives_last(lambda parts: kernel(parts, dtypes, mixing, [0, 3]), arrays, dtypes, device)


def _make_words(dtypes: Sequence[str], out_dtype: str) -> list[reference.Bits]:
    """Values to try a kernel with, an array for each stream.

    Random bit patterns, which include subnormals and NaN; then values of which 0.7 times the first
    stream and 0.3 times the second cancel except for the rounding of the products, where a fused
    multiply-add shows.
    """
    random = np.random.default_rng(0)
    cancel = np.arange(1, 33, dtype=np.float64)
    if "F16" not in dtypes:
        cancel *= 2.0**40  # or what is left would vanish in an fp16 output
    return [
        np.concatenate(
            [
                random.integers(0, 1 << 8 * _WORD[dtype].itemsize, 4 * BLOCK - cancel.size),
                reference.narrow(weight * cancel, dtype),
            ]
        ).astype(reference.STORAGE[dtype])
        for weight, dtype in zip((3, -7, *[0] * len(dtypes)), dtypes, strict=False)
    ]


def _gives_last(
    run: Callable[[list[Any]], None],
    arrays: Sequence[reference.Bits],
    dtypes: Sequence[str],
    device: torch.device,
) -> bool:
    """Whether `run` makes the last of these arrays from the others.

    As an aligned part of whole blocks, and from its fourth element on.
    """
    *streams, expected = (torch.from_numpy(each.view(np.uint8)).to(device) for each in arrays)
    skip = [3 * _WORD[dtype].itemsize for dtype in dtypes]
    whole = (*streams, torch.empty_like(expected))
    other = (*streams, torch.empty_like(expected))
    tail = tuple(each[start:] for each, start in zip(other, skip, strict=True))
    run([whole, tail])
    return torch.equal(whole[-1], expected) and torch.equal(tail[-1], expected[skip[-1] :])


def blend_torch(
    parts: Sequence[Part], dtypes: Triple, alpha: float, stochastic: bool = False
) -> None:
    """Blend parts of the same dtypes with torch's own operations, on any device with float64.

    Temporaries stay under 32 MiB.

    Args:
        parts: (base, donor, out) flat uint8 tensors on one device, with equally many elements of
            dtypes[0], [1] and [2], aligned to these; out is overwritten.
        dtypes: "BF16", "F16" or "F32" each.
        alpha: Weight of the donor, 0 to 1.
        stochastic: How it is rounded: as `reference.round_stochastically` does, or to nearest.
    """
    parts, dtypes, alpha, stochastic = reference.without_ends(parts, dtypes, alpha, stochastic)
    for part in parts:
        base, donor, out = _words(part, dtypes)
        for start in range(0, out.numel(), CHUNK):
            piece = slice(start, start + CHUNK)
            _blend_piece(base[piece], donor[piece], out[piece], dtypes, alpha, stochastic)


def _blend_piece(
    base: torch.Tensor,
    donor: torch.Tensor,
    out: torch.Tensor,
    dtypes: Triple,
    alpha: float,
    stochastic: bool,
) -> None:
    ours, theirs = base.view(_FLOAT[dtypes[0]]), donor.view(_FLOAT[dtypes[1]])
    mixed = ours.to(torch.float64).mul_(1.0 - alpha)
    mixed += theirs.to(torch.float64).mul_(alpha)
    if stochastic:
        _scatter_torch(mixed, (ours, theirs), dtypes[2])
    words = _narrow_torch(mixed, dtypes[2])
    if dtypes[0] == dtypes[1] == dtypes[2]:
        words = torch.where(base == donor, base, words)
    out.copy_(words)


def _scatter_torch(mixed: torch.Tensor, values: Sequence[torch.Tensor], dtype: str) -> None:
    """`reference.round_stochastically` of a float64 tensor, in place."""
    if dtype not in CUT_BITS:
        return
    word = torch.zeros(mixed.shape, dtype=torch.int64, device=mixed.device)
    for value in values:
        single = value.to(torch.float32).view(torch.int32)
        single = single.masked_fill(value.isnan(), reference.QUIET_NAN["F32"])
        word = (word + single) * GOLDEN & 0xFFFFFFFF
    bits = (mixed.view(torch.int64) + (word << CUT_BITS[dtype] - 32)) & -(1 << CUT_BITS[dtype])
    mixed.copy_(torch.where(mixed.isnan(), mixed, bits.view(torch.float64)))


def _narrow_torch(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Round a float64 tensor, which is used up, to words of a dtype."""
    if dtype != "F32":
        bits = values.view(torch.int64)
        bits |= (bits & _LOW).add_(_LOW)  # reaches bit 40 unless all low ones are 0
        bits &= ~_LOW
    words = values.to(torch.float32).to(_FLOAT[dtype]).view(_WORD[dtype])
    return words.masked_fill_(values.isnan(), reference.QUIET_NAN[dtype])


def mix_torch(
    parts: Sequence[Sequence[torch.Tensor]],
    dtypes: Sequence[str],
    mixing: Mixing,
    firsts: Sequence[int],
) -> None:
    """Mix parts of the same dtypes with torch's own operations; see `cpu.mix`."""
    chunk = CHUNK // len(dtypes)
    for part, first in zip(parts, firsts, strict=True):
        *streams, out = (
            buffer.view(_WORD[dtype]) for buffer, dtype in zip(part, dtypes, strict=True)
        )
        for start in range(0, out.numel(), chunk):
            values = [
                stream[start : start + chunk].view(_FLOAT[dtype]).to(torch.float64)
                for stream, dtype in zip(streams, dtypes, strict=False)
            ]
            draw = partial(_draw_torch, first=first + start, like=values[0])
            mixed = reference.mix_values(
                values, torch.zeros_like(values[0]), mixing, draw, torch.where
            )
            if mixing.stochastic:
                _scatter_torch(mixed, values, dtypes[-1])
            out[start : start + chunk] = _narrow_torch(mixed, dtypes[-1])


def _draw_torch(key: int, first: int, like: torch.Tensor) -> torch.Tensor:
    """`reference.draw` for as many elements as `like` has, from element `first` on."""
    index = torch.arange(first + 1, first + 1 + len(like), device=like.device)
    word = index * _signed(0x9E3779B97F4A7C15) + _signed(key)
    word = (word ^ _shift(word, 30)) * _signed(0xBF58476D1CE4E5B9)
    word = (word ^ _shift(word, 27)) * _signed(0x94D049BB133111EB)
    return _shift(word ^ _shift(word, 31), 11)


def _signed(word: int) -> int:
    """The int64 of the same bits as a uint64, which torch does not compute with."""
    return word - (1 << 64) if word >> 63 else word


def _shift(word: torch.Tensor, places: int) -> torch.Tensor:
    """Shift an int64 to the right as if it were unsigned."""
    return (word >> places) & ((1 << 64 - places) - 1)


def blend_triton(
    parts: Sequence[Part], dtypes: Triple, alpha: float, stochastic: bool = False
) -> None:
    """The same in one launch of the Triton kernel for each part, without temporaries.

    The first call of a triple of dtypes compiles. Raises ImportError without Triton.
    """
    if _no_triton:
        raise ImportError(_no_triton)
    parts, dtypes, alpha, stochastic = reference.without_ends(parts, dtypes, alpha, stochastic)
    bits = _scaled_bits(1.0 - alpha, dtypes[0]), _scaled_bits(alpha, dtypes[1])
    constants = _constants(dtypes, stochastic)
    for part in parts:
        words = _words(part, dtypes)
        count = words[2].numel()
        if count:
            grid = (-(-count // BLOCK),)
            with torch.cuda.device_of(words[2]):  # Triton launches on the current device
                _blend[grid](*words, count, *bits, **constants, **_OPTIONS)


def _constants(dtypes: Triple, stochastic: bool) -> dict[str, int]:
    """What `_blend` is compiled for."""
    (base, base_exponent), (donor, donor_exponent), (out, _) = (_FORMAT[d] for d in dtypes)
    return {
        "base_fraction": base,
        "base_exponent": base_exponent,
        "donor_fraction": donor,
        "donor_exponent": donor_exponent,
        "out_fraction": out,
        "quiet": reference.QUIET_NAN[dtypes[2]],
        "stochastic": stochastic,
        "block": BLOCK,
    }


def _words(part: Part, dtypes: Triple) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    base, donor, out = (
        buffer.view(_WORD[dtype]) for buffer, dtype in zip(part, dtypes, strict=True)
    )
    return base, donor, out


def _scaled_bits(weight: float, dtype: str) -> int:
    """A weight's float64 bits, times the power of two by which `_widen` is short.

    As an integer, because Triton makes a float32 of a Python float.
    """
    bias = (1 << _FORMAT[dtype][1] - 1) - 1
    return int(np.float64(weight * 2.0 ** (1023 - bias)).view(np.int64))


@_jit
def _widen(word, fraction: tl.constexpr, exponent: tl.constexpr):
    """The element's value times 2**(its format's bias - 1023), exactly, as float64.

    Its fields moved to where float64 has them; subnormals stay subnormal. Saves conversions, which
    consumer cards do as slowly as all of float64.
    """
    keep: tl.constexpr = -(1 << 63) | ((1 << (52 + exponent)) - 1)
    top: tl.constexpr = ((1 << exponent) - 1) << 52
    bits = (word.to(tl.int64) << (52 - fraction)) & keep
    bits = tl.where((bits & top) == top, bits | (0x7FF << 52), bits)  # infinity and NaN
    return bits.to(tl.float64, bitcast=True)


@_jit
def _narrow(value, fraction: tl.constexpr, quiet: tl.constexpr):
    """The word of the element nearest to a float64, ties to even."""
    if fraction == 23:
        single = value.to(tl.float32)
        word = single.to(tl.int32, bitcast=True)
    else:
        bits = value.to(tl.int64, bitcast=True)
        low: tl.constexpr = (1 << 40) - 1
        bits = (bits | ((bits & low) + low)) & ~low  # rounded to odd
        single = bits.to(tl.float64, bitcast=True).to(tl.float32)
        if fraction == 10:
            word = single.to(tl.float16).to(tl.int16, bitcast=True)
        else:
            long = single.to(tl.int32, bitcast=True)
            word = ((long + 0x7FFF + ((long >> 16) & 1)) >> 16).to(tl.int16)
    return tl.where(single == single, word, quiet).to(word.dtype)


@_jit
def _hash(hashed, word, fraction: tl.constexpr):
    """What an element that is mixed adds to the hash, in the lower half of an int64."""
    if fraction == 7:
        value = (word.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif fraction == 10:
        value = word.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = word.to(tl.float32, bitcast=True)
    single = tl.where(value == value, value.to(tl.int32, bitcast=True), 0x7FC00000)
    golden: tl.constexpr = 0x9E3779B9
    return ((hashed + single.to(tl.int64)) * golden) & 0xFFFFFFFF


@_jit
def _scatter(value, hashed, fraction: tl.constexpr):
    """`reference.round_stochastically` of a float64, for a dtype of this fraction."""
    if fraction == 23:
        return value
    cut: tl.constexpr = 52 - fraction
    keep: tl.constexpr = -(1 << cut)
    bits = (value.to(tl.int64, bitcast=True) + (hashed << (cut - 32))) & keep
    return tl.where(value == value, bits.to(tl.float64, bitcast=True), value)


@_jit
def _blend(
    base,
    donor,
    out,
    count,
    beta_bits: tl.int64,
    alpha_bits: tl.int64,
    base_fraction: tl.constexpr,
    base_exponent: tl.constexpr,
    donor_fraction: tl.constexpr,
    donor_exponent: tl.constexpr,
    out_fraction: tl.constexpr,
    quiet: tl.constexpr,
    stochastic: tl.constexpr,
    block: tl.constexpr,
):
    """One block of `block` elements of one part; the bits are those of the scaled weights."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    ours = tl.load(base + at, mask=inside, other=0)
    theirs = tl.load(donor + at, mask=inside, other=0)
    beta = beta_bits.to(tl.float64, bitcast=True)
    alpha = alpha_bits.to(tl.float64, bitcast=True)
    mixed = beta * _widen(ours, base_fraction, base_exponent)
    mixed += alpha * _widen(theirs, donor_fraction, donor_exponent)
    if stochastic:
        hashed = _hash(_hash(0, ours, base_fraction), theirs, donor_fraction)
        mixed = _scatter(mixed, hashed, out_fraction)
    word = _narrow(mixed, out_fraction, quiet)
    if base_fraction == donor_fraction and donor_fraction == out_fraction:
        word = tl.where(ours == theirs, ours, word)
    tl.store(out + at, word, mask=inside)


def mix_triton(
    parts: Sequence[Sequence[torch.Tensor]],
    dtypes: Sequence[str],
    mixing: Mixing,
    firsts: Sequence[int],
) -> None:
    """Mix in one launch of the Triton kernel for each part, without temporaries; see `cpu.mix`.

    The first call for a form of mixing compiles. Raises ImportError without Triton.
    """
    if _no_triton:
        raise ImportError(_no_triton)
    table = _make_table(mixing).to(parts[0][-1].device)
    constants = _mix_constants(dtypes, mixing)
    for part, first in zip(parts, firsts, strict=True):
        *streams, out = (
            buffer.view(_WORD[dtype]) for buffer, dtype in zip(part, dtypes, strict=True)
        )
        count = out.numel()
        if count:
            with torch.cuda.device_of(out):
                _mix[(-(-count // BLOCK),)](
                    *(tuple(streams), out, count, first, table), **constants, **_OPTIONS
                )


def _make_table(mixing: Mixing) -> torch.Tensor:
    """The numbers of a mixing as bits: six for each term, then the scale."""
    factors = [(term.factor, term.weight, term.low, term.high) for term in mixing.terms]
    choices = [(term.kept, term.key) for term in mixing.terms]
    rows = np.hstack(
        [np.array(factors, np.float64).view(np.int64), np.array(choices, np.uint64).view(np.int64)]
    )
    scale = np.array([mixing.scale], np.float64).view(np.int64)
    return torch.from_numpy(np.append(rows, scale))


def _mix_constants(dtypes: Sequence[str], mixing: Mixing) -> dict[str, Any]:
    """What `_mix` is compiled for."""
    return {
        "fractions": tuple(_FORMAT[dtype][0] for dtype in dtypes),
        "terms": len(mixing.terms),
        "relative": mixing.relative,
        "elect": mixing.elect,
        "mean": mixing.mean,
        "keeps_equal": mixing.keeps_equal,
        "stochastic": mixing.stochastic,
        "random": _is_random(mixing),
        "quiet": reference.QUIET_NAN[dtypes[-1]],
        "block": BLOCK,
    }


@_jit
def _read(stream, at, inside, fraction: tl.constexpr):
    """Elements of a stream, exactly, as float64."""
    word = tl.load(stream + at, mask=inside, other=0)
    exponent: tl.constexpr = 5 if fraction == 10 else 8
    # By so much is `_widen` short; as bits, because Triton makes a float32 of a Python float
    scale: tl.constexpr = (2047 - (1 << (exponent - 1))) << 52
    return _widen(word, fraction, exponent) * tl.full((), scale, tl.int64).to(
        tl.float64, bitcast=True
    )


@_jit
def _number(table, place):
    """A float64 of the table."""
    return tl.load(table + place).to(tl.float64, bitcast=True)


@_jit
def _draw(key, index):
    """`reference.draw` for elements of these numbers."""
    word = key.to(tl.uint64, bitcast=True)
    word += (index + 1).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    return ((word ^ (word >> 31)) >> 11).to(tl.int64, bitcast=True)


@_jit
def _add(delta, index, row, random: tl.constexpr):
    """What a term adds in each element, and whether it counts there; row: the term's numbers."""
    size = tl.abs(delta)
    counts = ((size < _number(row, 2)) | (size > _number(row, 3))) == 0
    if random:
        counts = counts & (_draw(tl.load(row + 5), index) < tl.load(row + 4))
    return tl.where(counts, _number(row, 0) * delta, 0.0), counts


@_jit
def _mix(
    streams,
    out,
    count,
    first: tl.int64,
    table,
    fractions: tl.constexpr,
    terms: tl.constexpr,
    relative: tl.constexpr,
    elect: tl.constexpr,
    mean: tl.constexpr,
    keeps_equal: tl.constexpr,
    stochastic: tl.constexpr,
    random: tl.constexpr,
    quiet: tl.constexpr,
    block: tl.constexpr,
):
    """One block of `block` elements of one part; table as of `_make_table`."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    base = _read(streams[0], at, inside, fractions[0])
    total = tl.full((block,), 0, tl.float64)
    divisor = tl.full((block,), 0, tl.float64)
    origin = tl.full((block,), 0, tl.float64)
    same = base == base
    if relative:
        origin = _read(streams[terms], at, inside, fractions[terms])
        same = origin == base
    for term in tl.static_range(terms):
        value = _read(streams[term], at, inside, fractions[term])
        same = same & (value == base)
        added, counts = _add(value - origin, first + at, table + 6 * term, random)
        total += added
        divisor += tl.where(counts, _number(table, 6 * term + 1), 0.0)
    if elect:
        is_positive = total >= 0.0
        total = tl.full((block,), 0, tl.float64)
        divisor = tl.full((block,), 0, tl.float64)
        for term in tl.static_range(terms):
            value = _read(streams[term], at, inside, fractions[term])
            added, counts = _add(value - origin, first + at, table + 6 * term, random)
            counts = tl.where(is_positive, added <= 0.0, added >= 0.0) == 0  # a NaN counts
            total += tl.where(counts, added, 0.0)
            divisor += tl.where(counts, _number(table, 6 * term + 1), 0.0)
    if mean:
        total = total / tl.where(divisor == 0.0, 1.0, divisor)
    mixed = origin + _number(table, 6 * terms) * total
    if keeps_equal:
        mixed = tl.where(same, base, mixed)
    if stochastic:
        hashed = tl.full((block,), 0, tl.int64)
        for stream in tl.static_range(terms + relative):
            read = tl.load(streams[stream] + at, mask=inside, other=0)
            hashed = _hash(hashed, read, fractions[stream])
        mixed = _scatter(mixed, hashed, fractions[terms + relative])
    word = _narrow(mixed, fractions[terms + relative], quiet)
    tl.store(out + at, word, mask=inside)
