"""The output's shards before anything is written: which tensors each holds, and where they lie.

A tensor of the plan may become several entries (`quantized.py`), some of them late: known, and
their size with them, only after all before them. Leaves to others: writing (`sink.py`), the format
of a header (`header.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoints.dtypes import DType
from ..checkpoints.safetensors_header import build_header, parse_header
from ..mapping.plan import Plan, Step

METADATA = {"format": "pt"}  # transformers refuses a file without it


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of an output file. late: its bytes come at the shard's end, at most as many."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    late: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of it; for a late one, the most it can take."""
        return self.dtype.nbytes(math.prod(self.shape))


Split = Callable[[Step], Sequence[Entry]]
"""The entries that one step becomes; they stay together in one shard."""


@dataclass(frozen=True, slots=True)
class OutFile:
    """One output shard: its header, and where each tensor lies in it.

    offsets: in the file. starts: in the order of writing, header included, without late entries;
    what the journal counts in. ordered: both are the same, and nothing is late: the digest can
    follow the writing. Else `header` only holds the place of the final one, and `size` is the most.
    """

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size: int
    starts: Mapping[str, int]
    written: int
    ordered: bool = True
    entries: tuple[Entry, ...] = ()


def out_files(
    plan: Plan, max_shard_size: int | None = None, split: Split | None = None
) -> tuple[OutFile, ...]:
    """The output's shards: the base's own grouping, or greedily up to `max_shard_size` bytes."""
    groups: list[list[Entry]] = []
    names: list[str] = []
    room = 0
    for step in plan.steps:
        entries = split(step) if split else (Entry(step.name, step.dtype, step.shape),)
        nbytes = sum(entry.nbytes for entry in entries)
        shard = step.parts[0].base.path.name
        if max_shard_size is None:
            fresh = not names or names[-1] != shard
        else:
            fresh = not groups or nbytes > room
        if fresh:
            groups.append([])
            names.append(shard)
            room = max_shard_size or 0
        groups[-1] += entries
        room -= nbytes
    keep = max_shard_size is None and all(re.fullmatch(r"model.*\.safetensors", n) for n in names)
    if len(groups) == 1:
        names = ["model.safetensors"]
    elif not keep:
        total = len(groups)
        names = [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    lay = _as_safetensors_does if split else _in_order
    return tuple(lay(name, group) for name, group in zip(names, groups, strict=True))


def _in_order(name: str, entries: Sequence[Entry]) -> OutFile:
    """Tensors one after the other, as they are written."""
    head = emit_header(entries)
    offsets, size = positions(entries, len(head))
    parse_header(head[8:], size)
    return OutFile(name, head, offsets, size, offsets, size)


def _as_safetensors_does(name: str, entries: Sequence[Entry]) -> OutFile:
    """The widest dtypes first, so that every tensor is aligned, and what is late at the end."""
    laid = sorted(entries, key=lambda entry: (entry.late, -entry.dtype.bits))
    head = emit_header(laid)
    offsets, size = positions(laid, len(head))
    starts, written = positions([entry for entry in entries if not entry.late], len(head))
    return OutFile(name, head, offsets, size, starts, written, ordered=False, entries=tuple(laid))


def emit_header(entries: Sequence[Entry], room: int = 0) -> bytes:
    """The header of a file that holds these, of `room` bytes at least."""
    tensors = [(entry.name, entry.dtype, entry.shape) for entry in entries]
    return build_header(tensors, METADATA, min_bytes=room)


def positions(entries: Sequence[Entry], position: int) -> tuple[dict[str, int], int]:
    """Where each entry starts if the first does at `position`, and where the last ends."""
    offsets: dict[str, int] = {}
    for entry in entries:
        offsets[entry.name] = position
        position += entry.nbytes
    return offsets, position
