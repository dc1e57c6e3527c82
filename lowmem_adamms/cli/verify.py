"""The command `verify`: check a merged folder."""

from __future__ import annotations

import argparse

from .console import print_notes, status_line


def run(arguments: argparse.Namespace) -> int:
    """Check, and say in a line what was found."""
    from ..merging.verify import verify
    from ..reporting.terminal import size

    with status_line(arguments.deep) as say:
        verdict = verify(arguments.out, deep=arguments.deep, progress=say)
    deep = "" if verdict.rows is None else f", {verdict.rows} sampled rows equal to the recipe's"
    print(
        f"{arguments.out}: ok, {verdict.tensors} tensors in {verdict.shards} shards,"
        f" {size(verdict.bytes)}{deep}"
    )
    print_notes(verdict.notes)
    return 0
