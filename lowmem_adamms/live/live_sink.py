"""Where the loop's output enters the parameters of a loaded model.

A parameter with the output's dtype takes its bytes in place. One of another dtype, or in another
order, is filled window by window. One that bitsandbytes quantizes is staged until it is complete.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..checkpoints.mapped_files import MappedFiles
from ..errors import MappingError
from ..mapping.plan import Plan, Step
from ..merging.loop import Source
from .conversions import Pieces, TensorGroup
from .device_source import bytes_of, torch_dtype
from .transformers_model import assign_parameter, find_tensor, is_quantized, untie_parameter


class LiveSink:
    """A sink of the loop that fills the parameters of `model`.

    groups: of `group_tensors`, for the base's tensors. source: what the loop reads from; it tells
    where slots must be, on the host or on the device. steps: those of the plan that are wanted;
    default: all that alpha changes.
    """

    def __init__(
        self,
        model: Any,
        plan: Plan,
        groups: Sequence[TensorGroup],
        source: Source,
        steps: Iterable[Step] | None = None,
    ) -> None:
        self._on_host = isinstance(source, MappedFiles)
        self._targets: dict[str, _DirectTarget | _StagedTarget] = {}
        self._touched: list[_DirectTarget | _StagedTarget] = []
        if steps is None:
            steps = (step for step in plan.steps if step.action == "interpolate")
        merged = {step.name: step for step in steps}
        if lost := merged.keys() - {name for group in groups for name in group.names}:
            raise MappingError(
                f"{plan.base.path}: transformers does not load {min(lost)} into"
                f" {type(model).__name__}; what it would say cannot be searched"
            )
        taken: set[int] = set()
        for group in groups:
            if not merged.keys().isdisjoint(group.names):
                params = _take_parameters(model, group, taken)
                self._add_targets(model, group, params, merged)

    def _add_targets(
        self,
        model: Any,
        group: TensorGroup,
        params: Mapping[str, torch.Tensor],
        merged: Mapping[str, Step],
    ) -> None:
        (target, param), *_ = params.items()
        if is_quantized(param):
            step = merged[group.names[0]]
            self._targets[step.name] = _StagedTarget(model, target, step, param)
            return
        for name, pieces in group.views(params).items():
            if name in merged:
                dtype = torch_dtype(merged[name].dtype)
                self._targets[name] = _DirectTarget(tuple(params.values()), pieces, dtype)

    def wants(self, step: Step) -> bool:
        """Whether the step is one of those to fill."""
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


class TableSink:
    """A sink of the loop that fills flat bytes with the one step of a plan."""

    def __init__(self, content: torch.Tensor, source: Source) -> None:
        self._content: Any = content.numpy() if isinstance(source, MappedFiles) else content

    def wants(self, step: Step) -> bool:
        """Any step is wanted."""
        return True

    def copy(self, step: Step, offset: int, content: Any) -> None:
        """Bytes that are the base's or the donor's as they are."""
        self.slot(step, offset, len(content))[...] = content

    def slot(self, step: Step, offset: int, nbytes: int) -> Any:
        """Some of the bytes."""
        return self._content[offset : offset + nbytes]

    def commit(self) -> None:
        """Nothing is staged."""


def _take_parameters(model: Any, group: TensorGroup, taken: set[int]) -> dict[str, torch.Tensor]:
    """The group's parameters, each with memory of its own: `taken` holds that of other groups."""
    params = {}
    for target in group.targets:
        if find_tensor(model, target).data_ptr() in taken:
            # Embedding and head that are equal on disk but written separately may come to differ
            untie_parameter(model, target)
        params[target] = find_tensor(model, target)
        taken.add(params[target].data_ptr())
    return params


class _DirectTarget:
    """The memory of parameters; where it has another dtype or order, filled window by window."""

    def __init__(self, params: Sequence[torch.Tensor], pieces: Pieces, dtype: torch.dtype) -> None:
        self._params = [(param, param.detach()) for param in params]
        self._pieces, self._dtype = pieces, dtype
        self._staged: dict[int, torch.Tensor] = {}  # bytes by their first element
        in_order = len(pieces.views) == 1 and pieces.only.is_contiguous()
        self._in_place = in_order and pieces.only.dtype == dtype

    def slot(self, offset: int, nbytes: int) -> torch.Tensor:
        if self._in_place:
            return bytes_of(self._pieces.only)[offset : offset + nbytes]
        buffer = self._pieces.views[0].new_empty(nbytes, dtype=torch.uint8)
        self._staged[offset // self._dtype.itemsize] = buffer
        return buffer

    def flush(self) -> None:
        for start, buffer in self._staged.items():
            values = buffer.view(self._dtype)
            for view in self._pieces.select(start, start + len(values)):
                view.copy_(values[: view.numel()].view(view.shape))
                values = values[view.numel() :]
        self._staged = {}
        # A forward pass of bitsandbytes puts cast biases in the place of a parameter's memory
        for param, loaded in self._params:
            if param.data_ptr() != loaded.data_ptr():
                param.data = loaded

    def discard(self) -> None:
        self._staged = {}


class _StagedTarget:
    """A whole tensor on the way to bitsandbytes."""

    def __init__(self, model: Any, name: str, step: Step, param: torch.Tensor) -> None:
        self._model, self._name, self._step, self._param = model, name, step, param
        self._staged: torch.Tensor | None = None
        self._missing_bytes = step.nbytes

    def slot(self, offset: int, nbytes: int) -> torch.Tensor:
        if self._staged is None:
            self._staged = self._param.new_empty(self._step.nbytes, dtype=torch.uint8)
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
