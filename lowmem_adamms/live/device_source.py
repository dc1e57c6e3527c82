"""Base and donor bytes on a card: held in its memory, in pinned host memory, or in the page cache.

The source that the loop reads from when the live model is on a card. What is held is exact and in
the checkpoint's own layout; the rest is read from the mapped files as it is needed, through two
page-locked buffers.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable
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
        self._staging = _Staging(self._device)
        # By file: where a held stretch starts, and its bytes
        self._held: defaultdict[Path, list[tuple[int, torch.Tensor]]] = defaultdict(list)
        vram_bytes, pinned_bytes = placement.vram_source_bytes, placement.pinned_source_bytes
        for part, _, location in locate_sources(plan, vram_bytes, pinned_bytes):
            for span in (span for side in part.sides for span in side.spans):
                if location == "cache" or self._find(span) is not None:
                    continue
                content = as_tensor(files.view(span))
                if location == "vram":
                    held = content.to(self._device, copy=True)
                else:
                    on_card = self._device.type == "cuda"
                    held = torch.empty_like(content, pin_memory=on_card).copy_(content)
                self._held[span.path].append((span.start, held))
                if release := files.release(span, evict=False):
                    release()

    def view(self, span: Span) -> torch.Tensor:
        """A span's bytes on the device."""
        held = self._find(span)
        if held is None:
            return self._staging.send(as_tensor(self._files.view(span)))
        return held.to(self._device, non_blocking=True)

    def prefetch(self, span: Span) -> list[Callable[[], None]]:
        """Bring in the pages of what is not held."""
        return [] if self._find(span) is not None else self._files.prefetch(span)

    def release(self, span: Span, *, evict: bool) -> Callable[[], None] | None:
        """Unmap the pages of what is not held."""
        if self._find(span) is not None:
            return None
        return self._files.release(span, evict=evict)

    def _find(self, span: Span) -> torch.Tensor | None:
        """The span's bytes inside a held stretch; None if no stretch covers it."""
        for start, held in self._held[span.path]:
            offset = span.start - start
            if 0 <= offset <= len(held) - span.nbytes:
                return held[offset : offset + span.nbytes]
        return None


class _Staging:
    """Two page-locked buffers, by turns, through which bytes go to a device.

    The copy to the device is queued on the current stream, so that the host fills one buffer while
    the other is on its way.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
        self._sent = [torch.get_device_module(device).Event() for _ in self._buffers]
        self._turn = 0

    def send(self, content: torch.Tensor) -> torch.Tensor:
        """The bytes on the device."""
        self._turn = 1 - self._turn
        self._sent[self._turn].synchronize()  # what was in it has left
        if len(self._buffers[self._turn]) < len(content):
            on_card = self._device.type == "cuda"
            self._buffers[self._turn] = torch.empty_like(content, pin_memory=on_card)
        staged = self._buffers[self._turn][: len(content)].copy_(content)
        sent = staged.to(self._device, non_blocking=True, copy=True)
        self._sent[self._turn].record()
        return sent


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
