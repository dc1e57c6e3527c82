"""The measures: what the score D of an alpha is. The lowest D is the best."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from ..settings import Measure


@dataclass(frozen=True, slots=True)
class MeasureRule:
    """How one measure makes D from the answers at an alpha.

    add: what a prompt adds, of whether its answer differs from that at the previous alpha, and
        whether from that at the next. None: D is made of how sure the model is instead.
    takes: what must be known of every answer for that. pooled: prompts that get one answer count
        together, so that D is no sum over the prompts.
    divide_by: what the sum is divided by: the answers that are no longer the base's, or all
        prompts; None: by nothing. factor: what it is multiplied by.
    unit: of D. decimals: how many of them show it. meaning: D in words. topic: what the curve of D
        shows.
    """

    meaning: str
    add: Callable[[bool, bool], int] | None = operator.add
    takes: Literal["entropy", "log_probability"] | None = None
    pooled: bool = False
    divide_by: Literal["moved", "prompts"] | None = None
    factor: int = 1
    unit: str = "answers"
    decimals: int = 1
    topic: str = "Disagreement"

    @property
    def lacks(self) -> str:
        """What an answer does not have where `takes` is not known."""
        return (self.takes or "").replace("_", "-")

    @property
    def why_unknown(self) -> str:
        """Why an answer may not have it."""
        if self.takes == "entropy":
            return "vLLM tells none, nor do answers that others have recorded"
        return "answers that others have recorded tell none"

    @property
    def compares(self) -> bool:
        """Whether answers are compared with the neighbours', so that the grid's ends have no D."""
        return self.add is not None


_NEIGHBOURS = (
    "answers that differ from the previous alpha's, plus those that differ from the next one's"
)
RULES: Mapping[Measure, MeasureRule] = {
    # Algorithm 1
    "pairwise": MeasureRule(_NEIGHBOURS),
    # Appendix B
    "joint": MeasureRule(
        "answers that differ from the previous alpha's or the next one's", operator.or_
    ),
    # Near the base answers hardly change because they have hardly moved, which is no merit
    "relative": MeasureRule(
        f"{_NEIGHBOURS}, in per cent of those that are no longer the base's",
        divide_by="moved",
        factor=100,
        unit="%",
    ),
    "entropy": MeasureRule(
        "the mean entropy of the distributions that the answers' tokens were chosen from: how"
        " unsure the model is",
        add=None,
        takes="entropy",
        divide_by="prompts",
        unit="nats",
        decimals=4,
        topic="Uncertainty",
    ),
    # Deng et al. 2023, arXiv 2302.01094: a model that forgot gives few answers to many questions
    "nuclear": MeasureRule(
        "how far the answers are from being sure and all different: the nuclear norm of the"
        " probabilities by prompt and answer, taken from its maximum, in per cent of it",
        add=None,
        takes="log_probability",
        pooled=True,
        unit="%",
        topic="Lack of confidence and variety",
    ),
}
