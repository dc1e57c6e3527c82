"""Whether a checkpoint's head is its embedding: config.json's word, held against the bytes.

Of a config that ties what differs on disk transformers (5, `tie_weights`) keeps both, and so must a
merge. Reads a few stretches, and only where config.json ties a head that is there all the same.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..architectures.layout import Layout, block_span
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.sampled_reads import SampledReader
from ..checkpoints.span import Span

_STRETCHES, _STRETCH = 8, 2048  # elements


def is_tied(checkpoint: Checkpoint, layout: Layout) -> bool | None:
    """Whether head and embedding are one; None if nothing tells.

    Without a head on disk any level of the config may say so; with one only the outermost, as it
    depends on the class whether transformers heeds the others.
    """
    roles, ties = layout.roles(), checkpoint.tied_flags
    if "head" not in roles or not ties:
        return checkpoint.tied
    if not ties[0]:
        return False
    head, embed = (block_span(checkpoint, *roles[role]) for role in ("head", "embed"))
    if (head.shape, head.dtype) != (embed.shape, embed.dtype):
        return False
    with SampledReader(checkpoint.remote_files()) as reads:
        return all(
            reads.read_bytes(one) == reads.read_bytes(other)
            for one, other in _stretches(head, embed)
        )


def _stretches(head: Span, embed: Span) -> Iterator[tuple[Span, Span]]:
    """A few elements of both, evenly spread, the first and the last included."""
    count = min(head.elements, _STRETCH)
    for i in range(_STRETCHES):
        first = (head.elements - count) * i // (_STRETCHES - 1)
        yield head.flat_slice(first, count), embed.flat_slice(first, count)
