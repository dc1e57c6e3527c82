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


def _plain(
    parts: Sequence[tuple[Bytes, Bytes, Bytes]], dtypes: tuple[str, str, str], alpha: float
) -> None:
    """The reference over the same buffers: slower by an order of magnitude, same bits."""
    base_type, donor_type, out_type = (reference.STORAGE[dtype] for dtype in dtypes)
    for base, donor, out in parts:
        sides: tuple[Any, Any] = (base.view(base_type), donor.view(donor_type))
        out.view(out_type)[...] = reference.blend(*sides, dtypes, alpha)
