"""The methods by which several models become one, as data.

With task vectors t = model - ancestor, of the base as of each donor:

    linear           base + sum of alpha * (donor - base)
    slerp            from base to donor along a great circle, by the share alpha of its angle
    task-arithmetic  base + sum of alpha * t of each donor
    ties             ancestor + alpha * mean of what is left of all t
    dare-linear, dare-ties   the same two with t thinned out at random
    breadcrumbs      ancestor + sum of alpha * t without its smallest and largest values
    metagpt          ancestor + alpha * sum of t, each weighted by its share of the squared norms
    ram              ancestor + alpha * sum of t, averaged where several models changed a value
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Measure = Literal["magnitudes", "products", "squares"]


@dataclass(frozen=True, slots=True)
class Method:
    """One method: what it reads, what a first pass must find, what its alpha is.

    Attributes:
        formula: What is computed, for the model card.
        source: Whose definition that is.
        relative: The models' differences from an ancestor are mixed, not the models.
        alpha_of_each: Alpha is the weight of each donor; else one factor for what all models add.
        alpha: The factor's default. None: it must be given or searched.
        measure: What a first pass finds in each tensor: the `magnitudes` of each difference, the
            scalar `products` of base and donor, or the `squares` of each difference (of the whole
            model).
        density: Default of the share of each difference that is kept, the largest values first.
        by_chance: The share is kept at random instead, and divided by the density.
        outliers: Share of the largest values that is left out.
        smallest: Values of this size or less are left out.
        elect: In each element only values of the sign of their sum are kept.
        mean: What is kept is averaged, not added up.
        max_donors: None: any number.
    """

    name: str
    formula: str
    source: str
    relative: bool = True
    alpha_of_each: bool = True
    alpha: float | None = None
    measure: Measure | None = None
    density: float = 1.0
    by_chance: bool = False
    outliers: float = 0.0
    smallest: float = -math.inf
    elect: bool = False
    mean: bool = False
    max_donors: int | None = None

    @property
    def takes_density(self) -> bool:
        """Whether some share of the differences is kept."""
        return self.by_chance or self.measure == "magnitudes"


_ALL = (
    Method(
        "linear",
        "(1 - alpha) * base + alpha * donor",
        "AdaMMS, arXiv 2503.23733",
        relative=False,
    ),
    Method(
        "slerp",
        "sin((1 - alpha) * angle) / sin(angle) * base + sin(alpha * angle) / sin(angle) * donor",
        "mergekit: per tensor, linear where |cos(angle)| > 0.9995",
        relative=False,
        measure="products",
        max_donors=1,
    ),
    Method(
        "task-arithmetic",
        "base + sum of alpha * (donor - ancestor)",
        "Ilharco et al., arXiv 2212.04089, with weight 1 for the base",
    ),
    Method(
        "ties",
        "ancestor + alpha * disjoint mean of trimmed (model - ancestor) with the elected sign",
        "Yadav et al., arXiv 2306.01708; the sign of a sum of zero is plus, as in mergekit",
        alpha_of_each=False,
        alpha=1.0,
        measure="magnitudes",
        density=0.2,
        elect=True,
        mean=True,
    ),
    Method(
        "dare-linear",
        "ancestor + sum of weight * dropped and rescaled (model - ancestor); the base has weight 1,"
        " a donor alpha",
        "Yu et al., arXiv 2311.03099: task arithmetic of what is kept, divided by the density",
        density=0.8,  # the drop rate 0.2 of the authors' script for merging language models
        by_chance=True,
    ),
    Method(
        "dare-ties",
        "ancestor + alpha * disjoint mean of dropped and rescaled (model - ancestor) with the"
        " elected sign",
        "Yu et al., arXiv 2311.03099: TIES of what is kept, divided by the density",
        alpha_of_each=False,
        alpha=1.0,
        density=0.8,
        by_chance=True,
        elect=True,
        mean=True,
    ),
    Method(
        "breadcrumbs",
        "ancestor + sum of weight * (model - ancestor) without its smallest and largest values; the"
        " base has weight 1, a donor alpha",
        "Davari and Belilovsky, arXiv 2312.06795, per tensor, with mergekit's defaults",
        measure="magnitudes",
        density=0.9,
        outliers=0.01,
    ),
    Method(
        "metagpt",
        "ancestor + alpha * sum of share * (model - ancestor), share: of the sum of squared norms",
        "Zhou et al., arXiv 2406.11385",
        alpha_of_each=False,
        alpha=1.0,
        measure="squares",
    ),
    Method(
        "ram",
        "ancestor + alpha * mean, in each element, of those model - ancestor beyond 1e-5",
        "Reinforced Agent Merging, arXiv 2601.13572, as mergekit has it",
        alpha_of_each=False,
        alpha=1.0,
        smallest=1e-5,
        mean=True,
    ),
)
METHODS = {method.name: method for method in _ALL}
