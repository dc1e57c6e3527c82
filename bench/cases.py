"""Constructed pairs on which one can see what a rule does: no model, only knowledge and noise.

Each question has a margin for the base's answer and one for the donor's. At alpha the base's counts
1 - alpha, the donor's alpha, and the louder is heard; a case may add collapse or a donor that is
loud and wrong. Confidence follows the margin. `write` gives them the form of recorded answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ALPHAS = tuple(round(0.05 * i, 2) for i in range(21))
TASKS = ("looks", "reads")
WRONG = 12  # answers that a wrong parent may give


@dataclass(frozen=True, slots=True)
class Case:
    """One constructed pair.

    right: how often base and donor are right on each of the two tasks. loud: mean margin of a right
    and of a wrong answer, base's then donor's. collapse: from this alpha on every answer is one and
    the same. still: up to this alpha nothing changes. why: what it stands for.
    """

    name: str
    why: str
    base: tuple[float, float]
    donor: tuple[float, float]
    loud: tuple[tuple[float, float], tuple[float, float]] = ((3, 1), (3, 1))
    collapse: float = 2.0
    still: float = 0.0


CASES = (
    Case("complementary", "each parent knows what the other does not", (0.95, 0.2), (0.2, 0.95)),
    Case(
        "still near the base", "nothing changes up to 0.25, the gain lies beyond",
        (0.95, 0.2), (0.2, 0.95), still=0.25,
    ),
    Case(
        "ignorant donor", "the donor knows nothing, and says so quietly: stay at 0",
        (0.9, 0.8), (0.1, 0.1), ((3, 1), (3, 1)),
    ),
    Case(
        "loud wrong donor", "the donor is wrong as loudly as the base is right: stay at 0",
        (0.9, 0.8), (0.1, 0.1), ((3, 1), (3, 3)),
    ),
    Case(
        "collapse", "from 0.4 on one answer to everything, perfectly consistent",
        (0.95, 0.2), (0.2, 0.95), collapse=0.4,
    ),
    Case(
        "better donor", "the donor knows all the base does and more: go far",
        (0.7, 0.2), (0.95, 0.95),
    ),
)  # fmt: skip


def answers_of(case: Case, count: int, seed: int) -> dict[str, Any]:
    """The case as recorded answers: `count` questions a task, in two halves."""
    dice = np.random.default_rng(seed)
    total = count * len(TASKS)
    task = np.arange(total) % len(TASKS)
    known, margins, says = [], [], []
    for rates, (loud, quiet) in zip((case.base, case.donor), case.loud, strict=True):
        known.append(dice.random(total) < np.take(rates, task))
        margins.append(dice.exponential(np.where(known[-1], loud, quiet)) + 0.1)
        says.append(np.where(known[-1], 0, 1 + dice.integers(WRONG, size=total)))
    rows, sure = [], []
    for alpha in ALPHAS:
        weight = 0.0 if alpha <= case.still else alpha
        heard = np.stack(((1 - weight) * margins[0], weight * margins[1]))
        by_donor = heard[1] > heard[0]
        row = np.where(by_donor, says[1], says[0])
        if alpha >= case.collapse:
            row = np.full(total, WRONG + 1)
        same = says[0] == says[1]
        rows.append(row)
        sure.append(_certain(np.where(same, heard.sum(axis=0), np.abs(heard[0] - heard[1]))))
    donor_sure = _certain(margins[1])
    half = (np.arange(total) // len(TASKS)) % 2
    return {
        "base": "base", "donor": case.name, "seed": 0, "alphas": list(ALPHAS),
        "questions": [
            {"task": TASKS[t], "prompt": f"question {i}", "answer": _text(i, 0)}
            for i, t in enumerate(task)
        ],
        "half": half.tolist(),
        "answers": [[_text(i, int(a)) for i, a in enumerate(row)] for row in rows],
        "confidence": [row.tolist() for row in sure],
        "entropy": [(-np.log(row)).tolist() for row in sure],
        "parent": {
            "answers": [_text(i, int(a)) for i, a in enumerate(says[1])],
            "confidence": donor_sure.tolist(),
            "entropy": (-np.log(donor_sure)).tolist(),
        },
        "variants": {},
    }  # fmt: skip


def write(folder: Path, count: int = 300, seed: int = 0) -> Mapping[str, Path]:
    """Every case as a file in the folder, by name."""
    paths = {case.name: folder / f"{case.name.replace(' ', '-')}.json" for case in CASES}
    for case in CASES:
        paths[case.name].write_text(json.dumps(answers_of(case, count, seed)))
    return paths


def _certain(margin: Any) -> Any:
    return 1 / (1 + np.exp(-margin))


def _text(question: int, answer: int) -> str:
    """What is said varies from question to question, but for the collapsed answer."""
    return "yes" if answer == WRONG + 1 else f"{answer} of {(question * 7 + answer) % 10}"
