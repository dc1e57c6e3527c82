"""A comparison as one HTML page that needs neither a network, nor a script, nor a second file.

Names of tensors, files and models are hostile: all of them are escaped. Leaves to others: frame
and common style (`report_page.py`), the words and steps it shares with the terminal
(`compare_table.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..mapping.kinship import THRESHOLD
from ..reporting import page as report_page
from ..reporting.markup import cell, marked, plain, row, table
from ..reporting.terminal import size
from .similarity import Measure
from .table import (
    IDENTICAL,
    STEPS,
    STRANGE,
    UNKNOWN,
    cosine,
    counted,
    level,
    not_finite,
    numbers,
    percent,
    shares,
)

if TYPE_CHECKING:
    from .comparison import Comparison
    from .pairing import Pair, Side

SHOWN_OBSTACLES = 8
_WIDTH, _ROW, _TOP, _FOOT = 720, 24, 4, 30
_CELL_MARKED = 9  # chart units from which a cell has room for a sign

STYLE = """
:root { --eq: #f1f3f5; --h0: #dce9f6; --h1: #b8d5ec; --h2: #86bbdd; --h3: #4e99cb; --h4: #2474b5;
  --h5: #0b529b; --h6: #062f6b; --hx: #9a3f00; --hq: #7a2e6b; --on: #ffffff; }
@media screen and (prefers-color-scheme: dark) {
  :root { --eq: #22272e; --h0: #172a3f; --h1: #1b3b5c; --h2: #20507d; --h3: #2a69a2; --h4: #4a8fce;
    --h5: #7db4ea; --h6: #bcdcfa; --hx: #f2a160; --hq: #e2a3d3; --on: #14171b; }
}
.choice .lead::first-letter { text-transform: uppercase; }
.heat rect { stroke: var(--page); stroke-width: 1; }
.heat .eq { fill: var(--eq); } .heat .h0 { fill: var(--h0); } .heat .h1 { fill: var(--h1); }
.heat .h2 { fill: var(--h2); } .heat .h3 { fill: var(--h3); } .heat .h4 { fill: var(--h4); }
.heat .h5 { fill: var(--h5); } .heat .h6 { fill: var(--h6); } .heat .hx { fill: var(--hx); }
.heat .hq { fill: var(--hq); }
.heat svg { max-width: 64rem; }
.heat text.on { fill: var(--on); font-size: 11px; }
.key.swatch { width: 1.1em; height: 0.8em; border: 1px solid var(--rule); }
td.eq, .swatch.eq { background: var(--eq); } td.h0, .swatch.h0 { background: var(--h0); }
td.h1, .swatch.h1 { background: var(--h1); } td.h2, .swatch.h2 { background: var(--h2); }
td.h3, .swatch.h3 { background: var(--h3); } td.h4, .swatch.h4 { background: var(--h4); }
td.h5, .swatch.h5 { background: var(--h5); } td.h6, .swatch.h6 { background: var(--h6); }
td.hx, .swatch.hx { background: var(--hx); } td.hq, .swatch.hq { background: var(--hq); }
td.h4, td.h5, td.h6, td.hx, td.hq { color: var(--on); }
td.differs { font-weight: 600; }
td.name { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 10rem; }
section > details > summary { font-size: 1.05rem; font-weight: 650; margin-bottom: 0.6rem; }
.sides h2:not(:first-child) { margin-top: 1.5rem; }
.sides { display: grid; gap: 2rem; grid-template-columns: repeat(2, minmax(0, 1fr)); }
.sides .numbers td { white-space: normal; }
@media (min-width: 60rem) { .heat svg text { font-size: 11px; } .heat text.on { font-size: 9px; } }
@media (max-width: 60rem) { .sides { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 36rem) { .heat text.on { font-size: 14px; } }
"""


def html(comparison: Comparison) -> str:
    """The page of a comparison."""
    title = f"{comparison.a.name} \N{LEFT RIGHT ARROW} {comparison.b.name}"
    body = [
        f'<header><p class="muted">Comparison of two checkpoints</p><h1>{plain(title)}</h1>',
        *(
            f'<p class="muted">{letter}: {marked(side.path)} ({plain(side.arch)})</p>'
            for letter, side in (("A", comparison.a), ("B", comparison.b))
        ),
        "</header>",
        *_verdict(comparison),
        *_heat(comparison),
        *_kinds(comparison),
        *_sides(comparison),
        *_layers(comparison),
        *_pairs(comparison),
    ]
    return report_page.page(title, body, style=STYLE)


def _verdict(comparison: Comparison) -> Iterator[str]:
    verdict = comparison.verdict
    obstacles = comparison.obstacles
    yield '<section class="choice" aria-label="Verdict"><div>'
    yield f'<p class="lead">{verdict.word}</p><ul>'
    yield f"<li>{marked(verdict.reason)}.</li><li>{counted(comparison)}</li>"
    if odd := not_finite(comparison):
        yield f'<li class="note">not finite and left out: {odd}.</li>'
    for obstacle in obstacles[:SHOWN_OBSTACLES]:
        yield f'<li class="note">a merge is refused: {marked(obstacle)}.</li>'
    if len(obstacles) > SHOWN_OBSTACLES:
        yield f"<li>{len(obstacles) - SHOWN_OBSTACLES} more reasons are in --json.</li>"
    for note in comparison.pairing.notes:
        yield f'<li class="note">{marked(note)}</li>'
    yield "</ul></div></section>"


# The heat strip -----------------------------------------------------------------------------------

_CLASSES: dict[int | str, str] = {IDENTICAL: "eq", STRANGE: "hx", UNKNOWN: "hq"}


def _class(measure: Measure) -> str:
    found = level(measure)
    return _CLASSES.get(found, f"h{found}")


def _said(measure: Measure) -> str:
    """Distance and cosine in words."""
    if measure.identical:
        return "equal"
    if measure.cosine is None:
        return "nothing finite"
    far = "A is zero" if measure.distance is None else f"distance {percent(measure.distance)}"
    return f"{far}, cosine {cosine(measure.cosine)}"


def _heat(comparison: Comparison) -> Iterator[str]:
    kinds, layers = comparison.kinds, comparison.layers
    if not kinds:
        return
    left = 14 + 12 * max(map(len, kinds))
    cell = (_WIDTH - left) / len(layers)
    height = _TOP + _ROW * len(kinds) + _FOOT
    yield '<section><h2>Distance by layer and kind</h2><figure class="heat">'
    yield f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-labelledby="heat-title">'
    yield '<title id="heat-title">Distance of each kind of weight over the layers.'
    yield "The table of layers has all numbers.</title>"
    cells = comparison.cells
    for i, kind in enumerate(kinds):
        y = _TOP + _ROW * i
        yield f'<text x="{left - 8}" y="{y + _ROW / 2}" dy="0.35em" text-anchor="end">'
        yield f"{plain(kind)}</text>"
        for j, layer in enumerate(layers):
            if measure := cells.get((f"layers.{layer}", kind)):
                where = f"layer {layer}, {plain(kind)}"
                yield from _cell(left + j * cell, y, cell, measure, where)
    yield from _axis(layers, left, cell, height - 10)
    yield f"</svg><figcaption>{''.join(_legend())}</figcaption></figure></section>"


def _cell(x: float, y: float, width: float, measure: Measure, where: str) -> Iterator[str]:
    name = _class(measure)
    yield f'<rect class="{name}" x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_ROW}">'
    yield f"<title>{where}: {_said(measure)}</title></rect>"
    if name == "hx" and width >= _CELL_MARKED:
        yield f'<text class="on" x="{x + width / 2:.2f}" y="{y + _ROW / 2}" dy="0.35em"'
        yield f' text-anchor="middle">{STRANGE}</text>'


def _axis(layers: Sequence[int], left: float, cell: float, y: float) -> Iterator[str]:
    """Numbers of layers, as many as fit also in the large type of narrow screens."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 1000) if step * cell >= 34)
    for j in range(0, len(layers), step):
        yield f'<text class="title" x="{left + (j + 0.5) * cell:.2f}" y="{y}"'
        yield f' text-anchor="middle">{layers[j]}</text>'


def _legend() -> Iterator[str]:
    """What the colours mean, from near to far."""
    bounds = [f"below {percent(step)}" for step in STEPS]
    steps = [("eq", "equal"), *((f"h{i}", text) for i, text in enumerate(bounds))]
    steps += [(f"h{len(STEPS)}", "more"), ("hx", f"{STRANGE} cosine below {THRESHOLD}")]
    yield "<span>||A - B|| / ||A||:</span> "
    for name, text in steps:
        yield f'<span><span class="key swatch {name}"></span>{text}</span> '


# Tables -------------------------------------------------------------------------------------------


def _kinds(comparison: Comparison) -> Iterator[str]:
    """Each kind over all layers, then what is no layer, then what was joined by name."""
    kinds = comparison.by(lambda pair: pair.kind)
    found = {kind: kinds[kind] for kind in comparison.kinds}
    found |= {group: kinds[group] for group in comparison.singles}
    if not (found or comparison.by_name):
        return
    rows = [_kind(name, measure) for name, measure in found.items()]
    rows += [_kind(f"{name} (by name)", m) for name, m in comparison.by_name.items()]
    yield "<section><h2>By kind</h2>"
    yield from table(
        ["kind", "distance", "cosine", "equal elements", "read", "of"],
        rows,
        label="All layers together; the distance is ||A - B|| / ||A||",
    )
    yield "</section>"


def _kind(name: str, measure: Measure) -> str:
    cells = (*numbers(measure), f"{measure.read:,}", f"{measure.total:,}")
    swatch = f'<span class="key swatch {_class(measure)}"></span>'
    return row(swatch + plain(name), map(cell, cells))


def _sides(comparison: Comparison) -> Iterator[str]:
    a, b = comparison.a, comparison.b
    yield '<section><div class="sides"><div><h2>The two sides</h2>'
    traits = []
    for name, ours in a.traits.items():
        theirs = b.traits[name]
        differs = "differs" if ours != theirs else ""
        traits.append(row(plain(name), [cell(plain(ours)), cell(plain(theirs), differs)]))
    heads = ["tensors mapped", "mapped", "same name", "alone", "bytes mapped"]
    both = zip(heads, shares(a), shares(b), strict=True)
    mapped = [row(head, map(cell, pair)) for head, *pair in both]
    yield from table(["", "A", "B"], [*traits, *mapped], label="Shares are of the parameters")
    yield "</div><div>"
    for letter, side in (("A", a), ("B", b)):
        yield f"<h2>Only in {letter}</h2>"
        yield from _only(side)
    yield "</div></div></section>"


def _only(side: Side) -> Iterator[str]:
    if not side.only:
        yield '<p class="none">nothing</p>'
        return
    rows = []
    for only in side.only:
        cells = (f"{only.share.tensors:,}", size(only.share.nbytes), plain(only.why))
        rows.append(row(plain(only.what), map(cell, cells)))
    yield from table(["what", "tensors", "size", "why"], rows, label="No counterpart")


def _layers(comparison: Comparison) -> Iterator[str]:
    """The numbers behind the strip."""
    kinds = comparison.kinds
    if not kinds:
        return
    cells, groups = comparison.cells, comparison.groups
    rows = []
    for layer in comparison.layers:
        group = f"layers.{layer}"
        if group in groups:
            held = [_number(cells.get((group, kind))) for kind in kinds]
            held.append(cell(cosine(groups[group].cosine)))
            rows.append(row(str(layer), held))
    yield "<section><details><summary>Every layer</summary>"
    heads = ["layer", *map(plain, kinds), "cosine of all"]
    yield from table(heads, rows, label="Distance ||A - B|| / ||A||")
    yield "</details></section>"


def _number(measure: Measure | None) -> str:
    if measure is None:
        return "<td></td>"
    text = {IDENTICAL: "=", UNKNOWN: UNKNOWN}.get(str(level(measure)), percent(measure.distance))
    return f'<td class="{_class(measure)}" title="{_said(measure)}">{text}</td>'


def _pairs(comparison: Comparison) -> Iterator[str]:
    rows = [_pair(pair, measure) for pair, measure in comparison.items]
    if rows:
        yield "<section><details><summary>Every pair of tensors</summary>"
        yield from table(
            ["role", "in A", "in B", "distance", "cosine", "equal"], rows, label=counted(comparison)
        )
        yield "</details></section>"


def _pair(pair: Pair, measure: Measure) -> str:
    a, b = (
        ", ".join(dict.fromkeys(marked(piece.names[i]) for piece in pair.pieces)) for i in (0, 1)
    )
    names = (cell(a, "name"), cell(b, "name"))
    return row(marked(pair.role), [*names, *map(cell, numbers(measure))])
