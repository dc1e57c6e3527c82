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
from lowmem_adamms.searching.search import choose

Records = Sequence[Mapping[str, Any]]


def jsonl(path: Path, records: Records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def table(path: Path, rows: Sequence[Sequence[Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        dialect = "excel-tab" if path.suffix == ".tsv" else "excel"
        csv.writer(file, dialect, quoting=csv.QUOTE_ALL).writerows(rows)
    return path


def journal(path: Path, answers: Mapping[float, Sequence[str]]) -> Path:
    return jsonl(
        path,
        [
            {"alpha": alpha, "index": i, "answer": text}
            for alpha, texts in answers.items()
            for i, text in enumerate(texts)
        ],
    )


def new_log(doc_id: int, answer: str) -> dict[str, Any]:
    """A line of lmms-eval's log as of 2026: one answer is not wrapped, `resps` says the same."""
    return {
        "doc_id": doc_id,
        "target": "yes",
        "filtered_resps": answer,
        "doc_hash": "0",
        "input": "Is it?",
        "token_counts": [None],
    }


def old_log(doc_id: int, answer: str, raw: str | None = None) -> dict[str, Any]:
    """A line of 2024 and 2025: one answer in a list; raw, where a filter cut something out of it"""
    record = {"doc_id": doc_id, "target": "yes", "filtered_resps": [answer], "doc_hash": "0"}
    return record if raw is None else record | {"resps": [[raw]]}


# What the command line says


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.3=run.jsonl", (0.3, Path("run.jsonl"))),
        ("0=a/b.xlsx", (0.0, Path("a/b.xlsx"))),
        ("1.0=x", (1.0, Path("x"))),
        ("1e-1=x=y.tsv", (0.1, Path("x=y.tsv"))),
        ("0.30000000000000004=x", (0.3, Path("x"))),
        ("journal.jsonl", (None, Path("journal.jsonl"))),
        ("alpha=0.3.jsonl", (None, Path("alpha=0.3.jsonl"))),
        ("0.3", (None, Path("0.3"))),
    ],
)
def test_an_alpha_stands_before_the_first_equals_sign(
    text: str, expected: tuple[float | None, Path]
) -> None:
    assert parse_spec(text) == expected


@pytest.mark.parametrize("text", ["1.5=x", "-0.1=x", "nan=x", "inf=x", "0.3="])
def test_an_alpha_out_of_range_or_without_a_file_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="expected ALPHA=FILE with an alpha in"):
        parse_spec(text)


# Formats


def test_a_journal_holds_all_alphas_in_any_order(tmp_path: Path) -> None:
    lines = [
        {"alpha": 0.1 + 0.2, "index": 10, "answer": "k"},
        {"alpha": 0.3, "index": 9, "answer": "j"},
        {"alpha": 0.0, "index": 9, "answer": "a"},
        {"alpha": 0.1, "index": 9, "answer": "d\n"},
        {"alpha": 0.1, "index": 10, "answer": ""},
        {"alpha": 0, "index": 10, "answer": "b", "tokens": 7},
    ]
    answers, ids = read_answers([jsonl(tmp_path / "answers.jsonl", lines)])
    assert answers == {0.0: ["a", "b"], 0.1: ["d\n", ""], 0.3: ["j", "k"]}
    assert list(answers) == [0.0, 0.1, 0.3]
    assert ids == ["9", "10"]


def test_a_journal_is_read_as_the_search_writes_it(tmp_path: Path) -> None:
    """With its first line, and without the second answers that measure the noise."""
    path = tmp_path / "answers.jsonl"
    with AnswerJournal(path, "fingerprint") as written:
        for alpha in (0.0, 0.1):
            written.note(alpha, 1, f"b {alpha}", [5, 6])
            written.note(alpha, 0, "ä\n", [7])
        written.note(0.1, 0, "other", [8], again=True)
    assert read_answers([path]) == ({0.0: ["ä\n", "b 0.0"], 0.1: ["ä\n", "b 0.1"]}, ["0", "1"])


def test_sample_logs_of_all_ages_are_read(tmp_path: Path) -> None:
    old = jsonl(
        tmp_path / "20250101_samples_mme.jsonl",
        [old_log(1, "No"), old_log(0, "Yes", "<think>I see</think> Yes")],
    )
    new = jsonl(tmp_path / "20260301_samples_mme.jsonl", [new_log(0, "Yes"), new_log(1, "Maybe")])
    oldest = tmp_path / "mme.json"
    oldest.write_text(
        json.dumps({"args": {}, "model_configs": {}, "logs": [old_log(0, "A"), old_log(1, "B")]})
    )
    answers, ids = read_answers([(0.2, new), (0.0, old), (0.1, oldest)])
    assert answers == {0.0: ["Yes", "No"], 0.1: ["A", "B"], 0.2: ["Yes", "Maybe"]}
    assert ids == ["0", "1"]
    raw = jsonl(tmp_path / "x.jsonl", [{"doc_id": 0, "resps": [["Yes"]]}])
    assert read_answers([(0.5, raw)])[0] == {0.5: ["Yes"]}


@pytest.mark.parametrize(
    "responses", [[["-1.5", "True"], ["-2.5", "False"]], ["yes", "no"], [], None, 3, {"a": "b"}]
)
def test_responses_that_are_not_one_text_are_refused(tmp_path: Path, responses: Any) -> None:
    log = jsonl(
        tmp_path / "x.jsonl", [new_log(0, "yes"), new_log(1, "") | {"filtered_resps": responses}]
    )
    with pytest.raises(PromptError, match=r"x\.jsonl, line 2: .*expected (one|a text)"):
        read_answers([(0.5, log)])


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_prediction_tables_are_read(tmp_path: Path, suffix: str) -> None:
    rows: list[list[Any]] = [
        ["index", "question", "answer", "prediction"],
        ["3", "What?\nWhere?", "B", 'He said "B",\tor C'],
        ["12", "Who?", "A", ""],
        ["7", "Why?", "A", "=A"],
    ]
    answers, ids = read_answers([(0.1, table(tmp_path / f"model_MMBench.{suffix}", rows))])
    assert (answers, ids) == ({0.1: ['He said "B",\tor C', "=A", ""]}, ["3", "7", "12"])


def test_predictions_may_be_json_records(tmp_path: Path) -> None:
    records = [
        {"index": 1.0, "question": "?", "prediction": "B"},
        {"index": 0, "question": "?", "prediction": float("nan")},
    ]
    (tmp_path / "model_MMBench.json").write_text(json.dumps(records, indent=4))
    lines = jsonl(tmp_path / "model_MMBench.jsonl", records)
    answers, ids = read_answers([(0.1, tmp_path / "model_MMBench.json"), (0.2, lines)])
    assert (answers, ids) == ({0.1: ["", "B"], 0.2: ["", "B"]}, ["0", "1"])


def spreadsheet(path: Path, rows: Sequence[Sequence[Any]]) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


def test_prediction_spreadsheets_are_read(tmp_path: Path) -> None:
    """Formulas as written, numbers as shown, empty cells as empty answers, empty rows not at all"""
    rows: list[list[Any]] = [
        ["index", "question", "prediction", None],
        [2, "What?", "=A+B", None],
        [1.0, "Which?", "two\nlines"],
        [None, None, None],
        [30, "How many?", 12],
        [4, "Nothing?", None],
    ]
    answers, ids = read_answers([(0.0, spreadsheet(tmp_path / "model_MMBench.xlsx", rows))])
    assert (answers, ids) == ({0.0: ["two\nlines", "=A+B", "", "12"]}, ["1", "2", "4", "30"])


def test_a_spreadsheet_without_openpyxl_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.xlsx").write_bytes(b"PK")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(PromptError, match=r"x\.xlsx: .*pip install openpyxl"):
        read_answers([(0.0, tmp_path / "x.xlsx")])


def test_ids_that_are_not_numbers_keep_the_order_of_the_smallest_alpha(tmp_path: Path) -> None:
    header = ["index", "prediction"]
    first = table(tmp_path / "a.csv", [header, ["b", "1"], ["a_2", "2"], ["10", "3"]])
    second = table(tmp_path / "b.csv", [header, ["10", "6"], ["b", "4"], ["a_2", "5"]])
    answers, ids = read_answers([(0.3, second), (0.1, first)])
    assert ids == ["b", "a_2", "10"]
    assert answers == {0.1: ["1", "2", "3"], 0.3: ["4", "5", "6"]}


def test_formats_can_be_mixed_and_go_straight_to_the_search(tmp_path: Path) -> None:
    sources: list[Path | tuple[float | None, Path]] = [
        journal(tmp_path / "j.jsonl", {0.0: ["yes", "a", "b"], 0.1: ["yes", "c", "b"]}),
        (
            0.2,
            jsonl(tmp_path / "l.jsonl", [new_log(i, t) for i, t in enumerate(["Yes.", "C", "d"])]),
        ),
        (0.3, table(tmp_path / "t.tsv", [["index", "prediction"], [0, "no"], [1, "c"], [2, "e"]])),
    ]
    answers, _ = read_answers(sources)
    result = choose(answers)
    assert [c.diff_next for c in result.candidates] == [1, 1, 2, None]
    assert result.alpha == 0.1


# What is wrong


def test_alphas_with_other_prompts_are_named_with_the_first_id_they_lack(tmp_path: Path) -> None:
    whole = jsonl(tmp_path / "whole.jsonl", [new_log(i, "x") for i in range(5)])
    short = jsonl(tmp_path / "short.jsonl", [new_log(i, "x") for i in (0, 1, 3)])
    for sources in ([(0.0, whole), (0.1, short)], [(0.1, short), (0.2, whole)]):
        with pytest.raises(PromptError, match=r"short\.jsonl: no answer to '2' at alpha 0\.1"):
            read_answers(sources)
    cut = journal(tmp_path / "cut.jsonl", {0.0: ["a", "b"], 0.1: ["a"]})
    with pytest.raises(PromptError, match=r"cut\.jsonl: no answer to '1' at alpha 0\.1"):
        read_answers([cut])


def test_a_second_answer_names_both_places(tmp_path: Path) -> None:
    log = jsonl(tmp_path / "log.jsonl", [new_log(0, "a"), new_log(1, "b"), new_log(0, "a")])
    with pytest.raises(PromptError, match=r"log\.jsonl, line 3: .*'0'.*after .*log\.jsonl, line 1"):
        read_answers([(0.0, log)])
    one = journal(tmp_path / "one.jsonl", {0.0: ["a"]})
    two = journal(tmp_path / "two.jsonl", {0.0: ["a"]})
    with pytest.raises(PromptError, match=r"two\.jsonl, line 1: .*after .*one\.jsonl, line 1"):
        read_answers([one, two])
    with pytest.raises(PromptError, match="a second answer"):
        read_answers([one, one])


GOOD = '{"alpha": 0.0, "index": 0, "answer": "a"}\n'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"alpha": 0.1, "index": 0, "answ', "not JSON"),
        (b"nonsense", "not JSON"),
        (b'{"alpha": 0.1, "index": 0, "answer": "\xff"}', "not UTF-8"),
        (b"[1, 2]", "expected an object"),
        (b'"text"', "expected an object"),
        (b"{}", "found the fields \\(none\\); expected alpha, index and answer"),
        (b'{"alpha": 0.1, "answer": "a"}', "found the fields alpha, answer"),
        (b'{"alpha": 1.5, "index": 0, "answer": "a"}', "alpha is 1.5"),
        (b'{"alpha": NaN, "index": 0, "answer": "a"}', "alpha is nan"),
        (b'{"alpha": "0.1", "index": 0, "answer": "a"}', "alpha is '0.1'"),
        (b'{"alpha": true, "index": 0, "answer": "a"}', "alpha is True"),
        (b'{"alpha": 0.1, "index": null, "answer": "a"}', "the id is None"),
        (b'{"alpha": 0.1, "index": 0.5, "answer": "a"}', "the id is 0.5"),
        (b'{"alpha": 0.1, "index": [0], "answer": "a"}', "the id is \\[0\\]"),
        (b'{"alpha": 0.1, "index": 0, "answer": null}', "answer is None, expected a text"),
        (b'{"index": 0, "prediction": "a"}', "does not say its alpha; give the file as ALPHA=FILE"),
        (b'{"doc_id": 0, "filtered_resps": "a"}', "does not say its alpha"),
        (b"[" * 100_000, "not JSON"),
        (b"9" * 10_000, "not JSON that can be read"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + line + b"\n")
    with pytest.raises(PromptError, match=rf"answers\.jsonl, line 3: .*({words})") as caught:
        read_answers([path])
    assert "\n" not in str(caught.value)


def test_an_alpha_for_a_file_that_names_its_own_is_refused(tmp_path: Path) -> None:
    path = journal(tmp_path / "j.jsonl", {0.0: ["a"]})
    with pytest.raises(PromptError, match=r"line 1: names its alpha itself; .* without 0\.3="):
        read_answers([(0.3, path)])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", b"index,prediction\n1,a\n2,b,c\n", r"row 3: found 3 cells, expected 2"),
        ("x.csv", b"index,prediction\n1,a\n2\n", r"row 3: found 1 cells, expected 2"),
        ("x.csv", b'index,prediction\n1,"a\nb"\n2,"c', r"line \d: not a row"),
        ("x.csv", b"index,prediction\n1,a\n2,\xff\n", r"line 3: not UTF-8"),
        ("x.csv", b"index,prediction\n,a\n", r"row 2: the id is ''"),
        ("x.csv", b"index,answer\n1,a\n", r"columns index, answer, expected index and prediction"),
        ("x.tsv", b"index,prediction\n1,a\n", r"columns index,prediction, expected"),
        ("x.tsv", b"", r"columns \(none\), expected"),
        ("x.csv", b"index,prediction\n", r"no answers in it"),
        ("x.jsonl", b"\n\n", r"no answers in it"),
        ("x.json", b"[]", r"no answers in it"),
        ("x.json", b'{"index": 0}', r"expected a list of records"),
        ("x.json", b'[\n{"index": 0,\n]', r"x\.json: not JSON: .* at line 3, column 1"),
        ("x.json", b'[{"index": 0, "prediction": "a"}, 3]', r"record 2: found 3, expected an obj"),
        ("x.json", b'[{"index": 0, "prediction": ["a"]}]', r"record 1: prediction is \['a'\]"),
        ("x.pkl", b"", r"a pickle can run code"),
        ("x.PICKLE", b"", r"a pickle can run code"),
        ("x.txt", b"yes", r"found \.txt, expected \.jsonl, \.json, \.tsv, \.csv, \.xlsx"),
        ("x", b"yes", r"found no suffix, expected"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    limit = csv.field_size_limit()
    with pytest.raises(PromptError, match=words) as caught:
        read_answers([(0.1, tmp_path / name)])
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("kept", [slice(0), slice(3000)])
def test_broken_spreadsheets_are_named(tmp_path: Path, kept: slice) -> None:
    path = spreadsheet(tmp_path / "x.xlsx", [["index", "prediction"], [1, "a"]])
    path.write_bytes(path.read_bytes()[kept])
    with pytest.raises(PromptError, match=r"x\.xlsx: not a readable xlsx"):
        read_answers([(0.1, path)])


def test_a_spreadsheet_of_something_else_is_named(tmp_path: Path) -> None:
    path = spreadsheet(tmp_path / "x.xlsx", [["index", "answer"], [1, "a"]])
    with pytest.raises(PromptError, match=r"columns index, answer, expected index and prediction"):
        read_answers([(0.1, path)])
    path = spreadsheet(tmp_path / "y.xlsx", [["index", "prediction"], ["", "a"], [None, "b"]])
    with pytest.raises(PromptError, match=r"y\.xlsx, row [23]: the id is"):
        read_answers([(0.1, path)])


def test_missing_files_and_no_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"nowhere\.jsonl: no such file"):
        read_answers([tmp_path / "nowhere.jsonl"])
    with pytest.raises(PromptError, match="no recorded answers"):
        read_answers([])


def test_fields_longer_than_the_csv_modules_limit_are_read(tmp_path: Path) -> None:
    image = "A" * 200_000
    rows = [["index", "image", "prediction"], ["0", image, "yes"]]
    assert read_answers([(0.1, table(tmp_path / "x.tsv", rows))])[0] == {0.1: ["yes"]}
