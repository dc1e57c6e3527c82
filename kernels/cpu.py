"""The kernels on the CPU: many parts in one parallel numba call that holds no GIL.

They work on raw addresses, so that mapped files are read and output buffers written in place.

The bits are those of `reference.py`: float64 arithmetic, then one rounding. The conversion to bf16
and fp16 goes through float32; for that not to be a second rounding, float32 is reached by rounding
to odd (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008), where the last
bit is set if anything was cut off.

numba has neither bf16 nor fp16: a uint16 here is a bf16, an int16 holds the bits of an fp16.
All the compiled code is in this file, because numba's cache does not notice edits in others.
"""

# What numba compiles it also types; mypy sees neither its types nor that an intrinsic's first
# argument is numba's own.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# mypy: disable-error-code="call-arg, var-annotated"

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import get_num_threads, njit, prange, types
from numba.extending import intrinsic, overload

from .compile_cache import keep_compiled
from .reference import (
    ALL_KEPT,
    COARSE_BITS,
    CUT_BITS,
    GOLDEN,
    SUM_BLOCK,
    Mixing,
    Triple,
    without_ends,
)

BLOCK = 1 << 15
"""Elements a thread takes at a time: large enough to stream, small enough to share out."""
STRIPE = 1 << 9
"""Elements of all models that are mixed at a time: few enough to stay in the first cache."""
MAX_COUNTERS = 8
"""Threads that count magnitudes, at most: each has a table of 256 KiB or more."""

_TAGS: dict[str, npt.NDArray[Any]] = {
    "BF16": np.empty(0, np.uint16),
    "F16": np.empty(0, np.int16),
    "F32": np.empty(0, np.float32),
}
_one_caller = threading.Lock()  # numba's workqueue threading layer aborts on two at once


def _start_threads() -> None:
    """Start numba's threads so that they sleep between calls.

    GNU OpenMP's threads spin by default, which took 19 s of processor time from the reads and
    writes of a 16 GB merge on two cores. The variable is read when the library loads; torch has
    its own copy of it.
    """
    before = os.environ.get("OMP_WAIT_POLICY")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    get_num_threads()
    if before is None:
        del os.environ["OMP_WAIT_POLICY"]


_start_threads()

Bytes = npt.NDArray[np.uint8]


def blend(
    parts: Sequence[tuple[Bytes, Bytes, Bytes]],
    dtypes: Triple,
    alpha: float,
    stochastic: bool = False,
) -> None:
    """Blend parts of the same dtypes.

    Args:
        parts: (base, donor, out) byte buffers with equally many elements of dtypes[0], [1] and
            [2]; out is overwritten. Other processors than x86-64 and 64-bit Arm need buffers
            that are aligned to their elements.
        dtypes: "BF16", "F16" or "F32" each.
        alpha: Weight of the donor, 0 to 1.
        stochastic: How it is rounded: as `reference.round_stochastically` does, or to nearest.
    """
    parts, dtypes, alpha, stochastic = without_ends(parts, dtypes, alpha, stochastic)
    addresses, counts = _locate(parts, dtypes)
    owner, first = _split(counts)
    tags = [_TAGS[dtype] for dtype in dtypes]
    with _one_caller:
        _blend(addresses, counts, owner, first, alpha, stochastic, *tags)


def _locate(
    parts: Sequence[Sequence[Bytes]], dtypes: Sequence[str]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The address of every buffer, a row a part, and the parts' numbers of elements."""
    itemsize = _TAGS[dtypes[-1]].itemsize
    counts = np.array([part[-1].size // itemsize for part in parts], np.int64)
    addresses = np.array([[_address(buffer) for buffer in part] for part in parts], np.int64)
    return addresses.reshape(-1, len(dtypes)), counts  # also if there are no parts


def _split(
    counts: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Every block of every part: which part it is of, and its first element there."""
    blocks = -(-counts // BLOCK)
    owner = np.repeat(np.arange(len(counts)), blocks)
    first = np.arange(blocks.sum()) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    return owner, first * BLOCK


def mix(
    parts: Sequence[Sequence[Bytes]], dtypes: Sequence[str], mixing: Mixing, firsts: Sequence[int]
) -> None:
    """Mix parts of the same dtypes; see `reference.mix`.

    Args:
        parts: Of each the byte buffers of its streams and of the output, which is overwritten.
        dtypes: Of these buffers.
        mixing: What is computed.
        firsts: The number of each part's first element in its tensor.
    """
    addresses, counts = _locate(parts, dtypes)
    table = np.array([(t.factor, t.weight, t.low, t.high) for t in mixing.terms], np.float64)
    chances = np.array([(term.kept, term.key) for term in mixing.terms], np.uint64)
    flags = (mixing.relative, mixing.elect, mixing.mean, mixing.keeps_equal, mixing.stochastic)
    with _one_caller:
        _mix(
            *(addresses, counts, *_split(counts), np.array(firsts, np.int64), _codes(dtypes)),
            *(table, chances, mixing.scale, *flags, *_TAGS.values()),
        )


def count_magnitudes(
    model: Bytes,
    ancestor: Bytes,
    dtypes: Triple,
    counts: npt.NDArray[np.int64],
    prefix: int = -1,
) -> None:
    """Count the magnitudes of model - ancestor; see `reference.count_magnitudes`."""
    size = model.size // _TAGS[dtypes[0]].itemsize
    tables = np.zeros((min(get_num_threads(), MAX_COUNTERS), counts.size), np.int64)
    with _one_caller:
        _count(
            *(_address(model), _address(ancestor), size, _codes(dtypes), prefix, tables),
            *_TAGS.values(),
        )
    counts += tables.sum(axis=0)


def sum_products(
    streams: Sequence[Bytes],
    dtypes: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    relative: bool,
) -> npt.NDArray[np.float64]:
    """Sums of products of two streams each, a row a block; see `reference.sum_products`."""
    size = streams[0].size // _TAGS[dtypes[0]].itemsize
    addresses = np.array([_address(stream) for stream in streams], np.int64)
    sums = np.zeros((-(-size // SUM_BLOCK), len(pairs)))
    with _one_caller:
        _sum(addresses, size, _codes(dtypes), np.array(pairs), relative, sums, *_TAGS.values())
    return sums


def _codes(dtypes: Sequence[str]) -> npt.NDArray[np.int64]:
    """The place of each dtype in `_TAGS`."""
    return np.array([list(_TAGS).index(dtype) for dtype in dtypes], np.int64)


def warm(dtypes: Triple = ("BF16", "BF16", "BF16")) -> None:
    """Compile the kernel of these dtypes, or load it from numba's cache, and start its threads."""
    buffers = [np.zeros(_TAGS[dtype].itemsize, np.uint8) for dtype in dtypes]
    blend([(buffers[0], buffers[1], buffers[2])], dtypes, 0.5)


def _address(buffer: Bytes) -> int:
    address: int = buffer.__array_interface__["data"][0]
    return address


@intrinsic
def _at(typingctx: Any, address: Any, like: Any):
    """The address as a pointer to elements of `like`."""
    pointer = types.CPointer(like.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(types.int64, like), codegen


def _make_bitcast(source: Any, target: Any) -> Any:
    """A function that turns a number of one type into that of another with the same bits."""

    @intrinsic
    def bitcast(typingctx: Any, value: Any):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], context.get_value_type(target))

        return target(source), codegen

    return bitcast


_as_float = _make_bitcast(types.uint32, types.float32)
_as_bits = _make_bitcast(types.float32, types.uint32)
_as_wide_float = _make_bitcast(types.uint64, types.float64)
_as_wide_bits = _make_bitcast(types.float64, types.uint64)


def _widen(element):
    """An element's exact float64 value."""
    raise NotImplementedError


@overload(_widen)
def _widen_any(element):
    if element == types.uint16:
        return _widen_bf16
    return _widen_f16 if element == types.int16 else _widen_f32


def _widen_bf16(element):
    return np.float64(_as_float(np.uint32(np.uint32(element) << np.uint32(16))))


def _widen_f16(element):
    bits = np.uint32(element) & np.uint32(0xFFFF)
    size = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
    sign = np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))
    # Rebiasing by a product makes subnormals right as well; infinity and NaN need the top exponent.
    finite = _as_bits(np.float32(_as_float(size) * np.float32(2.0**112)))
    special = np.uint32(size | np.uint32(0x7F800000))
    is_special = size >= np.uint32(0x0F800000)
    return np.float64(_as_float(np.uint32((special if is_special else finite) | sign)))


def _widen_f32(element):
    return np.float64(element)


@intrinsic
def _to_odd(typingctx: Any, value: Any):
    """The uint32 bits, as float32, of a float64 rounded to 13 significant bits, the last sticky.

    Two bits more than fp16 has: enough for the rounding that follows to be the only one. Few enough
    for the way through float32 to be exact, down to where bf16 has no value but zero.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = ir.IntType(64)
        low = ir.Constant(wide, (1 << 40) - 1)
        bits = builder.bitcast(args[0], wide)
        sticky = builder.add(builder.and_(bits, low), low)  # reaches bit 40 unless all low are 0
        odd = builder.and_(builder.or_(bits, sticky), builder.not_(low))
        single = builder.fptrunc(builder.bitcast(odd, ir.DoubleType()), ir.FloatType())
        return builder.bitcast(single, ir.IntType(32))

    return types.uint32(types.float64), codegen


def _narrow(value, like):
    """The element of `like`'s type nearest to a float64, ties to even."""
    raise NotImplementedError


@overload(_narrow)
def _narrow_any(value, like):
    if like == types.uint16:
        return _narrow_bf16
    return _narrow_f16 if like == types.int16 else _narrow_f32


def _narrow_bf16(value, like):
    bits = _to_odd(value)
    tie = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(bits + tie) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(np.uint32(0x7FC0) if is_nan else rounded)


def _narrow_f16(value, like):
    bits = _to_odd(value)
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    sign = np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000)
    rebiased = np.uint32(size - np.uint32(0x38000000))
    tie = np.uint32(0xFFF) + ((rebiased >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(rebiased + tie) >> np.uint32(13)
    # Below 2**-14 the sum with 0.5 lets the hardware round to multiples of 2**-24.
    subnormal = np.uint32(_as_bits(np.float32(_as_float(size) + np.float32(0.5))) - 0x3F000000)
    small = subnormal if size < np.uint32(0x38800000) else normal
    half = sign | (np.uint32(0x7C00) if size >= np.uint32(0x477FF000) else small)
    return np.int16(np.uint32(0x7E00) if size > np.uint32(0x7F800000) else half)


def _narrow_f32(value, like):
    single = np.float32(value)
    return single if single == single else _as_float(np.uint32(0x7FC00000))


@njit(inline="always")
def _hash(word, value):
    """What the values that are mixed add to their hash, one after the other."""
    single = np.uint32(_as_bits(np.float32(value)) if value == value else 0x7FC00000)
    return np.uint32((word + single) * np.uint32(GOLDEN))


def _scatter(value, word, like):
    """One of the two neighbours of a float64 in the type of `like`, chosen by a hash."""
    raise NotImplementedError


@overload(_scatter)
def _scatter_any(value, word, like):
    if like == types.float32:
        return lambda value, word, like: value
    cut = CUT_BITS["BF16" if like == types.uint16 else "F16"]

    def scatter(value, word, like):
        bits = _as_wide_bits(value) + (np.uint64(word) << np.uint64(cut - 32))
        rounded = _as_wide_float((bits >> np.uint64(cut)) << np.uint64(cut))
        return rounded if value == value else value

    return scatter


def _keep(base, donor, out):
    """`base` where base and donor are the same bits of the output's type, else `out`."""
    raise NotImplementedError


@overload(_keep)
def _keep_any(base, donor, out):
    if not base == donor == out:
        return lambda base, donor, out: out
    if out == types.float32:
        return lambda base, donor, out: base if _as_bits(base) == _as_bits(donor) else out
    return lambda base, donor, out: base if base == donor else out


@keep_compiled
@njit(parallel=True, nogil=True, error_model="numpy")
def _blend(addresses, counts, owner, first, alpha, stochastic, base_tag, donor_tag, out_tag):
    """Every block of every part; addresses is (parts, 3), owner and first are per block."""
    beta = 1.0 - alpha
    for block in prange(owner.size):
        part = owner[block]
        base = _at(addresses[part, 0], base_tag)
        donor = _at(addresses[part, 1], donor_tag)
        out = _at(addresses[part, 2], out_tag)
        start = first[block]
        stop = min(counts[part], start + BLOCK)
        for i in range(start, stop):
            ours, theirs = _widen(base[i]), _widen(donor[i])
            mixed = beta * ours + alpha * theirs
            if stochastic:
                word = _hash(_hash(np.uint32(0), ours), theirs)
                mixed = _scatter(mixed, word, out[i])
            out[i] = _keep(base[i], donor[i], _narrow(mixed, out[i]))


@njit(inline="always")
def _widen_row(elements, start, count, row):
    for i in range(count):
        row[i] = _widen(elements[start + i])


@njit(inline="always")
def _narrow_row(row, count, elements, start):
    for i in range(count):
        elements[start + i] = _narrow(row[i], elements[start + i])


@njit(inline="always")
def _read(address, code, start, count, row, bf16, f16, f32):
    """Widen `count` elements of a stream from element `start` on into a row of float64."""
    if code == 0:
        _widen_row(_at(address, bf16), start, count, row)
    elif code == 1:
        _widen_row(_at(address, f16), start, count, row)
    else:
        _widen_row(_at(address, f32), start, count, row)


@njit(inline="always")
def _write(address, code, start, count, row, bf16, f16, f32):
    """Round a row of float64 into the output."""
    if code == 0:
        _narrow_row(row, count, _at(address, bf16), start)
    elif code == 1:
        _narrow_row(row, count, _at(address, f16), start)
    else:
        _narrow_row(row, count, _at(address, f32), start)


@njit(inline="always")
def _draw(key, index):
    word = key + (np.uint64(index) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (word ^ (word >> np.uint64(31))) >> np.uint64(11)


@keep_compiled
@njit(parallel=True, nogil=True, error_model="numpy")
def _mix(
    addresses,
    counts,
    owner,
    block_first,
    firsts,
    codes,
    table,
    chances,
    scale,
    relative,
    elect,
    mean,
    keeps_equal,
    stochastic,
    bf16,
    f16,
    f32,
):
    """Every block of every part; addresses is (parts, streams and output), table is per term."""
    streams = codes.size - 1
    for block in prange(owner.size):
        part = owner[block]
        stop = min(counts[part], block_first[block] + BLOCK)
        values = np.empty((streams, STRIPE))
        mixed, words = np.empty(STRIPE), np.zeros(STRIPE, np.uint32)
        for start in range(block_first[block], stop, STRIPE):
            count = min(STRIPE, stop - start)
            for s in range(streams):
                _read(addresses[part, s], codes[s], start, count, values[s], bf16, f16, f32)
            if stochastic:
                _hash_columns(values, words, count)
            _mix_stripe(
                *(values, mixed, count, firsts[part] + start, table, chances, scale),
                *(relative, elect, mean, keeps_equal),
            )
            if stochastic:
                _scatter_row(mixed, words, count, codes[streams])
            _write(addresses[part, streams], codes[streams], start, count, mixed, bf16, f16, f32)


@njit(error_model="numpy")
def _hash_columns(values, words, count):
    """The hash of what each element is mixed from."""
    words[:count] = 0
    for s in range(values.shape[0]):
        for i in range(count):
            words[i] = _hash(words[i], values[s, i])


@njit(error_model="numpy")
def _scatter_row(row, words, count, code):
    """Round a row stochastically to the dtype of this code."""
    for i in range(count):
        if code == 0:
            row[i] = _scatter(row[i], words[i], np.uint16(0))
        elif code == 1:
            row[i] = _scatter(row[i], words[i], np.int16(0))


@njit(error_model="numpy")
def _mix_stripe(
    values,
    mixed,
    count,
    first,
    table,
    chances,
    scale,
    relative,
    elect,
    mean,
    keeps_equal,
):
    """Mix `count` columns of values into `mixed`, as `reference.mix` does; values are used up."""
    terms, streams = table.shape[0], values.shape[0]
    total, divisor = np.zeros(STRIPE), np.zeros(STRIPE)
    same, equal = np.ones(STRIPE, np.bool_), values[0].copy()
    origin = values[streams - 1] if relative else np.zeros(STRIPE)
    for s in range(streams):
        for i in range(count):
            same[i] &= values[s, i] == equal[i]
    for m in range(terms):
        factor, weight, low, high = table[m]
        kept, key = chances[m]
        for i in range(count):
            delta = values[m, i] - origin[i]
            size = abs(delta)
            counts = not (size < low or size > high)
            if kept != np.uint64(ALL_KEPT):
                counts = counts and _draw(key, first + i) < kept
            values[m, i] = factor * delta if counts else 0.0
            total[i] += values[m, i]
            divisor[i] += weight if counts else 0.0
    if elect:
        _elect(values, total, divisor, count, table)
    for i in range(count):
        if mean:
            total[i] /= divisor[i] if divisor[i] != 0.0 else 1.0
        value = origin[i] + scale * total[i]
        mixed[i] = equal[i] if keeps_equal and same[i] else value


@njit(error_model="numpy")
def _elect(values, total, divisor, count, table):
    """Add up anew only what has the sign of the total; a NaN counts."""
    for i in range(count):
        is_positive = total[i] >= 0.0
        total[i] = 0.0
        divisor[i] = 0.0
        for m in range(table.shape[0]):
            added = values[m, i]
            if not (added <= 0.0 if is_positive else added >= 0.0):
                total[i] += added
                divisor[i] += table[m, 1]


@keep_compiled
@njit(parallel=True, nogil=True, error_model="numpy")
def _count(model, ancestor, size, codes, prefix, tables, bf16, f16, f32):
    """Each row of tables counts every so manieth stripe."""
    counters = tables.shape[0]
    for counter in prange(counters):
        ours, theirs, words = np.empty(STRIPE), np.empty(STRIPE), np.empty(STRIPE, np.int64)
        for start in range(counter * STRIPE, size, counters * STRIPE):
            count = min(STRIPE, size - start)
            _read(model, codes[0], start, count, ours, bf16, f16, f32)
            _read(ancestor, codes[1], start, count, theirs, bf16, f16, f32)
            for i in range(count):
                ours[i] = abs(ours[i] - theirs[i])
            _words(ours, words, count, codes[2], prefix)
            for i in range(count):
                if words[i] >= 0:
                    tables[counter, words[i]] += 1


@njit(error_model="numpy")
def _words(sizes, words, count, code, prefix):
    """Which entry of the table counts each magnitude; -1: none."""
    for i in range(count):
        if code == 0:
            words[i] = np.int64(_narrow(sizes[i], np.uint16(0)))
        elif code == 1:
            words[i] = np.int64(_narrow(sizes[i], np.int16(0)))
        else:
            word = np.int64(_as_bits(np.float32(_narrow(sizes[i], np.float32(0)))))
            upper = word >> COARSE_BITS
            if prefix < 0:
                words[i] = upper
            else:
                words[i] = word & ((1 << COARSE_BITS) - 1) if upper == prefix else -1


@keep_compiled
@njit(parallel=True, nogil=True, error_model="numpy")
def _sum(addresses, size, codes, pairs, relative, sums, bf16, f16, f32):
    """The products of each block, added in the order of the elements."""
    streams = codes.size
    for block in prange(sums.shape[0]):
        values = np.empty((streams, STRIPE))
        stop = min(size, (block + 1) * SUM_BLOCK)
        for start in range(block * SUM_BLOCK, stop, STRIPE):
            count = min(STRIPE, stop - start)
            for s in range(streams):
                _read(addresses[s], codes[s], start, count, values[s], bf16, f16, f32)
            if relative:
                for s in range(streams - 1):
                    for i in range(count):
                        values[s, i] -= values[streams - 1, i]
            for p in range(pairs.shape[0]):
                total = sums[block, p]
                for i in range(count):
                    total += values[pairs[p, 0], i] * values[pairs[p, 1], i]
                sums[block, p] = total
