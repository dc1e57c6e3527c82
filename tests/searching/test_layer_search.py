"""The search's second stage: what is asked, what D is along a group, what moves and what stays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import talk

from lowmem_adamms import Alphas, search
from lowmem_adamms.cli import main
from lowmem_adamms.errors import RecipeError
from lowmem_adamms.live.draft_decoding import Settings
from lowmem_adamms.mapping.alphas import Alpha, alpha_of
from lowmem_adamms.merging.journal import ANSWERS, AnswerJournal
from lowmem_adamms.reporting.search_page import html
from lowmem_adamms.searching.layer_search import PASSES, Refined, refine, split
from lowmem_adamms.searching.search import Result
from lowmem_adamms.searching.session import Session

if TYPE_CHECKING:
    from conftest import Talkers

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [f"question {i}" for i in range(20)]
GRID = (0.0, 0.1, 0.2, 0.3, 0.4)


class Toy:
    """Two layers. An answer tells which of a prompt's own thresholds the layers' alphas passed.

    Layer 0 changes an answer wherever its alpha passes one of `first`, layer 1 one of `second`.
    """

    def __init__(self, first: Sequence[float], second: Sequence[float]) -> None:
        self.thresholds = [(a, b) for a in first for b in second]
        self.asked: list[Alpha] = []

    def __call__(self, alpha: Alpha, prompts: Sequence[str]) -> list[str]:
        self.asked.append(alpha)
        zero, one = (alpha_of(alpha, f"layers.{i}.x") for i in (0, 1))
        return [
            f"is {zero > a} and then {one > b} for number {i}"
            for i, (a, b) in enumerate(self.thresholds)
        ]


def found(toy: Toy, **options: Any) -> tuple[Result, list[str]]:
    prompts = PROMPTS[: len(toy.thresholds)]
    result = search(toy, prompts, GRID, **options)
    toy.asked.clear()
    return result, prompts


# From 0.2 to 0.3 nothing changes; below, layer 0 changes something on both sides of 0.15
FIRST = (0.05, 0.12, 0.17, 0.31, 0.33)
SECOND = (0.02, 0.06, 0.34, 0.38)


def test_each_group_is_asked_at_four_more_points_from_where_the_last_one_ended() -> None:
    toy = Toy(FIRST, SECOND)
    result, prompts = found(toy)
    assert result.alpha == 0.2
    refined = refine(toy, prompts, result, split(2, 2))
    one, two = refined.groups
    assert (one.first, one.last, two.first, two.last) == (0, 0, 1, 1)
    assert (one.moved, one.alpha, two.moved, two.alpha) == (True, 0.25, False, 0.2)
    points = [0.1, 0.15, 0.25, 0.3]
    assert toy.asked == [
        *(Alphas(0.2, {"layers.0": point}) for point in points),
        *(Alphas(0.2, {"layers.0": 0.25, "layers.1": point}) for point in points),
    ]
    assert refined.passes == len(toy.asked) == 2 * PASSES
    assert refined.alpha == Alphas(0.2, {"layers.0": 0.25})


def test_d_counts_what_changes_between_neighbours_along_the_group() -> None:
    """Each of layer 0's thresholds stands for four prompts; of layer 1's none lies in between."""
    toy = Toy(FIRST, SECOND)
    result, prompts = found(toy)
    one, two = refine(toy, prompts, result, split(2, 2)).groups
    assert [(c.alpha, c.score) for c in one.candidates] == [
        (0.1, None),
        (0.15, 8),
        (0.2, 4),
        (0.25, 0),
        (0.3, None),
    ]
    assert one.score == 0 and one.wins > 0.95
    assert [c.score for c in two.candidates] == [None, 0, 0, 0, None]
    joint = refine(toy, prompts, result, split(2, 1), measure="joint")
    assert [c.score for c in joint.groups[0].candidates] == [None, 8, 4, 0, None]


def test_relative_scores_of_a_group_count_from_the_bases_answers() -> None:
    """At 0.1 four answers have left the base's already, by 0.15 eight, from 0.2 on twelve."""
    toy = Toy(FIRST, SECOND)
    result, prompts = found(toy)
    refined = refine(toy, prompts, result, split(2, 2), measure="relative")
    first = [c.score for c in refined.groups[0].candidates]
    moved = [sum(a != b for a, b in zip(result.answers[0.0], toy(p, prompts), strict=True))
             for p in (0.15, 0.2, 0.25)]  # fmt: skip
    assert first[0] is first[-1] is None and min(moved) > 0
    assert first[1:-1] != [8, 4, 0]
    assert first[2] == pytest.approx(400 / moved[1]) and first[3] == 0


def test_a_tie_stays() -> None:
    toy = Toy((0.05, 0.12, 0.31, 0.33), SECOND)
    result, prompts = found(toy)
    refined = refine(toy, prompts, result, split(2, 2))
    assert [group.moved for group in refined.groups] == [False, False]
    assert (refined.alpha, refined.changed) == (0.2, 0)


def table(answers: dict[float, list[str]]) -> tuple[Result, Any, list[str]]:
    """A first stage that chose 0.2, and a generate() with answers by layer 0's alpha."""
    count = len(answers[0.1])

    def stage(alpha: float, prompts: Sequence[str]) -> list[str]:
        word = "same" if 0.1 <= alpha <= 0.3 else str(alpha)
        return [f"{word} {i}" for i in range(count)]

    prompts = [f"question {i}" for i in range(count)]
    result = search(stage, prompts, GRID)
    assert result.alpha == 0.2
    result = replace(result, answers={**result.answers, 0.2: tuple(answers[0.2])})
    return result, lambda alpha, _: answers[alpha.of("layers.0.x")], prompts


def changing(*counts: tuple[int, int]) -> dict[float, list[str]]:
    """Twenty answers at five points, of which prompts first..stop-1 change at each step."""
    rows = [[0] * 20]
    for first, stop in counts:
        rows.append([n + (first <= i < stop) for i, n in enumerate(rows[-1])])
    points = (0.1, 0.15, 0.2, 0.25, 0.3)
    return {
        point: [f"answer {n} to {i}" for i, n in enumerate(row)]
        for point, row in zip(points, rows, strict=True)
    }


def test_a_lead_that_resampling_does_not_bear_out_is_no_reason_to_move() -> None:
    result, generate, prompts = table(changing((0, 20), (0, 5), (0, 0), (5, 9)))
    (group,) = refine(generate, prompts, result, split(1, 1)).groups
    assert [c.score for c in group.candidates] == [None, 25, 5, 4, None]
    assert (group.moved, group.alpha, group.score) == (False, 0.2, 5)
    assert 0.3 < group.wins < 0.8


def test_a_lead_that_resampling_bears_out_is() -> None:
    result, generate, prompts = table(changing((0, 20), (0, 9), (0, 0), (9, 11)))
    refined = refine(generate, prompts, result, split(1, 1))
    (group,) = refined.groups
    assert (group.moved, group.alpha, group.score) == (True, 0.25, 2)
    assert refined.changed == 0
    low, generate, prompts = table(changing((0, 1), (0, 2), (0, 9), (0, 20)))
    refined = refine(generate, prompts, low, split(1, 1))
    assert refined.alpha == Alphas(0.2, {"layers.0": 0.15})
    assert refined.changed == 2


def test_collapsed_answers_do_not_win_though_the_group_knows_no_better() -> None:
    """More degenerate than the first stage's smallest alpha, if not than the group's own."""
    answers = changing((0, 0), (0, 9), (0, 0), (0, 0))
    for point in answers:
        answers[point] = ["" if i < 8 else text for i, text in enumerate(answers[point])]
    answers[0.2] = [f"other {i}" for i in range(20)]
    result, generate, prompts = table(answers)
    (group,) = refine(generate, prompts, result, split(1, 1)).groups
    assert min(c.score for c in group.candidates if c.score is not None) < (group.score or 0)
    assert (group.moved, group.alpha) == (False, 0.2)


def test_an_alpha_without_two_neighbours_is_left_alone() -> None:
    """The first stage found nothing eligible and took the smallest."""

    def collapsing(alpha: float, prompts: Sequence[str]) -> list[str]:
        return [f"answer {i}" if alpha == 0 else "" for i in range(len(prompts))]

    result = search(collapsing, PROMPTS, GRID)
    assert result.alpha == 0

    def unwanted(alpha: Alpha, prompts: Sequence[str]) -> NoReturn:
        raise AssertionError("nothing can be compared")

    refined = refine(unwanted, PROMPTS, result, split(2, 2))
    assert (refined.alpha, refined.groups, refined.passes) == (0, (), 0)
    assert refined.notes == ("Layers were not refined: alpha 0 does not lie between two others.",)


def test_after_refinement_of_alpha_the_points_lie_closer() -> None:
    toy = Toy(FIRST, SECOND)
    result, prompts = found(toy, refine=1)
    refined = refine(toy, prompts, result, split(2, 1))
    assert [c.alpha for c in refined.groups[0].candidates] == [
        round(result.alpha + 0.025 * step, 6) for step in (-2, -1, 0, 1, 2)
    ]


@pytest.mark.parametrize(
    ("layers", "groups", "expected"),
    [
        (28, 4, [(0, 6), (7, 13), (14, 20), (21, 27)]),
        (5, 2, [(0, 1), (2, 4)]),
        (3, 3, [(0, 0), (1, 1), (2, 2)]),
        (7, 1, [(0, 6)]),
    ],
)
def test_groups_are_neighbours_and_as_equal_as_can_be(
    layers: int, groups: int, expected: list[tuple[int, int]]
) -> None:
    assert split(layers, groups) == expected


@pytest.mark.parametrize("groups", [0, 29, -1])
def test_more_groups_than_layers_are_refused(groups: int) -> None:
    with pytest.raises(RecipeError, match=r"--refine-layers .* 28 layers; expected 1 to 28"):
        split(28, groups)


def test_what_people_read_of_it() -> None:
    toy = Toy(FIRST, SECOND)
    result, prompts = found(toy)
    refined = refine(toy, prompts, result, split(2, 2))
    assert refined.lines() == {
        "layer 0": "alpha 0.25, moved, wins 100% of the resamples; D by alpha: 0.15: 8, 0.2: 4,"
        " 0.25: 0",
        "layer 1": "alpha 0.2, stays; D by alpha: 0.15: 0, 0.2: 0, 0.25: 0",
        "answers": "0 differ from those at the global alpha",
    }
    page = html(result, [], facts={"Layers": refined.lines()})
    assert "<dt>layer 0</dt><dd>alpha 0.25, moved" in page
    document = json.loads(json.dumps(refined.to_json()))
    assert (document["passes"], document["changed"]) == (8, 0)
    assert document["groups"][0]["layers"] == [0, 0]
    assert document["groups"][0]["candidates"][1] == {"alpha": 0.15, "score": 8, "degenerate": 0}


# With a model


def test_a_killed_second_stage_goes_on_where_it_was(
    talker: Talkers, images: tuple[Path, ...], tmp_path: Path
) -> None:
    live, path = talker("llava_onevision"), tmp_path / "answers.jsonl"
    prompts, settings = talk.ask("llava_onevision", images), Settings(talk.NEW, 2)
    asked: list[Alpha] = []

    def run(load: Any) -> tuple[Refined, Session]:
        with AnswerJournal(path, "mine") as journal:
            session = Session(load, settings, journal, asked=asked.append)
            # Random answers may count as collapsed; that is not the point here
            result = replace(search(session, prompts, (0.0, 0.2, 0.4)), alpha=0.2)
            return refine(session, prompts, result, split(2, 2)), session

    whole, session = run(lambda: live)
    layered = [alpha for alpha in asked if isinstance(alpha, Alphas)]
    assert [timing.alpha for timing in session.timings] == [0.0, 0.2, 0.4, *layered]
    assert len(layered) == len(set(layered)) == 2 * PASSES

    def unwanted() -> NoReturn:
        raise AssertionError("the model is loaded, though everything is known")

    assert run(unwanted)[0] == whole
    lines = path.read_bytes().splitlines(keepends=True)
    cut = 1 + 3 * len(prompts) + 3 * len(prompts) + 2
    path.write_bytes(b"".join(lines[:cut]) + lines[cut][:-5])
    assert run(lambda: live)[0] == whole
    assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(lines)


def test_the_whole_job_writes_what_it_found(
    talking: dict[str, Path],
    tiny_models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"prompt": f"Is it {i}?"}) + "\n" for i in range(6)))
    out = tmp_path / "out"
    pair = [str(talking["qwen2_vl"]), str(tiny_models["llava_onevision"])]
    here = ["--ram", "8GB", "--vram", "0", "--max-new-tokens", "4", "--alphas", "0,0.2,0.4"]
    words = [*pair, "--prompts", str(texts), *here, "--refine-layers", "2", "--no-noise"]
    assert main(["merge", *words, "-o", str(out)]) == 0
    told = capsys.readouterr()
    assert "then an alpha for each of 2 groups of layers: 8 more passes, 48 answers" in told.err
    assert "layer 0: alpha" in told.out and "layer 1: alpha" in told.out
    recipe = json.loads((out / "adamms.json").read_bytes())
    groups = recipe["layers"]["groups"]
    moved = {f"layers.{g['layers'][0]}": g["alpha"] for g in groups if g["moved"]}
    assert recipe["alpha"] == 0.2
    assert recipe.get("alphas", {}) == moved
    page = (out / "report.html").read_text()
    assert "<h2>Layers</h2>" in page and ">by layer, 8 times<" in page
    layered = [
        line
        for line in map(json.loads, (out / ANSWERS).read_bytes().splitlines())
        if "alphas" in line
    ]
    assert len(layered) == 48
    assert main(["verify", str(out), "--deep"]) == 0
    assert main(["search", "--answers", str(out / ANSWERS), "--json"]) == 0
    scored = capsys.readouterr().out.splitlines()[-1]
    assert [c["alpha"] for c in json.loads(scored)["candidates"]] == [0.0, 0.2, 0.4]


def test_too_many_groups_are_refused_before_a_model_is_loaded(
    talking: dict[str, Path],
    tiny_models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"prompt": "Is it?"}) + "\n")
    pair = [str(talking["qwen2_vl"]), str(tiny_models["llava_onevision"])]
    words = ["search", *pair, "--prompts", str(texts), "--refine-layers", "3"]
    assert main(words) == 2
    assert "error: --refine-layers 3: the base has 2 layers" in capsys.readouterr().err
