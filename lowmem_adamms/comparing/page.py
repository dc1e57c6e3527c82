"""A comparison as one HTML page that needs neither a network, nor a script, nor a second file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..mapping.kinship import THRESHOLD
from ..reporting.page import render_page
from ..values import format_size
from . import table
from .similarity import Similarity

if TYPE_CHECKING:
    from .comparison import Comparison

MAX_OBSTACLES = 8
_CLASSES: dict[int | str, str] = {table.EQUAL: "eq", table.UNRELATED: "hx", table.UNKNOWN: "hq"}


def render_comparison_page(comparison: Comparison) -> str:
    """Render the page of a comparison."""
    steps = [(f"h{i}", f"below {table.format_ratio(step)}") for i, step in enumerate(table.STEPS)]
    unrelated = f"{table.UNRELATED} cosine below {THRESHOLD}"
    return render_page(
        "compare.html",
        title=f"{comparison.a.name} \N{LEFT RIGHT ARROW} {comparison.b.name}",
        comparison=comparison,
        sides=[("A", comparison.a), ("B", comparison.b)],
        sample=table.describe_sample(comparison),
        nonfinite=table.describe_nonfinite(comparison),
        max_obstacles=MAX_OBSTACLES,
        heat=HeatMap(comparison.layer_kinds, comparison.layers, comparison.cells),
        legend=[("eq", "equal"), *steps, (f"h{len(steps)}", "more"), ("hx", unrelated)],
        kinds=_list_kinds(comparison),
        share_headings=table.SHARE_HEADINGS,
        shares=[table.format_shares(side) for side in (comparison.a, comparison.b)],
        # What the templates call
        class_of=class_of,
        describe=describe_similarity,
        format_cell=format_cell,
        format_cosine=table.format_cosine,
        format_numbers=table.format_numbers,
        format_size=format_size,
    )


def class_of(similarity: Similarity) -> str:
    """The style of a cell of the heat map."""
    level = table.level_of(similarity)
    return _CLASSES.get(level, f"h{level}")


def describe_similarity(similarity: Similarity) -> str:
    """Distance and cosine in words."""
    if similarity.is_identical:
        return "equal"
    if similarity.cosine is None:
        return "nothing finite"
    distance = "A is zero"
    if similarity.distance is not None:
        distance = f"distance {table.format_ratio(similarity.distance)}"
    return f"{distance}, cosine {table.format_cosine(similarity.cosine)}"


def format_cell(similarity: Similarity) -> str:
    """A distance for a cell of a table."""
    level = table.level_of(similarity)
    is_sign = level in (table.EQUAL, table.UNKNOWN)
    return str(level) if is_sign else table.format_ratio(similarity.distance)


def _list_kinds(comparison: Comparison) -> list[tuple[str, Similarity]]:
    """Each kind over all layers, then what is in no layer, then what was paired by name."""
    sums = comparison.sum_by(lambda pair: pair.kind)
    names = [*comparison.layer_kinds, *comparison.outer_groups]
    by_name = [(f"{name} (by name)", sim) for name, sim in comparison.by_name.items()]
    return [(name, sums[name]) for name in names] + by_name


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Where the cells of the heat map stand, in units of its view box."""

    kinds: list[str]
    layers: list[int]
    cells: dict[tuple[str, str], Similarity]
    width: int = 720
    row_height: int = 24
    top: int = 4
    foot: int = 30

    @property
    def left(self) -> int:
        """Where the first layer begins, right of the names."""
        return 14 + 12 * max(map(len, self.kinds))

    @property
    def height(self) -> int:
        """Of the whole."""
        return self.top + self.row_height * len(self.kinds) + self.foot

    @property
    def cell_width(self) -> float:
        """Of one layer."""
        return (self.width - self.left) / len(self.layers)

    @property
    def tick_step(self) -> int:
        """How many layers lie between two numbers, for these to fit narrow screens too."""
        return next(step for step in (1, 2, 5, 10, 20, 50, 1000) if step * self.cell_width >= 34)
