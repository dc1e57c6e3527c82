"""Generation consistency over a grid of alphas: AdaMMS's search step (arXiv 2503.23733, Alg. 1).

Knows no model: takes a callable that gives the answers at an alpha. Leaves to others: making the
answers (`generate.py`, `live.py`), reading recorded ones (`recorded.py`), comparing them and
choosing (`election.py`), showing (`report.py`).

Where the paper is silent: ties go to the smaller alpha, collapsed answers cannot win, and `notes`
says in words what weakens the choice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, get_args

from ..errors import PromptError, RecipeError
from .answer_text import Distance
from .scoring import Election, Measure, Seat, Study

P = TypeVar("P")
Generate = Callable[[float, Sequence[P]], Sequence[str]]
"""generate(alpha, prompts) -> one answer per prompt."""
DEFAULT_ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)

RESAMPLES = 1000
FEW_PROMPTS = 30
"""Below this a note says that chance decides."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One alpha of the grid. Differences count answers (or sum distances) over all prompts.

    score: D_i, of the measure "relative" in per cent; None at the two ends, which have one
    neighbour, and where nothing has moved. interval: 95 % bootstrap interval of the score over
    prompts. degenerate: answers that are empty, repeating or constant.

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

    def to_json(self) -> dict[str, Any]:
        """Its row in the document of `search --json`."""
        return {
            "alpha": self.alpha,
            "diff_previous": self.diff_previous,
            "diff_next": self.diff_next,
            "score": self.score,
            "degenerate": self.degenerate,
            "interval": self.interval and list(self.interval),
            "neighbours": list(self.neighbours),
            "round": self.round,
        }


@dataclass(frozen=True, slots=True)
class Result:
    """What a search found: the chosen alpha and everything that led to it.

    ties: all alphas that share the best score when there are several. noise: answers that differ
    between two runs at the same alpha, or None if not measured. notes: warnings in words.
    answers: by alpha, in the order of the prompts. wins: how often (0..1) each alpha that stood
    for election in the last round wins when prompts are resampled.

    candidates: one for each alpha, as of the last round in which it was scored. earlier: what those
    that a refinement scored anew had been in the rounds before; the two together are all rounds.
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
    earlier: tuple[Candidate, ...] = ()

    @property
    def rounds(self) -> tuple[Candidate, ...]:
        """All candidates of all rounds, round by round, by ascending alpha."""
        return tuple(sorted((*self.earlier, *self.candidates), key=lambda c: (c.round, c.alpha)))

    def to_json(self) -> dict[str, Any]:
        """The document of `search --json`, without base, donor and version."""
        return {
            "alpha": self.alpha,
            "measure": self.measure,
            "prompts": self.prompts,
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "earlier": [candidate.to_json() for candidate in self.earlier],
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
    with what is known by then. The measures: Algorithm 1, Appendix B, distances for counts,
    and "relative", which is Algorithm 1's D in per cent of the answers that have left the base's.

    RecipeError for an option out of range or a missing embedding model (before any answer is asked
    for), PromptError without prompts, ValueError when `generate` breaks its contract.
    """
    election, count = _opened(prompts, alphas, refine, measure, distance), len(prompts)
    for alpha, points in election.turns(refine):
        election.study.add(alpha, _checked_answers(generate(alpha, prompts), count, alpha))
        election.seat(points)
        if progress is not None:
            progress(alpha, _candidates(election))
    alpha, again = election.chosen, None
    if noise is not None:
        again = _checked_answers(noise(alpha, prompts), count, alpha)
    return _conclude(election, measure, seed, again)


def _opened(
    prompts: Sequence[P],
    alphas: Sequence[float],
    refine: int,
    measure: Measure,
    distance: Distance | None,
) -> Election:
    """Everything checked that can be before the first answer."""
    grid = checked_grid(alphas)
    if refine < 0:
        raise RecipeError(f"refine is {refine}, expected a number of rounds, 0 or more")
    if len(prompts) == 0:
        raise PromptError("no prompts to search with; give at least one")
    distance = checked_distance(measure, distance)
    return Election(Study(measure, distance, _first_of_each(prompts)), grid)


def choose(
    answers: Mapping[float, Sequence[str]],
    *,
    measure: Measure = "pairwise",
    distance: Distance | None = None,
    origin: Sequence[str] | None = None,
    seed: int = 0,
) -> Result:
    """What `search` makes of answers that are there already, by alpha, all in one order of prompts.

    origin: the base's answers, for "relative"; those at the smallest alpha unless given. Errors as
    in `search`; ValueError when the alphas have different numbers of answers.
    """
    grid = checked_grid(sorted(answers))
    given = {round(alpha, 6): texts for alpha, texts in answers.items()}
    count = len(given[grid[0]])
    if not count:
        raise PromptError("no answers to choose by; give at least one for each alpha")
    study = Study(measure, checked_distance(measure, distance), range(count), origin)
    for alpha in grid:
        study.add(alpha, _checked_answers(given[alpha], count, alpha))
    election = Election(study, grid)
    election.close(grid)
    return _conclude(election, measure, seed, None)


# Checks


def checked_grid(alphas: Sequence[float]) -> tuple[float, ...]:
    """The alphas to 6 decimals; RecipeError unless they are three or more, ascending, in 0..1."""
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


def checked_distance(measure: Measure, distance: Distance | None) -> Distance | None:
    """What the measure sums, None where it counts; RecipeError without the embedding model."""
    if measure not in get_args(Measure):
        raise RecipeError(f"measure {measure!r}: expected one of {', '.join(get_args(Measure))}")
    if measure == "embedding":
        from .sentence_distance import minilm_distance

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


# Concluding


def _candidates(election: Election) -> tuple[Candidate, ...]:
    """What is known so far, by ascending alpha, without intervals."""
    return tuple(_candidate(election.study, seat) for seat in _seats(election))


def _candidate(study: Study, seat: Seat) -> Candidate:
    def difference(first: float | None, second: float | None) -> float | None:
        if first is None or second is None:
            return None
        return study.total(study.differences(first, second))

    return Candidate(
        seat.alpha,
        difference(seat.previous, seat.alpha),
        difference(seat.alpha, seat.next),
        study.score(seat),
        study.degenerate(seat.alpha),
        neighbours=(seat.previous, seat.next),
        round=seat.round,
    )


def _conclude(
    election: Election, measure: Measure, seed: int, again: tuple[str, ...] | None
) -> Result:
    study = election.study
    intervals, wins = _bootstrap(election, seed)
    candidates, earlier = (
        tuple(replace(_candidate(study, seat), interval=intervals.get(seat)) for seat in seats)
        for seats in (_seats(election), _earlier(election))
    )
    noise = None if again is None else study.noise(election.chosen, again)
    return Result(
        election.chosen,
        measure,
        study.prompts,
        candidates,
        dict(sorted(study.answers.items())),
        tuple(seat.alpha for seat in election.best) if len(election.best) > 1 else (),
        noise and noise[0],
        tuple(_notes(election, wins, noise)),
        wins,
        earlier,
    )


def _seats(election: Election) -> list[Seat]:
    """Each alpha's last, by ascending alpha."""
    return [seat for _, seat in sorted(election.seats.items())]


def _earlier(election: Election) -> list[Seat]:
    """Those that a later round took the place of, round by round."""
    return [s for inner in election.rounds for s in inner if election.seats[s.alpha] != s]


def _bootstrap(
    election: Election, seed: int
) -> tuple[dict[Seat, tuple[float, float]], dict[float, float]]:
    """95 % interval of each score, and how often each alpha of the last round wins."""
    import numpy as np

    study = election.study
    running = election.rounds[-1]
    wins = {seat.alpha: 0.0 for seat in running}
    seats = [s for s in (*_seats(election), *_earlier(election)) if study.score(s) is not None]
    if not seats:
        return {}, wins
    scores = _resampled(study, seats, seed)
    low, high = np.nanpercentile(scores, (2.5, 97.5), axis=0)
    intervals = {seat: (float(low[i]), float(high[i])) for i, seat in enumerate(seats)}
    eligible = [seat for seat in running if study.eligible(seat.alpha)]
    if eligible:
        standing = scores[:, [seats.index(seat) for seat in eligible]]
        winners = np.nan_to_num(standing, nan=np.inf).argmin(axis=1)
        for seat, won in zip(eligible, np.bincount(winners, minlength=len(eligible)), strict=True):
            wins[seat.alpha] = int(won) / RESAMPLES
    return intervals, wins


def _resampled(study: Study, seats: Sequence[Seat], seed: int) -> Any:
    """Scores of RESAMPLES draws of the prompts, float64 [draws, seats]; NaN where nothing moved."""
    import numpy as np

    rng = np.random.default_rng(seed)
    even = np.full(study.prompts, 1 / study.prompts)
    block = max(1, (1 << 20) // study.prompts)  # resamples at a time: 8 MiB of counts
    # Prompts x seats: what a prompt adds to D, and to what D is divided by
    values = np.array([study.scores(seat) for seat in seats], np.float64).T
    weights = np.array([study.departed(seat.alpha) or [] for seat in seats], np.float64).T
    found = []
    for start in range(0, RESAMPLES, block):
        drawn = rng.multinomial(study.prompts, even, min(block, RESAMPLES - start))
        found.append(drawn @ values)
        if weights.size:
            moved = drawn @ weights
            found[-1] = np.where(moved > 0, 100 * found[-1] / np.maximum(moved, 1), np.nan)
    # Rounded so that equal sums of distances are equal, in whatever order they were added
    return np.concatenate(found).round(9)


# Notes


def _notes(
    election: Election, wins: Mapping[float, float], noise: tuple[int, float] | None
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


def _notes_on_grid(election: Election) -> Iterator[str]:
    """What the alphas themselves bring with them: steps, ends, a lone interior."""
    study, inner = election.study, election.rounds[0]
    if len(inner) == 1 == len(election.rounds):
        yield f"Only alpha {inner[0].alpha} lies between two others, so no other can win."
    points = election.grid
    if study.relative and points[0] and not study.origin:
        yield f"The answers at alpha {points[0]} are taken for the base's; begin the grid with 0."
    steps = [second - first for first, second in itertools.pairwise(points)]
    if max(steps) > 1.5 * min(steps):
        yield (
            f"The alphas are not evenly spaced (steps of {_shown(min(steps))} to"
            f" {_shown(max(steps))}): close neighbours score lower for that alone."
        )
    scores = [study.score(seat) or 0 for seat in inner if study.eligible(seat.alpha)]
    for end, neighbour in ((points[0], points[1]), (points[-1], points[-2])):
        difference = study.scaled(study.total(study.differences(*sorted((end, neighbour)))), end)
        if difference is None or not scores or not study.eligible(end):
            continue
        if 2 * difference < min(scores):
            yield (
                f"Alpha {end} differs from its one neighbour by {_shown(difference)}, less than"
                f" half of the grid's best score, {_shown(min(scores))}; but an end cannot win."
            )


def _notes_on_collapse(election: Election) -> Iterator[str]:
    study, count = election.study, election.study.prompts
    usual = f"{study.degenerate(study.smallest)} at alpha {study.smallest}"
    for alpha in sorted(study.answers):
        if not study.sound(alpha):
            yield (
                f"Alpha {alpha} is not eligible: {study.degenerate(alpha)} of {count} answers are"
                f" empty, repeating or constant, {usual}."
            )
        elif alpha != study.smallest and not study.eligible(alpha):
            yield f"Alpha {alpha} is not eligible: no answer there has left the base's."
    if not election.best:
        yield f"No alpha between two others is eligible: the smallest, {study.smallest}, is taken."
    elif 2 * study.degenerate(election.chosen) >= count:
        yield (
            f"{study.degenerate(election.chosen)} of {count} answers at the chosen alpha are empty,"
            f" repeating or constant, {usual}: their consistency says little."
        )


def _listed(seats: Sequence[Seat]) -> str:
    words = [str(seat.alpha) for seat in seats]
    return ", ".join(words[:-1]) + " and " + words[-1]


def _shown(value: float | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
