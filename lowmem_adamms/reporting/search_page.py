"""The page of a search for alpha: one HTML file that needs no network and no second file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial

from ..prompts import Prompt
from ..searching.search import Result
from ..searching.session import Timing
from .answers import (
    FEW_IMAGES,
    LARGE_PIXELS,
    SMALL_PIXELS,
    collect_answers,
    make_thumbnail,
)
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
    donor_answers: Sequence[str] = (),
    command: str = "",
) -> str:
    """Render the report of a search. Every string in it may be hostile.

    prompts: in the order of the answers; may be fewer or none, as for recorded answers. timings:
    what each alpha cost, if known. facts: sections at the end of the page, by name: keys and
    values. title: base and donor, such as "Qwen2-VL ← LLaVA-OneVision". donor_answers: at alpha 1,
    in the order of the answers. command: what merges the pair at an alpha, which follows it.
    """
    view = SearchView(result)
    answers = collect_answers(result, prompts, donor_answers)
    changing = [item for item in answers if item.changes]
    steady = [item for item in answers if not item.changes]
    images = sum(len(item.images) for item in changing[:MAX_CHANGING])
    pixels = LARGE_PIXELS if images <= FEW_IMAGES else SMALL_PIXELS
    return render_page(
        "search.html",
        scripts=("tables.js", "search.js"),
        title=title.replace("<-", "\N{LEFTWARDS ARROW}"),
        view=view,
        result=result,
        meaning=SCORE_MEANINGS[result.measure],
        chart=Chart(view) if view.alphas else None,
        changing=changing,
        changing_shown=changing[:MAX_CHANGING],
        steady=steady,
        steady_shown=steady[:MAX_STEADY],
        is_stacked=len(view.alphas) + bool(donor_answers) > MAX_COLUMNS,
        has_donor=bool(donor_answers),
        command=command,
        thumbnail=cache(partial(make_thumbnail, pixels=pixels)),
        timings=list_timings(view, timings) if timings else [],
        drafts=describe_drafts(timings),
        facts=facts or {},
    )
