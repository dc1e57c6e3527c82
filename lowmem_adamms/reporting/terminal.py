"""Tables for the terminal, as rich renderables: a plan, a search. `cli/` prints them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from ..architectures.layout import Arch
    from ..mapping.alphas import Alpha
    from ..mapping.plan import Plan, Step
    from ..searching.search import Candidate, Result


def size(count: int) -> str:
    """A number of bytes for people, in decimal units."""
    value: float = count
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def plan_table(plan: Plan) -> Table:
    """The plan with its layers collapsed: one row per kind, action and reason."""
    rows: dict[tuple[str, str, str], list[Step]] = {}
    for step in plan.steps:
        rows.setdefault((step.kind, step.action, step.reason), []).append(step)
    table = Table(title_justify="left", title=escape(_title(plan)))
    for heading in ("base's", "tensors", "size", "action", "why"):
        table.add_column(heading, justify="right" if heading in ("tensors", "size") else "left")
    for (kind, action, reason), steps in rows.items():
        total = size(sum(step.nbytes for step in steps))
        table.add_row(kind, str(len(steps)), total, action, escape(reason))
    return table


def leftover(plan: Plan) -> str:
    """What of the donor nothing takes, by kind."""
    unused: dict[str, int] = {}
    for kind in plan.leftover.values():
        unused[kind] = unused.get(kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in unused.items()) or "nothing"


def _title(plan: Plan) -> str:
    return (
        f"{plan.base.name} ({plan.base_layout.arch}) <- {plan.donor.name}"
        f" ({plan.donor_layout.arch}), {plan.base_layout.layers} layers"
    )


def archs(known: Sequence[Arch]) -> str:
    """A few lines for each declaration, whole: a table would cut the names short."""
    lines = []
    for arch in known:
        ids = f"  first {arch.shared_ids} token ids shared" if arch.shared_ids else ""
        spelled = (f"{prefix}* {head}".strip() for prefix, head in arch.spellings)
        lines += [
            f"{arch.name}{ids}",
            f"  class   {', '.join(arch.classes) or 'none: by its tensor names'}",
            f"  names   {' | '.join(spelled)}",
            f"  source  {arch.source}",
        ]
    return "\n".join(lines)


def search_table(candidates: Sequence[Candidate], chosen: float | None = None) -> Table:
    """One row per alpha; differences and scores as far as they are known.

    Of a refined grid one section per round, with the alphas that each was compared with.
    """
    last = max((candidate.round for candidate in candidates), default=0)
    table = Table()
    of_round = ("round", "alpha", "between") if last else ("alpha",)
    for heading in (*of_round, "differs from previous", "from next", "D", "95 %", "degenerate"):
        table.add_column(heading, justify="right", no_wrap=heading == "between")
    table.add_column("")
    for number, group in groupby(sorted(candidates, key=_in_rounds), key=lambda c: c.round):
        table.add_section()
        for candidate in group:
            won = candidate.alpha == chosen and number == last
            table.add_row(*_row(candidate, rounds=last > 0), "<- chosen" if won else "")
    return table


def _in_rounds(candidate: Candidate) -> tuple[int, float]:
    return candidate.round, candidate.alpha


def _row(c: Candidate, *, rounds: bool) -> Iterator[str]:
    """The cells of a candidate."""
    if rounds:
        yield str(c.round) if c.round else "grid"
    yield f"{c.alpha:g}"
    if rounds:
        previous, following = c.neighbours
        both = previous is not None and following is not None
        yield f"{previous:g} and {following:g}" if both else ""
    yield from map(_number, (c.diff_previous, c.diff_next, c.score))
    yield f"{c.interval[0]:.4g} to {c.interval[1]:.4g}" if c.interval else ""
    yield str(c.degenerate or "")


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


def curve(points: Mapping[float, tuple[float | None, float]]) -> Table:
    """D and mean accuracy in per cent over alpha, the latter as bars too."""
    table = Table("alpha", "D", "mean", "")
    for alpha, (score, mean) in points.items():
        table.add_row(
            f"{alpha:g}", _number(score), f"{mean:.1f}", "\N{FULL BLOCK}" * round(mean / 2)
        )
    return table


def verdict(result: Result) -> str:
    """The chosen alpha in one sentence."""
    found = next((c for c in result.candidates if c.alpha == result.alpha), None)
    digits, unit = (".4g", " %") if result.measure == "relative" else ("g", "")
    score = f", D = {found.score:{digits}}{unit}" if found and found.score is not None else ""
    if score and found and found.round:
        score += f" in round {found.round}"
    noise = "" if result.noise is None else f"; noise floor {result.noise:g}"
    return f"alpha {result.alpha:g}{score} over {result.prompts} prompts ({result.measure}){noise}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


class SearchProgress:
    """What is on the terminal while a search runs; a rich renderable that is always up to date."""

    def __init__(self, alphas: int, prompts: int) -> None:
        self._alphas, self._prompts = alphas, prompts
        self._candidates: Sequence[Candidate] = ()
        self._alpha: Alpha | None = None
        self._asked = self._answered = self._here = self._made = self._tokens = 0
        self._start = time.perf_counter()

    def asked(self, alpha: Alpha) -> None:
        """The search has turned to an alpha."""
        self._alpha, self._here = alpha, 0
        self._asked += 1
        self._alphas = max(self._alphas, self._asked)

    def answered(self, alpha: Alpha, tokens: int) -> None:
        """One more answer is there, of so many tokens; 0: it was known from an earlier run."""
        self._here += 1
        self._answered += 1
        self._made += tokens > 0
        self._tokens += tokens

    def candidates(self, alpha: float, candidates: Sequence[Candidate]) -> None:
        """An alpha is done."""
        self._candidates = candidates

    def __rich__(self) -> Any:
        elapsed = time.perf_counter() - self._start
        left = self._alphas * self._prompts - self._answered
        rate = f"{self._tokens / elapsed:.1f} tokens/s" if elapsed > 1 else ""
        time_left = f"{elapsed / self._made * left:.0f} s left" if self._made else ""
        where = "loading the model" if self._alpha is None else f"alpha {self._alpha}"
        line = f"{where}: {self._here}/{self._prompts} prompts  {rate}  {time_left}"
        return Group(search_table(self._candidates), line)
