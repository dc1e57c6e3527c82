"""Batches that share each reading of a layer: all go through it before the next one is read.

Each batch is answered in a thread of its own, of which one runs at a time. Where a layer begins, a
thread gives way to those that are further behind. What a model notes on itself between passes
(Qwen2-VL its positions) is swapped with the batches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

import torch

from .transformers_model import quiet

T = TypeVar("T")
R = TypeVar("R")
Notes = list[dict[str, Any]]


class _CancelledError(BaseException):
    """Another batch has failed, or the user gave up."""


class LayerTurnstile:
    """Runs batches side by side, in step at every layer.

    layers: how many there are. owners: the modules that the layers are inside of. at_once: batches,
    at most.
    """

    def __init__(self, layers: int, owners: Sequence[Any], at_once: int) -> None:
        self._layers, self._owners, self._at_once = layers, owners, at_once
        self._changed = threading.Condition()
        self._waiting: dict[int, int] = {}  # by thread, the layer before which it waits
        self._runner: int | None = None
        self._layer = 0  # the one that was entered last
        self._is_cancelled = False

    def run_batches(self, answer: Callable[[T], R], batches: Iterable[T]) -> Iterator[R]:
        """What `answer` returns for each batch, in the order in which they are done."""
        todo = list(batches)
        count = min(self._at_once, len(todo))
        if count <= 1:
            yield from map(answer, todo)
            return
        before = self._take_notes()
        self._is_cancelled, self._layer = False, 0
        self._runner = threading.get_ident()  # until all have come
        try:
            with quiet(), ThreadPoolExecutor(count, thread_name_prefix="batch") as pool:
                futures = [pool.submit(self._run, answer, batch, before) for batch in todo]
                try:
                    with self._changed:
                        self._changed.wait_for(lambda: len(self._waiting) == count)
                        self._give_way()
                    for future in as_completed(futures):
                        yield future.result()
                except BaseException:
                    self._cancel()
                    for future in futures:
                        future.cancel()
                    raise
        finally:
            self._put_notes(before)

    def wait(self, layer: int) -> None:
        """Before a layer: let the batches go first that are further behind."""
        if self._runner != threading.get_ident():
            return  # there is one batch, and it runs in no thread of ours
        with self._changed:
            if not self._waiting and not self._is_cancelled:
                self._layer = layer
                return
        notes = self._take_notes()
        with self._changed:
            self._give_way()
            self._take_turn(layer)
        self._put_notes(notes)

    def close(self) -> None:
        """Let go of the model."""
        self._owners = ()

    def _run(self, answer: Callable[[T], R], batch: T, notes: Notes) -> R:
        with self._changed:
            self._take_turn(0)
        try:
            self._put_notes(notes)
            with torch.inference_mode():
                return answer(batch)
        finally:
            with self._changed:
                if self._runner == threading.get_ident():
                    self._give_way()

    def _take_turn(self, layer: int) -> None:
        me = threading.get_ident()
        self._waiting[me] = layer
        self._changed.notify_all()
        try:
            self._changed.wait_for(lambda: self._is_cancelled or self._is_next(me))
        finally:
            del self._waiting[me]
        if self._is_cancelled:
            raise _CancelledError
        self._runner, self._layer = me, layer

    def _is_next(self, thread: int) -> bool:
        """Whether it is its turn: of those that come next after the last layer, who came first."""
        if self._runner is not None:
            return False
        behind = {each: (at - self._layer) % self._layers for each, at in self._waiting.items()}
        return thread == min(behind, key=lambda each: behind[each])

    def _give_way(self) -> None:
        self._runner = None
        self._changed.notify_all()

    def _cancel(self) -> None:
        with self._changed:
            self._is_cancelled = True
            self._changed.notify_all()

    def _take_notes(self) -> Notes:
        return [dict(vars(owner)) for owner in self._owners]

    def _put_notes(self, notes: Notes) -> None:
        for owner, attributes in zip(self._owners, notes, strict=True):
            vars(owner).update(attributes)  # first: another thread looks up layers meanwhile
            for name in vars(owner).keys() - attributes.keys():
                del vars(owner)[name]
