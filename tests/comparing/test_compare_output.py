"""A comparison as people see it: the terminal with and without colour, the page, the command."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command import run
from pages import HOSTILE, Page
from rich.console import Console

from lowmem_adamms.checkpoints.checkpoint import Checkpoint
from lowmem_adamms.comparing.comparison import Comparison, compare
from lowmem_adamms.comparing.page import describe_similarity, render_comparison_page
from lowmem_adamms.comparing.pairing import pair_checkpoints
from lowmem_adamms.comparing.similarity import Similarity
from lowmem_adamms.comparing.table import (
    STEPS,
    choose_steps,
    draw_comparison,
    format_cell,
    format_cosine,
    format_ratio,
    list_remarks,
)
from lowmem_adamms.demo.pair import export_demo

Models = dict[str, Path]
Capture = pytest.CaptureFixture[str]
EVIL = "visual.<script>alert(1)</script>[bold]\u202e\"'&"
LAYERS = 6


@pytest.fixture(scope="module")
def graded_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of six layers: layer 1 is equal, 2 to 4 ever further away, 5 is a stranger's."""
    root = tmp_path_factory.mktemp("graded")
    parent = tiny.ancestor("qwen2", layers=LAYERS)
    a = tiny.make("qwen2_vl", root / "a", ancestor=parent, dtype="float32")
    tensors = tiny.load(a)
    random = torch.Generator().manual_seed(1)
    scales = {0: 1e-4, 1: 0.0, 2: 0.002, 3: 0.02, 4: 0.2}
    for name, tensor in tensors.items():
        layer = re.search(r"layers\.(\d)\.", name)
        if layer is None or "visual" in name or "norm" in name or "bias" in name:
            continue
        noise = torch.randn(tensor.shape, generator=random) * tensor.std()
        scale = scales.get(int(layer[1]))
        tensors[name] = noise if scale is None else tensor + scale * noise
    tensors[EVIL] = torch.ones(3)
    b = tiny.respell(a, lambda name: None, root / "b", extra=tensors)
    return tiny.respell(a, lambda name: name, root / "evil", extra={EVIL: torch.ones(3)}), b


@pytest.fixture(scope="module")
def graded(graded_pair: tuple[Path, Path]) -> Comparison:
    return compare(pair_checkpoints(*graded_pair), sample=1 << 30)


def printed(comparison: Comparison, width: int = 120, colours: bool = False) -> str:
    file = io.StringIO()
    color_system: Any = "256" if colours else None
    console = Console(file=file, width=width, force_terminal=True, color_system=color_system)
    for item in draw_comparison(comparison):
        console.print(item, soft_wrap=isinstance(item, str), highlight=False, markup=False)
    return file.getvalue()


# The terminal


def test_the_terminal_tells_verdict_sample_shares_and_distances(graded: Comparison) -> None:
    text = printed(graded)
    assert "related in part: cosine is below 0.5 in layers.5" in text
    assert f"at most {1 << 30:,} elements of each of {len(graded.similarities)} pairs" in text
    assert "a merge is refused: the language weights are not alike" in text
    assert "only in A: nothing" in text
    heat = text.partition(" layer ")[2].partition("all layers")[0].splitlines()
    assert heat[0].split() == [*"qkvo", "gate", "up", "down", "norms", "biases"]
    rows = {line.split()[0]: line.split()[1:] for line in heat if line.strip()[:1].isdecimal()}
    assert rows["1"] == ["="] * 9
    assert [rows[layer][0] for layer in "0234"] == ["0.01", "0.2", "2", "20"]
    assert rows["5"][1] == "x" and 130 < int(rows["5"][0]) < 150
    assert re.search(r"vision tower .* 0 % .* 1 .* 100 %", text)


def test_colour_changes_no_sign(graded: Comparison) -> None:
    coloured = printed(graded, colours=True)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == printed(graded)


def test_what_is_not_finite_is_said(graded: Comparison) -> None:
    nothing = Similarity(elements=3, read=3, nonfinite_a=3, nonfinite_b=1)
    assert format_cell(nothing) == "?"
    assert describe_similarity(nothing) == "nothing finite"
    only_a = Similarity(elements=3, read=3, finite=1, nonfinite_a=2)
    similarities = (nothing, only_a, *graded.similarities[2:])
    remarks = list_remarks(replace(graded, similarities=similarities))
    first_a, first_b = (graded.pairing.pairs[0].names(side)[0] for side in (0, 1))
    assert [remark for remark in remarks if remark.startswith("NaN or infinite")] == [
        f"NaN or infinite values read of A, left out: 5, the first in {first_a}; a merge refuses"
        " them",
        f"NaN or infinite values read of B, left out: 1, the first in {first_b}; a merge refuses"
        " them",
    ]


def test_the_command_names_a_tensor_with_nan(
    tiny_models: Models, tmp_path: Path, capsys: Capture
) -> None:
    tensors = tiny.load(tiny_models["qwen2_vl"])
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][0, :3] = float("nan")
    damaged = tiny.respell(tiny_models["qwen2_vl"], lambda _: None, tmp_path, extra=tensors)
    assert run("compare", tiny_models["qwen2_vl"], damaged) == 0
    words = f"values read of B, left out: 3, the first in {name}; a merge refuses them"
    assert words in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(None, ""), (0.0, "0 %"), (0.00034, "0.034 %"), (0.1234, "12 %"), (1.416, "142 %")],
)
def test_distances_have_two_digits(ratio: float | None, text: str) -> None:
    assert format_ratio(ratio) == text


@pytest.mark.parametrize(
    ("cosine", "text"), [(None, ""), (1.0, "1"), (0.98765, "0.9877"), (0.999998, "1 - 2.0e-06")]
)
def test_a_cosine_near_one_shows_its_difference(cosine: float | None, text: str) -> None:
    assert format_cosine(cosine) == text


# The page


def test_the_page_refers_to_nothing_and_escapes_names(
    graded: Comparison, graded_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Names of tensors, and of folders."""
    text = render_comparison_page(graded)
    page = Page(text)
    assert page.foreign_references() == []
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    assert "default-src 'none'" in str(page.tags)
    assert f"script-src '{Page.digest(script)}'" in str(page.tags)
    assert "\u202e" not in text
    assert "alert(1)" in page.text and "[U+202E]" in page.text
    evil = tmp_path / HOSTILE.replace("/", "").replace("\x00", "").replace("\ud800", "")
    evil.symlink_to(graded_pair[0], target_is_directory=True)
    text = render_comparison_page(compare(pair_checkpoints(evil, graded_pair[1]), sample=16))
    Page(text)
    assert "<script>alert" not in text and "<img" not in text and "\x1b" not in text


def test_every_cell_of_the_heat_says_what_it_is(graded: Comparison) -> None:
    text = render_comparison_page(graded)
    page = Page(text)
    kinds = [*"qkvo", "gate", "up", "down", "norms", "biases"]
    heat = [(a, cell) for a, cell in page.cells if a.get("title", "").startswith("layer ")]
    assert len(heat) == LAYERS * len(kinds)
    assert "layer 1, gate: equal" in text
    assert re.search(r"layer 4, gate: distance (19|20|21) %, cosine 0\.98", text)
    assert {cell for a, cell in heat if a["class"] == "eq"} == {"="}
    strangers = [cell for a, cell in heat if a["class"] == "hx"]
    assert len(strangers) == 7 and all(re.fullmatch(r"1[34]\d x", cell) for cell in strangers)
    numbers = {a["title"]: float(cell) for a, cell in heat if a["class"] not in ("eq", "hx")}
    assert all(f"distance {number:.10g} %" in title for title, number in numbers.items())


def test_the_colours_are_spread_over_what_there_is(tmp_path: Path) -> None:
    """The demo's matrices lie 31 to 44 % apart."""
    demo = export_demo(tmp_path)
    comparison = compare(pair_checkpoints(demo.base, demo.donor))
    steps = choose_steps(comparison)
    assert steps != STEPS and list(steps) == sorted(set(steps)) and len(steps) == len(STEPS)
    page = Page(render_comparison_page(comparison))
    heat = [a["class"] for a, _ in page.cells if a.get("title", "").startswith("layer ")]
    assert len(set(heat)) > 4
    legend = page.text.partition("||A - B|| / ||A||:")[2]
    assert all(f"below {format_ratio(step)}" in legend for step in steps)


def test_the_page_lists_pairs_and_what_either_has_alone(tiny_models: Models) -> None:
    comparison = compare(pair_checkpoints(tiny_models["cogvlm"], tiny_models["llama"]))
    text = Page(render_comparison_page(comparison)).text
    assert all(pair.role in text for pair, _ in comparison.items)
    assert "Only in A" in text and "vision tower" in text
    assert "Only in B nothing" in text
    assert "same ancestor" in text


def test_two_widths_still_tell_why(true_size: dict[str, Checkpoint]) -> None:
    pairing = pair_checkpoints(true_size["qwen2-1.5b"], true_size["qwen2-7b"])
    assert pairing.pairs == ()
    comparison = compare(pairing, sample=16)
    text = Page(render_comparison_page(comparison)).text
    assert "not comparable" in text and "width 1536 against 3584" in text
    assert "another shape there" in text and "more reasons" in text
    assert "width: 1536 in A, 3584 in B" in printed(comparison)


# The command


def test_the_command_prints_and_writes(
    graded_pair: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    page = tmp_path / "page.html"
    assert run("compare", *graded_pair, "--html", page, "--sample", "600") == 0
    out, err = capsys.readouterr()
    assert "related in part" in out and "at most 600 elements" in out
    assert err == "" and "\x1b" not in out
    Page(page.read_text("utf-8"))
    assert run("compare", *graded_pair, "--json") == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["sample"] == 4096 and err == ""
    assert document["groups"]["layers.1"]["kinds"]["q"]["identical"] is True


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--sample", "0"), "expected a whole number"),
        (("--html", "no/such/folder/page.html"), "expected a file in a folder that exists"),
    ],
)
def test_what_cannot_be_is_one_line(
    graded_pair: tuple[Path, Path], words: tuple[str, ...], said: str, capsys: Capture
) -> None:
    assert run("compare", *graded_pair, *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and said in err
