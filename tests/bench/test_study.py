"""The study's figures, each against a case worked out by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import study
from evidence import load

from lowmem_adamms.searching.search import choose


def record(**changes: Any) -> dict[str, Any]:
    """Two tasks of four and two judged questions, two search prompts, three alphas."""
    tasks = ["t", "t", "t", "t", "u", "u", "t", "u"]
    return {
        "base": "B", "donor": "D", "seed": 0, "useless": False, "alphas": [0.0, 0.5, 1.0],
        "questions": [{"task": t, "prompt": "?", "answer": "yes"} for t in tasks],
        "half": [1, 1, 1, 1, 1, 1, 0, 0],
        "answers": [["Yes."] + ["no"] * 7, ["yes"] * 5 + [""] * 3, ["no"] * 8],
        "parent": {"answers": ["no"] * 4 + ["yes"] * 4},
        "entropy": [[0.5] * 8, [0.25] * 8, [1.0] * 8],
        "log_probability": [[-0.5] * 8, [-0.25] * 8, [-1.0] * 8],
        "variants": {"kept": [["yes"] * 8] * 3},
    } | changes  # fmt: skip


def drifting(count: int = 60) -> dict[str, Any]:
    """A pair of which the donor's answers come one after the other, so that each alpha has its D.

    All questions of task t are right at 0.4 and above, all of task u below 0.6.
    """
    alphas = [round(0.1 * i, 1) for i in range(11)]
    tasks = [("t", "u")[i % 2] for i in range(count)]
    steps = [0, 9, 12, 14, 15, 16, 22, 30, 40, 50, 60]
    answers = [
        [
            f"{i} {i < step}" if not _is_right(task, alpha) else f"right {i}"
            for i, task in enumerate(tasks)
        ]
        for alpha, step in zip(alphas, steps, strict=True)
    ]
    return record(
        alphas=alphas,
        questions=[
            {"task": task, "prompt": "?", "answer": f"right {i}"} for i, task in enumerate(tasks)
        ],
        half=[i // 2 % 2 for i in range(count)],
        answers=answers,
        entropy=[[abs(alpha - 0.4) + i / 1000 for i in range(count)] for alpha in alphas],
        log_probability=[[-alpha] * count for alpha in alphas],
        parent={"answers": answers[-1]},
        variants={"kept": answers[::-1]},
        variant_alphas=alphas,
    )


def _is_right(task: str, alpha: float) -> bool:
    return alpha >= 0.4 if task == "t" else alpha < 0.6


def saved(folder: Path, name: str = "pair", **changes: Any) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record(**changes)))
    return path


def test_accuracy_is_the_mean_over_tasks_of_the_judged_half(tmp_path: Path) -> None:
    pair = load(saved(tmp_path))
    assert pair.accuracy.tolist() == [12.5, 75.0, 0.0]
    assert pair.task_accuracy(pair.right).tolist() == [[25, 0], [100, 50], [0, 0]]
    assert pair.mean_accuracy(pair.donor_right) == 50
    assert pair.mean_accuracy(pair.variants["kept"]).tolist() == [100, 100, 100]
    assert pair.grid(0.1, 1.0) is None
    assert np.asarray(pair.grid(0.5, 1.0)).tolist() == [0, 1, 2]


def test_searches_are_the_products_own_on_samples_of_the_other_half(tmp_path: Path) -> None:
    path = tmp_path / "drifting.json"
    path.write_text(json.dumps(drifting()))
    pair = load(path)
    grid = pair.grid(0.1, 0.6)
    assert grid is not None
    draws = pair.draws(3, 20)
    assert all((pair.half[draw] == 0).all() and len(set(draw)) == 20 for draw in draws)
    assert not np.array_equal(draws[0], draws[1])
    assert all(np.array_equal(a, b) for a, b in zip(draws, pair.draws(3, 20), strict=True))
    for measure in study.MEASURES:
        for prompts in draws:
            texts = {float(pair.alphas[i]): [pair.answers[i][n] for n in prompts] for i in grid}
            found = pair.search(measure, grid, prompts)
            assert pair.alphas[pair.place(found.alpha)] == pytest.approx(found.alpha)
            assert found.alpha == choose(texts, measure=measure).alpha


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alphas": [0.1, 0.5, 1.0]}, "ascending from 0"),
        ({"answers": [["yes"] * 8] * 2}, "answers at 2 alphas, expected 3"),
        ({"answers": [["yes"] * 8, ["yes"] * 7, ["no"] * 8]}, "expected 8 answers a row"),
        ({"half": [0] * 8}, "questions of task t are not in both halves"),
    ],
)
def test_a_file_that_cannot_be_judged_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        load(saved(tmp_path, **changes))


def test_regret_and_gain_of_searches(tmp_path: Path) -> None:
    pair = load(saved(tmp_path))
    found = study.summarize(pair, pair.accuracy[[0, 1, 1, 2]])
    assert found == {"median": 31.25, "mean": 34.375, "worst": 75, "gain": 28.125,
                     "lowest_gain": -12.5}  # fmt: skip


def test_the_measure_for_a_pair_is_elected_on_the_others() -> None:
    regrets = {measure: [9.0, 9.0, 9.0] for measure in study.MEASURES}
    regrets |= {"nuclear": [0, 0, 5], "entropy": [1, 1, 0]}
    # Without the first pair entropy loses 1 and nuclear 5; without the last, nuclear loses nothing
    assert study.elect(regrets) == [1, 1, 5]


def test_the_study_tells_all_and_ends_in_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a pair, and of one whose donor is useless."""
    pair = drifting()
    (tmp_path / "pair.json").write_text(json.dumps(pair))
    broken = [[-5 * alpha] * len(pair["half"]) for alpha in pair["alphas"]]
    useless = {"donor": "M", "useless": True, "log_probability": broken}
    (tmp_path / "useless.json").write_text(json.dumps(pair | useless))
    monkeypatch.setattr(sys, "argv", ["study.py", str(tmp_path), "--samples=2", "--size=30"])
    study.main()
    printed = capsys.readouterr().out
    figures = json.loads(printed.splitlines()[-1])
    assert set(figures["accuracy"]) == {"B ← D", "B ← M"}
    assert figures["accuracy"]["B ← D"]["mean"][:7] == [50, 50, 50, 50, 100, 100, 50]
    assert set(figures["searches"]) == {"B ← D"} and set(figures["useless"]) == {"B ← M"}
    searched = figures["searches"]["B ← D"]
    assert (searched["best"], searched["best_mean"]) == (0.4, 100)
    assert searched["fixed"] == {"0.1": 50, "0.3": 50, "0.5": 100}
    assert figures["variants"]["B ← D"]["kept"] == figures["accuracy"]["B ← D"]["mean"][::-1]
    assert figures["verdicts"]["B ← D"] == {"possible": 50, "merge": 100, "gains": [0, ""]}
    assert figures["verdicts"]["B ← M"] == {"possible": 50, "merge": 0, "gains": ["", 0]}
    fixed = {f"fixed {alpha}" for alpha in study.FIXED}
    searched = {f"{measure} by 0.1" for measure in study.MEASURES}
    assert set(figures["budgets"]) == fixed | searched | {"elected on the others"}
    assert figures["budgets"]["fixed 0.1"] == {"mean": 50, "below": 0}
    assert "useless donors: searches, 2 a pair with 30 prompts" in printed
