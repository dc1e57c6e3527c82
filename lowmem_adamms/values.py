"""What users write, as checked values: sizes, whole numbers, weights and grids of alphas.

Every function takes the text of a command line or the value of a Python call, and raises
RecipeError that says what was found and what is expected.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterable
from fractions import Fraction
from numbers import Real

from .errors import RecipeError

Tags = tuple[str, str]
"""An opening and a closing one."""
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) *(?:([KMGT])(i?))?B?", re.IGNORECASE)
_SMALLEST_PLAIN_SIZE = 10_000  # a smaller number without a unit is a unit forgotten
_MOST_ALPHAS = 1001
DTYPE_WORDS = {
    "BF16": ("bf16", "bfloat16"),
    "F16": ("fp16", "f16", "float16", "half"),
    "F32": ("fp32", "f32", "float32", "float"),
}
"""What users call the dtypes that can be written, the usual word first."""


def check_type(name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """TypeError that says what was expected, unless a value is of the kind."""
    if not isinstance(value, kind):
        found = repr(value)
        found = found if len(found) <= 80 else f"of type {type(value).__name__}"
        raise TypeError(f"{name} is {found}, expected {expected}")


def format_size(nbytes: int) -> str:
    """A number of bytes for people, in decimal units: `16.58 GB`."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:  # what rounds to 1000 goes to the next unit
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def format_duration(seconds: float) -> str:
    """A time for people: `0.4 s`, `21 s`, `5 min`, `1 h 10 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def format_count(number: int, noun: str) -> str:
    """A number and its noun, in the plural unless it is one: `1,200 prompts`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def parse_size(text: str | int) -> int:
    """Bytes: a number, or text such as `5GB`, `500 MB` and `7.5GiB`."""
    nbytes = parse_size_or_zero(text)
    if nbytes == 0:
        raise RecipeError(f"{text!r}: expected a size such as 16GB, 7.5GiB or 500MB")
    return nbytes


def parse_size_or_zero(text: str | int) -> int:
    """The same as `parse_size`, and 0 where nothing at all has a meaning."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    if not isinstance(text, str):
        raise TypeError(f"found {text!r}, expected a number of bytes or text such as '16GB'")
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise RecipeError(f"{text!r}: expected a size such as 16GB, 7.5GiB or 500MB")
    digits, unit, binary = match.groups()
    number = Fraction(digits)
    if digits == text.strip() and 0 < number < _SMALLEST_PLAIN_SIZE:
        raise RecipeError(f"{text!r}: that many bytes? Give a unit, as in {digits}GB")
    factor = 1024 if binary else 1000
    return int(number * factor ** " KMGT".index((unit or " ").upper()))


def parse_dtype(dtype: object) -> str:
    """The safetensors name of a dtype that can be written: `bf16`, `torch.bfloat16`, …: `BF16`."""
    word = str(getattr(dtype, "name", dtype)).lower().removeprefix("torch.")
    for name, words in DTYPE_WORDS.items():
        if word in words:
            return name
    raise RecipeError(f"dtype {dtype!r} cannot be written; expected bf16, fp16 or fp32")


def parse_count(text: str | int) -> int:
    """A whole number, 1 or more."""
    return _parse_whole(text, least=1)


def parse_natural(text: str | int) -> int:
    """A whole number, 0 or more."""
    return _parse_whole(text, least=0)


def _parse_whole(text: str | int, least: int) -> int:
    if not isinstance(text, str | int) or isinstance(text, bool):
        raise TypeError(f"found {text!r}, expected a whole number, {least} or more")
    word = str(text).strip()
    if not word.isdecimal() or int(word) < least:
        raise RecipeError(f"{text!r}: expected a whole number, {least} or more")
    return int(word)


def parse_alpha(text: str | float) -> float:
    """The donor's weight, 0 to 1."""
    check_type("alpha", text, (str, Real), "a number, 0 to 1")
    try:
        alpha = float(text)
    except ValueError:
        raise RecipeError(f"{text!r}: expected a number, 0 to 1") from None
    if not 0 <= alpha <= 1:  # NaN, too, is refused here
        raise RecipeError(f"alpha is {alpha}, expected a number in 0..1")
    return alpha


def parse_tags(tags: str | Iterable[str]) -> Tags | None:
    """The tags around a model's reasoning, such as `<think> </think>`; None for an empty text."""
    words = tuple(tags.split() if isinstance(tags, str) else tags)
    if not words:
        return None
    if len(words) != 2 or words[0] == words[1]:
        raise RecipeError(
            f"{tags!r}: expected an opening and a closing tag, such as '<think> </think>', or ''"
        )
    return words


def parse_alphas(text: str) -> float | tuple[float, ...]:
    """One weight, or several between spaces."""
    alphas = tuple(parse_alpha(word) for word in text.split())
    if not alphas:
        raise RecipeError(f"{text!r}: expected a number, 0 to 1")
    return alphas if len(alphas) > 1 else alphas[0]


def parse_density(text: str | float) -> float:
    """A share of values to keep, above 0 and up to 1."""
    try:
        density = float(text)
    except ValueError:
        raise RecipeError(f"{text!r}: expected a number, above 0 and up to 1") from None
    if not 0 < density <= 1:
        raise RecipeError(f"density is {density}, expected a number above 0 and up to 1")
    return density


def parse_grid(alphas: str | Iterable[float]) -> tuple[float, ...]:
    """The alphas of a search, ascending: numbers, `0,0.1,0.2`, or `start:stop:step` with stop."""
    if not isinstance(alphas, str):
        expected = "numbers, such as [0, 0.2, 0.4] or '0:0.6:0.1'"
        check_type("alphas", alphas, Iterable, expected)
        for alpha in (alphas := tuple(alphas)):
            check_type("alphas: one of them", alpha, Real, expected)
        return check_grid(alphas)
    return check_grid(_parse_range(alphas) if ":" in alphas else _parse_list(alphas))


def check_grid(alphas: Iterable[float]) -> tuple[float, ...]:
    """The alphas to 6 decimals; RecipeError unless they are three or more, ascending, in 0..1."""
    grid = tuple(round(float(alpha), 6) for alpha in alphas)
    for alpha in grid:
        if not (math.isfinite(alpha) and 0 <= alpha <= 1):
            raise RecipeError(f"alphas: found {alpha}, expected numbers in 0..1")
    shown = ", ".join(map(str, grid))
    if len(grid) < 3:
        raise RecipeError(
            f"alphas: found {len(grid)} ({shown}), expected three or more: only an alpha between"
            " two others can be scored"
        )
    if any(first >= second for first, second in itertools.pairwise(grid)):
        raise RecipeError(f"alphas: found {shown}, expected them ascending, each once")
    return grid


def _parse_list(text: str) -> list[float]:
    try:
        return sorted({float(word) for word in text.split(",")})
    except ValueError:
        raise RecipeError(f"{text!r}: expected 0,0.1,0.2 or 0:0.6:0.1") from None


def _parse_range(text: str) -> list[float]:
    try:
        start, stop, step = map(float, text.split(":"))
        count = int((stop - start) / step + 1.000001)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise RecipeError(f"{text!r}: expected 0,0.1,0.2 or 0:0.6:0.1") from None
    if not 0 < count <= _MOST_ALPHAS:
        raise RecipeError(f"{text!r}: makes {count} alphas; expected 3 to {_MOST_ALPHAS}")
    return [round(start + i * step, 6) for i in range(count)]


def suggest(word: str, known: Iterable[str]) -> str:
    """How an error about an unknown word ends: the known one it resembles, or all of them."""
    folded = {each.casefold(): each for each in known}
    if close := difflib.get_close_matches(word[:80].casefold(), folded, 1, 0.5):
        return f"; did you mean {folded[close[0]]!r}?"
    return f"; expected one of {', '.join(folded.values())}"
