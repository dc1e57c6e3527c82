"""A base that is loaded whole, its language weights re-blended in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.mapped_files import MappedFiles
from ..mapping.alphas import Alpha
from ..mapping.plan import Plan
from ..merging.loop import Source, run
from . import transformers_model
from .conversions import group_tensors
from .device_source import DeviceSource
from .live_sink import LiveSink
from .load_check import check_loaded
from .placement import Placement

WINDOW_BYTES = 64 << 20
"""Output per kernel call. No buffer has this size, as the output is the parameters themselves; on a
card, launching such a call costs nothing compared with copying."""


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
        self._files = MappedFiles(keep=placement.sources_stay_cached)
        try:
            self.groups = group_tensors(self.model, plan.base.tensors)
            check_loaded(self.model, plan, self.groups, self._files)
            self._source: Source = self._files
            if placement.device != "cpu":
                self._source = DeviceSource(plan, self._files, placement, placement.device)
            self._kernel = choose_kernel(plan, placement.device)
            self.sink = LiveSink(self.model, plan, self.groups, self._source)
        except BaseException:
            self._files.close()
            raise

    def apply(self, alpha: Alpha, progress: Callable[[int], None] | None) -> None:
        """Blend into the parameters."""
        self.sink.discard()  # what an interrupted apply left
        run(
            self._plan,
            alpha,
            self.sink,
            kernel=self._kernel,
            source=self._source,
            window=WINDOW_BYTES,
            progress=progress,
        )
        if self._device == "cuda":
            torch.cuda.synchronize()

    def close(self) -> None:
        """Unmap the files and drop the model."""
        self.sink.close()
        self._files.close()
        self.model = None


def choose_kernel(plan: Plan, device: str) -> Any:
    """The kernel that blends where the model is."""
    if device == "cpu":
        from ..kernels.select import select_kernel

        return select_kernel(plan.dtypes)[0]
    from ..kernels import gpu

    return gpu.select_kernel(device, plan.dtypes)[0]
