"""Label-free rules: from the answers at a grid of alphas, how good is each alpha?

A rule is a pure function of a View and gives one score per alpha: the highest wins, ties go to the
smaller alpha, minus infinity cannot win. A View holds no labels. Most rules are the mean over the
prompts of a worth, which `guarded` needs to tell a gain from chance. Leaves to others: where the
answers come from and how good the choice was (`evidence.py`, `study.py`).
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


def smoothed(worth: Worth) -> Worth:
    """The worth averaged with both neighbours' in alpha; an end stands in for the one it lacks."""

    def over(view: View) -> Floats:
        worths = worth(view)
        padded = np.concatenate((worths[:1], worths, worths[-1:]))
        return np.asarray((padded[:-2] + padded[1:-1] + padded[2:]) / 3, np.float64)

    return over


def together(*rules: Rule) -> Rule:
    """The rules' scores in standard deviations over the alphas, added up; all must let one win."""

    def rule(view: View) -> Floats:
        scores = np.stack([each(view) for each in rules])
        may: Bools = np.all(scores > NEVER, axis=0)
        if not may.any():
            return np.full(len(may), NEVER)
        open_to = scores[:, may]
        spread = np.maximum(open_to.std(axis=1, keepdims=True), 1e-9)
        out = np.full(len(may), NEVER)
        out[may] = ((open_to - open_to.mean(axis=1, keepdims=True)) / spread).sum(axis=0)
        return out

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


def flicker(view: View) -> Floats:
    """Changes that come to nothing: D less what differs between the neighbours themselves.

    An answer that goes over from one parent to the other changes once, which is the purpose; one
    that goes and returns, or goes on to a third, is unsettled.
    """
    across = (view.answers[2:] != view.answers[:-2]).sum(axis=1).astype(np.float64)
    scores = pairwise(view) + _inner(across, ends=0.0)
    return np.where(eligible(view), scores, NEVER)


def _inner(scores: Floats, ends: float = NEVER) -> Floats:
    return np.concatenate(([ends], scores, [ends]))


# Agreement with the parents


def with_both(view: View) -> Floats:
    """How many of the parents say the same."""
    return np.asarray(view.like.sum(axis=0), np.float64)


def by_confidence(view: View) -> Floats:
    """Agreement with each parent, weighted by that parent's confidence."""
    return _weighted(view.trust, view.like)


def surer(view: View) -> Floats:
    """Agreement with whichever parent is the more confident, weighted by that confidence."""
    return _surer(view, view.trust)


def surer_rank(view: View) -> Floats:
    """`surer` with confidence as rank within a parent: parents need not be equally cocky."""
    return _surer(view, ranks(view.trust))


def surer_odds(view: View) -> Floats:
    """`surer` with confidence as log odds in standard deviations within a parent."""
    return _surer(view, 1 / (1 + np.exp(-standard(view.trust))))


def margin(view: View) -> Floats:
    """For the surer parent's answer by how much it is surer, against the other's likewise."""
    return _margin(view, view.trust)


def margin_rank(view: View) -> Floats:
    """`margin` in ranks."""
    return _margin(view, ranks(view.trust))


def balanced(view: View) -> Floats:
    """What is kept of the prompts on which the base ranks surer, and likewise of the donor's.

    Both halves weigh the same however many prompts each has: a donor that is rarely the surer one
    may still bring all that the base lacks. Prompts on which the parents agree do not count.
    """
    levels = ranks(view.trust)
    differ = view.parents[0] != view.parents[1]
    sides = np.stack((levels[0] >= levels[1], levels[0] < levels[1])) & differ
    weights = sides / np.maximum(sides.sum(axis=1, keepdims=True), 1) * differ.size / 2
    return _weighted(weights, view.like)


def posterior(view: View) -> Floats:
    """Probability of the answer if the parents were calibrated and erred independently."""
    return _posterior(view, view.trust)


def posterior_rank(view: View) -> Floats:
    """`posterior` with ranks for probabilities."""
    return _posterior(view, ranks(view.trust))


def taught(view: View) -> Floats:
    """`surer` with each parent's confidence calibrated by the merged models.

    A parent is trusted as often as the answers at all other alphas are the same as its own on
    prompts where it is about as confident (the nearest fifth of them).
    """
    return _surer(view, np.stack([_taught(view, parent) for parent in (0, 1)]))


def _taught(view: View, parent: int) -> Floats:
    agreed = view.like[parent, 1:].mean(axis=0)
    order = np.argsort(view.trust[parent], kind="stable")
    reach = max(1, len(order) // 10)
    sums = np.concatenate(([0.0], np.cumsum(agreed[order])))
    places = np.arange(len(order))
    low, high = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(order))
    out = np.empty(len(order))
    out[order] = (sums[high] - sums[low]) / (high - low)
    return out


def _weighted(weights: Floats, like: Floats) -> Floats:
    return np.asarray((weights[:, None] * like).sum(axis=0), np.float64)


def _surer(view: View, trust: Floats) -> Floats:
    first = trust[0] >= trust[1]
    return np.asarray(np.where(first, view.like[0], view.like[1]) * trust.max(axis=0), np.float64)


def _margin(view: View, trust: Floats) -> Floats:
    return np.asarray((trust[0] - trust[1]) * (view.like[0] - view.like[1]), np.float64)


def _posterior(view: View, trust: Floats) -> Floats:
    """Bayes over: the base is right, the donor is, neither is; where they agree, both or none."""
    base, donor = np.clip(trust, 1e-6, 1 - 1e-6)
    other = (1 - base) * (1 - donor)
    only = np.stack((base * (1 - donor), donor * (1 - base)))
    alone = _weighted(only / (only.sum(axis=0) + other), view.like)
    both = base * donor / (base * donor + other) * view.like[0]
    return np.asarray(np.where(view.parents[0] == view.parents[1], both, alone), np.float64)


def ranks(values: Floats) -> Floats:
    """Along the last axis, (rank - 1/2) / N in 0..1; equal values share their mean rank."""
    below = (values[..., None, :] < values[..., :, None]).sum(axis=-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(axis=-1)
    return np.asarray((below + equal / 2) / values.shape[-1], np.float64)


def standard(trust: Floats) -> Floats:
    """Log odds, less their mean and divided by their standard deviation, along the last axis."""
    clipped = np.clip(trust, 1e-6, 1 - 1e-6)
    odds = np.log(clipped / (1 - clipped))
    spread = odds.std(axis=-1, keepdims=True)
    return np.asarray((odds - odds.mean(axis=-1, keepdims=True)) / np.maximum(spread, 1e-9))


# The merged models' own word


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


def kept_confidence(view: View) -> Floats:
    """Own confidence, where a parent says the same; an answer of nobody else's is worth nothing."""
    return np.asarray(view.confidence * view.like.max(axis=0), np.float64)


# Votes


def majority(view: View) -> Floats:
    """Agreement with what most alphas say."""
    return _majority(view, np.ones_like(view.confidence))


def sure_majority(view: View) -> Floats:
    """Agreement with what the alphas say, each weighted by its confidence."""
    return _majority(view, view.confidence)


def _majority(view: View, weights: Floats) -> Floats:
    support = _support(view.answers, view.answers, weights)
    best = np.take_along_axis(view.answers, support.argmax(axis=0)[None], axis=0)
    return np.asarray(view.answers == best, np.float64)


def linear_pool(view: View) -> Floats:
    """Share of the confident word behind the answer: base, donor and merged models a third each."""
    sources, weights = _sources(view)
    weighted = weights[:, None] * np.concatenate((view.confidence, view.donor_confidence[None]))
    return _support(view.answers, sources, weighted)


def log_pool(view: View) -> Floats:
    """Probability of the answer when base, donor and the merged models together have a say each.

    Each source spreads what its confidence leaves over all other answers seen; logarithms are
    averaged over the merged models, which are no independent witnesses, and then added up.
    """
    sources, weights = _sources(view)
    sure = np.concatenate((view.confidence, view.donor_confidence[None]))
    sure = np.clip(sure, 1e-6, 1 - 1e-6)
    others = max(len(np.unique(sources)) - 1, 1)
    yes, no = np.log(sure), np.log((1 - sure) / others)
    logs = _support(sources, sources, weights[:, None] * (yes - no))
    logs += (weights[:, None] * no).sum(axis=0)
    powers = np.exp(logs - logs.max(axis=0))
    times = _support(sources, sources, np.ones_like(sure))
    return np.asarray((powers / (powers / times).sum(axis=0))[:-1], np.float64)


def _sources(view: View) -> tuple[Ints, Floats]:
    """Base, merged models, donor, one a row; what each weighs: one, one together, one."""
    merged = len(view.answers) - 1
    weights = np.array([1.0, *[1 / merged] * merged, 1.0])
    return np.concatenate((view.answers, view.donor[None])), weights


def _support(answers: Ints, sources: Ints, weights: Floats) -> Floats:
    """The weights of all sources that say the same as each answer, summed: [len(answers), N]."""
    same = answers[:, None] == sources[None]
    return np.asarray((same * weights[None]).sum(axis=1), np.float64)


# By name


def fixed(alpha: float) -> Rule:
    """No search: the alpha of the grid that lies nearest."""

    def rule(view: View) -> Floats:
        return -np.abs(view.alphas - alpha)

    return rule


CONSISTENCY: Mapping[str, Rule] = {
    "pairwise": pairwise,
    "joint": joint,
    "one-sided": one_sided,
    "per-distance": per_distance,
    "flicker": flicker,
}
WORTHS: Mapping[str, Worth] = {
    "both": with_both,
    "by-confidence": by_confidence,
    "surer": surer,
    "surer-rank": surer_rank,
    "surer-odds": surer_odds,
    "margin": margin,
    "margin-rank": margin_rank,
    "balanced": balanced,
    "posterior": posterior,
    "posterior-rank": posterior_rank,
    "taught": taught,
    "entropy": certainty,
    "confidence": confidence,
    "kept-confidence": kept_confidence,
    "majority": majority,
    "sure-majority": sure_majority,
    "linear-pool": linear_pool,
    "log-pool": log_pool,
}
GUARDED = ("surer", "surer-rank", "balanced", "posterior", "linear-pool", "log-pool", "confidence")
FIXED: Mapping[str, Rule] = {f"fixed {alpha}": fixed(alpha) for alpha in (0.0, 0.1, 0.3, 0.5)}
TOGETHER = (
    ("surer", "confidence"),
    ("surer", "majority"),
    ("log-pool", "confidence"),
    ("balanced", "confidence"),
)
RULES: Mapping[str, Rule] = {
    **CONSISTENCY,
    **{name: mean_of(worth) for name, worth in WORTHS.items()},
    "nuclear": nuclear,
    **{f"{name}, guarded": guarded(WORTHS[name]) for name in GUARDED},
    **{f"{name}, smooth": mean_of(smoothed(WORTHS[name])) for name in ("surer", "log-pool")},
    **{
        " + ".join(names): together(*(mean_of(WORTHS[name]) for name in names))
        for names in TOGETHER
    },
    "surer + one-sided": together(mean_of(surer), one_sided),
}
"""Every rule that may be elected, by the name it is reported under; fixed alphas stand apart."""
