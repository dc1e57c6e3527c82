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
"""Upper bounds of the distances that one sign stands for, where those of a comparison give none."""
SIGNS, ASCII_SIGNS = "=▁▂▃▄▅▆▇x?", "=1234567x?"
"""By level, from near to far: equal, the distances between STEPS, unrelated, nothing finite."""
EQUAL, UNRELATED, UNKNOWN = 0, len(SIGNS) - 2, len(SIGNS) - 1
SHARE_HEADINGS = ("tensors mapped", "mapped", "same name", "alone", "bytes mapped")
MAX_OBSTACLES = 3
_STYLES = (
    *("dim", "color(67)", "color(73)", "color(71)", "color(142)", "color(172)", "color(166)"),
    *("red", "red", "magenta"),
)
_OTHER_COLUMNS_WIDTH = 60  # of the table besides the strip
_MIN_STRIP_WIDTH = 12


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
    """The place of a distance in SIGNS."""
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


def draw_comparison(
    comparison: Comparison, *, width: int, ascii_only: bool = False
) -> Iterator[Any]:
    """Everything to print on a terminal of so many columns: tables, and lines of text."""
    sides = (("A", comparison.a), ("B", comparison.b))
    for letter, side in sides:
        whole = f"{side.whole.tensors:,} tensors, {format_size(side.whole.bytes)}"
        yield f"{letter}: {side.name} ({side.arch}), {whole}"
    yield f"{comparison.ancestry.word}: {comparison.ancestry.reason}"
    yield describe_sample(comparison)
    if comparison.similarities:
        signs = ASCII_SIGNS if ascii_only else SIGNS
        steps = choose_steps(comparison)
        yield strip_table(comparison, width, signs, steps)
        yield strip_legend(signs, steps)
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


def strip_table(comparison: Comparison, width: int, signs: str, steps: Sequence[float]) -> Table:
    """One row for each kind: the heat strip over the layers, then the numbers of all of them.

    Where there are more layers than columns, a sign stands for the furthest of several.
    """
    layers, cells = comparison.layers, comparison.cells
    per_sign = -(-len(layers) // max(width - _OTHER_COLUMNS_WIDTH, _MIN_STRIP_WIDTH)) or 1
    furthest = f"; a sign is the furthest of {per_sign} layers" if per_sign > 1 else ""
    table = Table("", title=f"distance ||A - B|| / ||A||{furthest}", title_justify="left")
    table.add_column(_ruler(layers[::per_sign]) if comparison.layer_kinds else "", no_wrap=True)
    for heading in ("distance", "cosine", "furthest", "equal"):
        table.add_column(heading, justify="right", no_wrap=True)
    kinds = comparison.layer_kinds
    for name, total in comparison.rows:
        row: list[Similarity | None] = [total]
        furthest = ""
        if name in kinds:
            row = [cells.get((f"layers.{layer}", name)) for layer in layers]
            furthest = _furthest(row, layers)
        strip = draw_strip(row, per_sign, signs, steps)
        distance, cosine, equal = format_numbers(total)
        is_last = kinds[-1:] == [name]
        table.add_row(name, strip, distance, cosine, furthest, equal, end_section=is_last)
    return table


def draw_strip(
    row: Sequence[Similarity | None], per_sign: int, signs: str, steps: Sequence[float]
) -> Text:
    """A sign for every `per_sign` layers; a blank where there is nothing to compare."""
    text = Text()
    for first in range(0, len(row), per_sign):
        levels = [level_of(s, steps) for s in row[first : first + per_sign] if s]
        if levels:
            text.append(signs[max(levels)], _STYLES[max(levels)])
        else:
            text.append(" ")
    return text


def strip_legend(signs: str, steps: Sequence[float]) -> str:
    """What the signs of the strip mean."""
    bounds = [
        f"{sign} < {format_ratio(step)}" for sign, step in zip(signs[1:], steps, strict=False)
    ]
    return (
        f"{signs[EQUAL]} equal  {'  '.join(bounds)}  {signs[UNRELATED - 1]} more"
        f"  {signs[UNRELATED]} cosine < {THRESHOLD}  {signs[UNKNOWN]} nothing finite"
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


def _ruler(layers: Sequence[int]) -> str:
    """The number of every tenth sign's layer, above the strip."""
    text = ""
    for position in range(0, len(layers), 10):
        number = str(layers[position])
        if position + len(number) <= max(len(layers), 2):
            text = text.ljust(position) + number
    return text
