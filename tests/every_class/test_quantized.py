"""Mixtures of experts through bitsandbytes: what is a Linear is quantized, experts stay whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import language_names, multimodal_case
from tiny_models import build, make_relative, save

from lowmem_adamms import LiveModel, make_plan, merge
from lowmem_adamms.errors import RecipeError
from lowmem_adamms.live.transformers_model import load_model, quiet
from lowmem_adamms.mapping.plan import Plan

pytest.importorskip("bitsandbytes")


def make_pair(model_type: str, folder: Path) -> Plan:
    case = multimodal_case(model_type)
    with quiet():
        base = build(case.model_class, case.config, seed=0).bfloat16()
        language = language_names(base, model_type)
        save(base, folder / "base")
        save(make_relative(base, language, seed=1), folder / "donor")
    return make_plan(folder / "base", folder / "donor")


def load(folder: Path, quantize: str | None) -> dict[str, Any]:
    model = load_model(
        folder, device="cpu", dtype="bfloat16", quantize=quantize, trust_remote_code=False
    )
    return dict(model.state_dict())


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_experts_stay_whole_beside_what_is_quantized(tmp_path: Path) -> None:
    plan = make_pair("qwen3_omni_moe_thinker", tmp_path)
    merge(plan, 0.3, tmp_path / "merged")
    expected = load(tmp_path / "merged", "int8")
    assert expected["model.language_model.layers.0.mlp.experts.down_proj"].dtype == torch.bfloat16
    assert expected["model.language_model.layers.0.self_attn.q_proj.weight"].dtype == torch.int8
    with LiveModel(plan, device="cpu", quantize="int8") as live:
        live.apply(0.3)
        assert_equal(dict(live.model.state_dict()), expected)
    merge(plan, 0.3, tmp_path / "quantized", quantize="int8")
    assert_equal(load(tmp_path / "quantized", None), expected)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_what_is_split_before_it_is_quantized_is_refused_in_one_line(
    quantize: Any, tmp_path: Path
) -> None:
    plan = make_pair("molmo2", tmp_path)
    message = r"converts .*ff_proj.weight before bitsandbytes quantizes it as .*; do without quant"
    with pytest.raises(RecipeError, match=message):
        LiveModel(plan, device="cpu", quantize=quantize)
    with pytest.raises(RecipeError, match=message):
        merge(plan, 0.3, tmp_path / "out", quantize=quantize)
    assert not (tmp_path / "out").exists()
