"""How sure a choice is: scores and winners when the prompts are resampled (bootstrap)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .scoring import (
    AnswerComparison,
    GridPoint,
    Rounds,
    earlier_points,
    eligible_points,
    latest_points,
)

RESAMPLES = 1000
_COUNTS_HELD = 1 << 20  # float64 numbers at a time, 8 MiB

Intervals = dict[GridPoint, tuple[float, float]]
"""95 % interval of the score of each point that has one."""
Wins = dict[float, float]
"""How often (0..1) each alpha of the last round that can have a score has the lowest."""


def resample(comparison: AnswerComparison, rounds: Rounds, seed: int) -> tuple[Intervals, Wins]:
    """Intervals of all scores, and how often each alpha of the last round wins."""
    import numpy as np

    running = [point for point in rounds[-1] if comparison.can_score(point)]
    wins = {point.alpha: 0.0 for point in running}
    every = [*latest_points(rounds), *earlier_points(rounds)]
    points = [point for point in every if comparison.score(point) is not None]
    if not points:
        return {}, wins
    if comparison.rule.pooled:
        scores = draw_nuclear_scores(comparison, [point.alpha for point in points], seed)
    else:
        scores = _resampled_scores(comparison, points, seed)
    low, high = np.nanpercentile(scores, (2.5, 97.5), axis=0).tolist()
    intervals = dict(zip(points, zip(low, high, strict=True), strict=True))
    eligible = list(eligible_points(comparison, running))
    if eligible:
        columns = scores[:, [points.index(point) for point in eligible]]
        winners = np.nan_to_num(columns, nan=np.inf).argmin(axis=1)  # the smaller alpha of equals
        for i, point in enumerate(eligible):
            wins[point.alpha] = int((winners == i).sum()) / RESAMPLES
    return intervals, wins


def _resampled_scores(comparison: AnswerComparison, points: Sequence[GridPoint], seed: int) -> Any:
    """Scores of RESAMPLES draws of the prompts, [draws, points]; NaN where nothing moved."""
    import numpy as np

    scores = np.array([comparison.prompt_scores(p) for p in points], np.float64)
    divisors = [comparison.prompt_divisors(p.alpha) for p in points]
    resampled = []
    for drawn in _draw_prompts(comparison.prompt_count, seed):
        totals = drawn @ scores.T
        if None not in divisors:
            divided_by = drawn @ np.array(divisors, np.float64).T
            totals *= comparison.rule.factor
            totals = np.where(divided_by > 0, totals / np.maximum(divided_by, 1), np.nan)
        resampled.append(totals)
    return np.concatenate(resampled).round(9)


def draw_nuclear_scores(comparison: AnswerComparison, alphas: Sequence[float], seed: int) -> Any:
    """Nuclear scores of RESAMPLES draws of the prompts, [draws, alphas].

    A draw repeats prompts, which makes answers less varied at every alpha. So all are moved to
    where their mean is the score of the prompts themselves.
    """
    import numpy as np

    count = comparison.prompt_count
    matrices = [comparison.answer_squares(alpha) or [] for alpha in alphas]
    resampled = []
    for drawn in _draw_prompts(count, seed):
        norms = [_nuclear_norms(columns, drawn) for columns in matrices]
        resampled.append(100 * (1 - np.stack(norms, axis=1) / count))
    scores = np.concatenate(resampled)
    scores += [comparison.nuclear_score(alpha) for alpha in alphas] - scores.mean(axis=0)
    return scores.round(9)


def _nuclear_norms(columns: Sequence[Sequence[tuple[int, float]]], drawn: Any) -> Any:
    """The nuclear norm of each draw, [draws]. columns: of `answer_squares`."""
    import numpy as np

    return sum(
        np.sqrt(drawn[:, [place for place, _ in column]] @ [square for _, square in column])
        for column in columns
    )


def _draw_prompts(count: int, seed: int) -> Iterator[Any]:
    """RESAMPLES draws of so many prompts: how often each is drawn, [draws, prompts], in blocks."""
    import numpy as np

    rng = np.random.default_rng(seed)
    even = np.full(count, 1 / count)
    block = max(1, _COUNTS_HELD // count)
    for start in range(0, RESAMPLES, block):
        yield rng.multinomial(count, even, min(block, RESAMPLES - start))
