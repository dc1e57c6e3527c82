"""The weights of embedding and head, of which rows are blended only when they are used.

A pass looks up a few hundred of a vocabulary's 150,000 tokens. A head needs all rows, but not at
once: it takes them window by window through one buffer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

from ..checkpoints.arranged import Arranged
from ..checkpoints.mapped_files import MappedFiles
from ..mapping.plan import Part, Step
from .device_source import torch_dtype
from .model_size import HEAD_WINDOW_ROWS

FillBytes = Callable[[Step, torch.Tensor], None]
"""Writes a step's tensor into flat bytes."""

READ_AHEAD_BYTES = 1 << 20
"""Spans from this size on are read ahead."""
_METADATA = {"detach", "dim", "element_size", "is_floating_point", "numel", "size"}
"""Methods of a tensor that do without its numbers."""


class RowFiles(MappedFiles):
    """Mapped files of which single rows are used: no block is read ahead for one of these."""

    def prefetch(self, span: Any) -> list[Callable[[], None]]:
        """As for other files, if a span is large; the pages of others come as they are touched."""
        return super().prefetch(span) if span.nbytes >= READ_AHEAD_BYTES else []


class RowBlender:
    """Blends rows of a weight. step: of all rows. like: a tensor of its dtype, on its device."""

    def __init__(self, step: Step, like: torch.Tensor, fill: FillBytes) -> None:
        self.step = step
        self._like = like.new_empty(0)
        self._fill = fill
        self._starts = [part.rows[0] for part in step.parts]
        self._window_rows = min(HEAD_WINDOW_ROWS, step.shape[0])
        self._window: torch.Tensor | None = None

    def look_up(self, rows: Sequence[int]) -> torch.Tensor:
        """Some rows, in this order."""
        parts = [part for place, row in enumerate(rows) for part in self._cut(row, row + 1, place)]
        memory = self._like.new_empty(self._nbytes(len(rows)), dtype=torch.uint8)
        return self._blend(parts, len(rows), memory)

    def multiply(self, inputs: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """What `linear` gives with the whole weight."""
        rows, count = self.step.shape[0], self._window_rows
        if self._window is None:
            self._window = self._like.new_empty(self._nbytes(count), dtype=torch.uint8)
        out = inputs.new_empty((*inputs.shape[:-1], rows))
        # The last window overlaps: a smaller product may be summed in another order
        for first in (*range(0, rows - count, count), rows - count):
            weight = self._blend(list(self._cut(first, first + count, 0)), count, self._window)
            window = slice(first, first + count)
            part_of_bias = None if bias is None else bias[window]
            out[..., window] = functional.linear(inputs, weight, part_of_bias)
        return out

    def _nbytes(self, rows: int) -> int:
        return self.step.dtype.nbytes(rows * self.step.shape[1])

    def _blend(self, parts: Sequence[Part], rows: int, memory: torch.Tensor) -> torch.Tensor:
        step = replace(self.step, shape=(rows, self.step.shape[1]), parts=tuple(parts))
        self._fill(step, memory)
        return memory.view(torch_dtype(step.dtype)).view(step.shape).to(self._like.dtype)

    def _cut(self, first: int, stop: int, place: int) -> Iterator[Part]:
        """The parts of a range of rows, which come at row `place` of what is blended."""
        if not 0 <= first < stop <= self.step.shape[0]:
            raise IndexError(f"token {first} of an embedding of {self.step.shape[0]} rows")
        for part in self.step.parts[bisect_right(self._starts, first) - 1 :]:
            begin, end = max(first, part.rows[0]), min(stop, part.rows[1])
            if begin >= end:
                return
            assert not isinstance(part.donor, Arranged), "those are of experts"
            inside = begin - part.rows[0], end - part.rows[0]
            yield replace(
                part,
                rows=(place + begin - first, place + end - first),
                base=part.base.rows(*inside),
                donor=part.donor.rows(*inside) if part.donor else None,
            )


class VocabularyTable(torch.Tensor):
    """Stands for a weight with a row for each token: its shape, dtype and device without memory.

    It can be looked up in, as `embedding` does, and multiplied with, as `linear` does. Anything
    else that needs its numbers raises TypeError.
    """

    blender: RowBlender

    @staticmethod
    def replacing(weight: torch.Tensor, blender: RowBlender) -> VocabularyTable:
        """The table in the place of a weight."""
        memory = weight.detach().new_zeros(1).expand(weight.shape)
        table: VocabularyTable = memory.as_subclass(VocabularyTable)
        table.blender = blender
        return table

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What torch calls instead of its own function."""
        if function is functional.embedding:
            rows, places = args[0].unique(return_inverse=True)
            return functional.embedding(places, args[1].blender.look_up(rows.tolist()))
        if function is functional.linear:
            return args[1].blender.multiply(args[0], *args[2:], **(kwargs or {}))
        if function is torch.Tensor.__getitem__ and isinstance(args[1], int | tuple):
            row, *columns = args[1] if isinstance(args[1], tuple) else (args[1],)
            return args[0].blender.look_up([row])[(0, *columns)]
        if function.__name__ == "__get__" or function.__name__ in _METADATA:
            return super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise TypeError(f"{function.__name__} of a weight of which only the rows in use are there")
