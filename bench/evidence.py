"""Recorded answers of one ordered pair of models, and how good each alpha is by their labels.

A file, as `zoo/ask.py` writes it: {"base", "donor", "seed", "useless": whether the donor was taught
wrong answers or is noise, "alphas": [A], "questions": [{"task", "prompt", "answer"}], "half": [0 to
search with, 1 to judge by], "answers", "entropy", "log_probability": [A][N], "parent": {"answers":
[N], the donor's own}, "variants": {name: [V][N] answers}, "variant_alphas": [V]}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lowmem_adamms.answers import Answer
from lowmem_adamms.searching.answer_text import normalise
from lowmem_adamms.searching.search import Result, choose
from lowmem_adamms.settings import Measure

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Pair:
    """One ordered pair and training seed. A alphas, N questions, T tasks.

    task: int [N], place in `tasks`. half: int [N]. answers: [A][N], with how sure the model was.
    right: bool [A, N]; donor_right: bool [N]. variants: by name, bool [V, N], right at
    `variant_alphas`.
    """

    base: str
    donor: str
    seed: int
    useless: bool
    alphas: Floats
    tasks: tuple[str, ...]
    task: Ints
    half: Ints
    answers: Sequence[Sequence[Answer]]
    right: Bools
    donor_right: Bools
    variants: Mapping[str, Bools]
    variant_alphas: Floats

    @property
    def name(self) -> str:
        """Base and donor, with the seed where it is not the first."""
        return f"{self.base} ← {self.donor}" + (f" #{self.seed}" if self.seed else "")

    @property
    def accuracy(self) -> Floats:
        """Of the merged model at each alpha, [A]."""
        return self.mean_accuracy(self.right)

    def grid(self, step: float, last: float) -> Ints | None:
        """Places of the alphas 0, step, … up to `last`; None if the file lacks one of them."""
        wanted = np.arange(round(last / step) + 1) * step
        near = np.abs(self.alphas[None] - wanted[:, None])
        return near.argmin(axis=1) if near.min(axis=1).max() < 1e-6 else None

    def draws(self, count: int, size: int) -> list[Ints]:
        """So many samples of prompts to search with, each without repetition, by place.

        A sample is smaller where there are fewer prompts.
        """
        pool = np.flatnonzero(self.half == 0)
        dice = np.random.default_rng([0, self.seed])
        return [dice.choice(pool, min(size, len(pool)), replace=False) for _ in range(count)]

    def search(self, measure: Measure, grid: Ints, prompts: Ints) -> Result:
        """What the product makes of these prompts over this grid."""
        answers = {float(self.alphas[i]): [self.answers[i][n] for n in prompts] for i in grid}
        return choose(answers, measure=measure)

    def place(self, alpha: float) -> int:
        """Where an alpha stands."""
        return int(np.abs(self.alphas - alpha).argmin())

    def task_accuracy(self, right: Bools) -> Floats:
        """Per cent right of each task in the judged half, [..., T]; right: bool [..., N]."""
        judged = self.half == 1
        by_task = [right[..., judged & (self.task == t)] for t in range(len(self.tasks))]
        return np.stack([found.mean(axis=-1) * 100 for found in by_task], axis=-1)

    def mean_accuracy(self, right: Bools) -> Floats:
        """The mean of that over the tasks, [...]."""
        return np.asarray(self.task_accuracy(right).mean(axis=-1))


def load(path: Path) -> Pair:
    """Read one file. ValueError says what is wrong with it."""
    raw = json.loads(path.read_text())
    questions = raw["questions"]
    alphas = np.array(raw["alphas"], np.float64)
    if len(alphas) < 3 or alphas[0] != 0 or (np.diff(alphas) <= 0).any():
        raise ValueError(
            f"{path}: alphas {raw['alphas']}: expected three or more, ascending from 0"
        )
    tasks = tuple(dict.fromkeys(question["task"] for question in questions))
    task = np.array([tasks.index(question["task"]) for question in questions], np.int64)
    half = np.array(raw["half"], np.int64)
    for t, name in enumerate(tasks):
        if set(half[task == t].tolist()) != {0, 1}:
            raise ValueError(f"{path}: the questions of task {name} are not in both halves")
    known = [normalise(question["answer"]) for question in questions]

    def are_right(rows: Any, name: str) -> Bools:
        if any(len(row) != len(questions) for row in rows):
            raise ValueError(f"{path}: {name}: expected {len(questions)} answers a row")
        found = [[normalise(text) == answer for text, answer in zip(row, known, strict=True)]
                 for row in rows]  # fmt: skip
        return np.array(found, np.bool_)

    right = are_right(raw["answers"], "answers")
    if len(right) != len(alphas):
        raise ValueError(f"{path}: answers at {len(right)} alphas, expected {len(alphas)}")
    nothing = [() for _ in questions]  # tokens are not recorded
    confidence = zip(raw["log_probability"], raw["entropy"], strict=True)
    rows = zip(raw["answers"], confidence, strict=True)
    return Pair(
        raw["base"],
        raw["donor"],
        int(raw["seed"]),
        bool(raw["useless"]),
        alphas,
        tasks,
        task,
        half,
        [list(map(Answer, texts, nothing, *sure)) for texts, sure in rows],
        right,
        are_right([raw["parent"]["answers"]], "parent")[0],
        {name: are_right(rows, name) for name, rows in raw["variants"].items()},
        np.array(raw.get("variant_alphas", raw["alphas"]), np.float64),
    )
