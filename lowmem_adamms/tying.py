"""Whether a checkpoint's head is its embedding: config.json's word, held against the bytes.

Of a config that ties what differs on disk transformers (5, `tie_weights`) keeps both, and so must a
merge. Reads a few blocks, and only where config.json ties a head that is there all the same.
"""

from __future__ import annotations

from pathlib import Path

from .arch import Layout, span_of
from .checkpoint import Checkpoint, Span

_BLOCKS = 8
_BLOCK_BYTES = 4096


def is_tied(checkpoint: Checkpoint, layout: Layout) -> bool | None:
    """Whether head and embedding are one; None if nothing tells.

    Without a head on disk any level of the config may say so; with one only the outermost, as it
    depends on the class whether transformers heeds the others.
    """
    roles, ties = layout.roles(), checkpoint.ties
    if "head" not in roles or not ties:
        return checkpoint.tied
    if not ties[0]:
        return False
    head, embed = (span_of(checkpoint, *roles[role]) for role in ("head", "embed"))
    return (head.shape, head.dtype) == (embed.shape, embed.dtype) and all(
        _read(checkpoint, head.path, head.start + at, size)
        == _read(checkpoint, embed.path, embed.start + at, size)
        for at, size in _blocks(head)
    )


def _blocks(span: Span) -> list[tuple[int, int]]:
    """Where evenly spread blocks of a span start, the first and the last included; their size."""
    size = min(span.nbytes, _BLOCK_BYTES)
    return [((span.nbytes - size) * i // (_BLOCKS - 1), size) for i in range(_BLOCKS)]


def _read(checkpoint: Checkpoint, path: Path, start: int, nbytes: int) -> bytes:
    if remote := checkpoint.remote().get(path):
        return remote.read(start, start + nbytes)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        return file.read(nbytes)
