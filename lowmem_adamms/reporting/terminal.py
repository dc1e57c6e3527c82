"""Tables and sentences for the terminal, as rich renderables; `cli/` prints them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table

from ..mapping.alphas import format_alpha
from ..mapping.plan import SUMMARY_HEADINGS
from ..searching.measures import RULES
from ..values import format_count, format_duration

if TYPE_CHECKING:
    from ..architectures.arch import Arch
    from ..mapping.alphas import Alpha
    from ..mapping.plan import Plan
    from ..searching.search import Candidate, Result

LOG_SECONDS = 300.0
"""At most so long is a log of a search without a new line."""


def plan_table(plan: Plan) -> Table:
    """The plan with its layers collapsed: one row per kind, action and reason."""
    models = zip(list(plan.checkpoints)[1:], plan.pairs, strict=True)
    donors = [
        f"{pair.donor.name} ({pair.donor_layout.arch})"
        for side, pair in models
        if side != "ancestor"
    ]
    title = (
        f"{plan.base.name} ({plan.base_layout.arch}) <- {' + '.join(donors)},"
        f" {plan.base_layout.layers} layers"
    )
    table = Table(title_justify="left", title=title)
    for heading in SUMMARY_HEADINGS:
        table.add_column(heading, justify="right" if heading in ("tensors", "size") else "left")
    for row in plan.summary:
        table.add_row(*row)
    return table


def describe_leftover(plan: Plan) -> str:
    """What of the donor is not used, by kind: `390 vision tower, 4 connector`."""
    counts: dict[str, int] = {}
    for kind in plan.leftover.values():
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "nothing"


def archs_table(archs: Sequence[Arch]) -> Table:
    """One row for each declaration: its name, and what it is recognised by."""
    table = Table("family")
    for heading in ("classes in config.json", "or where tensors of its decoder lie"):
        table.add_column(heading, overflow="fold")
    for arch in archs:
        places = dict.fromkeys(f"{prefix}*" for prefix, _ in arch.spellings)
        table.add_row(arch.name, ", ".join(arch.classes) or "any", ", ".join(places))
    return table


# A search


def search_table(candidates: Sequence[Candidate], chosen: float | None = None) -> Table:
    """One row per alpha; differences and scores as far as they are known.

    A refined grid has a section for each round, with the alphas that each was compared with.
    """
    last_round = max((candidate.round for candidate in candidates), default=0)
    table = Table()
    columns = ("round", "alpha", "between") if last_round else ("alpha",)
    for heading in (*columns, "differs from previous", "from next", "D", "95 %", "degenerate"):
        longest_word = max(map(len, heading.split()))
        table.add_column(
            heading, justify="right", no_wrap=heading == "between", min_width=longest_word
        )
    table.add_column("")
    in_order = sorted(candidates, key=lambda candidate: (candidate.round, candidate.alpha))
    for number, group in groupby(in_order, key=lambda candidate: candidate.round):
        table.add_section()
        for candidate in group:
            is_chosen = candidate.alpha == chosen and number == last_round
            cells = _search_cells(candidate, with_round=last_round > 0)
            chosen_words = ("<- chosen", "bold green") if is_chosen else ("", None)
            table.add_row(*cells, chosen_words[0], style=chosen_words[1])
    return table


def _search_cells(candidate: Candidate, *, with_round: bool) -> Iterator[str]:
    if with_round:
        yield str(candidate.round) if candidate.round else "grid"
    yield f"{candidate.alpha:g}"
    if with_round:
        previous, following = candidate.neighbours
        has_both = previous is not None and following is not None
        yield f"{previous:g} and {following:g}" if has_both else ""
    yield _format_score(candidate.diff_previous)
    yield _format_score(candidate.diff_next)
    yield _format_score(candidate.score)
    interval = candidate.interval
    yield " to ".join(f"{round(end, 3):.4g}" for end in interval) if interval else ""
    yield str(candidate.degenerate or "")


def _format_score(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def describe_result(result: Result) -> str:
    """The chosen alpha in one line, and in another whether to merge at all."""
    chosen = next((c for c in result.candidates if c.alpha == result.alpha), None)
    score = ""
    if chosen and chosen.score is not None:
        unit = RULES[result.measure].unit
        score = f", D = {chosen.score:g}"
        if unit != "answers":
            score = f", D = {chosen.score:.4g} {unit}"
        score += f" in round {chosen.round}" if chosen.round else ""
    noise = ""
    if result.noise is not None:
        noise = f"; asked twice, {format_count(int(result.noise), 'answer')} differed"
    prompts = format_count(result.prompts, "prompt")
    found = f"alpha {result.alpha:g}{score} over {prompts} ({result.measure}){noise}"
    if result.verdict is None:
        return found
    advice = "merge" if result.verdict.merge else "do not merge"
    return f"{found}\n{advice}: {result.verdict.reason}"


class SearchProgress:
    """What is on the terminal while a search runs; a rich renderable that is always up to date."""

    def __init__(self, alphas: int, prompts: int) -> None:
        """Expect so many alphas (more are counted as they come) and prompts at each."""
        self._alphas, self._prompts = alphas, prompts
        self._candidates: Sequence[Candidate] = ()
        self._alpha: Alpha | None = None
        self._alphas_asked = 0
        self._answers_here = self._answers = self._answers_generated = self._tokens = 0
        self._start = time.perf_counter()

    def asked(self, alpha: Alpha) -> None:
        """Tell that the search has turned to an alpha."""
        self._alpha, self._answers_here = alpha, 0
        self._alphas_asked += 1
        self._alphas = max(self._alphas, self._alphas_asked)

    def answered(self, alpha: Alpha, tokens: int) -> None:
        """Tell of an answer of so many tokens; 0: it was known from an earlier run."""
        self._answers_here += 1
        self._answers += 1
        self._answers_generated += tokens > 0
        self._tokens += tokens

    def candidates(self, alpha: float, candidates: Sequence[Candidate]) -> None:
        """Tell that an alpha is done, and what is known by now."""
        self._candidates = candidates

    def describe(self) -> str:
        """What is being done, how fast, and about how long all of it still takes."""
        seconds = time.perf_counter() - self._start
        doing = "loading the model" if self._alpha is None else f"alpha {format_alpha(self._alpha)}"
        words = [f"{doing}: {self._answers_here}/{self._prompts} prompts"]
        if seconds > 1:
            words.append(f"{self._tokens / seconds:.1f} tokens/s")
        if self._answers_generated:
            answers_left = self._alphas * self._prompts - self._answers
            left = format_duration(seconds / self._answers_generated * answers_left)
            words.append(f"about {left} left")
        return ", ".join(words)

    def __rich__(self) -> Any:
        return Group(search_table(self._candidates), self.describe())


class SearchLog(SearchProgress):
    """The same for a log: a line at the end of each alpha, and every LOG_SECONDS in between."""

    def __init__(self, alphas: int, prompts: int, write: Callable[[str], object]) -> None:
        super().__init__(alphas, prompts)
        self._write = write
        self._written = time.perf_counter()

    def answered(self, alpha: Alpha, tokens: int) -> None:
        """Count an answer, and write a line if none was written for long."""
        super().answered(alpha, tokens)
        if time.perf_counter() - self._written > LOG_SECONDS:
            self._write_line()

    def candidates(self, alpha: float, candidates: Sequence[Candidate]) -> None:
        """Write a line: an alpha is done."""
        super().candidates(alpha, candidates)
        self._write_line()

    def _write_line(self) -> None:
        self._write(self.describe())
        self._written = time.perf_counter()


# The demo


def marks_table(models: Mapping[str, Mapping[str, float]]) -> Table:
    """Per cent right of each task: one row per task, the mean last, one column per model."""
    table = Table("task")
    for name in models:
        table.add_column(name, justify="right")
    for task in next(iter(models.values())):
        if task == "mean":
            table.add_section()
        table.add_row(task, *(f"{marks[task]:.1f}" for marks in models.values()))
    return table


def accuracy_table(points: Mapping[float, tuple[float | None, float]]) -> Table:
    """D and mean accuracy in per cent by alpha, the latter as bars too."""
    table = Table("alpha", "D", "mean", "")
    for alpha, (score, mean) in points.items():
        bar = "\N{FULL BLOCK}" * round(mean / 4)
        table.add_row(f"{alpha:g}", _format_score(score), f"{mean:.1f}", bar)
    return table
