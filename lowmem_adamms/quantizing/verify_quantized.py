"""`verify --deep` of tensors that bitsandbytes quantized: sampled rows, quantized once more.

Blended with the numpy reference, then quantized by bitsandbytes on the CPU, as the output was. The
one number taken as it is stored is the mean around which NF4's scales are quantized: to know it,
the whole tensor would have to be blended. Leaves to others: the blend (`verify.py`).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.dtypes import DTYPES
from ..checkpoints.sampled_reads import SampledReader
from ..errors import FormatError
from ..live.device_source import torch_dtype
from ..mapping.plan import Plan, Step
from ..merging.shard_layout import Entry
from .quantization import BLOCK, NESTED, STATE, Quantized
from .quantizing_sink import double_quantized, int8, nf4, stored_state

SAMPLES = 4
"""Places of each tensor that are quantized again: the first, the last, and some between."""

STRETCH = 4096
"""Elements compared at each place of a tensor that was only cast."""

Blend = Callable[[int, int], bytes]
"""The bytes of `count` elements from element `first`, before they were quantized."""


class Check:
    """The check of one output. `how` is as the output shows it; `notes` what could not be checked.

    paper: of adamms.json. FormatError where other tensors are quantized than it says.
    """

    def __init__(
        self,
        out: Path,
        checkpoint: Checkpoint,
        plan: Plan,
        paper: dict[str, Any],
        reads: SampledReader,
    ) -> None:
        self._tensors, self._paper, self._reads = checkpoint.tensors, paper, reads
        names = {
            step.name
            for step in plan.steps
            if len(step.shape) == 2 and _mark(step.name, paper["method"]) in checkpoint.tensors
        }
        if len(names) != paper["tensors"]:
            raise FormatError(
                f"{out}: {len(names)} tensors are quantized, adamms.json says {paper['tensors']}"
            )
        casts = {
            step.name: span.dtype
            for step in plan.steps
            if step.name not in names and (span := checkpoint.tensors.get(step.name))
            if span.dtype != step.dtype and span.dtype.blendable and step.dtype.blendable
        }
        self.how = Quantized(paper["method"], DTYPES[paper["dtype"]], frozenset(names), casts, {})
        self._able = importlib.util.find_spec("bitsandbytes") is not None
        self.notes = (
            ()
            if self._able
            else (
                "bitsandbytes is not installed: of quantized tensors only names, shapes and digests"
                " were checked",
            )
        )

    def handles(self, step: Step) -> bool:
        """Whether the step is not in the output as it was merged."""
        return step.name in self.how.names or step.name in self.how.casts

    def rows(self, step: Step, blend: Blend) -> int:
        """Check one step that it handles; returns how many stretches were compared."""
        for entry in self.how.entries(step):
            self._check_shape(entry)
        if step.name in self.how.casts:
            return self._cast(step, blend)
        if not self._able:
            return 0
        check = self._nf4 if self.how.method == "nf4" else self._int8
        return check(step, blend)

    def _check_shape(self, entry: Entry) -> None:
        span = self._tensors[entry.name]
        shape = (span.nbytes,) if entry.late and span.nbytes <= entry.nbytes else entry.shape
        if span.dtype != entry.dtype or span.shape != shape:
            raise FormatError(
                f"{span.path}: {entry.name} is {span.dtype.name} {list(span.shape)},"
                f" expected {entry.dtype.name} {list(entry.shape)}"
            )

    def _cast(self, step: Step, blend: Blend) -> int:
        (entry,) = self.how.entries(step)
        places = _places(step.elements, STRETCH)
        for first, count in places:
            values = self._values(step, blend, first, count)
            self._same(entry, first, values.to(torch_dtype(entry.dtype)))
        return len(places)

    def _nf4(self, step: Step, blend: Blend) -> int:
        weight, absmax, nested_absmax, nested_map, quant_map, state = self.how.entries(step)
        offset = torch.tensor(self._offset(state), dtype=torch.float32)
        places = _places(step.elements, BLOCK * NESTED)
        for first, count in places:
            packed, scales, code = nf4(self._values(step, blend, first, count))
            codes, nested = double_quantized(scales, offset)
            self._same(weight, first // 2, packed)
            self._same(absmax, first // BLOCK, codes)
            self._same(nested_absmax, first // BLOCK // NESTED, nested.absmax)
        dtype = torch_dtype(self.how.dtype)
        stored = stored_state(step.shape, dtype, code, offset, nested)
        self._same(nested_map, 0, stored["nested_quant_map"])
        self._same(quant_map, 0, stored["quant_map"])
        self._same(state, 0, stored[STATE])
        return len(places)

    def _int8(self, step: Step, blend: Blend) -> int:
        weight, scales, layout = self.how.entries(step)
        width = step.shape[1]
        places = _places(step.elements, width)
        for first, count in places:
            codes, found = int8(self._values(step, blend, first, count).view(-1, width))
            self._same(weight, first, codes)
            self._same(scales, first // width, found)
        self._same(layout, 0, torch.zeros(1, dtype=torch.uint8))
        return len(places)

    def _values(self, step: Step, blend: Blend, first: int, count: int) -> torch.Tensor:
        """Blended elements in the dtype from which they were quantized."""
        raw = bytearray(blend(first, count))
        values = torch.frombuffer(raw, dtype=torch_dtype(step.dtype))
        return values if step.name in self.how.casts else values.to(torch_dtype(self.how.dtype))

    def _offset(self, state: Entry) -> float:
        """The mean of the scales, as the output states it."""
        span = self._tensors[state.name]
        try:
            return float(json.loads(self._reads.read_bytes(span))["nested_offset"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise FormatError(
                f"{span.path}: {state.name} is not a quant state of bitsandbytes"
            ) from None

    def _same(self, entry: Entry, first: int, expected: torch.Tensor) -> None:
        """Compare elements from `first` on, bit for bit."""
        span = self._tensors[entry.name]
        wanted = expected.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        if self._reads.read_bytes(span.flat_slice(first, expected.numel())) != wanted:
            now, then = version("bitsandbytes"), self._paper["bitsandbytes"]
            other = f" (made with bitsandbytes {then}, this is {now})" if now != then else ""
            raise FormatError(f"{span.path}: {entry.name} differs from its recipe{other}")


def _mark(name: str, method: str) -> str:
    """The tensor that lies beside a quantized weight and beside no other."""
    return f"{name}.{STATE}" if method == "nf4" else f"{name.removesuffix('weight')}SCB"


def _places(elements: int, unit: int) -> list[tuple[int, int]]:
    """First element and count of the sampled units; the last unit of a tensor may be short."""
    units = -(-elements // unit)
    chosen = sorted({(units - 1) * i // (SAMPLES - 1) for i in range(SAMPLES)})
    return [(unit * i, min(unit, elements - unit * i)) for i in chosen]
