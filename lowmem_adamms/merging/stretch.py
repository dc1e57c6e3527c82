"""A stretch of one output tensor and what goes into it: the loop's unit of work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from ..checkpoints.arranged import Arranged
from ..checkpoints.span import Span
from ..mapping.plan import Step


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of one output tensor from byte `offset`, and the same elements of its sides."""

    step: Step
    offset: int
    nbytes: int
    sides: tuple[Span | Arranged, ...]

    @property
    def is_arranged(self) -> bool:
        """Whether a side is put together from several places."""
        return any(isinstance(side, Arranged) for side in self.sides)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Of its sides and of the output."""
        return (*(side.dtype.name for side in self.sides), self.step.dtype.name)

    @property
    def first(self) -> int:
        """Number of its first element in the tensor."""
        return self.offset // self.step.dtype.itemsize

    def cut(self, first: int, count: int) -> Self:
        """`count` elements of it from element `first` on."""
        itemsize = self.step.dtype.itemsize
        sides = tuple(side.flat_slice(first, count) for side in self.sides)
        offset = self.offset + first * itemsize
        return replace(self, offset=offset, nbytes=count * itemsize, sides=sides)


@dataclass(frozen=True, slots=True)
class Copy(Stretch):
    """What is taken verbatim: its side is one span of plain bytes, whatever their dtype."""

    @property
    def span(self) -> Span:
        """The bytes."""
        (span,) = self.sides
        assert isinstance(span, Span)
        return span


@dataclass(frozen=True, slots=True)
class Blend(Stretch):
    """What is blended of base and donor, or cast where it has the base alone.

    What is only cast has alpha 0: blended with itself at another it need not come out the same.
    """

    alpha: float

    @property
    def dtypes(self) -> tuple[str, str, str]:
        """Of base, donor and output."""
        return self.sides[0].dtype.name, self.sides[-1].dtype.name, self.step.dtype.name
