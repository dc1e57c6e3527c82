"""From the answers at each alpha to the alpha with the lowest score.

Answers are compared between neighbouring alphas of a grid (arXiv 2503.23733, Algorithm 1), or
judged by how sure the model is of them. An alpha at which they collapse cannot be chosen, nor one
beyond. A refinement is a round of its own: its neighbours lie closer together, so that answers
differ less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, sqrt
from statistics import fmean

from ..answers import Answer
from ..errors import RecipeError
from ..settings import Measure
from .answer_text import is_degenerate, normalise
from .measures import RULES, MeasureRule

CONSTANT = 0.9
"""Share of the prompts that must get one and the same answer for it to count as constant."""
MARKEDLY = 0.1
"""Share of the prompts by which degenerate answers must exceed the smallest alpha's to matter."""
COLLAPSE = 0.5
"""Answers have collapsed where their tokens are less than so many times as probable as at the
smallest alpha. A donor of noise does that; of the trained ones none did (`bench/zoo.md`)."""
_FEWEST_FOR_CONSTANT = 10  # different prompts; of fewer, equal answers prove nothing


@dataclass(frozen=True, slots=True)
class GridPoint:
    """An alpha between its neighbours in one round of the search.

    previous, next: None at the ends of the grid. round: 0 for the grid, n for the n-th refinement.
    """

    alpha: float
    previous: float | None
    next: float | None
    round: int = 0


Rounds = Sequence[Sequence[GridPoint]]
"""The points of the grid, then the inner three of each refinement."""
Window = tuple[float, float, float, float, float]
"""The alphas of a refinement: the best one, its neighbours, and the points halfway to them."""


class AnswerComparison:
    """The answers at each alpha, how they differ, and what they score by a measure."""

    def __init__(self, measure: Measure | None, distinct_prompts: Sequence[int]) -> None:
        """Start without answers. RecipeError if there is no such measure.

        measure: None: "relative" if the first answers are those at alpha 0 and have probabilities,
        by which a collapse shows; else "pairwise".
        distinct_prompts: the place of each different prompt.
        """
        if measure is not None and measure not in RULES:
            raise RecipeError(f"measure {measure!r}: expected one of {', '.join(RULES)}")
        self._measure = measure
        self.answers: dict[float, tuple[Answer, ...]] = {}
        self.mean_log_probability: dict[float, float | None] = {}  # None unless all are known
        self._distinct_prompts = distinct_prompts
        self._normalised: dict[float, tuple[str, ...]] = {}
        self.degenerate_places: dict[float, frozenset[int]] = {}
        self.degenerate: dict[float, int] = {}  # answers that are empty, repeating or constant
        self.unfinished: dict[float, int] = {}  # answers that end inside their reasoning, if any

    def add(self, alpha: float, answers: Sequence[Answer]) -> None:
        """Add the answers at one alpha. The smallest comes first; the others are judged by it."""
        self.answers[alpha] = tuple(answers)
        known = self.log_probabilities(alpha)
        self.mean_log_probability[alpha] = None if known is None else fmean(known)
        if self._measure is None:
            shows_collapse = alpha == 0 and known is not None
            self._measure = "relative" if shows_collapse else "pairwise"
        self._normalised[alpha] = tuple(normalise(answer.text) for answer in answers)
        self.degenerate_places[alpha] = self._find_degenerate(alpha)
        self.degenerate[alpha] = len(self.degenerate_places[alpha])

    @property
    def measure(self) -> Measure:
        """What scores are made of, known once there are answers."""
        assert self._measure is not None
        return self._measure

    @property
    def rule(self) -> MeasureRule:
        """How the measure makes a score."""
        return RULES[self.measure]

    @property
    def prompt_count(self) -> int:
        """How many answers there are at each alpha."""
        return len(self.answers[self.smallest])

    @property
    def repeated_count(self) -> int:
        """How many prompts ask what an earlier one asks."""
        return self.prompt_count - len(self._distinct_prompts)

    @property
    def smallest(self) -> float:
        """The smallest alpha."""
        return next(iter(self.answers))

    # Which alphas may be chosen

    def is_sound(self, alpha: float) -> bool:
        """Whether an alpha lies before any collapse, with not markedly more degenerate answers."""
        collapse = self.find_collapse()
        return (collapse is None or alpha < collapse) and not self.has_many_degenerate(alpha)

    def has_many_degenerate(self, alpha: float) -> bool:
        """Whether degenerate answers are markedly more than at the smallest alpha."""
        excess = self.degenerate[alpha] - self.degenerate[self.smallest]
        return excess > MARKEDLY * self.prompt_count

    def find_collapse(self) -> float | None:
        """The first alpha at which the answers collapse; None without one, or if it is unknown."""
        collapsed = (
            alpha
            for alpha in sorted(self.answers)
            if (share := self.compare_probability(alpha)) is not None and share < COLLAPSE
        )
        return next(collapsed, None)

    def compare_probability(self, alpha: float) -> float | None:
        """How many times as probable a token of an answer is as at the smallest alpha.

        By the geometric mean. None unless that is known.
        """
        here, before = (self.mean_log_probability[each] for each in (alpha, self.smallest))
        return None if here is None or before is None else exp(here - before)

    def _find_degenerate(self, alpha: float) -> frozenset[int]:
        answers = enumerate(self.answers[alpha])
        degenerate = {i for i, answer in answers if is_degenerate(answer.text)}
        common, share = self._commonest_answer(alpha)
        usual_share = self._commonest_answer(self.smallest)[1]
        enough_prompts = len(self._distinct_prompts) >= _FEWEST_FOR_CONSTANT
        if enough_prompts and share >= CONSTANT and usual_share < CONSTANT - MARKEDLY:
            normalised = self._normalised[alpha]
            degenerate |= {i for i, answer in enumerate(normalised) if answer == common}
        return frozenset(degenerate)

    def _commonest_answer(self, alpha: float) -> tuple[str, float]:
        """The answer that most of the different prompts get, and their share."""
        counts = Counter(self._normalised[alpha][i] for i in self._distinct_prompts)
        answer, count = counts.most_common(1)[0]
        return answer, count / len(self._distinct_prompts)

    # Confidence

    def entropies(self, alpha: float) -> list[float] | None:
        """Of the answers at an alpha, in nats per token; None unless all are known."""
        return _all_known([answer.entropy for answer in self.answers[alpha]])

    def log_probabilities(self, alpha: float) -> list[float] | None:
        """Of the answers at an alpha, per token; None unless all are known."""
        return _all_known([answer.log_probability for answer in self.answers[alpha]])

    def count_unknown(self, alpha: float) -> int:
        """Of how many answers at an alpha the measure does not know how sure the model was."""
        takes = self.rule.takes
        if takes is None:
            return 0
        return sum(getattr(answer, takes) is None for answer in self.answers[alpha])

    def answer_squares(self, alpha: float) -> list[list[tuple[int, float]]] | None:
        """For each different answer, the prompts that get it, each with its squared probability.

        Probabilities are geometric means over the answer's tokens. None unless all are known.
        """
        logs = self.log_probabilities(alpha)
        if logs is None:
            return None
        columns: dict[str, list[tuple[int, float]]] = {}
        for place, answer in enumerate(self._normalised[alpha]):
            columns.setdefault(answer, []).append((place, exp(2 * logs[place])))
        return list(columns.values())

    def nuclear_score(self, alpha: float) -> float | None:
        """In per cent, 0 if all answers are certain and different; None unless that is known.

        Each row of the matrix of prompts by answers has one entry. So its columns are orthogonal,
        and the nuclear norm is the sum of their lengths.
        """
        columns = self.answer_squares(alpha)
        if columns is None:
            return None
        norm = sum(sqrt(sum(square for _, square in column)) for column in columns)
        return round(100 * (1 - norm / self.prompt_count), 9)

    # Differences and scores

    def differences(self, first: float, second: float) -> list[bool]:
        """By prompt: whether the answers at two alphas differ."""
        pairs = zip(self._normalised[first], self._normalised[second], strict=True)
        return [a != b for a, b in pairs]

    def left_base(self, alpha: float) -> list[bool]:
        """By prompt: whether the answer differs from the smallest alpha's, taken for the base's."""
        return self.differences(self.smallest, alpha)

    def difference(self, first: float | None, second: float | None) -> int | None:
        """How many answers at two alphas differ; None without one of the alphas."""
        if first is None or second is None:
            return None
        return sum(self.differences(first, second))

    def can_score(self, point: GridPoint) -> bool:
        """Whether a point has the neighbours that its score takes."""
        return not self.rule.compares or (point.previous is not None and point.next is not None)

    def prompt_scores(self, point: GridPoint) -> list[float] | None:
        """What each prompt adds to the score; None where that is not known of all.

        For measures that are not pooled.
        """
        if self.rule.add is None:
            return self.entropies(point.alpha)
        if point.previous is None or point.next is None:
            return None
        before = self.differences(point.previous, point.alpha)
        after = self.differences(point.alpha, point.next)
        return list(map(self.rule.add, before, after))

    def prompt_divisors(self, alpha: float) -> list[bool] | None:
        """What each prompt adds to what the score is divided by; None if by nothing."""
        if self.rule.divide_by == "prompts":
            return [True] * self.prompt_count
        return self.left_base(alpha) if self.rule.divide_by == "moved" else None

    def score(self, point: GridPoint) -> float | None:
        """D in the unit of the measure; None where it has none."""
        if self.rule.pooled:
            return self.nuclear_score(point.alpha)
        scores = self.prompt_scores(point)
        return None if scores is None else self.scale(sum(scores), point.alpha)

    def scale(self, total: float, alpha: float) -> float | None:
        """A sum over the prompts at an alpha, in the unit of the measure."""
        divisors = self.prompt_divisors(alpha)
        if divisors is None:
            return total
        divisor = sum(divisors)
        return round(self.rule.factor * total / divisor, 9) if divisor else None

    def noise(self, alpha: float, again: Sequence[str]) -> tuple[int, float]:
        """How many of a second run's answers differ, and the score that this alone would make.

        For measures that compare answers.
        """
        assert self.rule.add is not None
        count = sum(map(str.__ne__, self._normalised[alpha], map(normalise, again)))
        # An answer that differs by chance does so from both neighbours
        return count, self.scale(count * self.rule.add(True, True), alpha) or 0


def _all_known(values: Sequence[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


# Rounds


def round_points(alphas: Sequence[float], number: int) -> list[GridPoint]:
    """Each alpha between its neighbours; without the two ends of a refinement.

    Those stand closer to one neighbour than to the other; their points are in an earlier round.
    """
    before, after = [None, *alphas[:-1]], [*alphas[1:], None]
    points = [GridPoint(*three, number) for three in zip(alphas, before, after, strict=True)]
    return points[1:-1] if number else points


def eligible_points(
    comparison: AnswerComparison, points: Sequence[GridPoint]
) -> dict[GridPoint, float]:
    """The points of a round that may be chosen, with their scores."""
    return {
        point: score
        for point in points
        if comparison.is_sound(point.alpha) and (score := comparison.score(point)) is not None
    }


def best_points(comparison: AnswerComparison, rounds: Rounds) -> list[GridPoint]:
    """Those of the last round that share the lowest score; none if none is eligible."""
    scores = eligible_points(comparison, rounds[-1])
    return [point for point, score in scores.items() if score == min(scores.values())]


def latest_points(rounds: Rounds) -> list[GridPoint]:
    """The last point of each alpha, by ascending alpha."""
    latest = {point.alpha: point for points in rounds for point in points}
    return sorted(latest.values(), key=lambda point: point.alpha)


def earlier_points(rounds: Rounds) -> list[GridPoint]:
    """The points that a later round replaced, round by round."""
    latest = set(latest_points(rounds))
    return [point for points in rounds for point in points if point not in latest]


def choose_alpha(comparison: AnswerComparison, rounds: Rounds) -> float:
    """The best alpha, the smaller of equals; the smallest of all if none is eligible."""
    best = best_points(comparison, rounds)
    return best[0].alpha if best else comparison.smallest


def next_window(comparison: AnswerComparison, rounds: Rounds) -> Window | None:
    """The alphas of the round that halves the steps around the best one.

    None if there is no best one, if it is an end of the grid, or once 6 decimals cannot tell the
    alphas apart.
    """
    best = best_points(comparison, rounds)
    if not best:
        return None
    alpha, previous, following = best[0].alpha, best[0].previous, best[0].next
    if previous is None or following is None:
        return None
    low, high = round((previous + alpha) / 2, 6), round((alpha + following) / 2, 6)
    if not previous < low < alpha < high < following:
        return None
    return previous, low, alpha, high, following
