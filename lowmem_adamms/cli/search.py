"""The command `search`: find alpha on a live model, or in answers that somebody recorded."""

from __future__ import annotations

import argparse

from ..errors import RecipeError
from ..version import __version__
from .arguments import check_page, make_plan
from .console import print_json, print_notes
from .options import NEED_A_MODEL, given
from .searching import Found, load_prompts, search_for_alpha, show_found


def run(arguments: argparse.Namespace) -> int:
    """Search, write the report if one is asked for, and print the curve or one document."""
    inputs = (arguments.prompts, arguments.journal, *(file for _, file in arguments.answers or ()))
    check_page(arguments.report, "--report", *inputs)
    if arguments.answers:
        return _recorded(arguments)
    if not (arguments.donor and arguments.prompts):
        raise RecipeError("search needs BASE, DONOR and --prompts, or --answers")
    prompts = load_prompts(arguments)
    plan = make_plan(arguments)
    print_notes(plan.notes)
    found = search_for_alpha(arguments, plan, prompts, arguments.journal)
    return _conclude(arguments, found, plan.base.ref, plan.donor.ref)


def _recorded(arguments: argparse.Namespace) -> int:
    """Score answers that somebody recorded at each alpha."""
    from ..prompts import Prompt
    from ..reporting import search_page as report
    from ..searching import recorded_answers as recorded
    from ..searching.search import choose

    _check_recorded(arguments)
    answers, ids = recorded.read(arguments.answers)
    result = choose(answers, measure=arguments.measure, seed=arguments.seed)
    page = ""
    if arguments.report:
        prompts = [Prompt(name, id=name) for name in ids]
        page = report.html(result, prompts, title="Recorded answers")
    return _conclude(arguments, Found(result, None, page))


def _check_recorded(arguments: argparse.Namespace) -> None:
    if names := given(arguments, NEED_A_MODEL):
        raise RecipeError(
            f"--answers scores what is recorded and asks no model; leave out {', '.join(names)}"
        )


def _conclude(
    arguments: argparse.Namespace, found: Found, base: str | None = None, donor: str | None = None
) -> int:
    if arguments.report:
        from ..reporting import search_page as report

        report.write(arguments.report, found.page)
    if arguments.json:
        print_json(found.to_json() | {"base": base, "donor": donor, "version": __version__})
    else:
        show_found(found)
    return 0
