"""Plans of mixtures of experts at true size: what is blended with what, and what is left over."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from described import described
from families import write_headers
from mixtures import ERNIE, GLM, MIXTURES, QWEN3

from lowmem_adamms.checkpoints.arranged import Arranged
from lowmem_adamms.checkpoints.checkpoint import Checkpoint, open_checkpoint
from lowmem_adamms.mapping.join import make_plan
from lowmem_adamms.mapping.plan import Plan

TOWER, CONNECTOR = "vision tower", "connector"


@dataclass(frozen=True, slots=True)
class Expected:
    """What of the base is kept, and what of the donor is left over, each by kind."""

    kept: dict[str, int]
    left: dict[str, int]


VISION = {TOWER: 1, CONNECTOR: 1}
# Of the talker, which is a decoder as well, the codec's embedding is by itself
OMNI = {
    "audio tower": 1,
    CONNECTOR: 1,
    "talker": 2,
    "another decoder": 2 + 20 * (2 + 6 + 1 + 3 * 128),
}
MTP = {"multi-token prediction": 5 + 3 * 128}
PAIRS = {
    ("qwen3-vl-30b-a3b", "qwen3-30b-a3b"): Expected(VISION, {}),
    ("qwen3-omni-30b-a3b", "qwen3-vl-30b-a3b"): Expected(OMNI, VISION),
    ("qwen3-vl-30b-a3b", "qwen3-omni-30b-a3b"): Expected(VISION, OMNI),
    ("glm-4.5v", "glm-4.5-air"): Expected(VISION, MTP),
    ("kimi-vl-a3b", "moonlight-16b-a3b"): Expected(VISION, {}),
    ("llama-4-scout", "llama-4-scout-text"): Expected(VISION, {}),
    ("llama-4-maverick", "llama-4-maverick-text"): Expected(VISION, {}),
    ("ernie-4.5-vl-28b-a3b", "ernie-4.5-21b-a3b"): Expected(
        {**VISION, "experts": 27 * 64 * 3, "router": 27}, {}
    ),
    ("qwen3.5-35b-a3b", "qwen3.5-35b-a3b-text"): Expected(
        {**VISION, "multi-token prediction": 2}, {}
    ),
}


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("mixtures")
    for name, family in MIXTURES.items():
        write_headers(root / name, family)
    return {name: open_checkpoint(root / name) for name in MIXTURES}


def kept(plan: Plan) -> dict[str, int]:
    return dict(Counter(step.kind for step in plan.steps if step.action == "copy"))


@pytest.mark.parametrize("pair", PAIRS, ids=" < ".join)
def test_all_of_the_decoder_is_blended(pair: tuple[str, str], sized: dict[str, Checkpoint]) -> None:
    base, donor = (sized[name] for name in pair)
    plan = make_plan(base, donor)
    assert kept(plan) == PAIRS[pair].kept
    assert dict(Counter(plan.leftover.values())) == PAIRS[pair].left
    for step in plan.steps:
        assert sum(part.base.nbytes for part in step.parts) == step.nbytes
        assert all(
            part.donor is None or part.donor.elements == part.base.elements for part in step.parts
        )
    assert any("HARC" in note for note in plan.notes)
    assert len(json.dumps(plan.to_json())) < 300_000


def test_per_expert_tensors_enter_a_transposed_stack(sized: dict[str, Checkpoint]) -> None:
    plan = make_plan(sized["qwen3-vl-30b-a3b"], sized["qwen3-30b-a3b"])
    stem = "model.layers.5.mlp"
    name = "model.language_model.layers.5.mlp.experts.gate_up_proj"
    parts = next(step.parts for step in plan.steps if step.name == name)
    assert [part.role for part in parts] == [
        f"layers.5.mlp.experts.{k}" for k in range(QWEN3.experts)
    ]
    donor = parts[7].donor
    assert isinstance(donor, Arranged)
    assert (donor.rows, donor.width) == (2048, 2 * 768)
    assert donor.names == tuple(f"{stem}.experts.7.{part}_proj.weight" for part in ("gate", "up"))
    assert [columns.column for columns in donor.columns] == [0, 768]
    # And the other way round: each tensor takes a stretch of the stack, transposed
    back = make_plan(sized["qwen3-30b-a3b"], sized["qwen3-vl-30b-a3b"])
    (part,) = next(s.parts for s in back.steps if s.name == f"{stem}.experts.7.up_proj.weight")
    assert isinstance(part.donor, Arranged)
    (columns,) = part.donor.columns
    assert (columns.first, columns.row_stride, columns.stride) == (768, 1, 2 * 768)
    slab = 2048 * 2 * 768 * 2
    start = back.donor.tensors[name].start
    assert (columns.span.start, columns.span.stop) == (start + 7 * slab, start + 8 * slab)


def test_alike_forms_take_whole_tensors(sized: dict[str, Checkpoint]) -> None:
    for pair in (
        ("glm-4.5v", "glm-4.5-air"),
        ("llama-4-maverick", "llama-4-maverick-text"),
        ("qwen3.5-35b-a3b", "qwen3.5-35b-a3b-text"),
    ):
        plan = make_plan(*(sized[name] for name in pair))
        whole = [len(step.parts) for step in plan.steps if step.kind not in ("embedding", "head")]
        assert set(whole) == {1}, pair
    name = "language_model.model.layers.1.feed_forward.experts.down_proj"
    plan = make_plan(sized["llama-4-scout"], sized["llama-4-scout-text"])
    rows = (0, 16 * 8192)
    donor = name.removeprefix("language_model.")
    assert described(plan, name) == [(rows, "layers.1.mlp.experts", donor, rows)]


def test_dense_layers_lie_among_sparse_ones(sized: dict[str, Checkpoint]) -> None:
    plan = make_plan(sized["llama-4-maverick"], sized["llama-4-maverick-text"])
    roles = {part.role for _, part in plan.parts}
    for layer in range(48):
        is_dense = layer % 2 == 0
        assert (f"layers.{layer}.mlp.gate.weight" in roles) == is_dense
        assert (f"layers.{layer}.mlp.router.weight" in roles) != is_dense
        assert (f"layers.{layer}.mlp.shared_expert.up.weight" in roles) != is_dense
    plan = make_plan(sized["glm-4.5v"], sized["glm-4.5-air"])
    roles = {part.role for _, part in plan.parts}
    assert {"layers.0.mlp.gate.weight", "layers.1.mlp.router.correction_bias"} <= roles
    assert plan.base_layout.layers == plan.donor_layout.layers == GLM.layers


def test_vision_experts_stay_the_bases(sized: dict[str, Checkpoint]) -> None:
    """ERNIE-4.5-VL's text experts come first; its routers are transposed."""
    plan = make_plan(sized["ernie-4.5-vl-28b-a3b"], sized["ernie-4.5-21b-a3b"])
    stem = "model.layers.3.mlp"
    steps = {step.name: step for step in plan.steps}
    for expert, action in ((0, "interpolate"), (63, "interpolate"), (64, "copy"), (127, "copy")):
        assert steps[f"{stem}.experts.{expert}.up_proj.weight"].action == action
    assert described(plan, f"{stem}.experts.63.up_proj.weight") == [
        (
            (0, 1536),
            "layers.3.mlp.experts.63.up.weight@text",
            f"{stem}.experts.63.up_proj.weight",
            (0, 1536),
        )
    ]
    (router,) = steps[f"{stem}.gate.weight"].parts
    assert isinstance(router.donor, Arranged)
    assert (router.donor.rows, router.donor.width) == (2560, 64)
    assert steps[f"{stem}.gate.weight_1"].action == "copy"
    text, vision = steps[f"{stem}.moe_statics.e_score_correction_bias"].parts
    assert (text.rows, text.donor is None, vision.rows, vision.donor) == (
        (0, 1),
        False,
        (1, 2),
        None,
    )
    # Between two of them the vision experts are blended too
    both = make_plan(sized["ernie-4.5-vl-28b-a3b"], sized["ernie-4.5-vl-28b-a3b"])
    assert kept(both) == VISION
    assert ERNIE.experts == 64


def test_experts_are_read_without_a_known_class(tmp_path: Path) -> None:
    """By their names: any declared family, or none."""
    folders = []
    for name in ("kimi-vl-a3b", "moonlight-16b-a3b"):
        family = MIXTURES[name]
        write_headers(
            tmp_path / name, replace(family, config=family.config | {"architectures": ["Foo"]})
        )
        folders.append(tmp_path / name)
    plan = make_plan(*folders)
    assert kept(plan) == VISION
    assert not plan.leftover
