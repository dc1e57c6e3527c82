"""Recorded answers of one ordered pair, and how good each alpha is by their labels.

`load` reads what `bench/zoo/ask.py` collects. `Pair.view` is all that a rule may see of it;
`Pair.right` and what follows are for judging.

A file: {"base", "donor", "seed", "alphas": [A], "questions": [{"task", "prompt", "answer"}],
"half": [0 search, 1 evaluation], "answers", "confidence", "entropy": [A][N], "parent": {"answers",
"confidence"}, the donor's own, "variants": {name: [V][N] answers}, "variant_alphas": [V], if not
[A], "misled": whether the donor was taught wrong answers}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rules import Bools, Floats, Ints, View

from lowmem_adamms.searching.answer_text import is_degenerate, normalise

RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Pair:
    """One ordered pair and training seed. A alphas, N questions, T tasks.

    texts: [A][N] answers as given. answers, donor: codes of the normalised ones. right: bool
    [A, N]; donor_right: bool [N]. task: int [N], place in `tasks`. half: int [N]. variants: by
    name, right and degenerate, bool [V, N], at `variant_alphas`.
    """

    base: str
    donor_name: str
    seed: int
    alphas: Floats
    tasks: tuple[str, ...]
    task: Ints
    half: Ints
    texts: Sequence[Sequence[str]]
    answers: Ints
    confidence: Floats
    entropy: Floats
    degenerate: Bools
    donor: Ints
    donor_confidence: Floats
    right: Bools
    donor_right: Bools
    variants: Mapping[str, tuple[Bools, Bools]]
    variant_alphas: Floats
    misled: bool

    @property
    def name(self) -> str:
        """Base and donor, with the seed where it is not the first."""
        return f"{self.base} ← {self.donor_name}" + (f" #{self.seed}" if self.seed else "")

    @property
    def both_names(self) -> frozenset[str]:
        """Both names, in no order."""
        return frozenset((self.base, self.donor_name))

    def view(self, grid: Ints, prompts: Ints) -> View:
        """What a search over these alphas and prompts knows; both by place."""
        cell = np.ix_(grid, prompts)
        return View(
            self.alphas[grid],
            self.answers[cell],
            self.confidence[cell],
            self.entropy[cell],
            self.degenerate[cell],
            self.donor[prompts],
            self.donor_confidence[prompts],
        )

    def grid(self, step: float, last: float = 1.0) -> Ints | None:
        """Places of the alphas 0, step, … up to `last`; None if the file lacks one of them."""
        wanted = np.arange(round(last / step) + 1) * step
        near = np.abs(self.alphas[None] - wanted[:, None])
        return near.argmin(axis=1) if near.min(axis=1).max() < 1e-6 else None

    def draws(self, count: int, size: int, seed: int = 0) -> list[Ints]:
        """So many samples of prompts for a search, each without repetition, by place.

        A sample is smaller where there are fewer prompts.
        """
        pool = np.flatnonzero(self.half == 0)
        dice = np.random.default_rng([seed, self.seed])
        return [dice.choice(pool, min(size, len(pool)), replace=False) for _ in range(count)]

    def marks(self, right: Bools) -> Floats:
        """Accuracy on the evaluation half in per cent by task, [..., T]; right: bool [..., N]."""
        use = self.half == 1
        return np.stack(
            [
                right[..., use & (self.task == t)].mean(axis=-1) * 100
                for t in range(len(self.tasks))
            ],
            axis=-1,
        )

    def accuracy(self, right: Bools | None = None) -> Floats:
        """Mean over tasks in per cent on the evaluation half; of the merged models unless given."""
        return np.asarray(self.marks(self.right if right is None else right).mean(axis=-1))

    def errors(self, right: Bools, seed: int = 0) -> tuple[Floats, Floats]:
        """Bootstrap standard errors of `accuracy`, and of its difference from alpha 0's: [A].

        Questions are resampled within their tasks, the same ones for all alphas.
        """
        dice = np.random.default_rng(seed)
        total = np.zeros((RESAMPLES, len(right)))
        for t in range(len(self.tasks)):
            part = right[:, (self.half == 1) & (self.task == t)].astype(np.float64)
            count = part.shape[1]
            draws = dice.multinomial(count, np.full(count, 1 / count), RESAMPLES)
            total += draws @ part.T * (100 / count / len(self.tasks))
        return total.std(axis=0), (total - total[:, :1]).std(axis=0)


def load(path: Path) -> Pair:
    """Read one file. ValueError says what is wrong with it."""
    raw = json.loads(path.read_text())
    alphas, questions = np.array(raw["alphas"], np.float64), raw["questions"]
    shape = (len(alphas), len(questions))
    if len(alphas) < 3 or alphas[0] != 0 or (np.diff(alphas) <= 0).any():
        raise ValueError(
            f"{path}: alphas {raw['alphas']}: expected three or more, ascending from 0"
        )
    code = _Coder()
    texts, parent = raw["answers"], raw["parent"]
    tasks = tuple(dict.fromkeys(question["task"] for question in questions))
    half = np.array(raw["half"], np.int64)
    answers = _shaped(path, "answers", [list(map(code, row)) for row in texts], shape)
    donor = np.array(list(map(code, parent["answers"])), np.int64)
    gold = np.array([code(question["answer"]) for question in questions], np.int64)
    task = np.array([tasks.index(question["task"]) for question in questions], np.int64)
    for t, name in enumerate(tasks):
        for number, purpose in ((0, "searched with"), (1, "judged on")):
            if not ((half == number) & (task == t)).any():
                raise ValueError(
                    f"{path}: no question of task {name} in half {number}, to be {purpose}"
                )
    variants = {}
    variant_alphas = np.array(raw.get("variant_alphas", raw["alphas"]), np.float64)
    for name, rows in (raw.get("variants") or {}).items():
        fewer = (len(variant_alphas), shape[1])
        codes = _shaped(path, name, [list(map(code, row)) for row in rows], fewer)
        variants[name] = (codes == gold, _degenerate(rows))
    return Pair(
        raw["base"], raw["donor"], int(raw["seed"]), alphas, tasks, task, half, texts,
        np.asarray(answers, np.int64),
        _numbers(path, "confidence", raw["confidence"], shape),
        _numbers(path, "entropy", raw["entropy"], shape),
        _degenerate(texts), donor,
        _numbers(path, "parent's confidence", parent["confidence"], shape[1:]),
        answers == gold, donor == gold, variants, variant_alphas, bool(raw.get("misled")),
    )  # fmt: skip


class _Coder:
    """Numbers answers so that equal numbers are equal normalised answers."""

    def __init__(self) -> None:
        self._by_text: dict[str, int] = {}
        self._by_norm: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        if text not in self._by_text:
            self._by_text[text] = self._by_norm.setdefault(normalise(text), len(self._by_norm))
        return self._by_text[text]


def _shaped(path: Path, name: str, values: Any, shape: tuple[int, ...]) -> Any:
    try:
        found = np.array(values)
    except ValueError as error:
        raise ValueError(f"{path}: {name}: rows of different lengths") from error
    if found.shape != shape:
        raise ValueError(f"{path}: {name}: found {found.shape}, expected {shape}")
    return found


def _numbers(path: Path, name: str, values: Any, shape: tuple[int, ...]) -> Floats:
    found = np.asarray(_shaped(path, name, values, shape), np.float64)
    if not np.isfinite(found).all():
        raise ValueError(f"{path}: {name}: not all finite")
    return found


def _degenerate(texts: Sequence[Sequence[str]]) -> Bools:
    known = {text: is_degenerate(text) for text in {text for row in texts for text in row}}
    return np.array([[known[text] for text in row] for row in texts], np.bool_)


def spearman(first: Floats, second: Floats) -> float:
    """Rank correlation, ties at their mean rank; nan where one of the two is constant."""
    a, b = _centred_ranks(first), _centred_ranks(second)
    spread = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / spread) if spread > 1e-12 else float("nan")


def _centred_ranks(values: Floats) -> Floats:
    """Each value's rank less the mean rank; equal values share theirs."""
    below = (values[None, :] < values[:, None]).sum(axis=1)
    equal = (values[None, :] == values[:, None]).sum(axis=1)
    return np.asarray(below + (equal - len(values)) / 2, np.float64)
