"""What users write, as checked values."""

from __future__ import annotations

import pytest

from lowmem_adamms.errors import RecipeError
from lowmem_adamms.values import parse_size, parse_size_or_zero

GB, GIB = 10**9, 1 << 30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GB", 8 * GB),
        ("16GiB", 16 * GIB),
        ("7.5 gib", 15 * GIB // 2),
        ("500M", 500_000_000),
        ("2ki", 2048),
        ("1TB", 1000 * GB),
        (" 12345 ", 12345),
        ("12B", 12),
        ("1.001GB", 1_001_000_000),
    ],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GB", "-5GB", "5 apples", "1e9", "5iB", "5PB", "0", "0.0GB", "9" * 400, "٣GB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^'.*': expected a size such as"):
        parse_size(text)


@pytest.mark.parametrize("text", ["8", " 16", "7.5", "9999"])
def test_a_number_without_its_unit_is_not_taken_for_bytes(text: str) -> None:
    with pytest.raises(RecipeError, match=rf"^'{text}': .*unit, as in {text.strip()}GB"):
        parse_size_or_zero(text)


def test_zero_passes_where_it_has_a_meaning() -> None:
    assert parse_size_or_zero("0") == parse_size_or_zero("0GB") == 0
    with pytest.raises(RecipeError):
        parse_size_or_zero("GB")
