"""Generation consistency over a grid of alphas: AdaMMS's search step (arXiv 2503.23733, Alg. 1).

Knows no model: takes a callable that gives the answers at an alpha. Leaves to others: making the
answers (`generate.py`, `live.py`), reading recorded ones (`recorded.py`), showing (`report.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

P = TypeVar("P")
Generate = Callable[[float, Sequence[P]], Sequence[str]]
"""generate(alpha, prompts) -> one answer per prompt."""
Measure = Literal["pairwise", "joint", "embedding"]
DEFAULT_ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One alpha of the grid. Differences count answers (or sum distances) over all prompts.

    score: D_i; None at the two ends, which have one neighbour. interval: 95 % bootstrap interval
    of the score over prompts. degenerate: answers that are empty, repeating or constant.
    """

    alpha: float
    diff_previous: float | None
    diff_next: float | None
    score: float | None
    degenerate: int
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What a search found: the chosen alpha and everything that led to it.

    ties: all alphas that share the best score when there are several. noise: answers that differ
    between two runs at the same alpha, or None if not measured. notes: warnings in words.
    answers: by alpha, in the order of the prompts.
    """

    alpha: float
    measure: Measure
    prompts: int
    candidates: tuple[Candidate, ...]
    answers: Mapping[float, tuple[str, ...]]
    ties: tuple[float, ...] = ()
    noise: float | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The document of `search --json`, without base, donor and version."""
        raise NotImplementedError
