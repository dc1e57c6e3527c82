"""A base that is loaded whole, its language weights re-blended in place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.mapped_files import MappedFiles
from ..mapping.alphas import Alpha
from ..mapping.plan import Plan
from ..merging.loop import Sink, Source, run
from . import transformers_model
from .conversions import group_tensors
from .device_source import DeviceSource
from .live_sink import LiveSink
from .load_check import check_loaded
from .placement import Placement

WINDOW_BYTES = 64 << 20
"""Output per kernel call. No buffer has this size, as the output is the parameters themselves; on a
card, launching such a call costs nothing compared with copying."""


@dataclass(frozen=True, slots=True)
class Blender:
    """The loop with all that stays the same from run to run on a loaded model."""

    kernel: Any
    source: Source

    def blend(self, plan: Plan, alpha: Alpha, sink: Sink, **options: Any) -> None:
        """Carry out a plan into a sink. options: more of `loop.run`."""
        kernel, source = self.kernel, self.source
        run(plan, alpha, sink, kernel=kernel, source=source, window=WINDOW_BYTES, **options)


def choose_kernel(plan: Plan, device: str) -> Any:
    """The kernel that blends where the model is."""
    if device == "cpu":
        from ..kernels.select import select_kernel

        return select_kernel(plan.dtypes)[0]
    from ..kernels import gpu

    return gpu.select_kernel(device, plan.dtypes)[0]


def make_source(plan: Plan, files: MappedFiles, placement: Placement) -> Source:
    """Where the plan's weights come from: the files, or the card with what it has room for."""
    if placement.device == "cpu":
        return files
    return DeviceSource(plan, files, placement, placement.device)


class HeldWeights:
    """A plan's base in memory, quantized or not, and how to re-blend it.

    model: the transformers module. groups: of `group_tensors`. run_batches: how an `Answerer` is to
    do them, one after the other.
    """

    run_batches = map

    def __init__(
        self, plan: Plan, folder: Path, placement: Placement, *, dtype: str, trust_remote_code: bool
    ) -> None:
        """Load. dtype: a torch name, or "auto" for the config's own."""
        self._plan, self._device = plan, placement.device
        self.model = transformers_model.load_model(
            folder,
            device=placement.device,
            dtype=dtype,
            quantize=placement.quantize,
            trust_remote_code=trust_remote_code,
        )
        with ExitStack() as opened:
            files = opened.enter_context(MappedFiles(keep=placement.sources_stay_cached))
            self.groups = group_tensors(self.model, plan.base.tensors)
            check_loaded(self.model, plan, self.groups, files)
            source = make_source(plan, files, placement)
            self._blender = Blender(choose_kernel(plan, placement.device), source)
            self.sink = LiveSink(self.model, plan, self.groups, source)
            self._opened = opened.pop_all()

    def apply(self, alpha: Alpha, progress: Callable[[int], None] | None) -> None:
        """Blend into the parameters."""
        self.sink.discard()  # what an interrupted apply left
        self._blender.blend(self._plan, alpha, self.sink, progress=progress)
        if self._device == "cuda":
            torch.cuda.synchronize()

    def close(self) -> None:
        """Unmap the files and drop the model."""
        self.sink.close()
        self._opened.close()
        self.model = None
