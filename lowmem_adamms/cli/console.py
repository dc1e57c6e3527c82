"""What the commands draw with: tables on stdout; notes, bars and live tables on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from . import speech


def draws() -> bool:
    """Whether progress is seen by anybody."""
    return sys.stderr.isatty()


def screen() -> Any:
    """Tables on stdout; of one width where that is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 110, highlight=False)


def print_json(document: Any) -> None:
    """The one document of a command with --json."""
    print(speech.as_json(document))


def print_notes(notes: Sequence[str]) -> None:
    """What the user should know and nothing depends on."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


@contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[Callable[[int], None] | None]:
    """A bar with rate and time left, of bytes; nothing where nobody sees it or without a total."""
    if total is None or not draws():
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
def kept_up_to_date(renderable: Any) -> Iterator[None]:
    """A renderable that is drawn again as it changes, or nothing where nobody sees it."""
    if not draws():
        yield
        return
    from rich.console import Console
    from rich.live import Live

    with Live(renderable, console=Console(stderr=True), refresh_per_second=2, transient=True):
        yield


@contextmanager
def status_line(wanted: bool) -> Iterator[Callable[[str], None] | None]:
    """A call that replaces the last line of the terminal, gone in the end; or nothing."""
    if not (wanted and draws()):
        yield None
        return

    def say(what: str) -> None:
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)

    try:
        yield say
    finally:
        print("\r\x1b[K", end="", file=sys.stderr)
