"""Plans of every family of the declarations at true size, against some written by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from described import NO_TAKER, Described, described, leftover, step_of, whole
from families import (
    CROSS_LAYERS,
    FAMILIES,
    INTERNLM2_7B,
    Family,
    llama_decoder,
    tensor_bytes,
    write_headers,
)

from lowmem_adamms.architectures.arch import UNKNOWN
from lowmem_adamms.checkpoints.checkpoint import Checkpoint, open_checkpoint
from lowmem_adamms.checkpoints.span import Span
from lowmem_adamms.mapping.join import make_plan
from lowmem_adamms.mapping.plan import Plan

SPLIT = Family(  # InternLM2 respelled as a Llama, as several conversions are published
    "internlm2", {"architectures": ["LlamaForCausalLM"]}, llama_decoder(INTERNLM2_7B)
)
TOWER, CONNECTOR, BUFFER = "vision tower", "connector", "rotary buffer"

# Equal shapes, though not one ancestor each: the kinship check tells these apart by their values
GROUPS = [
    names.split()
    for names in (
        "qwen2-7b qwen2-vl-7b llava-onevision-qwen2-7b-ov-hf llava-onevision-qwen2-7b-ov-lmms"
        " molmo-7b-d qwen2.5-vl-7b qwen2.5-omni-7b",
        "qwen2.5-3b qwen2.5-vl-3b internvl2_5-4b",
        "qwen-7b qwen-vl",
        "llama-2-7b llava-1.5-7b-hf llava-1.5-7b-orig sharegpt4v-7b cogvlm-chat-7b"
        " mplug-owl2-llama2-7b",
        "llama-3-8b cogvlm2-llama3-chat-19b mllama-11b internlm2_5-7b-chat internvl2_5-8b"
        " mistral-7b llava-v1.6-mistral-7b-hf",
        "phi-3.5-mini phi-3.5-vision",
        "gemma-3-4b-text gemma-3-4b",
    )
]


@pytest.fixture(scope="module")
def sized(
    tmp_path_factory: pytest.TempPathFactory, true_size: dict[str, Checkpoint]
) -> dict[str, Checkpoint]:
    """Every family, and SPLIT, opened from true-size headers without data."""
    folder = tmp_path_factory.mktemp("split")
    write_headers(folder, SPLIT)
    true_size["internlm2-split"] = open_checkpoint(folder)
    return true_size


# Plans by hand: how many tensors are blended and copied, and what of the donor is not used

COUNTS: dict[tuple[str, str], tuple[int, int, dict[str, int]]] = {
    # 28 layers of 12, embed, norm and head; the tower and its merger are the base's
    ("qwen2-vl-7b", "llava-onevision-qwen2-7b-ov-hf"): (
        339,
        391,
        {TOWER: 421, CONNECTOR: 4, "image newline": 1},
    ),
    # Both tied: no head on either side, and none is made up
    ("qwen2.5-vl-3b", "qwen2.5-3b"): (434, 390, {}),
    ("qwen3-8b", "qwen3-8b"): (399, 0, {}),
    ("cogvlm-chat-7b", "llava-1.5-7b-orig"): (387, 3, {CONNECTOR: 4, BUFFER: 32}),
    # The vision expert's dense and MLP, 4 a layer; its q too, but k and v of it are used
    ("mplug-owl2-llama2-7b", "cogvlm-chat-7b"): (
        419,
        34,
        {NO_TAKER: 128, TOWER: 2, CONNECTOR: 1},
    ),
    ("sharegpt4v-7b", "llama-2-7b"): (291, 4, {}),
    ("llava-v1.6-mistral-7b-hf", "mistral-7b"): (291, 396, {}),
    ("internvl2_5-8b", "internlm2_5-7b-chat"): (227, 3, {}),
    ("internvl2_5-8b", "internlm2-split"): (227, 3, {}),
    ("internlm2-split", "internvl2_5-8b"): (291, 0, {TOWER: 1, CONNECTOR: 2}),
    ("phi-3.5-vision", "phi-3.5-mini"): (195, 2, {}),
    ("molmo-7b-d", "qwen2-vl-7b"): (199, 5, {TOWER: 385, CONNECTOR: 6}),
    ("qwen2-vl-7b", "molmo-7b-d"): (
        339,
        391,
        {TOWER: 1, CONNECTOR: 3, "rows of added tokens": 1},
    ),
    ("qwen-vl", "qwen-7b"): (259, 4, {}),
    ("cogvlm2-llama3-chat-19b", "llama-3-8b"): (387, 35, {}),
    # 6 weights a layer are the vision expert's alone
    ("llama-3-8b", "cogvlm2-llama3-chat-19b"): (
        291,
        0,
        {NO_TAKER: 192, TOWER: 2, CONNECTOR: 1},
    ),
    ("mllama-11b", "llama-3-8b"): (291, 107, {}),
    ("llama-3-8b", "mllama-11b"): (
        291,
        0,
        {TOWER: 2, CONNECTOR: 1, "cross-attention layer": 104},
    ),
    ("qwen2.5-vl-7b", "qwen2.5-omni-7b"): (
        339,
        390,
        {TOWER: 1, CONNECTOR: 1, "audio tower": 1, "talker": 2, "another decoder": 290},
    ),
    # InternVL stores its head although Qwen2.5-3B ties it
    ("qwen2.5-vl-3b", "internvl2_5-4b"): (434, 390, {TOWER: 1, CONNECTOR: 2, NO_TAKER: 1}),
    ("internvl2_5-4b", "qwen2.5-vl-3b"): (435, 3, {TOWER: 385, CONNECTOR: 5}),
    ("gemma-3-4b", "gemma-3-4b-text"): (444, 2, {}),
}


@pytest.mark.parametrize("pair", COUNTS, ids=" < ".join)
def test_what_is_blended_copied_and_left_over(
    sized: dict[str, Checkpoint], pair: tuple[str, str]
) -> None:
    plan = make_plan(*(sized[name] for name in pair))
    assert (*plan.counts.values(), leftover(plan)) == COUNTS[pair]
    check_plan(plan)


LM, ATTN = "language_model.", "model.layers.2.self_attn."
EXPERT = "layers.2.attn.{}.weight@vision"
# Rows of wqkv for one key-value head: 4 queries, its key, its value, each 128
IN_GROUP = (("q", 0, 512), ("k", 512, 640), ("v", 640, 768))

# (base, donor): tensors of the base and their parts; the bytes that other pairs give are in
# test_loop.py and test_spellings.py
PARTS: dict[tuple[str, str], dict[str, list[Described]]] = {
    ("qwen2-vl-7b", "llava-onevision-qwen2-7b-ov-hf"): {
        f"{ATTN}q_proj.bias": whole("layers.2.attn.q.bias", 3584, f"{LM}{ATTN}q_proj.bias"),
        # Id 151646 is <image> in one and <|object_ref_start|> in the other
        "lm_head.weight": [
            ((0, 151646), "head", f"{LM}lm_head.weight", (0, 151646)),
            ((151646, 152064), "head", None, None),
        ],
        "visual.merger.mlp.0.weight": [((0, 5120), None, None, None)],
    },
    # The authors' script: cat(q, k.0, v.0) and cat(q, k.1, v.1); norms from multiway 0
    ("cogvlm-chat-7b", "mplug-owl2-llama2-7b"): {
        f"{ATTN}vision_expert_query_key_value.weight": [
            ((0, 4096), EXPERT.format("q"), f"{ATTN}q_proj.weight", (0, 4096)),
            ((4096, 8192), EXPERT.format("k"), f"{ATTN}k_proj.multiway.1.weight", (0, 4096)),
            ((8192, 12288), EXPERT.format("v"), f"{ATTN}v_proj.multiway.1.weight", (0, 4096)),
        ],
        "model.layers.2.input_layernorm.weight": whole(
            "layers.2.attn_norm.weight", 4096, "model.layers.2.input_layernorm.multiway.0.weight"
        ),
    },
    ("internvl2_5-8b", "internlm2-split"): {
        f"{LM}model.layers.2.attention.wqkv.weight": [
            (
                (768 * head + start, 768 * head + stop),
                f"layers.2.attn.{part}.weight",
                f"{ATTN}{part}_proj.weight",
                ((stop - start) * head, (stop - start) * (head + 1)),
            )
            for head in range(8)
            for part, start, stop in IN_GROUP
        ]
    },
}


@pytest.mark.parametrize("pair", PARTS, ids=" < ".join)
def test_parts_written_by_hand(sized: dict[str, Checkpoint], pair: tuple[str, str]) -> None:
    plan = make_plan(*(sized[name] for name in pair))
    for name, expected in PARTS[pair].items():
        assert described(plan, name) == expected


def test_bytes_of_a_plan_are_those_of_published_indexes(sized: dict[str, Checkpoint]) -> None:
    plan = make_plan(sized["qwen2-vl-7b"], sized["llava-onevision-qwen2-7b-ov-hf"])
    assert plan.bytes_written == 16_582_751_232
    # and of Qwen2-7B, less the rows that are not read: 418 of embed and of head
    assert plan.bytes_read == 16_582_751_232 + 15_231_233_024 - 2 * 418 * 3584 * 2
    assert any("151646" in note and "assumed" in note for note in plan.notes)


def test_reasons_are_told(sized: dict[str, Checkpoint]) -> None:
    plan = make_plan(sized["cogvlm2-llama3-chat-19b"], sized["llama-3-8b"])
    stem = "model.layers.5.self_attn.vision_expert_query_key_value"
    assert step_of(plan, f"{stem}.bias").reason == "no counterpart in the donor"
    assert step_of(plan, f"{stem}.weight").reason == "vision copy takes the plain weight"
    plan = make_plan(sized["mllama-11b"], sized["llama-3-8b"])
    name = f"{LM}model.layers.{CROSS_LAYERS[0]}.mlp.up_proj.weight"
    assert step_of(plan, name).reason == "base's cross-attention layer"
    plan = make_plan(sized["llava-1.5-7b-orig"], sized["mplug-owl2-llama2-7b"])
    step = step_of(plan, "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert (step.action, step.kind, step.reason) == ("copy", BUFFER, "rotary buffer: never blended")


# Every ordered pair of one size


def shallow(name: str) -> Family:
    """A family cut down to its first three layers (and Mllama's first of its own)."""
    depth = 4 if name == "mllama-11b" else 3
    tensors = {
        tensor: spec
        for tensor, spec in FAMILIES[name].tensors.items()
        if all(int(number) < depth for number in re.findall(r"\.([0-9]+)\.", tensor))
    }
    return replace(FAMILIES[name], tensors=tensors, config=_without_depth(FAMILIES[name].config))


def _without_depth(config: Any) -> Any:
    """A config that does not say how many layers there are, at any level."""
    if not isinstance(config, dict):
        return config
    return {k: _without_depth(v) for k, v in config.items() if k != "num_hidden_layers"}


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group[0])
def test_every_pair_of_one_size_is_planned_and_nothing_is_unexplained(
    tmp_path: Path, group: list[str]
) -> None:
    for name in group:
        write_headers(tmp_path / name, shallow(name))
    for base in group:
        for donor in group:
            plan = make_plan(tmp_path / base, tmp_path / donor)
            assert plan.base_layout.layers == 3
            check_plan(plan)
            assert UNKNOWN not in plan.leftover.values()
            assert UNKNOWN not in {step.kind for step in plan.steps}
            unused = {name for name, why in plan.leftover.items() if why == NO_TAKER}
            assert all(excused(name, base, donor) for name in unused), unused


def excused(name: str, base: str, donor: str) -> bool:
    """What a base without vision experts, vision norms or a head of its own has no place for."""
    if "cogvlm" in donor:
        return "vision_expert" in name or "vision_mlp" in name
    if "mplug" in donor:
        return ".multiway.1." in name
    return "lm_head" in name and bool(FAMILIES[base].config["tie_word_embeddings"])


def check_plan(plan: Plan) -> None:
    """The parts fill each tensor of the base; rows of the donor are where they are said to be."""
    tied = plan.base.config.get("tie_word_embeddings") is True
    assert [step.name for step in plan.steps] == [
        name for name in plan.base.tensors if not (tied and name == "lm_head.weight")
    ]
    used: set[str | None] = set()
    read = written = 0
    for step in plan.steps:
        source = plan.base.tensors[step.name]
        assert (step.dtype, step.shape) == (source.dtype, source.shape)
        assert step.reason
        row = 0
        for part in step.parts:
            start, stop = part.rows
            assert start == row < stop
            assert part.base == source.rows(start, stop)
            row = stop
            read += part.base.nbytes
            if part.donor is None:
                assert (part.donor_name, part.donor_rows) == (None, None)
                continue
            assert part.donor_name and part.donor_rows
            first, last = part.donor_rows
            theirs = plan.donor.tensors[part.donor_name]
            assert isinstance(part.donor, Span)
            assert 0 <= first < last <= theirs.shape[0]
            assert part.donor.start == theirs.start + first * (theirs.nbytes // theirs.shape[0])
            assert part.donor.shape == part.base.shape == (stop - start, *step.shape[1:])
            assert part.donor.path == theirs.path
            assert "inv_freq" not in step.name + part.donor_name
            read += part.donor.nbytes if part.donor != part.base else 0  # a model and itself
            used.add(part.donor_name)
        assert row == step.shape[0]
        written += tensor_bytes(step.dtype.name, step.shape)
    assert (plan.bytes_read, plan.bytes_written) == (read, written)
    assert used | set(plan.leftover) == set(plan.donor.tensors)
    assert used.isdisjoint(plan.leftover)
    assert all(
        re.search("^no tokenizer|by its tensor names|is left out|in the donor's", note)
        for note in plan.notes
    )
