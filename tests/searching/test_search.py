"""The search: scores by hand, who may win, what it asks for and when, what it says about itself."""

from __future__ import annotations

import doctest
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_adamms.answers import Answer
from lowmem_adamms.errors import PromptError, RecipeError, SearchError
from lowmem_adamms.prompts import Prompt
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
Table = Mapping[float, Sequence[str] | Sequence[Answer]]


class Playback:
    """Answers from a table, and what it was asked for."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.calls: list[tuple[float, tuple[Any, ...]]] = []

    def __call__(self, alpha: float, prompts: Sequence[Any]) -> list[str | Answer]:
        self.calls.append((alpha, tuple(prompts)))
        return list(self.table[alpha])


def search_table(table: Table, **options: Any) -> Result:
    """Search with as many prompts as the table has answers."""
    return search(Playback(table), range(len(next(iter(table.values())))), tuple(table), **options)


def by_alpha(candidates: Sequence[Candidate]) -> dict[float, Candidate]:
    return {candidate.alpha: candidate for candidate in candidates}


def scores(result: Result) -> dict[float, float | None]:
    return {candidate.alpha: candidate.score for candidate in result.candidates}


def degenerate(result: Result) -> list[int]:
    return [candidate.degenerate for candidate in result.candidates]


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


def is_noted(result: Result, words: str) -> bool:
    return any(words in note for note in result.notes)


# Scores


@pytest.mark.parametrize(
    ("measure", "expected"),
    [("pairwise", [3, 4, 7]), ("joint", [2, 3, 5]), ("relative", [150, 200, 175])],
)
def test_scores_by_hand(measure: Measure, expected: list[float]) -> None:
    """Joint: d alone changes on both sides of 0.1 and of 0.2, b and d of 0.3."""
    result = choose(BY_HAND, measure=measure)
    assert list(scores(result).values()) == [None, *expected, None]
    assert [c.diff_previous for c in result.candidates] == [None, 2, 1, 3, 4]
    assert [c.diff_next for c in result.candidates] == [2, 1, 3, 4, None]
    assert result.candidates[2].neighbours == (0.1, 0.3)
    assert (result.alpha, result.measure, result.prompts) == (0.1, measure, 5)


def test_relative_scores_see_no_merit_in_standing_still_near_the_base() -> None:
    table = with_changes(4, 4, 20, 6, 6, 12)
    assert choose(table).alpha == 0.1
    again = [*["otherwise"] * 7, *table[0.4][7:]]
    result = search_table(table, measure="relative", noise=lambda *_: again)
    assert (result.alpha, result.noise) == (0.4, 7)
    assert scores(result)[0.4] == pytest.approx(100 * 12 / 34)
    assert result.wins[0.4] > 0.7
    assert is_noted(result, "makes a D of 41.18, and the best D is 35.29")


def test_relative_scores_take_the_smallest_alpha_for_the_base_and_say_so() -> None:
    later = {alpha: row for alpha, row in BY_HAND.items() if alpha}
    assert is_noted(choose(later, measure="relative"), "at alpha 0.1 are taken for the base's")
    assert not is_noted(choose(BY_HAND, measure="relative"), "taken for the base's")
    assert not is_noted(choose(later), "taken for the base's")


def test_an_alpha_at_which_nothing_has_moved_cannot_win_by_relative_scores() -> None:
    table = with_changes(0, 0, 4, 4, 4)
    assert choose(table).alpha == 0.1
    result = choose(table, measure="relative")
    assert scores(result)[0.1] is None and result.alpha == 0.4
    assert 0.1 not in result.ties and result.wins[0.1] == 0
    assert is_noted(result, "Alpha 0.1 cannot be chosen: its answers are still the base's")
    still = choose(with_changes(0, 0, 0, 0), measure="relative")
    assert still.alpha == 0.0 and set(still.wins.values()) == {0.0}


def test_relative_intervals_hold_the_score_and_are_finite_where_little_moved() -> None:
    result = choose(with_changes(1, 1, 3, 9, 2, prompts=60), measure="relative")
    for candidate in result.candidates[1:-1]:
        assert candidate.interval is not None and candidate.score is not None
        low, high = candidate.interval
        assert 0 <= low <= candidate.score <= high < 1e6
    assert result.wins[0.1] < 0.1, "a draw in which nothing moved is no win"


# How sure the model is


def with_entropies(*means: float, prompts: int = 40) -> dict[float, list[Answer]]:
    """Answers at 0.0, 0.1, … with entropies around such a mean; each differs from all others."""
    return {
        round(0.1 * i, 6): [
            Answer(f"alpha {i} prompt {place}", (place,), -mean / 2, mean + 0.01 * (place % 3 - 1))
            for place in range(prompts - prompts % 3)
        ]
        for i, mean in enumerate(means)
    }


def test_entropy_takes_the_alpha_at_which_the_model_is_surest() -> None:
    result = choose(with_entropies(0.5, 0.4, 0.3, 0.35, 0.45), measure="entropy")
    assert (result.alpha, result.measure, result.ties) == (0.2, "entropy", ())
    assert list(scores(result).values()) == pytest.approx([0.5, 0.4, 0.3, 0.35, 0.45])
    assert [c.entropy for c in result.candidates] == list(scores(result).values())
    assert [c.log_probability for c in result.candidates] == pytest.approx(
        [-0.25, -0.2, -0.15, -0.175, -0.225]
    )
    assert [c.diff_next for c in result.candidates] == [39, 39, 39, 39, None]
    assert set(result.wins) == set(scores(result)) and result.wins[0.2] == 1
    for candidate in result.candidates:
        assert candidate.interval is not None and candidate.score is not None
        low, high = candidate.interval
        assert low < candidate.score < high < low + 0.02
    assert result.notes == ()


@pytest.mark.parametrize(
    ("means", "alpha", "noted"),
    [
        ((0.2, 0.3, 0.4, 0.5), 0.0, None),
        ((0.5, 0.4, 0.3, 0.2), 0.3, "Alpha 0.3 is the largest of the grid; one beyond it may"),
        ((0.5, 0.3, 0.3, 0.5), 0.1, "0.1 and 0.2 share the best score, 0.3; the smallest"),
    ],
)
def test_by_entropy_the_ends_of_a_grid_may_win(
    means: Sequence[float], alpha: float, noted: str | None
) -> None:
    """Without a word about neighbours; refining ends where the best alpha has but one."""
    table = Playback(with_entropies(*means))
    result = search(table, range(39), tuple(table.table), measure="entropy")
    assert result.alpha == alpha
    assert all(noted and noted in note for note in result.notes), result.notes
    assert bool(result.notes) == bool(noted)
    if alpha in (0.0, 0.3):
        refined = search(table, range(39), tuple(table.table), measure="entropy", refine=2)
        assert refined == result


def test_no_note_about_neighbours_is_made_by_entropy() -> None:
    """Of a short, uneven grid that does not begin with the base."""
    one, two, three, _ = with_entropies(0.3, 0.2, 0.4, 0.5).values()
    result = choose({0.1: one, 0.2: two, 0.6: three}, measure="entropy")
    assert (result.alpha, result.notes) == (0.2, ())
    result = choose({0.1: one, 0.2: three, 1.0: two}, measure="entropy")
    assert (result.alpha, result.notes) == (1.0, ()), "nothing lies beyond 1"


def test_entropy_refines_around_a_best_alpha_between_two_others() -> None:
    asked: list[float] = []

    def generate(alpha: float, prompts: Sequence[int]) -> list[Answer]:
        asked.append(alpha)
        return [Answer("x" * i, entropy=(alpha - 0.27) ** 2) for i in prompts]

    result = search(generate, range(40), measure="entropy", refine=2, noise=generate)
    assert asked == [*DEFAULT_ALPHAS, 0.25, 0.35, 0.225, 0.275], "and no second time, for noise"
    assert (result.alpha, result.noise) == (0.275, None)


def test_degenerate_answers_cannot_win_however_sure_the_model_is() -> None:
    table = with_entropies(0.5, 0.4, 0.3, 0.1)
    table[0.3] = [replace(answer, text="no " * 20) for answer in table[0.3]]
    result = choose(table, measure="entropy")
    assert (result.alpha, result.wins[0.3]) == (0.2, 0)
    assert scores(result)[0.3] == pytest.approx(0.1)
    assert is_noted(result, "Alpha 0.3 cannot be chosen: 39 of 39 answers are empty")
    usual = {
        alpha: [replace(answer, text="no " * 20) for answer in answers]
        for alpha, answers in table.items()
    }
    assert is_noted(choose(usual, measure="entropy"), "39 at alpha 0.0: that they are sure says")


def test_an_alpha_with_an_answer_of_unknown_entropy_cannot_win() -> None:
    """As of a model whose logits are NaN at this alpha."""
    table = with_entropies(0.5, 0.4, 0.1, 0.3)
    table[0.2][3] = replace(table[0.2][3], entropy=None)
    result = choose(table, measure="entropy")
    assert (result.alpha, scores(result)[0.2]) == (0.3, None)
    assert is_noted(result, "Alpha 0.2 cannot be chosen: 1 of 39 answers have no entropy.")
    assert not is_noted(choose(table, measure="pairwise"), "entropy")


@pytest.mark.parametrize("how", [search_table, choose])
def test_answers_without_entropy_are_refused_by_entropy(how: Any) -> None:
    table: dict[float, Any] = dict(with_changes(1, 1, 1, prompts=9))
    with pytest.raises(SearchError, match=r"9 of 9 answers at alpha 0\.0 have no entropy: vLLM"):
        how(table, measure="entropy")
    table = dict(with_entropies(0.3, 0.2, 0.1))
    table[0.0][1] = "a string"
    with pytest.raises(SearchError, match=r"1 of 39 answers .* another measure than entropy"):
        how(table, measure="entropy")


@pytest.mark.parametrize("measure", ["pairwise", "joint", "relative"])
def test_confidences_are_reported_by_any_measure(measure: Measure) -> None:
    table = with_entropies(0.3, 0.2, 0.4)
    table[0.1][5] = replace(table[0.1][5], log_probability=None)
    (_, second, third) = choose(table, measure=measure).candidates
    assert second.entropy == pytest.approx(0.2) and second.log_probability is None
    assert (third.entropy, third.log_probability) == pytest.approx((0.4, -0.2))
    texts = {alpha: [answer.text for answer in answers] for alpha, answers in table.items()}
    plain = choose(texts, measure=measure)
    assert (
        plain.answers
        == choose(table, measure=measure).answers
        == {alpha: tuple(row) for alpha, row in texts.items()}
    )
    assert {(c.entropy, c.log_probability) for c in plain.candidates} == {(None, None)}


ANSWERS = st.sampled_from(["yes", "no", "a cat", "two dogs", "", "ha ha ha ha ha ha"])
ROWS = st.integers(1, 12).flatmap(
    lambda count: st.lists(
        st.lists(ANSWERS, min_size=count, max_size=count), min_size=3, max_size=6
    )
)


@given(ROWS, st.randoms(use_true_random=False), st.sampled_from(["pairwise", "joint"]))
def test_the_order_of_the_prompts_does_not_matter(
    rows: list[list[str]], random: Any, measure: Measure
) -> None:
    order = list(range(len(rows[0])))
    random.shuffle(order)
    first = choose({i / 10: row for i, row in enumerate(rows)}, measure=measure)
    second = choose(
        {i / 10: [row[place] for place in order] for i, row in enumerate(rows)}, measure=measure
    )
    assert (first.alpha, first.ties) == (second.alpha, second.ties)
    assert scores(first) == scores(second) and degenerate(first) == degenerate(second)


@given(st.lists(ANSWERS, min_size=1, max_size=12), st.sampled_from(["pairwise", "joint"]))
def test_identical_answers_score_zero_everywhere(row: list[str], measure: Measure) -> None:
    result = choose(dict.fromkeys(DEFAULT_ALPHAS, row), measure=measure)
    assert {(c.score, c.interval) for c in result.candidates[1:-1]} == {(0, (0.0, 0.0))}
    assert result.alpha == 0.1
    assert is_noted(result, "cannot tell these alphas apart: 0.1, 0.2, 0.3, 0.4 and 0.5 all score")


# Degenerate answers


def test_a_collapsed_alpha_cannot_win_however_consistent_it_is() -> None:
    table = with_changes(8, 8, 30, 40, 0, 0)
    for alpha in (0.4, 0.5, 0.6):
        table[alpha] = ["a a a a a a"] * 40
    result = choose(table)
    assert scores(result)[0.5] == 0
    assert degenerate(result) == [0, 0, 0, 0, 40, 40, 40]
    assert result.alpha == 0.1
    assert is_noted(result, "Alpha 0.5 cannot be chosen: 40 of 40 answers")
    assert result.wins[0.5] == result.wins[0.4] == 0


@pytest.mark.parametrize(
    ("usual", "constant", "expected"),
    [(1, 40, 40), (1, 36, 36), (1, 35, 0), (31, 36, 36), (32, 36, 0), (38, 38, 0)],
)
def test_a_constant_answer_is_a_collapse_where_the_smallest_alpha_varies(
    usual: int, constant: int, expected: int
) -> None:
    """From 9 of 10 prompts on, unless 8 of 10 get one answer at the smallest alpha, too."""

    def row(same: int, word: str) -> list[str]:
        return ["Yes"] * same + [f"{word} {i}" for i in range(40 - same)]

    table = {0.0: row(usual, "a"), 0.1: row(constant, "b"), 0.2: row(constant, "c")}
    assert degenerate(choose(table)) == [0, expected, expected]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (range(9), 0),
        (list("ABCDEFGH") * 5, 0),
        (range(40), 40),
        ([{"not": "hashable"}] * 40, 40),
    ],
)
def test_equal_answers_to_few_or_equal_prompts_prove_nothing(
    prompts: Sequence[Any], expected: int
) -> None:
    yes = ["yes"] * len(prompts)
    table = Playback({0.0: [f"{i}" for i in range(len(prompts))], 0.1: yes, 0.2: yes})
    assert degenerate(search(table, prompts, (0.0, 0.1, 0.2))) == [0, expected, expected]


def test_a_few_degenerate_answers_do_not_exclude() -> None:
    table = with_changes(20, 2, 2, 20)
    table[0.2][:4] = [""] * 4
    result = choose(table)
    assert by_alpha(result.candidates)[0.2].degenerate == 4
    assert not is_noted(result, "cannot be chosen:")
    table[0.2][4] = ""
    assert is_noted(choose(table), "Alpha 0.2 cannot be chosen: 5 of 40")


def test_degenerate_answers_that_the_base_gives_too_do_not_exclude() -> None:
    result = choose({alpha: ["x " * 20] * 30 + [f"{alpha}"] * 10 for alpha in DEFAULT_ALPHAS})
    assert not is_noted(result, "cannot be chosen:")
    assert result.alpha == 0.1
    assert is_noted(
        result, "30 of 40 answers at the chosen alpha are empty, repeating or all the same"
    )


def test_without_an_eligible_alpha_the_smallest_is_taken() -> None:
    table = {alpha: [""] * 40 for alpha in DEFAULT_ALPHAS} | {0.0: [f"{i}" for i in range(40)]}
    generate = Playback(table)
    result = search(generate, range(40), refine=3)
    assert (result.alpha, result.ties) == (0.0, ())
    assert set(result.wins.values()) == {0.0}
    assert is_noted(
        result, "No alpha between two others can be chosen, so 0.0, the smallest, is taken"
    )
    assert [alpha for alpha, _ in generate.calls] == list(DEFAULT_ALPHAS)


# Choosing


def test_ties_go_to_the_smaller_alpha_and_are_said() -> None:
    result = choose(with_changes(5, 3, 7, 3, 5, 9))
    assert scores(result) == {0.0: None, 0.1: 8, 0.2: 10, 0.3: 10, 0.4: 8, 0.5: 14, 0.6: None}
    assert (result.alpha, result.ties) == (0.1, (0.1, 0.4))
    assert is_noted(result, "0.1 and 0.4 share the best score, 8; the smallest, 0.1, is taken")
    single = choose(with_changes(9, 5, 2, 9))
    assert (single.alpha, single.ties) == (0.2, ())


def test_ends_never_win_but_a_quieter_end_is_noted() -> None:
    result = choose(with_changes(1, 9, 9, 9))
    assert result.alpha == 0.1
    assert is_noted(result, "Alpha 0.0 differs from its only neighbour by 1, less than half")
    assert not is_noted(result, "Alpha 0.4 differs")
    result = choose(with_changes(9, 9, 9, 2))
    assert is_noted(result, "Alpha 0.4 differs from its only neighbour by 2")
    assert not is_noted(choose(with_changes(5, 5, 5, 5)), "only neighbour")


@pytest.mark.parametrize(
    ("table", "words", "expected"),
    [
        (with_changes(1, 1, 1, prompts=1), "Only 1 prompt:", True),
        (with_changes(1, 2, 1, prompts=29), "Only 29 prompts", True),
        (with_changes(1, 2, 1, prompts=30), "Only 30 prompts", False),
        ({0.0: "a", 0.1: "a", 0.26: "a"}, "not evenly spaced (steps of 0.1 to 0.16)", True),
        ({0.0: "a", 0.1: "a", 0.24: "a"}, "evenly spaced", False),
        ({0.0: "a", 0.1: "a", 0.2: "a"}, "Only alpha 0.1 lies between", True),
        ({0.0: "a", 0.1: "a", 0.2: "a", 0.3: "a"}, "lies between", False),
    ],
)
def test_few_prompts_and_odd_grids_are_noted(table: Table, words: str, expected: bool) -> None:
    result = choose({alpha: list(answers) for alpha, answers in table.items()})
    assert is_noted(result, words) == expected


def test_what_a_refined_search_may_choose_is_not_said_to_be_out_of_reach() -> None:
    answers = {0.0: "a", 0.1: "b", 0.2: "c", 0.3: "c", 0.4: "c"}
    table = Playback({alpha: [answer] * 40 for alpha, answer in answers.items()})
    result = search(table, range(40), (0, 0.2, 0.4), refine=1)
    assert result.alpha == 0.3
    assert not is_noted(result, "no other can be chosen")


def test_a_clear_result_needs_no_notes() -> None:
    assert choose(with_changes(20, 3, 3, 20, prompts=100)).notes == ()


# The bootstrap


@pytest.mark.parametrize(
    ("prompts", "low", "high", "error"), [(100, 21, 39, 1.5), (5000, 1436, 1564, 8)]
)
def test_intervals_are_those_of_a_binomial(
    prompts: int, low: float, high: float, error: float
) -> None:
    """30 % of the prompts change, on one side only; many prompts are resampled in blocks."""
    result = choose(with_changes(prompts * 3 // 10, 0, prompts * 6 // 10, prompts=prompts))
    first, inner, _, last = (candidate.interval for candidate in result.candidates)
    assert inner == pytest.approx((low, high), abs=error)
    assert first is None and last is None


def test_wins_are_shares_that_follow_the_scores() -> None:
    result = choose(with_changes(10, 10, 12, 12, 14, 20, prompts=100))
    assert sum(result.wins.values()) == pytest.approx(1)
    assert set(result.wins) == {0.1, 0.2, 0.3, 0.4, 0.5}
    assert result.wins[0.1] > result.wins[0.2] > result.wins[0.5]
    clear = choose(with_changes(20, 2, 2, 20, prompts=100))
    assert clear.wins[0.2] > 0.99
    narrow = choose(with_changes(11, 10, 12, 11, 12, 12, prompts=100))
    share = narrow.wins[narrow.alpha]
    assert share < 0.5
    assert is_noted(narrow, f"alpha {narrow.alpha} has the lowest D in only {share:.0%}")


def test_the_seed_decides_the_bootstrap_and_nothing_else() -> None:
    table = with_changes(11, 10, 12, 11, 13)
    first, again, other = choose(table), choose(table), choose(table, seed=1)
    assert first == again
    assert first.wins != other.wins
    assert (first.alpha, scores(first)) == (other.alpha, scores(other))


# Asking


def test_every_alpha_is_asked_once_in_ascending_order_with_all_prompts() -> None:
    table = with_changes(4, 4, 4, 4, 4, 4)
    generate = Playback(table)
    prompts = [f"prompt {i}" for i in range(40)]
    result = search(generate, prompts, [0, 0.1, 0.2, 0.1 + 0.2, 0.4, 0.5, 0.6])
    assert generate.calls == [(alpha, tuple(prompts)) for alpha in DEFAULT_ALPHAS]
    assert result.answers == {alpha: tuple(row) for alpha, row in table.items()}
    assert result == choose(table)


def test_progress_tells_what_is_known_after_each_alpha() -> None:
    told: dict[float, list[tuple[Any, ...]]] = {}

    def progress(alpha: float, found: Sequence[Candidate]) -> None:
        told[alpha] = [(c.alpha, c.diff_previous, c.diff_next, c.score) for c in found]

    search_table(BY_HAND, progress=progress)
    assert list(told) == list(BY_HAND)
    assert told[0.0] == [(0.0, None, None, None)]
    assert told[0.1] == [(0.0, None, 2, None), (0.1, 2, None, None)]
    assert told[0.2] == [(0.0, None, 2, None), (0.1, 2, 1, 3), (0.2, 1, None, None)]
    assert told[0.4][-2:] == [(0.3, 3, 4, 7), (0.4, 4, None, None)]


class Cubic(Playback):
    """Answers that change the slower the closer alpha is to 0.27: by alpha, as a cubic does."""

    def __call__(self, alpha: float, prompts: Sequence[Any]) -> list[str | Answer]:
        self.calls.append((alpha, ()))
        moved = round(20000 * (alpha - 0.27) ** 3)
        return [f"{i}: {(moved + i) // len(prompts)}" for i in range(len(prompts))]


MANY = range(600)


def test_refining_asks_halfway_to_the_neighbours_and_nothing_twice() -> None:
    generate, noise = Cubic({}), Cubic({})
    assert search(generate, MANY).alpha == 0.3
    assert search(generate, MANY, refine=1).alpha == 0.25
    twice = search(generate, MANY, refine=2, noise=noise)
    asked = [alpha for alpha, _ in generate.calls]
    once = [*DEFAULT_ALPHAS, 0.25, 0.35]
    assert asked == [*DEFAULT_ALPHAS, *once, *once, 0.225, 0.275]
    assert [alpha for alpha, _ in noise.calls] == [twice.alpha] == [0.275]
    assert twice.noise == 0
    assert set(twice.wins) == {0.225, 0.25, 0.275}
    assert list(twice.answers) == [c.alpha for c in twice.candidates] == sorted(set(asked))


def test_each_round_of_a_refined_search_is_kept_as_it_was() -> None:
    """The grid as without refinement, and each window as if it were a grid."""
    plain, result = search(Cubic({}), MANY), search(Cubic({}), MANY, refine=2)
    assert plain.earlier == () and plain.rounds == plain.candidates
    assert [(c.round, c.alpha) for c in result.earlier] == [(0, 0.3), (1, 0.25)]
    assert tuple(c for c in result.rounds if c.round == 0) == plain.candidates
    for number, window in ((1, (0.2, 0.25, 0.3, 0.35, 0.4)), (2, (0.2, 0.225, 0.25, 0.275, 0.3))):
        inner = choose({a: result.answers[a] for a in window}).candidates[1:-1]
        found = tuple(c for c in result.rounds if c.round == number)
        assert found == tuple(replace(c, round=number) for c in inner)
    document = result.to_json()
    assert [(row["round"], row["alpha"]) for row in document["earlier"]] == [(0, 0.3), (1, 0.25)]
    assert document["earlier"][0]["score"] == scores(plain)[0.3]


def test_progress_goes_on_while_refining() -> None:
    told: list[dict[float, Any]] = []

    def progress(_: float, found: Sequence[Candidate]) -> None:
        told.append({c.alpha: c.neighbours for c in found})

    search(Cubic({}), MANY, refine=1, progress=progress)
    before, left, right = told[-3:]
    assert list(left) == [0.0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6]
    assert left == before | {0.25: (0.2, 0.3)}
    assert right == before | {0.25: (0.2, 0.3), 0.3: (0.25, 0.35), 0.35: (0.3, 0.4)}


def test_refining_ends_with_the_sixth_decimal() -> None:
    calls: list[float] = []

    def generate(alpha: float, prompts: Sequence[str]) -> list[str]:
        calls.append(alpha)
        return [f"{alpha * 1e7}"] * len(prompts)

    search(generate, ["a"], (0.0, 0.000002, 0.000004), refine=50)
    assert calls[3:] == [0.000001, 0.000003]


def test_noise_is_asked_once_at_the_chosen_alpha_and_counted() -> None:
    table = with_changes(20, 4, 4, 20, prompts=100)
    three = Playback({0.2: [*table[0.2][:97], *["other"] * 3]})
    four = Playback({0.2: [*table[0.2][:96], *["other"] * 4]})
    result = search_table(table, noise=three)
    assert [alpha for alpha, _ in three.calls] == [result.alpha] == [0.2]
    assert result.noise == 3 and not is_noted(result, "by chance")
    result = search_table(table, noise=four)
    assert result.noise == 4
    assert is_noted(result, "Asked twice at alpha 0.2, 4 of 100 answers differed by chance")
    joint = search_table(table, measure="joint", noise=four)
    assert joint.noise == 4
    assert not is_noted(joint, "by chance"), "one comparison makes a joint score, not two"
    assert choose(table).noise is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alphas": (0.0, 0.1)}, "found 2"),
        ({"alphas": (0.2, 0.1, 0.3)}, "ascending"),
        ({"alphas": (0.0, 0.5, 1.1)}, "found 1.1"),
        ({"refine": -1}, "refine is -1"),
        ({"measure": "cosine"}, "expected one of pairwise, joint, relative, entropy"),
    ],
)
def test_options_out_of_range_are_refused_before_asking(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        search(Playback({}), ["a"], **options)


def test_there_must_be_prompts_and_answers() -> None:
    with pytest.raises(PromptError, match="no prompts"):
        search(Playback({}), [])
    with pytest.raises(PromptError, match="no answers"):
        choose({alpha: [] for alpha in DEFAULT_ALPHAS})


@pytest.mark.parametrize("answers", [["a"], ["a", "b", "c"], "ab", ["a", None]])
def test_answers_that_break_the_contract_are_the_callers_mistake(answers: Any) -> None:
    good = ["a", "b"]
    with pytest.raises(ValueError, match=r"alpha 0\.0: "):
        search(lambda *_: answers, ["p", "q"])
    with pytest.raises(ValueError, match=r"alpha 0\.1: "):
        search(lambda *_: good, ["p", "q"], noise=lambda *_: answers)
    with pytest.raises(ValueError, match=r"alpha 0\.2: "):
        choose({0.0: good, 0.1: good, 0.2: answers})


# Reasoning


def test_answers_are_compared_after_their_reasoning() -> None:
    table = with_changes(4, 3, 5, 3)
    thought = {
        alpha: [f"<think>{alpha} {i}</think>\n{answer}" for i, answer in enumerate(answers)]
        for alpha, answers in table.items()
    }
    plain = search_table(table)
    for result in (search_table(thought), choose(thought)):
        assert scores(result) == scores(plain)
        assert result.answers == plain.answers
        assert result.unfinished == {}
    whole = search_table(thought, reasoning_tags=None)
    assert set(scores(whole).values()) == {None, 80}
    other = {
        alpha: [answer.replace("<think>", "[T]").replace("</think>", "[/T]") for answer in answers]
        for alpha, answers in thought.items()
    }
    assert scores(search_table(other, reasoning_tags=("[T]", "[/T]"))) == scores(plain)


def test_answers_cut_inside_their_reasoning_are_none_and_counted() -> None:
    table = with_changes(4, 3, 5, 3)
    table[0.0] = ["<think>hm</think>" + answer for answer in table[0.0]]
    table[0.2][:7] = [f"<think> well, {i}" for i in range(7)]
    again = ["<think> well, 0", *("<think>so</think>" + answer for answer in table[0.1][1:])]
    result = search_table(table, noise=lambda *_: again)
    assert result.unfinished == {0.2: 7}
    assert result.to_json()["unfinished"] == {"0.2": 7}
    assert result.answers[0.2][:7] == ("",) * 7
    assert by_alpha(result.candidates)[0.2].degenerate == 7
    assert "end inside their reasoning count as empty: 7 at alpha 0.2." in result.notes[0]
    assert result.noise == 1


@pytest.mark.parametrize("how", [search_table, choose])
@pytest.mark.parametrize(("count", "refused"), [(9, True), (8, False)])
def test_a_base_whose_reasoning_never_ends_is_refused_at_once(
    how: Any, count: int, refused: bool
) -> None:
    table = with_changes(1, 1, 1, 1, prompts=10)
    table[0.0] = [*["<think> and"] * count, *["a"] * (10 - count)]
    if refused:
        with pytest.raises(SearchError, match=r"9 of 10 answers at alpha 0\.0 .*max_new_tokens"):
            how(table)
    else:
        assert how(table).unfinished == {0.0: 8}


def test_a_higher_alpha_whose_reasoning_never_ends_is_counted() -> None:
    table = with_changes(1, 1, 1, 1, prompts=10)
    table[0.4] = ["<think> and"] * 10
    assert choose(table).unfinished == {0.4: 10}


# Repeated prompts


@pytest.mark.parametrize(
    ("prompts", "repeated"),
    [
        ([Prompt("What?", id=str(i)) for i in range(20)], 19),
        (["What is it?", "What  is\nit? "] * 10, 19),
        ([Prompt("What?", (str(i).encode(),)) for i in range(20)], 0),
        ([f"What is {i}?" for i in range(20)], 0),
    ],
)
def test_prompts_that_repeat_others_are_noted(prompts: Sequence[Any], repeated: int) -> None:
    table = with_changes(4, 3, 5, 3, prompts=20)
    notes = [
        note for note in search(Playback(table), prompts, tuple(table)).notes if "repeat" in note
    ]
    expected = f"{repeated} of 20 prompts repeat others"
    assert [note[: len(expected)] for note in notes] == [expected] * bool(repeated)


def test_the_examples_run() -> None:
    module = importlib.import_module("lowmem_adamms.searching.search")
    assert doctest.testmod(module) == doctest.TestResults(failed=0, attempted=3)


def test_the_document_keeps_its_contract() -> None:
    table = with_changes(20, 4, 3, 20, prompts=100)
    result = search_table(table, noise=lambda *_: ["other", *table[0.2][1:]])
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    rows = document.pop("candidates")
    assert set(document.pop("wins")) == {"0.1", "0.2", "0.3"}
    assert document == {
        "alpha": 0.2,
        "measure": "pairwise",
        "prompts": 100,
        "earlier": [],
        "ties": [],
        "noise": 1,
        "unfinished": {},
        "verdict": None,
        "notes": list(result.notes),
    }
    low, high = rows[2].pop("interval")
    assert low < 7 < high
    assert rows[2] == {
        "alpha": 0.2,
        "diff_previous": 4,
        "diff_next": 3,
        "score": 7,
        "degenerate": 0,
        "neighbours": [0.1, 0.3],
        "round": 0,
        "entropy": None,
        "log_probability": None,
    }
    assert rows[0]["interval"] is None and rows[0]["diff_previous"] is None
    assert '"score": 7,' in json.dumps(result.to_json())
