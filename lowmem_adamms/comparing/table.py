"""A comparison on the terminal, as rich renderables; `cli/` prints them.

The heat strip has one sign for each layer, whose height tells the distance without colour too. The
page shares the steps and the words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from ..mapping.kinship import THRESHOLD
from ..values import format_size
from .similarity import Similarity

if TYPE_CHECKING:
    from .comparison import Comparison
    from .pairing import CheckpointSummary

STEPS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""Upper bounds of the distances that one sign stands for."""
EQUAL, UNRELATED, UNKNOWN = "=", "x", "?"
SHARE_HEADINGS = ("tensors mapped", "mapped", "same name", "alone", "bytes mapped")
MAX_OBSTACLES = 3
_BLOCKS, _DIGITS = "▁▂▃▄▅▆▇", "1234567"
_STYLES = ("color(67)", "color(73)", "color(71)", "color(142)", "color(172)", "color(166)", "red")
_SIGN_STYLES = {EQUAL: "dim", UNRELATED: "red", UNKNOWN: "magenta"}
_OTHER_COLUMNS_WIDTH = 60  # of the table besides the strip
_MIN_STRIP_WIDTH = 12


# Numbers and words


def level_of(similarity: Similarity) -> int | str:
    """Which step of STEPS a distance is on, or one of EQUAL, UNRELATED and UNKNOWN."""
    if similarity.is_identical:
        return EQUAL
    if similarity.cosine is None or similarity.distance is None:
        return UNKNOWN
    if similarity.cosine < THRESHOLD:
        return UNRELATED
    return sum(similarity.distance >= step for step in STEPS)


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


def describe_nonfinite(comparison: Comparison) -> str:
    """How many of the elements read are NaN or infinite; empty if none are."""
    total = sum(comparison.similarities, Similarity())
    if not (total.nonfinite_a or total.nonfinite_b):
        return ""
    return f"{total.nonfinite_a:,} elements of A, {total.nonfinite_b:,} of B"


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
        f"{format_size(side.mapped.nbytes)} of {format_size(side.whole.nbytes)}",
    ]


# The terminal


def draw_comparison(
    comparison: Comparison, *, width: int, ascii_only: bool = False
) -> Iterator[Any]:
    """Everything to print: tables, and lines of text.

    Args:
        comparison: The comparison.
        width: Columns of the terminal.
        ascii_only: Whether it knows no other characters.
    """
    yield from _describe_verdict(comparison)
    if comparison.similarities:
        yield strip_table(comparison, width=width, ascii_only=ascii_only)
        yield strip_legend(ascii_only=ascii_only)
    shares = Table("", title="shares of the parameters", title_justify="left")
    for heading in SHARE_HEADINGS:
        shares.add_column(heading, justify="right")
    for letter, side in (("A", comparison.a), ("B", comparison.b)):
        shares.add_row(letter, *format_shares(side))
    yield shares
    yield from _describe_differences(comparison)


def _describe_verdict(comparison: Comparison) -> Iterator[str]:
    for letter, side in (("A", comparison.a), ("B", comparison.b)):
        whole = f"{side.whole.tensors:,} tensors, {format_size(side.whole.nbytes)}"
        yield f"{letter}: {side.name} ({side.arch}), {whole}"
    yield f"{comparison.ancestry.word}: {comparison.ancestry.reason}"
    yield describe_sample(comparison)


def _describe_differences(comparison: Comparison) -> Iterator[str]:
    a, b = comparison.a.traits, comparison.b.traits
    for name, value in a.items():
        if value != b[name]:
            yield f"differs: {name}: {value} in A, {b[name]} in B"
    for letter, side in (("A", comparison.a), ("B", comparison.b)):
        yield f"only in {letter}: {_describe_unpaired(side)}"
    if nonfinite := describe_nonfinite(comparison):
        yield f"not finite, left out: {nonfinite}"
    obstacles = comparison.obstacles
    for obstacle in obstacles[:MAX_OBSTACLES]:
        yield f"a merge is refused: {obstacle}"
    if len(obstacles) > MAX_OBSTACLES:
        yield f"… and {len(obstacles) - MAX_OBSTACLES} more reasons; --json has all"
    for note in comparison.pairing.notes:
        yield f"note: {note}"


def _describe_unpaired(side: CheckpointSummary) -> str:
    """What a side has alone, with its size, by the reason."""
    reasons: dict[str, list[str]] = {}
    for left in side.unpaired:
        what = f"{left.what} ({format_size(left.totals.nbytes)})"
        reasons.setdefault(left.why, []).append(what)
    return "; ".join(f"{', '.join(held)}: {why}" for why, held in reasons.items()) or "nothing"


def strip_table(comparison: Comparison, *, width: int, ascii_only: bool = False) -> Table:
    """One row for each kind: the heat strip over the layers, then the numbers of all of them.

    Where there are more layers than columns, a sign stands for the furthest of several.
    """
    layers, cells = comparison.layers, comparison.cells
    per_sign = -(-len(layers) // max(width - _OTHER_COLUMNS_WIDTH, _MIN_STRIP_WIDTH)) or 1
    signs = _DIGITS if ascii_only else _BLOCKS
    furthest = f"; a sign is the furthest of {per_sign} layers" if per_sign > 1 else ""
    table = Table("", title=f"distance ||A - B|| / ||A||{furthest}", title_justify="left")
    table.add_column(_ruler(layers[::per_sign]) if comparison.layer_kinds else "", no_wrap=True)
    for heading in ("distance", "cosine", "furthest", "equal"):
        table.add_column(heading, justify="right", no_wrap=True)
    for kind in comparison.layer_kinds:
        row = [cells.get((f"layers.{layer}", kind)) for layer in layers]
        total = sum((similarity for similarity in row if similarity), Similarity())
        distance, cosine, equal = format_numbers(total)
        strip = _strip(row, per_sign, signs)
        table.add_row(kind, strip, distance, cosine, _furthest(row, layers), equal)
    table.add_section()
    outer = {group: comparison.groups[group] for group in comparison.outer_groups}
    for name, similarity in {**outer, **comparison.by_name}.items():
        distance, cosine, equal = format_numbers(similarity)
        strip = _strip([similarity], 1, signs)
        table.add_row(name, strip, distance, cosine, "", equal)
    return table


def strip_legend(*, ascii_only: bool = False) -> str:
    """What the signs of the strip mean."""
    signs = _DIGITS if ascii_only else _BLOCKS
    steps = [f"{sign} < {format_ratio(step)}" for sign, step in zip(signs, STEPS, strict=False)]
    return (
        f"{EQUAL} equal  {'  '.join(steps)}  {signs[-1]} more  {UNRELATED} cosine < {THRESHOLD}"
        f"  {UNKNOWN} nothing finite"
    )


def _furthest(row: Sequence[Similarity | None], layers: Sequence[int]) -> str:
    """The largest distance and its layer."""
    distances = [
        (similarity.distance, -layer)
        for layer, similarity in zip(layers, row, strict=True)
        if similarity and similarity.distance
    ]
    if not distances:
        return ""
    distance, layer = max(distances)
    return f"{format_ratio(distance)} in {-layer}"


def _strip(row: Sequence[Similarity | None], per_sign: int, signs: str) -> Text:
    """A sign for every `per_sign` layers; a blank where there is nothing to compare."""
    text = Text()
    for first in range(0, len(row), per_sign):
        several = row[first : first + per_sign]
        levels = [level_of(similarity) for similarity in several if similarity]
        furthest = max(levels, key=_rank, default=None)
        if furthest is None:
            text.append(" ")
        elif isinstance(furthest, int):
            text.append(signs[furthest], _STYLES[furthest])
        else:
            text.append(furthest, _SIGN_STYLES[furthest])
    return text


def _rank(level: int | str) -> int:
    """The order of levels, from near to far."""
    if isinstance(level, int):
        return level
    return {EQUAL: -1, UNRELATED: len(STEPS) + 1, UNKNOWN: len(STEPS) + 2}[level]


def _ruler(layers: Sequence[int]) -> str:
    """The number of every tenth sign's layer, above the strip."""
    text = ""
    for position in range(0, len(layers), 10):
        number = str(layers[position])
        if position + len(number) <= max(len(layers), 2):
            text = text.ljust(position) + number
    return text
