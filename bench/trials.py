"""Searches on recorded answers, judged: which alpha each rule chooses, and what that costs.

Every sample of prompts is one search. Regret is what the chosen alpha lacks to the best one of all
recorded alphas, in points of the mean accuracy over tasks on the evaluation half.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from evidence import Pair, spearman
from rules import NEVER, Bools, Floats, Ints, Rule, chosen

from lowmem_adamms.searching.search import choose
from lowmem_adamms.settings import Measure

NOISE = 2.0  # standard errors that a loss against the base must exceed to count


@dataclass(frozen=True, slots=True)
class Outcome:
    """One rule on one pair, S searches.

    place: of the chosen alphas in the pair's. regret: points below the best alpha. gain: points
    above the base. worse: whether the loss against the base exceeds the noise. correlation: of the
    scores with accuracy over the alphas that may win (nan where either does not vary).
    """

    place: Ints
    regret: Floats
    gain: Floats
    worse: Bools
    correlation: Floats


class Judge:
    """One pair's accuracies on the evaluation half, computed once."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.accuracy = pair.accuracy()
        self.error, self.error_to_base = pair.errors(pair.right)
        self.parents = (float(self.accuracy[0]), float(pair.accuracy(pair.donor_right)))

    @property
    def oracle(self) -> int:
        """Place of the best alpha; the smaller of equals."""
        return int(self.accuracy.argmax())

    def __call__(self, places: Sequence[int], correlation: Sequence[float] = ()) -> Outcome:
        """What these choices are worth."""
        place = np.array(places, np.int64)
        gain = self.accuracy[place] - self.accuracy[0]
        return Outcome(
            place,
            self.accuracy.max() - self.accuracy[place],
            gain,
            gain < -NOISE * self.error_to_base[place],
            np.array(correlation, np.float64),
        )


def run(
    judge: Judge, rules: Mapping[str, Rule], grid: Ints, draws: Sequence[Ints]
) -> dict[str, Outcome]:
    """Every rule on every sample of prompts, over the alphas at these places."""
    places: dict[str, list[int]] = {name: [] for name in rules}
    found: dict[str, list[float]] = {name: [] for name in rules}
    truth = judge.accuracy[grid]
    for prompts in draws:
        view = judge.pair.view(grid, prompts)
        for name, rule in rules.items():
            scores = rule(view)
            places[name].append(int(grid[chosen(scores)]))
            may = scores > NEVER
            found[name].append(spearman(scores[may], truth[may]))
    return {name: judge(places[name], found[name]) for name in rules}


def run_product(
    judge: Judge, grid: Ints, draws: Sequence[Ints], measure: Measure = "pairwise"
) -> tuple[Outcome, float]:
    """`choose` on the same answers; and the share of searches with ties."""
    places, ties = [], 0
    for prompts in draws:
        texts = {
            float(judge.pair.alphas[i]): [judge.pair.texts[i][n] for n in prompts] for i in grid
        }
        result = choose(texts, measure=measure)
        places.append(int(np.abs(judge.pair.alphas - result.alpha).argmin()))
        ties += bool(result.ties)
    return judge(places), ties / max(len(draws), 1)


def best_elsewhere(
    outcomes: Sequence[Mapping[str, Outcome]], groups: Sequence[Hashable]
) -> list[str | None]:
    """For each pair the rule with the least mean regret on all pairs of other groups.

    outcomes: one mapping by rule for each pair; groups: one for each pair. None where no other
    group is there to learn from. The rules' order breaks ties.
    """
    means = np.array([[v.regret.mean() for v in by_rule.values()] for by_rule in outcomes])
    names = list(outcomes[0])
    out: list[str | None] = []
    for group in groups:
        others = [i for i, other in enumerate(groups) if other != group]
        # Rounded, so that equal regrets tie whatever order they were added in
        totals = means[others].mean(axis=0).round(9) if others else None
        out.append(None if totals is None else names[int(totals.argmin())])
    return out


def outcomes_elsewhere(
    outcomes: Sequence[Mapping[str, Outcome]], groups: Sequence[Hashable]
) -> list[Outcome] | None:
    """The outcomes of those rules, each on the pair that had no say in its choice."""
    names = best_elsewhere(outcomes, groups)
    found = [by_rule[name] for by_rule, name in zip(outcomes, names, strict=True) if name]
    return found if len(found) == len(outcomes) else None


def pooled(outcomes: Sequence[Outcome], part: Callable[[Outcome], Floats]) -> Floats:
    """One figure of all searches of all pairs."""
    return np.concatenate([part(verdict) for verdict in outcomes])
