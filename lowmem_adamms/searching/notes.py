"""What weakens the choice of an alpha, in sentences for the user."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from ..values import format_count
from .resampling import RESAMPLES, Wins
from .scoring import AnswerComparison, GridPoint, Rounds, best_points, eligible_points

FEW_PROMPTS = 30
"""Below this a note says that chance decides."""
Noise = tuple[int, float]
"""How many answers of a second run differ, and the score that this alone would make."""


def write_notes(
    comparison: AnswerComparison, rounds: Rounds, wins: Wins, noise: Noise | None
) -> Iterator[str]:
    """All notes on a finished search. noise: None if it was not measured."""
    if comparison.prompt_count < FEW_PROMPTS:
        count = format_count(comparison.prompt_count, "prompt")
        yield f"Only {count}: chance decides much; the paper takes 100."
    if comparison.repeated_count:
        yield (
            f"{comparison.repeated_count} of {comparison.prompt_count} prompts repeat others, white"
            " space aside: what they ask counts several times."
        )
    yield from _note_unfinished(comparison)
    if comparison.rule.compares:
        yield from _note_grid(comparison, rounds)
        yield from _note_quiet_ends(comparison, rounds[0])
    yield from _note_ineligible(comparison)
    best = best_points(comparison, rounds)
    if not best:
        smallest = comparison.smallest
        yield f"No alpha between two others can be chosen, so {smallest}, the smallest, is taken."
        return
    yield from _note_collapse(comparison, best[0].alpha)
    if best[0].next is None and best[0].alpha < 1:
        yield f"Alpha {best[0].alpha} is the largest of the grid; one beyond it may score lower."
    yield from _note_equal_scores(comparison, rounds)
    yield from _note_close_call(comparison, best, wins)
    if noise:
        yield from _note_noise(comparison, best[0], noise)


def _note_unfinished(comparison: AnswerComparison) -> Iterator[str]:
    if counts := comparison.unfinished:
        listed = ", ".join(f"{counts[alpha]} at alpha {alpha}" for alpha in sorted(counts))
        yield (
            f"Answers that end inside their reasoning count as empty: {listed}. Allow more tokens"
            " for an answer."
        )


def _note_grid(comparison: AnswerComparison, rounds: Rounds) -> Iterator[str]:
    alphas = [point.alpha for point in rounds[0]]
    if len(rounds) == 1 and len(alphas) == 3:
        yield f"Only alpha {alphas[1]} lies between two others, so no other can be chosen."
    if comparison.rule.divide_by == "moved" and alphas[0] > 0:
        yield f"The answers at alpha {alphas[0]} are taken for the base's; begin the grid with 0."
    steps = [second - first for first, second in itertools.pairwise(alphas)]
    if max(steps) > 1.5 * min(steps):
        yield (
            f"The alphas are not evenly spaced (steps of {_format(min(steps))} to"
            f" {_format(max(steps))}): close neighbours score lower for that alone."
        )


def _note_quiet_ends(comparison: AnswerComparison, grid: Sequence[GridPoint]) -> Iterator[str]:
    """An end has one neighbour and so no score, though its answers may change least of all."""
    scores = eligible_points(comparison, grid)
    if not scores:
        return
    lowest = min(scores.values())
    for end, neighbour in ((grid[0].alpha, grid[1].alpha), (grid[-1].alpha, grid[-2].alpha)):
        count = sum(comparison.differences(end, neighbour))
        difference = comparison.scale(count, end)
        if difference is None or not comparison.is_sound(end):
            continue
        if 2 * difference < lowest:
            further = "; a grid that goes on would give it one" if end > neighbour else ""
            yield (
                f"Alpha {end} differs from its only neighbour by {_format(difference)}, less than"
                f" half of the best D, {_format(lowest)}. Without a neighbour on either side it has"
                f" no D and cannot be chosen{further}."
            )


def _note_ineligible(comparison: AnswerComparison) -> Iterator[str]:
    collapse = comparison.find_collapse()
    if collapse is not None:
        share = comparison.compare_probability(collapse)
        yield (
            f"From alpha {collapse} on none can be chosen: there the answers collapse. Their tokens"
            f" are {share:.0%} as probable as at alpha {comparison.smallest}."
        )
    for alpha in sorted(comparison.answers):
        if collapse is not None and alpha >= collapse:
            return
        if comparison.has_many_degenerate(alpha):
            yield (
                f"Alpha {alpha} cannot be chosen: {comparison.degenerate[alpha]} of"
                f" {comparison.prompt_count} answers are empty, repeating or all the same,"
                f" {_usual(comparison)}."
            )
        elif alpha != comparison.smallest and (reason := _explain_no_score(comparison, alpha)):
            yield f"Alpha {alpha} cannot be chosen: {reason}."


def _explain_no_score(comparison: AnswerComparison, alpha: float) -> str:
    """Why an alpha has no score, if not for want of neighbours."""
    if comparison.rule.divide_by == "moved" and not any(comparison.left_base(alpha)):
        return "its answers are still the base's"
    if count := comparison.count_unknown(alpha):
        return f"{count} of {comparison.prompt_count} answers have no {comparison.rule.lacks}"
    return ""


def _note_collapse(comparison: AnswerComparison, chosen: float) -> Iterator[str]:
    degenerate = comparison.degenerate[chosen]
    if 2 * degenerate >= comparison.prompt_count:
        yield (
            f"{degenerate} of {comparison.prompt_count} answers at the chosen alpha are empty,"
            f" repeating or all the same, {_usual(comparison)}: that they"
            f" {'agree' if comparison.rule.compares else 'are sure'} says little."
        )


def _note_equal_scores(comparison: AnswerComparison, rounds: Rounds) -> Iterator[str]:
    for points in rounds:
        scores = eligible_points(comparison, points)
        if len(scores) > 1 and len(set(scores.values())) == 1:
            yield (
                f"The search cannot tell these alphas apart: {_list_alphas(scores)} all score"
                f" {_format(min(scores.values()))}."
            )


def _note_close_call(
    comparison: AnswerComparison, best: Sequence[GridPoint], wins: Wins
) -> Iterator[str]:
    chosen = best[0].alpha
    if len(best) > 1:
        yield (
            f"{_list_alphas(best)} share the best score, {_format(comparison.score(best[0]))};"
            f" the smallest, {chosen}, is taken."
        )
    elif wins[chosen] < 0.5:
        yield (
            f"If the prompts are drawn again from these, at random, alpha {chosen} has the lowest D"
            f" in only {wins[chosen]:.0%} of {RESAMPLES} draws: with more prompts another may be"
            " chosen."
        )


def _note_noise(comparison: AnswerComparison, chosen: GridPoint, noise: Noise) -> Iterator[str]:
    count, noise_score = noise
    score = comparison.score(chosen) or 0
    if count and noise_score >= score:
        yield (
            f"Asked twice at alpha {chosen.alpha}, {count} of {comparison.prompt_count} answers"
            f" differed by chance. That alone makes a D of {_format(noise_score)}, and the best D"
            f" is {_format(score)}: it may be chance too."
        )


def _usual(comparison: AnswerComparison) -> str:
    return f"{comparison.degenerate[comparison.smallest]} at alpha {comparison.smallest}"


def _list_alphas(points: Iterable[GridPoint]) -> str:
    words = [str(point.alpha) for point in points]
    return ", ".join(words[:-1]) + " and " + words[-1]


def _format(value: float | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
