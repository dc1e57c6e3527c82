"""Which kernels run on this machine's processor, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import reference

Bytes = npt.NDArray[np.uint8]
Kernel = Callable[[Sequence[tuple[Bytes, Bytes, Bytes]], reference.Triple, float, bool], None]
"""kernel(parts, dtypes, alpha, stochastic): see `cpu.blend`."""


def select_kernel(triples: Iterable[reference.Triple] = ()) -> tuple[Kernel, str]:
    """The fastest kernel that works here, and why it was chosen.

    Args:
        triples: The dtypes of base, donor and output that it should be ready for on return.
    """
    try:
        from . import cpu
    except ImportError as error:
        return blend_numpy, f"numpy: numba cannot be imported ({error})"
    for dtypes in triples:
        cpu.warm(dtypes)
    return cpu.blend, "numba: compiled, parallel"


def blend_numpy(
    parts: Sequence[tuple[Bytes, Bytes, Bytes]],
    dtypes: reference.Triple,
    alpha: float,
    stochastic: bool = False,
) -> None:
    """The reference on the buffers that `cpu.blend` takes: the same bits, ten times slower."""
    base_type, donor_type, out_type = (reference.STORAGE[dtype] for dtype in dtypes)
    for base, donor, out in parts:
        sides: tuple[Any, Any] = (base.view(base_type), donor.view(donor_type))
        out.view(out_type)[...] = reference.blend(*sides, dtypes, alpha, stochastic)


def mix(
    parts: Sequence[Sequence[Any]],
    dtypes: Sequence[str],
    mixing: reference.Mixing,
    firsts: Sequence[int],
) -> None:
    """Mix parts with the kernel for where their buffers are; see `cpu.mix`."""
    if not isinstance(parts[0][-1], np.ndarray):
        from . import gpu

        gpu.mix(parts, dtypes, mixing, firsts)
    elif _has_numba():
        from . import cpu

        cpu.mix(parts, dtypes, mixing, firsts)
    else:
        for part, first in zip(parts, firsts, strict=True):
            *streams, out = _as_words(part, dtypes)
            out[...] = reference.mix(streams, dtypes, mixing, first)


def count_magnitudes(
    model: Bytes,
    ancestor: Bytes,
    dtypes: reference.Triple,
    counts: npt.NDArray[np.int64],
    prefix: int = -1,
) -> None:
    """Count the magnitudes of model - ancestor; see `reference.count_magnitudes`."""
    if _has_numba():
        from . import cpu

        cpu.count_magnitudes(model, ancestor, dtypes, counts, prefix)
    else:
        sides = _as_words((model, ancestor), dtypes)
        reference.count_magnitudes(sides[0], sides[1], dtypes, counts, prefix)


def sum_products(
    streams: Sequence[Bytes],
    dtypes: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    relative: bool,
) -> reference.Floats:
    """Sums of products of two streams each, a row a block; see `reference.sum_products`."""
    if _has_numba():
        from . import cpu

        return cpu.sum_products(streams, dtypes, pairs, relative)
    return reference.sum_products(_as_words(streams, dtypes), dtypes, pairs, relative)


def _has_numba() -> bool:
    try:
        from . import cpu  # noqa: F401
    except ImportError:
        return False
    return True


def _as_words(buffers: Sequence[Bytes], dtypes: Sequence[str]) -> list[Any]:
    return [
        buffer.view(reference.STORAGE[dtype])
        for buffer, dtype in zip(buffers, dtypes, strict=False)
    ]
