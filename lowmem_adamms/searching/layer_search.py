"""The search's second stage: one alpha for each of a few groups of layers, found in turn.

AdaMMS (arXiv 2503.23733) knows one alpha; the two ends of a decoder need not want the same. From
the best global alpha on, each group of neighbouring layers is moved alone, the others staying where
they are. A group's D is the paper's, along that group's coordinate: the answers that differ between
neighbouring candidates which are equal everywhere but in that group. Five candidates, the global
alpha, its two neighbours and the points halfway to them, give the inner three a D each; D compares
within one group only, since a small group changes fewer answers than a large one.

A group moves only if the better D also wins four of five resamples of the prompts: most of what so
small a change does is noise. Embedding, final norm and head stay at the global alpha. Knows
no model, as `search.py`, whose `choose` judges. Leaves to others: answers (`session.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from ..errors import RecipeError
from ..mapping.alphas import Alpha, Alphas, format_layers
from .answer_text import Distance, normalise
from .scoring import MARKEDLY, Measure
from .search import Candidate, Result, checked_distance, choose

P = TypeVar("P")
Generate = Callable[[Alpha, Sequence[P]], Sequence[str]]
"""generate(alpha, prompts) -> one answer per prompt."""
PASSES = 4
"""Candidates of a group that are asked anew; the fifth is what the group before ended with."""
SURE = 0.8
"""Share of the resamples that a move must win."""


@dataclass(frozen=True, slots=True)
class Group:
    """Layers first..last, both included, and what became of them.

    candidates: ascending, as in `search.Result`; D is None for the two at the ends. wins: share of
    resamples (0..1) that the lowest D wins. moved: whether `alpha` is another than the global one.
    """

    first: int
    last: int
    alpha: float
    moved: bool
    candidates: tuple[Candidate, ...]
    wins: float

    @property
    def score(self) -> float | None:
        """D of the alpha that was taken."""
        return next(c.score for c in self.candidates if c.alpha == self.alpha)


@dataclass(frozen=True, slots=True)
class Refined:
    """What the second stage found.

    alpha: one by layer, or the global float where nothing moved. passes: over all prompts, that it
    took. changed: answers that differ from those at the global alpha.
    """

    alpha: Alpha
    groups: tuple[Group, ...]
    passes: int
    changed: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The key `layers` of `adamms.json` and `search --json`."""
        return {
            "passes": self.passes,
            "changed": self.changed,
            "groups": [
                {
                    "layers": [group.first, group.last],
                    "alpha": group.alpha,
                    "moved": group.moved,
                    "wins": group.wins,
                    "candidates": [
                        {"alpha": c.alpha, "score": c.score, "degenerate": c.degenerate}
                        for c in group.candidates
                    ],
                }
                for group in self.groups
            ],
            "notes": list(self.notes),
        }

    def lines(self) -> dict[str, str]:
        """For people: each group in a line."""
        out: dict[str, str] = {}
        for group in self.groups:
            scored = [c for c in group.candidates if c.score is not None]
            tried = ", ".join(f"{c.alpha:g}: {c.score:.4g}" for c in scored)
            how = f"moved, wins {group.wins:.0%} of the resamples" if group.moved else "stays"
            out[format_layers(group.first, group.last)] = (
                f"alpha {group.alpha:g}, {how}; D by alpha: {tried}"
            )
        if self.groups:
            out["answers"] = f"{self.changed} differ from those at the global alpha"
        return out


def split(layers: int, groups: int) -> list[tuple[int, int]]:
    """So many groups of neighbouring layers, first and last, as equal as can be. RecipeError."""
    if not 1 <= groups <= layers:
        raise RecipeError(
            f"--refine-layers {groups}: the base has {layers} layers; expected 1 to {layers} groups"
        )
    bounds = [layers * i // groups for i in range(groups + 1)]
    return [(first, last - 1) for first, last in pairwise(bounds)]


def refine(
    generate: Generate[P],
    prompts: Sequence[P],
    found: Result,
    groups: Sequence[tuple[int, int]],
    *,
    measure: Measure | None = None,
    distance: Distance | None = None,
    seed: int = 0,
) -> Refined:
    """From the global alpha of `found`, an alpha for each group of layers, once through them all.

    generate: asked PASSES times a group, with `Alphas`; repeatable, for an interrupted run asks the
    same again. groups: from `split`. measure: that of `found` unless given; distance and seed as
    in `search`. Without two neighbours of the global alpha nothing can be compared, nor is asked.
    """
    measure = measure or found.measure
    points = _points(found)
    if points is None:
        note = f"Layers were not refined: alpha {found.alpha:g} does not lie between two others."
        return Refined(found.alpha, (), 0, 0, (note,))
    distance = checked_distance(measure, distance)  # one for all: it remembers what it embedded
    origin = found.answers[min(found.answers)]
    most = found.candidates[0].degenerate + MARKEDLY * found.prompts
    values: dict[str, float] = {}
    answers: Sequence[str] = found.answers[found.alpha]
    done: list[Group] = []
    for first, last in groups:
        names = [f"layers.{i}" for i in range(first, last + 1)]
        tried: dict[float, Sequence[str]] = {}
        for point in points:
            alpha = Alphas(found.alpha, values | dict.fromkeys(names, point))
            tried[point] = answers if point == found.alpha else generate(alpha, prompts)
        judged = choose(tried, measure=measure, distance=distance, origin=origin, seed=seed)
        group = _group((first, last), found.alpha, judged, most)
        if group.moved:
            values |= dict.fromkeys(names, group.alpha)
            answers = tried[group.alpha]
        done.append(group)
    final = Alphas(found.alpha, values) if values else found.alpha
    changed = _differing(found.answers[found.alpha], answers)
    return Refined(final, tuple(done), PASSES * len(done), changed)


def _differing(before: Sequence[str], after: Sequence[str]) -> int:
    return sum(normalise(a) != normalise(b) for a, b in zip(before, after, strict=True))


def _points(found: Result) -> tuple[float, float, float, float, float] | None:
    """The global alpha, its neighbours and what lies halfway; None without two neighbours."""
    alpha = found.alpha
    chosen = next((c for c in found.candidates if c.alpha == alpha), None)
    low, high = chosen.neighbours if chosen else (None, None)
    if low is None or high is None:
        return None
    left, right = (round((alpha + end) / 2, 6) for end in (low, high))
    return (low, left, alpha, right, high) if low < left < alpha < right < high else None


def _group(layers: tuple[int, int], start: float, judged: Result, most: float) -> Group:
    """Whether a group moves. most: degenerate answers that the first stage would still elect."""
    by_alpha: Mapping[float, Candidate] = {c.alpha: c for c in judged.candidates}
    best, stay = by_alpha[judged.alpha], by_alpha[start]
    wins = judged.wins.get(best.alpha, 0.0)
    better = best.score is not None and stay.score is not None and best.score < stay.score
    moved = better and wins >= SURE and best.degenerate <= most
    return Group(*layers, best.alpha if moved else start, moved, judged.candidates, wins)
