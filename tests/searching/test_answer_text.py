"""Which answers count as the same, and which as none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_adamms.searching.answer_text import drop_reasoning, is_degenerate, normalise


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Yes", "yes"),
        ("  A  red\ncar ", "a red car"),
        ('"Stop"', "stop"),
        ('"Stop."', "stop"),
        ('"Stop".', "stop"),
        ("\u201cStop\u201d", "stop"),
        ("ＡＢＣ１", "abc1"),  # noqa: RUF001
        ("ﬁne", "fine"),
        ("是。", "是"),
        ("caf\u0065\u0301", "caf\u00e9"),
    ],
)
def test_answers_a_reader_would_call_the_same_are_equal(first: str, second: str) -> None:
    assert normalise(first) == normalise(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("-5", "5"),
        ("yes", "no"),
        ("well...", "well"),
        ('"a" and "b"', 'a" and "b'),
        ("\u201ca\u201d, b\u201d", "a\u201d, b"),
        ("\u201ca, \u201cb\u201d", "a, \u201cb"),
        ("why?", "why"),
    ],
)
def test_answers_that_mean_something_else_differ(first: str, second: str) -> None:
    assert normalise(first) != normalise(second)


@given(st.text(alphabet=st.sampled_from("aA .\"'`“”„。«»\n…ﬁß"), max_size=12))
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        ".",
        '""',
        "a a a a",
        "the cat the cat the cat the cat",
        "The cat, the cat, the cat, the cat, the c",
        "!!!!!!!",
        "a. a. a. a.",
        "hahahahahaha",
        "0" * 64,
        "0, " * 20,
        "Sure. " + "The image shows a man. " * 6,
        "A long and honest beginning that says a lot about the picture. "
        "It is what it seems, in every way that one can think of, on any day of the week. "
        + "and so on, "
        * 8,
        "这是一只猫。" * 5,
    ],
)
def test_empty_and_looping_answers_are_degenerate(answer: str) -> None:
    assert is_degenerate(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "no no",
        "10000",
        "0.3333333333333333",
        "bye bye",
        "A, B, C, D",
        "0, 0, 0, 0, 0",
        "hahahaha",
        "[0, 0, 100, 100]",
        "| a | b |\n| --- | --- |\n| 1 | 2 |",
        "Row, row, row your boat",
        "A man in a red coat stands on a red bus in front of a red house.",
        "The sign says stop, and the sign behind it says stop as well!!!",
        "They asked whether it would rain, and the man with the umbrella said: ha ha ha ha",
        "www.example.com",
    ],
)
def test_short_and_honest_answers_are_not(answer: str) -> None:
    assert not is_degenerate(answer)


# Reasoning

TAGS = ("<think>", "</think>")


@pytest.mark.parametrize(
    ("answer", "final"),
    [
        ("Yes", "Yes"),
        ("  Yes ", "  Yes "),
        ("<think>\nIs it?\n</think>\n\nYes", "Yes"),
        ("<think></think>", ""),
        ("First <think>hm</think> then", "then"),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>It is", None),
        ("<think>a</think>b<think>c", None),
    ],
)
def test_what_follows_the_reasoning(answer: str, final: str | None) -> None:
    assert drop_reasoning([answer], TAGS) == [final]
    assert drop_reasoning([answer], None) == [answer]


def test_reasoning_that_the_template_opened() -> None:
    """One in ten shows it; one in more may be a slip."""
    answers = ["hm</think>Yes", *["well, if"] * 9]
    assert drop_reasoning(answers, TAGS) == ["Yes", *[None] * 9]
    assert drop_reasoning([*answers, "No"], TAGS) == ["Yes", *["well, if"] * 9, "No"]
