"""Every merging method on the zoo: its label-free search, its authors' defaults, the best of all.

    python bench/zoo/train.py ZOO --line qwen2
    python bench/zoo/judge_methods.py ZOO OUT MODEL MODEL [MODEL ...] [--all]

Every ordered pair of the models is merged; with --all each model in turn with all others as donors,
which are searched one after the other.

Accuracy is that of `demo`: per cent right, mean over the ten tasks, on questions that no search has
seen. A search has 100 of the other questions and the product's own rule; 20 such samples are drawn.
Answers are kept in OUT, so a killed run goes on and samples cost nothing. Prints a table and, last,
one line of JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from ask import exam
from family import member
from train import keep_memory
from world import Question

from lowmem_adamms import LiveModel, make_plan
from lowmem_adamms.demo.exam import accuracy
from lowmem_adamms.mapping.plan import Plan
from lowmem_adamms.methods import METHODS
from lowmem_adamms.prompts import Prompt
from lowmem_adamms.searching.in_turn import search_in_turn
from lowmem_adamms.settings import AnswerSettings

SAMPLES, SIZE, BATCH_SIZE = 20, 100, 400
ANSWERS = AnswerSettings(max_new_tokens=10)
GRID = tuple(i / 10 for i in range(11))
PAPER = GRID[:7]
Weights = tuple[float, ...]
DEFAULTS = {
    "slerp": (1.0, 0.5),
    "task-arithmetic": (0.4, 0.4),  # Yadav et al. where there are no labels
    "dare-linear": (1.0, 1.0),
    "breadcrumbs": (0.3, 0.3),
    "ties": (1.0, 1.0),
    "dare-ties": (1.0, 1.0),
    "metagpt": (1.0, 1.0),
    "ram": (1.0, 1.0),
}
"""The weight of the base's own difference from the ancestor, and alpha; of linear equal weights."""


@dataclass(frozen=True, slots=True)
class Row:
    """One method on one base and its donors, accuracies in per cent.

    searches: of every search, by the end of its grid. chosen: the weights they chose. best: of all
    weights that were tried, at `best_at`.
    """

    base: str
    donors: tuple[str, ...]
    method: str
    default: float
    searches: dict[float, list[float]]
    chosen: dict[float, list[Weights]]
    best: float
    best_at: Weights


class Merged:
    """The answers of one plan to all questions, at any weights; each asked once and kept."""

    def __init__(self, plan: Plan, asked: Sequence[tuple[Question, Prompt, int]], path: Path):
        self.plan = plan
        self._prompts = [prompt for _, prompt, _ in asked]
        self._judged = [i for i, (_, _, half) in enumerate(asked) if half]
        self._questions: Any = [asked[i][0] for i in self._judged]
        self.unlabelled = [i for i, (_, _, half) in enumerate(asked) if not half]
        self._path = path
        self._live: LiveModel | None = None
        self._known: dict[Weights, list[str]] = {}
        for line in path.read_text().splitlines() if path.is_file() else ():
            weights, answers = json.loads(line)
            self._known[tuple(weights)] = answers

    def ask(self, weights: Weights, places: Sequence[int]) -> list[str]:
        """The answers to some of the questions."""
        if weights not in self._known:
            self._live = self._live or LiveModel(self.plan, device="cpu", quantize="none")
            self._live.apply(weights if len(weights) > 1 else weights[0])
            answers = self._live.generate(self._prompts, ANSWERS, batch_size=BATCH_SIZE)
            self._known[weights] = answers
            with self._path.open("a") as file:
                file.write(json.dumps([weights, answers]) + "\n")
        return [self._known[weights][i] for i in places]

    def judge(self, weights: Weights) -> float:
        """Per cent right of the questions that are judged."""
        return accuracy(self._questions, self.ask(weights, self._judged))["mean"]

    def best(self) -> tuple[float, Weights]:
        """The accuracy of the best weights tried, and these."""
        marks = {weights: self.judge(weights) for weights in self._known}
        best_at = max(marks, key=lambda weights: marks[weights])
        return marks[best_at], best_at

    def close(self) -> None:
        """Drop the model."""
        if self._live:
            self._live.close()


def search(merged: Merged, method: str, grid: Sequence[float]) -> Iterator[Weights]:
    """What each sample of prompts chooses."""
    for seed in range(SAMPLES):
        places = sorted(random.Random(seed).sample(merged.unlabelled, SIZE))
        results = search_in_turn(
            merged.ask, places, merged.plan.coefficients, grid, adds_up=method == "linear"
        )
        yield tuple(result.alpha for result in results)


def study(
    zoo: Path, out: Path, base: str, donors: Sequence[str], method: str, asked: Sequence[Any]
) -> Row:
    """One method, with its search and its defaults."""
    folders = [zoo / name for name in donors]
    fields: dict[str, Any] = {"method": method}
    if METHODS[method].relative:
        fields["ancestor"] = str(zoo / member(base.split("/")[0]).line / "model")
    stem = "--".join(name.replace("/model", "").replace("/", "-") for name in (base, *donors))
    weight, alpha = DEFAULTS.get(method, (1.0, 1 / (len(donors) + 1)))
    plan = make_plan(zoo / base, folders, **fields)
    merged = Merged(plan, asked, out / f"{stem}--{method}.jsonl")
    grids = [PAPER] if METHODS[method].alpha is None else [PAPER, GRID]
    chosen = {grid[-1]: list(search(merged, method, grid)) for grid in grids}
    fixed = merged
    if weight != 1:
        plan = make_plan(zoo / base, folders, weights=(weight, *[1.0] * len(donors)), **fields)
        fixed = Merged(plan, asked, out / f"{stem}--{method}-default.jsonl")
    default = fixed.judge((alpha,) * plan.coefficients)
    searches = {end: [merged.judge(one) for one in found] for end, found in chosen.items()}
    best, best_at = merged.best()
    merged.close()
    fixed.close()
    return Row(base, tuple(donors), method, default, searches, chosen, best, best_at)


def show(row: Row) -> str:
    """A row for people."""
    cells = [f"{row.method:<16}"]
    for end, marks in row.searches.items():
        mean = sum(marks) / len(marks)
        cells.append(f"  to {end:g}: {mean:.1f} ({min(marks):.1f} to {max(marks):.1f})")
    cells.append(f"  default {row.default:.1f}  best {row.best:.1f} at {row.best_at}")
    return "".join(cells)


def main() -> None:
    """Study every method, or those that are named."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("zoo", type=Path)
    options.add_argument("out", type=Path)
    options.add_argument("models", nargs="+")
    options.add_argument("--all", action="store_true")
    options.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    options.add_argument("--scenes", type=int, default=210)
    given = options.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    models = [f"{name}/model" for name in given.models]
    sets: list[tuple[str, tuple[str, ...]]] = [(a, (b,)) for a, b in permutations(models, 2)]
    if given.all:
        sets = [(base, tuple(name for name in models if name != base)) for base in models]
    rows, parents = [], {}
    with tempfile.TemporaryDirectory() as folder:
        asked = exam(given.scenes, Path(folder))
        for name in dict.fromkeys(name for base, donors in sets for name in (base, *donors)):
            itself = make_plan(given.zoo / name, given.zoo / name)
            alone = Merged(itself, asked, given.out / f"{name.replace('/', '-')}.jsonl")
            parents[name] = alone.judge((0.0,))
            alone.close()
            print(f"{name:<24}{parents[name]:.1f}", flush=True)
        for base, donors in sets:
            print(f"{base} <- {' + '.join(donors)}")
            for method in given.only:
                if len(donors) > (METHODS[method].max_donors or len(donors)):
                    continue
                rows.append(study(given.zoo, given.out, base, donors, method, asked))
                print(show(rows[-1]), flush=True)
    document = {"parents": parents, "rows": [asdict(row) for row in rows]}
    print(json.dumps({"benchmark": "zoo methods", **document}))


if __name__ == "__main__":
    importlib.import_module("transformers").logging.set_verbosity_error()
    main()
