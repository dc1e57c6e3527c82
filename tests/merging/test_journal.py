"""The journal of a search's answers: whose it is, what survives, and who may write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowmem_adamms.answers import Answer
from lowmem_adamms.errors import OutputError
from lowmem_adamms.merging.journal import AnswerJournal

ANSWERS = {
    (0.1, 1): Answer("zwölf\n\u2028<b>", (1, 2), -0.25, 0.5),
    (0.1, 0): Answer("", (), 0.0, 0.0),
    (0.2, 1): Answer("ten", (3,), -1e-06, None),
}
AGAIN, DONOR = Answer("eleven", (4,), -1.5, 2.0), Answer("the donor's", (5,))


def write(path: Path) -> None:
    with AnswerJournal(path, "mine") as journal:
        for (alpha, place), answer in ANSWERS.items():
            journal.note(alpha, place, answer)
        journal.note(0.1, 1, AGAIN, aside="again")
        journal.note(1.0, 0, DONOR, aside="donor")


def test_answers_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "answers.jsonl"
    write(path)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 6
    with AnswerJournal(path, "mine") as journal:
        first, second, other = ANSWERS.values()
        assert journal.answers == {0.1: {1: first, 0: second}, 0.2: {1: other}}
        assert journal.again == {0.1: {1: AGAIN}}
        assert journal.donor == {0: DONOR}


def test_a_line_without_confidence_is_an_answer_of_which_none_is_known(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    line = {"alpha": 0.1, "index": 2, "answer": "ten", "tokens": [3]}
    path.write_text(f'{{"search": "mine"}}\n{json.dumps(line)}\n')
    with AnswerJournal(path, "mine") as journal:
        assert journal.answers == {0.1: {2: Answer("ten", (3,))}}


@pytest.mark.parametrize("alpha", [0.1 + 0.2, 1 / 3, 0.0, 1.0, 0.025])
def test_alphas_come_back_as_they_went_in(tmp_path: Path, alpha: float) -> None:
    with AnswerJournal(tmp_path / "a", "mine") as journal:
        journal.note(alpha, 0, Answer("x"))
    with AnswerJournal(tmp_path / "a", "mine") as journal:
        assert list(journal.answers) == [alpha]


def test_a_journal_of_another_search_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write(path)
    before = path.read_bytes()
    with pytest.raises(OutputError, match=r"answers\.jsonl.*another search.*delete") as caught:
        AnswerJournal(path, "yours")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("end", [b"\n", b""])
@pytest.mark.parametrize(
    "content",
    [b'{"merge": "mine"}', b"not json", b"[]", b'"x"', b"\xff\xfe", b'{"prompt": "a"}', b" "],
)
def test_a_file_that_is_no_journal_of_answers_is_refused_and_not_touched(
    tmp_path: Path, content: bytes, end: bytes
) -> None:
    """Also one line without an end, which a journal that was cut off looks like."""
    content += end
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(OutputError, match="is no journal of a search; choose another place"):
        AnswerJournal(tmp_path / "a", "mine")
    assert (tmp_path / "a").read_bytes() == content


def test_wherever_a_kill_cuts_it_off_the_whole_lines_are_read_and_writing_goes_on(
    tmp_path: Path,
) -> None:
    path = tmp_path / "answers.jsonl"
    write(path)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    cuts = {0, 1, first - 1, first, first + 9, len(whole) - 1}
    for cut in cuts:
        path.write_bytes(whole[:cut])
        kept = max(whole[:cut].count(b"\n") - 1, 0)
        with AnswerJournal(path, "mine") as journal:
            assert sum(map(len, journal.answers.values())) == min(kept, 3)
            journal.note(0.5, 7, Answer("new", (9,)))
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        assert lines[0] == {"search": "mine"}
        assert [line["index"] for line in lines[1:]] == [*[1, 0, 1, 1][:kept], 7]


def test_what_follows_an_unreadable_line_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write(path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = b"\0" * (len(lines[2]) - 1) + b"\n"
    path.write_bytes(b"".join(lines))
    with AnswerJournal(path, "mine") as journal:
        assert list(journal.answers[0.1]) == [1]
        journal.note(0.1, 0, Answer("again"))
    with AnswerJournal(path, "mine") as journal:
        assert list(journal.answers[0.1]) == [1, 0]


def test_two_at_once_do_not_write_into_one_file(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    path = tmp_path / "answers.jsonl"
    with AnswerJournal(path, "mine") as journal:
        journal.note(0.1, 0, Answer("first"))
        with pytest.raises(OutputError, match="another run is writing"):
            AnswerJournal(path, "mine")
        journal.note(0.1, 1, Answer("second"))
    with AnswerJournal(path, "mine") as journal:
        assert journal.answers == {0.1: {0: Answer("first"), 1: Answer("second")}}
