"""Tables and lines for the terminal, as rich draws them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from lowmem_adamms.answers import Answer
from lowmem_adamms.reporting.terminal import (
    SearchLog,
    SearchProgress,
    describe_result,
    search_table,
)
from lowmem_adamms.searching.search import Candidate, choose, search

# By alpha, the answers to three prompts
ANSWERS = {
    0.0: ["red", "two", "yes"],
    0.1: ["red", "three", "no"],
    0.2: ["red", "three", "no"],
    0.3: ["blue", "three", "no"],
}


def drawn(renderable: Any) -> list[str]:
    """The lines of something on a wide terminal without colours."""
    console = Console(file=io.StringIO(), width=200, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().splitlines()


def cells(lines: Sequence[str]) -> list[list[str]]:
    """A table's rows, without its frame."""
    return [
        [cell.strip() for cell in line.strip("│┃").split("┃" if "┃" in line else "│")]
        for line in lines
        if line.startswith(("│", "┃"))
    ]


def test_a_search_is_a_row_for_each_alpha() -> None:
    result = choose(ANSWERS)
    head, *rows = cells(drawn(search_table(result.candidates, result.alpha)))
    assert head == ["alpha", "differs from previous", "from next", "D", "95 %", "degenerate", ""]
    assert [row[:4] for row in rows] == [
        ["0", "", "2", ""],
        ["0.1", "2", "0", "2"],
        ["0.2", "0", "1", "1"],
        ["0.3", "1", "", ""],
    ]
    assert [row[4] != "" for row in rows] == [False, True, True, False]
    assert [row[6] for row in rows] == ["", "", "<- chosen", ""]


def test_a_table_in_the_making_has_gaps_and_the_order_of_the_alphas() -> None:
    known = [Candidate(0.2, 25, None, None, 0), Candidate(0.1, None, 25, None, 3)]
    _, *rows = cells(drawn(search_table(known)))
    assert rows == [["0.1", "", "25", "", "", "3", ""], ["0.2", "25", "", "", "", "", ""]]


def test_a_refined_search_is_a_section_for_each_round() -> None:
    """Each row says which alphas it was compared with; the grid is whole."""
    new = {0.0: 0, 0.1: 10, 0.15: 12, 0.2: 14, 0.25: 15, 0.3: 17, 0.4: 27}

    def generate(alpha: float, prompts: Sequence[int]) -> list[str]:
        return [f"{place}: {place < new[alpha]}" for place in prompts]

    result = search(generate, range(30), (0.0, 0.1, 0.2, 0.3, 0.4), refine=1)
    lines = drawn(search_table(result.rounds, result.alpha))
    head, *rows = cells(lines)
    assert head[:4] == ["round", "alpha", "between", "differs from previous"]
    assert [row[:3] for row in rows] == [
        ["grid", "0", ""],
        ["grid", "0.1", "0 and 0.2"],
        ["grid", "0.2", "0.1 and 0.3"],
        ["grid", "0.3", "0.2 and 0.4"],
        ["grid", "0.4", ""],
        ["1", "0.15", "0.1 and 0.2"],
        ["1", "0.2", "0.15 and 0.25"],
        ["1", "0.25", "0.2 and 0.3"],
    ]
    assert len([line for line in lines if line.startswith("├")]) == 1
    assert [row[5] for row in rows] == ["", "14", "7", "13", "", "4", "3", "3"]
    assert [row[:2] for row in rows if row[-1] == "<- chosen"] == [["1", "0.2"]]
    assert describe_result(result) == "alpha 0.2, D = 3 in round 1 over 30 prompts (pairwise)"


def test_the_verdict_is_one_sentence() -> None:
    assert describe_result(choose(ANSWERS)) == "alpha 0.2, D = 1 over 3 prompts (pairwise)"
    joint = choose(ANSWERS, measure="joint")
    assert describe_result(joint) == "alpha 0.2, D = 1 over 3 prompts (joint)"
    relative = choose(ANSWERS, measure="relative")
    assert describe_result(relative) == "alpha 0.2, D = 50 % over 3 prompts (relative)"
    unsure = {
        alpha: [Answer(text, entropy=alpha + 1 / 3) for text in answers]
        for alpha, answers in ANSWERS.items()
    }
    found = describe_result(choose(unsure, measure="entropy"))
    assert found == "alpha 0, D = 0.3333 nats over 3 prompts (entropy)"
    one = choose({alpha: answers[:1] for alpha, answers in ANSWERS.items()})
    assert describe_result(one) == "alpha 0.1, D = 0 over 1 prompt (pairwise)"
    noisy = replace(one, noise=1)
    assert describe_result(noisy).endswith("; asked twice, 1 answer differed")


def test_progress_is_always_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    progress = SearchProgress(alphas=3, prompts=4)
    assert drawn(progress)[-1].split() == ["loading", "the", "model:", "0/4", "prompts"]
    progress.asked(0.0)
    progress.answered(0.0, 0)  # known from an earlier run: tells nothing of the time to come
    for _ in range(3):
        progress.answered(0.0, 6)
    progress.candidates(0.0, [Candidate(0.0, None, None, None, 0)])
    progress.asked(0.1)
    progress.answered(0.1, 12)
    now = 110.0
    lines = drawn(progress)
    assert cells(lines)[1][0] == "0"
    # Four answers of thirty tokens in ten seconds, seven more to come
    assert lines[-1].rstrip() == "alpha 0.1: 1/4 prompts, 3.0 tokens/s, about 18 s left"
    for alpha in (0.2, 0.3):  # one more than was expected
        progress.asked(alpha)
        for _ in range(4):
            progress.answered(alpha, 6)
    assert drawn(progress)[-1].rstrip().endswith(", about 2.5 s left")


def test_a_log_gets_a_line_an_alpha_and_one_where_it_takes_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[-1])
    lines: list[str] = []
    log = SearchLog(2, 2, lines.append)
    log.asked(0.0)
    for seconds in (400.0, 500.0):
        clock.append(seconds)
        log.answered(0.0, 10)
    log.candidates(0.0, ())
    assert [line.partition(",")[0] for line in lines] == [
        "alpha 0: 1/2 prompts",
        "alpha 0: 2/2 prompts",
    ]
    assert lines[-1].endswith("about 8 min left")
