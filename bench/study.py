"""Does the label-free alpha hold? The product's search on recorded answers of trained pairs.

    python bench/study.py FOLDER [--samples 20] [--size 100]

FOLDER holds one JSON file for each ordered pair and training seed (see `evidence.py`). Every sample
of unlabelled prompts is one search, judged on the labelled other half: regret is what the chosen
alpha lacks to the best of all recorded ones, in points of the mean accuracy over tasks. Tables:
accuracy over alpha, regret of each measure and of fixed alphas, verdicts, other ways to merge, and
regret by the number of prompts and the step of the grid. Prints them and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from evidence import Floats, Pair, load
from rich.console import Console
from rich.table import Table

from lowmem_adamms.settings import Measure

MEASURES: tuple[Measure, ...] = get_args(Measure)
FIXED = (0.1, 0.3, 0.5)
LAST = 0.6  # of the paper's grid, whose step is 0.1
SHOWN = [round(0.1 * i, 1) for i in range(11)]
SIZES, STEPS = (10, 25, 50, 100, 200), (0.02, 0.05, 0.1)
Figures = dict[str, Any]
Rows = list[Sequence[object]]


def main() -> None:
    """Study a folder of recorded answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--size", type=int, default=100)
    given = parser.parse_args()
    paths = sorted(given.folder.glob("*.json"))
    if not paths:
        parser.error(f"{given.folder}: no *.json file in it")
    everything = [load(path) for path in paths]
    pairs = [pair for pair in everything if not pair.useless]
    useless = [pair for pair in everything if pair.useless]
    title = f"searches, {given.samples} a pair with {given.size} prompts"
    figures = {
        "benchmark": "study",
        "samples": given.samples,
        "size": given.size,
        "accuracy": show_accuracy(everything),
        "searches": show_searches(title, pairs, given.samples, given.size),
        "useless": show_searches(f"useless donors: {title}", useless, given.samples, given.size),
        "verdicts": show_verdicts(everything, given.samples, given.size),
        "variants": show_variants(everything),
        "budgets": show_budgets(everything, given.samples),
    }
    print(json.dumps(_as_plain_data(figures)))


def show_accuracy(pairs: Sequence[Pair]) -> Figures:
    """Per cent right of each task over alpha, and of both parents."""
    figures: Figures = {}
    for pair in pairs:
        by_task = pair.task_accuracy(pair.right)
        donor = pair.task_accuracy(pair.donor_right)
        places = [i for i, alpha in enumerate(pair.alphas) if alpha in SHOWN]
        rows: Rows = [(f"{pair.alphas[i]:g}", *by_task[i], pair.accuracy[i]) for i in places]
        rows.append(("donor", *donor, donor.mean()))
        show(f"{pair.name}: right answers, %", ("alpha", *pair.tasks, "mean"), rows)
        figures[pair.name] = {
            "alphas": pair.alphas,
            "tasks": pair.tasks,
            "by_task": by_task,
            "mean": pair.accuracy,
            "donor": donor.mean(),
            "donor_by_task": donor,
        }
    return figures


def show_searches(title: str, pairs: Sequence[Pair], samples: int, size: int) -> Figures:
    """Parents, the best alpha, and what each measure and each fixed alpha lose to it."""
    figures: Figures = {}
    rows: Rows = []
    for pair in pairs:
        accuracy = pair.accuracy
        found = {m: summarize(pair, search_often(pair, m, 0.1, samples, size)) for m in MEASURES}
        fixed = {alpha: accuracy[pair.place(alpha)] for alpha in FIXED}
        best = float(pair.alphas[accuracy.argmax()])
        donor = float(pair.mean_accuracy(pair.donor_right))
        cells = [regret_cell(found[measure]) for measure in MEASURES]
        rows.append((pair.name, accuracy[0], donor, accuracy.max(), f"{best:g}", *cells,
                     *fixed.values()))  # fmt: skip
        figures[pair.name] = found | {"fixed": fixed, "best": best, "best_mean": accuracy.max()}
    heads = ("base ← donor", "base", "donor", "best", "at", *MEASURES, *map(str, FIXED))
    if rows:
        show(f"{title}: regret, median / mean / worst; accuracy at fixed alphas", heads, rows)
    return figures


def search_often(pair: Pair, measure: Measure, step: float, samples: int, size: int) -> Floats:
    """Accuracy at the alpha that each of these searches chooses, [samples]."""
    grid = pair.grid(step, LAST)
    if grid is None:
        raise ValueError(f"{pair.name}: alphas lack some of 0, {step}, … {LAST}")
    results = [pair.search(measure, grid, prompts) for prompts in pair.draws(samples, size)]
    return pair.accuracy[[pair.place(result.alpha) for result in results]]


def summarize(pair: Pair, accuracy: Floats) -> dict[str, float]:
    """What searches lose to the best alpha, and gain over the base, in points."""
    regret, gain = pair.accuracy.max() - accuracy, accuracy - pair.accuracy[0]
    return {
        "median": float(np.median(regret)),
        "mean": float(regret.mean()),
        "worst": float(regret.max()),
        "gain": float(gain.mean()),
        "lowest_gain": float(gain.min()),
    }


def regret_cell(found: Mapping[str, float]) -> str:
    """Median, mean and worst regret."""
    return f"{found['median']:.1f} / {found['mean']:.1f} / {found['worst']:.1f}"


def show_verdicts(pairs: Sequence[Pair], samples: int, size: int) -> Figures:
    """How often the first measure's searches end in "merge", and what either verdict is worth.

    The gain over the base that was advised, and the one that was advised against.
    """
    figures: Figures = {}
    rows: Rows = []
    for pair in pairs:
        grid = pair.grid(0.1, LAST)
        assert grid is not None
        gains: dict[bool, list[float]] = {True: [], False: []}
        for prompts in pair.draws(samples, size):
            found = pair.search(MEASURES[0], grid, prompts)
            assert found.verdict is not None
            gain = pair.accuracy[pair.place(found.alpha)] - pair.accuracy[0]
            gains[found.verdict.merge].append(float(gain))
        share = 100 * len(gains[True]) / samples
        mean = [float(np.mean(gains[each])) if gains[each] else "" for each in (True, False)]
        possible = float(pair.accuracy[grid].max() - pair.accuracy[0])
        kind = "useless" if pair.useless else ""
        rows.append((pair.name, kind, possible, share, *mean))
        figures[pair.name] = {"possible": possible, "merge": share, "gains": mean}
    heads = ("base ← donor", "", "best gain", "merge, %", "gain if so", "gain if not")
    show(f"Verdicts of {MEASURES[0]}: {samples} searches with {size} prompts", heads, rows)
    return figures


def show_variants(pairs: Sequence[Pair]) -> Figures:
    """Mean accuracy over alpha, merged as it should be and in the other ways that were recorded."""
    figures: Figures = {}
    rows: Rows = []
    for pair in pairs:
        if not pair.variants:
            continue
        ways = {"merged": (pair.right, pair.alphas)}
        ways |= {way: (right, pair.variant_alphas) for way, right in pair.variants.items()}
        figures[pair.name] = {}
        for way, (right, alphas) in ways.items():
            places = [int(np.abs(alphas - alpha).argmin()) for alpha in SHOWN]
            mean = pair.mean_accuracy(right)[places]
            figures[pair.name][way] = mean
            rows.append((pair.name, way, *mean, mean.max()))
    show("Ways to merge: mean accuracy over alpha, %",
         ("base ← donor", "way", *map(str, SHOWN), "best"), rows)  # fmt: skip
    return figures


def show_budgets(pairs: Sequence[Pair], samples: int) -> Figures:
    """Mean regret over all pairs by the number of prompts and the step of the grid.

    Also the most that a search ended below its base, what each pair loses by the measure that is
    the best on all others, and what fixed alphas lose.
    """
    figures: Figures = {}
    by_measure: dict[int, dict[Measure, list[float]]] = {size: {} for size in SIZES}
    rows: Rows = []
    for measure in MEASURES:
        for step in STEPS:
            if any(pair.grid(step, LAST) is None for pair in pairs):
                continue
            found = {
                size: [
                    summarize(pair, search_often(pair, measure, step, samples, size))
                    for pair in pairs
                ]
                for size in SIZES
            }
            means = {size: np.mean([each["mean"] for each in found[size]]) for size in SIZES}
            below = -min(each["lowest_gain"] for each in itertools.chain(*found.values()))
            figures[f"{measure} by {step}"] = means | {"below": below}
            rows.append((measure, f"{step}", *means.values(), below))
            for size in SIZES:  # of the largest step, which is the last
                by_measure[size][measure] = [each["mean"] for each in found[size]]
    elected = {size: np.mean(elect(by_measure[size])) for size in SIZES}
    figures["elected on the others"] = elected
    rows.append(("elected on the others", "", *elected.values(), ""))
    for alpha in FIXED:
        always = [summarize(pair, pair.accuracy[[pair.place(alpha)]]) for pair in pairs]
        mean = np.mean([each["mean"] for each in always])
        below = -min(each["lowest_gain"] for each in always)
        figures[f"fixed {alpha}"] = {"mean": mean, "below": below}
        rows.append((f"fixed {alpha}", "", *[mean] * len(SIZES), below))
    heads = ("measure", "step", *(f"{size} prompts" for size in SIZES), "below the base")
    show("Mean regret over all pairs", heads, rows)
    return figures


def elect(regrets: Mapping[Measure, Sequence[float]]) -> list[float]:
    """What each pair loses by the measure that loses the least on all the others."""
    total = {measure: sum(lost) for measure, lost in regrets.items()}

    def best_without(i: int) -> Measure:
        return min(total, key=lambda measure: total[measure] - regrets[measure][i])

    return [regrets[best_without(i)][i] for i in range(len(regrets[MEASURES[0]]))]


def show(title: str, heads: Sequence[str], rows: Rows) -> None:
    """Print a table; numbers with one decimal."""
    table = Table(*heads, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*(f"{c:.1f}" if isinstance(c, float | np.floating) else str(c) for c in row))
    console = Console(width=140, highlight=False)  # as wide as the tables need, wherever they go
    console.print(title)
    console.print(table)
    console.print()


def _as_plain_data(value: Any) -> Any:
    """As JSON has it: arrays as lists, numbers to four decimals."""
    if isinstance(value, Mapping):
        return {str(key): _as_plain_data(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_as_plain_data(entry) for entry in value]
    return round(float(value), 4) if isinstance(value, float | np.floating) else value


if __name__ == "__main__":
    main()
