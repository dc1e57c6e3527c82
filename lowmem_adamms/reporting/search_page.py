"""The search report: one HTML page that needs neither a network nor a second file.

Here is the page as a whole, its head and its tail: the choice, timings and facts. Leaves to others:
the curve (`report_curve.py`), the answers (`report_answers.py`), escaping (`markup.py`), choosing
alpha (`search.py`), the terminal (`cli/`), `adamms.json` (`card.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..mapping.alphas import Alphas
from ..prompts import Prompt
from ..searching.search import Candidate, Result
from ..searching.session import Timing
from . import page as report_page
from .answers_table import answers
from .curve import curve
from .markup import DASH, as_percent, cell, counted, marked, plain, row, table
from .page import write
from .view import MEANING, View, view_of

__all__ = ["html", "write"]

SIDE_BY_SIDE = 9  # more alphas than this do not fit as columns: answers go below each other


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
    view = view_of(result)
    body = [
        *_header(view, title),
        *_choice(view),
        *curve(view),
        *answers(view, prompts),
        *_timings(view, timings),
        *_facts(facts or {}),
    ]
    stacked = "all" if len(view.alphas) > SIDE_BY_SIDE else "(max-width: 60rem)"
    return report_page.page(
        title,
        body,
        style=f"@media {stacked} {{{report_page.STACKED}}}\n",
        script=report_page.SCRIPT,
    )


# Header and choice --------------------------------------------------------------------------------


def _header(view: View, title: str) -> list[str]:
    result = view.result
    about = (
        f"{counted(result.prompts, 'prompt')}, {counted(len(view.alphas), 'alpha')}"
        f", measure {plain(result.measure)}"
    )
    shown = plain(title.replace("<-", "\N{LEFTWARDS ARROW}"))
    return [f'<header><p class="muted">Search for alpha: {about}</p><h1>{shown}</h1></header>']


def _choice(view: View) -> list[str]:
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


def _why(view: View) -> list[str]:
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
        f" {counted(view.result.prompts, 'answer')} there are degenerate."
        for c in lower
    ]
    if above:
        second = min(above, key=lambda c: c.score or 0.0)
        lines.append(
            f"Next best: alpha {view.short(second.alpha)} with {view.number(second.score)}."
        )
    return lines


def _score(view: View, chosen: Candidate, count: int, lower: int) -> str:
    """Its score, rank, ties and interval, in one sentence."""
    where = f" in refinement {chosen.round}" if chosen.round else ""
    rank = f"the lowest of {count}{where}" if count > 1 else f"the only one{where}"
    if lower:
        rank = "the lowest but for the degenerate"
    others = [view.short(alpha) for alpha in view.result.ties if alpha != chosen.alpha]
    tied = f", tied with {' and '.join(others)}" if others else ""
    around = f" (95 % interval {view.interval(chosen)})" if chosen.interval else ""
    what = MEANING[view.result.measure]
    return f"Score {view.number(chosen.score)}, {rank}{tied}{around}: {what}."


def _doubts(view: View) -> list[str]:
    """How sure the choice is: resamples and noise."""
    result, lines = view.result, []
    if result.wins:
        lines.append(f"It wins {as_percent(result.wins.get(result.alpha, 0.0))} of the resamples.")
    if result.noise is not None:
        lines.append(
            f"Noise floor: {result.noise:,.0f} of {counted(result.prompts, 'answer')} differed"
            " between two runs at this alpha."
        )
    return lines


# Timings and facts --------------------------------------------------------------------------------


def _seconds(value: float) -> str:
    if not math.isfinite(value):
        return DASH
    return f"{value:,.2f}" if value < 10 else f"{value:,.1f}"


def _timings(view: View, timings: Sequence[Timing]) -> list[str]:
    if not timings:
        return []
    total = _sum(timings)
    head = ["alpha", "apply (s)", "generate (s)", "answer tokens", "tokens per s"]
    head += ["forwarded", "without drafts", "ratio"]
    rows = []
    for timing in timings:
        if not isinstance(timing.alpha, Alphas):
            kind = "chosen" if timing.alpha == view.result.alpha else ""
            rows.append(_timing(view.name(timing.alpha), timing, kind))
    by_layer = [timing for timing in timings if isinstance(timing.alpha, Alphas)]
    if by_layer:
        rows.append(_timing(f"by layer, {counted(len(by_layer), 'time')}", _sum(by_layer)))
    rows.append(_timing("total", total, "total"))
    said = ""
    if total.plain_tokens:
        share = as_percent(total.forward_tokens, total.plain_tokens)
        said = f"With drafts, {share} of the tokens had to be forwarded."
    return [
        f'<section><h2>Timings</h2><p class="muted">{said}</p>',
        *table(head, rows, label="Time and tokens by alpha"),
        "</section>",
    ]


def _sum(timings: Sequence[Timing]) -> Timing:
    """What several cost together."""
    return Timing(
        math.nan,
        sum(t.apply_seconds for t in timings),
        sum(t.seconds for t in timings),
        sum(t.answer_tokens for t in timings),
        sum(t.forward_tokens for t in timings),
        sum(t.plain_tokens for t in timings),
    )


def _timing(name: str, t: Timing, kind: str = "") -> str:
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
    return row(name, map(cell, cells), kind)


def _facts(facts: Mapping[str, Mapping[str, str]]) -> list[str]:
    if not facts:
        return []
    drawn = ['<div class="facts">']
    for name, lines in facts.items():
        drawn.append(f"<section><h2>{plain(name)}</h2><dl>")
        drawn += [f"<dt>{plain(k)}</dt><dd>{marked(v)}</dd>" for k, v in lines.items()]
        drawn.append("</dl></section>")
    return [*drawn, "</div>"]
