"""The stage between the loop and the disk that quantizes: windows in, bitsandbytes' tensors out.

bitsandbytes quantizes 64 elements (NF4) or a row (int8) at a time, so a tensor of any size goes
through it in chunks, to the same bits as at once. The scales of NF4 are quantized in their turn,
around the mean of all of them: they wait in a file without a name.
"""

from __future__ import annotations

import importlib
import mmap
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..live.device_source import torch_dtype
from ..mapping.plan import Step
from ..merging.disk_sink import DiskSink
from ..merging.loop import WINDOW
from ..merging.shard_layout import Entry
from .quantized_layout import BLOCK, NESTED, QUANT_STATE, QuantizedLayout

if TYPE_CHECKING:
    from ..checkpoints.mapped_files import Bytes

CHUNK = 1 << 18
"""Elements that are quantized at a time: the intermediate results take some 25 bytes each."""


class QuantizingSink(AbstractContextManager["QuantizingSink"]):
    """A sink that hands its windows on to a disk sink, quantized or cast where `layout` says so.

    work: a folder for what the scales of one tensor wait in. Anonymous memory: one window, and the
    intermediate results of a chunk (of a row, if one is longer).
    """

    def __init__(self, disk: DiskSink, layout: QuantizedLayout, work: Path) -> None:
        self._disk, self._layout = disk, layout
        self._window: Bytes = np.empty(WINDOW, np.uint8)
        self._used = 0
        self._staged: list[tuple[Step, int, Bytes]] = []
        self._disk_used = 0  # bytes of the disk sink's window
        self._scratch = _ScratchFile(work)
        self._tensor: _QuantizedTensor | None = None

    def __exit__(self, *_: object) -> None:
        """Drop what is staged; the disk sink is closed by its owner."""
        self._tensor, self._staged = None, []
        self._scratch.close()

    def wants(self, step: Step) -> bool:
        """Whether anything of what the step becomes is still to be written."""
        entries = self._layout.entries(step)
        return any(self._disk.wants(entry) for entry in entries if not entry.quant_state)

    def copy(self, step: Step, offset: int, content: Bytes) -> Future[None] | None:
        """Take bytes that were not blended: quantize or cast them, or queue them as they are."""
        if step.name in self._layout.names or step.name in self._layout.casts:
            self._staged.append((step, offset, content))
            self.commit()
            return None
        return self._disk.copy(step, offset, content)

    def slot(self, step: Step, offset: int, nbytes: int) -> Bytes:
        """The next stretch of the staging buffer, which holds one window."""
        view = self._window[self._used : self._used + nbytes]
        self._used += nbytes
        self._staged.append((step, offset, view))
        return view

    def commit(self) -> None:
        """Hand on what was staged, in its order, as what it becomes."""
        for step, offset, content in self._staged:
            if step.name in self._layout.names:
                self._tensor_of(step).feed(content)
            else:
                self._pass_on(step, offset, content)
        self._staged, self._used, self._disk_used = [], 0, 0
        self._disk.commit()

    def _pass_on(self, step: Step, offset: int, content: Bytes) -> None:
        """A stretch that is not quantized, cast where a loader would."""
        (entry,) = self._layout.entries(step)
        if entry.dtype == step.dtype:
            self._put(entry, offset, content)
            return
        size, first = step.dtype.itemsize, offset // step.dtype.itemsize
        for start in range(0, content.size, CHUNK * size):
            values = torch.from_numpy(content[start : start + CHUNK * size].copy())
            cast = values.view(torch_dtype(step.dtype)).to(torch_dtype(entry.dtype))
            self._put(entry, (first + start // size) * entry.dtype.itemsize, _bytes_of(cast))

    def _tensor_of(self, step: Step) -> _QuantizedTensor:
        """The tensor that is being quantized: one at a time, since steps come in order."""
        if self._tensor is None or self._tensor.step.name != step.name:
            if self._layout.method == "nf4":
                add_state = self._disk.write_quant_state
                self._tensor = _Nf4Tensor(step, self._layout, self._put, add_state, self._scratch)
            else:
                self._tensor = _Int8Tensor(step, self._layout, self._put)
        return self._tensor

    def _put(self, entry: Entry, offset: int, content: Bytes) -> None:
        """Bytes of one entry into windows of the disk sink."""
        for start in range(0, content.size, WINDOW):
            piece = content[start : start + WINDOW]
            if self._disk_used + piece.size > WINDOW:
                self._disk.commit()
                self._disk_used = 0
            self._disk.slot(entry, offset + start, piece.size)[...] = piece
            self._disk_used += piece.size


Put = Callable[[Entry, int, "Bytes"], None]


class _QuantizedTensor:
    """One tensor on its way: gathered into chunks of whole units, each quantized by itself.

    unit: elements that are quantized together.
    """

    def __init__(self, step: Step, layout: QuantizedLayout, put: Put, unit: int) -> None:
        self.step = step
        self._put = put
        self._stored_dtype, self._dtype = torch_dtype(step.dtype), torch_dtype(layout.dtype)
        self._entries = layout.entries(step)
        self._bytes_left = step.nbytes
        elements = min(step.elements, max(1, CHUNK // unit) * unit)
        self._chunk: Bytes = np.empty(elements * step.dtype.itemsize, np.uint8)
        self._used = 0

    def feed(self, content: Bytes) -> None:
        """The next bytes of the tensor; after the last ones what belongs to it follows."""
        while content.size:
            count = min(content.size, self._chunk.size - self._used)
            self._chunk[self._used : self._used + count] = content[:count]
            content = content[count:]
            self._used += count
            self._bytes_left -= count
            if self._used == self._chunk.size or not self._bytes_left:
                values = torch.from_numpy(self._chunk[: self._used]).view(self._stored_dtype)
                self._quantize(values.to(self._dtype))
                self._used = 0
        if not self._bytes_left:
            self._finish()

    def _quantize(self, values: torch.Tensor) -> None:
        """Quantize whole units of the tensor, flat and in the model's dtype."""
        raise NotImplementedError

    def _finish(self) -> None:
        """Write what belongs to the tensor, once all of it is quantized."""
        raise NotImplementedError


class _Int8Tensor(_QuantizedTensor):
    """Rows with one float32 scale each."""

    def __init__(self, step: Step, layout: QuantizedLayout, put: Put) -> None:
        rows, self._width = step.shape
        super().__init__(step, layout, put, unit=self._width)
        self._rows_done = 0
        # One block, not an array a chunk: those would keep the heap from shrinking between chunks
        self._scales = torch.empty(rows)

    def _quantize(self, values: torch.Tensor) -> None:
        # By way of fp16, as `Int8Params` does
        rows = values.view(-1, self._width).half()
        weight, scales, _ = _bitsandbytes().int8_vectorwise_quant(rows)
        self._put(self._entries[0], self._rows_done * self._width, _bytes_of(weight))
        self._scales[self._rows_done : self._rows_done + len(scales)] = scales
        self._rows_done += len(scales)

    def _finish(self) -> None:
        _, scales, weight_format = self._entries
        self._put(scales, 0, _bytes_of(self._scales))
        self._put(weight_format, 0, np.zeros(1, np.uint8))  # row-major


class _Nf4Tensor(_QuantizedTensor):
    """Blocks, and their scales as soon as all of them are known."""

    def __init__(
        self,
        step: Step,
        layout: QuantizedLayout,
        put: Put,
        write_quant_state: Callable[[Entry, bytes], None],
        scratch: _ScratchFile,
    ) -> None:
        super().__init__(step, layout, put, unit=BLOCK)
        self._write_quant_state = write_quant_state
        self._bytes_done = self._blocks_done = 0
        self._map = scratch.map(4 * -(-step.elements // BLOCK))
        self._absmax = torch.frombuffer(self._map, dtype=torch.float32)
        self._code: Any = None

    def _quantize(self, values: torch.Tensor) -> None:
        packed, state = _bitsandbytes().quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
        self._code = state.code
        self._put(self._entries[0], self._bytes_done, _bytes_of(packed))
        self._bytes_done += packed.numel()
        count = len(state.absmax)
        self._absmax[self._blocks_done : self._blocks_done + count] = state.absmax
        self._blocks_done += count

    def _finish(self) -> None:
        """As `quantize_4bit` does with compress_statistics, some scales at a time."""
        _, absmax, nested_absmax, nested_map, quant_map, quant_state = self._entries
        mean = self._absmax.mean()
        nested: list[Bytes] = []
        for start in range(0, len(self._absmax), CHUNK):
            scales = self._absmax[start : start + CHUNK] - mean
            codes, state = _bitsandbytes().quantize_blockwise(scales, blocksize=NESTED)
            self._put(absmax, start, _bytes_of(codes))
            nested.append(_bytes_of(state.absmax))
        stored = self._stored_state(mean, state)
        self._put(nested_absmax, 0, np.concatenate(nested))
        self._put(nested_map, 0, _bytes_of(stored["nested_quant_map"]))
        self._put(quant_map, 0, _bytes_of(stored["quant_map"]))
        self._write_quant_state(quant_state, _bytes_of(stored[QUANT_STATE]).tobytes())

    def _stored_state(self, mean: torch.Tensor, nested_state: Any) -> dict[str, torch.Tensor]:
        """What bitsandbytes stores of a quant state beside codes and scales, by ends of names."""
        state = _bitsandbytes().QuantState(
            absmax=torch.empty(0, dtype=torch.uint8),
            shape=torch.Size(self.step.shape),
            dtype=self._dtype,
            blocksize=BLOCK,
            code=self._code,
            quant_type="nf4",
            offset=mean,
            state2=nested_state,
        )
        stored: dict[str, torch.Tensor] = state.as_dict(packed=True)
        return stored


class _ScratchFile:
    """Memory that belongs to a file without a name: the kernel's to write out, not anonymous."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed by close)

    def map(self, nbytes: int) -> mmap.mmap:
        """Writable memory of `nbytes`, until nobody holds it; what was there is overwritten."""
        if os.fstat(self._file.fileno()).st_size < nbytes:
            os.ftruncate(self._file.fileno(), nbytes)
        return mmap.mmap(self._file.fileno(), nbytes)

    def close(self) -> None:
        """Delete the file, once nobody holds its memory."""
        self._file.close()


def _bitsandbytes() -> Any:
    """`bitsandbytes.functional`, without its types."""
    return importlib.import_module("bitsandbytes").functional


def _bytes_of(tensor: torch.Tensor) -> Bytes:
    flat: Bytes = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return flat
