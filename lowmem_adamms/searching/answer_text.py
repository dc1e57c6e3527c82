"""Answers as text: when two are the same, and when one is no answer."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from ..values import Tags

_QUOTES = dict(
    zip("\"'`\u201c\u201e\u2018\u00ab\u300c", "\"'`\u201d\u201c\u2019\u00bb\u300d", strict=True)
)
"""Closing by opening: straight, back-ticks, double and single curly, German, guillemets, corner."""
_FULL_STOP = re.compile(r"(?<![.。])[.。]$")  # an ellipsis is none


def normalise(answer: str) -> str:
    """The form in which answers are compared: equal if a reader would call them the same.

    Unicode NFKC (full-width letters, ligatures), case folded (the authors' script lower-cases),
    white space collapsed. Then a final full stop and quotes around the whole are removed, which
    chat models add at whim. Every other mark stays: "-5" is not "5".
    """
    text = _fold(answer)
    while True:
        shorter = _strip_quotes(_FULL_STOP.sub("", text).strip())
        if shorter == text:
            return text
        text = shorter


def drop_reasoning(answers: Sequence[str], tags: Tags | None) -> list[str | None]:
    """What follows the reasoning of each answer; None for one that ends inside its reasoning.

    Some chat templates open the reasoning themselves. Where a tenth of the answers or more close
    what they did not open, all of them are taken to begin inside.
    """
    if tags is None:
        return list(answers)
    opening, closing = tags
    unopened = [closing in a and opening not in a.partition(closing)[0] for a in answers]
    start = opening if sum(unopened) >= max(1, len(answers) / 10) else ""
    return [_after_reasoning(start + answer, opening, closing) for answer in answers]


def _after_reasoning(answer: str, opening: str, closing: str) -> str | None:
    _, closed, rest = answer.rpartition(closing)
    if opening in rest:
        return None
    return rest.strip() if closed else answer


def collapsed_share(answers: Sequence[str]) -> float:
    """The share of answers that are degenerate, or all the same, whichever is more."""
    degenerate = sum(map(is_degenerate, answers))
    _, same = Counter(map(normalise, answers)).most_common(1)[0]
    return max(degenerate, same) / len(answers)


def is_degenerate(answer: str) -> bool:
    """Whether an answer is empty or ends in a loop: one unit again and again.

    A loop repeats a unit of words, or of 4 characters or more, 4 times; a shorter unit inside a
    word 6 times. Numbers may repeat 8 times and digits 20 times: boxes hold zeros, numbers end in
    them, decimals recur. The loop makes up half of the answer or 64 characters of it; its last
    repetition may be cut short, as by a token limit.
    """
    if not normalise(answer):
        return True
    text = _fold(answer)
    for period in range(1, len(text) // 4 + 2):
        length = _periodic_length(text, period)
        unit = text[len(text) - period :]
        # "a a a a" is "a " four times but for the space that nobody writes at the end
        repetitions = (length + (" " in unit)) // period
        long_enough = 2 * length >= len(text) or length >= 64
        if long_enough and repetitions >= _repetitions_of_a_loop(unit):
            return True
    return False


def _fold(answer: str) -> str:
    folded = unicodedata.normalize("NFKC", answer).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def _strip_quotes(text: str) -> str:
    """The text without a pair of quotes around all of it, unless they quote parts of it."""
    if len(text) < 2 or _QUOTES.get(text[0]) != text[-1]:
        return text
    inside = text[1:-1]
    return text if text[0] in inside or text[-1] in inside else inside.strip()


def _repetitions_of_a_loop(unit: str) -> int:
    has_space = " " in unit
    if any(map(str.isdecimal, unit)) and not any(map(str.isalpha, unit)):
        return 8 if has_space else 20
    return 4 if has_space or len(unit) >= 4 else 6


def _periodic_length(text: str, period: int) -> int:
    """Length of the longest end of the text that repeats with this period."""
    start = len(text) - period
    while start > 0 and text[start - 1] == text[start - 1 + period]:
        start -= 1
    return len(text) - max(start, 0)
