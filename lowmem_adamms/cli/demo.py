"""The command `demo`: the whole method on the embedded pair, and how well the result answers."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RecipeError
from . import merge
from .console import screen
from .options import parser
from .plan import show_plan

if TYPE_CHECKING:
    from ..demo import Pair


def run(arguments: argparse.Namespace) -> int:
    """The embedded pair: write it out, or run the whole method on it and judge the result."""
    from .. import demo

    if arguments.export:
        if arguments.out or arguments.alpha is not None:
            raise RecipeError("demo --export only writes the pair and its questions; give no more")
        pair = demo.export(arguments.export)
        for path in (pair.base, pair.donor, pair.prompts, pair.exam):
            print(path)
        return 0
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="lowmem-adamms-"))
    pair = demo.export(folder)
    _show(pair, _merged(folder, pair, arguments.alpha))
    return 0


def _merged(folder: Path, pair: Pair, alpha: float | None) -> Path:
    """What the command `merge` makes of the pair, the plan shown first."""
    from .. import demo, make_plan

    show_plan(make_plan(pair.base, pair.donor), screen())
    out = folder / "merged"
    how = ["--prompts", str(pair.prompts), "--max-new-tokens", str(demo.LONGEST)]
    if alpha is not None:
        how = ["--alpha", str(alpha)]
    words = ["merge", str(pair.base), str(pair.donor), "-o", str(out), *how]
    merge.run(parser().parse_args(words))
    return out


def _show(pair: Pair, out: Path) -> None:
    """How many of the exam's questions base, donor and merged model answer right."""
    from .. import demo
    from ..reporting import terminal as show

    exam = demo.load_exam(pair.exam)
    scores = _scores(out)
    curve = demo.judge(pair.base, pair.donor, list(scores) or [0.0], exam)
    (donor,) = demo.judge(pair.donor, pair.donor, [0.0], exam)
    (merged,) = demo.judge(out, out, [0.0], exam)
    console = screen()
    console.print(show.marks_table({"base": curve[0], "donor": donor, "merged": merged}))
    if scores:
        rows = zip(scores.items(), curve, strict=True)
        console.print(show.curve({a: (d, marks["mean"]) for (a, d), marks in rows}))
    print(f"right answers in per cent, {len(exam)} questions that the search has not seen")
    print(f"merged model: {out}")
    if scores:
        print(f"report: {out / 'report.html'}")


def _scores(out: Path) -> dict[float, float | None]:
    """The D of each alpha of the search that a merged checkpoint records, if it had one."""
    found = json.loads((out / "adamms.json").read_text(encoding="utf-8"))
    return {row["alpha"]: row["score"] for row in found.get("candidates", ())}
