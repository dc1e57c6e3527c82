"""Bits of HTML that every page of ours is made of: escaped text, texts cut short, tables, counts.

All text is hostile: it is escaped, and characters that are invisible or reorder their neighbours
are shown by their code point. Leaves to others: the pages' frame and style (`report_page.py`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from html import escape

DASH = "\N{EN DASH}"
SHOWN_TEXT = 4000  # characters of one text when opened; adamms.json and the journal have the rest
SHORT_LINES = 8


def plain(text: str) -> str:
    """Escaped for element text and for attributes; unprintable characters as [U+202E]."""
    return _escaped(text, "[U+{:04X}]")


def marked(text: str) -> str:
    """Escaped for element text; unprintable characters as a small box with their code point."""
    return _escaped(text, '<span class="code">U+{:04X}</span>')


def _escaped(text: str, form: str) -> str:
    text = escape(text.replace("\r\n", "\n"))
    if text.isprintable():
        return text
    return "".join(c if _harmless(c) else form.format(ord(c)) for c in text)


def _harmless(character: str) -> bool:
    """Whether a character shows itself; joiners stay, for Persian, Hindi and emoji need them."""
    if character in "\n\t\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}":
        return True
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")


def prose(text: str, limit: int, start: int = 0) -> str:
    """A text in its own direction; a long one shortened, the full text one click away.

    start: the position that a shortened text must show.
    """
    if not text.strip():
        return f'<p class="none">({"white space" if text else "empty"})</p>'
    if len(text) <= limit and text.count("\n") < SHORT_LINES:
        return f'<p dir="auto">{marked(text)}</p>'
    full, rest = text[:SHOWN_TEXT], len(text) - SHOWN_TEXT
    more = f' <span class="muted">({rest:,} more characters)</span>' if rest > 0 else ""
    short = marked(_shortened(text, limit, start))
    return (
        f'<details class="long"><summary dir="auto"><span>{short}</span></summary>'
        f'<p dir="auto">{marked(full)}{more}</p></details>'
    )


def _shortened(text: str, limit: int, start: int = 0) -> str:
    """About `limit` characters around `start`, white space collapsed, cut between words."""
    dots, lead = "\N{HORIZONTAL ELLIPSIS}", limit // 4
    first = _cut(text, start - lead) if start > limit - lead else 0
    rest = text[first:]
    kept = " ".join(rest[: 4 * limit].split())
    last = _cut(kept, limit)
    ends = last == len(kept) and len(rest) <= 4 * limit
    return (dots if first else "") + kept[:last] + ("" if ends else dots)


def _cut(text: str, at: int) -> int:
    """A position at or a little before `at`: a space, else no middle of a composed character."""
    at = min(at, len(text))
    if at == len(text):
        return at
    if (space := text.rfind(" ", max(at - 24, 0), at + 1)) > 0:
        return space
    while at > 0 and (
        unicodedata.combining(text[at]) or "\N{ZERO WIDTH JOINER}" in text[at - 1 : at + 1]
    ):
        at -= 1
    return at


def as_percent(part: float, whole: float = 1.0) -> str:
    """A share in whole per cent."""
    return f"{100 * part / whole:.0f}\N{NO-BREAK SPACE}%"


def counted(number: int, noun: str) -> str:
    """A number and its noun, in the plural unless it is one."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def css(on: bool, name: str) -> str:
    """A class attribute, or nothing."""
    return f' class="{name}"' if on else ""


def cell(text: str, kind: str = "") -> str:
    """A cell of a table; kind: its class."""
    return f"<td{css(bool(kind), kind)}>{text}</td>"


def row(head: str, cells: Iterable[str], kind: str = "") -> str:
    """A row of a table: its head and its finished cells."""
    return f'<tr{css(bool(kind), kind)}><th scope="row">{head}</th>{"".join(cells)}</tr>'


def table(head: Iterable[str], rows: Iterable[str], *, label: str, cls: str = "") -> list[str]:
    """A table of numbers: `head` holds texts of our own, `rows` holds finished <tr> elements."""
    cells = "".join(f'<th scope="col">{name}</th>' for name in head)
    return [
        f'<div class="scroll"><table class="numbers {cls}"><caption>{label}</caption>',
        f"<thead><tr>{cells}</tr></thead><tbody>",
        *rows,
        "</tbody></table></div>",
    ]
