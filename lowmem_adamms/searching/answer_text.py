"""Answers as text: when two are the same, and when one is no answer.

Leaves to others: what the differences mean (`search.py`), distances by meaning (`embedding.py`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

Distance = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""distance(first, second) -> one distance, 0 or more, for each pair of answers."""
_QUOTES = dict(
    zip("\"'`\u201c\u201e\u2018\u00ab\u300c", "\"'`\u201d\u201c\u2019\u00bb\u300d", strict=True)
)
"""Closing by opening: straight, back-ticks, double and single curly, German, guillemets, corner."""
_STOP = re.compile(r"(?<![.。])[.。]$")


def normalise(answer: str) -> str:
    """What is compared: answers that a reader would call the same become equal.

    Unicode NFKC (full-width letters, ligatures), case folded (the authors' script lower-cases),
    white space collapsed; then a final full stop and quotes around the whole go, as chat models add
    them at whim. An ellipsis stays, and so does every other mark: "-5" is not "5".
    """
    text = _folded(answer)
    while True:
        bare = _STOP.sub("", text).strip()
        left, inner = bare[:1], bare[1:-1]
        right = _QUOTES.get(left)
        if right and len(bare) > 1 and bare[-1] == right and not {left, right} & set(inner):
            bare = inner.strip()
        if bare == text:
            return text
        text = bare


def is_degenerate(answer: str) -> bool:
    """Whether an answer is empty or ends in a loop: one unit again and again.

    A loop repeats a unit of words, or of 4 characters or more, 4 times; a shorter unit inside a
    word 6 times. Numbers may repeat 8 times and digits 20 times: boxes hold zeros, numbers end in
    them, decimals recur. The loop makes up half of the answer or 64 characters of it; its last
    repetition may be cut short, as by a token limit.
    """
    if not normalise(answer):
        return True
    text = _folded(answer)
    for period in range(1, len(text) // 4 + 2):
        length = _run(text, period)
        unit = text[len(text) - period :]
        # "a a a a" is "a " four times but for the space that nobody writes at the end
        times = (length + (" " in unit)) // period
        if times >= _times_needed(unit) and (2 * length >= len(text) or length >= 64):
            return True
    return False


def _times_needed(unit: str) -> int:
    spaced = " " in unit
    if any(map(str.isdecimal, unit)) and not any(map(str.isalpha, unit)):
        return 8 if spaced else 20
    return 4 if spaced or len(unit) >= 4 else 6


def _folded(answer: str) -> str:
    folded = unicodedata.normalize("NFKC", answer).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def _run(text: str, period: int) -> int:
    """Length of the longest end of the text that is periodic."""
    start = len(text) - period
    while start > 0 and text[start - 1] == text[start - 1 + period]:
        start -= 1
    return len(text) - max(start, 0)
