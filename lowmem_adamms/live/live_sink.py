"""The live sink: windows go where the parameters of a loaded model lie, or by a staging buffer.

A parameter that has the dtype which is written takes its bytes in place. One of another dtype is
cast window by window; one that transformers converts or bitsandbytes quantizes waits until all of
its tensors are there. Leaves to others: the loop (`merge.py`), the model (`live.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ..checkpoints.mapped_files import MappedFiles
from ..checkpoints.span import Span
from ..errors import MappingError
from ..mapping.plan import Plan, Step
from ..merging.loop import Source
from . import transformers_model as loading
from .device_source import torch_dtype


class LiveSink:
    """Windows go where the parameters lie: into their memory, or by way of a staging buffer."""

    def __init__(
        self,
        model: Any,
        plan: Plan,
        groups: Sequence[loading.Group],
        ignored: Sequence[str],
        source: Source,
    ) -> None:
        self._source = source
        self._host = isinstance(source, MappedFiles)
        self._touched: list[_Target] = []
        self._targets: dict[str, _Target] = {}
        steps = {step.name: step for step in plan.steps}
        merged = {name for name, step in steps.items() if step.action == "interpolate"}
        if lost := merged & set(ignored):
            raise MappingError(
                f"{plan.base.path}: transformers does not load {sorted(lost)[0]} into"
                f" {type(model).__name__}; what it would say cannot be searched"
            )
        for group in groups:
            if merged & set(group.names):
                self._add(model, group, steps)

    def wants(self, step: Step) -> bool:
        """Whether the live model holds the step and alpha changes it."""
        return step.name in self._targets

    def copy(self, step: Step, offset: int, span: Span) -> None:
        """Bytes that are the base's or the donor's as they are."""
        slot = self.slot(step, offset, span.nbytes)
        slot[...] = self._source.view(span)
        self.commit()

    def slot(self, step: Step, offset: int, nbytes: int) -> Any:
        """Bytes of a parameter, or of a staging buffer on the same device."""
        target = self._targets[step.name]
        self._touched.append(target)
        return self._view(target.slot(step.name, offset, nbytes))

    def commit(self) -> None:
        """Hand on what was staged."""
        for target in self._touched:
            target.flush()
        self._touched = []

    def forget(self) -> None:
        """Drop what was staged and not committed."""
        for target in self._targets.values():
            target.forget()
        self._touched = []

    def close(self) -> None:
        """Let go of the parameters."""
        self._targets, self._touched = {}, []

    def _view(self, buffer: torch.Tensor) -> Any:
        """What the kernel works on: numpy on the host, torch on a device."""
        return buffer.numpy() if self._host else buffer

    def _add(self, model: Any, group: loading.Group, steps: dict[str, Step]) -> None:
        param = model.get_parameter(group.target)
        if any(param.data_ptr() == other.param.data_ptr() for other in self._targets.values()):
            # Embedding and head, equal on disk: what is written separately may come to differ.
            loading.untie(model, group.target)
            param = model.get_parameter(group.target)
        members = [steps[name] for name in group.names]
        target: _Target
        if group.converter is not None or loading.is_quantized(param) or not param.is_contiguous():
            target = _Whole(model, group, members, param)
        elif torch_dtype(members[0].dtype) == param.dtype:
            target = _InPlace(param)
        else:
            target = _Cast(param, torch_dtype(members[0].dtype))
        self._targets |= dict.fromkeys(group.names, target)


class _Target(Protocol):
    """Where one group's bytes go."""

    param: torch.Tensor

    def slot(self, name: str, offset: int, nbytes: int) -> torch.Tensor: ...
    def flush(self) -> None: ...
    def forget(self) -> None: ...


class _InPlace:
    """The parameter's own memory: it has the dtype that is written."""

    def __init__(self, param: torch.Tensor) -> None:
        self.param, self._loaded = param, param.detach()
        self._bytes = bytes_of(param)

    def slot(self, name: str, offset: int, nbytes: int) -> torch.Tensor:
        return self._bytes[offset : offset + nbytes]

    def flush(self) -> None:
        _restore(self.param, self._loaded)

    def forget(self) -> None:
        pass


class _Cast:
    """A parameter of another dtype than is written: cast window by window, as a loader would."""

    def __init__(self, param: torch.Tensor, dtype: torch.dtype) -> None:
        self.param, self._loaded, self._dtype = param, param.detach(), dtype
        self._flat = self._loaded.view(-1)
        self._staged: list[tuple[int, torch.Tensor]] = []

    def slot(self, name: str, offset: int, nbytes: int) -> torch.Tensor:
        buffer = self._flat.new_empty(nbytes, dtype=torch.uint8)
        self._staged.append((offset // self._dtype.itemsize, buffer))
        return buffer

    def flush(self) -> None:
        for start, buffer in self._staged:
            values = buffer.view(self._dtype)
            self._flat[start : start + len(values)].copy_(values)
        self._staged = []
        _restore(self.param, self._loaded)

    def forget(self) -> None:
        self._staged = []


class _Whole:
    """Tensors that transformers converts, or bitsandbytes quantizes, when all of them are there."""

    def __init__(
        self, model: Any, group: loading.Group, members: Sequence[Step], param: torch.Tensor
    ) -> None:
        self.param = param
        self._model, self._group, self._members = model, group, members
        self._device = param.device
        self._staged: dict[str, torch.Tensor] = {}
        self._missing = 0
        self.forget()

    def slot(self, name: str, offset: int, nbytes: int) -> torch.Tensor:
        if name not in self._staged:
            size = next(step.nbytes for step in self._members if step.name == name)
            self._staged[name] = self.param.new_empty(size, dtype=torch.uint8, device=self._device)
        self._missing -= nbytes
        return self._staged[name][offset : offset + nbytes]

    def flush(self) -> None:
        if self._missing or not self._staged:
            return
        tensors = [
            self._staged[step.name].view(torch_dtype(step.dtype)).view(step.shape)
            for step in self._members
        ]
        self.forget()
        for name, value in loading.convert(self._group, tensors, self._model).items():
            loading.assign(self._model, name, value)

    def forget(self) -> None:
        self._staged = {}
        self._missing = sum(step.nbytes for step in self._members)


def _restore(param: torch.Tensor, loaded: torch.Tensor) -> None:
    """Give a parameter its memory back: a forward pass of bitsandbytes puts cast biases aside."""
    if param.data_ptr() != loaded.data_ptr():
        param.data = loaded


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory as flat bytes."""
    return tensor.detach().view(-1).view(torch.uint8)
