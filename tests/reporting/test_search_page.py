"""The report page: well-formed, self-contained, safe with hostile text, true to the result."""

from __future__ import annotations

import base64
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pages import HOSTILE, Page
from PIL import Image

from lowmem_adamms.errors import OutputError
from lowmem_adamms.mapping.alphas import Alphas
from lowmem_adamms.prompts import Prompt
from lowmem_adamms.reporting import search_page as report
from lowmem_adamms.reporting.answers_table import SHOWN_CHANGING
from lowmem_adamms.reporting.curve import CROSS
from lowmem_adamms.reporting.markup import DASH, marked, plain
from lowmem_adamms.reporting.view import Run, runs
from lowmem_adamms.searching.answer_text import normalise
from lowmem_adamms.searching.search import Candidate, Result, choose
from lowmem_adamms.searching.search import search as run_search
from lowmem_adamms.searching.session import Timing

GRID = (0.0, 0.1, 0.2, 0.3)


def result_of(*answers: Sequence[str], alphas: Sequence[float] = GRID) -> Result:
    """Of answers by prompt, each over the whole grid."""
    return choose({alpha: [row[i] for row in answers] for i, alpha in enumerate(alphas)})


def page_of(result: Result, texts: Sequence[str] = (), **options: object) -> Page:
    prompts = [Prompt(text, id=f"p.jsonl:{i}") for i, text in enumerate(texts, 1)]
    return Page(report.html(result, prompts, **options))  # type: ignore[arg-type]


def picture(kind: str = "PNG", size: tuple[int, int] = (300, 200)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "teal").save(out, kind)
    return out.getvalue()


SOME = result_of(
    ["a cat", "A cat.", "a cat", "a dog"],
    ["1", "2", "3", "3"],
    ["yes", "yes", "yes", "yes"],
)


# The page


def test_the_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    image = tmp_path / "photo.png"
    image.write_bytes(picture())
    prompts = [Prompt("see https://example.org/x.png", (image,)) for _ in range(3)]
    page = report.html(SOME, prompts, title="base <- donor")
    for tag, attrs in Page(page).tags:
        assert tag not in ("link", "iframe", "object", "base", "form")
        for name, value in attrs.items():
            assert name not in ("srcset", "action", "xlink:href") and not name.startswith("on")
            if name in ("src", "href"):
                assert value is not None and value.startswith(("data:image/jpeg;base64,", "#"))
    assert "@import" not in page and "url(" not in page


def test_sections_stand_in_their_order() -> None:
    timings = [Timing(0.1, 0.5, 2.0, 10, 20, 40)]
    facts = {"Placement": {"model": "cpu"}, "Recipe": {"base": "b"}}
    text = page_of(SOME, timings=timings, facts=facts, title="Base-7B <- Donor-7B").text
    marks = ["Base-7B ← Donor-7B", "Merge at alpha", "Disagreement", "Candidates"]
    marks += ["Answers that change", "at every alpha", "Timings", "Placement", "Recipe"]
    places = [text.find(mark, text.find("measure")) for mark in marks]
    assert -1 not in places and places == sorted(places)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.text(st.characters(categories=None), max_size=30) | st.just(HOSTILE),
        min_size=8,
        max_size=8,
    )
)
def test_any_text_leaves_the_page_whole(texts: list[str]) -> None:
    result = result_of(texts[:4], texts[2:6])
    result = replace(result, notes=(texts[6],))
    prompts = [Prompt(texts[6], (Path("a/<b>.png"),), texts[7]), Prompt(texts[7])]
    facts = {texts[0]: {texts[1]: texts[2]}}
    page = report.html(result, prompts, facts=facts, title=texts[7])
    page.encode("utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page)
    tags = {tag for tag, _ in Page(page).tags}
    allowed = {
        tag for tag, _ in Page(report.html(SOME, [Prompt("x" * 999)], facts={"a": {"b": "c"}})).tags
    }
    assert tags <= allowed
    assert page.count("<script") == 1


@given(st.text(st.characters(categories=None), max_size=60))
def test_text_without_hidden_characters_reads_back_as_it_was(text: str) -> None:
    visible = "".join(c for c in text if marked(c) and "code" not in marked(c))
    parsed = Page(f"<p>{marked(visible)}</p>")
    assert "".join(parsed.texts) == visible
    attribute = Page(f'<p title="{plain(visible)}"></p>')
    assert attribute.tags[0][1]["title"] == visible


def test_characters_that_hide_are_shown_by_their_code_point() -> None:
    text = Page(f"<p>{marked(HOSTILE)}</p>").text
    for shown in ("U+0000", "U+001B", "U+202E", "U+2066", "U+D800", "<script>"):
        assert shown in text
    assert plain("a\u202eb") == "a[U+202E]b"
    joined = "\U0001f469\u200d\U0001f467 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    assert marked(joined) == joined


def test_the_page_allows_no_script_but_its_own() -> None:
    page = report.html(SOME, [])
    (policy,) = (a["content"] for t, a in Page(page).tags if t == "meta" and "http-equiv" in a)
    assert policy is not None and "default-src 'none'" in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1]


# The choice


def test_the_chosen_alpha_is_said_and_marked() -> None:
    answers = [["a", "b", "b", "b", "c"]] * 40 + [["a", "b", "c", "c", "c"]] * 20
    result = result_of(*answers, alphas=(0.0, 0.1, 0.25, 0.3, 0.6))
    page = page_of(result)
    assert result.alpha == 0.25
    assert "Merge at alpha 0.25: the language weights are 75 % base and 25 % donor" in page.text
    assert "Score 20, the lowest of 3" in page.text
    assert "Next best: alpha 0.3 with 40" in page.text
    assert len(page.of_class("tr", "chosen")) == 1
    assert len(page.of_class("circle", "chosen")) == 1
    assert f"It wins {100 * result.wins[0.25]:.0f}" in page.text


def test_ties_noise_and_notes_are_said() -> None:
    result = Result(
        0.1,
        "pairwise",
        50,
        (
            Candidate(0.0, None, 4, None, 0),
            Candidate(0.1, 4, 1, 5, 0, (2.0, 9.0)),
            Candidate(0.2, 1, 4, 5, 0, (1.0, 8.0)),
            Candidate(0.3, 4, None, None, 0),
        ),
        {},
        ties=(0.1, 0.2),
        noise=3,
        notes=("first <note>", "second note"),
    )
    page = page_of(result)
    assert "Score 5, the lowest of 2, tied with 0.2 (95 % interval 2 to 9)" in page.text
    assert "Noise floor: 3 of 50 answers" in page.text
    assert "first <note>" in page.texts and "second note" in page.texts
    assert len(page.of_class("li", "note")) == 2
    assert len(page.of_class("circle", "tie")) == 2


def test_a_lower_score_of_degenerate_answers_is_explained() -> None:
    questions = range(20)
    answers = [[f"{q}", f"{q + (q < 6)}", f"{q + (q < 9)}", "", "", ""] for q in questions]
    result = result_of(*answers, alphas=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5))
    page = page_of(result)
    assert result.alpha == 0.1
    assert "Alpha 0.4 scores 0, but 20 of 20 answers there are degenerate." in page.text
    assert len(page.of_class("circle", "degenerate")) == 2
    assert len(page.of_class("td", "warn")) == 3
    assert f"{CROSS} 20" in page.text


def test_an_alpha_without_a_score_is_said_to_have_none() -> None:
    result = result_of(*[["a", "", "", ""] for _ in range(12)])
    assert result.alpha == 0.0
    assert "This alpha has no score of its own" in page_of(result).text


# The curve


def test_each_score_has_a_point_and_a_whisker_and_each_end_its_reason() -> None:
    page = page_of(SOME)
    scored = [c for c in SOME.candidates if c.score is not None]
    assert len(page.of_class("circle", "point")) == len(scored) == 2
    assert len(page.of_class("path", "whisker")) == 2
    assert len(page.of_class("rect", "bar")) == 3
    assert page.text.count("no score: one neighbour") == 2
    without = [
        Candidate(c.alpha, c.diff_previous, c.diff_next, c.score, 0) for c in SOME.candidates
    ]
    page = page_of(replace(SOME, candidates=tuple(without)))
    assert len(page.of_class("circle", "point")) == 2
    assert not page.of_class("path", "whisker")


def test_points_lie_as_their_scores_and_inside_the_chart() -> None:
    rows = [[f"{q}", f"{q * (q % 3)}", f"{q * (q % 2)}", f"{q}", f"{-q}"] for q in range(30)]
    result = result_of(*rows, alphas=(0.0, 0.1, 0.2, 0.3, 0.6))
    page = page_of(result)
    points = [
        (float(a["cx"] or ""), float(a["cy"] or "")) for a in page.of_class("circle", "point")
    ]
    scores = [c.score for c in result.candidates if c.score is not None]
    assert len(set(scores)) == len(points) == 3
    assert points == sorted(points)
    lowest_first = sorted(range(3), key=lambda i: scores[i])
    assert lowest_first == sorted(range(3), key=lambda i: -points[i][1])
    (box,) = (a["viewbox"] for t, a in page.tags if t == "svg")
    _, _, width, height = map(float, (box or "").split())
    assert all(0 < x < width and 0 < y < height for x, y in points)
    gaps = [b[0] - a[0] for a, b in pairwise(points)]
    assert gaps[0] == pytest.approx(gaps[1], abs=0.2)


def test_relative_scores_are_per_cent_and_the_bars_beside_them_too() -> None:
    table = {0.1 * i: [f"{q}: {q % 8 < i}" for q in range(50)] for i in range(6)}
    page = page_of(choose(table, measure="relative"))
    assert "score D (%)" in page.text and "per cent of those that have left the base's" in page.text
    (points,) = (a["points"] or "" for a in page.of_class("polyline", "line"))
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert heights == sorted(heights)  # lower scores lie lower, at greater y
    # From 0 to 0.1 seven of fifty answers change, which is 14 %
    bars = [float(a["height"] or "") for a in page.of_class("rect", "bar")]
    floor = float(page.of_class("rect", "bar")[0]["y"] or "") + bars[0]
    per_cent = (floor - heights[0]) / (100 * (7 + 7) / 7)
    assert max(bars) == pytest.approx(14 * per_cent, abs=0.3)


def test_a_refined_grid_joins_only_scores_of_one_round_by_lines() -> None:
    def generate(alpha: float, prompts: Sequence[int]) -> list[str]:
        return [str(int(alpha * 100) // (2 + p % 13)) for p in prompts]

    result = run_search(generate, range(40), (0.0, 0.2, 0.4, 0.6, 0.8), refine=2)
    page = page_of(result)
    scored = [c for c in result.rounds if c.score is not None]
    assert {c.round for c in scored} == {0, 1, 2}
    assert len(page.of_class("circle", "point")) == len(scored)
    stretches = [list(g) for _, g in groupby(scored, key=lambda c: c.round)]
    lines = [(a["points"] or "").split() for a in page.of_class("polyline", "line")]
    assert [len(line) for line in lines] == [len(s) for s in stretches] == [3, 3, 3]
    pairs: set[tuple[float | None, float | None]]
    pairs = {(c.neighbours[0], c.alpha) for c in result.rounds}
    pairs |= {(c.alpha, c.neighbours[1]) for c in result.rounds}
    assert len(page.of_class("rect", "bar")) == len([p for p in pairs if None not in p])
    assert "in refinement 2" in page.text


def test_what_a_refinement_scored_anew_is_drawn_as_it_was_and_as_it_is() -> None:
    """Its earlier point is hollow, without a whisker, and never the chosen one."""
    new = {0.0: 0, 0.2: 10, 0.3: 12, 0.4: 14, 0.5: 15, 0.6: 17, 0.8: 27}

    def generate(alpha: float, prompts: Sequence[int]) -> list[str]:
        return [f"{place}: {place < new[alpha]}" for place in prompts]

    result = run_search(generate, range(40), (0.0, 0.2, 0.4, 0.6, 0.8), refine=1)
    (was,) = result.earlier
    now = next(c for c in result.candidates if c.alpha == was.alpha)
    assert (was.alpha, was.round, now.round) == (result.alpha, 0, 1)
    page = page_of(result)
    points = page.of_class("circle", "point")
    assert len(page.of_class("circle", "earlier")) == 1
    assert len(page.of_class("circle", "chosen")) == 1
    assert len(points) == len(page.of_class("path", "whisker")) + 1 == 6
    assert len({a["cx"] for a in points}) == 5
    rows = [attrs for tag, attrs in page.tags if tag == "tr" and attrs.get("class") == "chosen"]
    assert len(rows) == 1
    assert "before a refinement scored it anew" in page.text


def test_a_fine_grid_names_only_alphas_that_do_not_collide() -> None:
    alphas = [round(i * 0.02, 2) for i in range(31)]
    rows = [[str(i // (q + 2)) for i in range(31)] for q in range(12)]
    page = page_of(result_of(*rows, alphas=alphas))
    assert len(page.of_class("circle", "point")) == 29
    xs = sorted(
        float(a["x"] or "")
        for t, a in page.tags
        if t == "text" and a.get("y") == "354" and "diff" not in (a.get("class") or "")
    )
    assert len(xs) > 4
    assert all(b - a >= 50 for a, b in pairwise(xs))


# Answers


@pytest.mark.parametrize(
    ("answers", "prefer", "expected"),
    [
        (["a cat", "A cat.", "a dog"], None, [Run(0, 1, "a cat"), Run(2, 2, "a dog")]),
        (["a cat", "A cat.", "a dog"], 1, [Run(0, 1, "A cat."), Run(2, 2, "a dog")]),
        (["x", "y", "x"], 0, [Run(0, 0, "x"), Run(1, 1, "y"), Run(2, 2, "x")]),
        (["x"], None, [Run(0, 0, "x")]),
        ([], None, []),
    ],
)
def test_neighbours_with_one_answer_form_a_run(
    answers: list[str], prefer: int | None, expected: list[Run]
) -> None:
    assert runs(answers, prefer) == tuple(expected)


@given(st.lists(st.sampled_from(["a", "A.", "b", " b ", "", "c"]), min_size=1, max_size=12))
def test_runs_cover_the_grid_once_and_differ_from_their_neighbours(answers: list[str]) -> None:
    found = runs(answers)
    covered = [i for run in found for i in range(run.first, run.last + 1)]
    assert covered == list(range(len(answers)))
    for run in found:
        inside = {normalise(a) for a in answers[run.first : run.last + 1]}
        assert inside == {normalise(run.answer)}
    keys = [normalise(run.answer) for run in found]
    assert all(a != b for a, b in pairwise(keys))


def test_equal_answers_share_a_cell_and_the_chosen_alphas_is_marked() -> None:
    page = page_of(SOME, ["What is it?", "How many?", "Open?"])
    assert SOME.alpha == 0.1
    cells = [(a.get("colspan"), a.get("class"), t) for a, t in page.cells if "colspan" in a]
    assert cells == [
        ("1", None, "0.01"),
        ("1", "chosen", "0.12"),
        ("2", None, f"0.2{DASH}0.33"),
        ("3", "chosen", f"0.0{DASH}0.2A cat."),
        ("1", None, "0.3a dog"),
    ]
    assert "2 prompts of 3" in page.text
    assert "1 prompt keeps its answer at every alpha" in page.text
    assert page.text.index("How many?") < page.text.index("What is it?") < page.text.index("Open?")


def test_without_changes_the_page_says_so() -> None:
    page = page_of(result_of(["a"] * 4, ["b"] * 4), ["p", "q"])
    assert "No answer changes over the grid." in page.text
    assert "2 prompts keep their answer" in page.text
    assert not page.of_class("table", "answers")


def test_long_answers_are_shortened_around_the_difference_and_kept_whole() -> None:
    long = " ".join(f"word{i}" for i in range(200))
    other = long.replace("word150", "changed")
    page = page_of(result_of([long, long, other, other]), ["p"])
    texts = page.texts
    assert long in texts and other in texts
    short = [t for t in texts if t.endswith("…")]
    assert len(short) == 2
    assert "word150" in short[0] and "changed" in short[1]
    assert all(len(t) < 200 for t in short)


def test_prompts_may_be_missing() -> None:
    page = page_of(SOME, ["only the first"])
    assert "only the first" in page.text
    assert "prompt 2" in page.text and "prompt 3" in page.text


def test_an_id_that_is_the_text_is_shown_once() -> None:
    page = Page(report.html(SOME, [Prompt("doc-17", id="doc-17"), Prompt("x"), Prompt("y")]))
    assert page.texts.count("doc-17") == 1


# Images


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_images_become_small_jpegs_inside_the_page(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "photo.img"
    path.write_bytes(picture(kind))
    page = Page(report.html(SOME, [Prompt("p", (path, picture(kind)))]))
    sources = [a["src"] or "" for t, a in page.tags if t == "img"]
    assert len(sources) == 2
    for source in sources:
        image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert image.format == "JPEG" and image.size == (96, 64)


def test_an_image_that_cannot_be_shown_leaves_its_name(tmp_path: Path) -> None:
    broken = tmp_path / "broken <1>.png"
    broken.write_bytes(picture()[:60])
    page = Page(report.html(SOME, [Prompt("p", (broken, tmp_path / "gone.png", b"%!PS"))]))
    assert not [tag for tag, _ in page.tags if tag == "img"]
    for name in ("broken <1>.png", "gone.png", "image 3"):
        assert name in page.texts


def test_without_pillow_images_leave_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(picture())
    monkeypatch.setitem(sys.modules, "PIL", None)
    page = Page(report.html(SOME, [Prompt("p", (path,))]))
    assert "photo.png" in page.texts


# Size


def test_the_page_stays_bounded_and_says_what_it_left_out() -> None:
    long, image = "word " * 1000, picture()
    changing = [(f"{long} {i}", f"{i}", f"{i}x", f"{i}") for i in range(300)]
    rows = [*changing, *[(long,) * 4] * 900]
    answers = {alpha: tuple(row[i] for row in rows) for i, alpha in enumerate(GRID)}
    prompts = [Prompt(long, (image,) * 9, f"p:{i}") for i in range(len(rows))]
    page = report.html(replace(SOME, prompts=len(rows), answers=answers), prompts)
    parsed = Page(page)
    assert len(page) < 12_000_000
    assert len([a for a, _ in parsed.cells if a.get("colspan")]) == 4 * SHOWN_CHANGING
    assert "300 prompts of 1,200" in parsed.text and "The 100 that change least" in parsed.text
    assert "900 prompts keep" in parsed.text and "400 more are left out" in parsed.text
    assert "and 5 more" in parsed.text and "more characters" in parsed.text


# Timings, facts


def test_timings_are_shown_with_rates_ratios_and_totals() -> None:
    timings = [Timing(0.0, 0.5, 20.0, 1000, 8000, 8000), Timing(0.1, 0.25, 5.0, 1000, 2000, 8000)]
    page = page_of(SOME, timings=timings)
    cells = [text for _, text in page.cells][-21:]
    assert cells[-14:-7] == ["0.25", "5.00", "1,000", "200.0", "2,000", "8,000", "0.25"]
    assert cells[-7:] == ["0.75", "25.0", "2,000", "80.0", "10,000", "16,000", "0.62"]


def test_what_alphas_by_layer_took_is_one_line_and_counts_in_the_total() -> None:
    layered = [Timing(Alphas(0.1, {"layers.0": a}), 1.0, 2.0, 10, 20, 40) for a in (0.2, 0.3)]
    page = page_of(SOME, timings=[Timing(0.1, 0.5, 5.0, 100, 200, 800), *layered])
    assert "by layer, 2 times" in page.text
    cells = [text for _, text in page.cells][-14:]
    assert cells[:7] == ["2.00", "4.00", "20", "5.0", "40", "80", "0.50"]
    assert cells[7:] == ["2.50", "9.00", "120", "13.3", "240", "880", "0.27"]


def test_timings_of_nothing_do_not_divide_by_it() -> None:
    page = page_of(SOME, timings=[Timing(0.0, 0.0, 0.0, 0, 0, 0)])
    cells = [text for _, text in page.cells][-7:]
    assert cells == ["0.00", "0.00", "0", DASH, "0", "0", DASH]


def test_without_timings_and_facts_their_sections_are_absent() -> None:
    page = page_of(SOME)
    assert "Timings" not in page.text
    assert not [tag for tag, _ in page.tags if tag == "dl"]


def test_distances_are_not_written_as_counts() -> None:
    candidates = (
        Candidate(0.0, None, 0.125, None, 0),
        Candidate(0.1, 0.125, 0.25, 0.375, 0, (0.1, 0.625)),
        Candidate(0.2, 0.25, None, None, 0),
    )
    page = page_of(Result(0.1, "embedding", 9, candidates, {}))
    assert "0.38" in [t for _, t in page.cells] and "0.10 to 0.62" in [t for _, t in page.cells]
    assert "score D (summed distance)" in page.text


# write


def test_writing_replaces_the_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    report.write(path, "new ←")
    assert path.read_bytes() == "new ←".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match=r"report\.html: .*No space left on device"):
        report.write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_folder_that_is_not_there_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"):
        report.write(tmp_path / "missing" / "report.html", "x")
