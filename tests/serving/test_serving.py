"""What is handed to vLLM and taken from it, without vLLM; with it: tests/engines."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from lowmem_adamms import find_alpha, make_plan, merge
from lowmem_adamms.api import place_search
from lowmem_adamms.checkpoints.mapped_files import MappedFiles
from lowmem_adamms.errors import FormatError, PromptError, RecipeError, SearchError
from lowmem_adamms.prompts import Prompt, load_prompts
from lowmem_adamms.searching.session import fingerprint
from lowmem_adamms.serving.vllm_model import VllmModel, _parse_option, check_prompts
from lowmem_adamms.serving.vllm_worker import blend_tensors, plan_from_recipe, plan_recipe
from lowmem_adamms.settings import EngineSettings, SearchSettings

Pair = tuple[Path, Path]


class EngineDeadError(Exception):
    """As vLLM's own: no RuntimeError."""


@dataclass
class FakeEngine:
    """Looks like vllm.LLM to the search: answers last question first, and keeps what it is told."""

    folder: str
    options: dict[str, Any]
    calls: list[tuple[Any, ...]]
    dies_at: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        self.llm_engine = self
        self.engine_core = SimpleNamespace(shutdown=lambda: self.calls.append(("shutdown",)))
        self.waiting: list[tuple[str, Any]] = []
        self.asked = 0
        self.batches: list[int] = []
        self.alpha = 0.0

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[None]:
        self.calls.append((method, *args))
        if method == "apply_alpha":
            self.alpha = args[0]
        return [None]

    def reset_prefix_cache(self) -> bool:
        self.calls.append(("reset_prefix_cache",))
        return True

    def enqueue_chat(self, messages: list[Any], sampling: Any, *, use_tqdm: bool) -> list[str]:
        numbers = [str(self.asked + i) for i in range(len(messages))]
        self.asked += len(messages)
        self.batches.append(len(messages))
        self.waiting += zip(numbers, messages, strict=True)
        return [f"{number}-ab12" for number in numbers]

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[Any]:
        if self.dies_at is not None and self.alpha >= self.dies_at and len(self.waiting) == 1:
            raise EngineDeadError("EngineCore encountered an issue")
        number, message = self.waiting.pop()
        words = message[0]["content"][-1]["text"]
        answer = SimpleNamespace(
            text=f" {words} at {self.alpha:g} ", token_ids=[1, 2], cumulative_logprob=-0.5
        )
        return [SimpleNamespace(finished=True, request_id=number, outputs=[answer])]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """A module `vllm`; the engines that were started with it."""
    started: list[FakeEngine] = []

    def start(folder: str, **options: Any) -> FakeEngine:
        if "no_such_option" in options:
            raise TypeError("unexpected keyword argument 'no_such_option'")
        started.append(FakeEngine(folder, options, []))
        return started[-1]

    registry = SimpleNamespace(get_supported_archs=lambda: {"Qwen2VLForConditionalGeneration"})
    platform = SimpleNamespace(is_cuda=lambda: False)
    contents: dict[str, dict[str, Any]] = {
        "vllm": {
            "LLM": start,
            "ModelRegistry": registry,
            "SamplingParams": lambda **values: values,
            "__version__": "0.99",
            "__spec__": importlib.machinery.ModuleSpec("vllm", None),
        },
        "vllm.platforms": {"current_platform": platform},
        "vllm.v1.engine.exceptions": {"EngineDeadError": EngineDeadError},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    for variable in ("VLLM_LOGGING_LEVEL", "VLLM_LOGGING_STREAM"):
        monkeypatch.setenv(variable, "")
    return started


PROMPTS = load_prompts([f"question {i}" for i in range(5)])
VLLM: dict[str, Any] = {
    "engine": "vllm",
    "alphas": (0.0, 0.5, 1.0),
    "max_new_tokens": 4,
    "noise": False,
}


# The worker


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_workers_get_the_tensors_of_the_merged_decoder(
    pair: Pair, tmp_path: Path, alpha: float
) -> None:
    plan = make_plan(*pair)
    merged: dict[str, torch.Tensor] = {}
    for file in merge(plan, alpha, tmp_path / "merged").glob("*.safetensors"):
        merged |= load_file(file)
    with MappedFiles() as files:
        handed = dict(blend_tensors(plan, alpha, files))
    decoder = {step.name for step in plan.steps if any(part.role for part in step.parts)}
    assert handed.keys() == decoder < merged.keys()
    for name, tensor in handed.items():
        assert tensor.dtype == merged[name].dtype
        assert torch.equal(tensor.view(torch.uint8), merged[name].view(torch.uint8)), name


def test_a_worker_makes_the_same_plan(pair: Pair) -> None:
    plan = make_plan(*pair, embeddings="keep", dtype="fp16")
    recipe = plan_recipe(plan)
    assert plan_from_recipe(recipe).identity() == plan.identity()
    with pytest.raises(FormatError, match="not the same to a vLLM worker"):
        plan_from_recipe(recipe | {"donor": recipe["base"]})


# The engine


def test_a_search_asks_one_engine_at_all_alphas(pair: Pair, engines: list[FakeEngine]) -> None:
    found = find_alpha(make_plan(*pair), PROMPTS, **VLLM, tensor_parallel=2)
    (engine,) = engines
    assert Path(engine.folder) == pair[0]
    assert engine.options["tensor_parallel_size"] == 2
    assert engine.options["worker_extension_cls"].endswith("BlendingWorker")
    assert [call[0] for call in engine.calls] == [
        "set_merge_plan",
        *(["apply_alpha", "reset_prefix_cache"] * 3),
        "shutdown",
    ]
    expected = [f"question {i} at 1" for i in range(5)]
    assert (
        found.result.answers[1.0] == tuple(expected) or list(found.result.answers[1.0]) == expected
    )
    assert "answered by vLLM 0.99, tensor parallel 2" in found.page


def test_what_was_answered_before_the_engine_died_is_kept(
    pair: Pair, engines: list[FakeEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, journal = make_plan(*pair), tmp_path / "answers.jsonl"
    monkeypatch.setattr(FakeEngine, "dies_at", 1)
    with pytest.raises(SearchError, match=r"vLLM failed: EngineCore encountered.*same command"):
        find_alpha(plan, PROMPTS, journal=journal, **VLLM)
    _, *lines = map(json.loads, journal.read_bytes().splitlines())
    assert len(lines) == 5 + 5 + 4
    # The fake's two tokens have -0.5 together
    assert {(line["log_probability"], line["entropy"]) for line in lines} == {(-0.25, None)}
    monkeypatch.setattr(FakeEngine, "dies_at", None)
    find_alpha(plan, PROMPTS, journal=journal, **VLLM)
    assert engines[-1].asked == 1
    assert [call[0] for call in engines[0].calls][-1] == "shutdown"


def test_answers_depend_on_the_engine(pair: Pair, engines: list[FakeEngine]) -> None:
    plan = make_plan(*pair)
    settings = SearchSettings(engine="vllm")
    where: Any = place_search(plan, settings)
    keys = {
        fingerprint(plan, PROMPTS, settings, place)
        for place in (
            where,
            replace(where, version="1"),
            replace(where, settings=EngineSettings(engine="vllm", tensor_parallel=2)),
            place_search(plan, device="cpu"),
        )
    }
    assert len(keys) == 4


def test_nothing_is_loaded_where_vllm_is_missing(pair: Pair) -> None:
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed")
    with pytest.raises(RecipeError, match="vLLM is not installed; pip install vllm"):
        find_alpha(make_plan(*pair), PROMPTS, **VLLM)


def test_a_base_that_vllm_does_not_know_is_refused(pair: Pair, engines: list[FakeEngine]) -> None:
    plan = make_plan(pair[1], pair[0])
    with pytest.raises(RecipeError, match=r"vLLM 0\.99 does not know LlavaOnevision"):
        find_alpha(plan, PROMPTS, **VLLM)
    assert not engines


def test_a_sound_is_refused_and_not_left_out(pair: Pair, engines: list[FakeEngine]) -> None:
    check_prompts(PROMPTS)
    with pytest.raises(PromptError, match=r"b\.wav: has a sound, and vLLM is asked about texts"):
        check_prompts([*PROMPTS, Prompt("What is heard?", id="b.wav", audio=(b"",))])


def test_the_noise_is_measured_in_other_batches(pair: Pair, engines: list[FakeEngine]) -> None:
    found = find_alpha(make_plan(*pair), PROMPTS, **VLLM | {"noise": True, "measure": "pairwise"})
    assert engines[0].batches == [5, 5, 5, 2, 2, 1]
    assert found.facts["Recipe"]["batch"] == "100"


def test_a_measure_that_takes_entropies_is_refused_before_the_engine_starts(
    pair: Pair, engines: list[FakeEngine]
) -> None:
    with pytest.raises(RecipeError, match=r"vLLM does not tell the entropy"):
        find_alpha(make_plan(*pair), PROMPTS, **VLLM, measure="entropy")
    assert not engines


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"device": "cpu", "ram": "8GB"}, "device, ram"), ({"live_quantize": "nf4"}, "live_quantize")],
)
def test_settings_of_the_other_engine_are_refused(
    pair: Pair, engines: list[FakeEngine], fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(RecipeError, match=f"its own way; leave out {named}"):
        find_alpha(make_plan(*pair), PROMPTS, **VLLM, **fields)


def test_options_are_handed_on(pair: Pair, engines: list[FakeEngine]) -> None:
    plan = make_plan(*pair)
    words = ("max_model_len=512", "enforce_eager=True", "kv_cache_dtype=fp8", "ray=x=y")
    with VllmModel(plan, EngineSettings(engine="vllm", vllm_option=words, ray=True)):
        pass
    options = engines[0].options
    assert options["max_model_len"] == 512
    assert options["enforce_eager"] is True
    assert options["kv_cache_dtype"] == "fp8"
    assert options["ray"] == "x=y"
    assert options["distributed_executor_backend"] == "ray"
    with pytest.raises(RecipeError, match=r"vLLM refuses its options: .*no_such_option"):
        VllmModel(plan, EngineSettings(engine="vllm", vllm_option=("no_such_option=1",)))
    with pytest.raises(RecipeError, match="expected NAME=VALUE"):
        _parse_option("max_model_len")
