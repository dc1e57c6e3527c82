"""What the page of a search shows, as numbers and sentences; the template lays them out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..searching.measures import RULES, MeasureRule
from ..searching.resampling import RESAMPLES
from ..searching.scoring import MARKEDLY
from ..searching.search import Candidate, Result
from ..values import format_count
from .text import DASH, format_percent

if TYPE_CHECKING:
    from .answers import AnswerRun


@dataclass(frozen=True, slots=True)
class SearchView:
    """The result of a search, and how the page writes its numbers."""

    result: Result

    # Alphas

    @property
    def alphas(self) -> tuple[float, ...]:
        """The grid, ascending."""
        return tuple(candidate.alpha for candidate in self.result.candidates)

    @property
    def chosen_position(self) -> int | None:
        """Where the chosen alpha stands in the grid."""
        return self.alphas.index(self.result.alpha) if self.result.alpha in self.alphas else None

    def format_alpha(self, alpha: float) -> str:
        """An alpha for a column: with as many decimals as any alpha of the grid needs."""
        return f"{alpha:.{count_decimals([*self.alphas, self.result.alpha])}f}"

    def format_short_alpha(self, alpha: float) -> str:
        """An alpha for a sentence: with as few decimals as it needs."""
        return f"{alpha:.{count_decimals([alpha])}f}"

    def format_alphas(self, run: AnswerRun) -> str:
        """The alphas of a run of equal answers."""
        ends = (self.format_short_alpha(self.alphas[i]) for i in (run.first, run.last))
        return DASH.join(dict.fromkeys(ends))

    def format_neighbours(self, candidate: Candidate) -> str:
        """The alphas that a candidate was compared with."""
        return ", ".join(
            DASH if alpha is None else self.format_alpha(alpha) for alpha in candidate.neighbours
        )

    # Chips, of answers at the alpha that is marked

    @property
    def chips(self) -> dict[str, tuple[str, str]]:
        """What each chip is called, and what it means."""
        smallest = f"alpha {self.format_short_alpha(self.alphas[0])}"
        usual = "base" if self.alphas[0] == 0 else smallest
        return {
            "changed": ("changed", "The answer is not that of the alpha before or after"),
            "differs": (f"differs from {usual}", f"The answer is not that at {smallest}"),
            "degenerate": (
                "degenerate",
                "The answer is empty, repeats itself, or is the same to nearly all",
            ),
        }

    # Candidates

    @property
    def is_refined(self) -> bool:
        """Whether alphas were added to the grid; scores compare within one round only."""
        return any(candidate.round for candidate in self.result.candidates)

    def is_current(self, candidate: Candidate) -> bool:
        """Whether no later round has scored its alpha anew."""
        return candidate not in self.result.earlier

    def is_chosen(self, candidate: Candidate) -> bool:
        """Whether it is the one to merge at."""
        return self.is_current(candidate) and candidate.alpha == self.result.alpha

    def is_tied(self, candidate: Candidate) -> bool:
        """Whether it shares the best score with another."""
        return self.is_current(candidate) and candidate.alpha in self.result.ties

    def is_collapsed(self, candidate: Candidate) -> bool:
        """Whether half its answers are degenerate, or markedly more than at the smallest alpha."""
        excess = candidate.degenerate - self.result.candidates[0].degenerate
        prompts = self.result.prompts
        return excess > MARKEDLY * prompts or 2 * candidate.degenerate >= prompts

    # Scores

    @property
    def rule(self) -> MeasureRule:
        """What a score is."""
        return RULES[self.result.measure]

    def format_difference(self, count: int | None) -> str:
        """A number of answers that differ."""
        return DASH if count is None else f"{count:,}"

    def format_score(self, value: float | None) -> str:
        """A score, or a percentile of it, which may be a fraction of an answer."""
        if value is None or not math.isfinite(value):
            return DASH
        value = round(value, self.rule.decimals)
        decimals = 0 if self.rule.compares and value == int(value) else self.rule.decimals
        return f"{value:,.{decimals}f}"

    def format_interval(self, candidate: Candidate) -> str:
        """The 95 % interval of a score."""
        if candidate.interval is None:
            return DASH
        return " to ".join(map(self.format_score, candidate.interval))

    def format_share(self, share: float | None) -> str:
        """How often an alpha has the lowest score."""
        return DASH if share is None else format_percent(share)

    # Sentences

    @property
    def about(self) -> str:
        """What was searched, in a line."""
        counts = (
            format_count(self.result.prompts, "prompt"),
            format_count(len(self.alphas), "alpha"),
        )
        return f"Search for alpha: {', '.join(counts)}, measure {self.result.measure}"

    @property
    def advice(self) -> str:
        """What to do."""
        if self.result.verdict and not self.result.verdict.merge:
            return "Do not merge."
        return f"Merge at alpha {self.format_short_alpha(self.result.alpha)}."

    def list_reasons(self) -> Iterator[str]:
        """Why this alpha was chosen, and how sure that is."""
        if self.result.verdict:
            yield self.result.verdict.reason
        yield from self._compare_scores()
        result = self.result
        if result.wins:
            share = format_percent(result.wins.get(result.alpha, 0.0))
            yield (
                "If the prompts are drawn again from these, at random, this alpha has the lowest D"
                f" in {share} of {RESAMPLES:,} draws."
            )
        if result.noise is not None:
            yield (
                f"Chance alone: asked twice at this alpha, {result.noise:,.0f} of"
                f" {format_count(result.prompts, 'answer')} differed."
            )

    def _compare_scores(self) -> Iterator[str]:
        """The chosen alpha's score beside those of the others in its round."""
        result = self.result
        chosen = next((c for c in result.candidates if c.alpha == result.alpha), None)
        if chosen is None or chosen.score is None:
            yield "This alpha has no score of its own: a score needs two neighbours in the grid."
            return
        scores = {
            c: c.score for c in result.candidates if c.score is not None and c.round == chosen.round
        }
        lower = [candidate for candidate, score in scores.items() if score < chosen.score]
        higher = {candidate: score for candidate, score in scores.items() if score > chosen.score}
        yield self._describe_score(chosen, len(scores), is_lowest=not lower)
        for candidate in lower:
            yield (
                f"Alpha {self.format_short_alpha(candidate.alpha)} has a lower D,"
                f" {self.format_score(candidate.score)}, but {candidate.degenerate:,} of"
                f" {format_count(result.prompts, 'answer')} there are empty, repeating or all the"
                " same."
            )
        if higher:
            second = min(higher, key=lambda candidate: higher[candidate])
            yield (
                f"Next best: alpha {self.format_short_alpha(second.alpha)} with"
                f" {self.format_score(second.score)}."
            )

    def _describe_score(self, chosen: Candidate, scored: int, *, is_lowest: bool) -> str:
        """Its score, rank, ties and interval, in one sentence."""
        where = f" in refinement {chosen.round}" if chosen.round else ""
        rank = f"the lowest of {scored}{where}" if scored > 1 else f"the only one{where}"
        if not is_lowest:
            rank = "the lowest but for the degenerate"
        others = [self.format_short_alpha(a) for a in self.result.ties if a != chosen.alpha]
        tied = f", tied with {' and '.join(others)}" if others else ""
        verb = "adds up" if self.rule.compares else "is"
        return (
            f"D is {self.format_score(chosen.score)} here, {rank}{tied}. It {verb}"
            f" {self.rule.meaning}."
        )


def count_decimals(alphas: Iterable[float]) -> int:
    """How many decimals, one or more, show all of these alphas."""
    return max(len(f"{alpha:.6f}".rstrip("0").partition(".")[2]) for alpha in alphas) or 1
