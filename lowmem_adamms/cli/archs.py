"""The command `archs`: the known families, or one as a file for --arch."""

from __future__ import annotations

from dataclasses import dataclass

from ..architectures import declare, families
from ..settings import setting
from .console import print_json, print_line, screen
from .options import Command, program
from .pair import arch_option, json_option


@dataclass(frozen=True, kw_only=True)
class ArchsOptions:
    """What `archs` takes."""

    name: str | None = setting(
        None, "print the declaration of this family", metavar="NAME", positional=True, nargs="?"
    )
    json: bool = json_option()
    arch: tuple[str, ...] = arch_option("also list what this TOML file declares; may be repeated")


def run(options: ArchsOptions) -> int:
    """List the declarations, the user's before ours, or print one in the form --arch takes."""
    from ..reporting import terminal

    known = (*declare.read_declarations(options.arch), *families.ARCHS)
    one = declare.find_arch(options.name, known) if options.name else None
    if options.json:
        print_json(one.to_json() if one else [arch.to_json() for arch in known])
    elif one:
        print(declare.to_toml(one), end="")
    else:
        screen().print(terminal.archs_table(known))
        print_line(f"a whole declaration: {program()} archs NAME")
    return 0


COMMAND = Command(
    takes=ArchsOptions,
    run=run,
    help="the known families, or one as a file for --arch",
    description="Lists the families of models that are known. With a NAME, prints one as TOML, from"
    " which\na declaration for --arch can be made.",
)
