"""The study's figures as SVG, by matplotlib: accuracy and D over alpha, regrets, ablations.

Leaves to others: every number (`study.py`).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from trials import Judge

GRID = "0 to 0.6 by 0.1"


def draw(folder: Path, judges: Sequence[Judge], figures: Mapping[str, Any]) -> list[Path]:
    """Write all figures; ModuleNotFoundError without matplotlib."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    # The same figures give the same bytes
    pyplot.rcParams.update({"svg.hashsalt": "study", "font.size": 9, "axes.spines.top": False})
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for judge in judges:
        name = judge.pair.name
        made.append(_save(pyplot, folder, name, _curve(pyplot, judge, figures["curves"][name])))
        if len(figures["ablations"][name]) > 1:
            picture = _ablation(pyplot, judge, figures["ablations"][name])
            made.append(_save(pyplot, folder, f"{name} ablations", picture))
    made.append(_save(pyplot, folder, "rules", _rules(pyplot, figures["rules"][GRID])))
    return made


def _save(pyplot: Any, folder: Path, name: str, picture: Any) -> Path:
    path = folder / (re.sub(r"[^\w.]+", "-", name.replace("←", "from")) + ".svg")
    picture.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(picture)
    return path


def _curve(pyplot: Any, judge: Judge, found: Mapping[str, Any]) -> Any:
    """Accuracy of each task and their mean, parents as lines; below it D on the paper's grid."""
    picture, (top, bottom) = pyplot.subplots(
        2, 1, sharex=True, figsize=(7, 6), height_ratios=(3, 1), layout="constrained"
    )
    alphas = judge.pair.alphas
    for task, marks in zip(found["tasks"], found["marks"].T, strict=True):
        top.plot(alphas, marks, linewidth=0.8, alpha=0.6, label=task)
    top.plot(alphas, judge.accuracy, "k", linewidth=2, label="mean")
    low, high = judge.accuracy - judge.error, judge.accuracy + judge.error
    top.fill_between(alphas, low, high, color="k", alpha=0.15, linewidth=0)
    top.axhline(judge.parents[1], color="k", linestyle=":", linewidth=1, label="donor, mean")
    best = judge.oracle
    top.plot(alphas[best], judge.accuracy[best], "k*", markersize=10, label="best")
    top.set(title=judge.pair.name, ylabel="accuracy, %", ylim=(0, 101))
    top.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for grid, label in (("paper", "0 to 0.6"), ("by_0.1", "0 to 1")):
        size = len(found[f"d_{grid}"])
        bottom.plot(0.1 * np.arange(1, size + 1), found[f"d_{grid}"], "o-", label=label, ms=3)
    bottom.set(xlabel="alpha", ylabel="D per 100 prompts", ylim=(0, None))
    bottom.legend(frameon=False)
    return picture


def _ablation(pyplot: Any, judge: Judge, found: Mapping[str, Mapping[str, Any]]) -> Any:
    picture, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for way, values in found.items():
        axes.plot(values["alphas"], values["mean"], label=way)
    title = f"{judge.pair.name}: embeddings and duplicates"
    axes.set(title=title, xlabel="alpha", ylabel="mean accuracy, %", ylim=(0, 101))
    axes.legend(frameon=False)
    return picture


def _rules(pyplot: Any, found: Mapping[str, Any]) -> Any:
    """Mean regret of each pair as a dot, of all as a bar, best rule on top."""
    ranked = sorted(found["rules"], key=lambda rule: -float(found["rules"][rule]["mean"]))
    size = (7, 0.2 * len(ranked) + 1)
    picture, axes = pyplot.subplots(figsize=size, layout="constrained")
    places = np.arange(len(ranked))
    axes.barh(places, [found["rules"][rule]["mean"] for rule in ranked], color="0.85")
    for pair, by_rule in found["pairs"].items():
        dots = [by_rule[rule]["mean"] for rule in ranked]
        axes.plot(dots, places, "o", markersize=3.5, label=pair)
    axes.set_yticks(places, ranked)
    axes.set(title=f"Regret by rule, {GRID}", xlabel="points below the best alpha, mean")
    axes.legend(loc="lower right", fontsize=7)
    return picture
