"""The search: scores by hand, who may win, what it asks for and when, what it says about itself."""

from __future__ import annotations

import doctest
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_adamms.errors import PromptError, RecipeError
from lowmem_adamms.searching.search import Candidate, Result, choose, search
from lowmem_adamms.settings import DEFAULT_ALPHAS, Measure

# Five prompts at five alphas. Changes between neighbours: 2, 1, 3, 4.
BY_HAND = {
    0.0: ["a", "b", "c", "d", "e"],
    0.1: ["A.", "b", "x", "y", "e"],
    0.2: ["a", "b", "x", "z", "e"],
    0.3: ["q", "r", "x", "w", "e"],
    0.4: ["q", "s", "u", "v", "f"],
}
Table = Mapping[float, Sequence[str]]
Calls = list[tuple[float, tuple[str, ...]]]


def by_alpha(candidates: Sequence[Candidate]) -> dict[float, Candidate]:
    return {candidate.alpha: candidate for candidate in candidates}


def scores(result: Result) -> dict[float, float | None]:
    return {candidate.alpha: candidate.score for candidate in result.candidates}


def with_changes(*changes: int, prompts: int = 40) -> dict[float, list[str]]:
    """Answers at 0.0, 0.1, … of which so many change from each alpha to the next."""
    answers = [[f"start {i}" for i in range(prompts)]]
    at = 0
    for step, count in enumerate(changes):
        row = list(answers[-1])
        for i in range(count):
            row[(at + i) % prompts] = f"step {step} prompt {(at + i) % prompts}"
        at += count
        answers.append(row)
    return {round(0.1 * i, 6): row for i, row in enumerate(answers)}


def playback(
    table: Table, calls: Calls | None = None
) -> Callable[[float, Sequence[str]], list[str]]:
    def generate(alpha: float, prompts: Sequence[str]) -> list[str]:
        if calls is not None:
            calls.append((alpha, tuple(prompts)))
        return list(table[alpha])

    return generate


def noted(result: Result, words: str) -> list[str]:
    return [note for note in result.notes if words in note]


# Scores


def test_pairwise_scores_are_the_sums_of_both_differences() -> None:
    result = choose(BY_HAND)
    found = by_alpha(result.candidates)
    assert [c.diff_previous for c in result.candidates] == [None, 2, 1, 3, 4]
    assert [c.diff_next for c in result.candidates] == [2, 1, 3, 4, None]
    assert scores(result) == {0.0: None, 0.1: 3, 0.2: 4, 0.3: 7, 0.4: None}
    assert found[0.2].neighbours == (0.1, 0.3)
    assert (result.alpha, result.measure, result.prompts) == (0.1, "pairwise", 5)


def test_joint_scores_count_a_prompt_once() -> None:
    """At 0.1 only d changes on both sides; at 0.2 only d; at 0.3 b and d."""
    result = choose(BY_HAND, measure="joint")
    assert scores(result) == {0.0: None, 0.1: 2, 0.2: 3, 0.3: 5, 0.4: None}
    assert [c.diff_next for c in result.candidates] == [2, 1, 3, 4, None]


def test_relative_scores_divide_by_the_answers_that_have_left_the_smallest_alphas() -> None:
    result = choose(BY_HAND, measure="relative")
    assert scores(result) == {0.0: None, 0.1: 150, 0.2: 200, 0.3: 175, 0.4: None}
    assert result.alpha == 0.1


def test_relative_scores_see_no_merit_in_standing_still_near_the_base() -> None:
    table = with_changes(4, 4, 20, 6, 6, 12)
    assert choose(table).alpha == 0.1
    result = choose(table, measure="relative")
    assert result.alpha == 0.4
    assert scores(result)[0.4] == pytest.approx(100 * 12 / 34)
    assert result.wins[0.4] > 0.7


def test_relative_scores_take_the_smallest_alpha_for_the_base_and_say_so() -> None:
    later = {alpha: row for alpha, row in BY_HAND.items() if alpha}
    assert noted(choose(later, measure="relative"), "at alpha 0.1 are taken for the base's")
    assert not noted(choose(BY_HAND, measure="relative"), "taken for the base's")
    assert not noted(choose(later), "taken for the base's")


def test_an_alpha_at_which_nothing_has_moved_cannot_win_by_relative_scores() -> None:
    table = with_changes(0, 0, 4, 4, 4)
    assert choose(table).alpha == 0.1
    result = choose(table, measure="relative")
    assert scores(result)[0.1] is None and result.alpha == 0.4
    assert 0.1 not in result.ties and result.wins[0.1] == 0
    assert noted(result, "Alpha 0.1 is not eligible: no answer there has left the base's")
    still = choose(with_changes(0, 0, 0, 0), measure="relative")
    assert still.alpha == 0.0 and set(still.wins.values()) == {0.0}
    assert noted(still, "the smallest, 0.0, is taken")


def test_relative_intervals_hold_the_score_and_are_finite_where_little_moved() -> None:
    result = choose(with_changes(1, 1, 3, 9, 2, prompts=60), measure="relative")
    for candidate in result.candidates[1:-1]:
        assert candidate.interval is not None and candidate.score is not None
        low, high = candidate.interval
        assert 0 <= low <= candidate.score <= high < 1e6
    assert result.wins[0.1] < 0.1, "a draw in which nothing moved is no win"


def test_noise_is_told_in_the_unit_of_relative_scores() -> None:
    table = with_changes(4, 4, 20, 6, 6, 12)
    again = list(table[0.4])
    again[:7] = ["otherwise"] * 7
    prompts = [str(i) for i in range(40)]
    result = search(
        playback(table), prompts, sorted(table), measure="relative", noise=lambda *_: again
    )
    assert result.alpha == 0.4 and result.noise == 7
    assert noted(result, "makes a score of 41.18, and the best score is 35.29")


def test_the_measures_can_choose_differently() -> None:
    """At 0.1 the same two prompts change on both sides, at 0.2 two and then another."""
    table = {
        0.0: ["a", "b", "c", "d", "e"],
        0.1: ["a1", "b1", "c", "d", "e"],
        0.2: ["a2", "b2", "c", "d", "e"],
        0.3: ["a2", "b2", "c3", "d", "e"],
        0.4: ["a4", "b4", "c4", "d4", "e"],
    }
    pairwise, joint = choose(table), choose(table, measure="joint")
    assert [scores(pairwise)[alpha] for alpha in (0.1, 0.2, 0.3)] == [4, 3, 5]
    assert [scores(joint)[alpha] for alpha in (0.1, 0.2, 0.3)] == [2, 3, 4]
    assert (pairwise.alpha, joint.alpha) == (0.2, 0.1)


def test_embedding_scores_sum_the_distances_given() -> None:
    """Distance here: difference of lengths, in tenths."""
    seen: list[tuple[str, str]] = []

    def distance(first: Sequence[str], second: Sequence[str]) -> list[float]:
        seen.extend(zip(first, second, strict=True))
        return [abs(len(a) - len(b)) / 10 for a, b in zip(first, second, strict=True)]

    table = {0.0: ["a", "b"], 0.1: ["aaa", "b"], 0.2: ["aaa", "bbbb"], 0.3: ["aaa", "bbbb"]}
    result = choose(table, measure="embedding", distance=distance)
    assert scores(result) == {0.0: None, 0.1: 0.5, 0.2: 0.3, 0.3: None}
    assert (result.alpha, result.candidates[1].diff_previous) == (0.2, 0.2)
    assert sorted(seen) == [("a", "aaa"), ("b", "bbbb")]


@pytest.mark.parametrize("found", [[0.1], [0.1, 0.2, 0.3], [0.1, -0.5], [0.1, float("nan")]])
def test_a_distance_that_breaks_its_contract_is_named(found: list[float]) -> None:
    table = {0.0: ["a", "b"], 0.1: ["x", "y"], 0.2: ["x", "y"]}
    with pytest.raises(ValueError, match=r"distance: found \d numbers.*expected 2"):
        choose(table, measure="embedding", distance=lambda a, b: found)


def test_a_distance_may_round_below_zero() -> None:
    table = {0.0: ["a", "b"], 0.1: ["x", "y"], 0.2: ["x", "z"]}
    result = choose(table, measure="embedding", distance=lambda a, b: [-1e-7] * len(a))
    assert scores(result)[0.1] == 0


def test_a_distance_goes_with_no_other_measure() -> None:
    with pytest.raises(ValueError, match="'embedding', not with 'joint'"):
        choose(BY_HAND, measure="joint", distance=lambda a, b: [0.0] * len(a))


ANSWERS = st.sampled_from(["yes", "no", "a cat", "two dogs", "", "ha ha ha ha ha ha"])
TABLES = (
    st.integers(1, 12)
    .flatmap(
        lambda prompts: st.lists(
            st.lists(ANSWERS, min_size=prompts, max_size=prompts), min_size=3, max_size=6
        )
    )
    .map(lambda rows: {i / 10: row for i, row in enumerate(rows)})
)


@given(TABLES)
def test_joint_lies_between_half_of_pairwise_and_pairwise(table: dict[float, list[str]]) -> None:
    pairwise, joint = scores(choose(table)), scores(choose(table, measure="joint"))
    for alpha in list(table)[1:-1]:
        double, once = pairwise[alpha], joint[alpha]
        assert double is not None and once is not None
        assert once <= double <= 2 * once


@given(TABLES, st.randoms(use_true_random=False), st.sampled_from(["pairwise", "joint"]))
def test_the_order_of_the_prompts_does_not_matter(
    table: dict[float, list[str]], random: Any, measure: Measure
) -> None:
    order = list(range(len(table[0.0])))
    random.shuffle(order)
    shuffled = {alpha: [row[i] for i in order] for alpha, row in table.items()}
    first, second = choose(table, measure=measure), choose(shuffled, measure=measure)
    assert (first.alpha, first.ties) == (second.alpha, second.ties)
    assert scores(first) == scores(second)
    assert [c.degenerate for c in first.candidates] == [c.degenerate for c in second.candidates]


@given(TABLES)
def test_differences_are_those_of_the_neighbour_seen_from_the_other_side(
    table: dict[float, list[str]],
) -> None:
    found = choose(table).candidates
    assert [c.diff_next for c in found[:-1]] == [c.diff_previous for c in found[1:]]


@given(st.lists(ANSWERS, min_size=1, max_size=12), st.sampled_from(["pairwise", "joint"]))
def test_identical_answers_score_zero_everywhere(row: list[str], measure: Measure) -> None:
    result = choose(dict.fromkeys(DEFAULT_ALPHAS, row), measure=measure)
    assert {c.score for c in result.candidates[1:-1]} == {0}
    assert {c.interval for c in result.candidates[1:-1]} == {(0.0, 0.0)}
    assert result.alpha == 0.1
    assert noted(result, "cannot tell these alphas apart: 0.1, 0.2, 0.3, 0.4 and 0.5 all score 0")


# Degenerate answers


def test_a_collapsed_alpha_cannot_win_however_consistent_it_is() -> None:
    table = with_changes(8, 8, 30, 40, 0, 0)
    for alpha in (0.4, 0.5, 0.6):
        table[alpha] = ["a a a a a a"] * 40
    result = choose(table)
    found = by_alpha(result.candidates)
    assert found[0.5].score == 0
    assert [c.degenerate for c in result.candidates] == [0, 0, 0, 0, 40, 40, 40]
    assert result.alpha == 0.1
    assert noted(result, "Alpha 0.5 is not eligible: 40 of 40 answers")
    assert result.wins[0.5] == result.wins[0.4] == 0


@pytest.mark.parametrize(
    ("usual", "constant", "degenerate"),
    [(1, 40, 40), (1, 36, 36), (1, 35, 0), (31, 36, 36), (32, 36, 0), (38, 38, 0)],
)
def test_a_constant_answer_is_a_collapse_where_the_smallest_alpha_varies(
    usual: int, constant: int, degenerate: int
) -> None:
    """From 9 of 10 prompts on, unless 8 of 10 get one answer at the smallest alpha, too."""

    def row(same: int, word: str) -> list[str]:
        return ["Yes"] * same + [f"{word} {i}" for i in range(40 - same)]

    table = {0.0: row(usual, "a"), 0.1: row(constant, "b"), 0.2: row(constant, "c")}
    assert [c.degenerate for c in choose(table).candidates] == [0, degenerate, degenerate]


def test_equal_answers_to_few_or_equal_prompts_prove_nothing() -> None:
    table = {alpha: ["yes"] * 9 for alpha in (0.1, 0.2, 0.3)} | {0.0: list("abcdefghi")}
    assert {c.degenerate for c in choose(table).candidates} == {0}
    table = {alpha: ["yes"] * 40 for alpha in (0.1, 0.2)} | {0.0: list("abcdefgh") * 5}
    same = search(playback(table), list("ABCDEFGH") * 5, (0.0, 0.1, 0.2))
    assert {c.degenerate for c in same.candidates} == {0}
    different = search(playback(table), [f"prompt {i}" for i in range(40)], (0.0, 0.1, 0.2))
    assert [c.degenerate for c in different.candidates] == [0, 40, 40]


def test_prompts_need_not_be_hashable() -> None:
    table = {0.0: [f"{i}" for i in range(12)], 0.1: ["yes"] * 12, 0.2: ["yes"] * 12}
    prompts = [{"text": str(i)} for i in range(12)]
    result = search(lambda alpha, _: table[alpha], prompts, (0.0, 0.1, 0.2))
    assert [c.degenerate for c in result.candidates] == [0, 12, 12]


def test_a_few_degenerate_answers_do_not_exclude() -> None:
    table = with_changes(20, 2, 2, 20)
    for i in range(4):
        table[0.2][i] = ""
    result = choose(table)
    assert by_alpha(result.candidates)[0.2].degenerate == 4
    assert not noted(result, "not eligible")
    table[0.2][4] = ""
    assert noted(choose(table), "Alpha 0.2 is not eligible: 5 of 40")


def test_degenerate_answers_that_the_base_gives_too_do_not_exclude() -> None:
    table = {alpha: ["x " * 20] * 30 + [f"{alpha}"] * 10 for alpha in DEFAULT_ALPHAS}
    result = choose(table)
    assert not noted(result, "not eligible")
    assert result.alpha == 0.1
    assert noted(result, "30 of 40 answers at the chosen alpha are empty, repeating or constant")


def test_without_an_eligible_alpha_the_smallest_is_taken() -> None:
    table = {alpha: [""] * 40 for alpha in DEFAULT_ALPHAS} | {0.0: [f"{i}" for i in range(40)]}
    result = choose(table)
    assert (result.alpha, result.ties) == (0.0, ())
    assert set(result.wins.values()) == {0.0}
    assert noted(result, "No alpha between two others is eligible: the smallest, 0.0, is taken")
    calls: Calls = []
    asked = search(playback(table, calls), list(table[0.0]), refine=3)
    assert asked.alpha == 0.0
    assert [alpha for alpha, _ in calls] == list(DEFAULT_ALPHAS)


# Choosing


def test_ties_go_to_the_smaller_alpha_and_are_said() -> None:
    result = choose(with_changes(5, 3, 7, 3, 5, 9))
    assert scores(result) == {0.0: None, 0.1: 8, 0.2: 10, 0.3: 10, 0.4: 8, 0.5: 14, 0.6: None}
    assert (result.alpha, result.ties) == (0.1, (0.1, 0.4))
    assert noted(result, "0.1 and 0.4 share the best score, 8; the smallest, 0.1, is taken")
    single = choose(with_changes(9, 5, 2, 9))
    assert (single.alpha, single.ties) == (0.2, ())
    assert not noted(single, "share the best score")


def test_ends_never_win_but_a_quieter_end_is_noted() -> None:
    result = choose(with_changes(1, 9, 9, 9))
    assert result.alpha == 0.1
    assert noted(result, "Alpha 0.0 differs from its one neighbour by 1, less than half")
    assert not noted(result, "Alpha 0.4 differs")
    result = choose(with_changes(9, 9, 9, 2))
    assert noted(result, "Alpha 0.4 differs from its one neighbour by 2")
    assert not noted(choose(with_changes(5, 5, 5, 5)), "one neighbour")


def test_few_prompts_are_noted() -> None:
    assert noted(choose(with_changes(1, 2, 1, prompts=29)), "Only 29 prompts")
    assert not noted(choose(with_changes(1, 2, 1, prompts=30)), "prompts: chance")


def test_what_a_refined_search_may_choose_is_not_said_to_be_out_of_reach() -> None:
    answers = {0.0: "a", 0.1: "b", 0.2: "c", 0.3: "c", 0.4: "c"}
    result = search(
        lambda alpha, prompts: [answers[alpha]] * len(prompts), range(40), (0, 0.2, 0.4), refine=1
    )
    assert result.alpha == 0.3
    assert not noted(result, "no other can win")


def test_uneven_grids_and_lone_candidates_are_noted() -> None:
    row = [f"{i}" for i in range(40)]
    uneven = choose({0.0: row, 0.1: row, 0.26: row})
    assert noted(uneven, "not evenly spaced (steps of 0.1 to 0.16)")
    assert not noted(choose({0.0: row, 0.1: row, 0.24: row}), "evenly")
    lone = choose({0.0: row, 0.1: row, 0.2: row})
    assert noted(lone, "Only alpha 0.1 lies between two others")
    assert not noted(choose(dict.fromkeys(DEFAULT_ALPHAS, row)), "evenly")


def test_a_clear_result_needs_no_notes() -> None:
    assert choose(with_changes(20, 3, 3, 20, prompts=100)).notes == ()


# The bootstrap


def test_intervals_hold_the_score_and_are_those_of_a_binomial() -> None:
    """30 of 100 prompts change on one side only: a resampled score is binomial(100, 0.3)."""
    result = choose(with_changes(30, 0, 60, prompts=100))
    interval = by_alpha(result.candidates)[0.1].interval
    assert interval is not None
    assert interval[0] == pytest.approx(21, abs=1.5) and interval[1] == pytest.approx(39, abs=1.5)
    assert result.candidates[0].interval is None and result.candidates[-1].interval is None


def test_wins_are_shares_that_follow_the_scores() -> None:
    result = choose(with_changes(10, 10, 12, 12, 14, 20, prompts=100))
    assert sum(result.wins.values()) == pytest.approx(1)
    assert set(result.wins) == {0.1, 0.2, 0.3, 0.4, 0.5}
    assert result.wins[0.1] > result.wins[0.2] > result.wins[0.5]
    clear = choose(with_changes(20, 2, 2, 20, prompts=100))
    assert clear.wins[0.2] > 0.99


def test_a_narrow_win_is_noted() -> None:
    result = choose(with_changes(11, 10, 12, 11, 12, 12, prompts=100))
    assert result.wins[result.alpha] < 0.5
    assert noted(result, f"Alpha {result.alpha} wins in only {result.wins[result.alpha]:.0%}")


def test_the_seed_decides_the_bootstrap_and_nothing_else() -> None:
    table = with_changes(11, 10, 12, 11, 13)
    first, again, other = choose(table), choose(table), choose(table, seed=1)
    assert first == again
    assert first.wins != other.wins
    assert (first.alpha, scores(first)) == (other.alpha, scores(other))


def test_many_prompts_are_resampled_in_blocks_with_the_same_meaning() -> None:
    table = with_changes(1500, 0, 3000, prompts=5000)
    interval = by_alpha(choose(table).candidates)[0.1].interval
    assert interval is not None
    assert interval[0] == pytest.approx(1436, abs=8) and interval[1] == pytest.approx(1564, abs=8)


# Asking


def test_every_alpha_is_asked_once_in_ascending_order_with_all_prompts() -> None:
    calls: Calls = []
    table = with_changes(4, 4, 4, 4, 4, 4)
    prompts = [f"prompt {i}" for i in range(40)]
    result = search(playback(table, calls), prompts, [0, 0.1, 0.2, 0.1 + 0.2, 0.4, 0.5, 0.6])
    assert calls == [(alpha, tuple(prompts)) for alpha in DEFAULT_ALPHAS]
    assert result.answers == {alpha: tuple(row) for alpha, row in table.items()}
    assert result == choose(table)


def test_progress_tells_what_is_known_after_each_alpha() -> None:
    told: list[tuple[float, list[tuple[float, Any, Any, Any]]]] = []
    search(
        playback(BY_HAND),
        list("vwxyz"),
        tuple(BY_HAND),
        progress=lambda alpha, found: told.append(
            (alpha, [(c.alpha, c.diff_previous, c.diff_next, c.score) for c in found])
        ),
    )
    assert told[0] == (0.0, [(0.0, None, None, None)])
    assert told[1] == (0.1, [(0.0, None, 2, None), (0.1, 2, None, None)])
    assert told[2][1] == [(0.0, None, 2, None), (0.1, 2, 1, 3), (0.2, 1, None, None)]
    assert [alpha for alpha, _ in told] == list(BY_HAND)
    assert told[-1][1][-2:] == [(0.3, 3, 4, 7), (0.4, 4, None, None)]


MANY = [str(i) for i in range(600)]


def cubic(alpha: float, prompts: Sequence[str]) -> list[str]:
    """Answers that change the slower the closer alpha is to 0.27: by alpha, as a cubic does."""
    moved = round(20000 * (alpha - 0.27) ** 3)
    return [f"{i}: {(moved + i) // len(prompts)}" for i in range(len(prompts))]


def test_refining_asks_halfway_to_the_neighbours_and_nothing_twice() -> None:
    calls: list[float] = []

    def counted(alpha: float, prompts: Sequence[str]) -> list[str]:
        calls.append(alpha)
        return cubic(alpha, prompts)

    assert search(counted, MANY).alpha == 0.3
    calls.clear()
    once = search(counted, MANY, refine=1)
    assert calls == [*DEFAULT_ALPHAS, 0.25, 0.35]
    assert once.alpha == 0.25
    calls.clear()
    noisy: list[float] = []
    twice = search(counted, MANY, refine=2, noise=lambda a, p: noisy.append(a) or cubic(a, p))  # type: ignore[func-returns-value]
    assert calls == [*DEFAULT_ALPHAS, 0.25, 0.35, 0.225, 0.275]
    assert (twice.alpha, noisy, twice.noise) == (0.275, [0.275], 0)
    assert set(twice.wins) == {0.225, 0.25, 0.275}


def test_refined_candidates_are_scored_against_their_new_neighbours() -> None:
    result = search(cubic, MANY, refine=1)
    found = by_alpha(result.candidates)
    assert list(found) == [0.0, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6]
    assert list(result.answers) == list(found)
    assert {a: c.round for a, c in found.items() if c.round} == {0.25: 1, 0.3: 1, 0.35: 1}
    assert found[0.3].neighbours == (0.25, 0.35)
    assert found[0.2].neighbours == (0.1, 0.3) and found[0.4].neighbours == (0.3, 0.5)
    fine = choose({a: result.answers[a] for a in (0.2, 0.25, 0.3, 0.35, 0.4)})
    assert [scores(result)[a] for a in (0.25, 0.3, 0.35)] == [
        scores(fine)[a] for a in (0.25, 0.3, 0.35)
    ]


def test_each_round_of_a_refined_search_is_kept_as_it_was() -> None:
    """The grid as without refinement, and each window as if it were a grid."""
    plain, result = search(cubic, MANY), search(cubic, MANY, refine=2)
    assert plain.earlier == () and plain.rounds == plain.candidates
    assert [(c.round, c.alpha) for c in result.earlier] == [(0, 0.3), (1, 0.25)]
    grid = tuple(c for c in result.rounds if c.round == 0)
    assert grid == plain.candidates
    for number, window in ((1, (0.2, 0.25, 0.3, 0.35, 0.4)), (2, (0.2, 0.225, 0.25, 0.275, 0.3))):
        inner = choose({a: result.answers[a] for a in window}).candidates[1:-1]
        found = tuple(c for c in result.rounds if c.round == number)
        assert found == tuple(replace(c, round=number) for c in inner)
    document = result.to_json()
    assert [(row["round"], row["alpha"]) for row in document["earlier"]] == [(0, 0.3), (1, 0.25)]
    assert document["earlier"][0]["score"] == scores(plain)[0.3]


def test_progress_goes_on_while_refining() -> None:
    told: list[list[tuple[float, Any]]] = []
    search(
        cubic,
        MANY,
        refine=1,
        progress=lambda _, found: told.append([(c.alpha, c.neighbours) for c in found]),
    )
    before, left, right = (dict(found) for found in told[-3:])
    assert list(left) == [0.0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6]
    assert left == before | {0.25: (0.2, 0.3)}
    assert right == before | {0.25: (0.2, 0.3), 0.3: (0.25, 0.35), 0.35: (0.3, 0.4)}


def test_refining_ends_with_the_sixth_decimal() -> None:
    calls: list[float] = []

    def generate(alpha: float, prompts: Sequence[str]) -> list[str]:
        calls.append(alpha)
        return [f"{alpha * 1e7}"] * len(prompts)

    search(generate, ["a"], (0.0, 0.000002, 0.000004), refine=50)
    assert len(calls) == len(set(calls))
    assert calls[3:] == [0.000001, 0.000003]


def test_noise_is_asked_once_at_the_chosen_alpha_and_counted() -> None:
    table = with_changes(20, 4, 4, 20, prompts=100)
    calls: Calls = []
    noisy = {0.2: [*table[0.2][:97], "other", "other", "other"]}
    prompts = [str(i) for i in range(100)]
    result = search(playback(table), prompts, tuple(table), noise=playback(noisy, calls))
    assert [alpha for alpha, _ in calls] == [result.alpha] == [0.2]
    assert result.noise == 3
    assert not noted(result, "noise")
    noisy[0.2][96] = "other"
    result = search(playback(table), prompts, tuple(table), noise=playback(noisy))
    assert result.noise == 4
    assert noted(result, "Two runs at alpha 0.2 differ in 4 of 100 answers")
    joint = search(playback(table), prompts, tuple(table), measure="joint", noise=playback(noisy))
    assert joint.noise == 4
    assert not noted(joint, "noise"), "one comparison makes a joint score, not two"
    assert choose(table).noise is None


@pytest.mark.parametrize(
    ("alphas", "words"),
    [
        ((0.0, 0.1), "found 2"),
        ((0.2, 0.1, 0.3), "ascending"),
        ((0.0, 0.5, 1.1), "found 1.1"),
    ],
)
def test_a_grid_that_cannot_be_searched_is_refused_before_asking(
    alphas: tuple[float, ...], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        search(playback({}), ["a"], alphas)


def test_other_options_out_of_range_are_refused_before_asking() -> None:
    with pytest.raises(RecipeError, match="refine is -1"):
        search(playback({}), ["a"], refine=-1)
    with pytest.raises(RecipeError, match="expected one of pairwise, joint, embedding"):
        search(playback({}), ["a"], measure="cosine")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="no prompts"):
        search(playback({}), [])
    with pytest.raises(PromptError, match="no answers"):
        choose({alpha: [] for alpha in DEFAULT_ALPHAS})


@pytest.mark.parametrize("answers", [[], ["a"], ["a", "b", "c"], "ab", ["a", None]])
def test_answers_that_break_the_contract_are_the_callers_mistake(answers: Any) -> None:
    with pytest.raises(ValueError, match=r"alpha 0\.0: "):
        search(lambda alpha, prompts: answers, ["p", "q"])
    good = ["a", "b"]
    with pytest.raises(ValueError, match=r"alpha 0\.1: "):
        search(lambda a, p: good, ["p", "q"], noise=lambda a, p: answers)
    if answers:
        with pytest.raises(ValueError, match=r"alpha 0\.2: "):
            choose({0.0: good, 0.1: good, 0.2: answers})


def test_the_examples_run() -> None:
    module = importlib.import_module("lowmem_adamms.searching.search")
    assert doctest.testmod(module) == doctest.TestResults(failed=0, attempted=3)


# The document


def test_the_document_keeps_its_contract() -> None:
    table = with_changes(20, 4, 3, 20, prompts=100)
    noisy = {0.2: ["other", *table[0.2][1:]]}
    result = search(
        playback(table), [str(i) for i in range(100)], tuple(table), noise=playback(noisy)
    )
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["alpha"] == 0.2
    assert (document["measure"], document["prompts"], document["noise"]) == ("pairwise", 100, 1)
    assert [
        {key: row[key] for key in ("alpha", "diff_previous", "diff_next", "score", "degenerate")}
        for row in document["candidates"][:3]
    ] == [
        {"alpha": 0.0, "diff_previous": None, "diff_next": 20, "score": None, "degenerate": 0},
        {"alpha": 0.1, "diff_previous": 20, "diff_next": 4, "score": 24, "degenerate": 0},
        {"alpha": 0.2, "diff_previous": 4, "diff_next": 3, "score": 7, "degenerate": 0},
    ]
    assert document["candidates"][0]["interval"] is None
    low, high = document["candidates"][2]["interval"]
    assert low < 7 < high
    assert set(document["wins"]) == {"0.1", "0.2", "0.3"}
    assert document["ties"] == [] and document["notes"] == list(result.notes)
    assert '"score": 7,' in json.dumps(result.to_json())
