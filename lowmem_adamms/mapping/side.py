"""One of the two checkpoints of a join, read by role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..architectures.arch import Arch
from ..architectures.block import Block
from ..architectures.families import ARCHS
from ..architectures.layout import Layout
from ..architectures.recognise import recognise
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.coded import CodedSpan, LowRank
from ..checkpoints.span import Span
from ..errors import FormatError, MappingError
from .tied_head import is_tied

Piece = tuple[str, Block]
"""A tensor's name, and the block in it that holds (some rows of) a role."""


@dataclass(frozen=True, slots=True)
class Side:
    """A checkpoint with the roles that its tensors hold.

    blocks: what each decoder tensor holds, in the order of its rows. pieces: the other way round,
    where the rows of each role are, in their order; a tied side has no head among them. tied:
    whether its head is its embedding, None if nothing tells.
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

    @property
    def tied_heads(self) -> list[str]:
        """The tensors that hold a head which is a copy of the embedding.

        They are not written: transformers refuses to tie a head that differs from the embedding.
        """
        heads = [name for name, blocks in self.blocks.items() if blocks[0].role == "head"]
        return heads if self.tied else []

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one token's row in the embedding: the decoder's width."""
        return self.shape_of("embed")[1:]

    def rows_of(self, role: str) -> int:
        """How many rows a role has, in all its pieces."""
        return sum(block.rows for _, block in self.pieces[role])

    def shape_of(self, role: str) -> tuple[int, ...]:
        """The shape of a role, all its pieces together."""
        name, block = self.pieces[role][0]
        shape = block.shape_in(self.tensors[name].shape)
        return (self.rows_of(role), *shape[1:]) if shape else ()

    def lend(self, name: str, rows: tuple[int, int], base: Span) -> Span:
        """Some rows of a tensor, to be blended into a span of the base."""
        span = self.tensors[name]
        if isinstance(span, CodedSpan) and isinstance(span.coding, LowRank):
            return span.coding.onto(base, rows)
        return span.rows(*rows)

    def require_blendable(self, name: str) -> None:
        """Raise FormatError unless a tensor's dtype can be blended."""
        dtype = self.tensors[name].dtype
        if not dtype.blendable:
            raise FormatError(f"{self.path}: {name} is {dtype.name}; expected BF16, F16 or F32")


def read_side(checkpoint: Checkpoint, declared: Sequence[Arch]) -> Side:
    """Recognise a checkpoint; MappingError if it has no decoder that is known."""
    if checkpoint.is_adapter:
        raise MappingError(
            f"{checkpoint.path}: a LoRA adapter, expected a model; give the model as the base and"
            " the adapter as a donor"
        )
    layout = recognise(checkpoint, ARCHS, declared)
    tied = is_tied(checkpoint, layout)
    # In a .bin two names may share bytes, such as Phi-3-vision's second name of its embedding
    blocks_at = {checkpoint.tensors[name]: blocks for name, blocks in layout.blocks.items()}
    blocks = {
        name: blocks_at[span] for name, span in checkpoint.tensors.items() if span in blocks_at
    }
    pieces = layout.pieces()
    _check_held_once(checkpoint, pieces)
    if tied:
        pieces.pop("head", None)
    return Side(checkpoint, layout, blocks, pieces, tied)


def _check_held_once(checkpoint: Checkpoint, pieces: Mapping[str, Sequence[Piece]]) -> None:
    """MappingError where two tensors hold the same rows of a role: a declaration names both."""
    for role, held in pieces.items():
        if len(held) > 1 and len({block.first for _, block in held}) < len(held):
            first, second, *_ = (name for name, _ in held)
            raise MappingError(f"{checkpoint.path}: both {first} and {second} hold {role}")
