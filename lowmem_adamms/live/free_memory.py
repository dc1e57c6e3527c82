"""How much memory is free: RAM by psutil and the cgroups, a CUDA card by nvidia-smi.

Imports no torch, which takes seconds.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

NVIDIA_SMI_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Memory:
    """Free bytes of RAM and of the first CUDA card (None: no card, or none is wanted)."""

    ram_bytes: int
    vram_bytes: int | None
    card_name: str | None


# Folder below the mount; files of the limit and the usage; how lines of memory.stat begin
_CGROUP_V2 = ("", "memory.max", "memory.current", "")
_CGROUP_V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def measure_memory(*, ram: int | None = None, vram: int | None = None) -> Memory:
    """Measure the memory that is free now.

    A number of bytes that is given is used instead; `vram=0` means no card. If nvidia-smi is
    missing or fails, there is no card.
    """
    if ram is None:
        ram = available_ram()
    if vram == 0:
        return Memory(ram, None, None)
    name, free_bytes = _query_card() or (None, None)
    return Memory(ram, free_bytes if vram is None else vram, name)


def available_ram(root: Path = Path("/")) -> int:
    """Bytes that this process may still take without swapping.

    The smallest of what the system has and of what each memory cgroup around the process has left.
    root: the folder that `proc` and `sys` are in.
    """
    return min((int(psutil.virtual_memory().available), *_free_bytes_of_cgroups(root)))


def _free_bytes_of_cgroups(root: Path) -> Iterator[int]:
    """What each memory cgroup around this process has left; those without a limit are skipped."""
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        fields = line.split(":", 2)  # number, controllers (none in version 2), path
        if len(fields) != 3:
            continue
        _, controllers, path = fields
        if not controllers:
            mount, *names = _CGROUP_V2
        elif "memory" in controllers.split(","):
            mount, *names = _CGROUP_V1
        else:
            continue
        # In a container the mount may begin at the process's own cgroup, and the path not exist
        parts = PurePosixPath(path.lstrip("/")).parts
        depth = 0 if ".." in parts else len(parts)
        for length in range(depth, -1, -1):
            folder = (root / "sys/fs/cgroup" / mount).joinpath(*parts[:length])
            yield from _free_bytes_of_cgroup(folder, *names)


def _free_bytes_of_cgroup(folder: Path, limit: str, usage: str, prefix: str) -> Iterator[int]:
    limit_bytes, used_bytes = (_read_text(folder / name).strip() for name in (limit, usage))
    if limit_bytes.isdecimal() and used_bytes.isdecimal():  # "max" where there is no limit
        # Cached files count as used but make way for others: MemAvailable allows for them as well
        pattern = rf"^{prefix}(?:in)?active_file (\d+)$"
        cached = re.findall(pattern, _read_text(folder / "memory.stat"), re.MULTILINE)
        yield max(0, int(limit_bytes) - max(0, int(used_bytes) - sum(map(int, cached))))


def _read_text(path: Path) -> str:
    """A small file of the system's; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _query_card() -> tuple[str, int] | None:
    """Name and free bytes of the first card that CUDA would show us; None if there is none.

    nvidia-smi counts cards by bus, CUDA by speed unless CUDA_DEVICE_ORDER says otherwise: with
    different cards in one machine, --vram is more reliable.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    program = shutil.which("nvidia-smi")
    if first in ("", "-1") or program is None:
        return None
    import subprocess

    query = ("--query-gpu=name,memory.free", "--format=csv,noheader,nounits")
    try:
        done = subprocess.run(
            [program, f"--id={first}", *query],
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_SECONDS,
            check=True,
        )
        name, free_mib = done.stdout.strip().splitlines()[0].rsplit(",", 1)
        return name.strip(), int(free_mib) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
