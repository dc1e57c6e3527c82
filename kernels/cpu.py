"""The blend on the CPU: many parts in one parallel numba call that holds no GIL.

It works on raw addresses, so that mapped files are read and output buffers written in place.

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
from .reference import Triple, without_ends

BLOCK = 1 << 15
"""Elements a thread takes at a time: large enough to stream, small enough to share out."""

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


def blend(parts: Sequence[tuple[Bytes, Bytes, Bytes]], dtypes: Triple, alpha: float) -> None:
    """Blend parts of the same dtypes.

    Args:
        parts: (base, donor, out) byte buffers with equally many elements of dtypes[0], [1] and
            [2]; out is overwritten. Other processors than x86-64 and 64-bit Arm need buffers
            that are aligned to their elements.
        dtypes: "BF16", "F16" or "F32" each.
        alpha: Weight of the donor, 0 to 1.
    """
    parts, dtypes, alpha = without_ends(parts, dtypes, alpha)
    itemsize = _TAGS[dtypes[2]].itemsize
    counts = np.array([out.size // itemsize for _, _, out in parts], np.int64)
    blocks = -(-counts // BLOCK)
    owner = np.repeat(np.arange(len(parts)), blocks)
    first = np.arange(blocks.sum()) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    addresses = np.array([[_address(buffer) for buffer in part] for part in parts], np.int64)
    addresses = addresses.reshape(-1, 3)  # also if there are no parts
    tags = [_TAGS[dtype] for dtype in dtypes]
    with _one_caller:
        _blend(addresses, counts, owner, first * BLOCK, alpha, *tags)


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


@intrinsic
def _as_float(typingctx: Any, bits: Any):
    """uint32 to the float32 of the same bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def _as_bits(typingctx: Any, value: Any):
    """float32 to the uint32 of the same bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


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
def _blend(addresses, counts, owner, first, alpha, base_tag, donor_tag, out_tag):
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
            mixed = beta * _widen(base[i]) + alpha * _widen(donor[i])
            out[i] = _keep(base[i], donor[i], _narrow(mixed, out[i]))
