"""Elements of one or several spans in another order: a donor's experts in the base's layout.

One checkpoint stacks its experts in one tensor, another transposes them as well, a third has a
tensor for each. An `Arranged` stands where a span of the donor would, and says which elements of
which spans follow one another. What is needed of it is put together when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Any

from .coded import CodedSpan, view_span
from .dtypes import DTYPES, DType
from .span import Span

STRIPE = 16
"""Columns copied at a time: a transposed copy of this width stays in the processor's cache."""

BAND = 1 << 20
"""Elements that are computed at a time where they are in another order."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Some columns of a matrix, and the places in a file where their elements are.

    Element i of a row belongs to column `column + i * step` of the matrix. It lies `first + row *
    row_stride + i * stride` elements after the start of `span`, which is plain bytes (U8).
    """

    span: Span
    first: int
    row_stride: int
    stride: int
    count: int
    column: int = 0
    step: int = 1

    def cut(self, dtype: DType, rows: range, columns: range) -> Columns | None:
        """Those within some rows and columns, counted from their first; None if there are none.

        Its span is no longer than its elements need.
        """
        before = max(0, -(-(columns.start - self.column) // self.step))
        behind = min(self.count, -(-(columns.stop - self.column) // self.step))
        if before >= behind:
            return None
        count = behind - before
        first = self.first + rows.start * self.row_stride + before * self.stride
        length = (len(rows) - 1) * self.row_stride + (count - 1) * self.stride + 1
        start, nbytes = self.span.start + dtype.nbytes(first), dtype.nbytes(length)
        span = replace(self.span, start=start, stop=start + nbytes, shape=(nbytes,))
        column = self.column + before * self.step - columns.start
        return replace(self, span=span, first=0, count=count, column=column)


@dataclass(frozen=True, slots=True)
class Arranged:
    """A run of elements of a matrix of `rows` rows and `width` columns, row after row.

    Attributes:
        columns: Where the elements of each column are; every column is in one of them.
        names: The tensors these are in.
        first: The run's first element; `count` its length, None for all that follow.
    """

    dtype: DType
    rows: int
    width: int
    columns: tuple[Columns, ...]
    names: tuple[str, ...] = ()
    first: int = 0
    count: int | None = None

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.rows * self.width - self.first if self.count is None else self.count

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.dtype.nbytes(self.elements)

    @property
    def path(self) -> Path:
        """The first file that is read."""
        return self.columns[0].span.path

    @property
    def spans(self) -> tuple[Span, ...]:
        """What is read for any run of the matrix, each span once."""
        return tuple(dict.fromkeys(span for each in self.columns for span in each.span.spans))

    @property
    def is_first(self) -> bool:
        """Whether the run begins with the matrix."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """Whether the run ends with the matrix."""
        return self.first + self.elements == self.rows * self.width

    def flat_slice(self, first: int, count: int) -> Arranged:
        """`count` elements of it from element `first` on."""
        return replace(self, first=self.first + first, count=count)

    def cut(self, rows: range, columns: range) -> Arranged:
        """A rectangle of the matrix, of the fewest bytes that hold it."""
        cut = (each.cut(self.dtype, rows, columns) for each in self.columns)
        inside = tuple(each for each in cut if each)
        return Arranged(self.dtype, len(rows), len(columns), inside, self.names)

    def assemble(self, view: Callable[[Span], Any]) -> Any:
        """Its bytes, from those that `view` returns of each span: numpy arrays or torch tensors."""
        top, bottom = self.first // self.width, -(-(self.first + self.elements) // self.width)
        out: Any = None
        for whole in self.columns:
            for columns, rows in _split_coded(whole, self.dtype, range(top, bottom), self.width):
                content = view_span(whole.span, view, columns.span)
                source = _as_matrix(content, columns, self.dtype.itemsize, rows)
                if out is None:
                    out = _empty_like(source, bottom - top, self.width)
                _copy_columns(out, source, columns)
        start = self.dtype.nbytes(self.first - top * self.width)
        return _as_bytes(out)[start : start + self.nbytes]


def matrix_of(span: Span, width: int) -> Arranged:
    """A span as a matrix of `width` columns."""
    columns = Columns(as_bytes(span), 0, width, 1, width)
    return Arranged(span.dtype, span.elements // width, width, (columns,))


def take_alike(
    sides: Sequence[Span | Arranged], first: int, count: int
) -> tuple[Span | Arranged, ...]:
    """The same sample of several sides that have as many elements: `count` of them from `first` on.

    Where a side is arranged it is a square at that place, which may have fewer: so little of each
    file holds it, whatever the order of its elements.
    """
    arranged = next((side for side in sides if isinstance(side, Arranged)), None)
    if arranged is None:
        return tuple(side.flat_slice(first, count) for side in sides)
    height = min(arranged.rows, isqrt(count))
    width = min(arranged.width, count // height)
    row, column = divmod(first, arranged.width)
    row, column = min(row, arranged.rows - height), min(column, arranged.width - width)
    matrices = (
        side if isinstance(side, Arranged) else matrix_of(side, arranged.width) for side in sides
    )
    square = range(row, row + height), range(column, column + width)
    return tuple(matrix.cut(*square) for matrix in matrices)


def spans_begun(sides: Iterable[Span | Arranged]) -> list[Span]:
    """What must be read for a stretch of each side and for no stretch before it.

    What is arranged is read at once, with its first stretch.
    """
    begun = (side for side in sides if isinstance(side, Span) or side.is_first)
    return [span for side in begun for span in side.spans]


def spans_ended(sides: Iterable[Span | Arranged]) -> list[Span]:
    """What no stretch after this one needs."""
    ended = (side for side in sides if isinstance(side, Span) or side.is_last)
    return [span for side in ended for span in side.spans]


def view_side(side: Span | Arranged, view: Callable[[Span], Any]) -> Any:
    """The bytes of a stretch, put together where they are in another order."""
    return view_span(side, view) if isinstance(side, Span) else side.assemble(view)


def as_bytes(span: Span) -> Span:
    """The same bytes of a file, of no dtype."""
    return replace(span, dtype=DTYPES["U8"], shape=(span.nbytes,))


def _split_coded(
    columns: Columns, dtype: DType, rows: range, width: int
) -> Iterator[tuple[Columns, range]]:
    """Columns of which only some rows are wanted, and which rows of theirs these are.

    Where they must be computed they come in bands, so that no whole expert is in memory.
    """
    if not isinstance(columns.span, CodedSpan):
        yield columns, rows
        return
    count = max(1, BAND // columns.stride) * columns.step
    for start in range(columns.column, columns.column + columns.count * columns.step, count):
        band = columns.cut(dtype, rows, range(start, min(start + count, width)))
        if band:
            yield replace(band, column=band.column + start), range(len(rows))


def _as_matrix(content: Any, columns: Columns, itemsize: int, rows: range) -> Any:
    """Some rows of the columns, in place: of torch tensors a third dim of bytes."""
    import numpy as np

    first = (columns.first + rows.start * columns.row_stride) * itemsize
    shape = (len(rows), columns.count)
    strides = (columns.row_stride * itemsize, columns.stride * itemsize)
    if isinstance(content, np.ndarray):
        return np.ndarray(shape, f"u{itemsize}", content.data, first, strides)
    return content[first:].as_strided((*shape, itemsize), (*strides, 1))


def _empty_like(source: Any, rows: int, width: int) -> Any:
    import numpy as np

    if isinstance(source, np.ndarray):
        return np.empty((rows, width), source.dtype)
    return source.new_empty((rows, width, source.shape[2]))


def _copy_columns(out: Any, source: Any, columns: Columns) -> None:
    import numpy as np

    stripe = STRIPE if isinstance(source, np.ndarray) else columns.count
    for first in range(0, columns.count, stripe):
        last = min(first + stripe, columns.count)
        start, stop = (columns.column + i * columns.step for i in (first, last))
        out[:, start : stop : columns.step] = source[:, first:last]


def _as_bytes(matrix: Any) -> Any:
    import numpy as np

    return matrix.reshape(-1).view(np.uint8) if isinstance(matrix, np.ndarray) else matrix.view(-1)
