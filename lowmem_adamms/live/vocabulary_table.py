"""The weights of embedding and head, of which rows are blended only when they are used.

A pass looks up a few hundred of a vocabulary's 150,000 tokens. A head needs all rows, but not at
once: it takes them window by window through one buffer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
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

ALIGNED_ROWS = 64
"""More than the vectors of processors hold."""
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
        self._window: torch.Tensor | None = None

    def look_up(self, rows: Sequence[int]) -> torch.Tensor:
        """Some rows, in this order."""
        return self._blend([(row, row + 1) for row in rows], self._new_memory(len(rows)))

    def multiply(self, inputs: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """What `linear` gives with the whole weight."""
        rows = self.step.shape[0]
        if self._window is None:
            self._window = self._new_memory(min(rows, HEAD_WINDOW_ROWS))
        out = inputs.new_empty((*inputs.shape[:-1], rows))
        for first, stop in _cut_windows(rows):
            weight = self._blend([(first, stop)], self._window)
            part_of_bias = None if bias is None else bias[first:stop]
            out[..., first:stop] = functional.linear(inputs, weight, part_of_bias)
        return out

    def _new_memory(self, rows: int) -> torch.Tensor:
        nbytes = self.step.dtype.nbytes(rows * self.step.shape[1])
        return self._like.new_empty(nbytes, dtype=torch.uint8)

    def _blend(self, ranges: Iterable[tuple[int, int]], memory: torch.Tensor) -> torch.Tensor:
        """Ranges of rows, one after the other, in the first bytes of some memory."""
        parts: list[Part] = []
        rows = 0
        for first, stop in ranges:
            parts += self._cut(first, stop, rows)
            rows += stop - first
        step = replace(self.step, shape=(rows, self.step.shape[1]), parts=tuple(parts))
        content = memory[: step.nbytes]
        self._fill(step, content)
        return content.view(torch_dtype(step.dtype)).view(step.shape).to(self._like.dtype)

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


def _cut_windows(rows: int) -> Iterator[tuple[int, int]]:
    """First row of each window of a head, and the row behind its last.

    Libraries multiply the rows behind the last multiple of ALIGNED_ROWS in another way, and a small
    matrix as well. So windows begin at such multiples, and the last one is as large as the others:
    it overlaps the one before.
    """
    count = HEAD_WINDOW_ROWS - ALIGNED_ROWS
    last = max(0, (rows - count) // ALIGNED_ROWS * ALIGNED_ROWS)
    for first in range(0, last, count):
        yield first, first + count
    yield last, rows


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
        if function is torch.Tensor.__repr__:
            return f"VocabularyTable({tuple(args[0].shape)}, {args[0].dtype})"
        if function.__name__ == "__get__" or function.__name__ in _METADATA:
            return super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise TypeError(f"{function.__name__} of a weight of which only the rows in use are there")
