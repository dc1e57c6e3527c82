"""Base and donor bytes on a card: held in its memory, in pinned host memory, or in the page cache.

The source that `merge.run` reads from when the live model lies on a card. What is held is exact and
in the checkpoint's own layout; the rest is read from the mapped files as it is needed. Leaves to
others: how much goes where (`placement.py`).
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right, insort
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..checkpoints.mapped_files import MappedFiles
from ..checkpoints.span import Span
from ..mapping.plan import Plan
from .placement import Placement, homes

if TYPE_CHECKING:
    from ..checkpoints.dtypes import DType
    from ..checkpoints.mapped_files import Bytes

WINDOW = 64 << 20
"""Bytes of output per kernel call into a live model, which needs no buffers for them: so many that
launching costs nothing beside copying."""


class DeviceSource:
    """Spans as flat byte tensors on one device ("cuda", or "cpu" to try it without a card).

    What `placement.homes` puts there is held in the card's memory or in page-locked host memory;
    everything else stays in the page cache.
    """

    def __init__(self, plan: Plan, files: MappedFiles, placement: Placement, device: str) -> None:
        self._files, self._device = files, torch.device(device)
        self._held: dict[Path, list[tuple[int, torch.Tensor]]] = {}  # by where they start
        for _, part, home in homes(plan, placement):
            for span in (part.base, part.donor):
                if home == "cache" or span is None or self._find(span) is not None:
                    continue
                if home == "vram":
                    self._hold(span, as_tensor(files.view(span)).to(self._device, copy=True))
                else:
                    self._hold(span, self._page_locked(span))
                if let_go := files.release(span, evict=False):
                    let_go()

    def view(self, span: Span) -> torch.Tensor:
        """A span's bytes on the device."""
        held = self._find(span)
        if held is None:
            return as_tensor(self._files.view(span)).to(self._device)
        return held.to(self._device, non_blocking=True)

    def prefetch(self, span: Span) -> list[Callable[[], None]]:
        """Bring in the pages of what is not held."""
        return [] if self._find(span) is not None else self._files.prefetch(span)

    def release(self, span: Span, *, evict: bool) -> Callable[[], None] | None:
        """Unmap the pages of what is not held."""
        if self._find(span) is not None:
            return None
        return self._files.release(span, evict=evict)

    def _page_locked(self, span: Span) -> torch.Tensor:
        locked = self._device.type == "cuda"
        held = torch.empty(span.nbytes, dtype=torch.uint8, pin_memory=locked)
        return held.copy_(as_tensor(self._files.view(span)))

    def _hold(self, span: Span, held: torch.Tensor) -> None:
        insort(self._held.setdefault(span.path, []), (span.start, held), key=itemgetter(0))

    def _find(self, span: Span) -> torch.Tensor | None:
        """The stretch of a held span that a piece of it covers."""
        there = self._held.get(span.path, [])
        at = bisect_right(there, span.start, key=itemgetter(0)) - 1
        if at < 0:
            return None
        start, held = there[at]
        offset = span.start - start
        return held[offset : offset + span.nbytes] if offset + span.nbytes <= len(held) else None


def as_tensor(view: Bytes) -> torch.Tensor:
    """The same memory as a byte tensor, which keeps `view` alive. Only ever read from.

    Made from the address, because torch warns of every array that is not writable.
    """
    address = view.__array_interface__["data"][0]
    if not view.size:
        return torch.empty(0, dtype=torch.uint8)
    memory = (ctypes.c_uint8 * view.size).from_address(address)
    memory.view = view  # type: ignore[attr-defined]
    return torch.frombuffer(memory, dtype=torch.uint8)


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype of one that torch has."""
    found: torch.dtype = getattr(torch, dtype.torch or "")
    return found
