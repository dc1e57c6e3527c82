"""Distance and cosine similarity of paired tensors, from a sample of their elements.

Sums are float64, in which every product of two bf16, fp16 or fp32 values is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ..checkpoints.arranged import Arranged, take_alike
from ..checkpoints.sampled_reads import Remote, SampledReader, evenly_spread
from ..checkpoints.span import Span
from ..mapping.kinship import RUN_ELEMENTS, cosine_of
from .pairing import RolePair, SpanPair

if TYPE_CHECKING:
    from ..kernels.reference import Bits

SAMPLE_ELEMENTS = 4096
"""Elements read of each pair, in evenly spread runs of kinship's RUN_ELEMENTS."""


@dataclass(frozen=True, slots=True)
class Similarity:
    """Counts and sums over elements of A and B that stand at the same place."""

    elements: int = 0
    read: int = 0  # of the elements; the counts below are of those that were read
    finite: int = 0  # on both sides; the sums below are over these
    equal: int = 0  # in bits, or in value where the dtypes differ
    nonfinite_a: int = 0  # NaN or infinite
    nonfinite_b: int = 0
    ab: float = 0.0  # A * B
    aa: float = 0.0  # A * A
    bb: float = 0.0  # B * B
    dd: float = 0.0  # (A - B) squared

    def __add__(self, other: Similarity) -> Similarity:
        names = (field.name for field in fields(self))
        return Similarity(*(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def cosine(self) -> float | None:
        """Cosine similarity: 1 if all finite elements are equal; None if none is finite."""
        if not self.finite:
            return None
        cosine = 1.0 if self.dd == 0 else cosine_of(self.ab, self.aa, self.bb)
        return min(1.0, max(-1.0, cosine))

    @property
    def distance(self) -> float | None:
        """||A - B|| / ||A||; None if nothing is finite, or A is all zero and B is not."""
        if not self.finite or (self.aa == 0 and self.dd > 0):
            return None
        return math.sqrt(self.dd / self.aa) if self.dd else 0.0

    @property
    def is_identical(self) -> bool:
        """Whether every element that was read is equal."""
        return self.equal == self.read

    def to_json(self) -> dict[str, Any]:
        """Counts, cosine, distance, and the norms of what was read."""
        return {
            "elements": self.elements,
            "read": self.read,
            "equal": self.equal,
            "identical": self.is_identical,
            "cosine": self.cosine,
            "distance": self.distance,
            "norms": [math.sqrt(self.aa), math.sqrt(self.bb)],
            "not_finite": [self.nonfinite_a, self.nonfinite_b],
        }


def measure_pairs(
    pairs: Sequence[RolePair], sample: int = SAMPLE_ELEMENTS, *, remote: Remote | None = None
) -> tuple[Similarity, ...]:
    """Measure each pair by at most `sample` of its elements.

    Of files in `remote`, where each read is a request, one run is read from the middle.
    """
    run_elements = sample if remote else RUN_ELEMENTS

    def measure(pair: RolePair) -> Similarity:
        total = Similarity()
        for a, b in _choose_runs(pair.pieces, sample, run_elements):
            bits = reader.read_bits(a), reader.read_bits(b)
            total += compare_bits(*bits, (a.dtype.name, b.dtype.name))
        return replace(total, elements=pair.elements)

    with SampledReader(remote) as reader:
        return tuple(reader.map(measure, pairs))


def compare_bits(a: Bits, b: Bits, dtype_names: tuple[str, str]) -> Similarity:
    """Compare two storage arrays of one length (see `kernels/reference.py`)."""
    import numpy as np

    from ..kernels import reference

    x, y = reference.widen(a, dtype_names[0]), reference.widen(b, dtype_names[1])
    same_value = (x == y) | (np.isnan(x) & np.isnan(y))
    equal = a == b if dtype_names[0] == dtype_names[1] else same_value
    x_finite, y_finite = np.isfinite(x), np.isfinite(y)
    finite = x_finite & y_finite
    x, y = x[finite], y[finite]
    return Similarity(
        read=a.size,
        finite=int(finite.sum()),
        equal=int(equal.sum()),
        nonfinite_a=int((~x_finite).sum()),
        nonfinite_b=int((~y_finite).sum()),
        ab=float(x @ y),
        aa=float(x @ x),
        bb=float(y @ y),
        dd=float((x - y) @ (x - y)),
    )


def _choose_runs(
    pieces: Sequence[SpanPair], sample: int, run_elements: int
) -> Iterator[tuple[Span | Arranged, ...]]:
    """The stretches of both sides to read: `sample` elements of the pieces, taken as one long row.

    Runs are spread from start to end; a single one lies in the middle, where kinship looks.
    """
    total = sum(piece.elements for piece in pieces)
    sample = min(sample, total)
    runs = -(-sample // run_elements)
    if sample == total or runs < 2:
        yield from _slice_pieces(pieces, (total - sample) // 2, sample)
        return
    left = sample
    for start in evenly_spread(total, run_elements, runs):
        yield from _slice_pieces(pieces, start, min(run_elements, left))
        left -= run_elements


def _slice_pieces(
    pieces: Sequence[SpanPair], first: int, count: int
) -> Iterator[tuple[Span | Arranged, ...]]:
    """Elements `first` to `first + count` of the row, cut where a piece ends."""
    start = 0
    for piece in pieces:
        stop = start + piece.elements
        low, high = max(first, start), min(first + count, stop)
        if low < high:
            yield take_alike(piece.spans, low - start, high - low)
        start = stop
