"""The demo: an embedded trained pair, written out, merged at a searched alpha, and judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lowmem_adamms import make_plan
from lowmem_adamms.cli import main
from lowmem_adamms.demo.exam import Marks, Question, accuracy, judge, load_exam
from lowmem_adamms.demo.pair import HERE, Pair, export_demo
from lowmem_adamms.prompts import Prompt, load_prompts

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return export_demo(tmp_path_factory.mktemp("demo") / "pair")


def test_the_package_stays_small() -> None:
    files = [path for path in HERE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000


def test_the_pair_is_two_architectures_of_one_ancestor(pair: Pair) -> None:
    plan = make_plan(pair.base, pair.donor)
    assert plan.base_layout.arch != plan.donor_layout.arch
    assert plan.base_layout.assumed is None and plan.donor_layout.assumed is None
    reasons = {step.reason for step in plan.steps if step.action == "interpolate"}
    assert any("rows by token" in reason for reason in reasons)


def test_search_prompts_have_no_answers_and_share_no_picture_with_the_exam(
    pair: Pair,
) -> None:
    prompts = [json.loads(line) for line in pair.prompts.read_text().splitlines()]
    exam = [json.loads(line) for line in pair.exam.read_text().splitlines()]
    assert all(set(line) == {"prompt", "image"} for line in prompts)
    assert all(line["answer"] and line["task"] for line in exam)

    def pictures(lines: list[dict[str, str]]) -> set[bytes]:
        paths = [pair.prompts.parent / line["image"] for line in lines if line["image"]]
        return {Image.open(path).tobytes() for path in paths}

    assert len(load_prompts(pair.prompts)) == len(prompts)
    assert not pictures(prompts) & pictures(exam)


def export_less(folder: Path) -> Pair:
    """The demo with 40 prompts."""
    pair = export_demo(folder)
    pair.prompts.write_text("".join(pair.prompts.read_text().splitlines(keepends=True)[:40]))
    return pair


def test_the_merged_model_beats_both_parents_at_the_alpha_that_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """By 40 of its prompts, on every eighth question."""
    judged: dict[tuple[str, str], list[Marks]] = {}

    def judge_once(base: Path, donor: Path, *rest: Any) -> list[Marks]:
        return judged.setdefault((base.name, donor.name), judge(base, donor, *rest))

    monkeypatch.setattr("lowmem_adamms.cli.demo.judge", judge_once)
    monkeypatch.setattr("lowmem_adamms.cli.demo.load_exam", lambda path: load_exam(path)[::8])
    monkeypatch.setattr("lowmem_adamms.cli.demo.export_demo", export_less)
    out = tmp_path / "out"
    assert main(["demo", "-o", str(out)]) == 0
    said = capsys.readouterr().out
    found = json.loads((out / "merged" / "adamms.json").read_text())
    alphas = [candidate["alpha"] for candidate in found["candidates"]]
    base, *_ = curve = judged["base", "donor"]
    (donor,), (merged,) = judged["donor", "donor"], judged["merged", "merged"]
    assert curve[alphas.index(found["alpha"])] == merged
    assert merged["mean"] >= base["mean"] + 3
    assert merged["mean"] > donor["mean"]
    for mark in (base["mean"], donor["mean"], merged["mean"]):
        assert f"{mark:.1f}" in said
    assert str(out / "merged" / "report.html") in said
    assert (out / "merged" / "report.html").is_file()


def test_at_a_given_alpha_nothing_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("lowmem_adamms.cli.demo.load_exam", lambda path: load_exam(path)[:4])
    assert main(["demo", "-o", str(tmp_path / "out"), "--alpha", "0.5"]) == 0
    assert json.loads((tmp_path / "out/merged/adamms.json").read_text())["alpha"] == 0.5
    said = capsys.readouterr()
    assert "4 questions that the search has not seen" in said.out
    assert "report.html" not in said.out
    assert (said.out + said.err).count("rms_norm_eps") == 1, "a note is printed once"


def test_export_writes_what_every_other_command_takes(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "pair"
    assert main(["demo", "--export", str(out)]) == 0
    assert capsys.readouterr().out.split() == [
        str(out / name) for name in ("base", "donor", "prompts.jsonl", "eval.jsonl")
    ]
    assert main(["plan", str(out / "base"), str(out / "donor")]) == 0


@pytest.mark.parametrize("words", [("-o",), ("--export",)])
def test_a_folder_with_something_in_it_is_left_alone(
    tmp_path: Path, words: tuple[str, ...], capsys: Capture
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["demo", *words, str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "words", [("--alpha", "1.5"), ("--export", "x", "--alpha", "0.5"), ("--export", "x", "-o", "y")]
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    tmp_path: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *words]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_accuracy_is_by_task_and_the_mean_weighs_tasks_alike() -> None:
    asked = [("a", "Red"), ("a", "two"), ("b", "ship"), ("b", "ship"), ("b", "ship")]
    exam = [Question(Prompt("?"), task, answer) for task, answer in asked]
    marks = accuracy(exam, ["red.", "three", "ship", " Ship", "boat"])
    assert marks["a"] == 50
    assert marks["b"] == pytest.approx(200 / 3)
    assert marks["mean"] == pytest.approx((50 + 200 / 3) / 2)
