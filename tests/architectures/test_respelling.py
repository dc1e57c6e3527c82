"""Names that files and modules spell differently: both spellings hold the same roles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from families import DecoderDims, Family, Tensors, llama_decoder, write_headers

from lowmem_adamms.architectures.respelling import respell
from lowmem_adamms.errors import MappingError
from lowmem_adamms.mapping.join import make_plan

SMALL = DecoderDims(hidden=8, intermediate=12, layers=2, heads=2, kv_heads=1, vocab=20, head_dim=4)

PAIRS = [
    ("block_sparse_moe.experts.*.w1.weight", "mlp.experts.*.gate_proj.weight"),
    ("block_sparse_moe.experts.*.w2.weight", "mlp.experts.*.down_proj.weight"),
    ("experts.*.w3.weight", "mlp.experts.*.up_proj.weight"),
    ("gate.weight", "mlp.gate.weight"),
    ("mlp.experts.fc1.weight", "mlp.experts.gate_up_proj"),
    ("block_sparse_moe.output_linear.weight", "mlp.experts.down_proj"),
    ("mlp.moe_statics.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),
    ("moe.router.expert_bias", "mlp.gate.e_score_correction_bias"),
    ("attention.wo.weight", "self_attn.o_proj.weight"),
    ("self_attn.to_q.weight", "self_attn.q_proj.weight"),
    ("self_attn.norm_k.weight", "self_attn.k_norm.weight"),
    ("attn.wq_du.weight", "self_attn.q_proj.weight"),
    ("self_attn.A_log", "self_attn.forget_gate.A_log"),
    ("attn.attn_sink", "self_attn.sinks"),
    ("hc_ffn_fn", "ffn_hc.fn"),
    ("hc_pre.hc_mlp_layer.hc_base", "ffn_hc.base"),
    ("attention_norm.weight", "input_layernorm.weight"),
    ("hc_head_scale", "hc_head.hc_scale"),
]


@pytest.mark.parametrize(("in_files", "in_modules"), PAIRS)
def test_a_name_in_files_becomes_that_of_the_module(in_files: str, in_modules: str) -> None:
    assert respell(in_files) == respell(in_modules)
    if not in_modules.startswith("self_attn.forget_gate"):
        assert respell(in_modules) == in_modules


@pytest.mark.parametrize(
    "name",
    [
        "self_attn.q_proj.weight",
        "linear_attn.A_log",
        "mlp.gate_up_proj.weight",
        "mlp.shared_expert_gate.weight",
        "post_feedforward_layernorm.weight",
        "mixer.in_proj.weight",
        "embed_positions.weight",
    ],
)
def test_what_both_spell_alike_stays(name: str) -> None:
    assert respell(name) == name


def spelled(folder: Path, extra: Mapping[str, tuple[int, ...]], **renamed: str) -> Path:
    tensors: Tensors = {}
    for name, spec in llama_decoder(SMALL).items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        tensors[name] = spec
    for layer in range(2):
        for name, shape in extra.items():
            tensors[f"model.layers.{layer}.{name}"] = ("BF16", shape)
    write_headers(folder, Family("x", {"architectures": ["FooForCausalLM"]}, tensors))
    return folder


def test_two_spellings_are_joined_matrix_by_matrix(tmp_path: Path) -> None:
    base = spelled(tmp_path / "base", {"hc_attn_fn": (3, 8)}, q_proj="to_q", o_proj="to_out")
    donor = spelled(tmp_path / "donor", {"attn_hc.fn": (3, 8)})
    plan = make_plan(base, donor)
    assert not plan.leftover
    assert plan.counts["copy"] == 0
    pairs = {part.donor_name for step, part in plan.parts if step.name.endswith(".0.hc_attn_fn")}
    assert pairs == {"model.layers.0.attn_hc.fn"}
    roles = {part.role for step, part in plan.parts if "to_" in step.name}
    assert roles == {f"layers.{i}.attn.{part}.weight" for i in (0, 1) for part in "qo"}


def test_convolutions_that_one_side_fuses_are_split(tmp_path: Path) -> None:
    apart = {f"self_attn.{part}_conv1d.weight": (4, 1, 2) for part in "qkv"}
    base = spelled(tmp_path / "base", {"self_attn.conv1d.weight": (12, 1, 2)})
    donor = spelled(tmp_path / "donor", apart)
    for plan, blended in ((make_plan(base, donor), 1), (make_plan(donor, base), 3)):
        found = [
            part for step, part in plan.parts if ".0.self_attn" in step.name and "conv" in step.name
        ]
        assert len(found) == 3
        assert all(part.donor for part in found)
        assert plan.counts["copy"] == 0
        assert sum(".0." in step.name and "conv" in step.name for step in plan.steps) == blended


def test_a_role_under_two_spellings_at_once_is_an_error(tmp_path: Path) -> None:
    base = spelled(tmp_path / "base", {"hc_attn_fn": (3, 8), "attn_hc.fn": (3, 8)})
    with pytest.raises(MappingError, match=r"both .*hc_attn_fn and .*attn_hc\.fn hold"):
        make_plan(base, base)
