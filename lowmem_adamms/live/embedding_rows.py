"""An embedding of which only the rows exist that a forward pass asks for.

A pass needs a few hundred tokens of a vocabulary of 150,000. The rows are gathered and blended by
the one loop just before the embedding runs, as a small table that stands in for its weight.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..checkpoints.arranged import Arranged
from ..checkpoints.mapped_files import MappedFiles
from ..mapping.plan import Part, Step
from .device_source import torch_dtype

FillTable = Callable[[Step, torch.Tensor], None]
"""Writes a step's tensor into flat bytes."""


class SparseFiles(MappedFiles):
    """Mapped files of which only single rows are used: no block around them is read ahead."""

    def prefetch(self, span: Any) -> list[Callable[[], None]]:
        """Nothing: the pages come as they are touched."""
        return []


class EmbeddingRows:
    """Puts the rows that are asked for in the place of an embedding's weight.

    step: of the whole weight.
    """

    def __init__(self, module: Any, step: Step, fill: FillTable) -> None:
        self._step, self._fill = step, fill
        self._starts = [part.rows[0] for part in step.parts]
        self._like = module.weight.detach()
        module.padding_idx = None  # it matters to training alone, and may be beyond the table
        self._hook = module.register_forward_pre_hook(self._before_embedding)

    def close(self) -> None:
        """Leave the embedding alone."""
        self._hook.remove()

    def _before_embedding(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        rows, places = args[0].unique(return_inverse=True)
        module._parameters["weight"] = torch.nn.Parameter(
            self._table(rows.tolist()), requires_grad=False
        )
        return places, *args[1:]

    def _table(self, rows: Sequence[int]) -> torch.Tensor:
        width = self._step.shape[1]
        parts = tuple(self._part(row, place) for place, row in enumerate(rows))
        step = replace(self._step, shape=(len(rows), width), parts=parts)
        content = torch.empty(step.nbytes, dtype=torch.uint8, device=self._like.device)
        self._fill(step, content)
        return content.view(torch_dtype(step.dtype)).view(step.shape).to(self._like.dtype)

    def _part(self, row: int, place: int) -> Part:
        """The part of one row, as row `place` of the table."""
        if not 0 <= row < self._step.shape[0]:
            raise IndexError(f"token {row} of an embedding of {self._step.shape[0]} rows")
        part = self._step.parts[bisect_right(self._starts, row) - 1]
        first = row - part.rows[0]
        assert not isinstance(part.donor, Arranged), "those are of experts"
        donor = part.donor.rows(first, first + 1) if part.donor else None
        base = part.base.rows(first, first + 1)
        return replace(part, rows=(place, place + 1), base=base, donor=donor)
