"""The search report's curve: scores over alpha as an SVG, and the table of candidates beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from ..searching.search import Candidate
from .markup import DASH, as_percent, cell, row, table
from .view import MEANING, View, decimals_of

CROSS = "\N{MULTIPLICATION SIGN}"
_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 44, 90
_PAD = 40  # between the axis and the first alpha: the end's "no score" stands there
_UNIT = {"embedding": "summed distance", "relative": "%"}
_TICK_GAP = 56  # room for one alpha's name, also in the large type of narrow screens


@dataclass(frozen=True, slots=True)
class _Scale:
    """Chart units of an alpha and of a score."""

    low: float
    high: float
    top: float
    step: float

    def x(self, alpha: float) -> float:
        inner = _WIDTH - _RIGHT - _LEFT - 2 * _PAD
        share = (alpha - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return _LEFT + _PAD + share * inner

    def y(self, score: float) -> float:
        return _HEIGHT - _BOTTOM - score / self.top * (_HEIGHT - _TOP - _BOTTOM)


def curve(view: View) -> list[str]:
    """The section: the chart with its legend, and the table; nothing without alphas."""
    if not view.alphas:
        return []
    return [
        '<section class="curve"><h2>Disagreement over alpha</h2>',
        f'<div class="pair{" stacked" if view.rounds else ""}"><figure>',
        *_chart(view),
        f"<figcaption>{_legend(view)}</figcaption></figure>",
        *_candidates(view),
        "</div></section>",
    ]


def _legend(view: View) -> str:
    keys = [
        f'<span class="key point"></span>score D: {MEANING[view.result.measure]}',
        '<span class="key whisker"></span>95 % bootstrap interval',
        '<span class="key bar"></span>difference between two neighbours',
    ]
    if any(c.degenerate for c in view.result.candidates):
        keys.append(f'<span class="key cross">{CROSS}</span>degenerate: empty, repeating, constant')
    if view.rounds:
        keys.append("scores compare only where a line joins them: one round of refinement")
        keys.append('<span class="key point earlier"></span>before a refinement scored it anew')
    return "".join(f"<span>{key}</span> " for key in keys)


def _scale(view: View) -> _Scale:
    heights = [0.01 if view.distances else 1.0]
    for c in view.result.rounds:
        heights += [c.score or 0.0, view.bar(c.diff_next or 0.0), *(c.interval or ())]
    peak = max(height for height in heights if math.isfinite(height))
    raw = peak / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    if not view.distances:
        step = max(step, 1.0)
    return _Scale(min(view.alphas), max(view.alphas), step * math.ceil(peak / step + 0.05), step)


def _chart(view: View) -> list[str]:
    scale = _scale(view)
    unit = _UNIT.get(view.result.measure, "answers")
    scored = [c for c in view.result.rounds if c.score is not None]
    links = _links(view)
    return [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="chart-title">',
        f'<title id="chart-title">Score over alpha, lowest is best; chosen: '
        f"{view.name(view.result.alpha)}. The table of candidates has all numbers.</title>",
        *_axes(view, scale, f"score D ({unit})"),
        *_bars(view, scale, links),
        *(line for c in view.result.candidates if c.score is None for line in _end(view, scale, c)),
        *_lines_between(scale, scored),
        *_differences(view, scale, links),
        *(line for c in scored for line in _point(view, scale, c)),
        "</svg>",
    ]


def _axes(view: View, scale: _Scale, title: str) -> list[str]:
    floor, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    x = scale.x(view.result.alpha)
    half = min(22.0, *(0.4 * abs(scale.x(a) - x) or 22.0 for a in view.alphas))
    drawn = [
        f'<rect class="band" x="{x - half:.1f}" y="{_TOP}" width="{2 * half:.1f}"'
        f' height="{floor - _TOP}"/>',
        f'<text class="title" x="4" y="22">{title}</text>',
        f'<text class="title" x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 8}"'
        ' text-anchor="middle">alpha (weight of the donor)</text>',
    ]
    for i in range(round(scale.top / scale.step) + 1):
        y = scale.y(i * scale.step)
        drawn += [
            f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>',
            f'<text x="{_LEFT - 8}" y="{y:.1f}" dy="0.35em" text-anchor="end">'
            f"{i * scale.step:.10g}</text>",
        ]
    ticks = _ticks(view, scale)
    places = decimals_of(ticks)
    for alpha in ticks:
        chosen = ' class="chosen"' if alpha == view.result.alpha else ""
        drawn.append(
            f'<text{chosen} x="{scale.x(alpha):.1f}" y="{floor + 24}" text-anchor="middle">'
            f"{alpha:.{places}f}</text>"
        )
    return drawn


def _ticks(view: View, scale: _Scale) -> list[float]:
    """The alphas whose names fit below the axis: the chosen one and the ends go first."""
    kept: list[float] = []
    for alpha in (view.result.alpha, view.alphas[0], view.alphas[-1], *view.alphas):
        if all(abs(scale.x(alpha) - scale.x(other)) >= _TICK_GAP for other in kept):
            kept.append(alpha)
    return sorted(kept)


_Links = Mapping[tuple[float, float], float]


def _links(view: View) -> _Links:
    """The difference between each pair of alphas that was compared, wide pairs first."""
    found: dict[tuple[float, float], float] = {}
    wider = [None, *view.alphas, None]
    around = {alpha: (wider[i], wider[i + 2]) for i, alpha in enumerate(view.alphas)}
    for c in view.result.rounds:
        before, after = c.neighbours if any(c.neighbours) else around[c.alpha]
        if before is not None and c.diff_previous is not None:
            found[before, c.alpha] = c.diff_previous
        if after is not None and c.diff_next is not None:
            found[c.alpha, after] = c.diff_next
    return dict(sorted(found.items(), key=lambda item: (item[0][0] - item[0][1], item[0])))


def _bars(view: View, scale: _Scale, links: _Links) -> list[str]:
    """Between two alphas, a bar as high as their difference; those of refinements in front."""
    drawn, floor = [], _HEIGHT - _BOTTOM
    for (low, high), difference in links.items():
        left, right, y = scale.x(low), scale.x(high), scale.y(view.bar(difference))
        inset = min(14.0, 0.2 * (right - left))
        fine = " fine" if _inside(links, low, high, of_any=True) else ""
        drawn.append(
            f'<rect class="bar{fine}" x="{left + inset:.1f}" y="{y:.1f}"'
            f' width="{right - left - 2 * inset:.1f}" height="{floor - y:.1f}"/>'
        )
    return drawn


def _inside(links: _Links, low: float, high: float, *, of_any: bool) -> bool:
    """Whether the pair lies inside a wider one (of_any), or has a narrower one inside it."""
    return any(
        (a <= low and high <= b) if of_any else (low <= a and b <= high)
        for a, b in links
        if (a, b) != (low, high)
    )


def _differences(view: View, scale: _Scale, links: _Links) -> list[str]:
    """The numbers at the feet of the bars, where there is room for them."""
    drawn, floor = [], _HEIGHT - _BOTTOM
    for (low, high), difference in links.items():
        left, right = scale.x(low), scale.x(high)
        if right - left < 30 or _inside(links, low, high, of_any=False):
            continue
        kind = "diff tight" if right - left < 60 else "diff"
        kind += " low" if floor - scale.y(view.bar(difference)) < 10 else ""
        drawn.append(
            f'<text class="{kind}" x="{(left + right) / 2:.1f}" y="{floor - 8}"'
            f' text-anchor="middle">{view.number(difference)}</text>'
        )
    return drawn


def _lines_between(scale: _Scale, scored: Sequence[Candidate]) -> list[str]:
    """A line through the scores of a round; scores of two rounds do not compare."""
    drawn = []
    for _, group in groupby(scored, key=lambda c: c.round):
        points = " ".join(f"{scale.x(c.alpha):.1f},{scale.y(c.score or 0.0):.1f}" for c in group)
        drawn.append(f'<polyline class="line" points="{points}"/>')
    return drawn


def _end(view: View, scale: _Scale, c: Candidate) -> list[str]:
    """An alpha without a score: a broken line, and why, upright on its outer side."""
    x, floor = scale.x(c.alpha), _HEIGHT - _BOTTOM
    drawn = [f'<line class="end" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{floor}"/>']
    if c.alpha in (view.alphas[0], view.alphas[-1]):
        outer = x - 10 if c.alpha == view.alphas[0] else x + 10
        base = "auto" if c.alpha == view.alphas[0] else "hanging"
        drawn.append(
            f'<text class="why" transform="translate({outer:.1f} {floor - 10}) rotate(-90)"'
            f' dominant-baseline="{base}">no score: one neighbour</text>'
        )
    return [*drawn, *_below(view, scale, c)]


def _point(view: View, scale: _Scale, c: Candidate) -> list[str]:
    """A score with its whisker, and a cross where answers are degenerate."""
    x, y = scale.x(c.alpha), scale.y(c.score or 0.0)
    last = c not in view.result.earlier
    chosen = last and c.alpha == view.result.alpha
    kinds = ["point"] if last else ["point", "earlier"]
    kinds += ["chosen"] if chosen else []
    kinds += ["tie"] if last and c.alpha in view.result.ties else []
    kinds += ["degenerate"] if view.collapsed(c) else []
    drawn = []
    if last and c.interval is not None:  # two at one alpha would lie on each other
        low, high = scale.y(c.interval[0]), scale.y(c.interval[1])
        drawn.append(
            f'<path class="whisker" d="M{x:.1f} {low:.1f}V{high:.1f}'
            f'M{x - 6:.1f} {low:.1f}h12M{x - 6:.1f} {high:.1f}h12"/>'
        )
    said = f"alpha {view.name(c.alpha)}: score {view.number(c.score)}"
    said += f", interval {view.interval(c)}" if c.interval else ""
    radius = 7.5 if chosen else 5.5
    drawn.append(
        f'<circle class="{" ".join(kinds)}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
        f"<title>{said}</title></circle>"
    )
    return [*drawn, *(_below(view, scale, c) if last else ())]


def _below(view: View, scale: _Scale, c: Candidate) -> list[str]:
    """Under the alpha's name: that it was chosen, or how many of its answers are degenerate."""
    x, y = scale.x(c.alpha), _HEIGHT - _BOTTOM + 49
    if c.alpha not in _ticks(view, scale):
        return []
    if c.alpha == view.result.alpha:
        return [f'<text class="chosen" x="{x:.1f}" y="{y}" text-anchor="middle">chosen</text>']
    if c.degenerate:
        kind = "warn" if view.collapsed(c) else "title"
        return [
            f'<text class="{kind}" x="{x:.1f}" y="{y}" text-anchor="middle">'
            f"{CROSS} {c.degenerate:,}</text>"
        ]
    return []


def _candidates(view: View) -> list[str]:
    head = ["alpha"]
    head += ["round", "neighbours"] if view.rounds else []
    head += ["from previous", "to next", "score D", "95 % interval"]
    head += ["wins in resamples"] if view.result.wins else []
    rows = [_candidate(view, c) for c in view.result.rounds]
    return table([*head, "degenerate"], rows, label="Candidates")


def _candidate(view: View, c: Candidate) -> str:
    last, wins = c not in view.result.earlier, view.result.wins
    chosen = last and c.alpha == view.result.alpha
    tags = ["chosen"] if chosen else []
    tags += ["tie"] if last and c.alpha in view.result.ties else []
    cells = []
    if view.rounds:
        sides = (DASH if side is None else view.name(side) for side in c.neighbours)
        cells += [str(c.round) if c.round else "grid", ", ".join(sides)]
    cells += [view.number(v) for v in (c.diff_previous, c.diff_next, c.score)]
    cells.append(view.interval(c))
    if wins:
        share = wins.get(c.alpha) if last else None
        meter = "" if share is None else f'<span class="meter" style="--share:{share:.3f}"></span>'
        cells.append(DASH if share is None else f"{as_percent(share)} {meter}")
    name = view.name(c.alpha) + "".join(f' <span class="tag">{tag}</span>' for tag in tags)
    degenerate = cell(f"{c.degenerate:,}", "warn" if view.collapsed(c) else "")
    return row(name, [*map(cell, cells), degenerate], "chosen" if chosen else "")
