"""Spans whose numbers are computed while they are read: quantized weights, a LoRA adapter's.

A `CodedSpan` stands where a span would, and is cut like one. Its `start` and `stop` are bytes of
the tensor that comes out, which no file holds; `spans` are the bytes of the file that it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from .dtypes import DTYPES, DType
from .span import Span

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .mapped_files import Bytes

    Singles = npt.NDArray[np.float32]

TILE = 1 << 15
"""Elements that are decoded together, so that what is in between takes little memory."""
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of a 4-bit number; the highest of its bits is the sign."""
GROUP = 32
"""Numbers of 4 bits that have a scale in common."""
ROWS, COLUMNS = 64, 256
"""Of a tile of a product of two matrices."""


class Coding(Protocol):
    """How a tensor is computed, in whole rows of the matrix that it is read as."""

    @property
    def dtype(self) -> DType:
        """What comes out."""

    @property
    def width(self) -> int:
        """Elements of a row that comes out."""

    def stored(self, rows: range) -> tuple[Span, ...]:
        """What must be read to compute some rows."""

    def decode(self, contents: Sequence[Bytes], held: range, rows: range) -> npt.NDArray[Any]:
        """Compute `rows`, a matrix, from the contents of `stored(held)`, which has them."""


@dataclass(frozen=True, slots=True)
class CodedSpan(Span):
    """Bytes `start` to `stop` of a tensor that is computed."""

    coding: Coding

    @staticmethod
    def whole(source: Span, shape: tuple[int, ...], coding: Coding) -> CodedSpan:
        """A whole tensor; source: what is stored of it in the first place."""
        nbytes = coding.dtype.nbytes(prod(shape))
        return CodedSpan(source.path, coding.dtype, 0, nbytes, shape, coding)

    @property
    def spans(self) -> tuple[Span, ...]:
        """What is read."""
        return self.coding.stored(self.computed_rows)

    @property
    def computed_row_bytes(self) -> int:
        """Bytes of a row, as the coding counts rows."""
        return self.coding.dtype.nbytes(self.coding.width)

    @property
    def computed_rows(self) -> range:
        """The rows that it lies in."""
        nbytes = self.computed_row_bytes
        return range(self.start // nbytes, -(-self.stop // nbytes))


def view_span(span: Span, view: Callable[[Span], Any], piece: Span | None = None) -> Any:
    """The bytes of a span, or of a piece of it, from those that `view` returns of `span.spans`.

    What is computed is a new array, on the device where `view` returns torch tensors.
    """
    import numpy as np

    if not isinstance(span, CodedSpan):
        return view(span)
    piece = piece or span
    assert isinstance(piece, CodedSpan)
    contents = [view(each) for each in span.spans]
    on_host = [each if isinstance(each, np.ndarray) else each.cpu().numpy() for each in contents]
    rows = span.coding.decode(on_host, span.computed_rows, piece.computed_rows)
    first = piece.start - piece.computed_rows.start * piece.computed_row_bytes
    decoded = rows.reshape(-1).view(np.uint8)[first : first + piece.nbytes]
    return decoded if on_host[0] is contents[0] else contents[0].new_tensor(decoded)


@dataclass(frozen=True, slots=True)
class BlockScaled:
    """8-bit numbers, with a scale for each block of each matrix.

    Attributes:
        codes: [..., rows, columns] of an 8-bit float.
        scales: What each number of a block is multiplied by, a block after the other.
        grid: How many rows and columns of blocks a matrix has.
        block: How many rows and columns a block has; the last ones may have fewer.
    """

    codes: Span
    scales: Span
    grid: tuple[int, int]
    block: tuple[int, int]
    dtype: ClassVar[DType] = DTYPES["BF16"]  # as transformers dequantizes to

    @property
    def width(self) -> int:
        """Columns of a matrix."""
        return self.codes.shape[-1]

    def stored(self, rows: range) -> tuple[Span, ...]:
        """The rows, and all scales, which are few."""
        codes = self.codes.flat_slice(rows.start * self.width, len(rows) * self.width)
        return codes, self.scales

    def decode(self, contents: Sequence[Bytes], held: range, rows: range) -> npt.NDArray[Any]:
        """Multiply in float32 and round to bf16."""
        import numpy as np

        height, width = self.codes.shape[-2:]
        codes = contents[0].reshape(-1, width)
        scales = _read_scales(contents[1], self.scales.dtype.name).reshape(-1, self.grid[1])
        table = _fp8_values(self.codes.dtype.name)
        out = np.empty((len(rows), width), np.uint16)
        step = max(1, TILE // width)
        for top in range(rows.start, rows.stop, step):
            stop = min(top + step, rows.stop)
            values = table[codes[top - held.start : stop - held.start]]
            here = np.arange(top, stop)
            line = here // height * self.grid[0] + here % height // self.block[0]
            values *= np.repeat(scales[line], self.block[1], axis=1)[:, :width]
            out[top - rows.start : stop - rows.start] = _round_to_bf16(values)
        return out


@dataclass(frozen=True, slots=True)
class PackedFP4:
    """MXFP4 stacks of experts, which come out transposed, as gpt-oss has them when they are bf16.

    Attributes:
        blocks: [experts, rows, groups, 16]: two numbers a byte, the first in the lower bits.
        scales: [experts, rows, groups]: the exponent of each group's scale, plus 127.
    """

    blocks: Span
    scales: Span
    dtype: ClassVar[DType] = DTYPES["BF16"]  # which holds every such number

    @property
    def width(self) -> int:
        """Stored rows of an expert: each of its rows that comes out has a number of each."""
        return self.blocks.shape[1]

    def _experts(self, rows: range) -> range:
        height = self.blocks.shape[2] * GROUP
        return range(rows.start // height, -(-rows.stop // height))

    def stored(self, rows: range) -> tuple[Span, ...]:
        """Whole experts."""
        experts = self._experts(rows)
        ends = experts.start, experts.stop
        return self.blocks.rows(*ends), self.scales.rows(*ends)

    def decode(self, contents: Sequence[Bytes], held: range, rows: range) -> npt.NDArray[Any]:
        """Multiply, and turn the matrix, a few groups at a time."""
        import numpy as np

        _, width, groups, _ = self.blocks.shape
        before = self._experts(held).start
        blocks = contents[0].reshape(-1, width, groups, GROUP // 2)
        scales = contents[1].reshape(-1, width, groups)
        out = np.empty((len(rows), width), np.uint16)
        step = max(1, TILE // (width * GROUP))
        for expert in self._experts(rows):
            start = expert * groups * GROUP  # the expert's first row, as they come out
            low, high = max(rows.start - start, 0), min(rows.stop - start, groups * GROUP)
            for group in range(low // GROUP, -(-high // GROUP), step):
                columns = slice(group, min(group + step, -(-high // GROUP)))
                values = _unpack(
                    blocks[expert - before, :, columns], scales[expert - before, :, columns]
                )
                top, bottom = max(low, columns.start * GROUP), min(high, columns.stop * GROUP)
                here = values[:, top - columns.start * GROUP : bottom - columns.start * GROUP]
                out[start + top - rows.start : start + bottom - rows.start] = here.T
        return out


@dataclass(frozen=True, slots=True)
class LowRank:
    """A matrix plus a scaled product of two thin ones: what a LoRA adapter makes of it.

    Attributes:
        base: The matrix; None for zeros.
        left: [rows, rank]; `right`: [rank, columns].
        scale: What the product is multiplied by.
    """

    base: Span | None
    left: Span
    right: Span
    scale: float
    # Rounding the sum to bf16 here would lose most of a small product
    dtype: ClassVar[DType] = DTYPES["F32"]

    @property
    def width(self) -> int:
        """Columns of the matrix."""
        return self.right.shape[1]

    def onto(self, base: Span, rows: tuple[int, int]) -> CodedSpan:
        """The same product, some rows of it, added to a matrix."""
        coding = replace(self, base=base, left=self.left.rows(*rows))
        return CodedSpan.whole(self.left, base.shape, coding)

    def _tiles(self, rows: range) -> range:
        """The first rows of the tiles that hold these rows.

        Tiles lie where they lie, whatever is wanted: sums of another order differ in the last bit.
        """
        return range(rows.start // ROWS * ROWS, rows.stop, ROWS)

    def _slice_base(self, rows: range) -> Span | None:
        return self.base and self.base.flat_slice(rows.start * self.width, len(rows) * self.width)

    def stored(self, rows: range) -> tuple[Span, ...]:
        """Rows of the base and of the left factor, and all of the right one."""
        tiles, base = self._tiles(rows), self._slice_base(rows)
        left = self.left.rows(tiles.start, min(tiles.start + len(tiles) * ROWS, self.left.shape[0]))
        return (*(base.spans if base else ()), left, self.right)

    def decode(self, contents: Sequence[Bytes], held: range, rows: range) -> npt.NDArray[Any]:
        """Multiply and add in float64, round to float32."""
        import numpy as np

        first_tile, base = self._tiles(held).start, self._slice_base(held)
        left, right = (
            _as_bits(content, side).reshape(-1, side.shape[1])
            for content, side in zip(contents[-2:], (self.left, self.right), strict=True)
        )
        out = np.zeros((len(rows), self.width), np.float32)
        if base:
            content = view_span(base, dict(zip(base.spans, contents, strict=False)).__getitem__)
            old = _as_bits(content, base).reshape(-1, self.width)[rows.start - held.start :]
        for column in range(0, self.width, COLUMNS):
            columns = slice(column, column + COLUMNS)
            factor = _widen(right[:, columns], self.right)
            for tile in self._tiles(rows):
                top = tile - first_tile
                product = self.scale * (_widen(left[top : top + ROWS], self.left) @ factor)
                first, last = max(tile, rows.start), min(tile + ROWS, rows.stop)
                here = slice(first - rows.start, last - rows.start)
                product = product[first - tile : last - tile]
                out[here, columns] = _widen(old[here, columns], base) + product if base else product
        return out


def _unpack(blocks: Bytes, scales: Bytes) -> npt.NDArray[np.uint16]:
    """Rows of [rows, groups, 16] bytes as bf16."""
    import numpy as np

    values = np.empty((*blocks.shape, 2), np.float32)
    table = np.array([*FP4, *(-value for value in FP4)], np.float32)
    values[..., 0] = table[blocks & 15]
    values[..., 1] = table[blocks >> 4]
    values *= _exponent_values()[scales][..., None, None]
    return _round_to_bf16(values.reshape(len(blocks), -1))


# Numbers


@cache
def _fp8_values(name: str) -> Singles:
    """The value of each 8-bit number, of the formats E4M3 (without infinity) and E5M2."""
    import numpy as np

    codes = np.arange(256)
    if name == "F8_E5M2":  # the upper half of a float16
        return (codes << 8).astype(np.uint16).view(np.float16).astype(np.float32)
    exponent, fraction = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, np.ldexp(fraction, -9), np.ldexp(fraction + 8.0, exponent - 10))
    size[codes & 127 == 127] = np.nan
    values: Singles = np.where(codes < 128, size, -size).astype(np.float32)
    return values


@cache
def _exponent_values() -> Singles:
    """The value of each power of two in 8 bits, E8M0."""
    import numpy as np

    values: Singles = np.ldexp(np.float32(1), np.arange(-127, 129).clip(max=127)).astype(np.float32)
    values[255] = np.nan
    return values


def _read_scales(content: Bytes, dtype: str) -> Singles:
    import numpy as np

    from ..kernels import reference

    if dtype not in reference.STORAGE:
        return _exponent_values()[content]
    bits = content.view(reference.STORAGE[dtype])
    scales: Singles = reference.widen(bits, dtype).astype(np.float32)
    return scales


def _as_bits(content: Bytes, span: Span) -> Any:
    from ..kernels import reference

    return content.view(reference.STORAGE[span.dtype.name])


def _widen(bits: Any, span: Span) -> Any:
    from ..kernels import reference

    return reference.widen(bits, span.dtype.name)


def _round_to_bf16(values: Singles) -> npt.NDArray[np.uint16]:
    """To nearest, ties to even."""
    import numpy as np

    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)
