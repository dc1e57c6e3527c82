"""Label-free rules: from the answers at a grid of alphas, how good is each alpha?

A rule is a pure function of a View and gives one score per alpha: the highest wins, ties go to the
smaller alpha, minus infinity cannot win. A View holds no labels. Some rules are the mean over the
prompts of a worth, which `guarded` needs to tell a gain from chance. `zoo.md` says which other
rules were tried and gained nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

MARKEDLY = 0.1
"""Share of the prompts by which degenerate answers must exceed the smallest alpha's to matter."""
CONSTANT = 0.9
"""Share of the prompts that must get one and the same answer for it to count as constant."""
NEVER = -np.inf


@dataclass(frozen=True, slots=True)
class View:
    """What one search knows. Axes: A alphas, N prompts; alpha 0 comes first and is the base.

    alphas: float64 [A], ascending. answers: int64 [A, N], 0 or more, equal where the texts are the
    same. confidence: float64 [A, N], probability of the whole greedy answer. entropy: float64
    [A, N], mean over the answer's tokens, nats. degenerate: bool [A, N], empty or repeating.
    donor, donor_confidence: [N], the donor's own answer in its own architecture.
    """

    alphas: Floats
    answers: Ints
    confidence: Floats
    entropy: Floats
    degenerate: Bools
    donor: Ints
    donor_confidence: Floats

    @property
    def parents(self) -> Ints:
        """Answers of base and donor, int64 [2, N]."""
        return np.stack((self.answers[0], self.donor))

    @property
    def trust(self) -> Floats:
        """Confidence of base and donor, float64 [2, N]."""
        return np.stack((self.confidence[0], self.donor_confidence))

    @property
    def like(self) -> Floats:
        """1 where the answer is the base's, the donor's: float64 [2, A, N]."""
        same: Any = self.parents[:, None] == self.answers[None]
        return np.asarray(same, np.float64)


Rule = Callable[[View], Floats]
"""rule(view) -> scores, float64 [A]."""
Worth = Callable[[View], Floats]
"""worth(view) -> what each answer is worth, float64 [A, N]."""


def chosen(scores: Floats) -> int:
    """Where the highest score stands; the first of equal ones, and of none the smallest alpha."""
    return int(np.argmax(np.round(scores, 9)))


def mean_of(worth: Worth) -> Rule:
    """The rule that averages a worth over the prompts; alphas of degenerate answers cannot win."""

    def rule(view: View) -> Floats:
        return np.where(eligible(view), worth(view).mean(axis=1), NEVER)

    return rule


def guarded(worth: Worth, errors: float = 1.0) -> Rule:
    """As `mean_of`, but alphas that beat alpha 0 by less than so many standard errors cannot win.

    The error is that of the mean difference over the prompts, so the rule stays with the base
    unless these prompts show a gain.
    """

    def rule(view: View) -> Floats:
        worths = worth(view)
        over = worths - worths[0]
        error = over.std(axis=1) / np.sqrt(over.shape[1])
        may = eligible(view) & (over.mean(axis=1) > errors * error)
        may[0] = True
        return np.where(may, worths.mean(axis=1), NEVER)

    return rule


def eligible(view: View) -> Bools:
    """Bool [A]: degenerate answers (constant ones too) not markedly more than at alpha 0.

    As `lowmem_adamms.search` has it.
    """
    count = view.answers.shape[1]
    shares = np.array([commonest(row)[1] for row in view.answers])
    bad = view.degenerate.sum(axis=1)
    for i in np.flatnonzero(shares >= CONSTANT):
        if shares[0] < CONSTANT - MARKEDLY:
            common = view.answers[i] == commonest(view.answers[i])[0]
            bad[i] = (view.degenerate[i] | common).sum()
    return np.asarray(bad - bad[0] <= MARKEDLY * count, np.bool_)


def commonest(row: Ints) -> tuple[int, float]:
    """The answer that most prompts get, and their share."""
    counts = np.bincount(row)
    return int(counts.argmax()), float(counts.max() / len(row))


# Consistency


def changes(view: View) -> Bools:
    """Where an answer differs from the one at the next alpha, bool [A - 1, N]."""
    return np.asarray(view.answers[1:] != view.answers[:-1], np.bool_)


def pairwise(view: View) -> Floats:
    """The paper's: fewest changes to both neighbours; an end has one and cannot win."""
    counts = changes(view).sum(axis=1).astype(np.float64)
    return _inner(-(counts[:-1] + counts[1:]))


def joint(view: View) -> Floats:
    """As in the paper's appendix and the authors' script: a prompt counts once."""
    moves = changes(view)
    return _inner(-(moves[:-1] | moves[1:]).sum(axis=1).astype(np.float64))


def one_sided(view: View) -> Floats:
    """The paper's with the ends judged by twice their one difference; no degenerate winners."""
    counts = changes(view).sum(axis=1).astype(np.float64)
    padded = np.concatenate((counts[:1], counts, counts[-1:]))
    return np.where(eligible(view), -(padded[:-1] + padded[1:]), NEVER)


def per_distance(view: View) -> Floats:
    """D divided by how many answers have left the base's: standing still near it is no merit."""
    moved = (view.answers != view.answers[0]).sum(axis=1)
    scores = pairwise(view) / np.maximum(moved, 1)
    return np.where(eligible(view) & (moved > 0), scores, NEVER)


def _inner(scores: Floats) -> Floats:
    """The scores with both ends of the grid added, which cannot win."""
    return np.concatenate(([NEVER], scores, [NEVER]))


# Confidence


def surer(view: View) -> Floats:
    """Agreement with whichever parent is the more confident, weighted by that confidence."""
    base_is_surer = view.trust[0] >= view.trust[1]
    agrees = np.where(base_is_surer, view.like[0], view.like[1])
    return np.asarray(agrees * view.trust.max(axis=0), np.float64)


def certainty(view: View) -> Floats:
    """Less entropy over the answer's tokens."""
    return -view.entropy


def confidence(view: View) -> Floats:
    """The merged model's own probability of its answer."""
    return view.confidence


def nuclear(view: View) -> Floats:
    """Confidence and diversity: the nuclear norm of the matrix of prompts by answers.

    Each row has one entry, the answer's confidence, so columns are orthogonal and the norm is the
    sum of their lengths. After Deng et al. 2023, who have whole distributions.
    """
    out = np.empty(len(view.alphas))
    for i, (row, sure) in enumerate(zip(view.answers, view.confidence, strict=True)):
        _, columns = np.unique(row, return_inverse=True)
        out[i] = np.sqrt(np.bincount(columns, weights=sure**2)).sum()
    return np.where(eligible(view), out, NEVER)


# By name


def fixed(alpha: float) -> Rule:
    """No search: the alpha of the grid that lies nearest."""

    def rule(view: View) -> Floats:
        return -np.abs(view.alphas - alpha)

    return rule


FIXED: Mapping[str, Rule] = {f"fixed {alpha}": fixed(alpha) for alpha in (0.0, 0.1, 0.3, 0.5)}
RULES: Mapping[str, Rule] = {
    "pairwise": pairwise,
    "joint": joint,
    "one-sided": one_sided,
    "per-distance": per_distance,
    "surer": mean_of(surer),
    "surer, guarded": guarded(surer),
    "entropy": mean_of(certainty),
    "confidence": mean_of(confidence),
    "confidence, guarded": guarded(confidence),
    "nuclear": nuclear,
}
"""Every rule that may be chosen, by the name it is reported under; fixed alphas stand apart."""
