"""A comparison on the terminal, as rich renderables; `cli/` prints them.

The page shows the same heat map, and shares the steps and the words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from ..mapping.kinship import THRESHOLD
from ..values import format_size
from .similarity import Similarity

if TYPE_CHECKING:
    from .comparison import Comparison
    from .pairing import CheckpointSummary

STEPS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""Upper bounds of the distances of one level, where those of a comparison give none."""
EQUAL, UNRELATED, UNKNOWN = 0, len(STEPS) + 2, len(STEPS) + 3
"""Levels of what lies between no steps; those from 1 on are of the distances, near to far."""
SHARE_HEADINGS = ("tensors mapped", "mapped", "same name", "alone", "bytes mapped")
MAX_OBSTACLES = 3
_STYLES = (
    *("dim", "color(67)", "color(73)", "color(71)", "color(142)", "color(172)", "color(166)"),
    *("red", "red", "magenta"),
)


# Numbers and words


def choose_steps(comparison: Comparison) -> tuple[float, ...]:
    """The bounds between which about as many layers and kinds of this comparison lie each."""
    outside = (EQUAL, UNRELATED, UNKNOWN)
    graded = [s for s in comparison.cells.values() if level_of(s, STEPS) not in outside]
    distances = sorted(s.distance for s in graded if s.distance)
    count = len(STEPS) + 1
    places = [len(distances) * i // count for i in range(1, count)]
    steps = tuple(float(f"{distances[place]:.2g}") for place in places) if distances else ()
    return steps if len(set(steps)) == len(STEPS) else STEPS


def level_of(similarity: Similarity, steps: Sequence[float]) -> int:
    """How far apart two things are, as a colour tells it."""
    if similarity.is_identical:
        return EQUAL
    if similarity.cosine is None or similarity.distance is None:
        return UNKNOWN
    if similarity.cosine < THRESHOLD:
        return UNRELATED
    return 1 + sum(similarity.distance >= step for step in steps)


def format_ratio(value: float | None) -> str:
    """A distance or share in per cent, to two significant digits."""
    if value is None:
        return ""
    if value == 0 or value >= 0.995:
        return f"{100 * value:.0f} %"
    return f"{float(f'{100 * value:.2g}'):.10g} %"


def format_cosine(value: float | None) -> str:
    """A cosine to four decimals; close to 1, its difference from 1."""
    if value is None:
        return ""
    if value == 1:
        return "1"
    return f"{value:.4f}" if value < 0.9995 else f"1 - {1 - value:.1e}"


def format_cell(similarity: Similarity) -> str:
    """A distance for a cell of the heat map, in per cent; `x` marks one that is unrelated."""
    level = level_of(similarity, STEPS)
    if level in (EQUAL, UNKNOWN):
        return "=" if level == EQUAL else "?"
    number = format_ratio(similarity.distance).removesuffix(" %")
    return f"{number} x" if level == UNRELATED else number


def format_numbers(similarity: Similarity) -> tuple[str, str, str]:
    """Distance, cosine, and the share of elements that are equal."""
    equal = format_ratio(similarity.equal / similarity.read) if similarity.read else ""
    return format_ratio(similarity.distance), format_cosine(similarity.cosine), equal


def describe_sample(comparison: Comparison) -> str:
    """How much was read, in a sentence."""
    return (
        f"Read: a sample, at most {comparison.sample:,} elements of each of"
        f" {len(comparison.similarities):,} pairs of tensors."
    )


def list_remarks(comparison: Comparison) -> Iterator[str]:
    """What a reader should know besides the numbers: what stops a merge, and what was left out."""
    obstacles = comparison.obstacles
    for obstacle in obstacles[:MAX_OBSTACLES]:
        yield f"a merge is refused: {obstacle}"
    if len(obstacles) > MAX_OBSTACLES:
        yield f"… and {len(obstacles) - MAX_OBSTACLES} more reasons"
    for side, letter in enumerate("AB"):
        yield from _list_nonfinite(comparison, side, letter)


def _list_nonfinite(comparison: Comparison, side: int, letter: str) -> Iterator[str]:
    """Where NaN or infinity was read on one side; the sample may miss others."""
    counts = {
        pair.names(side)[0]: (similarity.nonfinite_a, similarity.nonfinite_b)[side]
        for pair, similarity in comparison.items
    }
    found = [name for name, count in counts.items() if count]
    if found:
        yield (
            f"NaN or infinite values read of {letter}, left out: {sum(counts.values()):,}, the"
            f" first in {found[0]}; a merge refuses them"
        )


def format_shares(side: CheckpointSummary) -> list[str]:
    """How much of a side is mapped, as SHARE_HEADINGS says; shares are of its elements."""
    alone = sum(left.totals.elements for left in side.unpaired)
    shares = (
        format_ratio(count / side.whole.elements if side.whole.elements else 0)
        for count in (side.mapped.elements, side.by_name.elements, alone)
    )
    return [
        f"{side.mapped.tensors:,} of {side.whole.tensors:,}",
        *shares,
        f"{format_size(side.mapped.bytes)} of {format_size(side.whole.bytes)}",
    ]


# The terminal


def draw_comparison(comparison: Comparison) -> Iterator[Any]:
    """Everything to print on a terminal: tables, and lines of text."""
    sides = (("A", comparison.a), ("B", comparison.b))
    for letter, side in sides:
        whole = f"{side.whole.tensors:,} tensors, {format_size(side.whole.bytes)}"
        yield f"{letter}: {side.name} ({side.arch}), {whole}"
    yield f"{comparison.ancestry.word}: {comparison.ancestry.reason}"
    yield describe_sample(comparison)
    if comparison.similarities:
        if comparison.layer_kinds:
            yield layer_table(comparison)
        yield kind_table(comparison)
    shares = Table("", title="shares of the parameters", title_justify="left")
    for heading in SHARE_HEADINGS:
        shares.add_column(heading, justify="right")
    for letter, side in sides:
        shares.add_row(letter, *format_shares(side))
    yield shares
    for name, value in comparison.a.traits.items():
        if value != comparison.b.traits[name]:
            yield f"differs: {name}: {value} in A, {comparison.b.traits[name]} in B"
    for letter, side in sides:
        yield f"only in {letter}: {_describe_unpaired(side)}"
    yield from list_remarks(comparison)
    yield from (f"note: {note}" for note in comparison.pairing.notes)


def _describe_unpaired(side: CheckpointSummary) -> str:
    """What a side has alone, with its size, by the reason."""
    reasons: dict[str, list[str]] = {}
    for left in side.unpaired:
        what = f"{left.what} ({format_size(left.totals.bytes)})"
        reasons.setdefault(left.why, []).append(what)
    return "; ".join(f"{', '.join(held)}: {why}" for why, held in reasons.items()) or "nothing"


def layer_table(comparison: Comparison) -> Table:
    """The heat map: a row for each layer, a column for each kind."""
    cells, steps = comparison.cells, choose_steps(comparison)
    title = "distance ||A - B|| / ||A|| in per cent (= equal, x unrelated)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("layer")
    for kind in comparison.layer_kinds:
        table.add_column(kind.replace("@", " @"), justify="right", overflow="fold")
    for layer in comparison.layers:
        row = [cells.get((f"layers.{layer}", kind)) for kind in comparison.layer_kinds]
        if any(row):
            table.add_row(str(layer), *(_draw_cell(similarity, steps) for similarity in row))
    return table


def _draw_cell(similarity: Similarity | None, steps: Sequence[float]) -> Text:
    if similarity is None:
        return Text()
    return Text(format_cell(similarity), _STYLES[level_of(similarity, steps)])


def kind_table(comparison: Comparison) -> Table:
    """Each kind over all layers, and what is in no layer."""
    table = Table("", title="all layers together", title_justify="left")
    for heading in ("distance", "cosine", "equal"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, similarity in comparison.rows:
        table.add_row(name, *format_numbers(similarity))
    return table
