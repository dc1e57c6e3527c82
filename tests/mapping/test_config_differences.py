"""What two configs make of the same weights; with values as in published config.json files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import DecoderDims, Family, llama_decoder, write_headers

from lowmem_adamms import make_plan
from lowmem_adamms.checkpoints.checkpoint import Checkpoint
from lowmem_adamms.mapping.config_differences import describe_differences

QWEN25_VL = {
    "num_attention_heads": 28,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "sliding_window": 32768,
    "use_sliding_window": False,
}
QWEN25_VL_NEWER = {
    "text_config": {
        "num_attention_heads": 28,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_window": None,
    }
}
R1_DISTILL_QWEN = QWEN25_VL | {"rope_theta": 10000, "rope_scaling": None, "sliding_window": 4096}
INTERNVL3 = {
    "llm_config": {
        "rope_theta": 1000000.0,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "rms_norm_eps": 1e-06,
    }
}
GEMMA_3 = {
    "rope_parameters": {
        "sliding_attention": {"rope_theta": 10000.0},
        "full_attention": {"rope_theta": 1000000.0, "rope_type": "linear", "factor": 8.0},
    }
}
LLAMA_3 = {"rope_theta": 500000.0, "rope_scaling": None, "rms_norm_eps": 1e-05}
LLAMA_31 = LLAMA_3 | {"rope_scaling": {"factor": 8.0, "rope_type": "llama3"}}
PHI3 = {"rope_theta": 10000.0, "rope_scaling": {"type": "longrope"}, "sliding_window": 262144}
PHI3_VISION = PHI3 | {"rope_scaling": {"type": "su"}, "sliding_window": 131072}
MISTRAL_1 = {"rope_theta": 10000.0, "sliding_window": 4096}
LLAVA_NEXT_MISTRAL = {"text_config": {"rope_theta": 1000000.0, "sliding_window": None}}


def checkpoint(config: dict[str, Any]) -> Checkpoint:
    return Checkpoint(Path("x"), (), {}, config)


@pytest.mark.parametrize(
    ("base", "donor", "told"),
    [
        (QWEN25_VL, R1_DISTILL_QWEN, ["rope_theta is 1000000 in", "10000 in the donor's"]),
        (LLAMA_31, LLAMA_3, ["rope_scaling is llama3 by 8 in", "none in the donor's"]),
        (PHI3, PHI3_VISION, ["sliding_window is 262144 in"]),
        (GEMMA_3, {"rope_theta": 1e6}, ["rope_scaling is linear by 8 in", "none in the donor's"]),
        (LLAVA_NEXT_MISTRAL, MISTRAL_1, ["rope_theta is 1000000", "sliding_window is none in"]),
        ({"rms_norm_eps": 1e-5}, {"layer_norm_eps": 1e-6}, ["rms_norm_eps is 1e-05 in"]),
        ({"num_attention_heads": 28}, {"num_attention_heads": 56}, ["num_attention_heads is 28"]),
        ({"scale_emb": 12}, {"embedding_multiplier": 1.0}, ["embedding_multiplier is 12 in"]),
    ],
)
def test_what_differs_is_told(base: Any, donor: Any, told: list[str]) -> None:
    (note,) = describe_differences(checkpoint(base), checkpoint(donor))
    assert all(words in note for words in told)
    assert note.count(" is ") == len([words for words in told if " is " in words])


@pytest.mark.parametrize(
    ("base", "donor"),
    [
        (QWEN25_VL, QWEN25_VL_NEWER),
        (QWEN25_VL, INTERNVL3),
        (QWEN25_VL, {}),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, {"num_attention_heads": 28}),
        ({}, {"text_config": None, "rope_scaling": 3, "rope_theta": True}),
        ({"rope_theta": 10**400}, {"rope_theta": 1.0}),
        ({"rotary_emb_base": 10000}, {"rope_theta": 10000.0}),
    ],
)
def test_what_is_alike_or_unsaid_is_not_told(base: Any, donor: Any) -> None:
    assert list(describe_differences(checkpoint(base), checkpoint(donor))) == []
    assert list(describe_differences(checkpoint(donor), checkpoint(base))) == []


def test_the_plan_tells_it(tmp_path: Path) -> None:
    tensors = llama_decoder(DecoderDims(16, 24, 1, 2, 2, 8, head_dim=8))
    for name, theta in (("base", 1e6), ("donor", 1e4)):
        config = {"architectures": ["LlamaForCausalLM"], "rope_theta": theta}
        write_headers(tmp_path / name, Family(name, config, tensors))
    plan = make_plan(tmp_path / "base", tmp_path / "donor")
    assert [note for note in plan.notes if "rope_theta is 1000000" in note]
