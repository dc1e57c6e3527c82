"""One buffer of fixed size, for what is needed and done with in about the same order."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..checkpoints.mapped_files import Bytes

ALIGNMENT = 64


@dataclass(slots=True)
class _Stretch:
    start: int
    stop: int
    in_use: bool = True


class RingBuffer:
    """Hands out stretches of one buffer. Not safe for threads by itself.

    A stretch can be taken again once it and everything handed out before it is given back.
    """

    def __init__(self, nbytes: int) -> None:
        import numpy as np

        self._buffer = np.empty(nbytes, np.uint8)
        self._taken: deque[_Stretch] = deque()  # oldest first

    def take(self, nbytes: int) -> Bytes | None:
        """A stretch that starts at a multiple of ALIGNMENT, or None if there is no room now."""
        nbytes = -(-nbytes // ALIGNMENT) * ALIGNMENT
        start = self._find_start(nbytes)
        if start is None:
            return None
        self._taken.append(_Stretch(start, start + nbytes))
        return self._buffer[start : start + nbytes]

    def give_back(self, stretch: Bytes) -> None:
        """Take back what `take` returned."""
        start = _address(stretch) - _address(self._buffer)
        for taken in self._taken:
            if taken.start == start and taken.in_use:
                taken.in_use = False
                break
        while self._taken and not self._taken[0].in_use:
            self._taken.popleft()

    def _find_start(self, nbytes: int) -> int | None:
        if not self._taken:
            return 0 if nbytes <= self._buffer.size else None
        oldest, end = self._taken[0].start, self._taken[-1].stop
        if end <= oldest:  # wrapped: what is free lies between the newest and the oldest
            return end if end + nbytes <= oldest else None
        if end + nbytes <= self._buffer.size:
            return end
        return 0 if nbytes <= oldest else None


def _address(stretch: Bytes) -> int:
    address: int = stretch.__array_interface__["data"][0]
    return address
