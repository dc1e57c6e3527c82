"""Generation consistency over a grid of alphas: AdaMMS's search step (arXiv 2503.23733, Alg. 1).

Knows no model: takes a callable that gives the answers at an alpha. Leaves to others: making the
answers (`generate.py`, `live.py`), reading recorded ones (`recorded.py`), showing (`report.py`).

Where the paper is silent: ties go to the smaller alpha, collapsed answers cannot win, and `notes`
says in words what weakens the choice.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, get_args

from .answers import Distance, is_degenerate, normalise
from .errors import PromptError, RecipeError

P = TypeVar("P")
Generate = Callable[[float, Sequence[P]], Sequence[str]]
"""generate(alpha, prompts) -> one answer per prompt."""
Measure = Literal["pairwise", "joint", "embedding"]
DEFAULT_ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)

RESAMPLES = 1000
FEW_PROMPTS = 30
"""Below this a note says that chance decides."""
CONSTANT = 0.9
"""Share of the prompts that must get one and the same answer for it to count as constant."""
MARKEDLY = 0.1
"""Share of the prompts by which degenerate answers must exceed the smallest alpha's to matter."""
_DISTINCT = 10  # below so many different prompts, equal answers prove nothing


@dataclass(frozen=True, slots=True)
class Candidate:
    """One alpha of the grid. Differences count answers (or sum distances) over all prompts.

    score: D_i; None at the two ends, which have one neighbour. interval: 95 % bootstrap interval
    of the score over prompts. degenerate: answers that are empty, repeating or constant.

    neighbours: the alphas that diff_previous and diff_next refer to. round: 0 for the grid, n for
    the n-th refinement, whose neighbours lie closer together. Closer neighbours differ less, so
    scores are comparable within a round only.
    """

    alpha: float
    diff_previous: float | None
    diff_next: float | None
    score: float | None
    degenerate: int
    interval: tuple[float, float] | None = None
    neighbours: tuple[float | None, float | None] = (None, None)
    round: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """What a search found: the chosen alpha and everything that led to it.

    ties: all alphas that share the best score when there are several. noise: answers that differ
    between two runs at the same alpha, or None if not measured. notes: warnings in words.
    answers: by alpha, in the order of the prompts. wins: how often (0..1) each alpha that stood
    for election in the last round wins when prompts are resampled.
    """

    alpha: float
    measure: Measure
    prompts: int
    candidates: tuple[Candidate, ...]
    answers: Mapping[float, tuple[str, ...]]
    ties: tuple[float, ...] = ()
    noise: float | None = None
    notes: tuple[str, ...] = ()
    wins: Mapping[float, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The document of `search --json`, without base, donor and version."""
        return {
            "alpha": self.alpha,
            "measure": self.measure,
            "prompts": self.prompts,
            "candidates": [
                {
                    "alpha": candidate.alpha,
                    "diff_previous": candidate.diff_previous,
                    "diff_next": candidate.diff_next,
                    "score": candidate.score,
                    "degenerate": candidate.degenerate,
                    "interval": candidate.interval and list(candidate.interval),
                    "neighbours": list(candidate.neighbours),
                    "round": candidate.round,
                }
                for candidate in self.candidates
            ],
            "wins": {str(alpha): share for alpha, share in self.wins.items()},
            "ties": list(self.ties),
            "noise": self.noise,
            "notes": list(self.notes),
        }


def search(
    generate: Generate[P],
    prompts: Sequence[P],
    alphas: Sequence[float] = DEFAULT_ALPHAS,
    *,
    measure: Measure = "pairwise",
    distance: Distance | None = None,
    refine: int = 0,
    noise: Generate[P] | None = None,
    seed: int = 0,
    progress: Callable[[float, tuple[Candidate, ...]], None] | None = None,
) -> Result:
    """Ask for the answers at every alpha and choose where they change least.

    alphas: ascending, in 0..1, three or more, taken to 6 decimals. `generate` is called once for
    each, in order. distance: what the measure "embedding" sums instead of counting; that of
    `embedding.minilm_distance` unless given. refine: so many times, the alphas halfway to the best
    one's neighbours are asked too, and the best of the inner three of those five goes on. noise:
    called once, at the chosen alpha; the same model in another batch size shows how much of a
    difference means nothing. seed: of the bootstrap. progress(alpha, candidates) follows each alpha
    with what is known by then.

    RecipeError for an option out of range or a missing embedding model (before any answer is asked
    for), PromptError without prompts, ValueError when `generate` breaks its contract.
    """
    grid = _checked_grid(alphas)
    if refine < 0:
        raise RecipeError(f"refine is {refine}, expected a number of rounds, 0 or more")
    if len(prompts) == 0:
        raise PromptError("no prompts to search with; give at least one")
    study = _Study(_checked_distance(measure, distance), measure, _first_of_each(prompts))
    election = _Election(study, grid)

    def ask(alpha: float, *points: float) -> None:
        study.add(alpha, _checked_answers(generate(alpha, prompts), len(prompts), alpha))
        election.seat(points, election.number)
        if progress is not None:
            progress(alpha, election.candidates())

    for count, alpha in enumerate(grid, 1):
        ask(alpha, *grid[:count])
    election.close(grid)
    for _ in range(refine):
        window = election.window()
        if window is None:
            break
        ask(window[1], *window[:3])
        ask(window[3], *window)
        election.close(window)
    again = None
    if noise is not None:
        alpha = election.chosen
        again = _checked_answers(noise(alpha, prompts), len(prompts), alpha)
    return _conclude(election, seed, again)


def choose(
    answers: Mapping[float, Sequence[str]],
    *,
    measure: Measure = "pairwise",
    distance: Distance | None = None,
    seed: int = 0,
) -> Result:
    """What `search` makes of answers that are there already, by alpha, all in one order of prompts.

    Errors as in `search`; ValueError when the alphas have different numbers of answers.
    """
    grid = _checked_grid(sorted(answers))
    given = {round(alpha, 6): texts for alpha, texts in answers.items()}
    count = len(given[grid[0]])
    if not count:
        raise PromptError("no answers to choose by; give at least one for each alpha")
    study = _Study(_checked_distance(measure, distance), measure, range(count))
    for alpha in grid:
        study.add(alpha, _checked_answers(given[alpha], count, alpha))
    election = _Election(study, grid)
    election.close(grid)
    return _conclude(election, seed, None)


# Checks


def _checked_grid(alphas: Sequence[float]) -> tuple[float, ...]:
    for alpha in alphas:
        if not (math.isfinite(alpha) and 0 <= alpha <= 1):
            raise RecipeError(f"alphas: found {alpha}, expected numbers in 0..1")
    grid = tuple(round(float(alpha), 6) for alpha in alphas)
    shown = ", ".join(map(str, grid))
    if len(grid) < 3:
        raise RecipeError(
            f"alphas: found {len(grid)} ({shown}), expected three or more: only an alpha between"
            " two others can be scored"
        )
    if any(first >= second for first, second in itertools.pairwise(grid)):
        raise RecipeError(f"alphas: found {shown}, expected them ascending, each once")
    return grid


def _checked_distance(measure: Measure, distance: Distance | None) -> Distance | None:
    if measure not in get_args(Measure):
        raise RecipeError(f"measure {measure!r}: expected one of {', '.join(get_args(Measure))}")
    if measure == "embedding":
        from .embedding import minilm_distance

        return distance or minilm_distance()
    if distance is not None:
        raise ValueError(f"a distance goes with the measure 'embedding', not with {measure!r}")
    return None


def _checked_answers(answers: Sequence[str], count: int, alpha: float) -> tuple[str, ...]:
    if isinstance(answers, str) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"alpha {alpha}: expected a sequence of strings as answers")
    if len(answers) != count:
        raise ValueError(f"alpha {alpha}: found {len(answers)} answers, expected {count}")
    return tuple(answers)


def _first_of_each(prompts: Sequence[P]) -> list[int]:
    """Where each different prompt stands first. Those without a hash count as different."""
    seen: dict[Any, int] = {}
    try:
        for i, prompt in enumerate(prompts):
            seen.setdefault(prompt, i)
    except TypeError:
        return list(range(len(prompts)))
    return list(seen.values())


# Comparing


@dataclass(frozen=True, slots=True)
class _Seat:
    """An alpha and the two it is compared with."""

    previous: float | None
    alpha: float
    next: float | None
    round: int


class _Study:
    """The answers by alpha and what they say about each other; every comparison is made once."""

    def __init__(
        self, distance: Distance | None, measure: Measure, distinct: Sequence[int]
    ) -> None:
        self.measure = measure
        self.answers: dict[float, tuple[str, ...]] = {}
        self._distance = distance
        self._distinct = distinct
        self._normal: dict[float, tuple[str, ...]] = {}
        self._differences: dict[tuple[float, float], list[float]] = {}
        self._degenerate: dict[float, int] = {}

    def add(self, alpha: float, answers: tuple[str, ...]) -> None:
        """The smallest alpha comes first: the others' degenerate answers are judged by it."""
        self.answers[alpha] = answers
        self._normal[alpha] = tuple(map(normalise, answers))
        self._degenerate[alpha] = self._count_degenerate(alpha)

    @property
    def prompts(self) -> int:
        return len(self.answers[self.smallest])

    @property
    def smallest(self) -> float:
        return next(iter(self.answers))

    def degenerate(self, alpha: float) -> int:
        return self._degenerate[alpha]

    def eligible(self, alpha: float) -> bool:
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
        total = math.fsum(self._compare(self.answers[alpha], again)) if self._distance else count
        # Other scores than joint ones add up two comparisons, and the noise is in both.
        return count, total * (1 if self.measure == "joint" else 2)

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

    def scores(self, seat: _Seat) -> list[float] | None:
        """By prompt, what it adds to D_i; None at an end."""
        if seat.previous is None or seat.next is None:
            return None
        before = self.differences(seat.previous, seat.alpha)
        after = self.differences(seat.alpha, seat.next)
        merge = max if self.measure == "joint" else _add
        return [merge(a, b) for a, b in zip(before, after, strict=True)]

    def score(self, seat: _Seat) -> float | None:
        """D_i, or None at an end."""
        scores = self.scores(seat)
        return None if scores is None else self._total(scores)

    def candidate(self, seat: _Seat) -> Candidate:
        def difference(first: float | None, second: float | None) -> float | None:
            if first is None or second is None:
                return None
            return self._total(self.differences(first, second))

        return Candidate(
            seat.alpha,
            difference(seat.previous, seat.alpha),
            difference(seat.alpha, seat.next),
            self.score(seat),
            self.degenerate(seat.alpha),
            neighbours=(seat.previous, seat.next),
            round=seat.round,
        )

    def _total(self, values: Iterable[float]) -> float:
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


# Choosing


class _Election:
    """Who is compared with whom, round by round, and who wins."""

    def __init__(self, study: _Study, grid: Sequence[float]) -> None:
        self.study = study
        self.grid = grid
        self.seats: dict[float, _Seat] = {}
        """By alpha, as of the last round in which it stood between two others."""
        self.rounds: list[list[_Seat]] = []
        """The closed rounds' alphas that could be scored."""
        self.best: list[_Seat] = []
        """Of the last round: those eligible that share the lowest score."""

    @property
    def number(self) -> int:
        """Of the round that is open now."""
        return len(self.rounds)

    @property
    def chosen(self) -> float:
        """The best alpha; the smallest of all where none is eligible."""
        return self.best[0].alpha if self.best else self.study.smallest

    def seat(self, points: Sequence[float], number: int) -> list[_Seat]:
        """Compare neighbouring points. The ends of a refinement keep the seats they have."""
        before: list[float | None] = [None, *points[:-1]]
        after: list[float | None] = [*points[1:], None]
        seats = [_Seat(*alphas, number) for alphas in zip(before, points, after, strict=True)]
        if number:
            seats = seats[1:-1]
        self.seats.update({seat.alpha: seat for seat in seats})
        return seats

    def close(self, points: Sequence[float]) -> None:
        """All points of the round are there: find the best."""
        inner = self.seat(points, self.number)
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

    def candidates(self) -> tuple[Candidate, ...]:
        """What is known so far, by ascending alpha, without intervals."""
        return tuple(self.study.candidate(self.seats[alpha]) for alpha in sorted(self.seats))


def _conclude(election: _Election, seed: int, again: tuple[str, ...] | None) -> Result:
    study = election.study
    intervals, wins = _bootstrap(election, seed)
    candidates = tuple(
        replace(candidate, interval=intervals.get(candidate.alpha))
        for candidate in election.candidates()
    )
    noise = None if again is None else study.noise(election.chosen, again)
    return Result(
        election.chosen,
        study.measure,
        study.prompts,
        candidates,
        dict(sorted(study.answers.items())),
        tuple(seat.alpha for seat in election.best) if len(election.best) > 1 else (),
        noise and noise[0],
        tuple(_notes(election, wins, noise)),
        wins,
    )


def _bootstrap(
    election: _Election, seed: int
) -> tuple[dict[float, tuple[float, float]], dict[float, float]]:
    """95 % interval of each score, and how often each alpha of the last round wins."""
    import numpy as np

    study = election.study
    by_alpha = {alpha: study.scores(seat) for alpha, seat in sorted(election.seats.items())}
    inner = {alpha: scores for alpha, scores in by_alpha.items() if scores is not None}
    values = np.array(list(inner.values()), np.float64).T  # prompts x alphas
    rng = np.random.default_rng(seed)
    even = np.full(study.prompts, 1 / study.prompts)
    block = max(1, (1 << 20) // study.prompts)  # resamples at a time: 8 MiB of counts
    totals = np.concatenate(
        [
            rng.multinomial(study.prompts, even, min(block, RESAMPLES - start)) @ values
            for start in range(0, RESAMPLES, block)
        ]
    ).round(9)  # so that equal sums of distances are equal, in whatever order they were added
    low, high = np.percentile(totals, (2.5, 97.5), axis=0)
    alphas = list(inner)
    intervals = {a: (float(low[i]), float(high[i])) for i, a in enumerate(alphas)}
    running = [seat.alpha for seat in election.rounds[-1]]
    wins = dict.fromkeys(running, 0.0)
    eligible = [alpha for alpha in running if study.eligible(alpha)]
    if eligible:
        winners = totals[:, [alphas.index(alpha) for alpha in eligible]].argmin(axis=1)
        for alpha, won in zip(eligible, np.bincount(winners, minlength=len(eligible)), strict=True):
            wins[alpha] = int(won) / RESAMPLES
    return intervals, wins


# Notes


def _notes(
    election: _Election, wins: Mapping[float, float], noise: tuple[int, float] | None
) -> Iterator[str]:
    study, count = election.study, election.study.prompts
    if count < FEW_PROMPTS:
        yield f"Only {count} prompts: chance decides much; the paper takes 100."
    yield from _notes_on_grid(election)
    yield from _notes_on_collapse(election)
    if not election.best:
        return
    best = study.score(election.best[0]) or 0
    for inner in election.rounds:
        seats = [seat for seat in inner if study.eligible(seat.alpha)]
        if len({study.score(seat) for seat in seats}) == 1 < len(seats):
            yield (
                f"The search cannot tell these alphas apart: {_listed(seats)} all score"
                f" {_shown(study.score(seats[0]))}."
            )
    if len(election.best) > 1:
        yield (
            f"{_listed(election.best)} share the best score, {_shown(best)}; the smallest,"
            f" {election.chosen}, is taken."
        )
    elif wins[election.chosen] < 0.5:
        yield (
            f"Alpha {election.chosen} wins in only {wins[election.chosen]:.0%} of {RESAMPLES}"
            " resamples of the prompts: more prompts may choose another."
        )
    if noise and noise[0] and noise[1] >= best:
        yield (
            f"Two runs at alpha {election.chosen} differ in {noise[0]} of {count} answers. That"
            f" alone makes a score of {_shown(noise[1])}, and the best score is {_shown(best)}: it"
            " may be noise."
        )


def _notes_on_grid(election: _Election) -> Iterator[str]:
    """What the alphas themselves bring with them: steps, ends, a lone interior."""
    study, inner = election.study, election.rounds[0]
    if len(inner) == 1 == len(election.rounds):
        yield f"Only alpha {inner[0].alpha} lies between two others, so no other can win."
    points = election.grid
    steps = [second - first for first, second in itertools.pairwise(points)]
    if max(steps) > 1.5 * min(steps):
        yield (
            f"The alphas are not evenly spaced (steps of {_shown(min(steps))} to"
            f" {_shown(max(steps))}): close neighbours score lower for that alone."
        )
    scores = [study.score(seat) or 0 for seat in inner if study.eligible(seat.alpha)]
    for end, neighbour in ((points[0], points[1]), (points[-1], points[-2])):
        difference = math.fsum(study.differences(*sorted((end, neighbour))))
        if scores and study.eligible(end) and 2 * difference < min(scores):
            yield (
                f"Alpha {end} differs from its one neighbour by {_shown(difference)}, less than"
                f" half of the grid's best score, {_shown(min(scores))}; but an end cannot win."
            )


def _notes_on_collapse(election: _Election) -> Iterator[str]:
    study, count = election.study, election.study.prompts
    usual = f"{study.degenerate(study.smallest)} at alpha {study.smallest}"
    for alpha in sorted(study.answers):
        if not study.eligible(alpha):
            yield (
                f"Alpha {alpha} is not eligible: {study.degenerate(alpha)} of {count} answers are"
                f" empty, repeating or constant, {usual}."
            )
    if not election.best:
        yield f"No alpha between two others is eligible: the smallest, {study.smallest}, is taken."
    elif 2 * study.degenerate(election.chosen) >= count:
        yield (
            f"{study.degenerate(election.chosen)} of {count} answers at the chosen alpha are empty,"
            f" repeating or constant, {usual}: their consistency says little."
        )


def _listed(seats: Sequence[_Seat]) -> str:
    words = [str(seat.alpha) for seat in seats]
    return ", ".join(words[:-1]) + " and " + words[-1]


def _shown(value: float | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
