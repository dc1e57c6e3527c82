"""A base of which two decoder layers are in memory, each blended just before it runs.

Where there is room, more of them stay. What is outside of the layers is held: blended where alpha
changes it, else used where it lies mapped. Embedding and head can do with the rows that are in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.mapped_files import MappedFiles
from ..mapping.alphas import Alpha
from ..mapping.mixture import Mixture
from ..mapping.plan import Plan, Step
from .conversions import TensorGroup
from .decoder_layers import CannotStreamError, DecoderLayer, LayeredLoader
from .held_weights import Blender, choose_kernel, make_source
from .layer_turnstile import LayerTurnstile
from .live_sink import LiveSink, TableSink
from .load_check import check_equal, check_loaded
from .placement import Placement
from .streamed_layers import StreamedLayers, spread_layers
from .transformers_model import find_tensor, untie_parameter
from .vocabulary_table import RowBlender, RowFiles, VocabularyTable


class StreamedWeights:
    """A plan's base whose decoder layers come and go, and how to set its alpha.

    model: the transformers module. groups: of `group_tensors`. run_batches: how an `Answerer` is to
    do them, side by side.
    """

    def __init__(
        self, plan: Plan, folder: Path, placement: Placement, *, dtype: str, trust_remote_code: bool
    ) -> None:
        """Load and check all of it, layer by layer. dtype: a torch name, or "auto".

        CannotStreamError if the model's layers cannot come and go.
        """
        self._plan, self._placement = plan, placement
        self._alpha: Alpha = 0.0
        with ExitStack() as opened:
            # Layers, and what is held, come one after the other; rows come while a layer does
            files = opened.enter_context(MappedFiles(keep=placement.sources_stay_cached))
            row_files = opened.enter_context(RowFiles(keep=placement.sources_stay_cached))
            loader = LayeredLoader(plan, files)
            loader.load(device=placement.device, dtype=dtype, trust_remote_code=trust_remote_code)
            self.model, self.groups = loader.model, loader.groups
            _check(loader, plan, files)
            kernel = choose_kernel(plan, placement.device)
            self._blender = Blender(kernel, make_source(plan, files, placement))
            row_source = make_source(replace(plan, steps=()), row_files, placement)
            self._row_blender = Blender(kernel, row_source)
            self._held = self._hold(loader.layers)
            self.sink = LiveSink(self.model, self._held, self.groups, self._blender.source)
            kept = spread_layers(len(loader.layers), placement.kept_layers)
            self._dropped = _find_uncached(loader.layers, kept, placement)
            turnstile = LayerTurnstile(
                len(loader.layers), loader.find_owners(), placement.batches_at_once
            )
            self.run_batches = turnstile.run_batches
            opened.callback(turnstile.close)
            self._layers = StreamedLayers(
                loader.layers, self._fill_layer, placement.device, kept, turnstile.wait
            )
            opened.callback(self._layers.close)
            self._layers.start(0.0)
            self._opened = opened.pop_all()

    def _hold(self, layers: Iterable[DecoderLayer]) -> Plan:
        """The plan of what alpha changes outside of the layers and gets memory of its own.

        CannotStreamError if the head cannot do without.
        """
        streamed = {name for layer in layers for name in layer.names}
        changed = {
            step.name: step
            for step in self._plan.steps
            if step.action == "interpolate" and step.name not in streamed
        }
        groups = [group for group in self.groups if not changed.keys().isdisjoint(group.names)]
        self._untie([target for group in groups for target in group.targets])
        for group in groups:
            if users := self._find_table_users(group):
                self._put_table(users, group.targets[0], changed.pop(group.names[0]))
                continue
            if self._placement.device == "cpu":  # elsewhere they do not lie in the file
                for target in group.targets:
                    param = find_tensor(self.model, target)
                    param.data = param.data.clone()
        head_weight = getattr(self.model.get_output_embeddings(), "weight", None)
        if self._placement.head_in_windows and type(head_weight) is not VocabularyTable:
            raise CannotStreamError(f"the head of {type(self.model).__name__} must be held whole")
        return replace(self._plan, steps=tuple(changed.values()))

    def _untie(self, targets: Iterable[str]) -> None:
        """Let each have a tensor of its own: what is equal on disk may come to differ."""
        seen: set[int] = set()
        for target in targets:
            if id(find_tensor(self.model, target)) in seen:
                untie_parameter(self.model, target)
            seen.add(id(find_tensor(self.model, target)))

    def _find_table_users(self, group: TensorGroup) -> list[Any]:
        """The modules that use a weight, if they need no more of it than some rows at a time."""
        if group.operations or isinstance(self._plan, Mixture):
            return []  # some methods choose elements by their place in the whole
        param = find_tensor(self.model, group.targets[0])
        users = [
            module
            for module in self.model.modules()
            if any(each is param for each in module._parameters.values())
        ]
        head = self.model.get_output_embeddings() if self._placement.head_in_windows else None
        can_do = (
            isinstance(user, torch.nn.Linear if user is head else torch.nn.Embedding)
            for user in users
        )
        return users if all(can_do) else []

    def _put_table(self, users: Iterable[Any], target: str, step: Step) -> None:
        param = find_tensor(self.model, target)
        table = VocabularyTable.replacing(param, RowBlender(step, param, self._fill_rows))
        for user in users:
            user._parameters["weight"] = table

    def apply(self, alpha: Alpha, progress: Callable[[int], None] | None) -> None:
        """Blend what is held; the layers are blended as they run."""
        self._layers.discard()
        self.sink.discard()
        self._alpha = alpha
        evict = not self._placement.sources_stay_cached
        self._blender.blend(self._held, alpha, self.sink, evict=evict, progress=progress)
        self._layers.start(alpha)

    def _fill_layer(self, layer: DecoderLayer, alpha: Alpha) -> None:
        source, steps = self._blender.source, layer.plan.steps
        sink = LiveSink(self.model, layer.plan, layer.groups, source, steps=steps)
        self._blender.blend(layer.plan, alpha, sink, evict=layer in self._dropped)

    def _fill_rows(self, step: Step, content: torch.Tensor) -> None:
        sink = TableSink(content, self._row_blender.source)
        self._row_blender.blend(replace(self._plan, steps=(step,)), self._alpha, sink)

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


def _find_uncached(
    layers: Sequence[DecoderLayer], kept: frozenset[int], placement: Placement
) -> set[DecoderLayer]:
    """The layers whose sources find no room in the page cache.

    Dropped once they were used, they do not push out the others, which are found there again. Those
    that are kept come last: theirs are read once an alpha, the others' for each token.
    """
    free_bytes = placement.page_cache_bytes
    dropped = set()
    for index in sorted(range(len(layers)), key=lambda index: (index in kept, index)):
        layer = layers[index]
        blended = (part for _, part in layer.plan.parts if part.donor)
        free_bytes -= sum(side.nbytes for part in blended for side in part.sides)
        if free_bytes < 0 and not placement.sources_stay_cached:
            dropped.add(layer)
    return dropped
