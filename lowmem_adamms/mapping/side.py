"""One of the two checkpoints of a join, read by role."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..architectures.families import ARCHS
from ..architectures.layout import Arch, Block, Layout
from ..architectures.recognise import recognise
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.span import Span
from ..errors import FormatError
from .tied_head import is_tied

Piece = tuple[str, Block]
"""A tensor's name, and the block of its rows that holds (some rows of) a role."""


@dataclass(frozen=True, slots=True)
class Side:
    """A checkpoint with the roles that its tensors hold.

    blocks: the blocks of each decoder tensor. pieces: the other way round, where the rows of each
    role are, in their order. tied: whether the head is the embedding; None if nothing tells.
    """

    checkpoint: Checkpoint
    layout: Layout
    blocks: Mapping[str, Sequence[Block]]
    pieces: Mapping[str, Sequence[Piece]]
    tied: bool | None

    @property
    def path(self) -> Path:
        """The checkpoint's folder or file."""
        return self.checkpoint.path

    @property
    def tensors(self) -> Mapping[str, Span]:
        """Every tensor of the checkpoint."""
        return self.checkpoint.tensors

    def shape_of(self, role: str) -> tuple[int, ...]:
        """The shape of a role, all its pieces together."""
        pieces = self.pieces[role]
        name, _ = pieces[0]
        rows = sum(block.stop - block.start for _, block in pieces)
        shape = self.tensors[name].shape
        return (rows, *shape[1:]) if shape else ()

    def require_blendable(self, name: str) -> None:
        """Raise FormatError unless the tensor is of a dtype that can be blended."""
        dtype = self.tensors[name].dtype
        if not dtype.blendable:
            raise FormatError(f"{self.path}: {name} is {dtype.name}; expected BF16, F16 or F32")


def read_side(checkpoint: Checkpoint, declared: Sequence[Arch]) -> Side:
    """Recognise a checkpoint; MappingError if it has no decoder that is known."""
    layout = recognise(checkpoint, ARCHS, declared)
    return Side(
        checkpoint,
        layout,
        dict(_all_blocks(checkpoint, layout)),
        layout.pieces(),
        is_tied(checkpoint, layout),
    )


def _all_blocks(checkpoint: Checkpoint, layout: Layout) -> Iterator[tuple[str, Sequence[Block]]]:
    """The layout's blocks, and those of second names for the same bytes.

    In a .bin two names may share bytes, such as Phi-3-vision's second name of its embedding.
    """
    blocks_at = {checkpoint.tensors[name]: blocks for name, blocks in layout.blocks.items()}
    for name, span in checkpoint.tensors.items():
        if span in blocks_at:
            yield name, blocks_at[span]
