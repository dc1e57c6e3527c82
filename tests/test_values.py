"""What users write, as checked values."""

from __future__ import annotations

import pytest

from lowmem_adamms.errors import RecipeError
from lowmem_adamms.values import (
    format_size,
    parse_dtype,
    parse_grid,
    parse_size,
    parse_size_or_zero,
    parse_tags,
)

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


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (529_600, "530 kB"), (16_580_000_000, "16.58 GB")],
)
def test_sizes_are_shown_in_decimal_units(nbytes: int, shown: str) -> None:
    assert format_size(nbytes) == shown


@pytest.mark.parametrize("grid", ["0:0.4:0.2", "0.4,0,0.2,0.2", "0.0:0.5:0.2", " 0, .2, 4e-1"])
def test_a_grid_may_be_written_in_several_ways(grid: str) -> None:
    assert parse_grid(grid) == parse_grid([0.0, 0.2, 0.4]) == (0.0, 0.2, 0.4)


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ("", "expected 0,0.1,0.2 or 0:0.6:0.1"),
        ("a,b,c", "expected 0,0.1,0.2 or 0:0.6:0.1"),
        ("0:1", "expected 0,0.1,0.2 or 0:0.6:0.1"),
        ("0:1:0", "expected 0,0.1,0.2 or 0:0.6:0.1"),
        ("0:inf:0.1", "expected 0,0.1,0.2 or 0:0.6:0.1"),
        ("0:nan:0.1", "expected 0,0.1,0.2 or 0:0.6:0.1"),
        ("0.6:0:0.1", "makes -?[0-9]+ alphas"),
        ("0:1:1e-12", "makes 1000000000001 alphas"),
        ("0,0.1", "expected three or more"),
        ("0,0.5,1.1", "expected numbers in 0..1"),
        ("0,0.5,nan", "expected numbers in 0..1"),
        ("0,0.1,0.10000001,0.2", "expected them ascending, each once"),
    ],
)
def test_a_bad_grid_says_what_is_wrong(grid: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        parse_grid(grid)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("BF16", "bf16 BF16 bfloat16 torch.bfloat16"),
        ("F16", "fp16 f16 half float16 torch.float16"),
        ("F32", "fp32 F32 float float32"),
    ],
)
def test_a_dtype_has_several_names(name: str, words: str) -> None:
    assert {parse_dtype(word) for word in words.split()} == {name}


@pytest.mark.parametrize("word", ["", "int8", "fp8", "float64", "torch.", "auto", "F8_E4M3"])
def test_dtypes_that_are_not_written_are_refused_by_name(word: str) -> None:
    with pytest.raises(RecipeError, match=f"{word!r}.*bf16, fp16 or fp32"):
        parse_dtype(word)


def test_tags_are_an_opening_and_a_closing_one_or_none() -> None:
    assert parse_tags(" [THINK]  [/THINK] ") == parse_tags(["[THINK]", "[/THINK]"])
    assert parse_tags("<think> </think>") == ("<think>", "</think>")
    assert parse_tags("") is None and parse_tags([]) is None
    for tags in ("<think>", "<t> <t>", "a b c"):
        with pytest.raises(RecipeError, match="expected an opening and a closing tag"):
            parse_tags(tags)
