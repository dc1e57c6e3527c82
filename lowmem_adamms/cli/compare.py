"""The command `compare`: how far apart two checkpoints are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING

from ..settings import setting
from ..values import parse_count
from .console import print_json, screen
from .options import Command
from .pair import arch_option, check_page, json_option, parse_path

if TYPE_CHECKING:
    from ..comparing.comparison import Comparison


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What `compare` takes."""

    a: str = setting(
        None,
        "folder, file or org/name[@revision] of a checkpoint",
        metavar="A",
        parse=expanduser,
        positional=True,
    )
    b: str = setting(
        None,
        "another; distances are relative to A",
        metavar="B",
        parse=expanduser,
        positional=True,
    )
    json: bool = json_option()
    html: Path | None = setting(
        None, "write it as an HTML page too", metavar="FILE", parse=parse_path
    )
    sample: int = setting(
        4096,
        "read this many elements of each tensor; default: 4096",
        metavar="N",
        parse=parse_count,
    )
    arch: tuple[str, ...] = arch_option(
        "a TOML file that declares a family of models, as `archs NAME` prints them; may be repeated"
    )


def run(options: CompareOptions) -> int:
    """Compare, write the page if one is asked for, and print tables or one document."""
    from ..architectures.declare import read_declarations
    from ..comparing.comparison import compare
    from ..comparing.pairing import pair_checkpoints
    from ..mapping.join import make_plan

    check_page(options.html, "--html", options.a, options.b, *options.arch)
    make = partial(make_plan, declared=read_declarations(options.arch))
    comparison = compare(pair_checkpoints(options.a, options.b, make=make), sample=options.sample)
    if options.html:
        from ..comparing.page import render_comparison_page
        from ..reporting.page import write_page

        write_page(options.html, render_comparison_page(comparison))
    if options.json:
        print_json(comparison.to_json())
    else:
        _show(comparison)
    return 0


def _show(comparison: Comparison) -> None:
    from ..comparing.table import draw_comparison

    console = screen()
    for item in draw_comparison(comparison):
        console.print(item, soft_wrap=isinstance(item, str))


COMMAND = Command(
    takes=CompareOptions,
    run=run,
    help="how far apart two checkpoints are, and whether of one ancestor",
    description="Compares the weights of two checkpoints tensor by tensor, layer by layer,"
    " without\nmerging them.",
)
