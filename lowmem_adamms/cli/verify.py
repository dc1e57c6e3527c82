"""The command `verify`: check a merged folder."""

from __future__ import annotations

from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path

from ..errors import RecipeError
from ..settings import setting
from ..values import format_size
from .console import print_line, print_notes, status_line
from .options import Command
from .pair import parse_path


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What `verify` takes."""

    out: Path = setting(None, "what merge wrote", metavar="OUT", parse=parse_path, positional=True)
    deep: bool = setting(
        False, "also check the digest of each file, and recompute sampled rows from base and donor"
    )
    base: str | None = setting(
        None,
        "where the base is, for --deep; default: beside OUT, or on the Hub if it came from there",
        metavar="BASE",
        parse=expanduser,
    )
    donor: tuple[str, ...] = setting(
        (),
        "where the donor is, for --deep; default: likewise; once for each of several donors",
        metavar="DONOR",
        parse=expanduser,
        repeated=True,
    )
    ancestor: str | None = setting(
        None,
        "where the ancestor is, for --deep; default: likewise",
        metavar="ANCESTOR",
        parse=expanduser,
    )


def run(options: VerifyOptions) -> int:
    """Check, and say in a line what was found."""
    from ..merging.verify import verify

    if not options.deep and (options.base or options.donor or options.ancestor):
        raise RecipeError("--base, --donor and --ancestor are for --deep; add it or leave them out")
    with status_line(options.deep) as show:
        verdict = verify(
            options.out,
            deep=options.deep,
            base=options.base,
            donor=options.donor,
            ancestor=options.ancestor,
            progress=show,
        )
    deep = "" if verdict.rows is None else f", {verdict.rows} sampled rows equal to the recipe's"
    print_line(
        f"{options.out}: ok, {verdict.tensors} tensors in {verdict.shards} shards,"
        f" {format_size(verdict.bytes)}{deep}"
    )
    print_notes(verdict.notes)
    return 0


COMMAND = Command(
    takes=VerifyOptions,
    run=run,
    help="check a merged folder",
    description="Checks that a merged folder is whole and loads as what it says it is.",
)
