"""The command `demo`: the whole method on the embedded pair, and how well the result answers."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..demo.exam import LONGEST, judge, load_exam
from ..demo.pair import Pair, export_demo
from ..errors import RecipeError
from ..settings import setting
from ..values import parse_alpha
from . import merge
from .console import print_line, screen
from .options import Command
from .pair import out_option, parse_path
from .plan import show_plan


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What `demo` takes."""

    out: Path | None = out_option(
        "keep pair, questions and result here; default: a new folder for temporary files"
    )
    alpha: float | None = setting(
        None, "merge at this alpha; default: search for it", metavar="ALPHA", parse=parse_alpha
    )
    export: Path | None = setting(
        None,
        "only write pair and questions there, for the other commands",
        metavar="DIR",
        parse=parse_path,
    )


def run(options: DemoOptions) -> int:
    """Write the embedded pair out, or run the whole method on it and judge the result."""
    from ..mapping.join import make_plan

    if options.export:
        if options.out or options.alpha is not None:
            raise RecipeError("demo --export only writes the pair and its questions; give no more")
        pair = export_demo(options.export)
        for path in (pair.base, pair.donor, pair.prompts, pair.exam):
            print_line(str(path))
        return 0
    folder = options.out or Path(tempfile.mkdtemp(prefix="lowmem-adamms-"))
    pair = export_demo(folder)
    out = folder / "merged"
    show_plan(make_plan(pair.base, pair.donor), screen())
    how: dict[str, Any] = {"alpha": options.alpha}
    if options.alpha is None:
        how = {"prompts": str(pair.prompts), "max_new_tokens": LONGEST}
    merge.run(merge.MergeOptions(base=str(pair.base), donor=str(pair.donor), out=out, **how))
    _show(pair, out)
    return 0


def _show(pair: Pair, out: Path) -> None:
    """How many of the exam's questions base, donor and merged model answer right."""
    from ..reporting import terminal

    exam = load_exam(pair.exam)
    scores = _scores(out)
    curve = judge(pair.base, pair.donor, list(scores) or [0.0], exam)
    (donor,) = judge(pair.donor, pair.donor, [0.0], exam)
    (merged,) = judge(out, out, [0.0], exam)
    console = screen()
    console.print(terminal.marks_table({"base": curve[0], "donor": donor, "merged": merged}))
    if scores:
        rows = zip(scores.items(), curve, strict=True)
        console.print(terminal.accuracy_table({a: (d, marks["mean"]) for (a, d), marks in rows}))
    print_line(f"right answers in per cent, {len(exam)} questions that the search has not seen")
    print_line(f"merged model: {out}")
    if scores:
        print_line(f"report: {out / 'report.html'}")


def _scores(out: Path) -> dict[float, float | None]:
    """The D of each alpha of the search that a merged checkpoint records, if it had one."""
    found = json.loads((out / "adamms.json").read_text(encoding="utf-8"))
    return {row["alpha"]: row["score"] for row in found.get("candidates", ())}


COMMAND = Command(
    takes=DemoOptions,
    run=run,
    help="the whole method on the embedded pair, offline",
    description="Maps, searches and merges a pair of tiny models that comes with the package,"
    " and tells\nhow many questions base, donor and result answer right. Takes about a minute.",
)
