"""Base and donor bytes on a card: held in its memory, in pinned host memory, or in the page cache.

The source that the loop reads from when the live model is on a card. What is held is exact and in
the checkpoint's own layout; the rest is read from the mapped files as it is needed.
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
from .placement import Placement, locate_sources

if TYPE_CHECKING:
    from ..checkpoints.dtypes import DType
    from ..checkpoints.mapped_files import Bytes


class DeviceSource:
    """Spans as flat byte tensors on one device ("cuda", or "cpu" to try it without a card).

    `locate_sources` says which spans are held on the card and which in page-locked RAM; all others
    are read from `files`.
    """

    def __init__(self, plan: Plan, files: MappedFiles, placement: Placement, device: str) -> None:
        self._files, self._device = files, torch.device(device)
        # By file: where a held stretch starts, and its bytes
        self._held: dict[Path, list[tuple[int, torch.Tensor]]] = {}
        for _, part, location in locate_sources(plan, placement):
            for span in (part.base, part.donor):
                if location == "cache" or span is None or self._find(span) is not None:
                    continue
                if location == "vram":
                    self._hold(span, as_tensor(files.view(span)).to(self._device, copy=True))
                else:
                    self._hold(span, self._copy_to_pinned(span))
                if release := files.release(span, evict=False):
                    release()

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

    def _copy_to_pinned(self, span: Span) -> torch.Tensor:
        on_card = self._device.type == "cuda"
        pinned = torch.empty(span.nbytes, dtype=torch.uint8, pin_memory=on_card)
        return pinned.copy_(as_tensor(self._files.view(span)))

    def _hold(self, span: Span, held: torch.Tensor) -> None:
        insort(self._held.setdefault(span.path, []), (span.start, held), key=itemgetter(0))

    def _find(self, span: Span) -> torch.Tensor | None:
        """The span's bytes inside a held stretch; None if no stretch covers it."""
        stretches = self._held.get(span.path, [])
        index = bisect_right(stretches, span.start, key=itemgetter(0)) - 1
        if index < 0:
            return None
        start, held = stretches[index]
        offset = span.start - start
        return held[offset : offset + span.nbytes] if offset + span.nbytes <= len(held) else None


def as_tensor(view: Bytes) -> torch.Tensor:
    """The same memory as a byte tensor, which keeps `view` alive. It must only be read.

    Made from the address, because torch warns of every array that is not writable.
    """
    if not view.size:
        return torch.empty(0, dtype=torch.uint8)
    address = view.__array_interface__["data"][0]
    memory = (ctypes.c_uint8 * view.size).from_address(address)
    memory.view = view  # type: ignore[attr-defined]
    return torch.frombuffer(memory, dtype=torch.uint8)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory as flat bytes."""
    return tensor.detach().view(-1).view(torch.uint8)


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype of one that torch has."""
    found: torch.dtype = getattr(torch, dtype.torch or "")
    return found
