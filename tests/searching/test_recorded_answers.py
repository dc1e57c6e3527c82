"""Recorded answers: every format as its tool writes it, and one clear line for what is broken."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lowmem_adamms.errors import PromptError, RecipeError
from lowmem_adamms.merging.journal import AnswerJournal
from lowmem_adamms.searching.recorded_answers import parse_spec, read_answers


def jsonl(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def table(path: Path, *rows: Sequence[Any]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        dialect = "excel-tab" if path.suffix == ".tsv" else "excel"
        csv.writer(file, dialect, quoting=csv.QUOTE_ALL).writerows(rows)
    return path


def spreadsheet(path: Path, *rows: Sequence[Any]) -> Path:
    book = pytest.importorskip("openpyxl").Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


def journal(path: Path, answers: Mapping[float, str]) -> Path:
    """A search's answers, a letter each."""
    return jsonl(
        path,
        [
            {"alpha": alpha, "index": i, "answer": letter}
            for alpha, letters in answers.items()
            for i, letter in enumerate(letters)
        ],
    )


def log(doc_id: int, answer: Any) -> dict[str, Any]:
    """A line of lmms-eval's log: `answer` as of 2026, a list of it in 2024 and 2025."""
    return {"doc_id": doc_id, "target": "yes", "filtered_resps": answer, "doc_hash": "0"}


def refused(source: Path | tuple[float | None, Path], words: str) -> None:
    with pytest.raises(PromptError, match=words) as caught:
        read_answers([source])
    path = source if isinstance(source, Path) else source[1]
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


# What the command line says


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.3=run.jsonl", (0.3, Path("run.jsonl"))),
        ("1e-1=x=y.tsv", (0.1, Path("x=y.tsv"))),
        ("0.30000000000000004=x", (0.3, Path("x"))),
        ("alpha=0.3.jsonl", (None, Path("alpha=0.3.jsonl"))),
        ("0.3", (None, Path("0.3"))),
    ],
)
def test_an_alpha_stands_before_the_first_equals_sign(
    text: str, expected: tuple[float | None, Path]
) -> None:
    assert parse_spec(text) == expected


@pytest.mark.parametrize("text", ["1.5=x", "-0.1=x", "nan=x", "0.3="])
def test_an_alpha_out_of_range_or_without_a_file_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="expected ALPHA=FILE with an alpha in"):
        parse_spec(text)


# Formats


def test_a_journal_holds_all_alphas_in_any_order(tmp_path: Path) -> None:
    lines = [
        {"alpha": 0.1 + 0.2, "index": 10, "answer": "k"},
        {"alpha": 0.3, "index": 9, "answer": "j"},
        {"alpha": 0.0, "index": 9, "answer": "a"},
        {"alpha": 0, "index": 10, "answer": "", "tokens": 7},
    ]
    answers, ids = read_answers([jsonl(tmp_path / "answers.jsonl", lines)])
    assert list(answers.items()) == [(0.0, ["a", ""]), (0.3, ["j", "k"])]
    assert ids == ["9", "10"]


def test_a_journal_is_read_as_the_search_writes_it(tmp_path: Path) -> None:
    """With its first line, and without the second answers that measure the noise."""
    path = tmp_path / "answers.jsonl"
    with AnswerJournal(path, "fingerprint") as written:
        for alpha in (0.0, 0.1):
            written.note(alpha, 1, f"b {alpha}", [5, 6])
            written.note(alpha, 0, "ä\n", [7])
        written.note(0.1, 0, "other", [8], aside="again")
        written.note(1.0, 0, "the donor's", [8], aside="donor")
    assert read_answers([path]) == ({0.0: ["ä\n", "b 0.0"], 0.1: ["ä\n", "b 0.1"]}, ["0", "1"])


def test_sample_logs_of_all_ages_are_read(tmp_path: Path) -> None:
    """Filtered answers count where there are any; raw ones where a log has no others."""
    thought = log(0, ["Yes"]) | {"resps": [["<think>I see</think> Yes"]]}
    raw: list[dict[str, Any]] = [{"doc_id": 0, "resps": [["Raw"]]}, log(1, "Maybe")]
    oldest = tmp_path / "mme.json"
    oldest.write_text(json.dumps({"args": {}, "logs": [log(0, ["A"]), log(1, ["B"])]}))
    answers, ids = read_answers(
        [
            (0.2, jsonl(tmp_path / "2026.jsonl", raw)),
            (0.0, jsonl(tmp_path / "2025.jsonl", [log(1, ["No"]), thought])),
            (0.1, oldest),
        ]
    )
    assert answers == {0.0: ["Yes", "No"], 0.1: ["A", "B"], 0.2: ["Raw", "Maybe"]}
    assert ids == ["0", "1"]


@pytest.mark.parametrize("responses", [[["-1.5", "True"], ["-2", "False"]], [], None, 3, {}])
def test_responses_that_are_not_one_text_are_refused(tmp_path: Path, responses: Any) -> None:
    path = jsonl(tmp_path / "x.jsonl", [log(0, "yes"), log(1, responses)])
    refused((0.5, path), r"x\.jsonl, line 2: .*expected (one|a text)")


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_prediction_tables_are_read(tmp_path: Path, suffix: str) -> None:
    """Also of cells that are longer than the csv module's limit, such as images."""
    path = table(
        tmp_path / f"model_MMBench.{suffix}",
        ["index", "image", "answer", "prediction"],
        ["3", "A" * 200_000, "B", 'He said "B",\tor C\n'],
        ["12", "", "A", ""],
        ["7", "", "A", "=A"],
    )
    expected = ({0.1: ['He said "B",\tor C\n', "=A", ""]}, ["3", "7", "12"])
    assert read_answers([(0.1, path)]) == expected


def test_predictions_may_be_json_records(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"index": 1.0, "prediction": "B"},
        {"index": 0, "prediction": float("nan")},
    ]
    (tmp_path / "model_MMBench.json").write_text(json.dumps(records, indent=4))
    lines = jsonl(tmp_path / "model_MMBench.jsonl", records)
    answers, ids = read_answers([(0.1, tmp_path / "model_MMBench.json"), (0.2, lines)])
    assert (answers, ids) == ({0.1: ["", "B"], 0.2: ["", "B"]}, ["0", "1"])


def test_prediction_spreadsheets_are_read(tmp_path: Path) -> None:
    """Formulas as written, numbers as shown, empty cells as empty answers, empty rows not at all"""
    path = spreadsheet(
        tmp_path / "model_MMBench.xlsx",
        ["index", "question", "prediction", None],
        [2, "What?", "=A+B", None],
        [1.0, "Which?", "two\nlines"],
        [None, None, None],
        [30, "How many?", 12],
        [4, "Nothing?", None],
    )
    expected = ({0.0: ["two\nlines", "=A+B", "", "12"]}, ["1", "2", "4", "30"])
    assert read_answers([(0.0, path)]) == expected


def test_a_spreadsheet_without_openpyxl_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.xlsx").write_bytes(b"PK")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    refused((0.0, tmp_path / "x.xlsx"), r"x\.xlsx: .*pip install openpyxl")


def test_formats_mix_and_ids_that_are_not_numbers_keep_the_smallest_alphas_order(
    tmp_path: Path,
) -> None:
    header = ["index", "prediction"]
    second = table(tmp_path / "b.tsv", header, ["10", "6"], ["b", "4"], ["a_2", "5"])
    first = jsonl(tmp_path / "a.jsonl", [{"doc_id": i, "resps": i} for i in ("b", "a_2", "10")])
    answers, ids = read_answers([(0.3, second), (0.1, first)])
    assert ids == ["b", "a_2", "10"]
    assert answers == {0.1: ids, 0.3: ["4", "5", "6"]}


# What is wrong


def test_alphas_with_other_prompts_are_named_with_the_first_id_they_lack(tmp_path: Path) -> None:
    whole = jsonl(tmp_path / "whole.jsonl", [log(i, "x") for i in range(5)])
    short = jsonl(tmp_path / "short.jsonl", [log(i, "x") for i in (0, 1, 3)])
    for sources in ([(0.0, whole), (0.1, short)], [(0.1, short), (0.2, whole)]):
        with pytest.raises(PromptError, match=r"short\.jsonl: no answer to '2' at alpha 0\.1"):
            read_answers(sources)
    cut = journal(tmp_path / "cut.jsonl", {0.0: "ab", 0.1: "a"})
    refused(cut, r"cut\.jsonl: no answer to '1' at alpha 0\.1")


def test_a_second_answer_names_both_places(tmp_path: Path) -> None:
    twice = jsonl(tmp_path / "log.jsonl", [log(0, "a"), log(1, "b"), log(0, "a")])
    refused((0.0, twice), r"log\.jsonl, line 3: .*'0'.*after .*log\.jsonl, line 1")
    one, two = (journal(tmp_path / name, {0.0: "a"}) for name in ("one.jsonl", "two.jsonl"))
    with pytest.raises(PromptError, match=r"two\.jsonl, line 1: .*after .*one\.jsonl, line 1"):
        read_answers([one, two])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"alpha": 0.1, "index": 0, "answ', "not JSON"),
        (b'{"alpha": 0.1, "index": 0, "answer": "\xff"}', "not UTF-8"),
        (b"[1, 2]", "expected an object"),
        (b"{}", "found the fields \\(none\\); expected alpha, index and answer"),
        (b'{"alpha": 0.1, "answer": "a"}', "found the fields alpha, answer"),
        (b'{"alpha": 1.5, "index": 0, "answer": "a"}', "alpha is 1.5"),
        (b'{"alpha": NaN, "index": 0, "answer": "a"}', "alpha is nan"),
        (b'{"alpha": "0.1", "index": 0, "answer": "a"}', "alpha is '0.1'"),
        (b'{"alpha": true, "index": 0, "answer": "a"}', "alpha is True"),
        (b'{"alpha": 0.1, "index": null, "answer": "a"}', "the id is None"),
        (b'{"alpha": 0.1, "index": 0.5, "answer": "a"}', "the id is 0.5"),
        (b'{"alpha": 0.1, "index": 0, "answer": null}', "answer is None, expected a text"),
        (b'{"index": 0, "prediction": "a"}', "does not say its alpha; give the file as ALPHA=FILE"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    path = journal(tmp_path / "answers.jsonl", {0.0: "a"})
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n")
    refused(path, rf"answers\.jsonl, line 3: .*({words})")


def test_an_alpha_for_a_file_that_names_its_own_is_refused(tmp_path: Path) -> None:
    path = journal(tmp_path / "j.jsonl", {0.0: "a"})
    refused((0.3, path), r"line 1: names its alpha itself; .* without 0\.3=")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", b"index,prediction\n1,a\n2,b,c\n", r"row 3: found 3 cells, expected 2"),
        ("x.csv", b'index,prediction\n1,"a\nb"\n2,"c', r"line \d: not a row"),
        ("x.csv", b"index,prediction\n1,a\n2,\xff\n", r"line 3: not UTF-8"),
        ("x.csv", b"index,prediction\n,a\n", r"row 2: the id is ''"),
        ("x.tsv", b"index,prediction\n1,a\n", r"columns index,prediction, expected index and"),
        ("x.tsv", b"", r"columns \(none\), expected"),
        ("x.csv", b"index,prediction\n", r"no answers in it"),
        ("x.jsonl", b"\n\n", r"no answers in it"),
        ("x.json", b'{"index": 0}', r"expected a list of records"),
        ("x.json", b'[\n{"index": 0,\n]', r"x\.json: not JSON: .* at line 3, column 1"),
        ("x.json", b'[{"index": 0, "prediction": "a"}, 3]', r"record 2: found 3, expected an obj"),
        ("x.json", b'[{"index": 0, "prediction": ["a"]}]', r"record 1: prediction is \['a'\]"),
        ("x.txt", b"yes", r"found \.txt, expected \.jsonl, \.json, \.tsv, \.csv, \.xlsx"),
        ("x", b"yes", r"found no suffix, expected"),
        ("x.xlsx", b"PK", r"x\.xlsx: not a readable xlsx"),
        ("x.jsonl", None, "no such file"),
    ],
)
def test_broken_files_are_named(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    if name.endswith("xlsx"):
        pytest.importorskip("openpyxl")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    limit = csv.field_size_limit()
    refused((0.1, tmp_path / name), words)
    assert csv.field_size_limit() == limit


def test_a_row_of_a_spreadsheet_that_has_no_id_is_named(tmp_path: Path) -> None:
    path = spreadsheet(tmp_path / "y.xlsx", ["index", "prediction"], [1, "a"], [None, "b"])
    refused((0.1, path), r"y\.xlsx, row 3: the id is None")


def test_there_must_be_files() -> None:
    with pytest.raises(PromptError, match="no recorded answers"):
        read_answers([])
