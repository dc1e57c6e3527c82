"""The command `search`: find alpha on a live model, or in answers that were recorded before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import api
from ..errors import RecipeError
from ..live.placement import Placement
from ..live.search_time import describe_time
from ..prompts import load_prompts
from ..searching.measures import RULES
from ..settings import (
    PlanSettings,
    Quantization,
    QuantizeSettings,
    SearchSettings,
    changed,
    setting,
)
from ..version import __version__
from .console import (
    live_table,
    print_info,
    print_json,
    print_line,
    print_note,
    print_notes,
    screen,
    shows_progress,
)
from .options import Command, spelled
from .pair import (
    OptionalPairOptions,
    check_page,
    json_option,
    make_plan,
    parse_path,
    prompts_option,
)

if TYPE_CHECKING:
    from ..mapping.plan import Plan
    from ..prompts import Prompts


@dataclass(frozen=True, kw_only=True)
class SearchOptions(OptionalPairOptions, PlanSettings, QuantizeSettings, SearchSettings):
    """What `search` takes."""

    prompts: str | None = prompts_option()
    answers: tuple[Path, ...] | None = setting(
        None,
        "instead of BASE, DONOR and --prompts: choose by answers that were recorded before, in the"
        " answers.jsonl of a search (a line for each: alpha, index of the prompt, answer)",
        metavar="FILE",
        parse=parse_path,
        nargs="+",
    )
    json: bool = json_option()
    report: Path | None = setting(
        None, "write the report, an HTML page, to this file", metavar="FILE", parse=parse_path
    )
    journal: Path | None = setting(
        None,
        "keep the answers in this file, from which the same command then resumes",
        metavar="FILE",
        parse=parse_path,
    )


def run(options: SearchOptions) -> int:
    """Search, write the report if one is asked for, and print the curve or one document."""
    answers = options.answers or ()
    check_page(options.report, "--report", options.prompts, options.journal, *answers)
    refs: dict[str, str | None] = {"base": None, "donor": None}
    if answers:
        _check_recorded(options)
        found = api.choose_alpha(
            answers,
            measure=options.measure,
            seed=options.seed,
            reasoning_tags=options.reasoning_tags,
        )
    else:
        if not (options.base and options.donor and options.prompts):
            raise RecipeError("search needs BASE, DONOR and --prompts, or --answers")
        prompts = load_prompts(options.prompts, options)
        plan = make_plan(options.base, (options.donor, *options.more), options)
        refs = {side: checkpoint.ref for side, checkpoint in plan.checkpoints.items()}
        print_notes(plan.notes)
        found = find_alpha(plan, prompts, options, options.journal, quantize=options.quantize)
    if options.json:
        print_json(found.to_json() | refs | {"version": __version__})
    else:
        show_found(found)
    if options.report:  # last, so that what was found is not lost if this fails
        found.write_page(options.report)
    return 0


def _check_recorded(options: SearchOptions) -> None:
    """RecipeError where something is given that only a search on a model has a use for."""
    used = ("answers", "json", "report", "measure", "seed", "reasoning_tags")
    if unused := [item for item in changed(options, SearchOptions) if item.name not in used]:
        raise RecipeError(
            f"--answers scores what is recorded and asks no model; leave out {spelled(unused)}"
        )


def find_alpha(
    plan: Plan,
    prompts: Prompts,
    settings: SearchSettings,
    journal: Path | None,
    *,
    quantize: Quantization | None,
) -> api.FoundAlpha:
    """A search with its placement and progress on stderr."""
    from ..merging.sources import download
    from ..reporting import terminal

    api.check_search(plan, settings)
    api.check_images(plan, prompts)
    placement = api.place_search(plan, settings, quantize=quantize)
    for line in placement.lines:
        print_info(line)
    download(plan, show_bars=shows_progress())
    counts = _count_passes(plan, settings), len(prompts)
    if isinstance(placement, Placement):
        for line in describe_time(plan, placement, *counts, settings.max_new_tokens):
            print_info(line)
    if shows_progress():
        progress = terminal.SearchProgress(*counts)
    else:
        progress = terminal.SearchLog(*counts, print_info)
    with live_table(progress):
        return api.find_alpha(
            plan,
            prompts,
            settings,
            journal=journal,
            placement=placement,
            progress=progress,
            note=print_note,
        )


def _count_passes(plan: Plan, settings: SearchSettings) -> int:
    """How often the questions are asked; with a word of explanation for several donors."""
    from ..searching.in_turn import count_passes

    if plan.coefficients == 1:
        return len(settings.alphas) + settings.donor_answers
    passes = count_passes(plan.coefficients, settings.alphas, settings.refine)
    print_info(
        f"{plan.coefficients} donors are searched one after the other, each at the alphas chosen"
        f" before it: up to {passes} passes over the questions"
    )
    return passes


def show_found(found: api.FoundAlpha) -> None:
    """The curve, the verdict, and what weakens it."""
    from ..reporting import terminal

    result = found.result
    for donor, each in enumerate(found.earlier, 1):
        print_line(f"donor {donor}:")
        screen().print(terminal.search_table(each.rounds, each.alpha))
        print_line(terminal.describe_result(each))
    screen().print(terminal.search_table(result.rounds, result.alpha))
    print_line(str(found))
    if result.earlier and RULES[result.measure].compares:
        print_note("D compares within a round: closer neighbours differ less")
    print_notes(result.notes)


COMMAND = Command(
    takes=SearchOptions,
    run=run,
    help="find alpha by the answers, without labels",
    usage="%(prog)s BASE DONOR --prompts SET [options]\n"
    "       %(prog)s --answers FILE ... [options]",
    description="Answers unlabelled questions at each alpha of a grid, with one loaded model,"
    " and takes\nthe alpha with the lowest D, by default the one beside which the fewest answers"
    " change, in\nper cent of those that are no longer the base's. Writes no checkpoint: merge does"
    " the same\nand then merges.",
    examples="""\
examples:
  %(prog)s BASE DONOR --prompts questions.jsonl --report report.html
  %(prog)s BASE DONOR --prompts photos/ --question "What is this?" --samples 50
  %(prog)s --answers OUT/answers.jsonl --measure joint""",
)
