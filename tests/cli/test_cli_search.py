"""The command line with a search: the whole job on tiny pairs, resumption, options, clear errors.

Bases answer about images here. How answers are made, chosen and placed is proven elsewhere; here,
that the commands put it together.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import talk
import tiny
import torch
from command import Forker, Terminal, run
from tiny import seen

from lowmem_adamms import LiveModel, __version__, make_plan, merge, search
from lowmem_adamms.answers import Answer
from lowmem_adamms.api import FoundAlpha
from lowmem_adamms.cli.search import show_found
from lowmem_adamms.live import transformers_model as loading
from lowmem_adamms.live.processor import load_processor
from lowmem_adamms.merging.journal import ANSWERS, JOURNAL, WORK, AnswerJournal
from lowmem_adamms.prompts import Prompt, load_prompts
from lowmem_adamms.settings import (
    AnswerSettings,
    EngineSettings,
    GridSettings,
    Measure,
    PlacementSettings,
    PromptSettings,
    SearchSettings,
)

ROOT = Path(__file__).parents[2]
GRID = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
# So much room on every machine, and no card: placements and reports are then the same everywhere
HERE = ("--ram", "8GB", "--vram", "0")
# The paper's measure, whose scores are whole numbers of answers
SHORT = (*HERE, "--max-new-tokens", "8", "--measure", "pairwise")
QUICK = (*SHORT, "--alphas", "0,0.2,0.4")
TEXTS = (
    "What color is the large car in front of the building?",
    "How many people are standing near the table?",
    "Describe this image in detail.",
    "Is the door open or closed? Answer yes or no.",
)
STDERR = re.compile(
    r"(fits|memory|work|time|page cache|note|base \+ donor): "
    r"|cpu \w+ at batch \d+: "
    r"|alpha [\d.]+: \d+/|alpha .* <- |load it:$|check it:$|  |$"
)
CONTRACT = {"alpha", "measure", "prompts", "candidates", "base", "donor", "version"}
CANDIDATE = {"alpha", "diff_previous", "diff_next", "score", "degenerate"}
Capture = pytest.CaptureFixture[str]
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory, images: tuple[Path, ...]) -> Path:
    """Ten questions, eight of them about one of three images."""
    folder = tmp_path_factory.mktemp("prompts")
    lines = [
        {"prompt": f"{TEXTS[i % 4]} {i}", "image": str(images[i % 3]) if i < 8 else None}
        for i in range(10)
    ]
    return write_lines(folder / "prompts.jsonl", lines)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight questions without images."""
    lines = [{"prompt": f"{TEXTS[i % 4]} {i}"} for i in range(8)]
    return write_lines(tmp_path_factory.mktemp("texts") / "texts.jsonl", lines)


@pytest.fixture(scope="module")
def pair(talking: dict[str, Path]) -> tuple[Path, Path]:
    return talking["qwen2_vl"], talking["llava_onevision"]


@pytest.fixture(scope="module")
def exact(
    tmp_path_factory: pytest.TempPathFactory,
    ancestors: dict[str, tiny.Tensors],
    pair: tuple[Path, Path],
) -> tuple[Path, Path]:
    """The pair with a base in float32: its answers depend on no batch size."""
    folder = tmp_path_factory.mktemp("exact") / "base"
    tiny.make("qwen2_vl", folder, ancestor=ancestors["qwen2"], dtype="float32")
    return tiny.add_processor(folder), pair[1]


@pytest.fixture(scope="module")
def finished(
    exact: tuple[Path, Path], prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output of one whole job."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert run(*exact, "-o", out, "--prompts", prompts, *SHORT) == 0
    return out


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def document(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_bytes())
    return loaded


def notes_of_the_search(found: dict[str, Any], written: dict[str, Any]) -> None:
    """Take the notes out of both; behind the plan's stand the search's own."""
    own, notes = found.pop("notes"), written.pop("notes")
    assert own and notes[-len(own) :] == own and "rope_theta" in notes[0]


def journalled(path: Path) -> list[dict[str, Any]]:
    """Every answer of a journal, in the order in which they came."""
    return [line for line in map(json.loads, path.read_bytes().splitlines()) if "answer" in line]


def answers_at(path: Path, alpha: float) -> list[str]:
    """By place of the prompt, without those asked twice to measure noise."""
    found = {
        line["index"]: line["answer"]
        for line in journalled(path)
        if line["alpha"] == alpha and not line.get("again")
    }
    return [found[place] for place in range(len(found))]


def own_answers(folder: Path, prompts: tuple[Prompt, ...], new: int = 8) -> list[str]:
    """What transformers' own greedy search answers, with the checkpoint as it lies on disk."""
    model = loading.load_model(
        folder, device="cpu", dtype="auto", quantize=None, trust_remote_code=True
    )
    processor = load_processor(folder, trust_remote_code=True)
    tokenizer = getattr(processor, "tokenizer", processor)
    answers = []
    for prompt in prompts:
        with loading.quiet(), torch.inference_mode():
            inputs = talk.inputs_of(model, processor, prompt)
            made = model.generate(**inputs, do_sample=False, max_new_tokens=new)
        tokens = made[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
    return answers


def assert_one_error(capsys: Capture, words: str) -> None:
    """One line of error, after lines that are none (such as the placement's)."""
    captured = capsys.readouterr()
    *others, error = captured.err.splitlines()
    assert captured.out == ""
    assert error.startswith("error: "), captured.err
    assert re.search(words, error), error
    assert all(STDERR.match(line) for line in others), captured.err


def forbid(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Fail where something is called that must not be."""

    def called(*_: Any, **__: Any) -> None:
        raise AssertionError(f"{what} was called")

    monkeypatch.setattr(what, called)


# The whole job


def test_the_one_liner_leaves_a_checkpoint_and_how_it_was_found(
    finished: Path, exact: tuple[Path, Path]
) -> None:
    base, donor = exact
    theirs = {path.name for path in base.iterdir()}
    ours = {"README.md", "adamms.json", "answers.jsonl", "report.html"}
    assert {path.name for path in finished.iterdir()} == theirs | ours
    tiny.load_model(finished)  # fails if a tensor is missing or left over
    found = document(finished / "adamms.json")
    assert set(found) >= CONTRACT | {"formula", "options", "counts", "inputs", "outputs", "notes"}
    assert (found["base"], found["donor"]) == (base.name, donor.name)
    assert (found["measure"], found["prompts"]) == ("pairwise", 10)
    assert found["version"] == __version__
    assert [candidate["alpha"] for candidate in found["candidates"]] == GRID
    assert all(set(candidate) >= CANDIDATE for candidate in found["candidates"])
    assert found["alpha"] in GRID[1:-1]


def test_the_choice_follows_from_the_answers_beside_the_model(finished: Path) -> None:
    """The paper's rule, counted anew: these answers need no normalisation to speak of."""
    found = document(finished / "adamms.json")
    table = {alpha: answers_at(finished / ANSWERS, alpha) for alpha in GRID}
    assert all(len(answers) == 10 for answers in table.values())
    assert len({tuple(answers) for answers in table.values()}) > 3
    for before, after in zip(found["candidates"], found["candidates"][1:], strict=False):
        pairs = zip(table[before["alpha"]], table[after["alpha"]], strict=True)
        differing = sum(normal(a) != normal(b) for a, b in pairs)
        assert before["diff_next"] == after["diff_previous"] == differing
    scored = [c for c in found["candidates"] if c["score"] is not None]
    assert all(c["score"] == c["diff_previous"] + c["diff_next"] for c in scored)
    least = min(c["degenerate"] for c in found["candidates"]) + 1
    best = [c for c in scored if c["degenerate"] <= least]
    assert found["alpha"] == min(best, key=lambda c: (c["score"], c["alpha"]))["alpha"]


def normal(answer: str) -> str:
    return " ".join(answer.lower().split()).removesuffix(".").strip().strip("\"'`")


def test_the_papers_tell_how_alpha_was_chosen(finished: Path) -> None:
    alpha = document(finished / "adamms.json")["alpha"]
    card = (finished / "README.md").read_text(encoding="utf-8")
    assert f"out = (1 - {alpha:g}) * base + {alpha:g} * donor" in card
    assert "without labels, by the answers to 10 prompts" in card
    assert "at the alphas 0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6 (measure: pairwise)" in card
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert TEXTS[0] in page
    assert "data:image/" in page
    assert "cpu F32 at batch 8" in page


def test_what_was_evaluated_is_what_was_written(
    finished: Path, exact: tuple[Path, Path], prompts: Path
) -> None:
    alpha = document(finished / "adamms.json")["alpha"]
    assert own_answers(finished, load_prompts(prompts)) == answers_at(finished / ANSWERS, alpha)
    written = dict(tiny.load_model(finished).named_parameters())
    with LiveModel(make_plan(*exact), device="cpu") as live:
        live.apply(0.7)
        live.apply(alpha)
        evaluated = dict(live.model.named_parameters())
        assert evaluated.keys() == written.keys()
        assert all(torch.equal(evaluated[name], written[name]) for name in written)


def test_a_finished_job_verifies_and_is_not_done_over(
    finished: Path, exact: tuple[Path, Path], prompts: Path, capsys: Capture
) -> None:
    assert run("verify", finished, "--deep", "--base", exact[0], "--donor", exact[1]) == 0
    assert ": ok, " in capsys.readouterr().out
    before = seen(finished)
    assert run(*exact, "-o", finished, "--prompts", prompts, *SHORT) == 0
    assert "holds this merge already" in capsys.readouterr().err
    assert seen(finished) == before


def test_the_same_weights_come_of_merging_at_the_alpha_that_was_found(
    finished: Path, exact: tuple[Path, Path], tmp_path: Path
) -> None:
    alpha = document(finished / "adamms.json")["alpha"]
    merge(make_plan(*exact), alpha, tmp_path / "out")
    for shard in (tmp_path / "out").glob("*.safetensors"):
        assert shard.read_bytes() == (finished / shard.name).read_bytes()


@pytest.mark.parametrize(
    ("base", "donor"),
    [
        ("qwen2_vl", "llava_onevision"),
        ("mplug_owl2", "llava"),
        ("qwen2", "llava_onevision"),
    ],
)
def test_a_pair_goes_through_the_whole_job(
    base: str,
    donor: str,
    talking: dict[str, Path],
    prompts: Path,
    texts: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    """In float32, so that transformers, asked one by one, must answer as the search did."""
    asked = texts if base in talk.TEXT_ONLY else prompts
    trust = ["--trust-remote-code"] if base in talk.REMOTE else []
    words = ("--prompts", asked, "--dtype", "fp32", *SHORT, "--alphas", "0:0.6:0.2", *trust)
    assert run(talking[base], talking[donor], "-o", tmp_path / "out", *words) == 0
    assert "tensors interpolated" in capsys.readouterr().out
    found = document(tmp_path / "out" / "adamms.json")
    ids = load_prompts(asked)
    assert found["alpha"] in (0.2, 0.4)
    recorded = answers_at(tmp_path / "out" / ANSWERS, found["alpha"])
    assert len(set(recorded)) > 2
    assert own_answers(tmp_path / "out", ids) == recorded


@pytest.mark.parametrize("family", talk.REMOTE)
def test_remote_code_is_not_run_unasked(
    family: str,
    talking: dict[str, Path],
    prompts: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    words = ("--prompts", prompts, *SHORT)
    assert run(talking[family], talking["llava"], "-o", tmp_path / "out", *words) == 2
    assert_one_error(capsys, "--trust-remote-code")
    assert not list(tmp_path.iterdir())


def test_a_quantized_search_writes_whole_weights(
    ancestors: dict[str, tiny.Tensors],
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    monkeypatch.setattr(tiny, "INNER", 128)  # some CPUs multiply NF4 only in whole blocks of 64
    wide = tiny.ancestor("qwen2")
    base = tiny.add_processor(tiny.make("qwen2", tmp_path / "base", ancestor=wide))
    donor = tiny.make("llava_onevision", tmp_path / "donor", ancestor=wide)
    words = ("--prompts", texts, *QUICK, "--live-quantize", "nf4")
    assert run(base, donor, "-o", tmp_path / "out", *words) == 0
    assert "cpu nf4 at batch 8" in capsys.readouterr().err
    assert document(tmp_path / "out" / "adamms.json")["alpha"] == 0.2
    merge(make_plan(base, donor), 0.2, tmp_path / "plain")
    ours, theirs = tiny.load(tmp_path / "out"), tiny.load(tmp_path / "plain")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# Killed, interrupted, met by another


NOTED = "lowmem_adamms.merging.journal.AnswerJournal.note"
WRITTEN = "lowmem_adamms.merging.shard_file.ShardFile.write"
PUBLISHED = "pathlib.Path.replace"


def timeless(folder: Path) -> Files:
    """All files; of the report not the time taken: a resumed run has only its own."""
    files = seen(folder)
    page = files["report.html"].decode()
    files["report.html"] = re.sub(r"<dt>time</dt>.*?</dd>\n", "", page).encode()
    return files


def test_killed_three_times_it_asks_nothing_twice_and_writes_the_same(
    pair: tuple[Path, Path],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forker: Forker,
) -> None:
    """During the search, during the merge after it, and while the result gets its names."""
    words = (*pair, "--prompts", prompts, *QUICK)
    out, whole = tmp_path / "out", tmp_path / "whole"

    def kill_before(call: str, number: int) -> None:
        done = forker.run((*words, "-o", out), [call], number)
        assert done.returncode == -signal.SIGKILL, done.stderr

    assert run(*words, "-o", whole) == 0
    assert len(journalled(whole / ANSWERS)) == 3 * 10 + 10  # the last ten for the noise floor

    kill_before(NOTED, 13)
    assert sorted(path.name for path in out.rglob("*")) == [WORK, ANSWERS]
    first = (out / WORK / ANSWERS).read_bytes()
    assert len(journalled(out / WORK / ANSWERS)) == 13

    kill_before(WRITTEN, 1)
    second = (out / WORK / ANSWERS).read_bytes()
    assert second.startswith(first)
    assert not list(out.glob("*"))[1:]  # nothing has its final name
    assert (out / WORK / JOURNAL).is_file()

    forbid(monkeypatch, "lowmem_adamms.live.transformers_model.load_model")  # every answer is there
    kill_before(PUBLISHED, 4)
    assert (out / ANSWERS).read_bytes() == second
    assert run(*words, "-o", out) == 0
    assert (out / ANSWERS).read_bytes() == second
    keys = [(line["alpha"], line["index"], "again" in line) for line in journalled(out / ANSWERS)]
    assert len(keys) == len(set(keys)) == 40
    assert timeless(out) == timeless(whole)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C before an answer is noted."""
    note, left = AnswerJournal.note, number

    def counted(journal: AnswerJournal, *args: Any, **options: Any) -> None:
        nonlocal left
        if not left:
            signal.raise_signal(signal.SIGINT)
        left -= 1
        note(journal, *args, **options)

    # A shell's background job is started deaf to Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(AnswerJournal, "note", counted)


@pytest.fixture
def interrupted(
    exact: tuple[Path, Path],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> Path:
    """What Ctrl-C during a search leaves."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 25)
        assert run(*exact, "-o", tmp_path / "out", "--prompts", prompts, *SHORT) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "interrupted: run the same command again to resume"
    return tmp_path / "out"


def test_ctrl_c_keeps_the_answers_and_the_same_command_resumes(
    interrupted: Path, exact: tuple[Path, Path], prompts: Path, finished: Path
) -> None:
    assert len(journalled(interrupted / WORK / ANSWERS)) == 25
    assert run(*exact, "-o", interrupted, "--prompts", prompts, *SHORT) == 0
    assert timeless(interrupted) == timeless(finished)


def test_ctrl_c_without_a_journal_says_that_nothing_was_kept(
    exact: tuple[Path, Path],
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.setattr(LiveModel, "apply", lambda *_: signal.raise_signal(signal.SIGINT))
    assert run("search", *exact, "--prompts", prompts, *SHORT) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "interrupted: nothing was kept; with --journal FILE a search resumes"


@pytest.mark.parametrize(
    "change",
    [
        ("--samples", "9"),
        ("--live-dtype", "bf16"),
        ("--embeddings", "keep"),
    ],
    ids=" ".join,
)
def test_another_search_does_not_touch_an_unfinished_one(
    change: tuple[str, ...],
    interrupted: Path,
    exact: tuple[Path, Path],
    prompts: Path,
    capsys: Capture,
) -> None:
    before = seen(interrupted)
    assert run(*exact, "-o", interrupted, "--prompts", prompts, *SHORT, *change) == 2
    assert_one_error(capsys, "answers of another search .*delete it or choose another")
    assert seen(interrupted) == before


def test_a_merge_at_a_given_alpha_is_not_mistaken_for_a_searched_one(
    exact: tuple[Path, Path],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """Met before the search, not after hours of it."""
    with monkeypatch.context() as patch:
        folder = importlib.import_module("lowmem_adamms.merging.output_folder")
        patch.setattr(folder, "publish", lambda _: signal.raise_signal(signal.SIGINT))
        assert run(*exact, "-o", tmp_path / "out", "--alpha", "0.2") == 130
    before = seen(tmp_path / "out")
    forbid(monkeypatch, "lowmem_adamms.live.transformers_model.load_model")
    capsys.readouterr()
    assert run(*exact, "-o", tmp_path / "out", "--prompts", prompts, *SHORT) == 2
    assert_one_error(capsys, "unfinished merge at a given alpha")
    assert seen(tmp_path / "out") == before


def test_two_at_once_do_not_mix(
    exact: tuple[Path, Path],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    words = (*exact, "-o", tmp_path / "out", "--prompts", prompts, *QUICK)
    note = AnswerJournal.note
    codes: list[int] = []

    def meanwhile(journal: AnswerJournal, *args: Any, **options: Any) -> None:
        if not codes:
            codes.append(run(*words))
        note(journal, *args, **options)

    monkeypatch.setattr(AnswerJournal, "note", meanwhile)
    assert run(*words) == 0
    assert codes == [2]
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert [line.partition(": another run")[1:] for line in errors] == [
        (": another run", " is writing there now")
    ]
    assert len(journalled(tmp_path / "out" / ANSWERS)) == 40


# search


def test_search_shows_a_table_and_writes_nothing(
    exact: tuple[Path, Path], finished: Path, prompts: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert run("search", *exact, "--prompts", prompts, *SHORT) == 0
    captured = capsys.readouterr()
    alpha = document(finished / "adamms.json")["alpha"]
    chosen = [line for line in captured.out.splitlines() if "<- chosen" in line]
    assert [line.split()[1] for line in chosen] == [f"{alpha:g}"]
    assert f"\nalpha {alpha:g}, D = " in captured.out
    assert "over 10 prompts (pairwise); asked twice, 0 answers differed\n" in captured.out
    assert all(STDERR.match(line) for line in captured.err.splitlines()), captured.err
    assert not list(tmp_path.iterdir())


def test_search_json_is_one_document(
    exact: tuple[Path, Path], finished: Path, prompts: Path, tmp_path: Path, capsys: Capture
) -> None:
    page = tmp_path / "page.html"
    assert run("search", *exact, "--prompts", prompts, *SHORT, "--json", "--report", page) == 0
    found = json.loads(capsys.readouterr().out)
    written = document(finished / "adamms.json")
    assert set(found) >= CONTRACT
    notes_of_the_search(found, written)
    for place in (found, found["prompt_set"]):  # where things lie is not for adamms.json
        for name in {"base", "donor", "ref"} & set(place):
            place[name] = Path(place[name]).name
    assert {name: written[name] for name in found} == found
    whole = (finished / "report.html").read_text(encoding="utf-8")
    ours, theirs = (re.sub(r"\d+\.?\d*( ms| s)\b", "", text) for text in (page.read_text(), whole))
    assert ours.count("<section") == theirs.count("<section") > 2


def test_a_journal_answers_the_second_time(
    exact: tuple[Path, Path],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    journal = tmp_path / "new" / "journal.jsonl"
    words = ("search", *exact, "--prompts", prompts, *QUICK, "--json", "--journal", journal)
    assert run(*words) == 0
    first, before = capsys.readouterr().out, journal.read_bytes()
    forbid(monkeypatch, "lowmem_adamms.live.transformers_model.load_model")
    assert run(*words) == 0
    assert capsys.readouterr().out == first
    assert journal.read_bytes() == before
    # A wider grid begins with what is there, and the model is needed again
    with pytest.raises(AssertionError, match="load_model was called"):
        run(*words, "--alphas", "0,0.2,0.4,0.6")


@pytest.fixture(scope="module")
def small(
    exact: tuple[Path, Path], prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """A quick search's document and its journal."""
    folder = tmp_path_factory.mktemp("small")
    return searched(exact, prompts, folder / "journal.jsonl"), folder / "journal.jsonl"


def searched(
    pair: tuple[Path, Path], prompts: Path, journal: Path, *more: object
) -> dict[str, Any]:
    """What `search --json` prints, in a process that sees nothing else of it."""
    words = ("--prompts", prompts, *QUICK, "--json", "--journal", journal, *more)
    with redirect_stdout(io.StringIO()) as stdout:
        assert run("search", *pair, *words) == 0
    found: dict[str, Any] = json.loads(stdout.getvalue())
    return found


def test_a_bad_grid_is_one_line_before_anything_else(tmp_path: Path, capsys: Capture) -> None:
    """Even before prompts and models, which are not there either."""
    words = ("--prompts", tmp_path / "none.jsonl", *SHORT, "--alphas=0,0.1")
    for command in (("merge", "-o", tmp_path / "out"), ("search",)):
        assert run(*command, tmp_path / "no base", tmp_path / "no donor", *words) == 2
        assert_one_error(capsys, "^error: --alphas: found .*expected three or more")
    assert not list(tmp_path.iterdir())


def test_refining_asks_between_the_best_and_its_neighbours(
    small: tuple[dict[str, Any], Path], exact: tuple[Path, Path], prompts: Path, tmp_path: Path
) -> None:
    journal = tmp_path / "journal.jsonl"
    shutil.copy(small[1], journal)
    found = searched(exact, prompts, journal, "--refine", "1")
    assert small[0]["alpha"] == 0.2
    assert [c["alpha"] for c in found["candidates"]] == [0, 0.1, 0.2, 0.3, 0.4]
    assert found["alpha"] in (0.1, 0.2, 0.3)
    assert len(answers_at(journal, 0.1)) == len(answers_at(journal, 0.3)) == 10


def test_a_seed_draws_the_same_sample(
    exact: tuple[Path, Path], prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    asked: list[tuple[str, ...]] = []

    def note(_: Any, prompts: tuple[Prompt, ...], *__: Any, **___: Any) -> Any:
        asked.append(tuple(prompt.id for prompt in prompts))
        raise KeyboardInterrupt

    monkeypatch.setattr("lowmem_adamms.api.search", note)
    words = ("search", *exact, "--prompts", prompts, *QUICK, "--samples", "4")
    for seed in ("1", "1", "2"):
        assert run(*words, "--seed", seed) == 130
    assert [len(ids) for ids in asked] == [4, 4, 4]
    assert asked[0] == asked[1] != asked[2]


@pytest.mark.parametrize("switch", ["--no-drafts", "--no-vision-cache"])
def test_an_economy_can_be_switched_off_and_changes_no_answer(
    switch: str,
    small: tuple[dict[str, Any], Path],
    exact: tuple[Path, Path],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = importlib.import_module("lowmem_adamms.reporting.recipe")
    features = importlib.import_module("lowmem_adamms.live.vision_cache")
    list_facts, over = recipe.list_facts, features.VisionCache.patch
    timings: list[Any] = []
    caches: list[Any] = []

    def facts(*args: Any) -> Any:
        timings.extend(args[-1])
        return list_facts(*args)

    def used(cache: Any, *args: Any) -> Any:
        caches.append(cache)
        return over(cache, *args)

    monkeypatch.setattr(recipe, "list_facts", facts)
    monkeypatch.setattr(features.VisionCache, "patch", used)
    found = searched(exact, prompts, tmp_path / "journal.jsonl", switch)
    expected = copy.deepcopy(small[0])
    assert talk.take_confidences(found) == pytest.approx(talk.take_confidences(expected), abs=1e-5)
    assert found == expected
    assert answers_at(tmp_path / "journal.jsonl", 0.2) == answers_at(small[1], 0.2)
    assert [timing.alpha for timing in timings] == [0, 0.2, 0.4]
    saved = [timing.plain_tokens - timing.forward_tokens for timing in timings[1:]]
    assert any(saved) == (switch != "--no-drafts")
    assert bool(caches) == (switch != "--no-vision-cache")


def test_the_noise_floor_need_not_be_measured(
    small: tuple[dict[str, Any], Path], exact: tuple[Path, Path], prompts: Path, tmp_path: Path
) -> None:
    found = searched(exact, prompts, tmp_path / "journal.jsonl", "--no-noise")
    assert (small[0]["noise"], found["noise"]) == (0, None)
    assert len(journalled(small[1])) == 40
    assert len(journalled(tmp_path / "journal.jsonl")) == 30


def test_the_donors_answers_are_shown_and_change_nothing_else(
    small: tuple[dict[str, Any], Path], exact: tuple[Path, Path], prompts: Path, tmp_path: Path
) -> None:
    journal, page = tmp_path / "journal.jsonl", tmp_path / "report.html"
    words = ("--donor-answers", "--report", page)
    assert searched(exact, prompts, journal, *words) == small[0]
    assert searched(exact, prompts, journal, *words) == small[0], "also once they are known"
    asked = [line for line in journalled(journal) if line.get("donor")]
    assert len(asked) == 10 and {line["alpha"] for line in asked} == {1}
    text = page.read_text(encoding="utf-8")
    cells = re.findall('<td class="donor"><span class="range">donor</span>(.+?)</td>', text, re.S)
    assert len(cells) == text.count("data-texts=") > 0
    base, donor = exact
    command = f"python -m lowmem_adamms {base} {donor} -o merged --alpha"
    assert command in text


def test_the_live_model_may_have_another_dtype(
    pair: tuple[Path, Path], prompts: Path, capsys: Capture
) -> None:
    words = ("search", *pair, "--prompts", prompts, *QUICK)
    for dtype, name in (("fp32", "F32"), ("fp16", "F16")):
        assert run(*words, "--live-dtype", dtype, "--batch-size", "4") == 0
        assert f"cpu {name} at batch 4: " in capsys.readouterr().err


# Recorded answers


def test_nothing_is_merged_where_no_alpha_is_better_than_the_base(
    pair: tuple[Path, Path], texts: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Such as a donor that is the base itself."""
    out, base = tmp_path / "out", pair[0]
    short = (*HERE, "--max-new-tokens", "4", "--alphas", "0,0.2,0.4")
    assert run(base, base, "-o", out, "--prompts", texts, *short) == 2
    captured = capsys.readouterr()
    assert "do not merge: No other alpha can be chosen" in captured.out
    error = captured.err.splitlines()[-1]
    assert error.startswith("error: nothing is merged: No other alpha can be chosen")
    assert [path.name for path in out.rglob("*") if path.is_file()] == [ANSWERS]


def test_the_answers_beside_a_model_give_the_same_choice_again(
    finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    page = tmp_path / "page.html"
    words = ("search", "--answers", finished / ANSWERS, "--json", "--report", page)
    assert run(*words, "--measure", "pairwise") == 0
    found, written = json.loads(capsys.readouterr().out), document(finished / "adamms.json")
    assert (found["base"], found["donor"], found["noise"]) == (None, None, None)
    notes_of_the_search(found, written)
    same = set(found) - {"base", "donor", "noise"}
    assert {name: found[name] for name in same} == {name: written[name] for name in same}
    assert "<title>Recorded answers" in page.read_text(encoding="utf-8")


def test_recorded_answers_are_compared_after_their_reasoning(
    tmp_path: Path, capsys: Capture
) -> None:
    """Chains of thought differ at every alpha; one of the answers at 0.2 is cut inside its own."""
    rows: list[dict[str, Any]] = []
    for alpha, last in ((0, "Red"), (0.1, "Blue"), (0.2, "Blue"), (0.3, "Blue"), (0.4, "Green")):
        answers = [f"<think>Is it {alpha} {i}?</think>No" for i in range(9)]
        answers += [f"<think>{alpha}</think>{last}", "<think>Well" if alpha == 0.2 else "No"]
        rows += [{"alpha": alpha, "index": i, "answer": one} for i, one in enumerate(answers)]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = {}
    for tags in ("<think> </think>", "", "<t> </t>"):
        words = ("--json", "--reasoning-tags", tags)
        assert run("search", "--answers", path, *words) == 0
        found[tags] = json.loads(capsys.readouterr().out)
    differences = {
        tags: [candidate["diff_next"] for candidate in document["candidates"]]
        for tags, document in found.items()
    }
    assert differences["<think> </think>"] == [1, 1, 1, 1, None]
    assert differences[""] == differences["<t> </t>"] == [10, 11, 11, 10, None]
    assert found["<think> </think>"]["unfinished"] == {"0.2": 1}
    assert found[""]["unfinished"] == {}


def test_entropy_is_found_in_recorded_answers_and_missed_where_it_is_not(
    finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ("search", "--measure", "entropy", "--json", "--answers")
    assert run(*words, finished / ANSWERS) == 0
    found, written = json.loads(capsys.readouterr().out), document(finished / "adamms.json")
    entropies = {c["alpha"]: c["entropy"] for c in written["candidates"]}
    assert {c["alpha"]: c["score"] for c in found["candidates"]} == entropies
    assert found["alpha"] == min(entropies, key=lambda alpha: entropies[alpha])
    lines = [line | {"entropy": None} for line in journalled(finished / ANSWERS)]
    path = tmp_path / "others.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert run(*words, path) == 2
    assert_one_error(capsys, "10 of 10 answers at alpha 0.0 have no entropy: vLLM tells none")


@pytest.mark.parametrize(("measure", "noted"), [("pairwise", True), ("entropy", False)])
def test_rounds_are_said_not_to_compare_where_they_do_not(
    measure: Measure, noted: bool, capsys: Capture
) -> None:
    def generate(alpha: float, prompts: Any) -> list[Answer]:
        change = round(100 * abs(alpha - 0.3))
        return [
            Answer(f"{i < change} {alpha if i < change else ''}", (), 0, change) for i in prompts
        ]

    result = search(generate, range(40), measure=measure, refine=1)
    assert result.earlier
    show_found(FoundAlpha(result, (), "", {}))
    assert ("D compares within a round" in capsys.readouterr().err) == noted


def test_a_search_by_entropy_is_the_same_with_and_without_drafts(
    exact: tuple[Path, Path], finished: Path, prompts: Path, tmp_path: Path, capsys: Capture
) -> None:
    """And asks no second time at the chosen alpha: no answers are compared."""
    found = []
    for more in ((), ("--no-drafts",)):
        journal = tmp_path / f"{more}.jsonl"
        words = (*exact, "--prompts", prompts, *SHORT, "--measure", "entropy", "--json")
        assert run("search", *words, "--journal", journal, *more) == 0
        document = json.loads(capsys.readouterr().out)
        found.append((document["alpha"], [c["score"] for c in document["candidates"]]))
        assert document["noise"] is None
        assert not any("again" in line for line in journalled(journal))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-5)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("BASE", "DONOR"), "leave out BASE, DONOR$"),
        (("--prompts", "p.jsonl", "--refine", "1"), "leave out --prompts, --refine$"),
        (("--no-drafts", "--ram", "8GB"), "leave out --no-drafts, --ram$"),
    ],
)
def test_recorded_answers_and_a_model_exclude_each_other(
    words: tuple[str, ...], says: str, finished: Path, capsys: Capture
) -> None:
    assert run("search", *words, "--answers", finished / ANSWERS) == 2
    assert_one_error(capsys, says)


# Placement


def test_memory_shapes_what_plan_says_of_a_search(pair: tuple[Path, Path], capsys: Capture) -> None:
    def lines(*words: str) -> list[str]:
        assert run("plan", *pair, "--json", *words) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        found: list[str] = json.loads(captured.out)["search"]
        return found

    host = lines("--ram", "8GB", "--vram", "0")
    assert re.match(
        r"fits: 0\.\dM exact \(bf16\) in 1\.35 GB of 8\.00 GB, held; on the CPU, 8 q", host[0]
    )
    assert "memory: no CUDA card, 8.00 GB of RAM available" in host
    assert any(re.match(r"cpu BF16 at batch 8: .* = .* of 8\.00 GB: chosen", line) for line in host)
    card = lines("--ram", "8GB", "--vram", "80GB")
    assert any(re.match(r"cuda BF16 at batch 8: .* of 80\.00 GB: chosen", line) for line in card)
    assert any(line.endswith("in VRAM") for line in card)
    streamed = lines("--ram", "8GB", "--vram", "0", "--live", "streamed")
    assert "of 8.00 GB, layers streamed from the page cache; on the CPU, 8 q" in streamed[0]
    (refusal,) = lines("--ram", "100MB", "--vram", "0")
    assert refusal.startswith("the model does not fit: cpu BF16 streamed at batch 1 needs ")
    assert run("plan", *pair, "--ram", "8GB", "--vram", "0") == 0
    shown = capsys.readouterr().out
    assert "a search for alpha would run so:\n  " + "\n  ".join(host) + "\n  time: about " in shown


def test_plan_imports_nothing_heavy(pair: tuple[Path, Path]) -> None:
    program = (
        "import sys; from lowmem_adamms.cli import main; code = main(sys.argv[1:]);"
        "print(sorted({'torch', 'transformers', 'numba', 'PIL'} & set(sys.modules)),"
        " file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "plan", *map(str, pair), "--json", *HERE],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert len(json.loads(done.stdout)["search"]) > 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--ram", "100MB", "--vram", "0"), r"needs [\d.]+ [MG]B of RAM but 100 MB is free"),
        (
            ("--ram", "8GB", "--vram", "50MB", "--device", "cuda"),
            r"needs [\d.]+ [MG]B of VRAM but 50 MB is free .*--live-quantize none would",
        ),
        (("--ram", "8GB", "--vram", "0", "--device", "cuda"), "no CUDA card was found"),
        (("--ram", "8GB", "--vram", "80GB"), "placed on a CUDA card, but torch sees none"),
    ],
)
def test_what_cannot_be_placed_is_refused_before_loading(
    words: tuple[str, ...],
    says: str,
    pair: tuple[Path, Path],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    forbid(monkeypatch, "lowmem_adamms.live.transformers_model.load_model")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(*pair, "-o", tmp_path / "out", "--prompts", prompts, *words) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(says, errors[0]), errors
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_not_fetched(
    pair: tuple[Path, Path], prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    forbid(monkeypatch, "lowmem_adamms.merging.sources.download")
    words = ("--prompts", prompts, "--ram", "100MB", "--vram", "0")
    assert run("search", *pair, *words) == 2
    assert_one_error(capsys, r"needs [\d.]+ [MG]B of RAM but 100 MB is free")


# Errors


SEARCHING = (PromptSettings, GridSettings, AnswerSettings, EngineSettings, PlacementSettings)
SWITCHES = ("no-drafts", "no-vision-cache", "no-noise", "donor-answers", "ray")
WISHES = {"device": "cpu", "live-quantize": "int8", "live-dtype": "fp16", "alphas": "0:1:0.5"}
WISHES |= {"measure": "joint", "engine": "vllm", "ram": "9GB", "vram": "0", "live": "streamed"}
WISHES["reasoning-tags"] = ""


def options_of_a_search() -> list[str]:
    """All that only a search has a use for, as they are written."""
    found = {item.name for kind in SEARCHING for item in fields(kind)}
    options = [item for item in fields(SearchSettings) if item.name in found]
    return [
        ("no-" if item.metadata["option"].off else "") + item.name.replace("_", "-")
        for item in options
    ]


@pytest.mark.parametrize(
    "weights", [("--alpha", "0.3"), ("--alpha-layers", "0.1,0.3"), ("--config", "x.yml")]
)
def test_no_option_of_a_search_is_silently_ignored_at_a_given_alpha(
    weights: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Found out before any model is opened: there are none."""
    monkeypatch.chdir(tmp_path)
    recipe = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n"
    (tmp_path / "x.yml").write_text(recipe)
    pair = () if "--config" in weights else ("no base", "no donor")
    names = options_of_a_search()
    assert len(names) >= 19
    for name in names:
        wish = () if name in SWITCHES else (WISHES.get(name, "7"),)
        assert run("merge", *pair, "-o", "out", *weights, f"--{name}", *wish) == 2
        assert_one_error(capsys, f"no search is made at a given alpha: leave out --{name}, or")
    wishes = ("--seed", "1", "--refine", "2", "--trust-remote-code")
    assert run("merge", *pair, "-o", "out", *weights, *wishes) == 2
    assert_one_error(capsys, "leave out --refine, --seed, or give --prompts")
    assert [path.name for path in tmp_path.iterdir()] == ["x.yml"]


def test_a_report_replaces_nothing_that_the_search_needs(
    pair: tuple[Path, Path], prompts: Path, tmp_path: Path, capsys: Capture
) -> None:
    asked = Path(shutil.copy(prompts, tmp_path / "prompts.jsonl"))
    before = seen(tmp_path)
    there = ("search", *pair, "--prompts", asked)
    for report, words in (
        (tmp_path / "sub" / ".." / "prompts.jsonl", there),
        (tmp_path / "new", (*there, "--journal", tmp_path / "new")),
        (asked, ("search", "--answers", asked, tmp_path / "other")),
    ):
        (tmp_path / "sub").mkdir(exist_ok=True)
        assert run(*words, "--report", report) == 2
        assert_one_error(capsys, "this command needs that file; name another")
        (tmp_path / "sub").rmdir()
        assert seen(tmp_path) == before


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ('{"prompt": "a", "image": "no.png"}\n', r"set\.jsonl:1: image .*no\.png: no such file"),
        (None, r"set\.jsonl: no such file"),
    ],
)
def test_a_bad_prompt_is_found_before_anything_else(
    lines: str | None, says: str, tmp_path: Path, capsys: Capture
) -> None:
    """Even before the models, which are not there either."""
    if lines is not None:
        (tmp_path / "set.jsonl").write_text(lines, encoding="utf-8")
    before = seen(tmp_path)
    models = (tmp_path / "no base", tmp_path / "no donor")
    for words in ((*models, "-o", tmp_path / "out"), ("search", *models)):
        assert run(*words, "--prompts", tmp_path / "set.jsonl") == 2
        assert_one_error(capsys, says)
    assert seen(tmp_path) == before


def no_tokenizer(base: Path) -> None:
    for path in (*base.glob("tokenizer*"), *base.glob("*.jinja"), base / "chat_template.json"):
        path.unlink(missing_ok=True)


def no_template(base: Path) -> None:
    (base / "chat_template.json").unlink()


def a_long_template(base: Path) -> None:
    """It does end, after a second or so, as the thread that it runs in is left behind."""
    spin = "{% for i in range(4000) %}{% for j in range(4000) %}{% endfor %}{% endfor %}"
    content = json.dumps({"chat_template": spin})
    (base / "chat_template.json").write_text(content, encoding="utf-8")


def no_image_processor(base: Path) -> None:
    (base / "preprocessor_config.json").unlink()


def no_such_type(base: Path) -> None:
    config = document(base / "config.json") | {"model_type": "nonsense"}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (no_tokenizer, "no .*tokenizer"),
        (no_template, "no chat template in it.* copy"),
        (a_long_template, "chat template does not end within 0.02 s"),
        (no_image_processor, "has an image, but .*preprocessor_config"),
        (no_such_type, "nonsense"),
    ],
)
def test_a_base_that_cannot_answer_is_one_line(
    spoil: Callable[[Path], None],
    says: str,
    pair: tuple[Path, Path],
    prompts: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = shutil.copytree(pair[0], tmp_path / "base")
    spoil(base)
    before = seen(tmp_path)
    if spoil in (no_template, a_long_template):  # found before the weights are loaded
        monkeypatch.setattr("lowmem_adamms.live.processor.TEMPLATE_SECONDS", 0.02)
        monkeypatch.setattr("lowmem_adamms.live.transformers_model.load_model", None)
    assert run(base, pair[1], "-o", tmp_path / "out", "--prompts", prompts, *QUICK) == 2
    assert_one_error(capsys, says)
    assert seen(tmp_path) == before


def test_a_text_only_base_is_asked_about_no_images(
    talking: dict[str, Path],
    prompts: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    models = (talking["qwen2"], talking["llava_onevision"])
    assert run(*models, "-o", tmp_path / "out", "--prompts", prompts, *QUICK) == 2
    assert_one_error(capsys, r"prompts\.jsonl:1: has an image, but .* is text-only")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--seed", "-1"), "--seed: '-1': expected a whole number, 0 or more"),
        (("--measure", "votes"), "--measure: invalid choice"),
        (("--question", "What?"), "question does not go with this kind of prompt set"),
        (("--report", "no/page.html"), "--report no/page.html: expected a file in a folder"),
        (("--report", "."), "--report .: expected a file in a folder"),
        (("--journal", "."), "Is a directory"),
        (("--journal", "prompts.jsonl"), "no journal of a search"),
        (("--journal", "prompts.jsonl/below"), "Not a directory|File exists"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_bad_option_is_one_line_before_the_model_is_loaded(
    words: tuple[str, ...],
    says: str,
    pair: tuple[Path, Path],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    forbid(monkeypatch, "lowmem_adamms.live.transformers_model.load_model")
    shutil.copy(prompts, tmp_path / "prompts.jsonl")
    monkeypatch.chdir(tmp_path)
    before = seen(tmp_path)
    assert run("search", *pair, "--prompts", "prompts.jsonl", *QUICK, *words) == 2
    assert_one_error(capsys, says)
    assert seen(tmp_path) == before


@pytest.mark.parametrize("words", [(), ("one",), ("one", "two"), ("--prompts", "x.jsonl")], ids=str)
def test_an_incomplete_search_is_one_line(words: tuple[str, ...], capsys: Capture) -> None:
    assert run("search", *words) == 2
    assert_one_error(capsys, "search needs BASE, DONOR and --prompts, or --answers")


# The terminal


def screen(stream: str) -> tuple[list[str], list[str]]:
    """The lines that a terminal shows in the end, and all that it ever showed."""
    lines, row, ever = [""], 0, set()
    for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", stream):
        if token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif match := re.fullmatch(r"\x1b\[(\d+)A", token):
            row -= int(match[1])
        elif token == "\x1b[2K":
            lines[row] = ""
        elif not token.startswith(("\x1b", "\r")):
            lines[row] += token
            ever.add(lines[row])
    return [line for line in lines if line], sorted(ever)


def test_on_a_terminal_a_table_comes_and_goes(
    pair: tuple[Path, Path],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    terminal = Terminal()
    for name, value in (("TERM", "xterm"), ("COLUMNS", "300")):
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        assert run(*pair, "-o", tmp_path / "out", "--prompts", prompts, *QUICK) == 0
    left, ever = screen(terminal.getvalue())
    stdout = capsys.readouterr().out
    assert any("differs from previous" in line for line in ever)
    assert any(line.startswith("loading the model") for line in ever)
    assert not any("differs from previous" in line for line in left)
    assert all(STDERR.match(line) or line.startswith("merging") for line in left), left
    assert "<- chosen" in stdout
    assert "\x1b" not in stdout


# The four names


def test_the_public_names_work_together(
    exact: tuple[Path, Path], finished: Path, prompts: Path, tmp_path: Path
) -> None:
    plan = make_plan(*exact)
    with LiveModel(plan, device="cpu") as live:

        def answers(alpha: float, asked: Any) -> list[str]:
            live.apply(alpha)
            made: list[str] = live.generate(asked)
            return made

        found = search(answers, ["Is the door open?", *TEXTS, *load_prompts(prompts)], (0, 0.3, 1))
        live.apply(found.alpha)
        parameters = {name: p.clone() for name, p in live.model.named_parameters()}
    out = merge(plan, found.alpha, tmp_path / "out")
    assert found.alpha == document(out / "adamms.json")["alpha"] == 0.3
    assert found.prompts == 15
    written = dict(tiny.load_model(out).named_parameters())
    assert all(torch.equal(parameters[name], written[name]) for name in written)
