"""Batches that share each reading of a layer: all go through it before the next one is read.

Each batch is answered in a greenlet of its own, of which one runs at a time. Where a layer begins,
it gives way to those that are further behind. All of them are one thread, because every thread
would bring a team of OpenMP's, to be woken at each turn. What a model notes on itself between
passes (Qwen2-VL its positions) is swapped with the batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from .transformers_model import quiet

T = TypeVar("T")
R = TypeVar("R")
Notes = list[dict[str, Any]]


class _Batch:
    """A batch under way. layer: before which it waits. notes: the model's own, meanwhile."""

    def __init__(self, answer: Callable[[], Any], notes: Notes) -> None:
        from greenlet import greenlet  # here: an engine's environment may do without

        self.run = greenlet(answer)
        self.layer, self.notes = 0, notes


class LayerTurnstile:
    """Runs batches side by side, in step at every layer.

    layers: how many there are. owners: the modules that the layers are inside of. at_once: batches,
    at most.
    """

    def __init__(self, layers: int, owners: Sequence[Any], at_once: int) -> None:
        self._layers, self._owners, self._at_once = layers, owners, at_once
        self._running: _Batch | None = None

    def run_batches(self, answer: Callable[[T], R], batches: Iterable[T]) -> Iterator[R]:
        """What `answer` returns for each batch, in the order in which they are done."""
        todo = deque(batches)
        if min(self._at_once, len(todo)) <= 1:
            yield from map(answer, todo)
            return
        before = self._take_notes()
        waiting: list[_Batch] = []  # those that came first stand first
        layer = 0
        try:
            with quiet():
                while todo or waiting:
                    while todo and len(waiting) < self._at_once:
                        waiting.append(_Batch(partial(answer, todo.popleft()), before))
                    behind = [(batch.layer - layer) % self._layers for batch in waiting]
                    batch = waiting.pop(behind.index(min(behind)))
                    layer = batch.layer
                    result = self._run(batch)
                    if batch.run.dead:
                        yield result
                    else:
                        waiting.append(batch)
        finally:
            for batch in waiting:
                batch.run.throw()
            self._put_notes(before)

    def _run(self, batch: _Batch) -> Any:
        """Let it go on up to its next layer, or to its end, which returns its answers."""
        self._put_notes(batch.notes)
        self._running = batch
        try:
            return batch.run.switch()
        finally:
            self._running = None
            batch.notes = self._take_notes()

    def wait(self, layer: int) -> None:
        """Before a layer: let the batches go first that are further behind."""
        if self._running is not None:
            self._running.layer = layer
            self._running.run.parent.switch()

    def close(self) -> None:
        """Let go of the model."""
        self._owners = ()

    def _take_notes(self) -> Notes:
        return [dict(vars(owner)) for owner in self._owners]

    def _put_notes(self, notes: Notes) -> None:
        for owner, attributes in zip(self._owners, notes, strict=True):
            vars(owner).update(attributes)  # first: another thread looks up layers meanwhile
            for name in vars(owner).keys() - attributes.keys():
                del vars(owner)[name]
