"""A span: a run of bytes in a file, and the tensor it stands for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .dtypes import DType


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes `start` to `stop` of a file, and dtype and shape of the tensor they hold."""

    path: Path
    dtype: DType
    start: int
    stop: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.stop - self.start

    @property
    def spans(self) -> tuple[Span, ...]:
        """What is read: itself. An `Arranged` is read from several."""
        return (self,)

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.nbytes * 8 // self.dtype.bits

    @property
    def row_bytes(self) -> int:
        """Bytes of one index along dim 0 (of the whole, for a scalar or an empty tensor)."""
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes

    def rows(self, start: int, stop: int) -> Span:
        """The part of it between two indices along dim 0; a scalar as it is."""
        if not self.shape or (start, stop) == (0, self.shape[0]):
            return self
        return replace(
            self,
            start=self.start + start * self.row_bytes,
            stop=self.start + stop * self.row_bytes,
            shape=(stop - start, *self.shape[1:]),
        )

    def flat_slice(self, first: int, count: int) -> Span:
        """`count` elements of it from element `first` on, as one dimension."""
        start = self.start + first * self.dtype.bits // 8
        return replace(self, start=start, stop=start + self.dtype.nbytes(count), shape=(count,))
