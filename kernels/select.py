"""Which kernel runs on this machine, and why. Knows no maths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import reference

Bytes = npt.NDArray[np.uint8]
Kernel = Callable[[Sequence[tuple[Bytes, Bytes, Bytes]], tuple[str, str, str], float], None]
"""kernel(parts, dtypes, alpha): see `cpu.blend`."""
Relation = Callable[[Bytes, Bytes, tuple[str, str]], npt.NDArray[np.float64]]
"""relation(a, b, dtypes): see `cpu.relate`."""
_PIECE = 1 << 16  # elements


def select(triples: Iterable[tuple[str, str, str]] = ()) -> tuple[Kernel, str]:
    """The fastest kernel that works here and the reason it was chosen.

    triples: dtypes of base, donor and output it should be ready for when it is returned.
    """
    try:
        from . import cpu
    except ImportError as error:
        return _plain, f"numpy: numba cannot be imported ({error})"
    for dtypes in triples:
        cpu.warm(dtypes)
    return cpu.blend, "numba: compiled, parallel"


def relation() -> Relation:
    """The fastest way there is here to relate two buffers."""
    try:
        from . import cpu
    except ImportError:
        return _plain_relation
    return cpu.relate


def _plain_relation(a: Bytes, b: Bytes, dtypes: tuple[str, str]) -> npt.NDArray[np.float64]:
    """The reference over the same buffers, in pieces that take a few MB as float64."""
    x, y = (side.view(reference.STORAGE[dtype]) for side, dtype in zip((a, b), dtypes, strict=True))
    total = np.zeros(len(reference.SUMS))
    for start in range(0, x.size, _PIECE):
        piece = slice(start, start + _PIECE)
        total += reference.relate(x[piece], y[piece], dtypes)
    return total


def _plain(
    parts: Sequence[tuple[Bytes, Bytes, Bytes]], dtypes: tuple[str, str, str], alpha: float
) -> None:
    """The reference over the same buffers: slower by an order of magnitude, same bits."""
    base_type, donor_type, out_type = (reference.STORAGE[dtype] for dtype in dtypes)
    for base, donor, out in parts:
        sides: tuple[Any, Any] = (base.view(base_type), donor.view(donor_type))
        out.view(out_type)[...] = reference.blend(*sides, dtypes, alpha)
