"""Which kernel runs on this machine's processor, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import reference

Bytes = npt.NDArray[np.uint8]
Kernel = Callable[[Sequence[tuple[Bytes, Bytes, Bytes]], reference.Triple, float], None]
"""kernel(parts, dtypes, alpha): see `cpu.blend`."""


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
    parts: Sequence[tuple[Bytes, Bytes, Bytes]], dtypes: reference.Triple, alpha: float
) -> None:
    """The reference on the buffers that `cpu.blend` takes: the same bits, ten times slower."""
    base_type, donor_type, out_type = (reference.STORAGE[dtype] for dtype in dtypes)
    for base, donor, out in parts:
        sides: tuple[Any, Any] = (base.view(base_type), donor.view(donor_type))
        out.view(out_type)[...] = reference.blend(*sides, dtypes, alpha)
