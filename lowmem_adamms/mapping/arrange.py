"""How a tensor is blended whose elements the donor has in another order, such as stacked experts.

Always the donor is rearranged into the base's layout. Where both are laid out alike, nothing is:
the whole tensor is one part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from math import prod

from ..architectures.block import Block
from ..checkpoints.arranged import Arranged, Columns, as_bytes
from ..checkpoints.span import Span
from ..errors import MappingError
from .plan import Part
from .side import Piece, Side

Lent = Mapping[str, Sequence[Piece]]
"""For each role of the base the donor's pieces to blend in, in the order of its rows; or none."""


def arrange_parts(name: str, base: Side, donor: Side, lent: Lent) -> tuple[Part, ...]:
    """The parts of one tensor of the base.

    MappingError where the donor lacks some of the roles that lie interwoven in it.
    """
    span, blocks = base.tensors[name], base.blocks[name]
    if (twin := _find_twin(blocks, lent)) and donor.tensors[twin].shape == span.shape:
        rows = (0, span.elements // _Matrix.of(span, blocks[0]).width)
        return (Part(rows, _common_role(blocks), span, donor.tensors[twin], twin, rows),)
    parts: list[Part] = []
    for run in _runs(blocks):
        missing = [block.role for block in run if not lent[block.role]]
        if missing and len(missing) < len(run):
            raise MappingError(
                f"{base.path}: {name} holds {_common_role(run)} interwoven, of which {donor.path}"
                f" has no {missing[0]}; expected all of it or nothing"
            )
        if missing:
            parts.append(_keep(span, run))
        elif _is_alone(run[0]):
            parts += _lend_rows(span, run[0], lent[run[0].role], donor)
        else:
            parts.append(_lend_woven(span, run, lent, donor))
    return tuple(parts)


def _find_twin(blocks: Sequence[Block], lent: Lent) -> str | None:
    """The donor's tensor that holds the same roles in the same places, if one does."""
    names: set[str] = set()
    for block in blocks:
        pieces = lent[block.role]
        if len(pieces) != 1:
            return None
        piece = pieces[0][1]
        if (piece.start, piece.stop) != (block.start, block.stop):  # the quick way to tell
            return None
        if replace(piece, role=block.role) != block:
            return None
        names.add(pieces[0][0])
    return names.pop() if len(names) == 1 else None


def _is_alone(block: Block) -> bool:
    """Whether its bytes follow one another."""
    return not block.transposed and block.step == 1


def _runs(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """The blocks in the order of their bytes, those that lie interwoven together."""

    def place(block: Block) -> tuple[int, int]:
        return block.slab or 0, block.start if _is_alone(block) else -1

    for _, run in groupby(sorted(blocks, key=place), key=place):
        yield list(run)


def _common_role(blocks: Sequence[Block]) -> str:
    """The role of a lone block, else the leading parts that all have, with the stream of all."""
    names = [block.role.partition("@") for block in blocks]
    parts = [plain.split(".") for plain, _, _ in names]
    shared = takewhile(lambda same: len(set(same)) == 1, zip(*parts, strict=False))
    streams = {stream for _, _, stream in names}
    stream = streams.pop() if len(streams) == 1 else ""
    return ".".join(part for part, *_ in shared) + (f"@{stream}" if stream else "")


# Places


@dataclass(frozen=True, slots=True)
class _Matrix:
    """The matrix that a block is seen in: where in the tensor it begins, its rows and columns."""

    first: int
    rows: int
    width: int

    @staticmethod
    def of(span: Span, block: Block) -> _Matrix:
        rows, *columns = (span.shape or (1,)) if block.slab is None else span.shape[1:]
        width = prod(columns)
        return _Matrix((block.slab or 0) * rows * width, rows, width)


def _place_of(span: Span, run: Sequence[Block]) -> tuple[tuple[int, int], Span]:
    """The rows that a run takes, of all matrices one below the other, and its bytes."""
    matrix = _Matrix.of(span, run[0])
    start, stop = (run[0].start, run[0].stop) if _is_alone(run[0]) else (0, matrix.rows)
    if run[0].slab is None and stop - start == matrix.rows:
        return (start, stop), span
    first, rows = matrix.first + start * matrix.width, stop - start
    row = first // matrix.width if matrix.width else 0
    bytes_ = span.flat_slice(first, rows * matrix.width)
    return (row, row + rows), replace(bytes_, shape=(rows, *_column_shape(span, run[0])))


def _column_shape(span: Span, block: Block) -> tuple[int, ...]:
    """The dimensions of a tensor after those that its rows are counted in."""
    return span.shape[1:] if block.slab is None else span.shape[2:]


def _columns_of(span: Span, block: Block, column: int, step: int, *, turned: bool) -> Columns:
    """Where a block of the donor has its elements: its rows as rows, or `turned` as columns."""
    matrix = _Matrix.of(span, block)
    elements = matrix.rows * matrix.width
    whole = as_bytes(span.flat_slice(matrix.first, elements))
    if block.transposed:
        first, row_stride, stride, length = block.start, block.step, matrix.width, matrix.rows
    else:
        first, row_stride, stride = block.start * matrix.width, block.step * matrix.width, 1
        length = matrix.width
    if turned:
        return Columns(whole, first, stride, row_stride, block.rows, column, step)
    return Columns(whole, first, row_stride, stride, length, column, step)


# Parts


def _keep(span: Span, run: Sequence[Block]) -> Part:
    rows, mine = _place_of(span, run)
    return Part(rows, _common_role(run), mine)


def _lend_rows(span: Span, block: Block, pieces: Sequence[Piece], donor: Side) -> Iterator[Part]:
    """Blend rows that follow one another: one part for each piece of the donor that has some."""
    matrix = _Matrix.of(span, block)
    for name, piece in pieces:
        first, last = max(block.first, piece.first), min(block.last, piece.last)
        if first >= last:
            continue
        rows, mine = _place_of(span, [_cut(block, first, last)])
        lent = _cut(piece, first, last)
        whole = donor.tensors[name]
        if _is_alone(lent):
            donor_rows, theirs = _place_of(whole, [lent])
            yield Part(rows, block.role, mine, theirs, name, donor_rows)
            continue
        columns = _columns_of(whole, lent, 0, 1, turned=False)
        arranged = Arranged(whole.dtype, last - first, matrix.width, (columns,), (name,))
        yield Part(rows, block.role, mine, arranged, name)


def _cut(block: Block, first: int, last: int) -> Block:
    """What of a block holds the role's rows `first` to `last - 1`."""
    if (first, last) == (block.first, block.last):
        return block
    start = block.start + (first - block.first) * block.step
    return replace(block, start=start, stop=start + (last - first) * block.step, first=first)


def _lend_woven(span: Span, run: Sequence[Block], lent: Lent, donor: Side) -> Part:
    """Blend roles that lie interwoven in the base: one part, put together from donor pieces."""
    rows, mine = _place_of(span, run)
    matrix, step = _Matrix.of(span, run[0]), run[0].step
    names: dict[str, None] = {}
    found: list[Columns] = []
    for block in run:
        for name, piece in lent[block.role]:
            whole = donor.tensors[name]
            names[name] = None
            if block.transposed:
                column = block.start + piece.first * step
                found.append(_columns_of(whole, piece, column, step, turned=True))
            else:  # row i of each block, one after the other, make one row
                column = block.start * matrix.width
                found.append(_columns_of(whole, piece, column, 1, turned=False))
    size = (matrix.rows, matrix.width)
    if not run[0].transposed:
        size = (matrix.rows // step, matrix.width * step)
    first, *others = names
    dtype = donor.tensors[first].dtype
    for other in others:
        if donor.tensors[other].dtype != dtype:
            raise MappingError(
                f"{donor.path}: {first} is {dtype.name}, {other} {donor.tensors[other].dtype.name};"
                " expected one dtype of what the base holds in one tensor"
            )
    return Part(
        rows, _common_role(run), mine, Arranged(dtype, *size, tuple(found), tuple(names)), first
    )
