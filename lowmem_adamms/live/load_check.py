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
from .device_source import as_tensor, bytes_of, torch_dtype
from .transformers_model import TensorGroup, convert, equals_parameter, is_quantized

CHUNK_BYTES = 16 << 20
"""Bytes compared at a time."""


def check_loaded(model: Any, plan: Plan, groups: Sequence[TensorGroup], files: MappedFiles) -> None:
    """Raise FormatError unless every parameter equals its bytes on disk.

    Tensors that transformers converts or bitsandbytes quantizes are compared after the same has
    been done to the bytes on disk.
    """
    state = model.state_dict(keep_vars=True)
    checked: set[int] = set()  # addresses, as tied parameters have several names
    for group in groups:
        spans = [plan.base.tensors[name] for name in group.names]
        param = state[group.target]
        if group.converter is None and not is_quantized(param):
            equal = _equals_span(param, spans[0], files)
            checked.add(param.data_ptr())
        else:
            tensors = [_view_tensor(span, files).to(param.device) for span in spans]
            converted = convert(group, tensors, model)
            equal = all(equals_parameter(model, name, value) for name, value in converted.items())
            checked |= {state[name].data_ptr() for name in converted}
        if not equal:
            raise FormatError(
                f"{plan.base.path}: {group.names[0]} is not what transformers loaded into"
                f" {group.target}; this version of transformers may read it differently"
            )
    for name, param in model.named_parameters():
        if param.data_ptr() not in checked:
            raise FormatError(
                f"{plan.base.path}: holds no weights for {name} of {type(model).__name__};"
                " its answers would be random"
            )
    _check_tied(plan, groups, state)


def _check_tied(plan: Plan, groups: Sequence[TensorGroup], state: Mapping[str, Any]) -> None:
    """A tensor that the plan omits as tied must be so: transformers keeps a head that differs."""
    written = {step.name for step in plan.steps}
    kept = {state[group.target].data_ptr() for group in groups if written & set(group.names)}
    for group in groups:
        if not written & set(group.names) and state[group.target].data_ptr() not in kept:
            raise FormatError(
                f"{plan.base.path}: config.json ties {group.names[0]} to the embedding, but the two"
                " differ on disk; say tie_word_embeddings: false there to keep both"
            )


def _equals_span(param: torch.Tensor, span: Span, files: MappedFiles) -> bool:
    """Whether a parameter holds a span's numbers, cast to its dtype."""
    if tuple(param.shape) != span.shape:
        return False
    flat = param.detach().reshape(-1)
    start = 0
    for piece in _split(span):
        values = _view_tensor(piece, files).to(param.device).to(param.dtype)
        if not torch.equal(bytes_of(flat[start : start + len(values)]), bytes_of(values)):
            return False
        start += len(values)
        if release := files.release(piece, evict=False):
            release()
    return True


def _split(span: Span) -> Iterator[Span]:
    count = CHUNK_BYTES // span.dtype.itemsize
    for first in range(0, span.elements, count):
        yield span.flat_slice(first, min(count, span.elements - first))


def _view_tensor(span: Span, files: MappedFiles) -> torch.Tensor:
    """A span of a mapped file as a torch tensor over the same memory."""
    return as_tensor(files.view(span)).view(torch_dtype(span.dtype)).view(span.shape)
