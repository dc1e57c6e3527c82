"""A base of which only two decoder layers are in memory, each blended just before it runs.

What is outside of the layers is held: blended where alpha changes it, else used where it lies
mapped. Of an embedding that is not tied to the head only the rows in use are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.mapped_files import MappedFiles
from ..mapping.alphas import Alpha
from ..mapping.mixture import Mixture
from ..mapping.plan import Plan, Step
from ..merging.loop import Source, run
from .decoder_layers import DecoderLayer, LayeredLoader
from .device_source import DeviceSource
from .embedding_rows import EmbeddingRows, SparseFiles
from .held_weights import WINDOW_BYTES, choose_kernel
from .layer_turnstile import LayerTurnstile
from .live_sink import LiveSink, TableSink
from .load_check import check_equal, check_loaded
from .placement import Placement
from .streamed_layers import StreamedLayers
from .transformers_model import find_tensor, untie_parameter


class StreamedWeights:
    """A plan's base whose decoder layers come and go, and how to set its alpha.

    model: the transformers module. groups: of `group_tensors`.
    """

    def __init__(
        self, plan: Plan, folder: Path, placement: Placement, *, dtype: str, trust_remote_code: bool
    ) -> None:
        """Load and check all of it, layer by layer. dtype: a torch name, or "auto".

        CannotStreamError if the model's layers cannot come and go.
        """
        self._plan, self._placement = plan, placement
        self._kernel = choose_kernel(plan, placement.device)
        self._alpha: Alpha = 0.0
        with ExitStack() as opened:
            files = opened.enter_context(MappedFiles(keep=placement.sources_stay_cached))
            self._files = files
            row_files = opened.enter_context(SparseFiles(keep=True))
            loader = LayeredLoader(plan, files)
            loader.load(device=placement.device, dtype=dtype, trust_remote_code=trust_remote_code)
            self.model, self.groups = loader.model, loader.groups
            _check(loader, plan, files)
            # One after the other: `apply` waits for the layers, and these for it
            self._source = self._read_from(files, plan)
            self._row_source = self._read_from(row_files, replace(plan, steps=()))
            self._held = self._hold(loader.layers, opened)
            self.sink = LiveSink(self.model, self._held, self.groups, self._source)
            self._dropped = _find_uncached(loader.layers, placement)
            turnstile = LayerTurnstile(
                len(loader.layers), loader.find_owners(), placement.batches_at_once
            )
            self.run_batches = turnstile.run_batches
            opened.callback(turnstile.close)
            self._layers = StreamedLayers(
                loader.layers, self._fill_layer, placement.device, turnstile.wait
            )
            opened.callback(self._layers.close)
            self._layers.start(0.0)
            self._opened = opened.pop_all()

    def _read_from(self, files: MappedFiles, plan: Plan) -> Source:
        device = self._placement.device
        return files if device == "cpu" else DeviceSource(plan, files, self._placement, device)

    def _hold(self, layers: Iterable[DecoderLayer], opened: ExitStack) -> Plan:
        """The plan of what alpha changes outside of the layers, which gets memory of its own."""
        streamed = {name for layer in layers for name in layer.names}
        changed = {
            step.name: step
            for step in self._plan.steps
            if step.action == "interpolate" and step.name not in streamed
        }
        groups = [group for group in self.groups if not changed.keys().isdisjoint(group.names)]
        self._untie([target for group in groups for target in group.targets])
        for group in groups:
            if embedding := self._find_lone_embedding(group.targets[0]):
                rows = EmbeddingRows(embedding, changed.pop(group.names[0]), self._fill_table)
                opened.callback(rows.close)
                continue
            for target in group.targets:
                param = find_tensor(self.model, target)
                param.data = param.data.clone()
        return replace(self._plan, steps=tuple(changed.values()))

    def _untie(self, targets: Iterable[str]) -> None:
        """Let each have a tensor of its own: what is equal on disk may come to differ."""
        seen: set[int] = set()
        for target in targets:
            if id(find_tensor(self.model, target)) in seen:
                untie_parameter(self.model, target)
            seen.add(id(find_tensor(self.model, target)))

    def _find_lone_embedding(self, target: str) -> Any:
        """The embedding whose weight this is, if it is tied to nothing and does no more."""
        path, _, attribute = target.rpartition(".")
        module = self.model.get_submodule(path)
        users = [p for _, p in self.model.named_parameters(remove_duplicate=False)]
        is_lone = sum(p is getattr(module, attribute) for p in users) == 1
        is_plain = type(module).forward is torch.nn.Embedding.forward
        # Some methods choose elements by their place in the whole
        return module if is_lone and is_plain and not isinstance(self._plan, Mixture) else None

    def apply(self, alpha: Alpha, progress: Callable[[int], None] | None) -> None:
        """Blend what is held; the layers are blended as they run."""
        self._layers.discard()
        self.sink.discard()
        self._alpha = alpha
        run(
            self._held,
            alpha,
            self.sink,
            kernel=self._kernel,
            source=self._source,
            window=WINDOW_BYTES,
            evict=not self._placement.sources_stay_cached,
            progress=progress,
        )
        self._layers.start(alpha)

    def _fill_layer(self, layer: DecoderLayer, alpha: Alpha) -> None:
        steps = layer.plan.steps
        sink = LiveSink(self.model, layer.plan, layer.groups, self._source, steps=steps)
        run(
            layer.plan,
            alpha,
            sink,
            kernel=self._kernel,
            source=self._source,
            window=WINDOW_BYTES,
            evict=layer in self._dropped,
        )

    def _fill_table(self, step: Step, content: torch.Tensor) -> None:
        run(
            replace(self._plan, steps=(step,)),
            self._alpha,
            TableSink(content, self._row_source),
            kernel=self._kernel,
            source=self._row_source,
        )

    def close(self) -> None:
        """End the thread, unmap the files and drop the model."""
        self._opened.close()
        self.sink.close()
        self.model = None


def _check(loader: LayeredLoader, plan: Plan, files: MappedFiles) -> None:
    """Compare all tensors with their files, also those of the layers, one layer at a time."""
    check_loaded(loader.model, plan, loader.groups, files)
    for layer in loader.layers:
        loader.load_layer(layer)
        check_equal(loader.model, plan, layer.groups, files)
        layer.unbind()


def _find_uncached(layers: Iterable[DecoderLayer], placement: Placement) -> set[DecoderLayer]:
    """The layers whose sources find no room in the page cache.

    Dropped once they were used, they do not push out the others, which are found there again.
    """
    free_bytes = placement.page_cache_bytes
    dropped = set()
    for layer in layers:
        blended = (part for _, part in layer.plan.parts if part.donor)
        free_bytes -= sum(side.nbytes for part in blended for side in part.sides)
        if free_bytes < 0 and not placement.sources_stay_cached:
            dropped.add(layer)
    return dropped
