"""How much memory is free: RAM by the system and its cgroups, a CUDA card by nvidia-smi.

Imports no torch: asking costs a look at `/proc` and, where there is one, a call of nvidia-smi.
Leaves to others: what is done with it (`placement.py`).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import PlacementError

_SMI_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of RAM available, and free on the first CUDA card (None: no card, or none wanted)."""

    ram: int
    vram: int | None
    card: str | None


def measure(*, ram: int | None = None, vram: int | None = None) -> Memory:
    """The memory that is free now; a value given in bytes wins, and `vram=0` means no card.

    A card is looked for with nvidia-smi, and any failure of it means that there is none.
    PlacementError where the system does not tell its RAM.
    """
    if ram is None:
        ram = available_ram()
    if vram == 0:
        return Memory(ram, None, None)
    name, free = _first_card() or (None, None)
    return Memory(ram, free if vram is None else vram, name)


def available_ram(root: Path = Path("/")) -> int:
    """Bytes this process may still take without swapping, under the `proc` and `sys` of `root`.

    MemAvailable (else what sysconf knows), bounded by every memory cgroup around the process.
    """
    match = re.search(r"^MemAvailable: *(\d+) kB$", _text(root / "proc/meminfo"), re.MULTILINE)
    free = int(match[1]) * 1024 if match else _sysconf_ram()
    return min((free, *_cgroup_rooms(root)))


def _sysconf_ram() -> int:
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):  # macOS has the second only
        try:
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # AttributeError: Windows
            continue
    raise PlacementError("the system does not tell how much RAM is free; give it as --ram SIZE")


def _cgroup_rooms(root: Path) -> Iterator[int]:
    """What each memory cgroup that holds this process (v1 or v2) still has room for."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers:
            mount, names = "", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            mount, names = "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        # In a container the mount may begin at the process's own cgroup, and the path not exist
        parts = PurePosixPath(path.lstrip("/")).parts
        depth = 0 if ".." in parts else len(parts)
        for length in range(depth, -1, -1):
            folder = (root / "sys/fs/cgroup" / mount).joinpath(*parts[:length])
            if (room := _room(folder, *names)) is not None:
                yield room


def _room(folder: Path, limit: str, usage: str, prefix: str) -> int | None:
    """Bytes left under one cgroup's limit; None if it has none."""
    most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
    if not (most.isdecimal() and used.isdecimal()):  # v2 says "max" where there is no limit
        return None
    # Cached files count as used but make way for others: MemAvailable allows for them as well
    lines = rf"^{prefix}(?:in)?active_file (\d+)$"
    files = re.findall(lines, _text(folder / "memory.stat"), re.MULTILINE)
    return max(0, int(most) - max(0, int(used) - sum(map(int, files))))


def _text(path: Path) -> str:
    """A small file of the system's; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _first_card() -> tuple[str, int] | None:
    """Name and free bytes of the first card CUDA would show us; None where nothing tells.

    nvidia-smi counts cards by bus, CUDA by speed unless CUDA_DEVICE_ORDER says otherwise: with
    unlike cards in one machine, --vram is the surer word.
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
            timeout=_SMI_SECONDS,
            check=True,
        )
        name, free = done.stdout.strip().splitlines()[0].rsplit(",", 1)
        return name.strip(), int(free) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
