"""The demo: a pair made on the spot, merged, and asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch

from lowmem_adamms import demo, make_plan
from lowmem_adamms.cli import main
from lowmem_adamms.verify import verify

Capture = pytest.CaptureFixture[str]


def seen(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return demo.make_pair(tmp_path_factory.mktemp("pair"))


def test_the_same_seed_gives_the_same_bytes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    again = demo.make_pair(tmp_path)
    assert seen(tmp_path) == seen(pair[0].parent)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are its own
    assert again == (tmp_path / "base", tmp_path / "donor")


def test_another_seed_gives_other_weights(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = demo.make_pair(tmp_path, seed=1)
    ours, theirs = tiny.load(pair[0]), tiny.load(base)
    assert set(ours) == set(theirs)
    assert not torch.equal(ours["lm_head.weight"], theirs["lm_head.weight"])


def test_the_pair_has_the_real_ones_traps(pair: tuple[Path, Path]) -> None:
    base, donor = map(tiny.load, pair)
    assert not set(base) & set(donor)  # every name is spelled differently
    assert base["lm_head.weight"].shape != donor["language_model.lm_head.weight"].shape
    plan = make_plan(*pair)
    assert (plan.base_layout.arch, plan.donor_layout.arch) == ("Qwen2-VL", "LLaVA-OneVision")
    assert plan.notes == ()
    embed = next(step for step in plan.steps if step.kind == "embedding")
    assert [part.donor is None for part in embed.parts] == [False, True]
    vocabularies = [
        json.loads((side / "tokenizer.json").read_bytes())["added_tokens"] for side in pair
    ]
    first = [
        {token["id"]: token["content"] for token in tokens}[embed.parts[0].rows[1]]
        for tokens in vocabularies
    ]
    assert first == ["<|vision_start|>", "<image>"]  # the first id that differs is the first kept


def test_the_demo_prints_plan_and_both_answers(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert main(["demo"]) == 0
    captured = capsys.readouterr()
    assert "cpu BF16" in captured.err  # where the search ran
    assert "<- chosen" in captured.out
    assert " over 12 prompts (pairwise)" in captured.out
    answers = [line for line in captured.out.splitlines() if " answers: " in line]
    assert [line.split(" answers: ")[0] for line in answers] == ["base", "merged"]
    assert all(len(line.split(" answers: ")[1]) > 4 for line in answers)
    assert "base (Qwen2-VL) <- donor (LLaVA-OneVision)" in captured.out
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_the_demo_keeps_its_models_where_told(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "kept"
    assert main(["demo", "-o", str(out), "--alpha", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "merged answers: " in printed
    assert "chosen" not in printed
    kept = {"base", "donor", "images", "merged", "prompts.jsonl"}
    assert {path.name for path in out.iterdir()} == kept
    assert json.loads((out / "merged" / "adamms.json").read_text())["alpha"] == 0.5
    assert verify(out / "merged", deep=True).rows
    assert main(["demo", "-o", str(out)]) == 2
    assert capsys.readouterr().err == f"error: {out} is not empty; choose another -o\n"


@pytest.mark.parametrize("words", [["--alpha", "2"], ["--alpha", "nan"]])
def test_a_bad_alpha_is_refused_before_anything_is_made(
    words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    assert main(["demo", "-o", str(tmp_path / "kept"), *words]) == 2
    assert capsys.readouterr().err.startswith("error: alpha is")
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_a_file_is_refused(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["demo", "-o", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert (tmp_path / "file").read_text() == "mine"


def test_generate_refuses_what_does_not_fill_its_model(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    def without_norm(name: str) -> str | None:
        return None if name == "model.norm.weight" else name

    broken = tiny.respell(pair[0], without_norm, tmp_path / "broken")
    with pytest.raises(RuntimeError, match=r"missing_keys: model\.language_model\.norm\.weight"):
        demo.generate(broken, "the image shows")


def test_answers_are_repeatable_and_depend_on_the_prompt(pair: tuple[Path, Path]) -> None:
    for side in pair:
        answer = demo.generate(side, "the image shows")
        assert answer == demo.generate(side, "the image shows")
        assert answer != demo.generate(side, "how many people are on the street at night?")
