"""Decoder layers filled as they run: two buffers that they share, one thread that fills them.

When a layer is about to run, a hook waits for its buffer and has the other one filled with the
layer that ran after it the last time (at first, the next in order). Where there is memory for more,
some layers have a buffer of their own, which is filled once an alpha. On a card the filling is
queued on a stream of its own, and events keep it and the running layers apart; the CPU has the same
calls, which do nothing there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import torch

from ..errors import RecipeError
from ..mapping.alphas import Alpha
from .decoder_layers import DecoderLayer

Fill = Callable[[DecoderLayer, Alpha], None]
"""Writes a bound layer's tensors at an alpha."""


class _Buffer:
    """Memory for one layer. index: of the layer that is, or is being put, in it."""

    def __init__(self, nbytes: int, device: str) -> None:
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.index: int | None = None
        self.filled: Future[None] = Future()
        self.filled.set_result(None)
        self.event: Any = torch.get_device_module(device).Event()


def spread_layers(count: int, kept: int) -> frozenset[int]:
    """Which of so many layers stay in memory: as many as asked for, at even distances.

    While they run there is time to fill the others.
    """
    kept = min(kept, count)
    return frozenset(i for i in range(count) if i * kept // count < (i + 1) * kept // count)


class StreamedLayers:
    """The layers of a model, each filled just before it runs.

    fill: called in a thread of this object, for one layer after the other. kept: the numbers of
    those that are filled once an alpha. wait: called with a layer's number before it runs; one
    thread at a time may return from it.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        fill: Fill,
        device: str,
        kept: frozenset[int] = frozenset(),
        wait: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._layers, self._fill, self._wait = layers, fill, wait
        self._alpha: Alpha | None = None
        self._next = [*range(1, len(layers)), 0]
        self._last_layer: int | None = None
        self._device = torch.get_device_module(device)
        self._stream = self._device.Stream()
        self._own = {index: _Buffer(layers[index].nbytes, device) for index in sorted(kept)}
        others = [layer.nbytes for index, layer in enumerate(layers) if index not in kept]
        self._shared = [_Buffer(max(others), device) for _ in others[:2]]
        self._filler = ThreadPoolExecutor(1, thread_name_prefix="layer filler")
        self._hooks = [
            layer.module.register_forward_pre_hook(partial(self._before_layer, index))
            for index, layer in enumerate(layers)
        ]

    def start(self, alpha: Alpha) -> None:
        """Fill layers at this alpha from now on, the first one at once."""
        self.discard()
        self._alpha = alpha
        self._buffer_of(0)

    def discard(self) -> None:
        """Forget what is in the buffers. The layers cannot run until the next `start`."""
        self._alpha = None
        buffers = [*self._own.values(), *self._shared]
        wait([buffer.filled for buffer in buffers])
        for buffer in buffers:
            self._empty(buffer)

    def close(self) -> None:
        """End the thread and let go of layers and memory."""
        self._filler.shutdown()
        self.discard()
        self._device.synchronize()  # or a card might still be writing to the buffers
        for hook in self._hooks:
            hook.remove()
        self._layers, self._own, self._shared, self._hooks = (), {}, [], []

    def _before_layer(self, index: int, *_: Any) -> None:
        """Have the layer's tensors ready, and the next layer's on their way."""
        self._wait(index)
        buffer = self._buffer_of(index)
        try:
            buffer.filled.result()
        except BaseException:
            self._empty(buffer)
            raise
        self._device.current_stream().wait_event(buffer.event)
        if self._last_layer not in (None, index):
            self._next[self._last_layer] = index
        self._last_layer = index
        if index not in self._own and buffer is not self._shared[-1]:
            self._shared.reverse()  # the last one is in use
        self._fill_ahead(index)

    def _fill_ahead(self, index: int) -> None:
        """Have the next layer filled that is not in memory to stay."""
        for _ in self._layers:
            index = self._next[index]
            if index not in self._own or self._own[index].index is None:
                self._buffer_of(index)
                return

    def _buffer_of(self, index: int) -> _Buffer:
        """The buffer that has the layer, or else its own or the one not in use, being filled."""
        own = self._own.get(index)
        for buffer in self._shared if own is None else [own]:
            if buffer.index == index:
                return buffer
        if self._alpha is None:
            raise RecipeError("the model is at no alpha: an apply did not end; call apply again")
        buffer = own or self._shared[0]
        self._empty(buffer)
        self._layers[index].bind(buffer.memory)
        buffer.index = index
        unused = self._device.Event()
        unused.record()  # the layer that was in it has been queued before this, on this stream
        buffer.filled = self._filler.submit(self._fill_buffer, buffer, index, self._alpha, unused)
        return buffer

    def _fill_buffer(self, buffer: _Buffer, index: int, alpha: Alpha, unused: Any) -> None:
        with self._device.stream(self._stream):
            self._stream.wait_event(unused)
            self._fill(self._layers[index], alpha)
            buffer.event.record()

    def _empty(self, buffer: _Buffer) -> None:
        if buffer.index is not None:
            self._layers[buffer.index].unbind()
            buffer.index = None
