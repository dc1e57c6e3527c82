"""What the word after an option means: a path, a number, a size, a grid of alphas.

Found out as the command line is read, before anything else is done. What means nothing is an
ArgumentTypeError, of which argparse makes a line that names the option.
"""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RecipeError
from ..home import at_home

if TYPE_CHECKING:
    from ..checkpoints.dtypes import DType

_FEWEST = 10_000  # nobody means so few bytes
_MOST_ALPHAS = 1001


def path(text: str) -> Path:
    """A file or folder."""
    return Path(at_home(text))


def answers(text: str) -> tuple[float | None, Path]:
    """`0.3=FILE`, or a FILE that names its alphas itself."""
    from ..searching.recorded_answers import parse_spec

    try:
        alpha, file = parse_spec(text)
    except RecipeError as error:
        raise ArgumentTypeError(str(error)) from None
    return alpha, path(str(file))


def dtype(text: str) -> DType:
    """Of floats: bf16, fp16 or fp32."""
    from ..checkpoints import dtypes

    try:
        return dtypes.parse_dtype(text)
    except RecipeError as error:
        raise ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    """A whole number, 1 or more."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """A whole number, 0 or more."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    number = int(text) if text.strip().isdecimal() else -1
    if number < least:
        raise ArgumentTypeError(f"{text!r}: expected a whole number, {least} or more")
    return number


def alpha(text: str) -> float:
    """The donor's weight, 0 to 1."""
    from ..mapping.alphas import check_alpha

    try:
        return check_alpha(float(text))
    except ValueError:
        raise ArgumentTypeError(f"{text!r}: expected a number, 0 to 1") from None
    except RecipeError as error:
        raise ArgumentTypeError(str(error)) from None


def grid(text: str) -> tuple[float, ...]:
    """The alphas of a search: `0,0.1,0.2`, in any order, or `start:stop:step`, stop included."""
    from ..searching.search import checked_grid

    try:
        return checked_grid(_listed(text))
    except RecipeError as error:
        raise ArgumentTypeError(f"{text!r}: {error}") from None


def _listed(text: str) -> list[float]:
    try:
        if ":" not in text:
            return sorted({float(word) for word in text.split(",")})
        start, stop, step = map(float, text.split(":"))
        count = int((stop - start) / step + 1.000001)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ArgumentTypeError(f"{text!r}: expected 0,0.1,0.2 or 0:0.6:0.1") from None
    if not 0 < count <= _MOST_ALPHAS:
        raise ArgumentTypeError(f"{text!r}: makes {count} alphas; expected 3 to {_MOST_ALPHAS}")
    return [round(start + i * step, 6) for i in range(count)]


def size(text: str) -> int:
    """Bytes of `5GB`, `500 MB`, `2GiB` or a plain number that is not short of its unit."""
    return _bytes(text, zero=False)


def size_or_zero(text: str) -> int:
    """The same, where nothing at all has a meaning."""
    return _bytes(text, zero=True)


def _bytes(text: str, *, zero: bool) -> int:
    from fractions import Fraction

    match = re.fullmatch(
        r"([0-9]{1,15}(?:\.[0-9]{1,15})?) *(?:([KMGT])(i?))?B?", text.strip(), re.IGNORECASE
    )
    number = Fraction(match[1]) if match else Fraction(0)
    if match is None or not (number or zero):
        raise ArgumentTypeError(f"{text!r}: expected a size such as 16GB, 7.5GiB or 500MB")
    if match[1] == text.strip() and 0 < number < _FEWEST:
        raise ArgumentTypeError(f"{text!r}: that many bytes? Give a unit, as in {match[1]}GB")
    base = 1024 if match[3] else 1000
    return int(number * base ** " KMGT".index((match[2] or " ").upper()))
