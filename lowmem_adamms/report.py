"""The search report: one HTML page that needs neither a network nor a second file.

Prompts and answers are hostile: all text is escaped, and characters that are invisible or reorder
their neighbours are shown by their code point. Leaves to others: choosing alpha (`search.py`), the
terminal (`cli.py`), `adamms.json` (`card.py`).
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

from . import report_page
from .answers import normalise
from .errors import OutputError
from .prompts import Prompt
from .search import MARKEDLY, Candidate, Result

SHOWN_CHANGING = 200  # prompts in the table of changes; each may bring images
SHOWN_STEADY = 500  # prompts in the list of those that never change
SHOWN_IMAGES = 4  # of one prompt
SHOWN_TEXT = 4000  # characters of one text when opened; adamms.json and the journal have the rest
SHORT_ANSWER, SHORT_PROMPT, SHORT_LINES = 160, 260, 8
THUMBNAIL = 96  # pixels, the longer side
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # those that run no other program
SIDE_BY_SIDE = 9  # more alphas than this do not fit as columns: answers go below each other

DASH = "\N{EN DASH}"
CROSS = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True, slots=True)
class Timing:
    """What one alpha cost. Seconds are wall time; tokens are counts over all prompts.

    forward_tokens: tokens that went through the model. plain_tokens: tokens that would have gone
    through it without drafts.
    """

    alpha: float
    apply_seconds: float
    seconds: float
    answer_tokens: int
    forward_tokens: int
    plain_tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring alphas with one answer: positions first..last in the grid, both included."""

    first: int
    last: int
    answer: str


@dataclass(frozen=True, slots=True)
class _View:
    """What every section needs: the result, how its alphas are written, and answers by prompt."""

    result: Result
    alphas: tuple[float, ...]
    decimals: int

    @property
    def distances(self) -> bool:
        """Whether scores sum distances; else they count answers."""
        return self.result.measure == "embedding"

    @property
    def rounds(self) -> bool:
        """Whether the grid was refined; scores compare within a round only."""
        return any(c.round for c in self.result.candidates)

    def collapsed(self, c: Candidate) -> bool:
        """Whether markedly more answers are degenerate than at the smallest alpha, or half are."""
        excess = c.degenerate - self.result.candidates[0].degenerate
        return excess > MARKEDLY * self.result.prompts or 2 * c.degenerate >= self.result.prompts

    def name(self, alpha: float) -> str:
        """With all decimals that any alpha of the grid needs, for columns."""
        return f"{alpha:.{self.decimals}f}"

    def short(self, alpha: float) -> str:
        """With as few decimals as this alpha needs, but at least one, for sentences."""
        return f"{alpha:.{_places([alpha])}f}"

    def span(self, run: Run) -> str:
        first, last = self.short(self.alphas[run.first]), self.short(self.alphas[run.last])
        return first if run.first == run.last else f"{first}{DASH}{last}"

    def number(self, value: float | None) -> str:
        """A difference or score: a count (its percentiles have fractions), or a distance."""
        if value is None or not math.isfinite(value):
            return DASH
        if self.distances:
            return f"{value:,.2f}"
        value = round(value, 1)
        return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"

    def interval(self, candidate: Candidate) -> str:
        if candidate.interval is None:
            return DASH
        low, high = candidate.interval
        return f"{self.number(low)} to {self.number(high)}"

    def candidate(self, alpha: float) -> Candidate | None:
        return next((c for c in self.result.candidates if c.alpha == alpha), None)


def html(
    result: Result,
    prompts: Sequence[Prompt],
    *,
    timings: Sequence[Timing] = (),
    facts: Mapping[str, Mapping[str, str]] | None = None,
    title: str = "Search for alpha",
) -> str:
    """The report of a search as one self-contained page; every string in it may be hostile.

    title: base and donor, such as "Qwen2-VL ← LLaVA-OneVision". facts: sections of key and value.
    prompts: in the order of the answers; may be shorter or empty, as for recorded answers.
    """
    view = _view(result)
    body = [
        *_header(view, title),
        *_choice(view),
        *_curve(view),
        *_answers(view, prompts),
        *_timings(view, timings),
        *_facts(facts or {}),
    ]
    stacked = "all" if len(view.alphas) > SIDE_BY_SIDE else "(max-width: 60rem)"
    digest = base64.b64encode(hashlib.sha256(report_page.SCRIPT.encode()).digest()).decode()
    return report_page.PAGE.format(
        # Only our own script runs, even if a string should ever get past the escaping
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'",
        title=plain(title),
        style=report_page.STYLE + f"@media {stacked} {{{report_page.STACKED}}}\n",
        body="\n".join(body),
        script=report_page.SCRIPT,
    )


def write(path: Path, page: str) -> None:
    """Put `page` at `path` as UTF-8, whole or not at all. OutputError if that cannot be done."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            with partial.open("w", encoding="utf-8", newline="\n") as file:
                file.write(page)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{path}: cannot write the report: {reason}; choose another") from error


def spark(result: Result) -> str:
    """The curve in one line of block characters; a middle dot where there is no score."""
    scores = [c.score for c in result.candidates if c.score is not None]
    low, high = min(scores, default=0.0), max(scores, default=0.0)
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(
        "\N{MIDDLE DOT}"
        if c.score is None
        else blocks[round((c.score - low) / ((high - low) or 1.0) * (len(blocks) - 1))]
        for c in result.candidates
    )


def runs(answers: Sequence[str], prefer: int | None = None) -> tuple[Run, ...]:
    """Answers over the grid, neighbours that are equal once normalised merged into one run.

    A run shows the spelling of its first answer, or of position `prefer` if that lies inside.
    """
    found = []
    for _, group in groupby(range(len(answers)), key=lambda i: normalise(answers[i])):
        inside = list(group)
        shown = prefer if prefer is not None and prefer in inside else inside[0]
        found.append(Run(inside[0], inside[-1], answers[shown]))
    return tuple(found)


# Text ---------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Escaped for element text and for attributes; unprintable characters as [U+202E]."""
    return _escaped(text, "[U+{:04X}]")


def marked(text: str) -> str:
    """Escaped for element text; unprintable characters as a small box with their code point."""
    return _escaped(text, '<span class="code">U+{:04X}</span>')


def _escaped(text: str, form: str) -> str:
    text = escape(text.replace("\r\n", "\n"))
    if text.isprintable():
        return text
    return "".join(c if _harmless(c) else form.format(ord(c)) for c in text)


def _harmless(character: str) -> bool:
    """Whether a character shows itself; joiners stay, for Persian, Hindi and emoji need them."""
    if character in "\n\t\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}":
        return True
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")


def _text(text: str, limit: int, start: int = 0) -> str:
    """A text in its own direction; a long one shortened, the full text one click away.

    start: the position that a shortened text must show.
    """
    if not text.strip():
        return f'<p class="none">({"white space" if text else "empty"})</p>'
    if len(text) <= limit and text.count("\n") < SHORT_LINES:
        return f'<p dir="auto">{marked(text)}</p>'
    full, rest = text[:SHOWN_TEXT], len(text) - SHOWN_TEXT
    more = f' <span class="muted">({rest:,} more characters)</span>' if rest > 0 else ""
    short = marked(_shortened(text, limit, start))
    return (
        f'<details class="long"><summary dir="auto"><span>{short}</span></summary>'
        f'<p dir="auto">{marked(full)}{more}</p></details>'
    )


def _shortened(text: str, limit: int, start: int = 0) -> str:
    """About `limit` characters around `start`, white space collapsed, cut between words."""
    dots, lead = "\N{HORIZONTAL ELLIPSIS}", limit // 4
    first = _cut(text, start - lead) if start > limit - lead else 0
    rest = text[first:]
    kept = " ".join(rest[: 4 * limit].split())
    last = _cut(kept, limit)
    ends = last == len(kept) and len(rest) <= 4 * limit
    return (dots if first else "") + kept[:last] + ("" if ends else dots)


def _cut(text: str, at: int) -> int:
    """A position at or a little before `at`: a space, else no middle of a composed character."""
    at = min(at, len(text))
    if at == len(text):
        return at
    if (space := text.rfind(" ", max(at - 24, 0), at + 1)) > 0:
        return space
    while at > 0 and (
        unicodedata.combining(text[at]) or "\N{ZERO WIDTH JOINER}" in text[at - 1 : at + 1]
    ):
        at -= 1
    return at


def _share(part: float, whole: float = 1.0) -> str:
    return f"{100 * part / whole:.0f}\N{NO-BREAK SPACE}%"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _rows(head: Iterable[str], rows: Iterable[str], *, label: str, cls: str = "") -> list[str]:
    """A table of numbers: `head` holds texts of our own, `rows` holds finished <tr> elements."""
    cells = "".join(f'<th scope="col">{name}</th>' for name in head)
    return [
        f'<div class="scroll"><table class="numbers {cls}"><caption>{label}</caption>',
        f"<thead><tr>{cells}</tr></thead><tbody>",
        *rows,
        "</tbody></table></div>",
    ]


# Header and choice --------------------------------------------------------------------------------


def _view(result: Result) -> _View:
    alphas = tuple(c.alpha for c in result.candidates)
    return _View(result, alphas, _places([*alphas, result.alpha]))


def _places(alphas: Iterable[float]) -> int:
    """How many decimals, one or more, show all of these alphas."""
    return max(len(f"{alpha:.6f}".rstrip("0").partition(".")[2]) for alpha in alphas) or 1


def _header(view: _View, title: str) -> list[str]:
    result = view.result
    about = (
        f"{_count(result.prompts, 'prompt')}, {_count(len(view.alphas), 'alpha')}"
        f", measure {plain(result.measure)}"
    )
    shown = plain(title.replace("<-", "\N{LEFTWARDS ARROW}"))
    return [f'<header><p class="muted">Search for alpha: {about}</p><h1>{shown}</h1></header>']


_MEANING = {
    "pairwise": "differing answers, to the previous alpha plus to the next",
    "joint": "answers that differ from either neighbour's",
    "embedding": "distances to both neighbours' answers, added up",
}


def _choice(view: _View) -> list[str]:
    result = view.result
    lines, percent = [*_why(view), *_doubts(view)], 100 * result.alpha
    return [
        '<section class="choice" aria-label="Chosen alpha">',
        f'<p class="alpha"><span>alpha</span><b>{view.short(result.alpha)}</b></p>',
        "<div>",
        f'<p class="lead">Merge at alpha {view.short(result.alpha)}: the language weights are'
        f" {100 - percent:.6g} % base and {percent:.6g} % donor.</p>",
        "<ul>",
        *(f"<li>{line}</li>" for line in lines),
        *(f'<li class="note">{marked(note)}</li>' for note in result.notes),
        "</ul></div></section>",
    ]


def _why(view: _View) -> list[str]:
    """How the chosen alpha compares with the others that were scored in its round."""
    chosen = view.candidate(view.result.alpha)
    if chosen is None or chosen.score is None:
        return ["This alpha has no score of its own: a score needs two neighbours in the grid."]
    rivals = [
        (c.score, c)
        for c in view.result.candidates
        if c.score is not None and c.round == chosen.round and c is not chosen
    ]
    lower = [c for score, c in rivals if score < (chosen.score or 0)]
    above = [c for score, c in rivals if score > (chosen.score or 0)]
    lines = [_score(view, chosen, len(rivals) + 1, len(lower))]
    lines += [
        f"Alpha {view.short(c.alpha)} scores {view.number(c.score)}, but {c.degenerate:,} of"
        f" {_count(view.result.prompts, 'answer')} there are degenerate."
        for c in lower
    ]
    if above:
        second = min(above, key=lambda c: c.score or 0.0)
        lines.append(
            f"Next best: alpha {view.short(second.alpha)} with {view.number(second.score)}."
        )
    return lines


def _score(view: _View, chosen: Candidate, count: int, lower: int) -> str:
    """Its score, rank, ties and interval, in one sentence."""
    where = f" in refinement {chosen.round}" if chosen.round else ""
    rank = f"the lowest of {count}{where}" if count > 1 else f"the only one{where}"
    if lower:
        rank = "the lowest but for the degenerate"
    others = [view.short(alpha) for alpha in view.result.ties if alpha != chosen.alpha]
    tied = f", tied with {' and '.join(others)}" if others else ""
    around = f" (95 % interval {view.interval(chosen)})" if chosen.interval else ""
    what = _MEANING[view.result.measure]
    return f"Score {view.number(chosen.score)}, {rank}{tied}{around}: {what}."


def _doubts(view: _View) -> list[str]:
    """How sure the choice is: resamples and noise."""
    result, lines = view.result, []
    if result.wins:
        lines.append(f"It wins {_share(result.wins.get(result.alpha, 0.0))} of the resamples.")
    if result.noise is not None:
        lines.append(
            f"Noise floor: {result.noise:,.0f} of {_count(result.prompts, 'answer')} differed"
            " between two runs at this alpha."
        )
    return lines


# The curve ----------------------------------------------------------------------------------------

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 44, 90
_PAD = 40  # between the axis and the first alpha: the end's "no score" stands there
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


def _curve(view: _View) -> list[str]:
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


def _legend(view: _View) -> str:
    keys = [
        f'<span class="key point"></span>score D: {_MEANING[view.result.measure]}',
        '<span class="key whisker"></span>95 % bootstrap interval',
        '<span class="key bar"></span>difference between two neighbours',
    ]
    if any(c.degenerate for c in view.result.candidates):
        keys.append(f'<span class="key cross">{CROSS}</span>degenerate: empty, repeating, constant')
    if view.rounds:
        keys.append("scores compare only where a line joins them: one round of refinement")
    return "".join(f"<span>{key}</span> " for key in keys)


def _scale(view: _View) -> _Scale:
    heights = [0.01 if view.distances else 1.0]
    for c in view.result.candidates:
        heights += [c.score or 0.0, c.diff_next or 0.0, *(c.interval or ())]
    peak = max(height for height in heights if math.isfinite(height))
    raw = peak / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    if not view.distances:
        step = max(step, 1.0)
    return _Scale(min(view.alphas), max(view.alphas), step * math.ceil(peak / step + 0.05), step)


def _chart(view: _View) -> list[str]:
    scale = _scale(view)
    unit = "summed distance" if view.distances else "answers"
    scored = [c for c in view.result.candidates if c.score is not None]
    links = _links(view)
    return [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="chart-title">',
        f'<title id="chart-title">Score over alpha, lowest is best; chosen: '
        f"{view.name(view.result.alpha)}. The table of candidates has all numbers.</title>",
        *_axes(view, scale, f"score D ({unit})"),
        *_bars(scale, links),
        *(line for c in view.result.candidates if c.score is None for line in _end(view, scale, c)),
        *_lines_between(scale, scored),
        *_differences(view, scale, links),
        *(line for c in scored for line in _point(view, scale, c)),
        "</svg>",
    ]


def _axes(view: _View, scale: _Scale, title: str) -> list[str]:
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
    places = _places(ticks)
    for alpha in ticks:
        chosen = ' class="chosen"' if alpha == view.result.alpha else ""
        drawn.append(
            f'<text{chosen} x="{scale.x(alpha):.1f}" y="{floor + 24}" text-anchor="middle">'
            f"{alpha:.{places}f}</text>"
        )
    return drawn


def _ticks(view: _View, scale: _Scale) -> list[float]:
    """The alphas whose names fit below the axis: the chosen one and the ends go first."""
    kept: list[float] = []
    for alpha in (view.result.alpha, view.alphas[0], view.alphas[-1], *view.alphas):
        if all(abs(scale.x(alpha) - scale.x(other)) >= _TICK_GAP for other in kept):
            kept.append(alpha)
    return sorted(kept)


_Links = Mapping[tuple[float, float], float]


def _links(view: _View) -> _Links:
    """The difference between each pair of alphas that was compared, wide pairs first."""
    found: dict[tuple[float, float], float] = {}
    around = [None, *view.alphas, None]
    for i, c in enumerate(view.result.candidates):
        before, after = c.neighbours if any(c.neighbours) else (around[i], around[i + 2])
        if before is not None and c.diff_previous is not None:
            found[before, c.alpha] = c.diff_previous
        if after is not None and c.diff_next is not None:
            found[c.alpha, after] = c.diff_next
    return dict(sorted(found.items(), key=lambda item: (item[0][0] - item[0][1], item[0])))


def _bars(scale: _Scale, links: _Links) -> list[str]:
    """Between two alphas, a bar as high as their difference; those of refinements in front."""
    drawn, floor = [], _HEIGHT - _BOTTOM
    for (low, high), difference in links.items():
        left, right, y = scale.x(low), scale.x(high), scale.y(difference)
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


def _differences(view: _View, scale: _Scale, links: _Links) -> list[str]:
    """The numbers at the feet of the bars, where there is room for them."""
    drawn, floor = [], _HEIGHT - _BOTTOM
    for (low, high), difference in links.items():
        left, right = scale.x(low), scale.x(high)
        if right - left < 30 or _inside(links, low, high, of_any=False):
            continue
        kind = "diff tight" if right - left < 60 else "diff"
        kind += " low" if floor - scale.y(difference) < 10 else ""
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


def _end(view: _View, scale: _Scale, c: Candidate) -> list[str]:
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


def _point(view: _View, scale: _Scale, c: Candidate) -> list[str]:
    """A score with its whisker, and a cross where answers are degenerate."""
    x, y = scale.x(c.alpha), scale.y(c.score or 0.0)
    kinds = ["point"]
    kinds += ["chosen"] if c.alpha == view.result.alpha else []
    kinds += ["tie"] if c.alpha in view.result.ties else []
    kinds += ["degenerate"] if view.collapsed(c) else []
    drawn = []
    if c.interval is not None:
        low, high = scale.y(c.interval[0]), scale.y(c.interval[1])
        drawn.append(
            f'<path class="whisker" d="M{x:.1f} {low:.1f}V{high:.1f}'
            f'M{x - 6:.1f} {low:.1f}h12M{x - 6:.1f} {high:.1f}h12"/>'
        )
    said = f"alpha {view.name(c.alpha)}: score {view.number(c.score)}"
    said += f", interval {view.interval(c)}" if c.interval else ""
    radius = 7.5 if c.alpha == view.result.alpha else 5.5
    drawn.append(
        f'<circle class="{" ".join(kinds)}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
        f"<title>{said}</title></circle>"
    )
    return [*drawn, *_below(view, scale, c)]


def _below(view: _View, scale: _Scale, c: Candidate) -> list[str]:
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


def _candidates(view: _View) -> list[str]:
    head = ["alpha"]
    head += ["round", "neighbours"] if view.rounds else []
    head += ["from previous", "to next", "score D", "95 % interval"]
    head += ["wins in resamples"] if view.result.wins else []
    rows = [_candidate(view, c) for c in view.result.candidates]
    return _rows([*head, "degenerate"], rows, label="Candidates")


def _candidate(view: _View, c: Candidate) -> str:
    chosen, wins = c.alpha == view.result.alpha, view.result.wins
    tags = ["chosen"] if chosen else []
    tags += ["tie"] if c.alpha in view.result.ties else []
    cells = []
    if view.rounds:
        sides = (DASH if side is None else view.name(side) for side in c.neighbours)
        cells += [str(c.round) if c.round else "grid", ", ".join(sides)]
    cells += [view.number(v) for v in (c.diff_previous, c.diff_next, c.score)]
    cells.append(view.interval(c))
    if wins:
        share = wins.get(c.alpha)
        meter = "" if share is None else f'<span class="meter" style="--share:{share:.3f}"></span>'
        cells.append(DASH if share is None else f"{_share(share)} {meter}")
    name = view.name(c.alpha) + "".join(f' <span class="tag">{tag}</span>' for tag in tags)
    return (
        f'<tr{_class(chosen, "chosen")}><th scope="row">{name}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + f"<td{_class(view.collapsed(c), 'warn')}>{c.degenerate:,}</td></tr>"
    )


# Answers ------------------------------------------------------------------------------------------


def _answers(view: _View, prompts: Sequence[Prompt]) -> list[str]:
    """Prompts whose answers change, most changeable first; then those that never change."""
    grid = [view.result.answers.get(alpha, ()) for alpha in view.alphas]
    count = min(map(len, grid), default=0)
    if not count:
        return []
    chosen = view.alphas.index(view.result.alpha) if view.result.alpha in view.alphas else None
    asked = [*prompts[:count], *(Prompt("") for _ in range(count - len(prompts)))]
    every = [(i, p, runs([row[i] for row in grid], chosen)) for i, p in enumerate(asked)]
    changing = sorted(
        (item for item in every if len(item[2]) > 1),
        key=lambda item: (-len(item[2]), -len({normalise(run.answer) for run in item[2]}), item[0]),
    )
    steady = [item for item in every if len(item[2]) == 1]
    return [
        '<section class="changes"><h2>Answers that change</h2>',
        *_changing(view, changing, chosen),
        *_steady(steady),
        "</section>",
    ]


_Item = tuple[int, Prompt, tuple[Run, ...]]


def _changing(view: _View, items: Sequence[_Item], chosen: int | None) -> list[str]:
    if not items:
        return ["<p>No answer changes over the grid.</p>"]
    shown, cache = items[:SHOWN_CHANGING], dict[Path, str]()
    left = len(items) - len(shown)
    said = (
        f"{_count(len(items), 'prompt')} of {view.result.prompts:,}, those that change most first."
    )
    if left:
        said += f" The {left:,} that change least are left out here."
    heads = "".join(
        f'<th scope="col"{_class(i == chosen, "chosen")}>{view.name(alpha)}</th>'
        for i, alpha in enumerate(view.alphas)
    )
    return [
        f'<div class="bar-above"><p class="muted">{said} Neighbouring alphas with the same answer'
        " share a cell; the chosen alpha's is marked.</p>",
        '<label id="filter" hidden>Filter <input type="search" autocomplete="off"></label></div>',
        '<table class="answers"><caption>Answers by prompt and alpha</caption>',
        f'<colgroup><col class="asked"><col span="{len(view.alphas)}"></colgroup>',
        f'<thead><tr><th scope="col">prompt</th>{heads}</tr></thead><tbody>',
        *(_change(view, item, chosen, cache) for item in shown),
        "</tbody></table>",
    ]


def _class(on: bool, name: str) -> str:
    return f' class="{name}"' if on else ""


def _change(view: _View, item: _Item, chosen: int | None, cache: dict[Path, str]) -> str:
    i, prompt, found = item
    cells = [
        f'<td colspan="{run.last - run.first + 1}"'
        f"{_class(chosen is not None and run.first <= chosen <= run.last, 'chosen')}>"
        f'<span class="range">{view.span(run)}</span>'
        f"{_text(run.answer, SHORT_ANSWER, _parting(run.answer, other.answer))}</td>"
        for run, other in zip(found, (found[1], *found), strict=False)
    ]
    images = "".join(
        _image(image, k, cache) for k, image in enumerate(prompt.images[:SHOWN_IMAGES])
    )
    if (more := len(prompt.images) - SHOWN_IMAGES) > 0:
        images += f'<span class="file">and {more} more</span>'
    return (
        f'<tr><th scope="row"><div class="asked"><div class="images">{images}</div>'
        f"<div>{_asked(i, prompt)}</div></div></th>{''.join(cells)}</tr>"
    )


def _parting(text: str, other: str) -> int:
    """Where an answer parts from its neighbour's."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))


def _asked(i: int, prompt: Prompt) -> str:
    """A prompt's text, and where it stands unless that is the text (recorded answers)."""
    text = _text(prompt.text, SHORT_PROMPT) if prompt.text else ""
    if prompt.id and prompt.id == prompt.text:
        return text
    return f'{text}<p class="muted">{marked(prompt.id[:SHORT_PROMPT]) or f"prompt {i + 1}"}</p>'


def _image(image: Path | bytes, position: int, cache: dict[Path, str]) -> str:
    """A thumbnail as a data URI, or the file's name where it cannot be shown."""
    name = image.name if isinstance(image, Path) else f"image {position + 1}"
    if not isinstance(image, Path):
        uri = _thumbnail(image)
    elif image in cache:
        uri = cache[image]
    else:
        uri = cache[image] = _thumbnail(image)
    if not uri:
        return f'<span class="file">{plain(name)}</span>'
    return f'<img src="{uri}" alt="{plain(name)}" title="{plain(name)}">'


def _thumbnail(image: Path | bytes) -> str:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            source = image if isinstance(image, Path) else io.BytesIO(image)
            with Image.open(source, formats=FORMATS) as opened:
                opened.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))
                small = ImageOps.exif_transpose(opened).convert("RGBA")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        paper = Image.new("RGB", small.size, "white")
        paper.paste(small, mask=small.getchannel("A"))
        out = io.BytesIO()
        paper.save(out, "JPEG", quality=80)
    except Exception:  # a broken file raises whatever its decoder stumbled on; the name will do
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _steady(items: Sequence[_Item]) -> list[str]:
    if not items:
        return ["<p>Every prompt's answer changes somewhere.</p>"]
    shown = items[:SHOWN_STEADY]
    left = len(items) - len(shown)
    verb = "keeps its answer" if len(items) == 1 else "keep their answer"
    return [
        f'<details class="steady"><summary>{_count(len(items), "prompt")} {verb}'
        ' at every alpha</summary><table class="steady"><caption>Answers that never change'
        '</caption><thead><tr><th scope="col">prompt</th><th scope="col">answer</th></tr></thead>'
        "<tbody>",
        *(
            f'<tr><th scope="row">{_asked(i, p)}</th>'
            f"<td>{_text(found[0].answer, SHORT_ANSWER)}</td></tr>"
            for i, p, found in shown
        ),
        "</tbody></table>",
        f'<p class="muted">{left:,} more are left out here.</p>' if left else "",
        "</details>",
    ]


# Timings and facts --------------------------------------------------------------------------------


def _seconds(value: float) -> str:
    if not math.isfinite(value):
        return DASH
    return f"{value:,.2f}" if value < 10 else f"{value:,.1f}"


def _timings(view: _View, timings: Sequence[Timing]) -> list[str]:
    if not timings:
        return []
    total = Timing(
        math.nan,
        sum(t.apply_seconds for t in timings),
        sum(t.seconds for t in timings),
        sum(t.answer_tokens for t in timings),
        sum(t.forward_tokens for t in timings),
        sum(t.plain_tokens for t in timings),
    )
    head = ["alpha", "apply (s)", "generate (s)", "answer tokens", "tokens per s"]
    head += ["forwarded", "without drafts", "ratio"]
    rows = [_timing(view.name(t.alpha), t, t.alpha == view.result.alpha) for t in timings]
    said = ""
    if total.plain_tokens:
        share = _share(total.forward_tokens, total.plain_tokens)
        said = f"With drafts, {share} of the tokens had to be forwarded."
    return [
        f'<section><h2>Timings</h2><p class="muted">{said}</p>',
        *_rows(head, [*rows, _timing("total", total, False)], label="Time and tokens by alpha"),
        "</section>",
    ]


def _timing(name: str, t: Timing, chosen: bool) -> str:
    rate = f"{t.answer_tokens / t.seconds:,.1f}" if t.seconds > 0 else DASH
    ratio = f"{t.forward_tokens / t.plain_tokens:.2f}" if t.plain_tokens else DASH
    cells = [
        _seconds(t.apply_seconds),
        _seconds(t.seconds),
        f"{t.answer_tokens:,}",
        rate,
        f"{t.forward_tokens:,}",
        f"{t.plain_tokens:,}",
        ratio,
    ]
    kind = _class(chosen, "chosen") or _class(math.isnan(t.alpha), "total")
    return f'<tr{kind}><th scope="row">{name}</th>{"".join(f"<td>{c}</td>" for c in cells)}</tr>'


def _facts(facts: Mapping[str, Mapping[str, str]]) -> list[str]:
    if not facts:
        return []
    drawn = ['<div class="facts">']
    for name, lines in facts.items():
        drawn.append(f"<section><h2>{plain(name)}</h2><dl>")
        drawn += [f"<dt>{plain(k)}</dt><dd>{marked(v)}</dd>" for k, v in lines.items()]
        drawn.append("</dl></section>")
    return [*drawn, "</div>"]
