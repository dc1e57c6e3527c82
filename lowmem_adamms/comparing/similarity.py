"""How far apart two sides' values are: sums over elements at the same place, read or streamed.

Either a sample of each pair, by a few small reads, or everything: through mapped files, whose pages
are let go behind the stream, or through ranges of files on the Hub. Sums are float64, in which
every product of two bf16, fp16 or fp32 values is exact. Leaves to others: what is paired
(`pairing.py`) and what it means (`compare.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ..checkpoints.mapped_files import MappedFiles, read_ahead
from ..checkpoints.sampled_reads import Remote, SampledReader
from ..checkpoints.span import Span
from ..mapping.kinship import RUN_ELEMENTS, cosine_of
from ..merging import range_source as ranges
from ..merging.loop import AHEAD, LARGEST_ITEM, Source
from .pairing import Pair, Piece

if TYPE_CHECKING:
    from collections.abc import Iterable

SAMPLE = 4096
"""Elements of each pair, in evenly spread runs of kinship's RUN_ELEMENTS."""
WINDOW = 4 << 20
"""Elements read at a time where all are read."""


@dataclass(frozen=True, slots=True)
class Measure:
    """Sums over elements of a and b that stand at the same place.

    total: elements there are. read: of these, looked at. finite: finite on both sides; the products
    ab, aa, bb and dd (of d = a - b) are summed over these. equal: equal in bits (of two dtypes: in
    value). odd_a, odd_b: NaN or infinite.
    """

    total: int = 0
    read: int = 0
    finite: int = 0
    equal: int = 0
    odd_a: int = 0
    odd_b: int = 0
    ab: float = 0.0
    aa: float = 0.0
    bb: float = 0.0
    dd: float = 0.0

    def __add__(self, other: Measure) -> Measure:
        names = (field.name for field in fields(self))
        return Measure(*(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def cosine(self) -> float | None:
        """Cosine similarity: 1 if all finite elements are equal; None where none is finite."""
        if not self.finite:
            return None
        cosine = 1.0 if self.dd == 0 else cosine_of(self.ab, self.aa, self.bb)
        return min(1.0, max(-1.0, cosine))

    @property
    def distance(self) -> float | None:
        """||a - b|| / ||a||; None where nothing is finite, or a is all zero and b is not."""
        if not self.finite or (self.aa == 0 and self.dd > 0):
            return None
        return math.sqrt(self.dd / self.aa) if self.dd else 0.0

    @property
    def identical(self) -> bool:
        """Whether every element that was read is equal."""
        return self.equal == self.read

    def to_json(self) -> dict[str, Any]:
        """Counts, cosine, distance, and the norms of what was read."""
        return {
            "elements": self.total,
            "read": self.read,
            "equal": self.equal,
            "identical": self.identical,
            "cosine": self.cosine,
            "distance": self.distance,
            "norms": [math.sqrt(self.aa), math.sqrt(self.bb)],
            "not_finite": [self.odd_a, self.odd_b],
        }


def sampled(
    pairs: Sequence[Pair], sample: int = SAMPLE, *, remote: Remote | None = None
) -> tuple[Measure, ...]:
    """A measure of each pair from at most `sample` of its elements.

    Of `remote` files, which are asked for many at once, one run is read from the middle.
    """
    from ..kernels import reference

    longest = sample if remote else RUN_ELEMENTS

    def measured(pair: Pair) -> Measure:
        sums = [0.0] * len(reference.SUMS)
        for a, b in _sample(pair.pieces, sample, longest):
            found = reference.relate(
                reads.read_bits(a), reads.read_bits(b), (a.dtype.name, b.dtype.name)
            )
            sums = [x + y for x, y in zip(sums, found, strict=True)]
        return _measure(pair, sums)

    with SampledReader(remote) as reads:
        return tuple(reads.map(measured, pairs))


def streamed(
    pairs: Sequence[Pair],
    *,
    remote: Remote | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Measure, ...]:
    """A measure of each pair from all its elements; progress is told the bytes read since."""
    from ..kernels import reference, select

    relate = select.relation()
    sums = [[0.0] * len(reference.SUMS) for _ in pairs]
    window = ranges.WINDOW // LARGEST_ITEM if remote else WINDOW
    with ExitStack() as stack:
        far: ranges.RangeSource | None = None
        if remote:
            spans = (spans for _, *spans in _windows(pairs, window))
            far = stack.enter_context(ranges.RangeSource(remote, spans))
        files: Source = far or stack.enter_context(MappedFiles())
        # One reader a side: the kernel reads ahead well only where a file is read in order
        *readers, releaser = (stack.enter_context(ThreadPoolExecutor(1)) for _ in range(3))
        windows = _windows(pairs, window)
        for i, a, b in read_ahead(windows, _spans, files.prefetch, readers, AHEAD):
            found = relate(files.view(a), files.view(b), (a.dtype.name, b.dtype.name))
            sums[i] = [x + y for x, y in zip(sums[i], found.tolist(), strict=True)]
            for span in (a, b):
                if let_go := files.release(span, evict=False):
                    releaser.submit(let_go)
            if progress:
                progress(a.nbytes + b.nbytes)
        if far:
            far.finish()
    return tuple(_measure(pair, found) for pair, found in zip(pairs, sums, strict=True))


def middles(held: Iterable[Sequence[Span]], *, remote: Remote | None = None) -> list[Any]:
    """Of each group of spans, taken as one, RUN_ELEMENTS from its middle as float64."""
    import numpy as np

    def middle(spans: Sequence[Span]) -> Any:
        alone = [Piece((span, span), ("", "")) for span in spans]
        found = _sample(alone, RUN_ELEMENTS, RUN_ELEMENTS)
        return np.concatenate([reads.read_floats(span) for span, _ in found])

    with SampledReader(remote) as reads:
        return list(reads.map(middle, held))


def _measure(pair: Pair, sums: Sequence[float]) -> Measure:
    return Measure(pair.elements, *map(int, sums[:5]), *map(float, sums[5:]))


def _sample(pieces: Sequence[Piece], sample: int, longest: int) -> Iterator[tuple[Span, Span]]:
    """Each stretch to read, of both sides.

    The pieces count as one long row. Runs of `longest` are spread from its start to its end; a
    single one lies in the middle, where kinship looks.
    """
    total = sum(piece.spans[0].elements for piece in pieces)
    take = min(total, sample)
    runs = -(-take // longest)
    if take == total or runs < 2:
        yield from _stretches(pieces, (total - take) // 2, take)
        return
    sizes = [longest] * (runs - 1) + [take - longest * (runs - 1)]
    for i, size in enumerate(sizes):
        yield from _stretches(pieces, (total - longest) * i // (runs - 1), size)


def _stretches(pieces: Sequence[Piece], first: int, count: int) -> Iterator[tuple[Span, Span]]:
    """Elements `first` to `first + count` of the row, cut where a piece ends."""
    start = 0
    for piece in pieces:
        a, b = piece.spans
        stop = start + a.elements
        low, high = max(first, start), min(first + count, stop)
        if low < high:
            yield a.flat_slice(low - start, high - low), b.flat_slice(low - start, high - low)
        start = stop


_Window = tuple[int, Span, Span]


def _windows(pairs: Sequence[Pair], size: int) -> Iterator[_Window]:
    """All pieces of all pairs in the order of a's bytes, a window at a time."""
    todo = [(i, *piece.spans) for i, pair in enumerate(pairs) for piece in pair.pieces]
    for i, a, b in sorted(todo, key=lambda item: (str(item[1].path), item[1].start)):
        for first in range(0, a.elements, size):
            count = min(size, a.elements - first)
            yield i, a.flat_slice(first, count), b.flat_slice(first, count)


def _spans(window: _Window) -> tuple[tuple[Span, Span]]:
    return (window[1:],)
