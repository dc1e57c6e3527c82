"""Where the loop's output enters the parameters of a loaded model.

A parameter with the output's dtype takes its bytes in place. One of another dtype is cast window by
window. One that bitsandbytes quantizes is staged until it is complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoints.mapped_files import MappedFiles
from ..errors import MappingError
from ..mapping.plan import Plan, Step
from ..merging.loop import Source
from .device_source import bytes_of, torch_dtype
from .transformers_model import assign_parameter, is_quantized, untie_parameter


class LiveSink:
    """A sink of the loop that fills the parameters of `model`.

    matched: of `match_tensors`, for the base's tensors. source: what the loop reads from; it tells
    where slots must be, on the host or on the device.
    """

    def __init__(self, model: Any, plan: Plan, matched: Mapping[str, str], source: Source) -> None:
        self._on_host = isinstance(source, MappedFiles)
        self._targets: dict[str, _DirectTarget | _StagedTarget] = {}
        self._touched: list[_DirectTarget | _StagedTarget] = []
        targets = {name: target for target, name in matched.items()}
        merged = {step.name: step for step in plan.steps if step.action == "interpolate"}
        if lost := merged.keys() - targets.keys():
            raise MappingError(
                f"{plan.base.path}: transformers does not load {min(lost)} into"
                f" {type(model).__name__}; what it would say cannot be searched"
            )
        for name, step in merged.items():
            self._targets[name] = self._make_target(model, targets[name], step)

    def _make_target(self, model: Any, name: str, step: Step) -> _DirectTarget | _StagedTarget:
        param = model.get_parameter(name)
        if any(param.data_ptr() == other.param.data_ptr() for other in self._targets.values()):
            # Embedding and head that are equal on disk but written separately may come to differ
            untie_parameter(model, name)
            param = model.get_parameter(name)
        if is_quantized(param) or not param.is_contiguous():
            return _StagedTarget(model, name, step, param)
        return _DirectTarget(param, torch_dtype(step.dtype))

    def wants(self, step: Step) -> bool:
        """Whether the live model holds the step and alpha changes it."""
        return step.name in self._targets

    def copy(self, step: Step, offset: int, content: Any) -> None:
        """Bytes that are the base's or the donor's as they are."""
        self.slot(step, offset, len(content))[...] = content
        self.commit()

    def slot(self, step: Step, offset: int, nbytes: int) -> Any:
        """Bytes of a parameter, or of a staging buffer on the same device.

        As the kernel takes them: a numpy array on the host, a torch tensor on a device.
        """
        target = self._targets[step.name]
        self._touched.append(target)
        buffer = target.slot(offset, nbytes)
        return buffer.numpy() if self._on_host else buffer

    def commit(self) -> None:
        """Move what was staged into the parameters."""
        for target in self._touched:
            target.flush()
        self._touched = []

    def discard(self) -> None:
        """Drop what was staged and not committed."""
        for target in self._targets.values():
            target.discard()
        self._touched = []

    def close(self) -> None:
        """Drop all references to the model."""
        self._targets, self._touched = {}, []


class _DirectTarget:
    """A parameter's own memory; where it has another dtype, cast window by window."""

    def __init__(self, param: torch.Tensor, dtype: torch.dtype) -> None:
        self.param, self._loaded, self._dtype = param, param.detach(), dtype
        self._staged: dict[int, torch.Tensor] = {}  # bytes by their first element

    def slot(self, offset: int, nbytes: int) -> torch.Tensor:
        if self._dtype == self._loaded.dtype:
            return bytes_of(self._loaded)[offset : offset + nbytes]
        buffer = self._loaded.new_empty(nbytes, dtype=torch.uint8)
        self._staged[offset // self._dtype.itemsize] = buffer
        return buffer

    def flush(self) -> None:
        flat = self._loaded.view(-1)
        for start, buffer in self._staged.items():
            values = buffer.view(self._dtype)
            flat[start : start + len(values)].copy_(values)
        self._staged = {}
        # A forward pass of bitsandbytes puts cast biases in the place of a parameter's memory
        if self.param.data_ptr() != self._loaded.data_ptr():
            self.param.data = self._loaded

    def discard(self) -> None:
        self._staged = {}


class _StagedTarget:
    """A whole tensor on the way to bitsandbytes."""

    def __init__(self, model: Any, name: str, step: Step, param: torch.Tensor) -> None:
        self.param = param
        self._model, self._name, self._step = model, name, step
        self._staged: torch.Tensor | None = None
        self._missing_bytes = step.nbytes

    def slot(self, offset: int, nbytes: int) -> torch.Tensor:
        if self._staged is None:
            self._staged = self.param.new_empty(self._step.nbytes, dtype=torch.uint8)
        self._missing_bytes -= nbytes
        return self._staged[offset : offset + nbytes]

    def flush(self) -> None:
        if self._staged is None or self._missing_bytes:
            return
        value = self._staged.view(torch_dtype(self._step.dtype)).view(self._step.shape)
        self.discard()
        assign_parameter(self._model, self._name, value)

    def discard(self) -> None:
        self._staged = None
        self._missing_bytes = self._step.nbytes
