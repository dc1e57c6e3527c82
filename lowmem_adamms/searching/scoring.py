"""Which alpha's answers change least: the arithmetic of the search, over answers that are there.

Answers are compared between neighbours on the grid (arXiv 2503.23733, Alg. 1); a refinement is a
round of its own, as closer neighbours differ less. Leaves to others: asking for the answers, and
what is said of the outcome (`search.py`); when two answers are the same (`answers.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from .answer_text import Distance, is_degenerate, normalise

Measure = Literal["pairwise", "joint", "embedding", "relative"]
"""How a score is made: Algorithm 1, Appendix B, distances for counts, and ours (see `Study`)."""

CONSTANT = 0.9
"""Share of the prompts that must get one and the same answer for it to count as constant."""
MARKEDLY = 0.1
"""Share of the prompts by which degenerate answers must exceed the smallest alpha's to matter."""
_DISTINCT = 10  # below so many different prompts, equal answers prove nothing


@dataclass(frozen=True, slots=True)
class Seat:
    """An alpha and the two it is compared with."""

    previous: float | None
    alpha: float
    next: float | None
    round: int


class Study:
    """The answers by alpha and what they say about each other; every comparison is made once.

    The measure "relative" divides D by the number of answers that have left the base's: near the
    base answers hardly change because they have hardly moved, which is no merit (bench/LOG.md).
    """

    def __init__(
        self,
        measure: Measure,
        distance: Distance | None,
        distinct: Sequence[int],
        origin: Sequence[str] | None = None,
    ) -> None:
        """distance: None counts unequal answers. distinct: where each prompt stands first.

        origin: the answers that "relative" takes for the base's; those at the smallest alpha unless
        given.
        """
        self.answers: dict[float, tuple[str, ...]] = {}
        self._distance, self._joint = distance, measure == "joint"
        self.relative, self.origin = measure == "relative", origin
        self._distinct = distinct
        self._normal: dict[float, tuple[str, ...]] = {}
        self._differences: dict[tuple[float, float], list[float]] = {}
        self._degenerate: dict[float, int] = {}
        self._departed: dict[float, list[float]] = {}

    def add(self, alpha: float, answers: tuple[str, ...]) -> None:
        """The smallest alpha comes first: the others' degenerate answers are judged by it."""
        self.answers[alpha] = answers
        self._normal[alpha] = tuple(map(normalise, answers))
        self._degenerate[alpha] = self._count_degenerate(alpha)
        if self.relative:
            origin = map(normalise, self.origin or self.answers[self.smallest])
            pairs = zip(origin, self._normal[alpha], strict=True)
            self._departed[alpha] = [float(first != second) for first, second in pairs]

    @property
    def prompts(self) -> int:
        """How many there are."""
        return len(self.answers[self.smallest])

    @property
    def smallest(self) -> float:
        """The alpha that came first."""
        return next(iter(self.answers))

    def degenerate(self, alpha: float) -> int:
        """How many answers are empty, repeating or constant."""
        return self._degenerate[alpha]

    def eligible(self, alpha: float) -> bool:
        """Whether it may win: its answers are sound, and have moved if the measure wants that."""
        departed = self.departed(alpha)
        return self.sound(alpha) and (departed is None or any(departed))

    def sound(self, alpha: float) -> bool:
        """Whether degenerate answers are not markedly more than at the smallest alpha."""
        excess = self.degenerate(alpha) - self.degenerate(self.smallest)
        return excess <= MARKEDLY * self.prompts

    def differences(self, first: float, second: float) -> list[float]:
        """By prompt: 1 where the answers differ, 0 where not; or their distance."""
        pair = (first, second)
        if pair not in self._differences:
            texts = self.answers if self._distance else self._normal
            self._differences[pair] = self._compare(texts[first], texts[second])
        return self._differences[pair]

    def noise(self, alpha: float, again: Sequence[str]) -> tuple[int, float]:
        """How many of a second run's answers differ, and the score that this alone would make."""
        normal = tuple(map(normalise, again))
        count = sum(a != b for a, b in zip(self._normal[alpha], normal, strict=True))
        total: float = count
        if self._distance:
            total = math.fsum(self._compare(self.answers[alpha], again))
        # Other scores than joint ones add up two comparisons, and the noise is in both.
        return count, self.scaled(total * (1 if self._joint else 2), alpha) or 0

    def _compare(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        """By prompt, of normalised answers unless there is a distance; 0 where they are equal."""
        unequal = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
        result = [0.0] * len(first)
        found: Sequence[float] = [1.0] * len(unequal)
        if self._distance and unequal:
            found = self._distance([first[i] for i in unequal], [second[i] for i in unequal])
        sound = all(-1e-6 <= value < math.inf for value in found)  # 1 - cosine may round below 0
        if len(found) != len(unequal) or not sound:
            raise ValueError(
                f"distance: found {len(found)} numbers, {'all' if sound else 'not all'} finite and"
                f" 0 or more; expected {len(unequal)}"
            )
        for i, value in zip(unequal, found, strict=True):
            result[i] = max(0.0, float(value))
        return result

    def scores(self, seat: Seat) -> list[float] | None:
        """By prompt, what it adds to D_i; None at an end."""
        if seat.previous is None or seat.next is None:
            return None
        before = self.differences(seat.previous, seat.alpha)
        after = self.differences(seat.alpha, seat.next)
        merge = max if self._joint else _add
        return [merge(a, b) for a, b in zip(before, after, strict=True)]

    def score(self, seat: Seat) -> float | None:
        """D_i, "relative" in per cent; None at an end, or where that has nothing to divide by."""
        scores = self.scores(seat)
        return None if scores is None else self.scaled(self.total(scores), seat.alpha)

    def scaled(self, total: float, alpha: float) -> float | None:
        """A sum of differences around an alpha in the measure's unit."""
        departed = self.departed(alpha)
        if departed is None:
            return total
        return round(100 * total / math.fsum(departed), 9) if any(departed) else None

    def departed(self, alpha: float) -> list[float] | None:
        """By prompt: 1 where the answer is not the base's; None where the measure asks not."""
        return self._departed.get(alpha)

    def total(self, values: Iterable[float]) -> float:
        """Exact and so independent of the prompts' order, up to the last digits of a distance."""
        total = math.fsum(values)
        return int(total) if self._distance is None else round(total, 9)

    def _count_degenerate(self, alpha: float) -> int:
        normal = self._normal[alpha]
        bad = {i for i, answer in enumerate(self.answers[alpha]) if is_degenerate(answer)}
        common, share = self._commonest(alpha)
        usual = self._commonest(self.smallest)[1]
        enough = len(self._distinct) >= _DISTINCT
        if enough and share >= CONSTANT and usual < CONSTANT - MARKEDLY:
            bad |= {i for i, answer in enumerate(normal) if answer == common}
        return len(bad)

    def _commonest(self, alpha: float) -> tuple[str, float]:
        """The answer that most of the different prompts get, and their share."""
        found = Counter(self._normal[alpha][i] for i in self._distinct)
        answer, count = found.most_common(1)[0]
        return answer, count / len(self._distinct)


def _add(first: float, second: float) -> float:
    return first + second


class Election:
    """Who is compared with whom, round by round, and who wins."""

    def __init__(self, study: Study, grid: Sequence[float]) -> None:
        self.study = study
        self.grid = grid
        self.seats: dict[float, Seat] = {}
        """By alpha, as of the last round in which it stood between two others."""
        self.rounds: list[list[Seat]] = []
        """The closed rounds' alphas that could be scored."""
        self.best: list[Seat] = []
        """Of the last round: those eligible that share the lowest score."""

    @property
    def number(self) -> int:
        """Of the round that is open now."""
        return len(self.rounds)

    @property
    def chosen(self) -> float:
        """The best alpha; the smallest of all where none is eligible."""
        return self.best[0].alpha if self.best else self.study.smallest

    def turns(self, refine: int) -> Iterator[tuple[float, Sequence[float]]]:
        """Each alpha to ask for, and the points that stand when its answers are there.

        refine: so many rounds may follow the grid's. A round is closed when the next turn is asked
        for, by when its last answers must have been added to the study.
        """
        for count, alpha in enumerate(self.grid, 1):
            yield alpha, self.grid[:count]
        self.close(self.grid)
        for _ in range(refine):
            window = self.window()
            if window is None:
                return
            yield window[1], window[:3]
            yield window[3], window
            self.close(window)

    def seat(self, points: Sequence[float]) -> list[Seat]:
        """Compare neighbouring points. The ends of a refinement keep the seats they have."""
        before: list[float | None] = [None, *points[:-1]]
        after: list[float | None] = [*points[1:], None]
        seats = [Seat(*alphas, self.number) for alphas in zip(before, points, after, strict=True)]
        if self.number:
            seats = seats[1:-1]
        self.seats.update({seat.alpha: seat for seat in seats})
        return seats

    def close(self, points: Sequence[float]) -> None:
        """All points of the round are there: find the best."""
        inner = self.seat(points)
        inner = [seat for seat in inner if seat.previous is not None and seat.next is not None]
        scores = {seat: self.study.score(seat) or 0 for seat in inner}
        eligible = [seat for seat in inner if self.study.eligible(seat.alpha)]
        lowest = min((scores[seat] for seat in eligible), default=0)
        self.best = [seat for seat in eligible if scores[seat] == lowest]
        self.rounds.append(inner)

    def window(self) -> tuple[float, float, float, float, float] | None:
        """The points of the next round; None if nothing is eligible or 6 decimals are used up."""
        if not self.best:
            return None
        seat = self.best[0]
        assert seat.previous is not None and seat.next is not None
        low, high = (round((seat.alpha + end) / 2, 6) for end in (seat.previous, seat.next))
        if not seat.previous < low < seat.alpha < high < seat.next:
            return None
        return seat.previous, low, seat.alpha, high, seat.next
