"""The command `compare`: how far apart two checkpoints are."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

from .arguments import check_page
from .console import print_json, progress_bar, screen

if TYPE_CHECKING:
    from ..comparing.comparison import Comparison


def run(arguments: argparse.Namespace) -> int:
    """Compare, write the page if one is asked for, and print tables or one document."""
    from ..architectures.declare import read_declarations
    from ..comparing import comparison as compare
    from ..comparing import pairing
    from ..mapping.join import make_plan

    check_page(arguments.html, "--html", arguments.a, arguments.b, *(arguments.arch or ()))
    make = partial(make_plan, declared=read_declarations(arguments.arch or ()))
    joined = pairing.join(arguments.a, arguments.b, make=make)
    total = compare.bytes_read(joined) if arguments.full else None
    with progress_bar("comparing", total) as progress:
        sample = None if arguments.full else arguments.sample
        found = compare.compare(joined, sample=sample, progress=progress)
    if arguments.html:
        from ..comparing import page as compare_page
        from ..reporting import page as report_page

        report_page.write(arguments.html, compare_page.html(found))
    if arguments.json:
        print_json(found.to_json())
    else:
        _show(found)
    return 0


def _show(found: Comparison) -> None:
    from ..comparing import table as compare_table

    console = screen()
    ascii_only = console.options.ascii_only
    for item in compare_table.drawn(found, width=console.width, ascii_only=ascii_only):
        console.print(item, soft_wrap=isinstance(item, str))
