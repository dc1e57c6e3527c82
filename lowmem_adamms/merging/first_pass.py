"""The first pass over a tensor that some methods need: ranks of magnitudes, scalar products.

Nothing is sorted and nothing is copied: magnitudes are counted, one counter for each value that the
output's dtype has, and the value of a rank is read off the counts. It is exact. What is found is
kept in the mixture, so that a search reads each tensor once more than it has alphas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..checkpoints.arranged import Arranged, spans_begun, spans_ended, view_side
from ..checkpoints.mapped_files import MappedFiles, read_ahead
from ..checkpoints.span import Span
from ..mapping.mixture import MixedPart, Mixture
from ..mapping.plan import Step
from .range_source import RangeSource
from .sources import remote_shards

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Counts = npt.NDArray[np.int64]

PIECE = 1 << 20
"""Elements of a tensor that are looked at together; a multiple of `reference.SUM_BLOCK`."""
AHEAD = 3
WHOLE_MODEL = ""
"""Where `Mixture.found` keeps what is true of all tensors; no tensor has this name."""
COLLINEAR = 0.9995
"""A cosine beyond this makes slerp linear, as in mergekit."""
_BINS = 1 << 15
_FINE_BINS = 1 << 16


@dataclass(frozen=True, slots=True)
class Found:
    """What a first pass found, by model; 0 is the base.

    bounds: the smallest and the largest magnitude that count. factors: of the model's weight.
    angle: between base and donor, None where they are collinear.
    """

    bounds: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    factors: Mapping[int, float] = field(default_factory=dict)
    angle: float | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive elements of a part, of its models by number and of the ancestor."""

    models: Mapping[int, Span | Arranged]
    ancestor: Span | Arranged | None

    @property
    def sides(self) -> tuple[Span | Arranged, ...]:
        """Everything that is read."""
        return (*self.models.values(), *([self.ancestor] if self.ancestor else []))


Look = Callable[[Piece, Mapping[int, Any], Any], None]
"""look(piece, contents of its models by number, content of the ancestor)."""


def find(mixture: Mixture, step: Step) -> Found:
    """What the method must know of a tensor before it mixes it; reads the tensor once or twice."""
    method = mixture.method
    if method.measure is None:
        return Found()
    is_global = method.measure == "squares" or mixture.trim == "model"
    key = WHOLE_MODEL if is_global else step.name
    if key not in mixture.found:
        steps = mixture.all_steps if is_global else (step,)
        mixture.found[key] = _MEASURES[method.measure](mixture, steps)
    found: Found = mixture.found[key]
    return found


def _find_bounds(mixture: Mixture, steps: Sequence[Step]) -> Found:
    """The magnitudes between which the wanted share of each model's differences lies.

    Kept are the values of ranks `outliers` to `outliers` + density, counted from the largest, at
    least one, and those equal to the last of them.
    """
    from ..kernels.reference import smallest_rounded_to

    dtypes = {step.dtype.name for step in steps if step.action != "copy"}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
    coarse = _count(mixture, steps, dtype, {})
    bounds: dict[int, tuple[float, float]] = {}
    for model, counts in coarse.items():
        total = int(counts.sum())
        above = int(mixture.method.outliers * total)
        kept = max(1, int(mixture.densities[model] * total))
        smallest = _magnitude(mixture, steps, dtype, model, counts, min(above + kept, total))
        # Differences are compared before they are rounded, as the magnitudes that are counted were
        low, high = smallest_rounded_to(smallest, dtype), math.inf
        if above:
            largest = _magnitude(mixture, steps, dtype, model, counts, above + 1)
            high = math.nextafter(smallest_rounded_to(largest + 1, dtype), -math.inf)
        bounds[model] = low, high
    return Found(bounds=bounds)


def _magnitude(
    mixture: Mixture, steps: Sequence[Step], dtype: str, model: int, counts: Counts, rank: int
) -> int:
    """The bits of the magnitude that is at a rank, 1 being the largest."""
    word, rank_within = _at_rank(counts, rank)
    if dtype != "F32":
        return word
    fine = _count(mixture, steps, dtype, {model: word})[model]
    return word << 16 | _at_rank(fine, rank_within)[0]


def _at_rank(counts: Counts, rank: int) -> tuple[int, int]:
    """The counter that holds a rank, and the rank within it."""
    import numpy as np

    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, rank))
    return len(counts) - 1 - place, rank - (int(above[place - 1]) if place else 0)


def _count(
    mixture: Mixture, steps: Sequence[Step], dtype: str, prefixes: Mapping[int, int]
) -> dict[int, Counts]:
    """Count the magnitudes of each model's differences, or of some models' beyond a prefix."""
    import numpy as np

    from ..kernels.select import count_magnitudes

    counts: dict[int, Counts] = {}

    def look(piece: Piece, contents: Mapping[int, Any], ancestor: Any) -> None:
        assert piece.ancestor is not None
        for model, content in contents.items():
            if prefixes and model not in prefixes:
                continue
            table = counts.setdefault(model, np.zeros(_FINE_BINS if prefixes else _BINS, np.int64))
            dtypes = (piece.models[model].dtype.name, piece.ancestor.dtype.name, dtype)
            count_magnitudes(content, ancestor, dtypes, table, prefixes.get(model, -1))

    _read(mixture, steps, look)
    return counts


def _find_angle(mixture: Mixture, steps: Sequence[Step]) -> Found:
    """The angle between base and donor."""
    pairs = ((0, 0), (1, 1), (0, 1))
    base, donor, both = _sum(mixture, steps, pairs)
    if base <= 0 or donor <= 0:
        return Found()
    cosine = max(-1.0, min(1.0, both / math.sqrt(base) / math.sqrt(donor)))
    return Found(angle=math.acos(cosine) if abs(cosine) <= COLLINEAR else None)


def _find_shares(mixture: Mixture, steps: Sequence[Step]) -> Found:
    """Each model's share of the sum of all squared norms."""
    models = range(len(mixture.plans) + 1)
    squares = _sum(mixture, steps, [(model, model) for model in models])
    total = math.fsum(squares)
    shares = {model: squares[model] / total if total else 0.0 for model in models}
    return Found(factors=shares)


_MEASURES = {"magnitudes": _find_bounds, "products": _find_angle, "squares": _find_shares}


def _sum(mixture: Mixture, steps: Sequence[Step], pairs: Sequence[tuple[int, int]]) -> list[float]:
    """Scalar products of pairs of models, or of their differences from the ancestor."""
    from ..kernels.select import sum_products

    terms: list[list[float]] = [[] for _ in pairs]

    def look(piece: Piece, contents: Mapping[int, Any], ancestor: Any) -> None:
        models = list(contents)
        streams = [*contents.values(), *([ancestor] if piece.ancestor else [])]
        here = [pair for pair in pairs if set(pair) <= set(models)]
        places = [(models.index(a), models.index(b)) for a, b in here]
        dtypes = [side.dtype.name for side in piece.sides]
        sums = sum_products(streams, dtypes, places, piece.ancestor is not None)
        for pair, column in zip(here, sums.T, strict=True):
            terms[pairs.index(pair)].append(math.fsum(column))

    _read(mixture, steps, look)
    return [math.fsum(each) for each in terms]


# Reading


def _read(mixture: Mixture, steps: Sequence[Step], look: Look) -> None:
    """Show every piece of what is mixed, in order."""
    remote = remote_shards(mixture)
    with ExitStack() as stack:
        source: Any = MappedFiles()
        if remote:
            source = RangeSource(remote, (spans_begun(piece.sides) for piece in _pieces(steps)))
        stack.enter_context(source)
        sides = max((len(spans_begun(piece.sides)) for piece in _pieces(steps)), default=0)
        readers = [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(sides)]
        for piece in read_ahead(
            _pieces(steps),
            lambda piece: [spans_begun(piece.sides)],
            source.prefetch,
            readers,
            AHEAD,
        ):
            contents = {model: view_side(side, source.view) for model, side in piece.models.items()}
            ancestor = view_side(piece.ancestor, source.view) if piece.ancestor else None
            look(piece, contents, ancestor)
            for span in spans_ended(piece.sides):
                if release := source.release(span, evict=False):
                    release()


def _pieces(steps: Sequence[Step]) -> Iterator[Piece]:
    for step in steps:
        for part in step.parts:
            if not isinstance(part, MixedPart) or part.donor is None:
                continue
            models: dict[int, Span | Arranged] = {0: part.base}
            models |= {i: donor for i, donor in enumerate(part.donors, 1) if donor}
            for first in range(0, part.base.elements, PIECE):
                count = min(PIECE, part.base.elements - first)
                yield Piece(
                    {model: side.flat_slice(first, count) for model, side in models.items()},
                    part.ancestor.flat_slice(first, count) if part.ancestor else None,
                )
