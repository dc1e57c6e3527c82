"""Which part of a tensor holds a role."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of a role in a tensor: its rows from `first` on.

    The tensor is seen as a matrix with its first dimension as rows; where experts are stacked, it
    is the matrix at index `slab` of the tensor. Of that matrix, or of its transpose, rows `start`
    to `stop` hold the role, every `step`th of them.
    """

    role: str
    start: int
    stop: int
    first: int = 0
    slab: int | None = None
    transposed: bool = False
    step: int = 1

    @property
    def rows(self) -> int:
        """How many rows of the role it holds."""
        return -(-(self.stop - self.start) // self.step)

    @property
    def last(self) -> int:
        """The row of `role` after the block's last one."""
        return self.first + self.rows

    @property
    def is_plain(self) -> bool:
        """Whether it is rows of the tensor that follow one another."""
        return self.slab is None and not self.transposed and self.step == 1

    def shape_in(self, tensor: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of its rows in a tensor of this shape; () for a scalar."""
        matrix = tensor if self.slab is None else tensor[1:]
        if self.transposed:
            matrix = matrix[::-1]
        return (self.rows, *matrix[1:]) if matrix else ()
