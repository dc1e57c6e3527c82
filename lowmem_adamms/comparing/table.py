"""A comparison on the terminal, as rich renderables. `cli/` prints them.

The heat strip has one sign a layer, whose height tells the distance where there is no colour.
Leaves to others: the page (`compare_page.py`), which shares the steps and the words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..mapping.kinship import THRESHOLD
from ..reporting.terminal import size
from .similarity import Measure

if TYPE_CHECKING:
    from .comparison import Comparison
    from .pairing import Side

STEPS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""Bounds of the distances that one sign stands for: half decades."""
IDENTICAL, STRANGE, UNKNOWN = "=", "x", "?"
SHOWN_OBSTACLES = 3
_BLOCKS, _DIGITS = "▁▂▃▄▅▆▇", "1234567"
_STYLES = ("color(67)", "color(73)", "color(71)", "color(142)", "color(172)", "color(166)")
_AROUND = 60  # columns that the table needs besides the strip
_LEAST = 12


def level(measure: Measure) -> int | str:
    """Which step of STEPS a distance is on, or one of IDENTICAL, STRANGE and UNKNOWN."""
    if measure.identical:
        return IDENTICAL
    if measure.cosine is None or measure.distance is None:
        return UNKNOWN
    if measure.cosine < THRESHOLD:
        return STRANGE
    return sum(measure.distance >= step for step in STEPS)


def percent(value: float | None) -> str:
    """A distance or share, to two significant digits."""
    if value is None:
        return ""
    if value == 0 or value >= 0.995:
        return f"{100 * value:.0f} %"
    return f"{float(f'{100 * value:.2g}'):.10g} %"


def cosine(value: float | None) -> str:
    """Four decimals; closer to 1, so many that the difference shows."""
    if value is None or value == 1:
        return "" if value is None else "1"
    return f"{value:.4f}" if value < 0.9995 else f"1 - {1 - value:.1e}"


def counted(comparison: Comparison) -> str:
    """How much was read, in a sentence."""
    pairs = len(comparison.measures)
    if comparison.sample is None:
        total = sum(measure.read for measure in comparison.measures)
        return f"Read: all {total:,} elements of {pairs:,} pairs of tensors."
    return (
        f"Read: a sample, at most {comparison.sample:,} elements of each of {pairs:,} pairs of"
        " tensors."
    )


def drawn(comparison: Comparison, *, width: int, ascii_only: bool = False) -> Iterator[Any]:
    """All of it, to be printed one below the other: tables, and lines in rich's markup.

    width: columns of the terminal. ascii_only: it knows no other signs.
    """
    yield from heading(comparison)
    if comparison.measures:
        yield strip_table(comparison, width=width, ascii_only=ascii_only)
        yield legend(ascii_only=ascii_only)
    yield share_table(comparison)
    yield from closing(comparison)


def heading(comparison: Comparison) -> Iterator[str]:
    """The two sides, the verdict and what it rests on, in rich's markup."""
    for letter, side in (("A", comparison.a), ("B", comparison.b)):
        whole = f"{side.whole.tensors:,} tensors, {size(side.whole.nbytes)}"
        yield f"{letter}: {escape(side.name)} ({escape(side.arch)}), {whole}"
    yield f"[bold]{comparison.verdict.word}[/bold]: {escape(comparison.verdict.reason)}"
    yield counted(comparison)


def closing(comparison: Comparison) -> Iterator[str]:
    """What differs, what either side has alone, what a merge would stumble on; rich's markup."""
    a, b = comparison.a.traits, comparison.b.traits
    for name, said in a.items():
        if said != b[name]:
            yield escape(f"differs: {name}: {said} in A, {b[name]} in B")
    for letter, side in (("A", comparison.a), ("B", comparison.b)):
        yield escape(f"only in {letter}: {_alone(side)}")
    if odd := not_finite(comparison):
        yield f"not finite, left out: {odd}"
    obstacles = comparison.obstacles
    for obstacle in obstacles[:SHOWN_OBSTACLES]:
        yield escape(f"a merge is refused: {obstacle}")
    if len(obstacles) > SHOWN_OBSTACLES:
        yield f"… and {len(obstacles) - SHOWN_OBSTACLES} more reasons; --json has all"
    for note in comparison.pairing.notes:
        yield escape(f"note: {note}")


def _alone(side: Side) -> str:
    """What it has alone, with its size, by the reason."""
    reasons: dict[str, list[str]] = {}
    for only in side.only:
        reasons.setdefault(only.why, []).append(f"{only.what} ({size(only.share.nbytes)})")
    return "; ".join(f"{', '.join(held)}: {why}" for why, held in reasons.items()) or "nothing"


def not_finite(comparison: Comparison) -> str:
    """How many of the elements read are NaN or infinite, or nothing if none are."""
    total = sum(comparison.measures, Measure())
    if not (total.odd_a or total.odd_b):
        return ""
    return f"{total.odd_a:,} elements of A, {total.odd_b:,} of B"


def share_table(comparison: Comparison) -> Table:
    """How much of each side is mapped, as a merge blends it, and how much else is joined."""
    table = Table(title="shares of the parameters", title_justify="left")
    for title in ("", "tensors mapped", "mapped", "same name", "alone", "bytes mapped"):
        table.add_column(title, justify="right" if title else "left")
    for letter, side in (("A", comparison.a), ("B", comparison.b)):
        table.add_row(letter, *shares(side))
    return table


def shares(side: Side) -> list[str]:
    """Tensors, then shares of the elements joined by role, by name and not, then bytes."""
    alone = sum(only.share.elements for only in side.only)
    return [
        f"{side.mapped.tensors:,} of {side.whole.tensors:,}",
        *(
            percent(count / side.whole.elements if side.whole.elements else 0)
            for count in (side.mapped.elements, side.by_name.elements, alone)
        ),
        f"{size(side.mapped.nbytes)} of {size(side.whole.nbytes)}",
    ]


def strip_table(comparison: Comparison, *, width: int, ascii_only: bool = False) -> Table:
    """One row a kind: the heat strip over the layers, then distance and cosine of all of them.

    width: columns of the terminal; where there are more layers than room, a sign stands for the
    furthest of several.
    """
    layers = comparison.layers
    per = -(-len(layers) // max(width - _AROUND, _LEAST)) or 1
    signs = _DIGITS if ascii_only else _BLOCKS
    of_several = f"; a sign is the furthest of {per} layers" if per > 1 else ""
    table = Table(title=f"distance ||A - B|| / ||A||{of_several}", title_justify="left")
    table.add_column("")
    table.add_column(_ruler(layers, per) if comparison.kinds else "", no_wrap=True)
    for title in ("distance", "cosine", "furthest", "equal"):
        table.add_column(title, justify="right", no_wrap=True)
    cells = comparison.cells
    for kind in comparison.kinds:
        row = [cells.get((f"layers.{layer}", kind)) for layer in layers]
        total = sum((measure for measure in row if measure), Measure())
        far, near, equal = numbers(total)
        table.add_row(kind, _strip(row, per, signs), far, near, _furthest(row, layers), equal)
    table.add_section()
    singles = {group: comparison.groups[group] for group in comparison.singles}
    for name, measure in {**singles, **comparison.by_name}.items():
        far, near, equal = numbers(measure)
        table.add_row(escape(name), _strip([measure], 1, signs), far, near, "", equal)
    return table


def legend(*, ascii_only: bool = False) -> str:
    """What the signs of the strip mean."""
    signs = _DIGITS if ascii_only else _BLOCKS
    steps = [f"{sign} < {percent(step)}" for sign, step in zip(signs, STEPS, strict=False)]
    return (
        f"{IDENTICAL} equal  {'  '.join(steps)}  {signs[-1]} more  {STRANGE} cosine < {THRESHOLD}"
        f"  {UNKNOWN} nothing finite"
    )


def numbers(measure: Measure) -> tuple[str, str, str]:
    """Distance, cosine, and the share of elements that are equal."""
    equal = percent(measure.equal / measure.read) if measure.read else ""
    return percent(measure.distance), cosine(measure.cosine), equal


def _furthest(row: Sequence[Measure | None], layers: Sequence[int]) -> str:
    """The layer with the largest distance, and that."""
    found = [
        (measure.distance, -layer)
        for layer, measure in zip(layers, row, strict=True)
        if measure and measure.distance
    ]
    if not found:
        return ""
    distance, layer = max(found)
    return f"{percent(distance)} in {-layer}"


def _strip(row: Sequence[Measure | None], per: int, signs: str) -> Text:
    """A sign for every `per` layers; a blank where neither side has anything to compare."""
    text = Text()
    for first in range(0, len(row), per):
        levels = [level(measure) for measure in row[first : first + per] if measure]
        if not levels:
            text.append(" ")
            continue
        worst = max(levels, key=_rank)
        style = _STYLES[worst] if isinstance(worst, int) and worst < len(_STYLES) else ""
        plain = signs[worst] if isinstance(worst, int) else worst
        text.append(plain, style or {IDENTICAL: "dim", UNKNOWN: "magenta"}.get(plain, "red"))
    return text


def _rank(found: int | str) -> int:
    order: dict[int | str, int] = {IDENTICAL: -1, STRANGE: len(STEPS) + 1, UNKNOWN: len(STEPS) + 2}
    return order[found] if found in order else int(found)


def _ruler(layers: Sequence[int], per: int) -> str:
    """Numbers of layers above the strip, one every ten signs."""
    starts = layers[::per]
    text = ""
    for i in range(0, len(starts), 10):
        if i + len(str(starts[i])) <= max(len(starts), 2):
            text = text.ljust(i) + str(starts[i])
    return text
