"""Classes with experts and other unusual layers, streamed: their logits are the held model's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Case, language_names, multimodal_case
from tiny_models import build, make_relative, save, timm_stub

from lowmem_adamms import LiveModel, make_plan
from lowmem_adamms.live.free_memory import Memory
from lowmem_adamms.live.placing import place
from lowmem_adamms.live.transformers_model import find_answering_part, quiet
from lowmem_adamms.mapping.plan import Plan
from lowmem_adamms.settings import PlacementSettings


@pytest.fixture(scope="module", autouse=True)
def timm() -> Iterator[None]:
    with timm_stub():
        yield


def make_pair(case: Case, folder: Path) -> Plan:
    with quiet():
        base = build(case.model_class, case.config, seed=0)
        donor = make_relative(base, language_names(base, case.name), seed=1)
        return make_plan(save(base, folder / "base"), save(donor, folder / "donor"))


def logits_of(plan: Plan, live: Any, **ways: Any) -> list[torch.Tensor]:
    """At two alphas, of two sequences of text."""
    settings = PlacementSettings(device="cpu", live=live, live_quantize="none")
    placement = replace(place(plan, Memory(64 << 30, None, None), settings), **ways)
    ids = torch.tensor([[3, 9, 7, 7, 5], [6, 4, 4, 9, 3]])
    found = []
    with LiveModel(plan, placement=placement) as model:
        assert model.placement.live == live, model.notes
        for alpha in (0.6, 0.3):
            model.apply(alpha)
            with quiet(), torch.inference_mode():
                part = find_answering_part(model.model)
                out = part(input_ids=ids, attention_mask=torch.ones_like(ids))
            found.append(out.logits)
    return found


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "glm5_next", "gemma3n"])
def test_streamed_logits_are_those_of_the_held_model(model_type: str, tmp_path: Path) -> None:
    """Mixtures of experts, dense layers before sparse ones, and layers that share a cache."""
    plan = make_pair(multimodal_case(model_type), tmp_path)
    held, streamed = logits_of(plan, "held"), logits_of(plan, "streamed")
    in_windows = logits_of(plan, "streamed", head_in_windows=True)
    assert all(map(torch.equal, held, streamed))
    assert all(map(torch.equal, held, in_windows))
    assert not torch.equal(*held)
