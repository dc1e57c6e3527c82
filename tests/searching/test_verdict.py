"""Whether to merge at all: the verdict on a search, where it is shown, and the nuclear measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import log
from typing import get_args

import numpy as np
import pytest

from lowmem_adamms.answers import Answer
from lowmem_adamms.errors import SearchError
from lowmem_adamms.reporting.terminal import describe_result
from lowmem_adamms.reporting.view import SearchView
from lowmem_adamms.searching import resampling
from lowmem_adamms.searching.search import choose
from lowmem_adamms.settings import Measure

Table = dict[float, list[Answer]]


def answered(rows: Mapping[float, Sequence[tuple[str, float]]]) -> Table:
    """Answers with their probabilities, at each alpha."""
    return {
        alpha: [Answer(text, (), log(probability)) for text, probability in row]
        for alpha, row in rows.items()
    }


def varied(count: int, probability: float = 1.0, prompts: int = 40) -> list[tuple[str, float]]:
    """So many different answers, in turn."""
    return [(f"answer {i % count}", probability) for i in range(prompts)]


HELPS = answered({0.0: varied(4), 0.1: varied(8), 0.2: varied(20), 0.3: varied(20, 0.5)})


def test_the_nuclear_score_is_that_of_the_matrix_of_prompts_and_answers() -> None:
    rng = np.random.default_rng(0)
    chosen, probabilities = rng.integers(0, 5, 12), rng.random(12)
    matrix = np.zeros((12, 5))
    matrix[np.arange(12), chosen] = probabilities
    row = [(f"answer {n}", p) for n, p in zip(chosen, probabilities, strict=True)]
    result = choose(answered({0.0: row, 0.1: varied(12, prompts=12), 0.2: row}), measure="nuclear")
    scores = [candidate.score for candidate in result.candidates]
    norm = float(np.linalg.norm(matrix, "nuc"))
    assert scores == [pytest.approx(100 * (1 - norm / 12)), 0, scores[0]]
    assert (result.alpha, result.noise) == (0.1, None)


def test_its_intervals_are_those_of_drawn_prompts() -> None:
    """Moved to where the score is their mean, for a draw has fewer of the different answers."""
    result = choose(HELPS, measure="nuclear")
    for candidate in result.candidates:
        assert candidate.interval is not None
        assert candidate.score is not None
        low, high = candidate.interval
        assert low < candidate.score < high
    assert result.wins == {0.0: 0, 0.1: 0, 0.2: 1, 0.3: 0}


def test_a_merge_with_surer_and_more_varied_answers_is_one_to_make() -> None:
    result = choose(HELPS)
    assert (result.alpha, result.measure) == (0.2, "relative")
    assert result.verdict is not None
    assert result.verdict.merge
    reason = result.verdict.reason
    # Four answers to ten prompts each: 4 * sqrt(10) of 40; then 20 * sqrt(2)
    assert reason.startswith(
        "The answers become surer or more varied: nuclear D is 68.4 % at alpha 0, 29.3 % at 0.2,"
        " standard error "
    )
    assert result.to_json()["verdict"] == {"merge": True, "reason": reason}
    assert describe_result(result).splitlines()[1] == f"merge: {reason}"
    view = SearchView(result)
    assert view.advice == "Merge at alpha 0.2."
    assert next(view.list_reasons()) == reason


def test_answers_that_grow_less_sure_are_no_reason_not_to_merge() -> None:
    """What has forgotten is sure of its few answers, and less sure of what it learns again."""
    table = answered({0.0: varied(8), 0.1: varied(8, 0.8), 0.2: varied(8)})
    result = choose(table, measure="pairwise")
    assert result.verdict is not None
    assert result.verdict.merge
    assert result.verdict.reason.startswith(
        "No alpha breaks the model, though answers are no surer: nuclear D is 55.3 % at alpha 0,"
    )


@pytest.mark.parametrize(
    ("measure", "rows", "alpha", "reason", "end"),
    [
        (
            "nuclear",
            {0.0: varied(8), 0.1: varied(8, 0.9), 0.2: varied(4)},
            0,
            "The base itself is chosen, by nuclear: nuclear D is 55.3 % at alpha 0.",
            "",
        ),
        (
            None,
            {0.0: varied(8), 0.1: varied(8), 0.2: varied(8)},
            0,
            "No other alpha can be chosen: nuclear D is 55.3 % at alpha 0.",
            "",
        ),
        (
            None,
            {0.0: varied(8), 0.1: varied(9, 0.4), 0.2: varied(30)},
            0,
            "No other alpha can be chosen: nuclear D is 55.3 % at alpha 0.",
            " From alpha 0.1 on they collapse.",
        ),
        (
            None,  # one prompt of 40 has another answer, which many draws are without
            {0.0: varied(8), 0.1: [("new", 1.0), *varied(8, 0.975)[1:]], 0.2: varied(8, 0.4)},
            0.1,
            "The answers are no surer or more varied: nuclear D is 55.3 % at alpha 0, ",
            " From alpha 0.2 on they collapse.",
        ),
    ],
    ids=["the base is surest", "answers stay the same", "all collapse", "one is left"],
)
def test_a_merge_is_advised_against(
    measure: Measure | None,
    rows: dict[float, list[tuple[str, float]]],
    alpha: float,
    reason: str,
    end: str,
) -> None:
    result = choose(answered(rows), measure=measure)
    assert result.alpha == alpha
    assert result.verdict is not None
    assert not result.verdict.merge
    assert result.verdict.reason.startswith(reason)
    assert result.verdict.reason.endswith(end)
    assert describe_result(result).splitlines()[1] == f"do not merge: {result.verdict.reason}"
    assert SearchView(result).advice == "Do not merge."


@pytest.mark.parametrize("measure", get_args(Measure))
def test_nothing_is_chosen_from_a_collapse_on(measure: Measure) -> None:
    """Further on tokens may be as probable again, as where one word is repeated for ever."""
    table = answered(
        {0.0: varied(4), 0.1: varied(8), 0.2: varied(8), 0.3: varied(30, 0.49), 0.4: varied(40),
         0.5: varied(40), 0.6: varied(40)}
    )  # fmt: skip
    table = {
        alpha: [replace(answer, entropy=1 - alpha) for answer in row]
        for alpha, row in table.items()
    }
    result = choose(table, measure=measure)
    assert 0 < result.alpha < 0.3
    note = "From alpha 0.3 on none can be chosen: there the answers collapse. Their tokens are 49%"
    assert sum(each.startswith(note) for each in result.notes) == 1
    assert not any("0.4 cannot" in each for each in result.notes)


@pytest.mark.parametrize("prompts", [40, 3000])
def test_draws_are_made_in_blocks_of_bounded_size(
    prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are the same as in one."""
    table = answered({0.0: varied(4, prompts=prompts), 0.1: varied(9, prompts=prompts)})
    table[0.2] = table[0.1]
    whole = choose(table, measure="nuclear")
    monkeypatch.setattr(resampling, "_COUNTS_HELD", 7 * prompts)
    sizes = [drawn.shape for drawn in resampling._draw_prompts(prompts, 0)]
    assert max(sizes) == (7, prompts)
    assert sum(draws for draws, _ in sizes) == resampling.RESAMPLES
    assert choose(table, measure="nuclear") == whole


@pytest.mark.parametrize(
    "table",
    [
        {alpha: ["a", "b"] for alpha in (0.0, 0.1, 0.2)},
        answered({0.1: varied(4), 0.2: varied(8), 0.3: varied(5)}),
    ],
    ids=["no probabilities", "no alpha 0"],
)
def test_where_answers_do_not_tell_there_is_no_verdict(table: dict[float, list[str]]) -> None:
    result = choose(table)
    assert result.verdict is None
    assert result.to_json()["verdict"] is None
    assert "\n" not in describe_result(result)


def test_answers_without_probabilities_are_scored_by_differences() -> None:
    texts = {alpha: [answer.text for answer in row] for alpha, row in HELPS.items()}
    assert choose(texts).measure == "pairwise"
    with pytest.raises(
        SearchError, match=r"40 of 40 answers at alpha 0\.0 have no log-probability"
    ):
        choose(texts, measure="nuclear")
