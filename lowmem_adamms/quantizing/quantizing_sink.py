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

from ..checkpoints.mapped_files import evict_range
from ..checkpoints.span import Span
from ..closing import Closing
from ..live.device_source import torch_dtype
from ..mapping.plan import Step
from ..merging.disk_sink import DiskSink, pread_all
from ..merging.loop import WINDOW
from ..merging.shard_layout import Entry
from .quantization import BLOCK, NESTED, STATE, Quantized

if TYPE_CHECKING:
    from ..checkpoints.mapped_files import Bytes

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
        if step.name not in self._how.names and step.name not in self._how.casts:
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
                self._pass_on(step, offset, view)
        self._staged, self._used, self._filled = [], 0, 0
        self._disk.commit()

    def _pass_on(self, step: Step, offset: int, view: Bytes) -> None:
        """A stretch that is not quantized, cast where a loader would."""
        (entry,) = self._how.entries(step)
        if entry.dtype == step.dtype:
            self._put(entry, offset, view)
            return
        size, first = step.dtype.itemsize, offset // step.dtype.itemsize
        for start in range(0, view.size, CHUNK * size):
            values = torch.from_numpy(view[start : start + CHUNK * size].copy())
            cast = values.view(torch_dtype(step.dtype)).to(torch_dtype(entry.dtype))
            self._put(entry, (first + start // size) * entry.dtype.itemsize, _bytes(cast))

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


# What bitsandbytes does of it, on CPU tensors


def nf4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed codes, scales and map of whole blocks: U8, F32, F32."""
    functional = importlib.import_module("bitsandbytes").functional
    packed, state = functional.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
    return packed, state.absmax, state.code


def double_quantized(scales: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Codes of NF4's scales around their mean, U8, and the state that undoes it."""
    functional = importlib.import_module("bitsandbytes").functional
    codes: torch.Tensor
    codes, state = functional.quantize_blockwise(scales - offset, blocksize=NESTED)
    return codes, state


def stored_state(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    code: torch.Tensor,
    offset: torch.Tensor,
    nested: Any,
) -> dict[str, torch.Tensor]:
    """What bitsandbytes stores of a quant state beside codes and scales, by the ends of names."""
    state = importlib.import_module("bitsandbytes").functional.QuantState(
        absmax=torch.empty(0, dtype=torch.uint8),
        shape=torch.Size(shape),
        dtype=dtype,
        blocksize=BLOCK,
        code=code,
        quant_type="nf4",
        offset=offset,
        state2=nested,
    )
    stored = state.as_dict(packed=True)
    return {name: stored[name] for name in ("nested_quant_map", "quant_map", STATE)}


def int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of whole rows, I8 and F32; by way of fp16, as `Int8Params` does."""
    functional = importlib.import_module("bitsandbytes").functional
    weight, scales, _ = functional.int8_vectorwise_quant(rows.half())
    return weight, scales


# One tensor after the other


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
    """Rows with one float32 scale each."""

    def __init__(self, step: Step, how: Quantized, put: Put, late: Late, scratch: _Scratch) -> None:
        self.unit = step.shape[1]
        super().__init__(step, how, put, late, scratch)
        self._done = 0
        # One block, not an array a chunk: those would keep the heap from shrinking between chunks
        self._scales = torch.empty(step.shape[0])

    def _quantize(self, values: torch.Tensor) -> None:
        weight, scales = int8(values.view(-1, self.unit))
        self._put(self._entries[0], self._done, _bytes(weight))
        first = self._done // self.unit
        self._scales[first : first + len(scales)] = scales
        self._done += weight.numel()

    def _end(self) -> None:
        _, scales, layout = self._entries
        self._put(scales, 0, _bytes(self._scales))
        self._put(layout, 0, np.zeros(1, np.uint8))  # row-major


class _Nf4(_Layer):
    """Blocks, and their scales as soon as all of them are known."""

    unit = BLOCK

    def __init__(self, step: Step, how: Quantized, put: Put, late: Late, scratch: _Scratch) -> None:
        super().__init__(step, how, put, late, scratch)
        self._done = self._blocks = 0
        self._map = scratch.map(4 * -(-step.elements // BLOCK))
        self._absmax = torch.frombuffer(self._map, dtype=torch.float32)
        self._code: Any = None

    def _quantize(self, values: torch.Tensor) -> None:
        packed, scales, self._code = nf4(values)
        self._put(self._entries[0], self._done, _bytes(packed))
        self._done += packed.numel()
        self._absmax[self._blocks : self._blocks + len(scales)] = scales
        self._blocks += len(scales)

    def _end(self) -> None:
        """As `quantize_4bit` does with compress_statistics, some scales at a time."""
        _, absmax, nested_absmax, nested_map, quant_map, quant_state = self._entries
        offset = self._absmax.mean()
        nested: list[Bytes] = []
        for start in range(0, len(self._absmax), CHUNK):
            scales, state = double_quantized(self._absmax[start : start + CHUNK], offset)
            self._put(absmax, start, _bytes(scales))
            nested.append(_bytes(state.absmax))
        stated = stored_state(self._step.shape, self._dtype, self._code, offset, state)
        self._put(nested_absmax, 0, np.concatenate(nested))
        self._put(nested_map, 0, _bytes(stated["nested_quant_map"]))
        self._put(quant_map, 0, _bytes(stated["quant_map"]))
        self._late(quant_state, _bytes(stated[STATE]).tobytes())


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
