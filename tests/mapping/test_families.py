"""Every family of the declarations at true size: what is recognised, and plans written by hand."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from families import FAMILIES, Family, Tensors, llama_decoder, write_headers
from more_families import CROSS_LAYERS, INTERNLM2_7B, MORE, PHI3_MINI
from test_plan import NO_TAKER, actions, check_plan, described, leftover, step_of, whole

from lowmem_adamms.architectures.families import ARCHS
from lowmem_adamms.architectures.layout import UNKNOWN, Layout
from lowmem_adamms.architectures.recognise import recognise
from lowmem_adamms.checkpoints.checkpoint import Checkpoint, open_checkpoint
from lowmem_adamms.errors import MappingError
from lowmem_adamms.mapping.join import make_plan

ALL = FAMILIES | MORE
TOWER, CONNECTOR = "vision tower", "connector"

# name: architecture, layers, tensors of the decoder, and how many of each other kind
EXPECTED: dict[str, tuple[str, int, int, dict[str, int]]] = {
    "llama-3-8b": ("Llama", 32, 291, {}),
    "smollm2-1.7b": ("Llama", 24, 218, {}),
    # as CogVLM, and the vision expert's bias
    "cogvlm2-llama3-chat-19b": ("CogVLM2", 32, 419, {TOWER: 764, CONNECTOR: 6}),
    "llama3-llava-next-8b-hf": (
        "LLaVA-NeXT",
        32,
        291,
        {TOWER: 391, CONNECTOR: 4, "image newline": 1},
    ),
    "minicpm-llama3-v-2_5": ("MiniCPM-V", 32, 291, {TOWER: 437, CONNECTOR: 13}),
    "idefics3-8b": ("Idefics3", 32, 291, {TOWER: 437, CONNECTOR: 1}),
    "smolvlm-instruct": ("SmolVLM", 24, 219, {TOWER: 437, CONNECTOR: 1}),
    # 8 layers of 13: 2 norms, 3 of the MLP, 6 of the attention, 2 gates
    "mllama-11b": (
        "Mllama",
        32,
        291,
        {TOWER: 509, CONNECTOR: 2, "cross-attention layer": 104},
    ),
    "internvl2_5-1b": ("InternVL", 24, 291, {TOWER: 340, CONNECTOR: 6}),
    "internvl2_5-4b": ("InternVL", 36, 435, {TOWER: 340, CONNECTOR: 6}),
    "internvl3-2b": ("InternVL", 28, 339, {TOWER: 340, CONNECTOR: 6}),
    "internvl3-8b": ("InternVL", 28, 339, {TOWER: 340, CONNECTOR: 6}),
    "internvl3-8b-hf": ("InternVL (-hf)", 28, 339, {TOWER: 436, CONNECTOR: 6}),
    "internvl3_5-8b": ("InternVL", 36, 399, {TOWER: 340, CONNECTOR: 6}),
    "internvl3_5-8b-hf": ("InternVL (-hf)", 36, 399, {TOWER: 436, CONNECTOR: 6}),
    "minicpm-v-2_6": ("MiniCPM-V", 28, 339, {TOWER: 437, CONNECTOR: 13}),
    "qwen3-vl-2b": ("Qwen3-VL", 28, 310, {TOWER: 291, CONNECTOR: 24}),
    "qwen3-vl-4b": ("Qwen3-VL", 36, 398, {TOWER: 291, CONNECTOR: 24}),
    "qwen3-vl-8b": ("Qwen3-VL", 36, 399, {TOWER: 327, CONNECTOR: 24}),
    "qwen2.5-omni-7b": (
        "Qwen2.5-Omni",
        28,
        339,
        {TOWER: 385, CONNECTOR: 5, "audio tower": 1, "talker": 291, "vocoder": 1},
    ),
    "qwen2.5-omni-thinker": (
        "Qwen2.5-Omni's thinker",
        28,
        339,
        {TOWER: 385, CONNECTOR: 5, "audio tower": 1},
    ),
    "llava-onevision-1.5-8b": ("LLaVA-OneVision-1.5", 36, 399, {TOWER: 1, CONNECTOR: 1}),
    "videollama3-7b": ("VideoLLaMA3", 28, 339, {TOWER: 1, CONNECTOR: 1}),
    "videollama3-7b-hf": ("VideoLLaMA3 (-hf)", 28, 339, {TOWER: 1, CONNECTOR: 1}),
    "ovis2-8b": ("Ovis2", 28, 339, {TOWER: 2, CONNECTOR: 1}),
    "ovis2-8b-hf": ("Ovis2 (-hf)", 28, 339, {TOWER: 1, CONNECTOR: 1}),
    # 7 a layer
    "molmo-7b-d": ("Molmo", 28, 199, {TOWER: 373, CONNECTOR: 12, "rows of added tokens": 1}),
    "qwen-7b": ("Qwen and Qwen-VL", 32, 259, {}),
    "qwen-vl": ("Qwen and Qwen-VL", 32, 259, {TOWER: 2, CONNECTOR: 3}),
    "internlm2_5-7b-chat": ("InternLM2", 32, 227, {}),
    "internvl2_5-8b": ("InternVL (InternLM2)", 32, 227, {TOWER: 340, CONNECTOR: 6}),
    # 6 a layer
    "phi-3.5-mini": ("Phi-3", 32, 195, {}),
    "phi-3.5-vision": ("Phi-3-vision", 32, 195, {TOWER: 391, CONNECTOR: 6}),
    "internvl2-4b": ("InternVL (Phi-3)", 32, 195, {TOWER: 340, CONNECTOR: 6}),
    "gemma-2b": ("Gemma", 18, 164, {}),
    "paligemma-3b": ("PaliGemma", 18, 164, {TOWER: 437, CONNECTOR: 2}),
    "gemma-2-2b": ("Gemma 2", 26, 288, {}),
    "paligemma2-3b": ("PaliGemma 2", 26, 288, {TOWER: 437, CONNECTOR: 2}),
    "gemma-3-4b-text": ("Gemma 3 (text)", 34, 444, {}),
    "gemma-3-4b": ("Gemma 3", 34, 444, {TOWER: 437, CONNECTOR: 2}),
}

# Equal shapes, though not one ancestor each: the kinship check tells these apart by their values
GROUPS = [
    [
        "qwen2-7b",
        "qwen2-vl-7b",
        "llava-onevision-qwen2-7b-ov-lmms",
        "minicpm-v-2_6",
        "molmo-7b-d",
        "internvl3-8b",
        "internvl3-8b-hf",
        "qwen2.5-vl-7b",
        "qwen2.5-omni-7b",
        "qwen2.5-omni-thinker",
        "videollama3-7b",
        "videollama3-7b-hf",
        "ovis2-8b",
        "ovis2-8b-hf",
    ],
    ["qwen3-8b", "qwen3-vl-8b", "internvl3_5-8b", "internvl3_5-8b-hf", "llava-onevision-1.5-8b"],
    ["qwen2.5-3b", "qwen2.5-vl-3b", "internvl2_5-4b"],
    ["qwen2.5-1.5b", "qwen2-vl-2b", "internvl3-2b"],
    ["qwen2-0.5b", "internvl2_5-1b"],
    ["qwen3-4b", "qwen3-vl-4b"],
    ["qwen3-1.7b", "qwen3-vl-2b"],
    ["qwen-7b", "qwen-vl"],
    [
        "llama-3-8b",
        "llama-3.1-8b",
        "llama3-llava-next-8b-hf",
        "cogvlm2-llama3-chat-19b",
        "minicpm-llama3-v-2_5",
        "idefics3-8b",
        "mllama-11b",
        "internlm2_5-7b-chat",
        "internvl2_5-8b",
        "mistral-7b",
    ],
    ["smollm2-1.7b", "smolvlm-instruct"],
    ["phi-3.5-mini", "phi-3.5-vision", "internvl2-4b"],
    ["gemma-2b", "paligemma-3b"],
    ["gemma-2-2b", "paligemma2-3b"],
    ["gemma-3-4b-text", "gemma-3-4b"],
]
PAIRS = [(base, donor) for group in GROUPS for base in group for donor in group]


@pytest.fixture(scope="module")
def sized(
    tmp_path_factory: pytest.TempPathFactory, true_size: dict[str, Checkpoint]
) -> dict[str, Checkpoint]:
    """Every family, opened from a folder of true-size headers without data."""
    root = tmp_path_factory.mktemp("more")
    for name, family in MORE.items():
        write_headers(root / name, family)
    return true_size | {name: open_checkpoint(root / name) for name in MORE}


def layout_of(checkpoint: Checkpoint) -> Layout:
    return recognise(checkpoint, ARCHS)


def put(folder: Path, name: str, tensors: Tensors, **config: object) -> Checkpoint:
    write_headers(folder / name, Family(name, config, tensors))
    return open_checkpoint(folder / name)


# Recognition


def test_every_family_is_expected_and_paired() -> None:
    assert set(EXPECTED) == set(MORE)
    assert set(MORE) <= {name for pair in PAIRS for name in pair}


@pytest.mark.parametrize("name", EXPECTED)
def test_families_are_recognised(sized: dict[str, Checkpoint], name: str) -> None:
    layout = layout_of(sized[name])
    kinds = dict(Counter(layout.kinds.values()))
    assert (layout.arch, layout.layers, len(layout.blocks), kinds) == EXPECTED[name]
    assert layout.assumed is None
    assert set(layout.blocks) | set(layout.kinds) == set(ALL[name].tensors)


@pytest.mark.parametrize("name", EXPECTED)
def test_names_alone_explain_every_tensor(sized: dict[str, Checkpoint], name: str) -> None:
    layout = layout_of(replace(sized[name], config={}))
    assert UNKNOWN not in layout.kinds.values()
    assert (layout.layers, len(layout.blocks)) == EXPECTED[name][1:3]
    assert layout.assumed is not None
    assert layout.arch in layout.assumed


@pytest.mark.parametrize("name", ALL)
def test_blocks_fill_their_tensors_and_their_roles(sized: dict[str, Checkpoint], name: str) -> None:
    layout = layout_of(sized[name])
    for tensor, blocks in layout.blocks.items():
        edges = [0, *(block.stop for block in blocks)]
        assert [block.start for block in blocks] == edges[:-1]
        assert edges[-1] == ALL[name].tensors[tensor][1][0]
    for pieces in layout.pieces().values():
        edges = [0, *(block.last for _, block in pieces)]
        assert [block.first for _, block in pieces] == edges[:-1]


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "llava-onevision-1.5-8b", "gemma-3-4b"])
@pytest.mark.parametrize("spelling", ["hub", "modern"])
def test_both_spellings_of_a_vision_family(tmp_path: Path, name: str, spelling: str) -> None:
    """`model.language_model.*` and the towers under `model.` is what transformers 5 calls them."""
    family = ALL[name]

    def modern(name: str) -> str:
        for old in ("language_model.model.", "model.language_model.", "model."):
            if name.startswith(old):
                return name.replace(old, "model.language_model.", 1)
        return name if name.startswith("lm_head") else f"model.{name}"

    tensors = {modern(n) if spelling == "modern" else n: s for n, s in family.tensors.items()}
    layout = layout_of(put(tmp_path, "m", tensors, **family.config))
    assert layout.assumed is None
    assert UNKNOWN not in layout.kinds.values()
    assert layout.prefix == "model.language_model." or spelling == "hub"


def test_a_head_size_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    config = MORE["internlm2_5-7b-chat"].config | {"num_attention_heads": 24}
    checkpoint = put(tmp_path, "m", MORE["internlm2_5-7b-chat"].tensors, **config)
    with pytest.raises(MappingError, match=r"wqkv\.weight has 6144 rows.*heads of 170"):
        layout_of(checkpoint)


# Plans by hand: fused and interleaved tensors

GROUP = 768  # rows of wqkv for one key-value head: 4 queries, its key, its value, each 128


def test_internvl_from_internlm2(sized: dict[str, Checkpoint]) -> None:
    """Both interleaved: block for block."""
    plan = make_plan(sized["internvl2_5-8b"], sized["internlm2_5-7b-chat"])
    assert actions(plan) == {"interpolate": 227, "copy": 346}
    assert plan.leftover == {}
    name = "model.layers.31.attention.wqkv.weight"
    expected = []
    for head in range(8):
        for part, start, stop in (("q", 0, 512), ("k", 512, 640), ("v", 640, 768)):
            rows = (GROUP * head + start, GROUP * head + stop)
            expected.append((rows, f"layers.31.attn.{part}.weight", name, rows))
    assert described(plan, f"language_model.{name}") == expected
    assert step_of(plan, f"language_model.{name}").kind == "attention"
    gate = "model.layers.0.feed_forward.w1.weight"
    assert described(plan, f"language_model.{gate}") == whole(
        "layers.0.mlp.gate.weight", 14336, gate
    )
    up = "model.layers.0.feed_forward.w3.weight"
    assert described(plan, f"language_model.{up}") == whole("layers.0.mlp.up.weight", 14336, up)
    assert described(plan, "language_model.output.weight") == [
        ((0, 92544), "head", "output.weight", (0, 92544)),
        ((92544, 92553), "head", None, None),
    ]


def split_internlm2(folder: Path) -> Checkpoint:
    """InternLM2 respelled as a Llama, as several conversions of it are published."""
    tensors = llama_decoder(INTERNLM2_7B)
    return put(folder, "split", tensors, architectures=["LlamaForCausalLM"])


def test_interleaved_base_from_a_split_donor(sized: dict[str, Checkpoint], tmp_path: Path) -> None:
    plan = make_plan(sized["internvl2_5-8b"], split_internlm2(tmp_path))
    assert plan.leftover == {}
    stem = "model.layers.2.self_attn."
    assert described(plan, "language_model.model.layers.2.attention.wqkv.weight") == [
        (
            (GROUP * head + start, GROUP * head + stop),
            f"layers.2.attn.{part}.weight",
            f"{stem}{part}_proj.weight",
            ((stop - start) * head, (stop - start) * (head + 1)),
        )
        for head in range(8)
        for part, start, stop in (("q", 0, 512), ("k", 512, 640), ("v", 640, 768))
    ]
    document = plan.to_json()
    (step,) = (
        step for step in document["steps"] if step["name"].endswith("s.2.attention.wqkv.weight")
    )
    assert len(step["parts"]) == 24


def test_split_base_from_an_interleaved_donor(sized: dict[str, Checkpoint], tmp_path: Path) -> None:
    plan = make_plan(split_internlm2(tmp_path), sized["internvl2_5-8b"])
    assert leftover(plan) == {TOWER: 340, CONNECTOR: 6}
    name = "model.layers.2.self_attn.{}_proj.weight"
    donor = "language_model.model.layers.2.attention.wqkv.weight"
    for part, start, stop in (("q", 0, 512), ("k", 512, 640), ("v", 640, 768)):
        rows = stop - start
        assert described(plan, name.format(part)) == [
            (
                (rows * head, rows * (head + 1)),
                f"layers.2.attn.{part}.weight",
                donor,
                (GROUP * head + start, GROUP * head + stop),
            )
            for head in range(8)
        ]


def test_phi3_vision_from_phi3(sized: dict[str, Checkpoint]) -> None:
    plan = make_plan(sized["phi-3.5-vision"], sized["phi-3.5-mini"])
    assert actions(plan) == {"interpolate": 195, "copy": 397}
    assert plan.leftover == {}
    name = "model.layers.7.self_attn.qkv_proj.weight"
    assert described(plan, name) == [
        (
            (3072 * i, 3072 * (i + 1)),
            f"layers.7.attn.{part}.weight",
            name,
            (3072 * i, 3072 * i + 3072),
        )
        for i, part in enumerate("qkv")
    ]
    name = "model.layers.7.mlp.gate_up_proj.weight"
    assert described(plan, name) == [
        ((0, 8192), "layers.7.mlp.gate.weight", name, (0, 8192)),
        ((8192, 16384), "layers.7.mlp.up.weight", name, (8192, 16384)),
    ]


def test_phi3_from_and_into_a_split_spelling(sized: dict[str, Checkpoint], tmp_path: Path) -> None:
    split = put(tmp_path, "split", llama_decoder(PHI3_MINI), architectures=["LlamaForCausalLM"])
    into = make_plan(sized["phi-3.5-mini"], split)
    assert described(into, "model.layers.0.mlp.gate_up_proj.weight") == [
        ((0, 8192), "layers.0.mlp.gate.weight", "model.layers.0.mlp.gate_proj.weight", (0, 8192)),
        ((8192, 16384), "layers.0.mlp.up.weight", "model.layers.0.mlp.up_proj.weight", (0, 8192)),
    ]
    back = make_plan(split, sized["phi-3.5-mini"])
    for i, part in enumerate("qkv"):
        assert described(back, f"model.layers.0.self_attn.{part}_proj.weight") == [
            (
                (0, 3072),
                f"layers.0.attn.{part}.weight",
                "model.layers.0.self_attn.qkv_proj.weight",
                (3072 * i, 3072 * (i + 1)),
            )
        ]
    assert into.leftover == back.leftover == {}


def test_molmo_and_qwen2_vl(sized: dict[str, Checkpoint]) -> None:
    """[up; gate], the reverse of Phi-3; q, k, v with biases."""
    plan = make_plan(sized["molmo-7b-d"], sized["qwen2-vl-7b"])
    assert actions(plan) == {"interpolate": 199, "copy": 386}
    assert leftover(plan) == {TOWER: 385, CONNECTOR: 6}
    stem, layer = "model.transformer.blocks.27.", "model.layers.27."
    assert described(plan, f"{stem}ff_proj.weight") == [
        ((0, 18944), "layers.27.mlp.up.weight", f"{layer}mlp.up_proj.weight", (0, 18944)),
        ((18944, 37888), "layers.27.mlp.gate.weight", f"{layer}mlp.gate_proj.weight", (0, 18944)),
    ]
    for kind in ("weight", "bias"):
        assert described(plan, f"{stem}att_proj.{kind}") == [
            (rows, f"layers.27.attn.{part}.{kind}", f"{layer}self_attn.{part}_proj.{kind}", (0, n))
            for part, rows, n in (
                ("q", (0, 3584), 3584),
                ("k", (3584, 4096), 512),
                ("v", (4096, 4608), 512),
            )
        ]
    assert described(plan, f"{stem}ff_out.weight") == whole(
        "layers.27.mlp.down.weight", 3584, f"{layer}mlp.down_proj.weight"
    )
    assert described(plan, "model.transformer.ff_out.weight")[0] == (
        (0, 151646),
        "head",
        "lm_head.weight",
        (0, 151646),
    )
    assert step_of(plan, "model.transformer.wte.new_embedding").action == "copy"
    back = make_plan(sized["qwen2-vl-7b"], sized["molmo-7b-d"])
    assert described(back, "model.layers.0.mlp.gate_proj.weight") == [
        (
            (0, 18944),
            "layers.0.mlp.gate.weight",
            "model.transformer.blocks.0.ff_proj.weight",
            (18944, 37888),
        )
    ]
    assert leftover(back) == {TOWER: 373, CONNECTOR: 12, "rows of added tokens": 1}


def test_qwen_vl_from_qwen(sized: dict[str, Checkpoint]) -> None:
    plan = make_plan(sized["qwen-vl"], sized["qwen-7b"])
    assert actions(plan) == {"interpolate": 259, "copy": 5}
    assert plan.leftover == {}
    name = "transformer.h.9.attn.c_attn.bias"
    assert [part[1:] for part in described(plan, name)] == [
        (f"layers.9.attn.{part}.bias", name, (4096 * i, 4096 * (i + 1)))
        for i, part in enumerate("qkv")
    ]
    for ours, role in (("w1", "up"), ("w2", "gate"), ("c_proj", "down")):
        assert described(plan, f"transformer.h.9.mlp.{ours}.weight")[0][1] == (
            f"layers.9.mlp.{role}.weight"
        )


def test_cogvlm2_from_llama3(sized: dict[str, Checkpoint]) -> None:
    """Both experts take the plain weight; the bias, of the vision expert alone, has no like."""
    plan = make_plan(sized["cogvlm2-llama3-chat-19b"], sized["llama-3-8b"])
    assert plan.leftover == {}
    stem = "model.layers.5.self_attn."
    for expert, stream in (("language", "text"), ("vision", "vision")):
        assert described(plan, f"{stem}{expert}_expert_query_key_value.weight") == [
            (rows, f"layers.5.attn.{part}.weight@{stream}", f"{stem}{part}_proj.weight", (0, n))
            for part, rows, n in (
                ("q", (0, 4096), 4096),
                ("k", (4096, 5120), 1024),
                ("v", (5120, 6144), 1024),
            )
        ]
    bias = step_of(plan, f"{stem}vision_expert_query_key_value.bias")
    assert (bias.action, bias.reason) == ("copy", "no counterpart in the donor")
    back = make_plan(sized["llama-3-8b"], sized["cogvlm2-llama3-chat-19b"])
    unused = {name for name, why in back.leftover.items() if why == NO_TAKER}
    assert len(unused) == 32 * 6
    assert all("vision_expert" in name or "vision_mlp" in name for name in unused)


# Layers between the ancestor's


def test_mllama_from_llama(sized: dict[str, Checkpoint]) -> None:
    plan = make_plan(sized["mllama-11b"], sized["llama-3.1-8b"])
    assert actions(plan) == {"interpolate": 291, "copy": 615}
    assert plan.leftover == {}
    own = [layer for layer in range(40) if layer not in CROSS_LAYERS]
    for theirs, ours in enumerate(own):
        assert described(plan, f"language_model.model.layers.{ours}.mlp.up_proj.weight") == whole(
            f"layers.{theirs}.mlp.up.weight", 14336, f"model.layers.{theirs}.mlp.up_proj.weight"
        )
    for layer in CROSS_LAYERS:
        for name in ("mlp.up_proj.weight", "input_layernorm.weight", "cross_attn_attn_gate"):
            step = step_of(plan, f"language_model.model.layers.{layer}.{name}")
            assert (step.action, step.reason) == ("copy", "base's cross-attention layer")
    assert described(plan, "language_model.model.embed_tokens.weight") == [
        ((0, 128256), "embed", "model.embed_tokens.weight", (0, 128256)),
        ((128256, 128264), "embed", None, None),
    ]
    assert described(plan, "language_model.lm_head.weight") == whole(
        "head", 128256, "lm_head.weight"
    )


def test_llama_from_mllama(sized: dict[str, Checkpoint]) -> None:
    plan = make_plan(sized["llama-3.1-8b"], sized["mllama-11b"])
    assert leftover(plan) == {TOWER: 509, CONNECTOR: 2, "cross-attention layer": 104}
    for ours, theirs in ((2, 2), (3, 4), (6, 7), (7, 9), (31, 39)):
        assert described(plan, f"model.layers.{ours}.self_attn.k_proj.weight") == whole(
            f"layers.{ours}.attn.k.weight",
            1024,
            f"language_model.model.layers.{theirs}.self_attn.k_proj.weight",
        )


# What stays out, heads and rows


def test_the_talker_stays_out(sized: dict[str, Checkpoint]) -> None:
    plan = make_plan(sized["qwen2.5-vl-7b"], sized["qwen2.5-omni-7b"])
    assert actions(plan) == {"interpolate": 339, "copy": 390}
    assert leftover(plan) == {
        TOWER: 385,
        CONNECTOR: 5,
        "audio tower": 1,
        "talker": 291,
        "vocoder": 1,
    }
    donors = {part.donor_name for step in plan.steps for part in step.parts if part.donor_name}
    assert all(name.startswith("thinker.") for name in donors)


def test_a_tied_base_and_an_untied_descendant(sized: dict[str, Checkpoint]) -> None:
    """InternVL stores its head although Qwen2.5-3B ties it."""
    plan = make_plan(sized["qwen2.5-vl-3b"], sized["internvl2_5-4b"])
    assert leftover(plan) == {TOWER: 340, CONNECTOR: 6, NO_TAKER: 1}
    assert plan.leftover["language_model.lm_head.weight"] == NO_TAKER
    back = make_plan(sized["internvl2_5-4b"], sized["qwen2.5-vl-3b"])
    assert described(back, "language_model.lm_head.weight")[0][2] == "model.embed_tokens.weight"
    assert leftover(back) == {TOWER: 385, CONNECTOR: 5}


def test_gemma3_norms_on_both_sides_of_a_block(sized: dict[str, Checkpoint]) -> None:
    plan = make_plan(sized["gemma-3-4b"], sized["gemma-3-4b-text"])
    assert actions(plan) == {"interpolate": 444, "copy": 439}
    assert plan.leftover == {}
    for name, role in (
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "attn_post_norm"),
        ("pre_feedforward_layernorm", "mlp_norm"),
        ("post_feedforward_layernorm", "mlp_post_norm"),
    ):
        donor = f"model.layers.33.{name}.weight"
        assert described(plan, f"language_model.{donor}") == whole(
            f"layers.33.{role}.weight", 2560, donor
        )


# Every ordered pair of one size


def shallow(name: str) -> Family:
    """A family cut down to its first three layers (and Mllama's first of its own)."""
    depth = 4 if name == "mllama-11b" else 3
    tensors = {
        tensor: spec
        for tensor, spec in ALL[name].tensors.items()
        if all(int(number) < depth for number in re.findall(r"\.([0-9]+)\.", tensor))
    }
    return replace(ALL[name], tensors=tensors, shards=1)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group[0])
def test_every_pair_of_one_size_is_planned_and_nothing_is_unexplained(
    tmp_path: Path, group: list[str]
) -> None:
    families = {name: shallow(name) for name in group}
    for name, family in families.items():
        write_headers(tmp_path / name, family)
    for base in group:
        for donor in group:
            plan = make_plan(tmp_path / base, tmp_path / donor)
            assert plan.base_layout.layers == 3
            check_plan(plan, families[base], families[donor])
            assert UNKNOWN not in plan.leftover.values()
            assert UNKNOWN not in {step.kind for step in plan.steps}
            unused = {name for name, why in plan.leftover.items() if why == NO_TAKER}
            assert all(excused(name, base, donor) for name in unused), unused


def excused(name: str, base: str, donor: str) -> bool:
    """What a base without vision experts, biases or a head of its own has no place for."""
    if "cogvlm" in donor:
        return "vision_expert" in name or "vision_mlp" in name
    return "lm_head" in name and bool(ALL[base].config["tie_word_embeddings"])


def test_tokens_are_counted_in_the_plan(sized: dict[str, Checkpoint], tmp_path: Path) -> None:
    """Qwen2-VL's 152064 rows and LLaVA-OneVision's 152128; id 151646 is another token in each."""
    shared = [f"t{i}" for i in range(151643)] + ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    qwen = ["<|object_ref_start|>", "<|object_ref_end|>", "<|vision_start|>", "<video>"]
    llava = ["<image>", "<video>"]
    plans = []
    for name, added in (("qwen2-vl-7b", qwen), ("llava-onevision-qwen2-7b-ov-hf", llava)):
        folder = tmp_path / name
        write_headers(folder, FAMILIES[name])
        document = {
            "added_tokens": [{"id": 151646 + i, "content": token} for i, token in enumerate(added)],
            "model": {"vocab": {token: i for i, token in enumerate(shared)}, "merges": []},
        }
        (folder / "tokenizer.json").write_text(json.dumps(document))
        plans.append(folder)
    plan = make_plan(*plans)
    donor = "language_model.model.embed_tokens.weight"
    assert described(plan, "model.embed_tokens.weight") == [
        ((0, 151646), "embed", donor, (0, 151646)),
        ((151646, 151649), "embed", None, None),
        ((151649, 151650), "embed", donor, (151647, 151648)),
        ((151650, 152064), "embed", None, None),
    ]
    count = {"shared": 151647, "moved": 1, "kept": 417}
    assert plan.token_rows() == dict.fromkeys(
        ["model.embed_tokens.weight", "lm_head.weight"], count
    )
    assert plan.to_json()["tokens"] == plan.token_rows()
    assert step_of(plan, "lm_head.weight").reason == (
        "rows by token: 151647 shared, 1 of them moved, 417 kept"
    )
    assert not any("assumed" in note for note in plan.notes)
    back = make_plan(*reversed(plans))
    assert back.token_rows()[donor] == {"shared": 151647, "moved": 1, "kept": 152128 - 151647}
