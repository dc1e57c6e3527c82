"""The chart of scores over alpha: where each mark stands. templates/curve.svg draws them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise

from ..searching.search import Candidate
from .view import SearchView, count_decimals

PADDING = 40  # between the axis and the first alpha, where "no score" stands
TICK_GAP = 56  # room for an alpha below the axis, also in the large type of narrow screens
NUMBER_GAP = 30  # room for a number at the foot of a bar
TIGHT_GAP = 60  # with less room than this, narrow screens leave the number out


@dataclass(frozen=True, slots=True)
class Bar:
    """The difference between the answers at two alphas."""

    left: float
    right: float
    top: float
    number: str
    refines: bool  # it lies inside the bar of two alphas further apart
    is_refined: bool  # the bar of two closer alphas lies inside it

    @property
    def inset(self) -> float:
        """Room on either side, so that neighbouring bars do not touch."""
        return min(14.0, 0.2 * (self.right - self.left))

    @property
    def has_number(self) -> bool:
        """Whether there is room for its number."""
        return self.right - self.left >= NUMBER_GAP and not self.is_refined

    @property
    def is_tight(self) -> bool:
        """Whether narrow screens have no room for its number."""
        return self.right - self.left < TIGHT_GAP


@dataclass(frozen=True)
class Chart:
    """Where everything stands, in units of the view box; y grows downward."""

    view: SearchView
    width: int = 720
    height: int = 420
    left: int = 52
    right: int = 712
    top: int = 44
    bottom: int = 330

    @property
    def unit(self) -> str:
        """The unit of a score."""
        return self.view.rule.unit

    @property
    def why_no_score(self) -> str:
        """What stands at an end of the grid without a score."""
        return "no score: one neighbour" if self.view.rule.compares else "no score"

    def x(self, alpha: float) -> float:
        """Where an alpha stands."""
        low, high = min(self.view.alphas), max(self.view.alphas)
        share = (alpha - low) / (high - low) if high > low else 0.5
        return self.left + PADDING + share * (self.right - self.left - 2 * PADDING)

    def y(self, score: float | None) -> float:
        """Where a score stands."""
        return self.bottom - (score or 0.0) / self.levels[-1] * (self.bottom - self.top)

    @cached_property
    def levels(self) -> list[float]:
        """Scores at the horizontal lines: multiples of 1, 2 or 5 times a power of ten."""
        smallest_step = 1.0 if self.view.rule.compares else 0.001
        values = [smallest_step, *map(self._in_score_units, self._list_differences().values())]
        for candidate in self.view.result.rounds:
            values += [candidate.score or 0.0, *(candidate.interval or ())]
        highest = max(value for value in values if math.isfinite(value))
        power = 10.0 ** math.floor(math.log10(highest / 5))
        steps = (power * factor for factor in (1, 2, 5, 10))
        step = max(smallest_step, next(step for step in steps if step >= highest / 5))
        return [i * step for i in range(math.ceil(highest / step + 0.05) + 1)]

    def _in_score_units(self, difference: float) -> float:
        """A difference counts answers; of scores that are a share it is one of all prompts."""
        rule = self.view.rule
        return rule.factor * difference / self.view.result.prompts if rule.divide_by else difference

    @cached_property
    def ticks(self) -> list[float]:
        """The alphas that have room below the axis; the chosen one and the ends go first."""
        alphas = self.view.alphas
        ticks: list[float] = []
        for alpha in (self.view.result.alpha, alphas[0], alphas[-1], *alphas):
            if all(abs(self.x(alpha) - self.x(other)) >= TICK_GAP for other in ticks):
                ticks.append(alpha)
        return sorted(ticks)

    def format_tick(self, alpha: float) -> str:
        """With as many decimals as any tick needs."""
        return f"{alpha:.{count_decimals(self.ticks)}f}"

    @property
    def columns(self) -> list[tuple[float, float]]:
        """The left edge and the width of what is around each alpha, halfway to its neighbours."""
        places = [self.x(alpha) for alpha in self.view.alphas]
        outer = PADDING / 2
        edges = [places[0] - outer, *map(_mean, places, places[1:]), places[-1] + outer]
        return [(left, right - left) for left, right in pairwise(edges)]

    @property
    def bars(self) -> list[Bar]:
        """One for each two alphas whose difference is part of a score; wide ones come first."""
        differences = self._list_differences()
        return [
            Bar(
                self.x(low),
                self.x(high),
                self.y(self._in_score_units(difference)),
                self.view.format_difference(difference),
                refines=any(_lies_inside((low, high), other) for other in differences),
                is_refined=any(_lies_inside(other, (low, high)) for other in differences),
            )
            for (low, high), difference in differences.items()
        ]

    def _list_differences(self) -> dict[tuple[float, float], int]:
        differences: dict[tuple[float, float], int] = {}
        if not self.view.rule.compares:
            return differences
        for candidate in self.view.result.rounds:
            previous, following = candidate.neighbours
            if previous is not None and candidate.diff_previous is not None:
                differences[previous, candidate.alpha] = candidate.diff_previous
            if following is not None and candidate.diff_next is not None:
                differences[candidate.alpha, following] = candidate.diff_next
        widest_first = sorted(differences, key=lambda pair: (pair[0] - pair[1], pair))
        return {pair: differences[pair] for pair in widest_first}

    @property
    def lines(self) -> Iterator[list[Candidate]]:
        """The scores that a line joins: all, or of measures that compare those of each round.

        There, scores of two rounds have other neighbours.
        """
        result = self.view.result
        if not self.view.rule.compares:
            yield [c for c in result.candidates if c.score is not None]
            return
        scored = [c for c in result.rounds if c.score is not None]
        for _, group in groupby(scored, key=lambda candidate: candidate.round):
            yield list(group)


def _mean(first: float, second: float) -> float:
    return (first + second) / 2


def _lies_inside(inner: tuple[float, float], outer: tuple[float, float]) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]
