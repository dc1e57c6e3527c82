"""A comparison as one HTML page that needs neither a network nor a second file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..mapping.kinship import THRESHOLD
from ..reporting.page import render_page
from ..values import format_size
from . import table
from .similarity import Similarity

if TYPE_CHECKING:
    from .comparison import Comparison

_CLASSES = ("eq", *(f"h{step}" for step in range(len(table.STEPS) + 1)), "hx", "hq")
"""The style of each level."""


def render_comparison_page(comparison: Comparison) -> str:
    """Render the page of a comparison."""
    steps = table.choose_steps(comparison)
    bounds = [f"below {table.format_ratio(step)}" for step in steps]
    meanings = ("equal", *bounds, "more", f"x cosine below {THRESHOLD}")
    return render_page(
        "compare.html",
        scripts=("tables.js",),
        title=f"{comparison.a.name} \N{LEFT RIGHT ARROW} {comparison.b.name}",
        comparison=comparison,
        sides=[("A", comparison.a), ("B", comparison.b)],
        sample=table.describe_sample(comparison),
        remarks=[*table.list_remarks(comparison), *comparison.pairing.notes],
        cells=comparison.cells,
        legend=list(zip(_CLASSES, meanings, strict=False)),
        rows=comparison.rows,
        share_headings=table.SHARE_HEADINGS,
        shares=[table.format_shares(side) for side in (comparison.a, comparison.b)],
        # What the templates call
        class_of=partial(class_of, steps=steps),
        describe=describe_similarity,
        format_cell=table.format_cell,
        format_cosine=table.format_cosine,
        format_numbers=table.format_numbers,
        format_size=format_size,
    )


def class_of(similarity: Similarity, steps: Sequence[float]) -> str:
    """The style of a cell of the heat map."""
    return _CLASSES[table.level_of(similarity, steps)]


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
