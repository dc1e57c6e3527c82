"""The search's model inside a real vLLM engine; skipped where vLLM is not installed.

An engine takes half a minute to start, so that one serves all tests, and another one the merged
checkpoint that its weights are held against.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowmem_adamms import LiveModel, find_alpha, make_plan, merge
from lowmem_adamms.errors import RecipeError
from lowmem_adamms.mapping.plan import Plan
from lowmem_adamms.prompts import Prompts, load_prompts
from lowmem_adamms.serving.vllm_model import VllmAnswerer, VllmModel
from lowmem_adamms.settings import AnswerSettings, EngineSettings

pytest.importorskip("vllm")
pytestmark = pytest.mark.filterwarnings("default")  # what other libraries say is theirs

ALPHA = 0.4
OPTIONS = ("enforce_eager=True", "max_model_len=1024")


@pytest.fixture(scope="module", autouse=True)
def small_engine() -> Iterator[None]:
    """Little memory for the cache; and functions of ours may be sent to read weights back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
    runnable: Any = importlib.import_module("runnable")
    folder: Path = tmp_path_factory.mktemp("pair")
    runnable.make_pair(folder, runnable.SIZES["tiny"], distance=0.3, branching=0.2, seed=0)
    runnable.make_prompts(folder, 6, 112, seed=0)
    return folder


@pytest.fixture(scope="module")
def plan(pair: Path) -> Plan:
    return make_plan(pair / "base", pair / "donor")


@pytest.fixture(scope="module")
def prompts(pair: Path) -> Prompts:
    return load_prompts(pair / "prompts.jsonl")


@pytest.fixture(scope="module")
def engine(plan: Plan) -> Iterator[VllmModel]:
    with VllmModel(plan, EngineSettings(engine="vllm", vllm_option=OPTIONS)) as model:
        yield model


def ask(model: VllmModel, prompts: Prompts) -> list[str]:
    answerer: VllmAnswerer = model.make_answerer(AnswerSettings(max_new_tokens=12), batch_size=100)
    return [answer.text for answer in answerer.answer(prompts)]


def read_weights(model: Any) -> dict[str, str]:
    """A digest of each weight of a loaded model, called in the worker.

    The CPU backend packs the weights of linear layers and leaves empty ones; what such a layer
    makes of the identity matrix is its weight, exactly.
    """
    import torch

    digests = {}

    def note(name: str, tensor: Any) -> None:
        flat = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
        digests[name] = hashlib.sha256(flat.tobytes()).hexdigest()

    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.numel():
                note(f"{name}.{key}", parameter)
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and not weight.numel():
            width = getattr(module, "input_size_per_partition", None) or module.input_size
            out = module(torch.eye(width, dtype=weight.dtype))
            note(f"{name}.weight", out[0] if isinstance(out, tuple) else out)
    return digests


def weights_of(model: VllmModel) -> dict[str, str]:
    (digests,) = model._llm.apply_model(read_weights)
    return dict(digests)


def test_weights_and_answers_are_those_of_an_engine_on_the_merged_checkpoint(
    engine: VllmModel, plan: Plan, prompts: Prompts, tmp_path: Path
) -> None:
    engine.apply(0.0)
    base_weights, base_answers = weights_of(engine), ask(engine, prompts)
    engine.apply(1.0)
    engine.apply(ALPHA)
    applied, answers = weights_of(engine), ask(engine, prompts)
    assert len(applied) > 60
    changed = {name for name in applied if applied[name] != base_weights[name]}
    assert any("qkv_proj" in name for name in changed)
    assert not any("visual" in name for name in changed)
    assert answers != base_answers

    merge(plan, ALPHA, tmp_path / "merged")
    merged = make_plan(tmp_path / "merged", plan.donor.path)
    with VllmModel(merged, EngineSettings(engine="vllm", vllm_option=OPTIONS)) as fresh:
        assert weights_of(fresh) == applied
        assert ask(fresh, prompts) == answers


def test_an_alpha_comes_back_after_any_history(engine: VllmModel, prompts: Prompts) -> None:
    engine.apply(ALPHA)
    weights, answers = weights_of(engine), ask(engine, prompts)
    for alpha in (1.0, 0.0, ALPHA):
        engine.apply(alpha)
    assert weights_of(engine) == weights
    assert ask(engine, prompts) == answers


def test_log_probabilities_are_those_of_transformers(engine: VllmModel, plan: Plan) -> None:
    """Of the first tokens, where both choose the same: in bf16 the rest soon parts."""
    settings, found = AnswerSettings(max_new_tokens=1), []
    asked = load_prompts(["What is it?", "Who?", "How many cats are there on the mat?"])
    with LiveModel(plan, device="cpu") as live:
        for model in (engine, live):
            model.apply(ALPHA)
            found.append(model.make_answerer(settings, batch_size=8).answer(asked))
    same = [(a, b) for a, b in zip(*found, strict=True) if a.tokens == b.tokens]
    assert same
    for theirs, ours in same:
        assert theirs.log_probability == pytest.approx(ours.log_probability, rel=0.2, abs=0.02)
        assert theirs.entropy is None and ours.entropy is not None


def test_a_whole_search_resumes_from_its_journal(
    plan: Plan, prompts: Prompts, tmp_path: Path
) -> None:
    journal = tmp_path / "answers.jsonl"
    settings: dict[str, Any] = {
        "engine": "vllm",
        "vllm_option": OPTIONS,
        "alphas": (0.0, 0.3, 0.6),
        "max_new_tokens": 12,
    }
    found = find_alpha(plan, prompts, journal=journal, **settings)
    assert "vLLM" in found.page
    kept = journal.read_bytes()
    again = find_alpha(plan, prompts, journal=journal, **settings)  # starts no engine
    assert again.to_json() == found.to_json()
    assert journal.read_bytes() == kept
    assert not again.timings


def test_options_that_vllm_does_not_have_are_one_line(plan: Plan) -> None:
    with pytest.raises(RecipeError, match=r"vLLM refuses its options: .*no_such_option"):
        VllmModel(plan, EngineSettings(engine="vllm", vllm_option=("no_such_option=1",)))
