"""Check that the parameters which transformers loaded are those of the base's files.

This proves that tensors on disk were matched to the right parameters, and finds a checkpoint that
lacks some.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..checkpoints.mapped_files import MappedFiles
from ..checkpoints.span import Span
from ..errors import FormatError
from ..mapping.plan import Plan
from .conversions import Pieces, TensorGroup
from .device_source import as_tensor, bytes_of, torch_dtype
from .transformers_model import is_quantized, quantize_like, quantized_tensors

CHUNK_BYTES = 16 << 20
"""Bytes compared at a time."""


def check_loaded(model: Any, plan: Plan, groups: Sequence[TensorGroup], files: MappedFiles) -> None:
    """Raise FormatError unless the model has its parameters, all of them, from the plan's base.

    groups: of `group_tensors`.
    """
    check_equal(model, plan, groups, files)
    state = model.state_dict(keep_vars=True)
    # Tied ones have several names
    checked = {_memory_of(state[target]) for group in groups for target in group.targets}
    for name, param in model.named_parameters():
        if _memory_of(param) not in checked:
            raise FormatError(
                f"{plan.base.path}: holds no weights for {name} of {type(model).__name__};"
                " its answers would be random"
            )
    _check_tied(plan, groups, state)


def check_equal(model: Any, plan: Plan, groups: Sequence[TensorGroup], files: MappedFiles) -> None:
    """Raise FormatError unless the groups' parameters equal their bytes on disk.

    Those that a model without its layers lacks are passed over. Tensors that bitsandbytes quantizes
    are compared after the same has been done to the bytes on disk.
    """
    state = model.state_dict(keep_vars=True)
    for group in groups:
        if state[group.targets[0]].is_meta:
            continue
        for name in _find_different(model, plan, group, state, files):
            raise FormatError(
                f"{plan.base.path}: {name} is not what transformers loaded into"
                f" {' and '.join(group.targets)}; this version of transformers may read it"
                " differently"
            )


def _find_different(
    model: Any, plan: Plan, group: TensorGroup, state: Mapping[str, Any], files: MappedFiles
) -> Iterator[str]:
    """The names of those tensors of a group that are not what the model has."""
    param = state[group.targets[0]]
    if is_quantized(param):
        span = plan.base.tensors[group.names[0]]
        value = view_tensor(span, files).to(param.device, model.dtype)
        if not _equals_quantized(param, quantize_like(param, value)):
            yield group.names[0]
        return
    for name, pieces in group.views(state).items():
        if not _equals_span(pieces, plan.base.tensors[name], files):
            yield name


def _check_tied(plan: Plan, groups: Sequence[TensorGroup], state: Mapping[str, Any]) -> None:
    """A tensor that the plan omits as tied must be so: transformers keeps a head that differs."""
    written = {step.name for step in plan.steps}
    kept = {
        _memory_of(state[target])
        for group in groups
        for target in group.targets
        if written.issuperset(group.names)
    }
    for group in groups:
        for name in group.names:
            if name not in written and _memory_of(state[group.targets[0]]) not in kept:
                raise FormatError(
                    f"{plan.base.path}: config.json ties {name} to the embedding, but the two"
                    " differ on disk; say tie_word_embeddings: false there to keep both"
                )


def _memory_of(param: torch.Tensor) -> int:
    """What tied parameters have in common and others have not."""
    return id(param) if param.is_meta else param.data_ptr()


def _equals_quantized(first: Any, second: Any) -> bool:
    pairs = zip(quantized_tensors(first), quantized_tensors(second), strict=True)
    return all(torch.equal(bytes_of(a), bytes_of(b)) for a, b in pairs)


def _equals_span(pieces: Pieces, span: Span, files: MappedFiles) -> bool:
    """Whether parameters hold a span's numbers, cast to their dtype."""
    if sum(view.numel() for view in pieces.views) != span.elements:
        return False
    start = 0
    for piece in _split(span):
        values = view_tensor(piece, files)
        for view in pieces.select(start, start + piece.elements):
            expected = values[: view.numel()].to(view.device).to(view.dtype)
            if not torch.equal(bytes_of(view.contiguous()), bytes_of(expected)):
                return False
            values = values[view.numel() :]
        start += piece.elements
        if release := files.release(piece, evict=False):
            release()
    return True


def _split(span: Span) -> Iterator[Span]:
    count = CHUNK_BYTES // span.dtype.itemsize
    for first in range(0, span.elements, count):
        yield span.flat_slice(first, min(count, span.elements - first))


def view_tensor(span: Span, files: MappedFiles) -> torch.Tensor:
    """A span of a mapped file as a torch tensor over the same memory."""
    return as_tensor(files.view(span)).view(torch_dtype(span.dtype)).view(span.shape)
