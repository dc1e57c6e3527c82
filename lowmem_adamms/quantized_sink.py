"""The stage between the loop and the disk that quantizes: windows in, bitsandbytes' tensors out.

bitsandbytes quantizes 64 elements (NF4) or a row (int8) at a time, so a tensor of any size goes
through it in chunks, to the same bits as at once. The scales of NF4 are quantized in their turn,
around the mean of all of them: they wait in a file without a name. Leaves to others: which tensors
(`quantized.py`), the loop (`merge.py`), writing (`sink.py`).
"""

from __future__ import annotations

import importlib
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .checkpoint import Span
from .closing import Closing
from .device import torch_dtype
from .merge import WINDOW
from .plan import Step
from .quantized import BLOCK, NESTED, STATE, Quantized
from .sink import DiskSink, Entry, pread_all
from .stream import evict_range

if TYPE_CHECKING:
    from .stream import Bytes

CHUNK = 1 << 18
"""Elements that are quantized at a time: the intermediate results take some 25 bytes each."""


class QuantizingSink(Closing):
    """A sink that hands its windows on to a disk sink, quantized where `how` says so.

    work: a folder for what the scales of one tensor wait in. Anonymous memory: one window, and the
    intermediate results of a chunk (of a row, if one is longer).
    """

    def __init__(self, disk: DiskSink, how: Quantized, work: Path, *, evict: bool) -> None:
        self._disk, self._how, self._evict = disk, how, evict
        self._staging: Bytes = np.empty(WINDOW, np.uint8)
        self._used = 0
        self._staged: list[tuple[Step, int, Bytes]] = []
        self._filled = 0  # bytes of the disk sink's window
        self._scratch = _Scratch(work)
        self._layer: tuple[str, _Layer] | None = None

    def close(self) -> None:
        """Drop what is staged; the disk sink is closed by its owner."""
        self._layer, self._staged = None, []
        self._scratch.close()

    def wants(self, step: Step) -> bool:
        """Whether anything of what the step becomes is still to be written."""
        entries = [entry for entry in self._how.entries(step) if not entry.late]
        return any(map(self._disk.wants, entries))

    def copy(self, step: Step, offset: int, span: Span) -> None:
        """Have a span copied as it is, or read it to be quantized."""
        if step.name not in self._how.names:
            self._disk.copy(step, offset, span)
            self._filled = 0
            return
        fd = os.open(span.path, os.O_RDONLY)
        try:
            for start in range(span.start, span.stop, WINDOW):
                nbytes = min(WINDOW, span.stop - start)
                view = self.slot(step, offset + start - span.start, nbytes)
                pread_all(fd, memoryview(view), start)  # type: ignore[arg-type]
                self.commit()
            if self._evict:
                evict_range(fd, span.start, span.stop)
        finally:
            os.close(fd)

    def slot(self, step: Step, offset: int, nbytes: int) -> Bytes:
        """The next stretch of the staging buffer, which holds one window."""
        view = self._staging[self._used : self._used + nbytes]
        self._used += nbytes
        self._staged.append((step, offset, view))
        return view

    def commit(self) -> None:
        """Hand on what was staged, in its order, as what it becomes."""
        for step, offset, view in self._staged:
            if step.name in self._how.names:
                self._layer_of(step).feed(view)
            else:
                (entry,) = self._how.entries(step)
                self._put(entry, offset, view)
        self._staged, self._used, self._filled = [], 0, 0
        self._disk.commit()

    def _layer_of(self, step: Step) -> _Layer:
        """The tensor that is being quantized: one at a time, since steps come in order."""
        if self._layer is None or self._layer[0] != step.name:
            kind = _Nf4 if self._how.method == "nf4" else _Int8
            layer = kind(step, self._how, self._put, self._disk.late, self._scratch)
            self._layer = step.name, layer
        return self._layer[1]

    def _put(self, entry: Entry, offset: int, content: Bytes) -> None:
        """Bytes of one entry into windows of the disk sink."""
        for start in range(0, content.size, WINDOW):
            piece = content[start : start + WINDOW]
            if self._filled + piece.size > WINDOW:
                self._disk.commit()
                self._filled = 0
            self._disk.slot(entry, offset + start, piece.size)[...] = piece
            self._filled += piece.size


Put = Callable[[Entry, int, "Bytes"], None]
Late = Callable[[Entry, bytes], None]


class _Layer:
    """One tensor on its way: gathered into chunks of whole units, each quantized by itself."""

    unit: int
    """Elements that are quantized together."""

    def __init__(self, step: Step, how: Quantized, put: Put, late: Late, scratch: _Scratch) -> None:
        self._step, self._put, self._late = step, put, late
        self._stored, self._dtype = torch_dtype(step.dtype), torch_dtype(how.dtype)
        self._entries = how.entries(step)
        self._left = step.nbytes
        self._functional = importlib.import_module("bitsandbytes").functional
        size = min(step.elements, max(1, CHUNK // self.unit) * self.unit)
        self._chunk: Bytes = np.empty(size * step.dtype.itemsize, np.uint8)
        self._used = 0

    def feed(self, content: Bytes) -> None:
        """The next bytes of the tensor; after the last ones what belongs to it follows."""
        while content.size:
            take = min(content.size, self._chunk.size - self._used)
            self._chunk[self._used : self._used + take] = content[:take]
            content = content[take:]
            self._used += take
            self._left -= take
            if self._used == self._chunk.size or not self._left:
                values = torch.from_numpy(self._chunk[: self._used]).view(self._stored)
                self._quantize(values.to(self._dtype))
                self._used = 0
        if not self._left:
            self._end()

    def _quantize(self, values: torch.Tensor) -> None:
        """Whole units of the tensor, flat and in the model's dtype."""
        raise NotImplementedError

    def _end(self) -> None:
        raise NotImplementedError


class _Int8(_Layer):
    """Rows as `Int8Params` quantizes them: int8 with one float32 scale each, by way of fp16."""

    def __init__(self, step: Step, how: Quantized, put: Put, late: Late, scratch: _Scratch) -> None:
        self.unit = step.shape[1]
        super().__init__(step, how, put, late, scratch)
        self._done = 0
        self._scales: list[Bytes] = []

    def _quantize(self, values: torch.Tensor) -> None:
        rows = values.view(-1, self.unit).half()
        weight, scales, _ = self._functional.int8_vectorwise_quant(rows)
        self._put(self._entries[0], self._done, _bytes(weight))
        self._scales.append(_bytes(scales))
        self._done += weight.numel()

    def _end(self) -> None:
        _, scales, layout = self._entries
        self._put(scales, 0, np.concatenate(self._scales))
        self._put(layout, 0, np.zeros(1, np.uint8))  # row-major


class _Nf4(_Layer):
    """Blocks as `Params4bit` quantizes them, with double quantization of their scales."""

    unit = BLOCK

    def __init__(self, step: Step, how: Quantized, put: Put, late: Late, scratch: _Scratch) -> None:
        super().__init__(step, how, put, late, scratch)
        self._done = self._blocks = 0
        self._map = scratch.map(4 * -(-step.elements // BLOCK))
        self._absmax = torch.frombuffer(self._map, dtype=torch.float32)
        self._code: Any = None

    def _quantize(self, values: torch.Tensor) -> None:
        packed, state = self._functional.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
        self._put(self._entries[0], self._done, _bytes(packed))
        self._done += packed.numel()
        self._absmax[self._blocks : self._blocks + len(state.absmax)] = state.absmax
        self._blocks += len(state.absmax)
        self._code = state.code

    def _end(self) -> None:
        """As `quantize_4bit` does with compress_statistics, some scales at a time."""
        _, absmax, nested_absmax, nested_map, quant_map, quant_state = self._entries
        offset = self._absmax.mean()
        nested: list[Bytes] = []
        for start in range(0, len(self._absmax), CHUNK):
            centred = self._absmax[start : start + CHUNK] - offset
            scales, state = self._functional.quantize_blockwise(centred, blocksize=NESTED)
            self._put(absmax, start, _bytes(scales))
            nested.append(_bytes(state.absmax))
        stated = self._state(offset, state)
        self._put(nested_absmax, 0, np.concatenate(nested))
        self._put(nested_map, 0, _bytes(stated["nested_quant_map"]))
        self._put(quant_map, 0, _bytes(stated["quant_map"]))
        self._late(quant_state, _bytes(stated[STATE]).tobytes())

    def _state(self, offset: torch.Tensor, nested: Any) -> dict[str, torch.Tensor]:
        """What bitsandbytes stores of a quant state; the scales in it are not the tensor's."""
        state = self._functional.QuantState(
            absmax=torch.empty(0, dtype=torch.uint8),
            shape=torch.Size(self._step.shape),
            dtype=self._dtype,
            blocksize=BLOCK,
            code=self._code,
            quant_type="nf4",
            offset=offset,
            state2=nested,
        )
        stored: dict[str, torch.Tensor] = state.as_dict(packed=True)
        return stored


class _Scratch:
    """Memory that belongs to a file without a name: the kernel's to write out, not anonymous."""

    def __init__(self, work: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=work)  # noqa: SIM115  (closed by close)

    def map(self, nbytes: int) -> mmap.mmap:
        """Writable memory of `nbytes`, until nobody holds it; what was there is overwritten."""
        if os.fstat(self._file.fileno()).st_size < nbytes:
            os.ftruncate(self._file.fileno(), nbytes)
        return mmap.mmap(self._file.fileno(), nbytes)

    def close(self) -> None:
        self._file.close()


def _bytes(tensor: torch.Tensor) -> Bytes:
    flat: Bytes = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return flat
