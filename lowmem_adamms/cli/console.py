"""What the commands print with: results on stdout; errors, notes and progress on stderr.

Names and texts of checkpoints reach the terminal only through this file, which makes control
characters visible and reads no markup in them.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from ..reporting.text import show_hidden
from .options import spell_settings

_RED, _YELLOW = 31, 33


class _Discard(io.TextIOBase):
    """A stream that takes everything and keeps nothing."""

    def write(self, text: str) -> int:
        return len(text)


def prepare_streams() -> None:
    """Let stdout and stderr take any text, also where they are closed.

    A character that the terminal's encoding lacks, such as an umlaut in a path, becomes `\\xe4`.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # as `>&-` leaves it
            setattr(sys, name, _Discard())
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_line(text: str) -> None:
    """One line, or several, of a result."""
    print(_wrapped(_show(text), sys.stdout))


def _show(text: str) -> str:
    return show_hidden(spell_settings(text))


def _wrapped(text: str, stream: Any) -> str:
    """The text with its lines broken between words where a terminal would break them anywhere.

    Indented lines are commands or code, which stay whole for copying.
    """
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    wrap = partial(textwrap.fill, width=width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(
        line if len(line) < width or line.startswith(" ") else wrap(line)
        for line in text.split("\n")
    )


def _print_with_word(word: str, colour: int, text: str) -> None:
    """A line on stderr that begins with a coloured word."""
    wrapped = _wrapped(f"{word} {_show(text)}", sys.stderr)
    print(_coloured(word, colour) + wrapped.removeprefix(word), file=sys.stderr)


def print_errors(messages: Iterable[str]) -> None:
    """Each message as one line on stderr."""
    for message in messages:
        _print_with_word("error:", _RED, " ".join(message.split()))


def print_json(document: Any) -> None:
    """The one document of a command with --json, in a line that stdout can take as it is."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(document, ensure_ascii=not utf8))


def print_note(note: str) -> None:
    """What the user should know and nothing depends on."""
    _print_with_word("note:", _YELLOW, note)


def print_info(text: str) -> None:
    """What is no part of a result, such as where a search runs."""
    print(_wrapped(_show(text), sys.stderr), file=sys.stderr)


def print_notes(notes: Iterable[str]) -> None:
    """Several of them."""
    for note in notes:
        print_note(note)


def _coloured(word: str, colour: int) -> str:
    """The word in a colour, on a terminal that wants any (https://no-color.org)."""
    if not sys.stderr.isatty() or os.environ.get("NO_COLOR"):
        return word
    return f"\x1b[{colour}m{word}\x1b[0m"


def shows_progress() -> bool:
    """Whether anybody sees it."""
    return sys.stderr.isatty()


def screen() -> Any:
    """A rich console for tables on stdout; of one width where that is no terminal."""
    return _console(width=None if sys.stdout.isatty() else 110, highlight=False)


def _console(**options: Any) -> Any:
    from rich.console import Console

    class SafeConsole(Console):
        """Shows every string as it is: no markup, no control characters."""

        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(_show(text), **{**options, "markup": False})

    return SafeConsole(**options)


@contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[Callable[[int], None] | None]:
    """A bar of bytes with rate and time left; None where nobody sees it, or without a total."""
    if total is None or not shows_progress():
        yield None
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn(what),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=_console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


@contextmanager
def live_table(renderable: Any) -> Iterator[None]:
    """Draw a renderable again as it changes, and remove it in the end."""
    if not shows_progress():
        yield
        return
    from rich.live import Live

    with Live(renderable, console=_console(stderr=True), refresh_per_second=2, transient=True):
        yield


@contextmanager
def status_line(wanted: bool) -> Iterator[Callable[[str], None] | None]:
    """A call that replaces the last line of the terminal, which is gone in the end; or None."""
    if not (wanted and shows_progress()):
        yield None
        return

    def show(what: str) -> None:
        print(f"\r\x1b[K{show_hidden(what)}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print("\r\x1b[K", end="", file=sys.stderr)
