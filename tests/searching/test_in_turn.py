"""The search over several donors: which weights are asked, and what they become."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from lowmem_adamms.answers import Answer
from lowmem_adamms.merging.journal import AnswerJournal
from lowmem_adamms.searching.in_turn import count_passes, search_in_turn

GRID = (0.0, 0.2, 0.4, 0.6)
PROMPTS = tuple(range(20))
Weights = tuple[float, ...]


class Model:
    """Answers change least around 0.4 of the first donor, and around 0.2 of the second."""

    def __init__(self) -> None:
        self.asked: list[Weights] = []

    def __call__(self, weights: Weights, prompts: Sequence[int]) -> list[str]:
        self.asked.append(weights)
        flips = [round(abs(weight - best) * 25) for weight, best in zip(weights, (0.4, 0.2))]  # noqa: B905
        changed = sum(flips)
        return [f"{weights if i < changed else 'same'} {i}" for i in prompts]


def test_each_donor_is_searched_with_the_weights_chosen_before_it() -> None:
    model, again = Model(), Model()
    results = search_in_turn(model, PROMPTS, 2, GRID, adds_up=False, noise=again)
    assert [result.alpha for result in results] == [0.4, 0.2]
    # The second donor's 0 was asked with the first one's grid
    first = [(alpha, 0.0) for alpha in GRID]
    assert model.asked == [*first, *((0.4, alpha) for alpha in GRID[1:])]
    assert len(model.asked) == count_passes(2, GRID)
    assert again.asked == [(0.4, 0.2)]
    assert results[0].noise is None and results[1].noise == 0


def test_entropy_may_leave_a_donor_out() -> None:
    def generate(weights: Weights, prompts: Sequence[int]) -> list[Answer]:
        first, second = weights
        return [Answer(f"{i}", entropy=1 + abs(first - 0.4) + second) for i in prompts]

    results = search_in_turn(
        generate, PROMPTS, 2, GRID, adds_up=True, noise=generate, measure="entropy"
    )
    assert [result.alpha for result in results] == [0.4, 0.0]
    assert [result.noise for result in results] == [None, None]
    assert [c.score for c in results[1].candidates] == pytest.approx([1, 1.2, 1.4, 1.6])


def test_together_the_weights_of_an_average_stay_within_one() -> None:
    model = Model()
    results = search_in_turn(model, PROMPTS, 2, (0.0, 0.2, 0.4, 0.6, 0.8), adds_up=True)
    assert [result.alpha for result in results] == [0.4, 0.2]
    assert max(sum(weights) for weights in model.asked[5:]) == pytest.approx(1)


def test_a_donor_to_whom_fewer_than_three_alphas_are_left_gets_smaller_ones() -> None:
    model = Model()
    results = search_in_turn(model, PROMPTS, 2, (0.0, 0.4, 0.8), adds_up=True)
    tried = [candidate.alpha for candidate in results[1].candidates]
    assert tried == pytest.approx([0, 0.3, 0.6])


@pytest.mark.parametrize(
    ("donors", "grid", "refine", "passes"),
    [(1, GRID, 0, 4), (3, GRID, 0, 10), (2, (0.2, 0.4, 0.6), 0, 6), (2, GRID, 1, 11)],
)
def test_the_passes_are_known_before(donors: int, grid: Weights, refine: int, passes: int) -> None:
    assert count_passes(donors, grid, refine) == passes


def test_answers_at_several_weights_are_journalled(tmp_path: Path) -> None:
    with AnswerJournal(tmp_path / "answers.jsonl", "x") as journal:
        journal.note((0.4, 0.2), 1, Answer("yes", (7,)))
    with AnswerJournal(tmp_path / "answers.jsonl", "x") as journal:
        assert journal.answers == {(0.4, 0.2): {1: Answer("yes", (7,))}}
