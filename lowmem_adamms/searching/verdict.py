"""Whether to merge at all, judged without labels as alpha is.

A donor that breaks the model within the grid is of no use, unless the answers before that become
surer or more varied, by their nuclear norm: tuning makes a model forget, and what has forgotten
gives few answers to many questions. `bench/zoo.md` tells how often that holds.
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
    """The verdict on an alpha, by the collapse of answers and their nuclear scores.

    The score has fallen if it did so by more than its standard error over draws of the prompts.
    None where it is not known: without probabilities, and without alpha 0.
    """
    before = comparison.nuclear_score(comparison.smallest)
    after = comparison.nuclear_score(chosen)
    if comparison.smallest != 0 or before is None or after is None:
        return None
    at_zero = f"nuclear D is {before:.1f} % at alpha 0"
    collapse = comparison.find_collapse()
    broken = "" if collapse is None else f" From alpha {collapse:g} on they collapse."
    if chosen == 0:
        why = "No other alpha can be chosen"
        if not comparison.rule.compares:
            why = f"The base itself is chosen, by {comparison.measure}"
        return Verdict(False, f"{why}: {at_zero}.{broken}")
    drawn = draw_nuclear_scores(comparison, (0.0, chosen), seed)
    error = float((drawn[:, 0] - drawn[:, 1]).std())
    figures = f"{at_zero}, {after:.1f} % at {chosen:g}, standard error {error:.1f}.{broken}"
    if before - after > error:
        return Verdict(True, f"The answers become surer or more varied: {figures}")
    if broken:
        return Verdict(False, f"The answers are no surer or more varied: {figures}")
    return Verdict(True, f"No alpha breaks the model, though answers are no surer: {figures}")
