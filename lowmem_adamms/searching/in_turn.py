"""The search over several donors: one after the other, each with what was chosen for those before.

A donor that is still to come has weight 0. What was asked once is not asked again, so that each
donor but the first starts from answers that are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from ..answers import Answer
from .search import Result, search

P = TypeVar("P")
Weights = tuple[float, ...]
"""An alpha for each donor."""
Generate = Callable[[Weights, Sequence[P]], Sequence[str | Answer]]


def count_passes(donors: int, alphas: Sequence[float], refine: int = 0) -> int:
    """How often every prompt is asked at most, without the noise's second time."""
    known = donors - 1 if alphas and alphas[0] == 0 else 0
    return donors * (len(alphas) + 2 * refine) - known


def search_in_turn(
    generate: Generate[P],
    prompts: Sequence[P],
    donors: int,
    alphas: Sequence[float],
    *,
    adds_up: bool,
    noise: Generate[P] | None = None,
    **how: Any,
) -> tuple[Result, ...]:
    """Choose an alpha for each donor in turn; the result of each donor's search.

    generate, noise: as for `search`, with an alpha for each donor; `noise` is called once, at the
    chosen alphas. adds_up: together the alphas must not exceed 1, so that of a later donor only
    those are tried that are left to it, or smaller ones where these are fewer than three. how: what
    else `search` takes.
    """
    chosen: Weights = (0.0,) * donors
    known: dict[Weights, Sequence[str | Answer]] = {}
    results: list[Result] = []

    def ask(donor: int, alpha: float, prompts: Sequence[P]) -> Sequence[str | Answer]:
        weights = _replace(chosen, donor, alpha)
        if weights not in known:
            known[weights] = generate(weights, prompts)
        return known[weights]

    def ask_again(alpha: float, prompts: Sequence[P]) -> Sequence[str | Answer]:
        assert noise is not None
        return noise(_replace(chosen, donors - 1, alpha), prompts)

    for donor in range(donors):
        grid = _fit_grid(alphas, 1 - sum(chosen)) if adds_up else alphas
        is_last = donor == donors - 1
        again = ask_again if noise and is_last else None
        results.append(search(partial(ask, donor), prompts, grid, noise=again, **how))
        chosen = _replace(chosen, donor, results[-1].alpha)
    return tuple(results)


def _fit_grid(alphas: Sequence[float], left: float) -> Sequence[float]:
    """The alphas up to what is left; if these are fewer than three, all of them in proportion."""
    fitting = [alpha for alpha in alphas if alpha <= left + 1e-9]
    return fitting if len(fitting) >= 3 else [alpha * left / alphas[-1] for alpha in alphas]


def _replace(weights: Weights, donor: int, alpha: float) -> Weights:
    return (*weights[:donor], alpha, *weights[donor + 1 :])
