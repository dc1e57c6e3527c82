"""The method for Python, where no other test goes through it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowmem_adamms.api import choose_alpha
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
