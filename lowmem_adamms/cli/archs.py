"""The command `archs`: the known families, or one as a file for --arch."""

from __future__ import annotations

import argparse

from .console import print_json


def run(arguments: argparse.Namespace) -> int:
    """List the declarations, the user's before ours, or print one so that --arch takes it."""
    from ..architectures import declare
    from ..architectures import families as archs
    from ..reporting import terminal as show

    known = (*declare.read_declarations(arguments.arch or ()), *archs.ARCHS)
    one = declare.find_arch(arguments.name, known) if arguments.name else None
    if arguments.json:
        print_json(one.to_json() if one else [arch.to_json() for arch in known])
    else:
        print(declare.to_toml(one) if one else show.archs(known), end="" if one else "\n")
    return 0
