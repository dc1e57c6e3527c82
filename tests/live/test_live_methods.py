"""Methods and several donors in the live model and in the search, up to what is merged then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import talk
import tiny
import torch
from command import run
from tiny import Tensors

from lowmem_adamms import LiveModel, find_alpha, make_plan, merge
from lowmem_adamms.errors import RecipeError
from lowmem_adamms.live.device_source import DeviceSource
from lowmem_adamms.live.transformers_model import quiet
from lowmem_adamms.merging.journal import ANSWERS


@pytest.fixture(scope="module")
def models(
    talking: dict[str, Path],
    ancestors: dict[str, Tensors],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A base that answers, two donors and an ancestor, all of one line."""
    folder, parent = tmp_path_factory.mktemp("models"), ancestors["qwen2"]
    made = {
        "donor": ("llava_onevision", {"seed": 2}),
        "text": ("qwen2", {"seed": 3}),
        "ancestor": ("qwen2", {"seed": 4, "noise": 0.0}),
    }
    for name, (family, options) in made.items():
        tiny.make(family, folder / name, ancestor=parent, **options)  # type: ignore[arg-type]
    return {"base": talking["qwen2_vl"]} | {name: folder / name for name in made}


def plan_of(models: dict[str, Path], method: str) -> Any:
    donors = [models["donor"], models["text"]]
    ancestor = None if method == "linear" else models["ancestor"]
    return make_plan(models["base"], donors, method=method, ancestor=ancestor)


@pytest.mark.parametrize(
    ("method", "alphas"),
    [("linear", [(0.3, 0.2), (0.0, 0.6)]), ("ties", [1.0, 0.4]), ("dare-linear", [(0.3, 0.2)])],
)
def test_the_live_parameters_are_what_is_merged(
    method: str, alphas: list[Any], models: dict[str, Path], tmp_path: Path
) -> None:
    plan = plan_of(models, method)
    with LiveModel(plan, device="cpu") as live:
        for alpha in reversed(alphas):
            live.apply(alpha)
        out = merge(plan_of(models, method), alphas[0], tmp_path / "out")
        written = dict(tiny.load_model(out).named_parameters())
        for name, parameter in live.model.named_parameters():
            assert torch.equal(parameter, written[name]), name


@pytest.mark.parametrize("method", ["linear", "ties", "dare-linear"])
def test_a_streamed_mixture_runs_as_a_held_one(method: str, models: dict[str, Path]) -> None:
    """What a value becomes may hang on its place in the whole tensor: none goes by rows."""
    ids = torch.tensor([[5, 9, 301, 7]])
    logits = []
    for live in ("held", "streamed"):
        plan = plan_of(models, method)
        with LiveModel(plan, device="cpu", quantize="none", live=live) as model:
            model.apply((0.3, 0.2) if method != "ties" else 0.7)
            with quiet(), torch.inference_mode():
                out = model.model(input_ids=ids, attention_mask=torch.ones_like(ids))
            logits.append(out.logits)
    assert torch.equal(*logits)


def test_a_device_holds_every_model_of_a_mixture(models: dict[str, Path]) -> None:
    """On "cpu" in place of a card: the source gives torch tensors, so torch mixes."""
    from lowmem_adamms.checkpoints.mapped_files import MappedFiles
    from lowmem_adamms.live.free_memory import Memory
    from lowmem_adamms.live.placing import place
    from lowmem_adamms.settings import PlacementSettings

    plan = plan_of(models, "ties")
    memory = Memory(ram_bytes=8 << 30, vram_bytes=8 << 30, card_name="a card")
    placement = place(plan, memory, PlacementSettings(device="cuda"))
    part = next(part for _, part in plan.parts if part.donor)
    assert len(part.sides) == 4
    assert placement.vram_source_bytes == sum(
        side.nbytes for _, each in plan.parts if each.donor for side in each.sides
    )
    with MappedFiles() as files:
        source = DeviceSource(plan, files, placement, "cpu")
        assert all(isinstance(source.view(side), torch.Tensor) for side in part.sides)
        assert all(not source.prefetch(side) for side in part.sides)


def write_prompts(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in talk.TEXTS))
    return path


def test_two_donors_are_searched_in_turn_and_merged(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [models["base"], models["donor"], models["text"], "--device", "cpu"]
    words += [
        "--prompts",
        write_prompts(tmp_path),
        "--alphas",
        "0,0.2,0.4",
        "--max-new-tokens",
        "4",
        "--measure",
        "pairwise",
    ]
    assert run("merge", *words, "-o", tmp_path / "out") == 0
    stderr = capsys.readouterr().err
    assert "2 donors are searched one after the other" in stderr
    assert "up to 5 passes over the questions" in stderr
    recipe = json.loads((tmp_path / "out" / "adamms.json").read_text())
    assert recipe["alpha"] == [each["alpha"] for each in recipe["in_turn"]]
    tried = [[one["alpha"] for one in each["candidates"]] for each in recipe["in_turn"]]
    assert tried == [[0.0, 0.2, 0.4]] * 2
    journal = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()[1:]
    asked = {tuple(json.loads(line)["alpha"]) for line in journal}
    assert len(asked) == 5 and (0.0, 0.0) in asked
    page = (tmp_path / "out" / "report.html").read_text()
    assert "donor 2" in page and f"--alpha {recipe['alpha'][0]:g} " in page
    assert run("merge", *words, "-o", tmp_path / "out") == 0  # complete: nothing is asked


def test_nothing_is_merged_where_no_donor_is_of_use(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = models["base"], tmp_path / "out"
    words = ["merge", base, base, base, "-o", out, "--prompts", write_prompts(tmp_path)]
    words += ["--alphas", "0,0.2,0.4", "--max-new-tokens", "4", "--device", "cpu"]
    assert run(*words) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: nothing is merged: ")
    assert [path.name for path in out.rglob("*") if path.is_file()] == [ANSWERS]


@pytest.mark.parametrize(
    ("method", "is_judged"),
    [("linear", True), ("task-arithmetic", True), ("dare-linear", False), ("ties", False)],
)
def test_a_verdict_needs_the_base_at_alpha_0(
    method: str, is_judged: bool, models: dict[str, Path], tmp_path: Path
) -> None:
    """By TIES alpha 0 is the ancestor, by DARE the base without some of what it has learned."""
    donor = models["donor"]
    ancestor = None if method == "linear" else models["ancestor"]
    plan = make_plan(models["base"], donor, method=method, ancestor=ancestor)
    prompts = write_prompts(tmp_path)
    found = find_alpha(plan, prompts, alphas=(0.0, 0.3, 0.6), max_new_tokens=4, device="cpu")
    assert (found.result.verdict is not None) == is_judged


def test_the_search_varies_the_factor_of_ties(models: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_of(models, "ties")
    found = find_alpha(
        plan,
        write_prompts(tmp_path),
        alphas=(0.5, 0.75, 1.0),
        max_new_tokens=4,
        device="cpu",
        noise=False,
    )
    assert found.alpha == 0.75
    assert "ties, weights 1.0 1.0 1.0, densities 0.2 0.2 0.2" in found.facts["Recipe"]["method"]
    assert "--method ties --ancestor" in found.command


@pytest.mark.parametrize("field", [{"donor_answers": True}, {"engine": "vllm"}])
def test_what_only_a_pair_can_show_is_refused(
    field: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="one donor"):
        find_alpha(plan_of(models, "ties"), write_prompts(tmp_path), **field)
