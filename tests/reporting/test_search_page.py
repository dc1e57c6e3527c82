"""The page of a search: well-formed, self-contained, safe with hostile text, true to the result."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pages import HOSTILE, Page
from PIL import Image

from lowmem_adamms.answers import Answer
from lowmem_adamms.errors import OutputError
from lowmem_adamms.prompts import Prompt
from lowmem_adamms.reporting.answers import AnswerRun, find_answer_runs
from lowmem_adamms.reporting.page import write_page
from lowmem_adamms.reporting.search_page import MAX_CHANGING, render_search_page
from lowmem_adamms.reporting.text import DASH, show_hidden
from lowmem_adamms.searching.answer_text import normalise
from lowmem_adamms.searching.search import Candidate, Result, choose, search

GRID = (0.0, 0.1, 0.2, 0.3)


def result_of(*answers: Sequence[str], alphas: Sequence[float] = GRID) -> Result:
    """The answers to each prompt, over the whole grid."""
    return choose({alpha: [row[i] for row in answers] for i, alpha in enumerate(alphas)})


def page_of(result: Result, prompts: Sequence[Prompt | str] = (), **options: object) -> Page:
    asked = [
        prompt if isinstance(prompt, Prompt) else Prompt(prompt, id=f"p.jsonl:{i}")
        for i, prompt in enumerate(prompts, 1)
    ]
    return Page(render_search_page(result, asked, **options))  # type: ignore[arg-type]


def picture(kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (300, 200), "teal").save(out, kind)
    return out.getvalue()


SOME = result_of(
    ["a cat", "A cat.", "a cat", "a dog"],
    ["1", "2", "3", "3"],
    ["yes", "yes", "yes", "yes"],
)


# The page


def test_the_page_refers_to_nothing_outside_and_allows_only_its_own_script() -> None:
    prompts = [Prompt("see https://example.org/x.png", (picture(),)) for _ in range(3)]
    text = render_search_page(SOME, prompts, title="base <- donor")
    page = Page(text)
    assert page.foreign_references() == []
    (policy,) = (a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None and "default-src 'none'" in policy
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    assert policy.endswith(f"script-src '{Page.digest(script)}'")


def test_sections_stand_in_their_order() -> None:
    facts = {"Placement": {"model": "cpu"}, "Recipe": {"base": "b"}}
    text = page_of(SOME, facts=facts, title="Base-7B <- Donor-7B").text
    marks = ["Base-7B ← Donor-7B", "Merge at alpha", "Disagreement", "Alphas that were tried"]
    marks += ["Answers that change", "at every alpha", "Placement", "Recipe"]
    places = [text.find(mark, text.find("measure")) for mark in marks]
    assert -1 not in places and places == sorted(places)
    without = page_of(SOME)
    assert not [tag for tag, _ in without.tags if tag == "dl"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.text(st.characters(categories=None), max_size=30) | st.just(HOSTILE),
        min_size=8,
        max_size=8,
    )
)
def test_any_text_leaves_the_page_whole(texts: list[str]) -> None:
    result = replace(result_of(texts[:4], texts[2:6]), notes=(texts[6],))
    prompts = [Prompt(texts[6], (Path("a/<b>.png"),), texts[7]), Prompt(texts[7])]
    page = render_search_page(
        result, prompts, facts={texts[0]: {texts[1]: texts[2]}}, title=texts[7]
    )
    page.encode("utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page)
    harmless = page_of(SOME, ["x" * 999], facts={"a": {"b": "c"}})
    assert {tag for tag, _ in Page(page).tags} <= {tag for tag, _ in harmless.tags}
    assert page.count("<script") == 1


@given(st.text(st.characters(categories=None), max_size=60))
def test_hidden_characters_become_their_code_points(text: str) -> None:
    text = text.replace("\r", "").replace("[U+", "")
    shown = show_hidden(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]", shown)
    back = re.sub(r"\[U\+([0-9A-F]{4,6})\]", lambda found: chr(int(found[1], 16)), shown)
    assert back == text


def test_joiners_stay_and_what_reorders_is_shown() -> None:
    assert show_hidden("a\u202eb\x00\ud800\r\n") == "a[U+202E]b[U+0000][U+D800]\n"
    joined = "\U0001f469\u200d\U0001f467 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    assert show_hidden(joined) == joined
    assert "[U+202E]evil" in page_of(SOME, [HOSTILE]).text


# The choice


def test_the_chosen_alpha_is_said_and_marked() -> None:
    answers = [["a", "b", "b", "b", "c"]] * 40 + [["a", "b", "c", "c", "c"]] * 20
    result = result_of(*answers, alphas=(0.0, 0.1, 0.25, 0.3, 0.6))
    page = page_of(result)
    assert result.alpha == 0.25
    assert "Merge at alpha 0.25." in page.text
    assert "D is 20 here, the lowest of 3" in page.text
    assert "Next best: alpha 0.3 with 40" in page.text
    assert len(page.of_class("tr", "chosen")) == 1
    assert len(page.of_class("circle", "chosen")) == 1
    share = 100 * result.wins[0.25]
    assert f"this alpha has the lowest D in {share:.0f} % of 1,000 draws" in page.text


def test_ties_noise_and_notes_are_said() -> None:
    candidates = (
        Candidate(0.0, None, 4, None, 0),
        Candidate(0.1, 4, 1, 5, 0, (2.0, 9.0)),
        Candidate(0.2, 1, 4, 5, 0, (1.0, 8.0)),
        Candidate(0.3, 4, None, None, 0),
    )
    notes = ("first <note>", "second note")
    page = page_of(
        Result(0.1, "pairwise", 50, candidates, {}, ties=(0.1, 0.2), noise=3, notes=notes)
    )
    assert "D is 5 here, the lowest of 2, tied with 0.2." in page.text and "2 to 9" in page.text
    assert "asked twice at this alpha, 3 of 50 answers differed" in page.text
    assert set(notes) <= set(page.texts)
    assert len(page.of_class("li", "note")) == 2
    assert len(page.of_class("circle", "tie")) == 2
    assert len(page.of_class("span", "tag")) == 3  # chosen, and two ties


def test_a_lower_score_of_degenerate_answers_is_explained() -> None:
    answers = [[f"{q}", f"{q + (q < 6)}", f"{q + (q < 9)}", "", "", ""] for q in range(20)]
    result = result_of(*answers, alphas=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5))
    page = page_of(result)
    assert result.alpha == 0.1
    assert "the lowest but for the degenerate" in page.text
    assert "Alpha 0.4 has a lower D, 0, but 20 of 20 answers there are empty" in page.text
    assert len(page.of_class("circle", "degenerate")) == 2
    assert len(page.of_class("td", "warn")) == 3
    assert "\N{MULTIPLICATION SIGN} 20" in page.text


def test_an_alpha_without_a_score_is_said_to_have_none() -> None:
    result = result_of(*[["a", "", "", ""] for _ in range(12)])
    assert result.alpha == 0.0
    page = page_of(result)
    assert "This alpha has no score of its own" in page.text
    most = result_of(*[["", "", "", ""]] * 6, *[["a", "b", "c", "d"]] * 4)
    for found in (page, page_of(most)):  # as the base's, or markedly more
        assert len(found.of_class("circle", "degenerate")) == 2


# The curve


def test_each_score_has_a_point_and_a_whisker_and_each_end_its_reason() -> None:
    page = page_of(SOME)
    assert len(page.of_class("circle", "point")) == 2
    assert len(page.of_class("path", "whisker")) == 2
    assert len(page.of_class("rect", "bar")) == 3
    assert page.text.count("no score: one neighbour") == 2
    without = tuple(replace(candidate, interval=None) for candidate in SOME.candidates)
    page = page_of(replace(SOME, candidates=without))
    assert len(page.of_class("circle", "point")) == 2
    assert not page.of_class("path", "whisker")


def test_the_axis_counts_whole_answers_however_few_differ() -> None:
    page = page_of(result_of(["a", "b", "b", "b"], ["c", "c", "c", "d"]))
    levels = [a["y1"] for a in page.of_class("line", "grid")]
    assert len(levels) <= 4  # 0, 1, 2, and one above


def test_points_lie_as_their_scores_and_inside_the_chart() -> None:
    rows = [[f"{q}", f"{q * (q % 3)}", f"{q * (q % 2)}", f"{q}", f"{-q}"] for q in range(30)]
    result = result_of(*rows, alphas=(0.0, 0.1, 0.2, 0.3, 0.6))
    page = page_of(result)
    points = [(float(a["cx"]), float(a["cy"])) for a in page.of_class("circle", "point")]
    scores = [c.score for c in result.candidates if c.score is not None]
    assert len(set(scores)) == len(points) == 3
    assert points == sorted(points)
    lowest_first = sorted(range(3), key=lambda i: scores[i])
    assert lowest_first == sorted(range(3), key=lambda i: -points[i][1])
    (box,) = (a["viewbox"] for t, a in page.tags if t == "svg")
    _, _, width, height = map(float, box.split())
    assert all(0 < x < width and 0 < y < height for x, y in points)
    gaps = [b[0] - a[0] for a, b in pairwise(points)]
    assert gaps[0] == pytest.approx(gaps[1], abs=0.2)


def test_relative_scores_are_per_cent_and_the_bars_beside_them_too() -> None:
    table = {0.1 * i: [f"{q}: {q % 8 < i}" for q in range(50)] for i in range(6)}
    page = page_of(choose(table, measure="relative"))
    assert "score D (%)" in page.text and "per cent of those that are no longer" in page.text
    (points,) = (a["points"] for a in page.of_class("polyline", "line"))
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert heights == sorted(heights)  # lower scores lie lower, at greater y
    # From 0 to 0.1 seven of fifty answers change, which is 14 %
    bars = [float(a["height"]) for a in page.of_class("rect", "bar")]
    floor = float(page.of_class("rect", "bar")[0]["y"]) + bars[0]
    per_cent = (floor - heights[0]) / (100 * (7 + 7) / 7)
    assert max(bars) == pytest.approx(14 * per_cent, abs=0.3)


def test_entropy_is_shown_in_nats_at_every_alpha_and_without_bars() -> None:
    """Also at the ends; one line joins all rounds of a refined grid."""

    def generate(alpha: float, prompts: Sequence[int]) -> list[Answer]:
        return [Answer(f"{i} {alpha}", entropy=0.2 + abs(alpha - 0.1) + i / 1000) for i in prompts]

    page = page_of(search(generate, range(40), GRID, measure="entropy"))
    assert "Uncertainty over alpha" in page.text and "score D (nats)" in page.text
    assert "D is 0.2195 here, the lowest of 4. It is the mean entropy of" in page.text
    assert "Next best: alpha 0.0 with 0.3195." in page.text
    level = choose({alpha: [Answer("a", entropy=1.0)] for alpha in GRID}, measure="entropy")
    assert "D is 1.0000 here, the lowest of 4, tied with" in page_of(level).text
    rows = [text for attributes, text in page.cells if "colspan" not in attributes]
    assert rows[:5] == ["0.3195", "0.3158 to 0.3230", "0\N{NO-BREAK SPACE}%", "0", "0.2195"]
    assert not page.of_class("rect", "bar") and "between two neighbours" not in page.text
    assert len(page.of_class("circle", "point")) == len(page.of_class("path", "whisker")) == 4
    assert len(page.of_class("line", "grid")) == 6  # from 0 to 0.5
    refined = search(generate, range(40), GRID, measure="entropy", refine=1)
    page = page_of(refined)
    assert [len(a["points"].split()) for a in page.of_class("polyline", "line")] == [6]
    assert "one round of refinement" not in page.text


def test_a_refined_grid_joins_only_scores_of_one_round_by_lines() -> None:
    """An earlier point of an alpha is hollow, without a whisker, and never the chosen one."""
    changes = {0.0: 0, 0.2: 10, 0.3: 12, 0.4: 14, 0.5: 15, 0.6: 17, 0.8: 27}

    def generate(alpha: float, prompts: Sequence[int]) -> list[str]:
        return [f"{prompt}: {prompt < changes[alpha]}" for prompt in prompts]

    result = search(generate, range(40), (0.0, 0.2, 0.4, 0.6, 0.8), refine=1)
    (was,) = result.earlier
    now = next(c for c in result.candidates if c.alpha == was.alpha)
    assert (was.alpha, was.round, now.round) == (result.alpha, 0, 1)
    page = page_of(result)
    points = page.of_class("circle", "point")
    assert len(page.of_class("circle", "earlier")) == len(page.of_class("circle", "chosen")) == 1
    assert len(points) == len(page.of_class("path", "whisker")) + 1 == 6
    assert len({a["cx"] for a in points}) == 5
    assert len(page.of_class("tr", "chosen")) == 1
    lines = [a["points"].split() for a in page.of_class("polyline", "line")]
    assert [len(line) for line in lines] == [3, 3]
    # Bars of the grid, of the halves, and of 0.3 and 0.5 to what stood there before. Where a bar
    # was refined, only the narrow ones inside it are numbered and edged
    assert len(page.of_class("rect", "bar")) == 4 + 4
    assert len(page.of_class("rect", "fine")) == 4
    assert len(page.of_class("text", "diff")) == 6
    assert "before a refinement scored it anew" in page.text
    assert "the lowest of 3 in refinement 1" in page.text


def test_a_fine_grid_names_only_alphas_that_do_not_collide() -> None:
    alphas = [round(i * 0.02, 2) for i in range(31)]
    rows = [[str(i // (q + 2)) for i in range(31)] for q in range(12)]
    page = page_of(result_of(*rows, alphas=alphas))
    assert len(page.of_class("circle", "point")) == 29
    ticks = sorted(float(a["x"]) for a in page.of_class("text", "tick"))
    assert len(ticks) > 4
    assert all(b - a >= 50 for a, b in pairwise(ticks))
    columns = [a for t, a in page.tags if t == "rect" and "rx" in a]
    edges = [(float(a["x"]), float(a["x"]) + float(a["width"])) for a in columns]
    assert len(edges) == 31
    ends = [float(a["x1"]) for a in page.of_class("line", "end")]
    assert edges[0][0] < ends[0] < edges[0][1] and edges[-1][0] < ends[-1] < edges[-1][1]
    assert all(a[1] == pytest.approx(b[0], abs=0.11) for a, b in pairwise(edges))
    for point in page.of_class("circle", "point"):
        assert sum(left < float(point["cx"]) < right for left, right in edges) == 1


# Answers


@pytest.mark.parametrize(
    ("answers", "prefer", "expected"),
    [
        (["a cat", "A cat.", "a dog"], None, [(0, 1, "a cat"), (2, 2, "a dog")]),
        (["a cat", "A cat.", "a dog"], 1, [(0, 1, "A cat."), (2, 2, "a dog")]),
        (["x", "y", "x"], 0, [(0, 0, "x"), (1, 1, "y"), (2, 2, "x")]),
        ([], None, []),
    ],
)
def test_neighbours_with_one_answer_form_a_run(
    answers: list[str], prefer: int | None, expected: list[tuple[int, int, str]]
) -> None:
    assert find_answer_runs(answers, prefer) == tuple(AnswerRun(*run) for run in expected)


@given(st.lists(st.sampled_from(["a", "A.", "b", " b ", "", "c"]), min_size=1, max_size=12))
def test_runs_cover_the_grid_once_and_differ_from_their_neighbours(answers: list[str]) -> None:
    runs = find_answer_runs(answers)
    assert [i for run in runs for i in range(run.first, run.last + 1)] == list(range(len(answers)))
    for run in runs:
        inside = {normalise(answer) for answer in answers[run.first : run.last + 1]}
        assert inside == {normalise(run.answer)}
    assert all(normalise(a.answer) != normalise(b.answer) for a, b in pairwise(runs))


def test_equal_answers_share_a_cell_and_the_chosen_alphas_is_marked() -> None:
    page = page_of(SOME, ["What is it?", "How many?", "Open?"])
    assert SOME.alpha == 0.1
    cells = [(a["colspan"], a["class"], text) for a, text in page.cells if "colspan" in a]
    assert cells == [
        ("1", "", "0.01"),
        ("1", "marked", "0.12"),
        ("2", "", f"0.2{DASH}0.33"),
        ("3", "marked", f"0.0{DASH}0.2A cat."),
        ("1", "", "0.3a dog"),
    ]
    assert "2 prompts of 3" in page.text
    assert "1 prompt keeps its answer at every alpha" in page.text
    assert page.text.index("How many?") < page.text.index("What is it?") < page.text.index("Open?")


def test_prompts_that_change_most_come_first() -> None:
    """By runs of equal answers, then by different answers, then in their order."""
    rows = [["a", "a", "b", "b"], ["a", "b", "a", "b"], ["a", "b", "c", "d"], ["a", "b", "b", "b"]]
    text = page_of(result_of(*rows), ["two", "back and forth", "most", "two again"]).text
    asked = ["most", "back and forth", "two p.jsonl", "two again"]
    places = [text.rindex(prompt) for prompt in asked]
    assert places == sorted(places)


def test_without_changes_the_page_says_so() -> None:
    page = page_of(result_of(["a"] * 4, ["b"] * 4), ["p", "q"])
    assert "No answer changes over the grid." in page.text
    assert "2 prompts keep their answer" in page.text
    assert not page.of_class("table", "answers")


def test_long_answers_are_shortened_around_the_difference_and_kept_whole() -> None:
    long = " ".join(f"word{i}" for i in range(200))
    other = long.replace("word150", "changed")
    page = page_of(result_of([long, long, other, other]), ["p"])
    assert {long, other} <= set(page.texts)
    short = [text for text in page.texts if text.endswith("…")]
    assert len(short) == 2
    assert "word150" in short[0] and "changed" in short[1]
    assert all(len(text) < 200 for text in short)
    early = page_of(result_of([long, long, *[long.replace("word15 ", "x ")] * 2]), ["p"])
    assert all(text.startswith("word0 ") for text in early.texts if text.endswith("…"))
    steady = page_of(result_of([long] * 4), ["p"])
    assert [text[:11] for text in steady.texts if text.endswith("…")] == ["word0 word1"]


def test_blank_answers_and_missing_prompts_are_said() -> None:
    blank = result_of(["", "x", "x", "x"], [" " * 1000, "x", "x", "x"])
    page = page_of(blank, [Prompt("", id="doc-17")])
    assert page.texts.count("(empty)") == page.texts.count("(white space)") == 1
    assert page.texts.count("doc-17") == 1
    assert "prompt 2" in page.text


# Images


def test_images_become_small_jpegs_inside_the_page_or_leave_their_names(tmp_path: Path) -> None:
    path, broken = tmp_path / "photo.img", tmp_path / "broken <1>.png"
    path.write_bytes(picture())
    broken.write_bytes(picture()[:60])
    shown = Prompt("p", (path, picture("JPEG")))
    page = page_of(SOME, [shown, Prompt("q", (broken, tmp_path / "gone.png", b"%!PS"))])
    sources = [a["src"] for t, a in page.tags if t == "img"]
    assert len(sources) == 2
    for source in sources:
        image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert image.format == "JPEG" and image.size == (300, 200), "enlarged it is as it was"
    assert {"broken <1>.png", "gone.png", "image 3"} <= set(page.texts)


# What the script works with


BACK_AND_FORTH = result_of(
    *[["a", "b", "a", ""], ["x", "X.", "y", "y"]], *[[f"{i}"] * 4 for i in range(20)]
)


def test_chips_tell_what_is_remarkable_at_the_chosen_alpha() -> None:
    page = page_of(replace(BACK_AND_FORTH, alpha=0.2), ["first", "second"])
    rows = [a for t, a in page.tags if t == "tr" and "data-texts" in a]
    assert [(a["data-texts"], a["data-degenerate"]) for a in rows] == [
        ("0 1 0 2", "3"),
        ("0 0 1 1", ""),
    ]
    chips = [a for a in page.of_class("span", "chip") if "hidden" not in a]
    assert [a["class"].removeprefix("chip ") for a in chips] == ["changed", "changed", "differs"]
    at_the_end = page_of(replace(BACK_AND_FORTH, alpha=0.3), ["first", "second"])
    chips = [a for a in at_the_end.of_class("span", "chip") if "hidden" not in a]
    names = [a["class"].removeprefix("chip ") for a in chips]
    assert names == ["changed", "differs", "degenerate", "differs"]


def test_constant_answers_are_degenerate_one_by_one() -> None:
    rows = [[f"{i}", f"{i}", "same", f"{i}"] for i in range(20)]
    result = result_of(*rows)
    assert result.degenerate[0.2] == frozenset(range(20)) and not result.degenerate[0.1]
    page = page_of(result)
    assert {a["data-degenerate"] for t, a in page.tags if "data-texts" in a} == {"2"}


def test_every_alpha_has_buttons_that_the_keyboard_reaches() -> None:
    page = page_of(SOME, ["p"])
    buttons = [a for t, a in page.tags if t == "button" and "data-position" in a]
    in_table, in_head = buttons[:4], buttons[4:]
    picks = page.of_class("g", "pick")
    for group in (in_table, in_head, picks):
        assert [a["data-position"] for a in group] == list("0123")
        assert [a["aria-pressed"] for a in group] == ["false", "true", "false", "false"]
    assert {(a["role"], a["tabindex"]) for a in picks} == {("button", "0")}
    assert [a["data-alpha"] for a in picks] == ["0.0", "0.1", "0.2", "0.3"]


def test_images_are_buttons_with_a_name() -> None:
    page = page_of(SOME, [Prompt("p", (picture(),))])
    assert [a["aria-label"] for a in page.of_class("button", "enlarge")] == ["Enlarge image 1"]


def test_the_donors_answers_are_the_last_column() -> None:
    page = page_of(SOME, ["p", "q", "r"], donor_answers=["a bird", "", "no"])
    donor = [text for a, text in page.cells if a.get("class") == "donor"]
    assert donor == ["donor(empty)", "donora bird"], "in the order of the rows"
    assert page.text.count("donor (1.0)") == 1
    assert [text for _, text in page.cells][-2:] == ["yes", "no"], "also where nothing changes"
    assert "donor (1.0)" not in page_of(SOME).text


def test_the_command_ends_in_the_alpha() -> None:
    page = page_of(SOME, command="python -m lowmem_adamms 'a <b>' c -o merged --alpha")
    assert "python -m lowmem_adamms 'a <b>' c -o merged --alpha 0.1" in page.text
    assert len(page.of_class("button", "copy")) == 1
    assert not page_of(SOME).of_class("button", "copy")


def test_several_donors_have_a_curve_and_a_table_each() -> None:
    first, second = SOME, result_of(["a", "b", "c", "c"], ["x", "x", "x", "x"])
    page = page_of(second, earlier=(first,), command="merge --alpha 0.1")
    for heading in ("Donor 1, with donor 2 left out", "Donor 2, with donor 1 at alpha 0.1"):
        assert page.text.count(heading) == 1
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 2
    assert len(page.of_class("circle", "chosen")) == len(page.of_class("tr", "chosen")) == 2
    assert len(page.of_class("button", "copy")) == 1
    assert f"merge --alpha 0.1 {second.alpha}" in page.text


# Size


def test_the_page_stays_bounded_and_says_what_it_left_out() -> None:
    long, image = "word " * 1000, picture()
    changing = [(f"{long} {i}", f"{i}", f"{i}x", f"{i}") for i in range(300)]
    rows = [*changing, *[(long,) * 4] * 900]
    answers = {alpha: tuple(row[i] for row in rows) for i, alpha in enumerate(GRID)}
    prompts = [Prompt(long, (image,) * 9, f"p:{i}") for i in range(len(rows))]
    text = render_search_page(replace(SOME, prompts=len(rows), answers=answers), prompts)
    page = Page(text)
    assert len(text) < 12_000_000
    assert len([a for a, _ in page.cells if "colspan" in a]) == 4 * MAX_CHANGING
    assert "300 prompts of 1,200" in page.text and "The 100 that change least" in page.text
    assert "900 prompts keep" in page.text and "400 more are left out" in page.text
    assert "and 5 more" in page.text and "more characters" in page.text


# Writing


def test_writing_replaces_the_file_whole_or_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_page(path, "new ←")
    assert path.read_bytes() == "new ←".encode()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match=r"report\.html: .*No space left on device"):
        write_page(path, "newer")
    assert path.read_bytes() == "new ←".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(OutputError, match="No such file"):
        write_page(tmp_path / "missing" / "report.html", "x")
