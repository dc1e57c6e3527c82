"""Whether a checkpoint's head is its embedding: what config.json says, checked against the data.

Where config.json ties two tensors that differ on disk, transformers 5 (`tie_weights`) keeps both,
and so must a merge. Data is read only where config.json ties a head that is on disk all the same.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..architectures.layout import Layout
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.sampled_reads import SampledReader, evenly_spread
from ..checkpoints.span import Span

SAMPLES = 8
SAMPLE_ELEMENTS = 2048


def is_tied(checkpoint: Checkpoint, layout: Layout) -> bool | None:
    """Whether head and embedding are one tensor; None if nothing tells.

    Without a head on disk any level of the config may say so. With one, only the outermost level
    counts: whether transformers heeds the others depends on the class.
    """
    head, ties = layout.head, checkpoint.tied_flags
    if head is None or not ties:
        return checkpoint.tied
    if not ties[0]:
        return False
    tensors = checkpoint.tensors
    return _look_equal(checkpoint, tensors[head], tensors[layout.embedding])


def describe_ties(checkpoint: Checkpoint, layout: Layout, tied: bool | None) -> Iterator[str]:
    """Notes on a config that does not agree with the tensors, given what `is_tied` found."""
    if checkpoint.tied_flags[:1] == [True] and not tied:
        yield (
            f"{checkpoint.path}: config.json ties the head to the embedding, but the two differ on"
            " disk: taken for two, as transformers does"
        )
    if tied is False and layout.head is None:
        yield (
            f"{checkpoint.path}: holds no head; if its embedding is one, say"
            " tie_word_embeddings: true in its config.json"
        )


def _look_equal(checkpoint: Checkpoint, head: Span, embedding: Span) -> bool:
    """Compare samples of two tensors, evenly spread, their first and last elements included."""
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return False
    count = min(head.elements, SAMPLE_ELEMENTS)
    with SampledReader(checkpoint.remote_files()) as reads:
        return all(
            reads.read_bytes(head.flat_slice(first, count))
            == reads.read_bytes(embedding.flat_slice(first, count))
            for first in evenly_spread(head.elements, count, SAMPLES)
        )
