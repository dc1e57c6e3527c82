"""What bitsandbytes cannot run in 4 bit on a CPU. 8 bit runs on any, as measured with 0.50.2.

On CPUs with avx512_bf16 it repacks 4-bit weights at the first pass, which fails for some shapes;
on others it has plain kernels that take all. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

PACKED_ROWS, PACKED_COLUMNS = 32, 64
"""What a repacked weight has multiples of."""


def repacks_4bit(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether bitsandbytes repacks 4-bit weights on this machine's CPU."""
    try:
        return "avx512_bf16" in cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def find_obstacle(weights: Iterable[tuple[str, tuple[int, ...]]]) -> str | None:
    """Why a model with linear weights of these names and shapes cannot be repacked, or None."""
    for name, (rows, columns) in weights:
        if rows % PACKED_ROWS or columns % PACKED_COLUMNS:
            return (
                f"bitsandbytes cannot run {name} in 4 bit on this CPU: it is {rows} x {columns},"
                f" expected multiples of {PACKED_ROWS} x {PACKED_COLUMNS}; take int8 or none, or a"
                " card"
            )
    return None
