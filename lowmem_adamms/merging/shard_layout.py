"""The output's shards before anything is written: which tensors each holds, and where they lie."""

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
    """One tensor of an output file.

    quant_state: it is bitsandbytes' note, in JSON, of how a tensor was quantized. Its size is known
    only once that is done, so it lies at the end of its shard; `shape` is the most it can take.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    quant_state: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor; of a quant state, the most that it can take."""
        return self.dtype.nbytes(math.prod(self.shape))


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """One output shard: its header, and where each tensor lies in it.

    offsets: position of each tensor in the file. starts: how many bytes are written before each
    tensor, in the order of writing, header included and quant states excluded; the journal counts
    in these. written: as many bytes when all is written.
    in_order: tensors are written in the order of the file, and there are no quant states. If not,
    `header` only reserves the place of the final one, and `size` is the most the file can take.
    """

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size: int
    starts: Mapping[str, int]
    written: int
    in_order: bool
    entries: tuple[Entry, ...]


def lay_out_shards(
    plan: Plan,
    max_shard_size: int | None = None,
    entries_of: Callable[[Step], Sequence[Entry]] | None = None,
) -> tuple[ShardLayout, ...]:
    """The output's shards: the base's own grouping, or greedily up to `max_shard_size` bytes.

    entries_of: the tensors that a step becomes where the output is quantized. They stay together.
    """
    groups: list[list[Entry]] = []
    base_names: list[str] = []
    free_bytes = 0
    for step in plan.steps:
        whole = Entry(step.name, step.dtype, step.shape)
        entries = entries_of(step) if entries_of else (whole,)
        nbytes = sum(entry.nbytes for entry in entries)
        base_name = step.parts[0].base.path.name
        if max_shard_size is None:
            starts_shard = not base_names or base_names[-1] != base_name
        else:
            starts_shard = not groups or nbytes > free_bytes
        if starts_shard:
            groups.append([])
            base_names.append(base_name)
            free_bytes = max_shard_size or 0
        groups[-1] += entries
        free_bytes -= nbytes
    names = _shard_names(base_names, keep=max_shard_size is None)
    lay_out = _lay_out_aligned if entries_of else _lay_out_in_order
    return tuple(lay_out(name, group) for name, group in zip(names, groups, strict=True))


def _shard_names(base_names: Sequence[str], *, keep: bool) -> Sequence[str]:
    """Names for the output's shards. keep: those of the base's, where transformers knows them."""
    count = len(base_names)
    if count == 1:
        return ["model.safetensors"]
    if keep and all(re.fullmatch(r"model.*\.safetensors", name) for name in base_names):
        return base_names
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def _lay_out_in_order(name: str, entries: Sequence[Entry]) -> ShardLayout:
    """Tensors one after the other, as they are written."""
    head = emit_header(entries)
    offsets, size = place_entries(entries, len(head))
    parse_header(head[8:], size)
    return ShardLayout(name, head, offsets, size, offsets, size, True, tuple(entries))


def _lay_out_aligned(name: str, entries: Sequence[Entry]) -> ShardLayout:
    """The widest dtypes first, so that every tensor is aligned, and quant states at the end."""
    by_width = sorted(entries, key=lambda entry: (entry.quant_state, -entry.dtype.bits))
    head = emit_header(by_width)
    offsets, size = place_entries(by_width, len(head))
    streamed = [entry for entry in entries if not entry.quant_state]
    starts, written = place_entries(streamed, len(head))
    return ShardLayout(name, head, offsets, size, starts, written, False, tuple(by_width))


def emit_header(entries: Sequence[Entry], min_bytes: int = 0) -> bytes:
    """The header of a file that holds these tensors, padded to `min_bytes`."""
    tensors = [(entry.name, entry.dtype, entry.shape) for entry in entries]
    return build_header(tensors, METADATA, min_bytes=min_bytes)


def place_entries(entries: Sequence[Entry], position: int) -> tuple[dict[str, int], int]:
    """Where each tensor starts if the first does at `position`, and where the last ends."""
    offsets: dict[str, int] = {}
    for entry in entries:
        offsets[entry.name] = position
        position += entry.nbytes
    return offsets, position
