"""A whole search on a streamed model: it finds, keeps and reports what a held one does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import talk
import tiny
from command import run

from lowmem_adamms import find_alpha, make_plan
from lowmem_adamms.live.live_model import LiveModel
from lowmem_adamms.mapping.plan import Plan

GRID = (0.0, 0.2, 0.4, 0.6)


@pytest.fixture(scope="module")
def plan(
    tmp_path_factory: pytest.TempPathFactory,
    ancestors: dict[str, tiny.Tensors],
    tiny_models: dict[str, Path],
) -> Plan:
    """A base in float32: its answers depend on no batch size."""
    folder = tmp_path_factory.mktemp("exact") / "base"
    tiny.make("qwen2_vl", folder, ancestor=ancestors["qwen2"], dtype="float32")
    return make_plan(tiny.add_processor(folder), tiny_models["llava_onevision"])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory, images: tuple[Path, ...]) -> Path:
    lines = [
        {"prompt": f"{text} {place}", "image": str(images[place % 3]) if place % 4 else None}
        for place, text in enumerate(talk.TEXTS)
    ]
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def search(plan: Plan, prompts: Path, live: Any, **more: Any) -> Any:
    settings: dict[str, Any] = {
        "device": "cpu",
        "alphas": GRID,
        "max_new_tokens": 6,
        "batch_size": 2,
    } | more
    return find_alpha(plan, prompts, live=live, live_quantize="none", **settings)


def answers_of(journal: Path) -> list[Any]:
    lines = map(json.loads, journal.read_text().splitlines()[1:])
    kept = ("alpha", "index", "answer", "again", "tokens")
    return sorted([[line.get(key) for key in kept] for line in lines], key=str)


def confidences_of(journal: Path) -> dict[str, tuple[float, float]]:
    lines = map(json.loads, journal.read_text().splitlines()[1:])
    return {
        str([line["alpha"], line["index"], line.get("again"), line.get("donor")]): (
            line["log_probability"],
            line["entropy"],
        )
        for line in lines
    }


def test_it_finds_keeps_and_reports_the_same(plan: Plan, prompts: Path, tmp_path: Path) -> None:
    """With drafts, kept vision features, noise, a finer grid, the donor's answers, and batches."""
    found = {}
    for live in ("held", "streamed"):
        journal = tmp_path / f"{live}.jsonl"
        more: dict[str, Any] = {"refine": 1, "donor_answers": True, "journal": journal}
        more["measure"] = "pairwise"  # of answers: how sure they are is compared below
        found[live] = search(plan, prompts, live, **more)
        assert "streamed" in found[live].facts["Placement"]["1"] or live == "held"
    held, streamed = found["held"], found["streamed"]
    documents = [each.to_json() for each in (held, streamed)]
    confidences = [talk.take_confidences(document) for document in documents]
    assert confidences[0] == pytest.approx(confidences[1], abs=1e-5)
    assert documents[0] == documents[1]
    assert streamed.donor_answers == held.donor_answers
    assert {candidate.round for candidate in streamed.result.candidates} == {0, 1}
    assert answers_of(tmp_path / "streamed.jsonl") == answers_of(tmp_path / "held.jsonl")
    one, other = (confidences_of(tmp_path / f"{live}.jsonl") for live in found)
    assert one.keys() == other.keys()
    for asked, values in one.items():
        assert other[asked] == pytest.approx(values, abs=1e-5), asked
    tokens = [
        [(it.alpha, it.forward_tokens, it.plain_tokens) for it in each.timings]
        for each in (held, streamed)
    ]
    assert tokens[0] == tokens[1]


def test_a_killed_search_resumes_held_or_streamed(
    plan: Plan, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = search(plan, prompts, "streamed", journal=tmp_path / "whole.jsonl")
    journal, apply = tmp_path / "killed.jsonl", LiveModel.apply

    def stop(self: LiveModel, alpha: Any, progress: Any = None) -> None:
        if alpha == GRID[2]:
            raise KeyboardInterrupt
        apply(self, alpha, progress)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(LiveModel, "apply", stop)
        search(plan, prompts, "held", journal=journal)
    kept = journal.read_bytes()
    resumed = search(plan, prompts, "streamed", journal=journal)
    assert journal.read_bytes().startswith(kept)
    documents = [each.to_json() for each in (resumed, whole)]
    confidences = [talk.take_confidences(document) for document in documents]
    assert confidences[0] == pytest.approx(confidences[1], abs=1e-5)
    assert documents[0] == documents[1]


def test_the_one_liner_streams_and_merges(plan: Plan, prompts: Path, tmp_path: Path) -> None:
    words = [plan.base.path, plan.donor.path, "--prompts", prompts, "--alphas", "0,0.3,0.6"]
    words += ["--max-new-tokens", "4", "--vram", "0", "--no-noise"]
    shards: dict[str, list[bytes]] = {}
    for live in ("held", "streamed"):
        out = tmp_path / live
        assert run(*words, "--live", live, "-o", out) == 0
        shards[live] = [path.read_bytes() for path in sorted(out.glob("*.safetensors"))]
        page = (out / "report.html").read_text()
        assert ("streamed from the page cache" in page) == (live == "streamed")
    assert shards["streamed"] == shards["held"]
