"""The method for Python, where no other test goes through it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from lowmem_adamms.answers import Answer
from lowmem_adamms.api import choose_alpha, find_alpha, make_plan, merge, place_search
from lowmem_adamms.demo.pair import export_demo
from lowmem_adamms.errors import SearchError


def record(path: Path, answers: list[str]) -> Path:
    """The same answers at three alphas."""
    lines = [
        json.dumps({"alpha": alpha, "index": index, "answer": answer})
        for alpha in (0.0, 0.1, 0.2)
        for index, answer in enumerate(answers)
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("answer", ["", "yes", "no no no no no no no no no no"])
def test_a_search_whose_answers_have_collapsed_chooses_nothing(answer: str, tmp_path: Path) -> None:
    journal = record(tmp_path / "answers.jsonl", [answer] * 11 + ["a red car"])
    with pytest.raises(SearchError, match=r"at every alpha 90% or more .* \(92% at alpha 0\)"):
        choose_alpha([journal])


def test_answers_that_differ_are_no_collapse(tmp_path: Path) -> None:
    sound = record(tmp_path / "sound.jsonl", ["yes"] * 8 + ["no", "a red car", "two", "blue"])
    assert choose_alpha([sound]).alpha == 0.1
    few = record(tmp_path / "few.jsonl", ["yes"] * 9)
    assert choose_alpha([few]).alpha == 0.1


class FakeSession:
    """Answers that tell the alpha, and whether the donor was asked aside."""

    def __init__(self) -> None:
        self.timings: list[object] = []
        self.notes = ["a note"]
        self.asked_donor = False

    def __call__(self, alpha: float, prompts: Sequence[object]) -> list[Answer]:
        return [Answer(f"{i} {alpha > 0.2 * i}") for i in range(len(prompts))]

    def ask_donor(self, prompts: Sequence[object]) -> list[Answer]:
        self.asked_donor = True
        return [Answer("<think>hm</think>of the donor")] * len(prompts)


@pytest.mark.parametrize(("alphas", "aside"), [((0, 0.3, 0.6), True), ((0, 0.5, 1), False)])
def test_the_donors_answers_are_those_at_alpha_1_and_asked_once(
    alphas: tuple[float, ...], aside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, session = export_demo(tmp_path / "demo"), FakeSession()
    place = "lowmem_adamms.searching.session_of_plan.open_session"
    monkeypatch.setattr(place, lambda *_, **__: nullcontext(session))
    plan = make_plan(pair.base, pair.donor)
    questions = ["Is it?", "Was it?", "Will it be?", "Why?"]
    notes: list[str] = []
    options: dict[str, Any] = {"alphas": alphas, "noise": False, "donor_answers": True}
    found = find_alpha(plan, questions, note=notes.append, **options)
    assert session.asked_donor == aside
    assert found.donor_answers == (("of the donor",) * 4 if aside else found.result.answers[1.0])
    assert notes == ["a note"]
    assert found.command.endswith(f"{pair.donor} -o merged --alpha")


def test_what_is_of_a_wrong_type_says_what_is_expected(tmp_path: Path) -> None:
    """Before anything is written."""
    pair = export_demo(tmp_path / "demo")
    plan = make_plan(pair.base, pair.donor)
    out = tmp_path / "out"
    wrong: list[tuple[Callable[[Any], object], Any, str]] = [
        (lambda it: make_plan(it, pair.donor), 3, "a checkpoint is 3, expected a folder"),
        (lambda it: merge(it, 0.3, out), pair.base, "plan is .*, expected what make_plan returns"),
        (lambda it: find_alpha(it, []), "plan", "plan is 'plan', expected what make_plan"),
        (lambda it: place_search(it), None, "plan is None, expected what make_plan"),
        (lambda it: merge(plan, it, out), None, "alpha is None, expected a number, 0 to 1"),
        (lambda it: merge(plan, 0.3, it), None, "out is None, expected a folder"),
        (lambda it: find_alpha(plan, it), 3, "prompts is 3, expected a file, a folder"),
    ]
    for call, value, says in wrong:
        with pytest.raises(TypeError, match=says):
            call(value)
    assert not out.exists()
