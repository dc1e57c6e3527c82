"""Recorded answers: as a search writes them, and one clear line for what is broken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from lowmem_adamms.answers import Answer
from lowmem_adamms.errors import PromptError
from lowmem_adamms.merging.journal import AnswerJournal
from lowmem_adamms.searching.recorded_answers import read_answers


def journal(path: Path, answers: Mapping[float, str]) -> Path:
    """A search's answers, a letter each."""
    lines = [
        json.dumps({"alpha": alpha, "index": i, "answer": letter}) + "\n"
        for alpha, letters in answers.items()
        for i, letter in enumerate(letters)
    ]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_a_journal_is_read_as_the_search_writes_it(tmp_path: Path) -> None:
    """With its first line, and without the answers that are not scored."""
    path = tmp_path / "answers.jsonl"
    with AnswerJournal(path, "fingerprint") as written:
        for alpha in (0.1, 0.0):
            written.note(alpha, 10, Answer(f"b {alpha}", (5, 6), -0.25, 0.5))
            written.note(alpha, 9, Answer("ä\n", (7,)))
        written.note(0.1, 9, Answer("other", (8,)), aside="again")
        written.note(1.0, 9, Answer("the donor's", (8,)), aside="donor")
    answers, indices = read_answers([path])
    assert list(answers.items()) == [
        (alpha, [Answer("ä\n"), Answer(f"b {alpha}", (), -0.25, 0.5)]) for alpha in (0.0, 0.1)
    ]
    assert indices == [9, 10]


def test_alphas_may_lie_in_several_files_and_are_rounded(tmp_path: Path) -> None:
    one = journal(tmp_path / "one.jsonl", {0.1 + 0.2: "ab"})
    two = journal(tmp_path / "two.jsonl", {0: "cd"})
    answers, indices = read_answers([one, two])
    assert {alpha: [answer.text for answer in found] for alpha, found in answers.items()} == {
        0.0: ["c", "d"],
        0.3: ["a", "b"],
    }
    assert indices == [0, 1]


def test_an_alpha_that_lacks_answers_is_named_with_the_first_prompt_it_lacks(
    tmp_path: Path,
) -> None:
    with pytest.raises(PromptError, match=r"no answer to prompt 1 at alpha 0\.1, and to 1 more"):
        read_answers([journal(tmp_path / "a.jsonl", {0.0: "abc", 0.1: "a"})])


def test_a_second_answer_is_refused_with_its_place(tmp_path: Path) -> None:
    one, two = (journal(tmp_path / name, {0.0: "a"}) for name in ("one.jsonl", "two.jsonl"))
    with pytest.raises(PromptError, match=r"two\.jsonl:1: a second answer to prompt 0 at"):
        read_answers([one, two])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"alpha": 0.1, "index": 0, "answ', "not JSON"),
        (b'{"alpha": 0.1, "index": 0, "answer": "\xff"}', "not UTF-8"),
        (b"[1, 2]", "expected an object"),
        (b"{}", "expected an object with alpha, index and answer"),
        (b'{"doc_id": 0, "filtered_resps": ["a"]}', "expected an object with alpha, index and"),
        (b'{"alpha": 1.5, "index": 0, "answer": "a"}', "alpha is 1.5"),
        (b'{"alpha": NaN, "index": 0, "answer": "a"}', "alpha is nan"),
        (b'{"alpha": [0.1, 0], "index": 0, "answer": "a"}', r"alpha is \[0.1, 0\]"),
        (b'{"alpha": true, "index": 0, "answer": "a"}', "alpha is True"),
        (b'{"alpha": 0.1, "index": "0", "answer": "a"}', "index is '0'"),
        (b'{"alpha": 0.1, "index": true, "answer": "a"}', "index is True"),
        (b'{"alpha": 0.1, "index": 0, "answer": null}', "answer is None, expected a text"),
        (b'{"alpha": 0.1, "index": 0, "answer": "a", "entropy": "b"}', "entropy is 'b', expected"),
        (b'{"alpha": 0.1, "index": 0, "answer": "a", "entropy": true}', "entropy is True"),
        (b'{"alpha": 0.1, "index": 0, "answer": "a", "entropy": NaN}', "entropy is nan"),
        (b'{"alpha": 0.1, "index": 0, "answer": "a", "log_probability": []}', "log_probability is"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    path = journal(tmp_path / "answers.jsonl", {0.0: "a"})
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n")
    with pytest.raises(PromptError, match=rf"answers\.jsonl:3: .*{words}"):
        read_answers([path])


def test_there_must_be_files_with_answers(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no answers found; give the answers"):
        read_answers([])
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    with pytest.raises(PromptError, match="no answers found"):
        read_answers([tmp_path / "empty.jsonl"])
    with pytest.raises(PromptError, match=r"missing\.jsonl: No such file"):
        read_answers([tmp_path / "missing.jsonl"])
