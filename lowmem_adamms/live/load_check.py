"""Check that the parameters which transformers loaded are those of the base's files.

This proves that tensors on disk were matched to the right parameters, and finds a checkpoint that
lacks some.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..checkpoints.mapped_files import MappedFiles
from ..checkpoints.span import Span
from ..errors import FormatError
from ..mapping.plan import Plan
from .device_source import as_tensor, bytes_of, torch_dtype
from .transformers_model import is_quantized, quantize_like, quantized_tensors

CHUNK_BYTES = 16 << 20
"""Bytes compared at a time."""


def check_loaded(model: Any, plan: Plan, matched: Mapping[str, str], files: MappedFiles) -> None:
    """Raise FormatError unless every parameter equals its bytes on disk.

    matched: of `match_tensors`. Tensors that bitsandbytes quantizes are compared after the same has
    been done to the bytes on disk.
    """
    state = model.state_dict(keep_vars=True)
    for target, name in matched.items():
        param, span = state[target], plan.base.tensors[name]
        if is_quantized(param):
            value = _view_tensor(span, files).to(param.device, model.dtype)
            equal = _equals_quantized(param, quantize_like(param, value))
        else:
            equal = _equals_span(param, span, files)
        if not equal:
            raise FormatError(
                f"{plan.base.path}: {name} is not what transformers loaded into {target};"
                " this version of transformers may read it differently"
            )
    checked = {state[target].data_ptr() for target in matched}  # tied ones have several names
    for name, param in model.named_parameters():
        if param.data_ptr() not in checked:
            raise FormatError(
                f"{plan.base.path}: holds no weights for {name} of {type(model).__name__};"
                " its answers would be random"
            )
    _check_tied(plan, matched, state)


def _check_tied(plan: Plan, matched: Mapping[str, str], state: Mapping[str, Any]) -> None:
    """A tensor that the plan omits as tied must be so: transformers keeps a head that differs."""
    written = {step.name for step in plan.steps}
    kept = {state[target].data_ptr() for target, name in matched.items() if name in written}
    for target, name in matched.items():
        if name not in written and state[target].data_ptr() not in kept:
            raise FormatError(
                f"{plan.base.path}: config.json ties {name} to the embedding, but the two"
                " differ on disk; say tie_word_embeddings: false there to keep both"
            )


def _equals_quantized(first: Any, second: Any) -> bool:
    pairs = zip(quantized_tensors(first), quantized_tensors(second), strict=True)
    return all(torch.equal(bytes_of(a), bytes_of(b)) for a, b in pairs)


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
