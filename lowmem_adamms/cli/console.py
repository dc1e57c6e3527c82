"""What the commands print with: results on stdout; errors, notes and progress on stderr."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


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


def fail(*messages: str) -> int:
    """Print each message as one printable line, whatever names are in it; returns exit code 2."""
    for message in messages:
        line = " ".join(message.split())
        safe = "".join(letter if letter.isprintable() else "?" for letter in line)
        print("error:", safe, file=sys.stderr)
    return 2


def print_json(document: Any) -> None:
    """The one document of a command with --json, in a line that stdout can take as it is."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(document, ensure_ascii=not utf8))


def print_note(note: str) -> None:
    """What the user should know and nothing depends on."""
    print(f"note: {note}", file=sys.stderr)


def print_notes(notes: Iterable[str]) -> None:
    """Several of them."""
    for note in notes:
        print_note(note)


def shows_progress() -> bool:
    """Whether anybody sees it."""
    return sys.stderr.isatty()


def screen() -> Any:
    """A rich console for tables on stdout; of one width where that is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 110, highlight=False)


@contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[Callable[[int], None] | None]:
    """A bar of bytes with rate and time left; None where nobody sees it, or without a total."""
    if total is None or not shows_progress():
        yield None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn(what),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


@contextmanager
def live_table(renderable: Any) -> Iterator[None]:
    """Draw a renderable again as it changes, and remove it in the end."""
    if not shows_progress():
        yield
        return
    from rich.console import Console
    from rich.live import Live

    with Live(renderable, console=Console(stderr=True), refresh_per_second=2, transient=True):
        yield


@contextmanager
def status_line(wanted: bool) -> Iterator[Callable[[str], None] | None]:
    """A call that replaces the last line of the terminal, which is gone in the end; or None."""
    if not (wanted and shows_progress()):
        yield None
        return

    def show(what: str) -> None:
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print("\r\x1b[K", end="", file=sys.stderr)
