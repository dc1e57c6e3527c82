"""The page of a search for alpha: one HTML file that needs no network and no second file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

from ..prompts import Prompt
from ..searching.search import Result
from .answers import (
    FEW_IMAGES,
    LARGE_PIXELS,
    SMALL_PIXELS,
    PromptAnswers,
    collect_answers,
    make_thumbnail,
)
from .curve import Chart
from .page import render_page
from .view import SearchView

MAX_CHANGING = 200  # prompts in the table of changes; each may bring images
MAX_STEADY = 500  # prompts in the list of those that never change
MAX_COLUMNS = 9  # with more alphas than this, a prompt's answers go below each other


@dataclass(frozen=True, slots=True)
class Section:
    """One search: the only one, or that of one of several donors."""

    donor: int  # its number, from 1
    heading: str  # empty if it is the only one
    view: SearchView
    changing: Sequence[PromptAnswers]
    steady: Sequence[PromptAnswers]

    @property
    def chart(self) -> Chart | None:
        """The curve."""
        return Chart(self.view) if self.view.alphas else None

    @property
    def changing_shown(self) -> Sequence[PromptAnswers]:
        """The prompts that change most."""
        return self.changing[:MAX_CHANGING]

    @property
    def steady_shown(self) -> Sequence[PromptAnswers]:
        """The first prompts that keep their answer."""
        return self.steady[:MAX_STEADY]


def render_search_page(
    result: Result,
    prompts: Sequence[Prompt],
    *,
    earlier: Sequence[Result] = (),
    facts: Mapping[str, Mapping[str, str]] | None = None,
    title: str = "Search for alpha",
    donor_answers: Sequence[str] = (),
    command: str = "",
) -> str:
    """Render the report of a search. Every string in it may be hostile.

    prompts: in the order of the answers; may be fewer or none, as for recorded answers. earlier: of
    several donors the results of all but the last. facts: sections at the end of the page, by name:
    keys and values. title: base and donor, such as "Qwen2-VL ← LLaVA-OneVision". donor_answers: at
    alpha 1, in the order of the answers. command: what merges at an alpha, which follows it.
    """
    results = (*earlier, result)
    sections = [
        _make_section(results, donor, prompts, donor_answers) for donor in range(len(results))
    ]
    images = sum(len(item.images) for section in sections for item in section.changing_shown)
    pixels = LARGE_PIXELS if images <= FEW_IMAGES else SMALL_PIXELS
    columns = max(len(section.view.alphas) for section in sections) + bool(donor_answers)
    return render_page(
        "search.html",
        scripts=("tables.js", "search.js"),
        title=title.replace("<-", "\N{LEFTWARDS ARROW}"),
        sections=sections,
        is_stacked=columns > MAX_COLUMNS,
        has_donor=bool(donor_answers),
        command=command,
        thumbnail=cache(partial(make_thumbnail, pixels=pixels)),
        facts=facts or {},
    )


def _make_section(
    results: Sequence[Result],
    donor: int,
    prompts: Sequence[Prompt],
    donor_answers: Sequence[str],
) -> Section:
    view = SearchView(results[donor])
    answers = collect_answers(results[donor], prompts, donor_answers)
    return Section(
        donor + 1,
        _describe_donor(results, donor),
        view,
        [item for item in answers if item.changes],
        [item for item in answers if not item.changes],
    )


def _describe_donor(results: Sequence[Result], donor: int) -> str:
    """Which of several donors a search was about, and what the others were at meanwhile."""
    if len(results) == 1:
        return ""
    before = [f"donor {i} at alpha {each.alpha:g}" for i, each in enumerate(results[:donor], 1)]
    later = [f"donor {i} left out" for i in range(donor + 2, len(results) + 1)]
    return f"Donor {donor + 1}, with {', '.join([*before, *later])}"
