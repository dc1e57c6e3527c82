"""Whether to merge at all, judged without labels as alpha is: by the answers' nuclear norm.

Tuning makes a model forget, and what has forgotten gives few answers to many questions. Where a
merge brings something back, its answers are more varied and no less sure; a donor of no use makes
them less sure. `bench/zoo.md` tells how often that holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from .resampling import draw_nuclear_scores
from .scoring import AnswerComparison


@dataclass(frozen=True, slots=True)
class Verdict:
    """merge: whether the chosen alpha is expected to beat the base. reason: a sentence on why."""

    merge: bool
    reason: str


def judge_merge(comparison: AnswerComparison, chosen: float, seed: int) -> Verdict | None:
    """The verdict on an alpha, by its nuclear score and that of alpha 0.

    To merge, the score must fall by more than the standard error of that, over draws of the
    prompts. None where it is not known: without probabilities, and without alpha 0.
    """
    before = comparison.nuclear_score(comparison.smallest)
    after = comparison.nuclear_score(chosen)
    if comparison.smallest != 0 or before is None or after is None:
        return None
    at_zero = f"nuclear D is {before:.1f} % at alpha 0"
    if chosen == 0 and not comparison.rule.pooled:
        return Verdict(False, f"The base itself is chosen, by {comparison.measure}: {at_zero}.")
    if chosen == 0:
        return Verdict(False, f"No alpha makes the answers surer or more varied: {at_zero}.")
    drawn = draw_nuclear_scores(comparison, (0.0, chosen), seed)
    error = float((drawn[:, 0] - drawn[:, 1]).std())
    figures = f"{at_zero}, {after:.1f} % at {chosen:g}, standard error {error:.1f}"
    if before - after > error:
        return Verdict(True, f"The answers become surer or more varied: {figures}.")
    return Verdict(False, f"By these prompts the answers are no surer or more varied: {figures}.")
