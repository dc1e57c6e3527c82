"""Text for people: shortened, and made safe to show.

Text that comes from checkpoints, prompts and models is hostile: `show_hidden` makes visible what
is invisible or reorders its neighbours. Templates escape the rest.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

DASH = "\N{EN DASH}"
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
LONGEST_TEXT = 4000  # characters of one text; adamms.json and the journal have the rest
SHORT_LINES = 8
_JOINERS = "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"  # Persian, Hindi and emoji need them
_HIDDEN = ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")  # Unicode categories


def show_hidden(text: str) -> str:
    """The text with its unprintable characters as their code points, such as `[U+202E]`."""
    text = text.replace("\r\n", "\n")
    if text.isprintable():
        return text
    return "".join(f"[U+{ord(c):04X}]" if _is_hidden(c) else c for c in text)


def _is_hidden(character: str) -> bool:
    if character in "\n\t" or character in _JOINERS:
        return False
    return unicodedata.category(character) in _HIDDEN


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A text cut for a table: what is shown at once, and what one click more shows."""

    short: str
    full: str = ""  # empty if `short` is all
    omitted: int = 0  # characters that `full` leaves out


def make_excerpt(text: str, limit: int, focus: int = 0) -> Excerpt:
    """Cut a text to about `limit` characters; `focus` is a position that must be among them."""
    if not text.strip():
        return Excerpt(text[:1])
    if len(text) <= limit and text.count("\n") < SHORT_LINES:
        return Excerpt(text)
    return Excerpt(
        _shorten(text, limit, focus), text[:LONGEST_TEXT], max(0, len(text) - LONGEST_TEXT)
    )


def _shorten(text: str, limit: int, focus: int) -> str:
    """About `limit` characters around `focus`, white space collapsed, cut between words."""
    lead = limit // 4
    first = _find_cut(text, focus - lead) if focus > limit - lead else 0
    rest = text[first:]
    nearby = " ".join(rest[: 4 * limit].split())
    last = _find_cut(nearby, limit)
    is_all = last == len(nearby) and len(rest) <= 4 * limit
    return (ELLIPSIS if first else "") + nearby[:last] + ("" if is_all else ELLIPSIS)


def _find_cut(text: str, position: int) -> int:
    """The last space shortly before a position, else the position."""
    if position >= len(text):
        return len(text)
    space = text.rfind(" ", max(position - 24, 0), position + 1)
    return space if space > 0 else max(position, 0)


def format_percent(part: float, whole: float = 1.0) -> str:
    """A share in whole per cent."""
    return f"{100 * part / whole:.0f}\N{NO-BREAK SPACE}%"
