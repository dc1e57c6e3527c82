"""What the sections of the search report share: the result, how its numbers are written, and runs
of equal answers. Leaves to others: markup of any kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from ..searching.answer_text import normalise
from ..searching.scoring import MARKEDLY
from ..searching.search import Candidate, Result
from .markup import DASH

MEANING = {
    "pairwise": "differing answers, to the previous alpha plus to the next",
    "joint": "answers that differ from either neighbour's",
    "embedding": "distances to both neighbours' answers, added up",
    "relative": "differing answers, to the previous alpha plus to the next, in per cent of those"
    " that have left the base's",
}
"""What a score is a sum of, by measure."""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring alphas with one answer: positions first..last in the grid, both included."""

    first: int
    last: int
    answer: str


@dataclass(frozen=True, slots=True)
class View:
    """What every section needs: the result, how its alphas are written, and answers by prompt."""

    result: Result
    alphas: tuple[float, ...]
    decimals: int

    @property
    def distances(self) -> bool:
        """Whether scores sum distances; else they count answers."""
        return self.result.measure == "embedding"

    @property
    def rounds(self) -> bool:
        """Whether the grid was refined; scores compare within a round only."""
        return any(c.round for c in self.result.candidates)

    def collapsed(self, c: Candidate) -> bool:
        """Whether markedly more answers are degenerate than at the smallest alpha, or half are."""
        excess = c.degenerate - self.result.candidates[0].degenerate
        return excess > MARKEDLY * self.result.prompts or 2 * c.degenerate >= self.result.prompts

    def name(self, alpha: float) -> str:
        """With all decimals that any alpha of the grid needs, for columns."""
        return f"{alpha:.{self.decimals}f}"

    def short(self, alpha: float) -> str:
        """With as few decimals as this alpha needs, but at least one, for sentences."""
        return f"{alpha:.{decimals_of([alpha])}f}"

    def span(self, run: Run) -> str:
        """The alphas of a run."""
        first, last = self.short(self.alphas[run.first]), self.short(self.alphas[run.last])
        return first if run.first == run.last else f"{first}{DASH}{last}"

    def bar(self, difference: float) -> float:
        """How high a difference stands beside the scores: "relative" ones are per cent."""
        relative = self.result.measure == "relative"
        return 100 * difference / self.result.prompts if relative else difference

    def number(self, value: float | None) -> str:
        """A difference or score: a count (its percentiles have fractions), or a distance."""
        if value is None or not math.isfinite(value):
            return DASH
        if self.distances:
            return f"{value:,.2f}"
        value = round(value, 1)
        return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"

    def interval(self, candidate: Candidate) -> str:
        """The 95 % interval of a candidate."""
        if candidate.interval is None:
            return DASH
        low, high = candidate.interval
        return f"{self.number(low)} to {self.number(high)}"

    def candidate(self, alpha: float) -> Candidate | None:
        """The candidate of an alpha."""
        return next((c for c in self.result.candidates if c.alpha == alpha), None)


def view_of(result: Result) -> View:
    """The view of a result."""
    alphas = tuple(c.alpha for c in result.candidates)
    return View(result, alphas, decimals_of([*alphas, result.alpha]))


def decimals_of(alphas: Iterable[float]) -> int:
    """How many decimals, one or more, show all of these alphas."""
    return max(len(f"{alpha:.6f}".rstrip("0").partition(".")[2]) for alpha in alphas) or 1


def runs(answers: Sequence[str], prefer: int | None = None) -> tuple[Run, ...]:
    """Answers over the grid, neighbours that are equal once normalised merged into one run.

    A run shows the spelling of its first answer, or of position `prefer` if that lies inside.
    """
    found = []
    for _, group in groupby(range(len(answers)), key=lambda i: normalise(answers[i])):
        inside = list(group)
        shown = prefer if prefer is not None and prefer in inside else inside[0]
        found.append(Run(inside[0], inside[-1], answers[shown]))
    return tuple(found)
