"""A parser for each command, made from the dataclass of what the command takes.

The fields carry their own `settings.Option`, so nothing about an option is said here. A field that
comes from a base class stands in that class's group of the help, under its docstring.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import RecipeError
from ..settings import Option
from ..version import __version__


@dataclass(frozen=True, slots=True)
class Command:
    """One command: the dataclass of what it takes, what carries it out, and its help."""

    takes: type
    run: Callable[[Any], int]
    help: str
    description: str | None = None
    usage: str | None = None
    examples: str | None = None

    def __post_init__(self) -> None:
        for item in _fields(self.takes):
            known = _SETTINGS.get(item.name)
            if known is None or known.metadata["option"].positional:
                _SETTINGS[item.name] = item


QUOTES = "'\""
_SETTINGS: dict[str, dataclasses.Field[Any]] = {}
"""Every setting that any command takes, by its name."""


def spell_settings(text: str) -> str:
    """A text of the wings, with the settings it names as they are written on the command line.

    Below `cli/` an error says `batch_size` or `force=True`, as in Python.
    """

    def spell(named: re.Match[str]) -> str:
        item, value = _SETTINGS.get(named[1]), named[2]
        if item is None:
            return named[0]
        word = item.metadata["option"].short or _spelled(item)
        return word if value in (None, "True", "False") else f"{word} {value.strip(QUOTES)}"

    return re.sub(r"`(\w+)(?:=([^`]*))?`", spell, text)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are RecipeErrors, and whose help keeps the lines of descriptions."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.known_words: set[str] = set()

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print and exit for."""
        message = re.sub(r"^argument (?:-\w/)?(--([\w-]+)|\w+): (?:\2: )?", r"\1: ", message)
        wrong = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        hint = ""
        if wrong:
            is_known = wrong[1] in self.known_words  # so another command has it
            hint = (
                " (not of this command)" if is_known else did_you_mean(wrong[1], self.known_words)
            )
        raise RecipeError(f"{message}{hint}; see {self.prog} --help")


def program() -> str:
    """How this program was started."""
    name = Path(sys.argv[0]).name
    return name if name == "lowmem-adamms" else "python -m lowmem_adamms"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint at the known word that is most like another, or nothing."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def make_parser(commands: Mapping[str, Command], about: str, examples: str) -> Parser:
    """The parser of the whole command line."""
    root = Parser(prog=program(), description=about, epilog=examples)
    root.add_argument("--version", action="version", version=__version__)
    subparsers = root.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=Parser
    )
    for name, command in commands.items():
        parser = subparsers.add_parser(
            name,
            help=command.help,
            description=command.description,
            usage=command.usage,
            epilog=command.examples,
        )
        _add_options(parser, command.takes)
        root.known_words |= {_spelled(item) for item in _fields(command.takes)}
    return root


def read_options(command: Command, namespace: argparse.Namespace) -> Any:
    """What argparse found as an instance of the command's dataclass."""
    found = {item.name: getattr(namespace, item.name) for item in _fields(command.takes)}
    return command.takes(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in found.items()
        }
    )


def spelled(fields: Iterable[dataclasses.Field[Any]]) -> str:
    """Fields as they are written on the command line, sorted: `--dtype, --no-drafts, BASE`."""
    return ", ".join(sorted(_spelled(item) for item in fields))


def _spelled(item: dataclasses.Field[Any]) -> str:
    option: Option = item.metadata["option"]
    if option.positional:
        return option.metavar or item.name
    return f"--{'no-' if option.off else ''}{item.name.replace('_', '-')}"


def _fields(takes: type) -> list[dataclasses.Field[Any]]:
    return [item for item in dataclasses.fields(takes) if "option" in item.metadata]


def _add_options(parser: Parser, takes: type) -> None:
    """The command's own fields first, then a group for each of its bases."""
    fields = {item.name: item for item in _fields(takes)}
    groups = [(takes, parser), *((base, None) for base in takes.__mro__[1:])]
    for kind, group in groups:
        names = inspect.get_annotations(kind)
        own = [fields.pop(name) for name in names if name in fields]  # in the order of the class
        if own and group is None:
            group = parser.add_argument_group(_title(kind))  # type: ignore[assignment]
        for item in own:
            assert group is not None
            _add_option(group, item)


def _title(kind: type) -> str:
    """The docstring's first sentence without its full stop."""
    return (kind.__doc__ or "").strip().splitlines()[0].partition(". ")[0].removesuffix(".")


def _add_option(group: argparse._ActionsContainer, item: dataclasses.Field[Any]) -> None:
    option: Option = item.metadata["option"]
    how: dict[str, Any] = {"help": option.help}
    if option.parse:
        how["type"] = _reporting(option.parse)
    how |= {
        key: value
        for key in ("choices", "metavar", "nargs")
        if (value := getattr(option, key)) is not None
    }
    if option.positional:
        group.add_argument(item.name, default=item.default, **how)
        return
    how |= {"dest": item.name, "default": item.default, "required": option.required}
    if option.off:
        how["action"] = "store_false"
    elif item.default is False:
        how["action"] = "store_true"
    elif option.repeated:
        how |= {"action": "append", "default": []}
    names = [option.short, _spelled(item)] if option.short else [_spelled(item)]
    group.add_argument(*names, **how)


def _reporting(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """The same, with errors that argparse puts the option's name before."""

    def parsed(word: str) -> Any:
        try:
            return parse(word)
        except RecipeError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed
