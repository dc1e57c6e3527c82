"""Does the label-free alpha hold? The paper's rule and others on recorded answers of trained pairs.

    python bench/study.py FOLDER [--json] [--samples 20] [--size 100]

FOLDER holds one JSON file for each ordered pair and training seed (see `evidence.py`). Every sample
of unlabelled prompts is one search, judged on the labelled other half. Sections: 1 accuracy over
alpha; 2 ablations (shrunken, kept embeddings; duplicates left alone); 3 weak points of the paper's
rule, on constructed pairs too; 4 rules on the same answers, the best one chosen without the pair it
is judged on; 5 number of prompts and step. Prints tables and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cases
import numpy as np
import trials
from evidence import load, spearman
from rich.console import Console
from rich.table import Table
from rules import FIXED, RULES, Floats, Ints, Rule, fixed, joint, pairwise
from trials import Judge, Outcome, best_elsewhere, outcomes_elsewhere, pooled, run

PAPER = 0.6  # where the paper's grid ends
SIZES, STEPS = (10, 25, 50, 100, 200), (0.02, 0.05, 0.1)
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Study:
    """All pairs, and how a search is done."""

    judges: Sequence[Judge]
    samples: int
    size: int
    console: Console

    def grids(self, judge: Judge) -> dict[str, Ints]:
        """The grids of a study by name: the paper's, the same to 1, and fine where recorded."""
        found = {
            "0 to 0.6 by 0.1": judge.pair.grid(0.1, PAPER),
            "0 to 1 by 0.1": judge.pair.grid(0.1),
            "0 to 0.6 by 0.02": judge.pair.grid(0.02, PAPER),
        }
        return {name: grid for name, grid in found.items() if grid is not None}

    def draws(self, judge: Judge, size: int | None = None) -> list[Ints]:
        """The samples of prompts, the same for all rules and grids."""
        return judge.pair.draws(self.samples, size or self.size)

    def show(self, title: str, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table; numbers with one decimal."""
        table = Table(*heads, box=None, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*map(_shown, row))
        self.console.print(title)
        self.console.print(table)
        self.console.print()


def main() -> None:
    """Study a folder of recorded answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--size", type=int, default=100)
    given = parser.parse_args()
    paths = sorted(given.folder.glob("*.json"))
    if not paths:
        parser.error(f"{given.folder}: no *.json file in it")
    # As wide as the tables need, wherever they go
    console = Console(quiet=given.json, width=140, highlight=False)
    everything = [Judge(load(path)) for path in paths]
    judges = [judge for judge in everything if not judge.pair.misled]
    study = Study(judges, given.samples, given.size, console)
    warned = Study([judge for judge in everything if judge.pair.misled], given.samples, given.size,
                   console)  # fmt: skip
    figures = {
        "benchmark": "study", "samples": given.samples, "size": given.size,
        "curves": curves(study), "ablations": ablations(study),
        "weak": weak_points(study), "cases": constructed(study), "misled": misled(warned),
        "rules": compare(study), "budgets": budgets(study),
    }  # fmt: skip
    print(json.dumps(_rounded(figures)))


# 1. Accuracy over alpha


def curves(study: Study) -> Figures:
    """Per pair: accuracy per task, D on all search prompts; then one line for each pair."""
    out, rows = {}, []
    for judge in study.judges:
        found = curve(judge)
        out[judge.pair.name] = found
        _show_curve(study, judge, found)
        one = run(judge, {"pairwise": pairwise}, study.grids(judge)["0 to 0.6 by 0.1"],
                  study.draws(judge))["pairwise"]  # fmt: skip
        found["paper"] = summary([one])
        steady = [found["fixed"][alpha] for alpha in ("0.1", "0.3", "0.5")]
        middle = float(np.median(judge.pair.alphas[one.place]))
        rows.append((
            judge.pair.name, *judge.parents, judge.accuracy.max(), f"{found['oracle']:g}",
            found["gain"], found["gain_over_better_parent"], *steady, f"{middle:g}",
            _quartiles(one.regret), one.regret.max(), f"{found['spearman_paper']:.2f}",
            f"{found['spearman_by_0.1']:.2f}", judge.error[0],
        ))  # fmt: skip
    heads = ("base ← donor", "base", "donor", "best", "at", "gain", "over both", "0.1", "0.3",
             "0.5", "paper's", "regret, median (quartiles)", "worst", "corr.",
             "to 1", "noise")  # fmt: skip
    study.show("Mean accuracy over tasks, %: parents, best alpha, fixed alphas, the paper's choice",
               heads, rows)  # fmt: skip
    return out


def curve(judge: Judge) -> Figures:
    """What the labels say of one pair, and D per 100 prompts from all search prompts."""
    pair = judge.pair
    prompts = np.flatnonzero(pair.half == 0)
    marks = pair.marks(pair.right)
    out: Figures = {
        "alphas": pair.alphas, "tasks": pair.tasks, "marks": marks, "mean": judge.accuracy,
        "donor_marks": pair.marks(pair.donor_right), "donor": judge.parents[1],
        "noise": judge.error, "noise_to_base": judge.error_to_base,
        "oracle": float(pair.alphas[judge.oracle]),
        "gain": judge.accuracy.max() - judge.accuracy[0],
        "gain_over_better_parent": judge.accuracy.max() - max(judge.parents),
        "fixed": {},
    }  # fmt: skip
    for name, grid in (
        ("paper", pair.grid(0.1, PAPER)),
        ("by_0.1", pair.grid(0.1)),
    ):
        if grid is None:
            raise ValueError(f"{pair.name}: alphas lack some of 0.0, 0.1, … 1.0")
        view = pair.view(grid, prompts)
        pairs = -pairwise(view)[1:-1] * 100 / len(prompts)
        out[f"d_{name}"] = pairs
        out[f"joint_{name}"] = -joint(view)[1:-1] * 100 / len(prompts)
        out[f"spearman_{name}"] = spearman(-pairs, judge.accuracy[grid[1:-1]])
    for alpha in (0.1, 0.3, 0.5):
        out["fixed"][str(alpha)] = judge.accuracy[np.abs(pair.alphas - alpha).argmin()]
    return out


def _show_curve(study: Study, judge: Judge, found: Figures) -> None:
    pair, grid = judge.pair, study.grids(judge)["0 to 1 by 0.1"]
    lost = pair.degenerate[:, pair.half == 1].mean(axis=1) * 100
    rows: list[Sequence[object]] = []
    for i, place in enumerate(grid):
        inner = 0 < i < len(grid) - 1
        consistency = (
            (found["d_by_0.1"][i - 1], found["joint_by_0.1"][i - 1]) if inner else ("", "")
        )
        mean = judge.accuracy[place]
        alpha = f"{pair.alphas[place]:g}"
        rows.append((alpha, *found["marks"][place], mean, *consistency, lost[place]))
    rows.append(("donor", *found["donor_marks"], found["donor"], "", "", ""))
    study.show(f"{pair.name}: accuracy, %, and changes per 100 prompts",
               ("alpha", *pair.tasks, "mean", "D", "joint", "degenerate %"), rows)  # fmt: skip


# 2, 6. Ablations


def ablations(study: Study) -> Figures:
    """Mean accuracy over alpha, merged as it should be and otherwise."""
    out: Figures = {}
    rows: list[Sequence[object]] = []
    shown = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    for judge in study.judges:
        pair = judge.pair
        ways = {"merged": (pair.right, pair.degenerate, pair.alphas)}
        ways |= {way: (*found, pair.variant_alphas) for way, found in pair.variants.items()}
        out[pair.name] = {}
        for way, (right, lost, alphas) in ways.items():
            places = [int(np.abs(alphas - alpha).argmin()) for alpha in shown]
            mean = pair.accuracy(right)[places]
            share = lost[:, pair.half == 1].mean(axis=1)[places] * 100
            out[pair.name][way] = {"alphas": shown, "mean": mean, "degenerate": share}
            rows.append((pair.name, way, *mean, mean.max(), share[6], share[-1]))
    heads = ("base ← donor", "way", *map(str, shown), "best", "degenerate at 0.6", "at 1")
    study.show("Ablations: mean accuracy over alpha, %", heads, rows)
    return out


# 3. Weak points


def weak_points(study: Study) -> Figures:
    """The paper's rule and the product's two, pair by pair, on the paper's grid."""
    out: Figures = {}
    rows = []
    names = {name: RULES[name] for name in ("pairwise", "joint", "one-sided")}
    for judge in study.judges:
        grid, draws = study.grids(judge)["0 to 0.6 by 0.1"], study.draws(judge)
        product, ties = trials.run_product(judge, grid, draws)
        relative, _ = trials.run_product(judge, grid, draws, "relative")
        found = run(judge, names, grid, draws)
        found |= {"search.choose": product, "relative": relative}
        out[judge.pair.name] = {name: summary([one]) for name, one in found.items()}
        out[judge.pair.name]["ties"] = ties
        cells: list[object] = []
        for one in found.values():
            cells += [float(np.median(one.regret)), one.regret.max(), one.worse.mean() * 100]
        rows.append((judge.pair.name, *cells, ties * 100))
    heads = ["base ← donor"]
    for name in (*names, "choose", "relative"):
        heads += [name, "worst", "< base %"]
    study.show("Weak points, 0 to 0.6 by 0.1: regret, median and worst; searches worse than the"
               " base beyond noise; ties", (*heads, "ties %"), rows)  # fmt: skip
    return out


def constructed(study: Study) -> Figures:
    """Pairs made so that one can see why a rule fails."""
    names = ("pairwise", "per-distance", "one-sided", "surer", "surer, guarded", "nuclear")
    rules = {name: RULES[name] for name in names}
    out: Figures = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, path in cases.write(Path(folder)).items():
            judge = Judge(load(path))
            grid = study.grids(judge)["0 to 1 by 0.1"]
            found = run(judge, rules, grid, study.draws(judge))
            out[name] = {rule: summary([one]) for rule, one in found.items()}
            cells = [f"{np.median(judge.pair.alphas[one.place]):g} ({one.regret.mean():.1f})"
                     for one in found.values()]  # fmt: skip
            best = f"{judge.pair.alphas[judge.oracle]:g}"
            rows.append((name, judge.accuracy[0], judge.accuracy.max(), best, *cells))
    study.show("Constructed pairs, 0 to 1 by 0.1: median alpha chosen (mean regret)",
               ("case", "base", "best", "at", *names), rows)  # fmt: skip
    for case in cases.CASES:
        study.console.print(f"  {case.name}: {case.why}")
    study.console.print()
    return out


def misled(study: Study) -> Figures:
    """Donors that were taught wrong answers: accuracy over alpha, and where the rules go."""
    names = ("pairwise", "joint", "per-distance", "one-sided", "surer", "confidence", "nuclear")
    out: Figures = {}
    rows: list[Sequence[object]] = []
    for judge in study.judges:
        grid, draws = study.grids(judge)["0 to 0.6 by 0.1"], study.draws(judge)
        found = run(judge, {name: RULES[name] for name in names}, grid, draws)
        out[judge.pair.name] = {"mean": judge.accuracy[grid], "donor": judge.parents[1]}
        out[judge.pair.name] |= {name: summary([one]) for name, one in found.items()}
        cells = [f"{np.median(judge.pair.alphas[one.place]):g} ({one.gain.mean():+.1f})"
                 for one in found.values()]  # fmt: skip
        rows.append((judge.pair.name, *judge.accuracy[grid], judge.parents[1], *cells))
    if rows:
        alphas = [f"{0.1 * i:g}" for i in range(7)]
        study.show("Donors taught wrong answers: mean accuracy over alpha, %; median alpha chosen"
                   " (mean gain over the base)",
                   ("base ← donor", *alphas, "donor", *names), rows)  # fmt: skip
    return out


# 4. Rules


def compare(study: Study) -> Figures:
    """All rules on the same answers, grid by grid; and the rule that is best on the other pairs."""
    out: Figures = {}
    for name in study.grids(study.judges[0]):
        outcomes, alphas = [], []
        for judge in study.judges:
            grid, draws = study.grids(judge)[name], study.draws(judge)
            outcomes.append(run(judge, {**FIXED, **RULES}, grid, draws))
            still: dict[str, Rule] = {f"{a:g}": fixed(float(a)) for a in judge.pair.alphas[grid]}
            alphas.append(run(judge, still, grid, draws[:1]))
        by_rule = {rule: [found[rule] for found in outcomes] for rule in outcomes[0]}
        out[name] = {
            "rules": {rule: summary(found) for rule, found in by_rule.items()},
            "pairs": {
                judge.pair.name: {rule: summary([one]) for rule, one in found.items()}
                for judge, found in zip(study.judges, outcomes, strict=True)
            },
            "elsewhere": _chosen_elsewhere(study, outcomes, alphas),
        }
        _show_rules(study, name, out[name])
    return out


def _chosen_elsewhere(
    study: Study,
    outcomes: Sequence[Mapping[str, Outcome]],
    alphas: Sequence[Mapping[str, Outcome]],
) -> Figures:
    """The rule and the alpha that were best on other pairs, for each pair."""
    pairs = [judge.pair.both_names for judge in study.judges]
    rules = [{name: one[name] for name in RULES} for one in outcomes]
    out: Figures = {}
    for what, candidates in (("rule", rules), ("alpha", alphas)):
        found = outcomes_elsewhere(candidates, pairs)
        if found is not None:
            names = best_elsewhere(candidates, pairs)
            out[f"{what} best on other pairs"] = {**summary(found), "names": names}
    return out


def _show_rules(study: Study, name: str, found: Figures) -> None:
    heads = ("rule", "mean regret", "median", "quartiles", "worst", "< base %", "lowest gain",
             "gain", "corr.", "elsewhere")  # fmt: skip
    ranked = sorted(found["rules"].items(), key=lambda item: float(item[1]["mean"]))
    rows = [
        (
            rule, one["mean"], one["median"], f"{one['low']:.1f} to {one['high']:.1f}",
            one["worst"], one["worse"] * 100, one["lowest_gain"], one["gain"],
            f"{one['correlation']:.2f}", ", ".join(dict.fromkeys(one.get("names", ()))),
        )
        for rule, one in (*found["elsewhere"].items(), *ranked)
    ]  # fmt: skip
    study.show(f"Rules, {name}: regret in points over {len(study.judges)} pairs of"
               f" {study.samples} searches with {study.size} prompts", heads, rows)  # fmt: skip


def summary(outcomes: Sequence[Outcome]) -> Figures:
    """Figures over all searches of all pairs; the mean is of the pairs' means."""
    regret, gain = pooled(outcomes, lambda v: v.regret), pooled(outcomes, lambda v: v.gain)
    low, median, high = np.percentile(regret, (25, 50, 75))
    found = pooled(outcomes, lambda v: v.correlation)
    return {
        "mean": float(np.mean([v.regret.mean() for v in outcomes])), "median": median,
        "low": low, "high": high, "worst": regret.max(), "gain": gain.mean(),
        "lowest_gain": gain.min(),
        "worse": float(np.mean([v.worse.mean() for v in outcomes])),
        "correlation": float(np.nanmedian(found)) if np.isfinite(found).any() else float("nan"),
    }  # fmt: skip


# 5. Budgets


def budgets(study: Study) -> Figures:
    """Regret by number of prompts, step and end of the grid: the paper's rule and the best one."""
    ranges = {"0.6": PAPER, "1": 1.0}
    best = min(RULES, key=lambda rule: _mean_regret(study, RULES[rule]))
    out: Figures = {"best": best}
    rows: list[Sequence[object]] = []
    for rule in dict.fromkeys(("pairwise", "per-distance", best)):
        for end, last in ranges.items():
            for step in STEPS:
                grids = [judge.pair.grid(step, last) for judge in study.judges]
                if any(grid is None for grid in grids):
                    continue
                cells = []
                for size in SIZES:
                    one = summary([
                        run(judge, {rule: RULES[rule]}, grid, study.draws(judge, size))[rule]
                        for judge, grid in zip(study.judges, grids, strict=True)
                        if grid is not None
                    ])  # fmt: skip
                    out[f"{rule}, to {end} by {step}, {size}"] = one
                    cells.append(f"{one['median']:.1f} / {one['mean']:.1f} / {one['worst']:.1f}")
                rows.append((rule, end, f"{step}", *cells))
    heads = ("rule", "to", "by", *(f"{size} prompts" for size in SIZES))
    study.show("Budgets: regret, median / mean / worst (the best rule of all pairs, so flattered)",
               heads, rows)  # fmt: skip
    return out


def _mean_regret(study: Study, rule: Rule) -> float:
    found = [
        run(judge, {"": rule}, study.grids(judge)["0 to 1 by 0.1"], study.draws(judge))[""]
        for judge in study.judges
    ]
    return round(float(np.mean([one.regret.mean() for one in found])), 9)


# Showing


def _quartiles(values: Floats) -> str:
    low, median, high = np.percentile(values, (25, 50, 75))
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


def _shown(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float | np.floating) else str(value)


def _rounded(value: Any) -> Any:
    """As JSON has it: arrays as lists, four decimals, null for what is no number."""
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_rounded(entry) for entry in value]
    if isinstance(value, float | np.floating):
        return round(float(value), 4) if np.isfinite(value) else None
    return value


if __name__ == "__main__":
    main()
