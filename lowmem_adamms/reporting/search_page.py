"""The page of a search for alpha: one HTML file that needs no network and no second file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from ..prompts import Prompt
from ..searching.search import Result
from ..searching.session import Timing
from .answers import collect_answers, make_thumbnail
from .curve import Chart
from .page import render_page
from .view import SCORE_MEANINGS, SearchView, describe_drafts, list_timings

MAX_CHANGING = 200  # prompts in the table of changes; each may bring images
MAX_STEADY = 500  # prompts in the list of those that never change
MAX_COLUMNS = 9  # with more alphas than this, a prompt's answers go below each other


def render_search_page(
    result: Result,
    prompts: Sequence[Prompt],
    *,
    timings: Sequence[Timing] = (),
    facts: Mapping[str, Mapping[str, str]] | None = None,
    title: str = "Search for alpha",
) -> str:
    """Render the report of a search. Every string in it may be hostile.

    prompts: in the order of the answers; may be fewer or none, as for recorded answers. timings:
    what each alpha cost, if known. facts: sections at the end of the page, by name: keys and
    values. title: base and donor, such as "Qwen2-VL ← LLaVA-OneVision".
    """
    view = SearchView(result)
    answers = collect_answers(
        [result.answers.get(alpha, ()) for alpha in view.alphas], prompts, view.chosen_position
    )
    changing = [item for item in answers if item.changes]
    steady = [item for item in answers if not item.changes]
    return render_page(
        "search.html",
        script="search.js",
        title=title.replace("<-", "\N{LEFTWARDS ARROW}"),
        view=view,
        result=result,
        meaning=SCORE_MEANINGS[result.measure],
        chart=Chart(view) if view.alphas else None,
        changing=changing,
        changing_shown=changing[:MAX_CHANGING],
        steady=steady,
        steady_shown=steady[:MAX_STEADY],
        is_stacked=len(view.alphas) > MAX_COLUMNS,
        thumbnail=cache(make_thumbnail),
        timings=list_timings(view, timings) if timings else [],
        drafts=describe_drafts(timings),
        facts=facts or {},
    )
