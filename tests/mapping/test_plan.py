"""The join, against plans written out by hand, and what holds for every pair of families."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from families import (
    FAMILIES,
    QWEN2_3B,
    DecoderDims,
    Family,
    llama_decoder,
    mplug_decoder,
    qwen25vl,
    rotary_buffers,
    tensor_bytes,
    typed,
    write_headers,
)
from safetensors.numpy import save_file

from lowmem_adamms.checkpoints.checkpoint import Checkpoint, open_checkpoint
from lowmem_adamms.checkpoints.dtypes import DTYPES
from lowmem_adamms.errors import FormatError, MappingError
from lowmem_adamms.mapping.join import kind_of_role, make_plan
from lowmem_adamms.mapping.plan import Plan, Step

Rows: TypeAlias = "tuple[int, int]"
Described: TypeAlias = "tuple[Rows, str | None, str | None, Rows | None]"
Put: TypeAlias = Callable[..., Checkpoint]

SMALL = DecoderDims(hidden=8, intermediate=12, layers=2, heads=2, kv_heads=1, vocab=20, head_dim=4)

QWEN2_7B = [
    "qwen2-7b",
    "qwen2.5-7b",
    "qwen2-vl-7b",
    "qwen2.5-vl-7b",
    "llava-onevision-qwen2-7b-ov-hf",
    "llava-onevision-qwen2-7b-ov-lmms",
]
LLAMA2_7B = [
    "llama-2-7b",
    "vicuna-7b-v1.5",
    "llava-1.5-7b-hf",
    "llava-1.5-7b-orig",
    "llava-v1.6-vicuna-7b-hf",
    "llava-v1.6-vicuna-7b-orig",
    "sharegpt4v-7b",
    "cogvlm-chat-7b",
    "mplug-owl2-llama2-7b",
]
GROUPS = [
    QWEN2_7B,
    LLAMA2_7B,
    ["qwen2-1.5b", "qwen2.5-1.5b", "qwen2-vl-2b"],
    ["qwen2.5-3b", "qwen2.5-vl-3b"],
    ["mistral-7b", "llava-v1.6-mistral-7b-hf"],
    *(["qwen2-0.5b"], ["llama-3.1-8b"], ["qwen3-1.7b"], ["qwen3-4b"], ["qwen3-8b"]),
]
GROUP_OF = {name: group for group in GROUPS for name in group}


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Writes a checkpoint without data: a name, tensors, and more of config.json."""

    def write(name: str, tensors: Any, **config: Any) -> Checkpoint:
        config = {"architectures": ["LlamaForCausalLM"], **config}
        write_headers(tmp_path / name, Family(name, config, tensors))
        return open_checkpoint(tmp_path / name)

    return write


def vocab(checkpoint: Checkpoint, tokens: list[str]) -> Checkpoint:
    ids = {token: i for i, token in enumerate(tokens)}
    (checkpoint.path / "vocab.json").write_text(json.dumps(ids))
    return checkpoint


def step_of(plan: Plan, name: str) -> Step:
    (step,) = (step for step in plan.steps if step.name == name)
    return step


def described(plan: Plan, name: str) -> list[Described]:
    """Each part of a step: rows, role, donor tensor, donor rows."""
    parts = step_of(plan, name).parts
    return [(part.rows, part.role, part.donor_name, part.donor_rows) for part in parts]


def whole(role: str, rows: int, donor: str) -> list[Described]:
    """A tensor blended with all of another."""
    return [((0, rows), role, donor, (0, rows))]


def actions(plan: Plan) -> dict[str, int]:
    return dict(Counter(step.action for step in plan.steps))


def leftover(plan: Plan) -> dict[str, int]:
    return dict(Counter(plan.leftover.values()))


def family_bytes(name: str) -> int:
    return sum(tensor_bytes(*spec) for spec in FAMILIES[name].tensors.values())


NO_TAKER = "no counterpart in the base"


# The Qwen pairs


def test_qwen2_vl_from_llava_onevision_hf(true_size: dict[str, Checkpoint]) -> None:
    plan = make_plan(true_size["qwen2-vl-7b"], true_size["llava-onevision-qwen2-7b-ov-hf"])
    # 28 layers of 12, embed, norm and head; the tower and its merger are the base's
    assert actions(plan) == {"interpolate": 339, "copy": 391}
    assert leftover(plan) == {"vision tower": 421, "connector": 4, "image newline": 1}
    assert described(plan, "model.layers.27.self_attn.q_proj.bias") == whole(
        "layers.27.attn.q.bias",
        3584,
        "language_model.model.layers.27.self_attn.q_proj.bias",
    )
    assert described(plan, "model.layers.0.mlp.down_proj.weight") == whole(
        "layers.0.mlp.down.weight", 3584, "language_model.model.layers.0.mlp.down_proj.weight"
    )
    # Id 151646 is <image> in one and <|object_ref_start|> in the other
    for name, role, donor in (
        ("model.embed_tokens.weight", "embed", "language_model.model.embed_tokens.weight"),
        ("lm_head.weight", "head", "language_model.lm_head.weight"),
    ):
        assert described(plan, name) == [
            ((0, 151646), role, donor, (0, 151646)),
            ((151646, 152064), role, None, None),
        ]
    assert described(plan, "visual.merger.mlp.0.weight") == [((0, 5120), None, None, None)]
    assert step_of(plan, "visual.merger.mlp.0.weight").reason == "base's connector"
    assert step_of(plan, "visual.blocks.0.norm1.bias").kind == "vision tower"
    # The total_size of the published index
    assert plan.bytes_written == 16_582_751_232
    # and of Qwen2-7B's, less the rows that are not read: 418 of embed and of head
    assert plan.bytes_read == 16_582_751_232 + 15_231_233_024 - 2 * 418 * 3584 * 2
    assert any("151646" in note and "assumed" in note for note in plan.notes)


def test_qwen2_vl_from_llava_onevision_lmms(true_size: dict[str, Checkpoint]) -> None:
    plan = make_plan(true_size["qwen2-vl-7b"], true_size["llava-onevision-qwen2-7b-ov-lmms"])
    assert actions(plan) == {"interpolate": 339, "copy": 391}
    assert leftover(plan) == {"vision tower": 421, "connector": 4, "image newline": 1}
    assert described(plan, "lm_head.weight")[0] == (
        (0, 151646),
        "head",
        "lm_head.weight",
        (0, 151646),
    )
    name = "model.layers.3.self_attn.k_proj.weight"
    assert described(plan, name) == whole("layers.3.attn.k.weight", 512, name)


def test_llava_onevision_hf_from_qwen2_vl(true_size: dict[str, Checkpoint]) -> None:
    plan = make_plan(true_size["llava-onevision-qwen2-7b-ov-hf"], true_size["qwen2-vl-7b"])
    assert actions(plan) == {"interpolate": 339, "copy": 426}
    assert leftover(plan) == {"vision tower": 385, "connector": 6}
    assert described(plan, "language_model.model.embed_tokens.weight") == [
        ((0, 151646), "embed", "model.embed_tokens.weight", (0, 151646)),
        ((151646, 152128), "embed", None, None),
    ]
    assert described(plan, "image_newline") == [((0, 3584), None, None, None)]
    assert step_of(plan, "language_model.model.norm.weight").dtype.name == "F16"


def test_llava_onevision_lmms_from_qwen2_vl(true_size: dict[str, Checkpoint]) -> None:
    plan = make_plan(true_size["llava-onevision-qwen2-7b-ov-lmms"], true_size["qwen2-vl-7b"])
    assert actions(plan) == {"interpolate": 339, "copy": 426}
    assert leftover(plan) == {"vision tower": 385, "connector": 6}


def test_qwen25_vl_7b_from_its_language_model(true_size: dict[str, Checkpoint]) -> None:
    plan = make_plan(true_size["qwen2.5-vl-7b"], true_size["qwen2.5-7b"])
    assert actions(plan) == {"interpolate": 339, "copy": 390}
    assert plan.leftover == {}


def test_qwen25_vl_3b_from_its_language_model(true_size: dict[str, Checkpoint]) -> None:
    """Both tied: no head on either side, and none is made up."""
    plan = make_plan(true_size["qwen2.5-vl-3b"], true_size["qwen2.5-3b"])
    assert actions(plan) == {"interpolate": 434, "copy": 390}
    assert plan.leftover == {}
    assert "lm_head.weight" not in {step.name for step in plan.steps}
    assert described(plan, "model.embed_tokens.weight")[0][2] == "model.embed_tokens.weight"


def test_qwen3_8b_from_itself(true_size: dict[str, Checkpoint]) -> None:
    plan = make_plan(true_size["qwen3-8b"], true_size["qwen3-8b"])
    assert actions(plan) == {"interpolate": 399}
    assert plan.leftover == {}
    assert described(plan, "model.layers.35.self_attn.k_norm.weight") == whole(
        "layers.35.attn.k_norm.weight", 128, "model.layers.35.self_attn.k_norm.weight"
    )
    assert step_of(plan, "model.layers.35.self_attn.k_norm.weight").reason == "same role"
    assert described(plan, "model.embed_tokens.weight") == [
        ((0, 151669), "embed", "model.embed_tokens.weight", (0, 151669)),
        ((151669, 151936), "embed", None, None),
    ]


# The Llama and Mistral pairs


@pytest.mark.parametrize(
    ("donor", "prefix", "unused"),
    [
        ("llava-1.5-7b-hf", "language_model.", {"vision tower": 391, "connector": 4}),
        ("llava-1.5-7b-orig", "", {"connector": 4, "rotary buffer": 32}),
    ],
)
def test_cogvlm_from_llava(
    true_size: dict[str, Checkpoint], donor: str, prefix: str, unused: dict[str, int]
) -> None:
    """Both experts take the one language model they were copied from."""
    plan = make_plan(true_size["cogvlm-chat-7b"], true_size[donor])
    assert actions(plan) == {"interpolate": 387, "copy": 768}
    assert leftover(plan) == unused
    layer, theirs = "model.layers.5.", f"{prefix}model.layers.5."
    for expert, stream in (("language", "text"), ("vision", "vision")):
        qkv = f"{layer}self_attn.{expert}_expert_query_key_value.weight"
        assert described(plan, qkv) == [
            (
                (4096 * i, 4096 * (i + 1)),
                f"layers.5.attn.{part}.weight@{stream}",
                f"{theirs}self_attn.{part}_proj.weight",
                (0, 4096),
            )
            for i, part in enumerate("qkv")
        ]
        assert described(plan, f"{layer}self_attn.{expert}_expert_dense.weight") == whole(
            f"layers.5.attn.o.weight@{stream}", 4096, f"{theirs}self_attn.o_proj.weight"
        )
        assert described(plan, f"{layer}mlp.{expert}_mlp.up_proj.weight") == whole(
            f"layers.5.mlp.up.weight@{stream}", 11008, f"{theirs}mlp.up_proj.weight"
        )
    norm = f"{layer}input_layernorm.weight"
    assert described(plan, norm) == whole("layers.5.attn_norm.weight", 4096, prefix + norm)
    head = whole("head", 32000, f"{prefix}lm_head.weight")
    assert described(plan, "lm_head.weight") == head


def test_cogvlm_from_mplug_owl2(true_size: dict[str, Checkpoint]) -> None:
    """The authors' script: cat(q, k.0, v.0) and cat(q, k.1, v.1); norms from multiway 0."""
    plan = make_plan(true_size["cogvlm-chat-7b"], true_size["mplug-owl2-llama2-7b"])
    assert actions(plan) == {"interpolate": 387, "copy": 768}
    for way, (expert, stream) in enumerate((("language", "text"), ("vision", "vision"))):
        attention = f"model.layers.31.self_attn.{expert}_expert"
        assert described(plan, f"{attention}_query_key_value.weight") == [
            (
                rows,
                f"layers.31.attn.{part}.weight@{stream}",
                f"model.layers.31.self_attn.{theirs}.weight",
                (0, 4096),
            )
            for rows, part, theirs in (
                ((0, 4096), "q", "q_proj"),
                ((4096, 8192), "k", f"k_proj.multiway.{way}"),
                ((8192, 12288), "v", f"v_proj.multiway.{way}"),
            )
        ]
        assert described(plan, f"{attention}_dense.weight") == whole(
            f"layers.31.attn.o.weight@{stream}", 4096, "model.layers.31.self_attn.o_proj.weight"
        )
        assert described(plan, f"model.layers.31.mlp.{expert}_mlp.gate_proj.weight") == whole(
            f"layers.31.mlp.gate.weight@{stream}", 11008, "model.layers.31.mlp.gate_proj.weight"
        )
    for norm, role in (("input", "attn_norm"), ("post_attention", "mlp_norm")):
        assert described(plan, f"model.layers.31.{norm}_layernorm.weight") == whole(
            f"layers.31.{role}.weight",
            4096,
            f"model.layers.31.{norm}_layernorm.multiway.0.weight",
        )
    # The image norms, 2 a layer, have no like in CogVLM
    assert leftover(plan) == {
        NO_TAKER: 64,
        "vision tower": 295,
        "connector": 136,
        "rotary buffer": 32,
    }
    unused = {name for name, why in plan.leftover.items() if why == NO_TAKER}
    assert all(re.search(r"layernorm\.multiway\.1\.weight$", name) for name in unused)


def test_mplug_owl2_from_cogvlm(true_size: dict[str, Checkpoint]) -> None:
    plan = make_plan(true_size["mplug-owl2-llama2-7b"], true_size["cogvlm-chat-7b"])
    assert actions(plan) == {"interpolate": 419, "copy": 463}
    layer = "model.layers.0."
    language = f"{layer}self_attn.language_expert_query_key_value.weight"
    vision = f"{layer}self_attn.vision_expert_query_key_value.weight"
    for name, role, donor, rows in (
        ("q_proj", "q.weight", language, (0, 4096)),
        ("k_proj.multiway.0", "k.weight@text", language, (4096, 8192)),
        ("k_proj.multiway.1", "k.weight@vision", vision, (4096, 8192)),
        ("v_proj.multiway.0", "v.weight@text", language, (8192, 12288)),
        ("v_proj.multiway.1", "v.weight@vision", vision, (8192, 12288)),
    ):
        expected = [((0, 4096), f"layers.0.attn.{role}", donor, rows)]
        assert described(plan, f"{layer}self_attn.{name}.weight") == expected
    assert described(plan, f"{layer}self_attn.o_proj.weight") == whole(
        "layers.0.attn.o.weight", 4096, f"{layer}self_attn.language_expert_dense.weight"
    )
    assert described(plan, f"{layer}mlp.down_proj.weight") == whole(
        "layers.0.mlp.down.weight", 4096, f"{layer}mlp.language_mlp.down_proj.weight"
    )
    for way, stream in enumerate(("text", "vision")):
        assert described(plan, f"{layer}input_layernorm.multiway.{way}.weight") == whole(
            f"layers.0.attn_norm.weight@{stream}", 4096, f"{layer}input_layernorm.weight"
        )
    # The vision expert's dense and MLP, 4 a layer; its q too, but k and v of it are used
    assert leftover(plan) == {NO_TAKER: 128, "vision tower": 762, "connector": 6}


def test_llava_from_mplug_owl2(true_size: dict[str, Checkpoint]) -> None:
    plan = make_plan(true_size["llava-1.5-7b-orig"], true_size["mplug-owl2-llama2-7b"])
    assert actions(plan) == {"interpolate": 291, "copy": 36}
    layer = "model.layers.9."
    for name, role, rows in (
        ("self_attn.k_proj", "attn.k", 4096),
        ("self_attn.v_proj", "attn.v", 4096),
        ("input_layernorm", "attn_norm", 4096),
        ("post_attention_layernorm", "mlp_norm", 4096),
    ):
        donor = f"{layer}{name}.multiway.0.weight"
        assert described(plan, f"{layer}{name}.weight") == whole(
            f"layers.9.{role}.weight", rows, donor
        )
    assert leftover(plan) == {
        NO_TAKER: 128,
        "vision tower": 295,
        "connector": 136,
        "rotary buffer": 32,
    }


@pytest.mark.parametrize("donor", ["llava-1.5-7b-hf", "llava-1.5-7b-orig"])
def test_mplug_owl2_from_llava(true_size: dict[str, Checkpoint], donor: str) -> None:
    """k, v and norms go into both ways."""
    plan = make_plan(true_size["mplug-owl2-llama2-7b"], true_size[donor])
    assert actions(plan) == {"interpolate": 419, "copy": 463}
    prefix = "language_model." if donor.endswith("hf") else ""
    layer = "model.layers.9."
    for way, stream in enumerate(("text", "vision")):
        for name, role in (("self_attn.v_proj", "attn.v"), ("input_layernorm", "attn_norm")):
            assert described(plan, f"{layer}{name}.multiway.{way}.weight") == whole(
                f"layers.9.{role}.weight@{stream}", 4096, f"{prefix}{layer}{name}.weight"
            )
    assert NO_TAKER not in plan.leftover.values()


def test_sharegpt4v_from_vicuna(true_size: dict[str, Checkpoint]) -> None:
    plan = make_plan(true_size["sharegpt4v-7b"], true_size["vicuna-7b-v1.5"])
    assert actions(plan) == {"interpolate": 291, "copy": 4}
    assert plan.leftover == {}
    embed = "model.embed_tokens.weight"
    assert described(plan, embed) == whole("embed", 32000, embed)
    assert plan.bytes_read == family_bytes("sharegpt4v-7b") + family_bytes("vicuna-7b-v1.5")


def test_llava_next_mistral_from_mistral(true_size: dict[str, Checkpoint]) -> None:
    plan = make_plan(true_size["llava-v1.6-mistral-7b-hf"], true_size["mistral-7b"])
    assert actions(plan) == {"interpolate": 291, "copy": 396}
    assert plan.leftover == {}
    assert described(plan, "language_model.lm_head.weight") == [
        ((0, 32000), "head", "lm_head.weight", (0, 32000)),
        ((32000, 32064), "head", None, None),
    ]
    step = step_of(plan, "language_model.model.layers.0.self_attn.k_proj.weight")
    assert (
        step.parts[0].base.dtype.name,
        step.parts[0].donor and step.parts[0].donor.dtype.name,
    ) == (
        "F16",
        "BF16",
    )
    assert step.shape == (1024, 4096)


# What holds for every pair


@pytest.mark.parametrize("base", FAMILIES)
def test_every_pair_of_one_size_joins_soundly(true_size: dict[str, Checkpoint], base: str) -> None:
    for donor in GROUP_OF[base]:
        check_plan(make_plan(true_size[base], true_size[donor]), FAMILIES[base], FAMILIES[donor])


def check_plan(plan: Plan, base: Family, donor: Family) -> None:
    head = {"lm_head.weight"} if base.config.get("tie_word_embeddings") else set()
    assert [step.name for step in plan.steps] == [
        name for name in plan.base.tensors if name not in head
    ]
    assert {step.name for step in plan.steps} == set(base.tensors) - head
    read = written = 0
    used: set[str] = set()
    for step in plan.steps:
        dtype, shape = base.tensors[step.name]
        assert (step.dtype.name, step.shape) == (dtype, shape)
        assert step.reason
        width = tensor_bytes(dtype, shape) // shape[0]
        read += tensor_bytes(dtype, shape)
        written += tensor_bytes(dtype, shape)
        source = plan.base.tensors[step.name]
        at, row = source.start, 0
        for part in step.parts:
            start, stop = part.rows
            assert start == row
            assert stop > start
            assert (part.base.path, part.base.start) == (source.path, at)
            assert part.base.nbytes == (stop - start) * width
            row, at = stop, part.base.stop
            if part.donor is None:
                assert part.donor_name is None
                assert part.donor_rows is None
                continue
            assert part.donor_name is not None
            assert part.donor_rows is not None
            used.add(part.donor_name)
            donor_dtype, donor_shape = donor.tensors[part.donor_name]
            first, last = part.donor_rows
            assert 0 <= first < last <= donor_shape[0]
            donor_width = tensor_bytes(donor_dtype, donor_shape) // donor_shape[0]
            theirs = plan.donor.tensors[part.donor_name]
            assert part.donor.path == theirs.path
            assert part.donor.start == theirs.start + first * donor_width
            assert part.donor.stop == theirs.start + last * donor_width
            assert part.donor.shape == part.base.shape == (stop - start, *shape[1:])
            assert "inv_freq" not in step.name + part.donor_name
            read += (last - first) * donor_width
        assert row == shape[0]
        assert at == source.stop
    assert (plan.bytes_read, plan.bytes_written) == (read, written)
    assert used | set(plan.leftover) == set(donor.tensors)
    assert used.isdisjoint(plan.leftover)
    assert all(re.search("^no tokenizer|is left out", note) for note in plan.notes)


def test_rotary_buffers_are_copied(true_size: dict[str, Checkpoint]) -> None:
    plan = make_plan(true_size["llava-1.5-7b-orig"], true_size["mplug-owl2-llama2-7b"])
    step = step_of(plan, "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert (step.action, step.kind) == ("copy", "rotary buffer")
    assert step.reason == "rotary buffer: never blended"
    buffers = [step for step in plan.steps if step.kind == "rotary buffer"]
    assert len(buffers) == 32
    assert {step.action for step in buffers} == {"copy"}


@pytest.mark.parametrize(
    ("role", "kind"),
    [
        ("embed", "embedding"),
        ("head", "head"),
        ("norm", "norm"),
        ("layers.0.attn.q.weight", "attention"),
        ("layers.10.attn.k_norm.weight", "attention"),
        ("layers.3.mlp.gate.weight@vision", "MLP"),
        ("layers.3.mlp_norm.weight", "norm"),
        ("layers.3.attn_norm.weight@text", "norm"),
    ],
)
def test_kinds_of_roles(role: str, kind: str) -> None:
    assert kind_of_role(role) == kind


# Tied heads


def test_a_tied_base_with_a_head_on_disk_loses_it(
    true_size: dict[str, Checkpoint], put: Put
) -> None:
    """Transformers refuses to tie a head that differs from the embedding, which a blend makes."""
    tensors = FAMILIES["qwen2.5-vl-3b"].tensors | typed(
        "", "BF16", {"lm_head.weight": (151936, 2048)}
    )
    base = put("base", tensors, **FAMILIES["qwen2.5-vl-3b"].config)
    plan = make_plan(base, true_size["qwen2.5-3b"])
    assert "lm_head.weight" not in {step.name for step in plan.steps}
    assert actions(plan) == {"interpolate": 434, "copy": 390}
    (note,) = (note for note in plan.notes if "lm_head.weight" in note)
    assert "left out" in note
    assert "ties" in note
    assert plan.bytes_written == family_bytes("qwen2.5-vl-3b")


def test_a_tied_donor_lends_its_embedding_as_head(
    true_size: dict[str, Checkpoint], put: Put
) -> None:
    family = qwen25vl("base", replace(QWEN2_3B, tied=False), 1)
    plan = make_plan(put("base", family.tensors, **family.config), true_size["qwen2.5-3b"])
    donor = "model.embed_tokens.weight"
    for name, role in (("lm_head.weight", "head"), ("model.embed_tokens.weight", "embed")):
        assert described(plan, name) == [
            ((0, 151646), role, donor, (0, 151646)),
            ((151646, 151936), role, None, None),
        ]
    assert "lends its embedding" in step_of(plan, "lm_head.weight").reason
    assert plan.leftover == {}


def test_a_tied_donor_with_a_head_on_disk_lends_its_embedding_all_the_same(put: Put) -> None:
    base = put("base", llama_decoder(SMALL))
    plan = make_plan(base, put("donor", llama_decoder(SMALL), tie_word_embeddings=True))
    assert described(plan, "lm_head.weight") == whole("head", 20, "model.embed_tokens.weight")


def test_a_tied_base_takes_nothing_from_an_untied_donors_head(put: Put) -> None:
    base = put("base", llama_decoder(replace(SMALL, tied=True)), tie_word_embeddings=True)
    plan = make_plan(base, put("donor", llama_decoder(SMALL)))
    embed = "model.embed_tokens.weight"
    assert described(plan, embed) == whole("embed", 20, embed)
    assert plan.leftover == {"lm_head.weight": NO_TAKER}


def test_an_untied_donor_without_its_head_leaves_the_bases(put: Put) -> None:
    """A base model saved alone: its head is lost, and its embedding never was one."""
    base = put("base", llama_decoder(SMALL), tie_word_embeddings=False)
    headless = llama_decoder(replace(SMALL, tied=True))
    plan = make_plan(base, put("donor", headless, tie_word_embeddings=False))
    assert described(plan, "lm_head.weight") == [((0, 20), "head", None, None)]
    assert step_of(plan, "lm_head.weight").action == "copy"


# Embedding and head by token


def test_rows_follow_their_tokens(put: Put) -> None:
    base = vocab(put("base", llama_decoder(SMALL)), ["a", "b", "c", "<box>", "d"])
    donor = vocab(
        put("donor", llama_decoder(replace(SMALL, vocab=10), "model.", "lm_head")),
        ["a", "b", "<image>", "d", "c"],
    )
    plan = make_plan(base, donor)
    for name, role in (("model.embed_tokens.weight", "embed"), ("lm_head.weight", "head")):
        assert described(plan, name) == [
            ((0, 2), role, name, (0, 2)),
            ((2, 3), role, name, (4, 5)),
            ((3, 4), role, None, None),
            ((4, 5), role, name, (3, 4)),
            ((5, 20), role, None, None),
        ]
    reason = step_of(plan, "lm_head.weight").reason
    assert "4 shared" in reason
    assert "2 of them moved" in reason
    assert "16 kept" in reason
    assert not any("assumed" in note for note in plan.notes)


def test_no_token_in_common_leaves_the_rows_alone(put: Put) -> None:
    base = vocab(put("base", llama_decoder(SMALL)), ["a", "b"])
    plan = make_plan(base, vocab(put("donor", llama_decoder(SMALL)), ["x", "y"]))
    assert described(plan, "lm_head.weight") == [((0, 20), "head", None, None)]
    assert step_of(plan, "model.layers.0.mlp.up_proj.weight").action == "interpolate"


def test_a_tokenizer_on_one_side_only_is_of_no_use(put: Put) -> None:
    base = vocab(put("base", llama_decoder(SMALL)), ["a", "b"])
    plan = make_plan(base, put("donor", llama_decoder(replace(SMALL, vocab=16))))
    assert described(plan, "lm_head.weight") == [
        ((0, 16), "head", "lm_head.weight", (0, 16)),
        ((16, 20), "head", None, None),
    ]
    (note,) = plan.notes
    assert "first 16 rows" in note
    assert "assumed" in note


def test_a_broken_tokenizer_is_refused(put: Put) -> None:
    base = vocab(put("base", llama_decoder(SMALL)), ["a", "b"])
    donor = put("donor", llama_decoder(SMALL))
    (donor.path / "vocab.json").write_text("{")
    with pytest.raises(FormatError, match=str(donor.path)):
        make_plan(base, donor)


def test_shared_ids_limit_what_is_joined_by_position(put: Put) -> None:
    """Mistral's 32000 of 32008 rows are pretrained; the rest each descendant used as it liked."""
    dims = replace(SMALL, vocab=32008)
    config = {"architectures": ["MistralForCausalLM"]}
    one, two = (
        put("base", llama_decoder(dims), **config),
        put("donor", llama_decoder(dims), **config),
    )
    embed = "model.embed_tokens.weight"
    assert described(make_plan(one, two), embed) == [
        ((0, 32000), "embed", embed, (0, 32000)),
        ((32000, 32008), "embed", None, None),
    ]


@pytest.mark.parametrize("head_first", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_a_head_with_fewer_rows_than_the_embedding(put: Put, named: bool, head_first: bool) -> None:
    """Mllama has 8 more rows in its embedding; which of the two comes first on disk is chance."""
    tensors = {
        name: spec for name, spec in llama_decoder(SMALL).items() if name != "lm_head.weight"
    }
    head = typed("", "BF16", {"lm_head.weight": (16, 8)})
    base, donor = (
        put(side, head | tensors if head_first else tensors | head) for side in ("base", "donor")
    )
    if named:
        tokens = [f"t{i}" for i in range(20)]
        base, donor = vocab(base, tokens), vocab(donor, tokens)
    plan = make_plan(base, donor)
    embed = "model.embed_tokens.weight"
    assert described(plan, embed) == whole("embed", 20, embed)
    assert described(plan, "lm_head.weight") == whole("head", 16, "lm_head.weight")


def test_embeddings_can_be_kept(true_size: dict[str, Checkpoint]) -> None:
    plan = make_plan(true_size["qwen2-vl-7b"], true_size["qwen2-7b"], embeddings="keep")
    for name, role in (("model.embed_tokens.weight", "embed"), ("lm_head.weight", "head")):
        assert described(plan, name) == [((0, 152064), role, None, None)]
        assert step_of(plan, name).reason == "--embeddings keep"
    assert actions(plan) == {"interpolate": 337, "copy": 393}
    assert set(plan.leftover) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert plan.options["embeddings"] == "keep"


# What does not belong together


@pytest.mark.parametrize(
    ("base", "donor", "message"),
    [
        ("qwen2-7b", "qwen2.5-3b", "layer counts differ.* 28 decoder layers.* has 36;"),
        ("llama-2-7b", "qwen2-7b", "layer counts differ.* 32 decoder layers.* has 28;"),
        (
            "qwen2-vl-2b",
            "qwen2-7b",
            r"widths differ: model.embed_tokens.weight.*\[151936, 1536\].*\[152064, 3584\]",
        ),
        (
            "llama-2-7b",
            "mistral-7b",
            r"shapes differ for layers\.0\.(attn\.k|mlp\.\w+)\.weight: model\.layers\.0\.",
        ),
        ("qwen3-4b", "qwen2.5-3b", "widths differ"),
    ],
)
def test_sizes_that_differ_are_refused_with_names(
    true_size: dict[str, Checkpoint], base: str, donor: str, message: str
) -> None:
    with pytest.raises(MappingError, match=message) as caught:
        make_plan(true_size[base], true_size[donor])
    assert str(true_size[base].path) in str(caught.value)
    assert str(true_size[donor].path) in str(caught.value)


def test_intermediate_sizes_that_differ_are_refused_with_both_tensors(put: Put) -> None:
    base = put("base", llama_decoder(SMALL))
    donor = put("donor", llama_decoder(replace(SMALL, intermediate=13), "foo.", "foo.lm_head"))
    message = (
        r"layers\.0\.mlp\.(\w+)\.weight: model\.layers\.0\.mlp\.\1_proj\.weight.*"
        r"foo\.layers\.0\.mlp\.\1_proj\.weight"
    )
    with pytest.raises(MappingError, match=message):
        make_plan(base, donor)


def test_transposed_weights_are_not_taken_for_equal(put: Put) -> None:
    """8 x 8 elements on both sides, but 4 heads of 2 against 2 heads of 4 for k and v."""
    base = put("base", llama_decoder(SMALL))
    tensors = llama_decoder(SMALL)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = ("BF16", tensors[name][1][::-1])
    with pytest.raises(MappingError, match=r"layers\.1\.mlp\.up\.weight.*\[12, 8\].*\[8, 12\]"):
        make_plan(base, put("donor", tensors))


def test_biases_and_norms_on_one_side_only_stay_the_bases(put: Put) -> None:
    base = put("base", llama_decoder(replace(SMALL, bias=True)))
    donor = put("donor", llama_decoder(replace(SMALL, qk_norm=True)))
    plan = make_plan(base, donor)
    name = "model.layers.0.self_attn.q_proj.bias"
    assert described(plan, name) == [((0, 8), "layers.0.attn.q.bias", None, None)]
    assert step_of(plan, name).reason == "no counterpart in the donor"
    assert set(plan.leftover) == {
        f"model.layers.{layer}.self_attn.{part}_norm.weight" for layer in (0, 1) for part in "qk"
    }


def test_no_decoder_on_either_side_is_refused(put: Put) -> None:
    model = put("model", llama_decoder(SMALL))
    other = put("other", {"encoder.weight": ("F32", (2, 2))})
    for pair in ((model, other), (other, model)):
        with pytest.raises(MappingError, match=f"{other.path}: no decoder found"):
            make_plan(*pair)


@pytest.mark.parametrize("side", ["base", "donor"])
def test_decoder_weights_that_are_no_floats_are_refused_by_name(tmp_path: Path, side: str) -> None:
    for folder in ("base", "donor"):
        arrays = {n: np.zeros(s, np.float16) for n, (_, s) in llama_decoder(SMALL).items()}
        name = "model.layers.1.mlp.up_proj.weight"
        if folder == side:
            arrays[name] = arrays[name].astype(np.int8)
        (tmp_path / folder).mkdir()
        save_file(arrays, tmp_path / folder / "model.safetensors")
    with pytest.raises(FormatError, match=rf"{side}: model\.layers\.1\.mlp\.up_proj\.weight is I8"):
        make_plan(tmp_path / "base", tmp_path / "donor")


def test_an_unknown_family_is_planned_and_the_plan_says_so(put: Put) -> None:
    base = put("base", llama_decoder(SMALL), architectures=["LlamaForCausalLM"])
    foreign = llama_decoder(SMALL, "foo.bar.", "foo.bar.lm_head") | {
        "foo.eyes.weight": ("BF16", (3, 3))
    }
    other = put("other", foreign, architectures=["FooForCausalLM"])
    plan = make_plan(base, other)
    assert any(
        note.startswith("donor: ") and "FooForCausalLM" in note and "'foo.bar.'" in note
        for note in plan.notes
    )
    assert actions(plan) == {"interpolate": 21}
    assert plan.leftover == {"foo.eyes.weight": "no known role"}
    back = make_plan(other, base)
    assert any(note.startswith("base: ") and "FooForCausalLM" in note for note in back.notes)
    assert described(back, "foo.eyes.weight") == [((0, 3), None, None, None)]


# Output dtype


def test_dtype_changes_floating_tensors_only(tmp_path: Path) -> None:
    """Not rotary buffers, not integers, not float64."""
    shapes = {name: shape for name, (_, shape) in llama_decoder(SMALL).items()}
    arrays: dict[str, Any] = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
    arrays |= {name: np.zeros(spec[1], np.float32) for name, spec in rotary_buffers(SMALL).items()}
    arrays |= {
        "visual.patch_embed.weight": np.zeros((4, 2), np.float16),
        "visual.norm.weight": np.zeros(4, np.float32),
        "visual.position_ids": np.zeros(4, np.int64),
        "visual.table": np.zeros(4, np.float64),
    }
    for side in ("base", "donor"):
        (tmp_path / side).mkdir()
        save_file(arrays, tmp_path / side / "model.safetensors")
    kept = make_plan(tmp_path / "base", tmp_path / "donor")
    assert {step.name: step.dtype.name for step in kept.steps} == {
        name: {"float16": "F16", "float32": "F32", "int64": "I64", "float64": "F64"}[str(a.dtype)]
        for name, a in arrays.items()
    }
    plan = make_plan(tmp_path / "base", tmp_path / "donor", dtype=DTYPES["BF16"])
    dtypes = {step.name: step.dtype.name for step in plan.steps}
    assert {dtypes.pop(name) for name in rotary_buffers(SMALL)} == {"F32"}
    assert (dtypes.pop("visual.position_ids"), dtypes.pop("visual.table")) == ("I64", "F64")
    assert set(dtypes.values()) == {"BF16"}
    # 4 bytes of float32 became 2 in the one norm; inputs are read as they are
    assert plan.bytes_written == kept.bytes_written - 8
    assert plan.bytes_read == kept.bytes_read
    assert plan.options["dtype"] == "BF16"


def test_dtype_scales_what_is_written(true_size: dict[str, Checkpoint]) -> None:
    one = make_plan(true_size["qwen2-vl-7b"], true_size["qwen2-7b"])
    plan = make_plan(true_size["qwen2-vl-7b"], true_size["qwen2-7b"], dtype=DTYPES["F32"])
    assert (one.bytes_written, plan.bytes_written) == (16_582_751_232, 33_165_502_464)
    assert plan.bytes_read == one.bytes_read
    assert all(step.elements == prod(step.shape) for step in plan.steps)


# plan --json


def test_json_contract(true_size: dict[str, Checkpoint]) -> None:
    plan = make_plan(true_size["cogvlm-chat-7b"], true_size["mplug-owl2-llama2-7b"])
    document = json.loads(json.dumps(plan.to_json()))
    assert document["base"] == str(true_size["cogvlm-chat-7b"].path)
    assert document["donor"] == str(true_size["mplug-owl2-llama2-7b"].path)
    assert document["bytes_read"] == plan.bytes_read
    assert document["bytes_written"] == family_bytes("cogvlm-chat-7b")
    assert document["counts"] == {"interpolate": 387, "copy": 768}
    assert len(document["steps"]) == 1155
    for step in document["steps"]:
        assert set(step) == {"name", "dtype", "shape", "action", "reason", "parts"}
        dtype, shape = FAMILIES["cogvlm-chat-7b"].tensors[step["name"]]
        assert (step["dtype"], step["shape"]) == (dtype, list(shape))
        assert step["action"] in ("interpolate", "copy")
        assert isinstance(step["reason"], str)
        for part in step["parts"]:
            assert set(part) == {"rows", "role", "donor"}
    (qkv,) = (
        step
        for step in document["steps"]
        if step["name"] == "model.layers.2.self_attn.vision_expert_query_key_value.weight"
    )
    stem = "model.layers.2.self_attn"
    assert qkv == {
        "name": f"{stem}.vision_expert_query_key_value.weight",
        "dtype": "BF16",
        "shape": [12288, 4096],
        "action": "interpolate",
        "reason": qkv["reason"],
        "parts": [
            {
                "rows": [0, 4096],
                "role": "layers.2.attn.q.weight@vision",
                "donor": {"name": f"{stem}.q_proj.weight", "rows": [0, 4096]},
            },
            {
                "rows": [4096, 8192],
                "role": "layers.2.attn.k.weight@vision",
                "donor": {"name": f"{stem}.k_proj.multiway.1.weight", "rows": [0, 4096]},
            },
            {
                "rows": [8192, 12288],
                "role": "layers.2.attn.v.weight@vision",
                "donor": {"name": f"{stem}.v_proj.multiway.1.weight", "rows": [0, 4096]},
            },
        ],
    }
    (boi,) = (step for step in document["steps"] if step["name"] == "model.vision.boi")
    assert boi["action"] == "copy"
    assert boi["parts"] == [{"rows": [0, 1], "role": None, "donor": None}]


@pytest.mark.parametrize(("runs", "collapsed"), [(1, False), (16, False), (17, True)])
def test_many_runs_of_rows_are_told_as_tokens(put: Put, runs: int, collapsed: bool) -> None:
    """`runs` pairs of tokens, in the donor in the reverse order of pairs."""
    dims = replace(SMALL, vocab=2 * runs + 3)
    base = put("base", llama_decoder(dims))
    donor = put("donor", llama_decoder(dims))
    vocab(base, [f"{letter}{i}" for i in range(runs) for letter in "ab"])
    vocab(donor, [f"{letter}{i}" for i in reversed(range(runs)) for letter in "ab"])
    plan = make_plan(base, donor)
    embed = "model.embed_tokens.weight"
    assert len(step_of(plan, embed).parts) == runs + 1
    (step,) = (step for step in plan.to_json()["steps"] if step["name"] == embed)
    if collapsed:
        assert step["parts"] == [
            {
                "rows": "tokens",
                "count": 2 * runs,
                "role": "embed",
                "donor": {"name": embed, "rows": "tokens"},
            }
        ]
    else:
        assert step["parts"] == [
            *(
                {
                    "rows": [2 * i, 2 * i + 2],
                    "role": "embed",
                    "donor": {"name": embed, "rows": [2 * (runs - i) - 2, 2 * (runs - i)]},
                }
                for i in range(runs)
            ),
            {"rows": [2 * runs, 2 * runs + 3], "role": "embed", "donor": None},
        ]


def test_two_orders_of_many_rows_are_two_plans(put: Put) -> None:
    dims = replace(SMALL, vocab=43)
    base, donor = put("base", llama_decoder(dims)), put("donor", llama_decoder(dims))
    words = [f"{letter}{i}" for i in range(20) for letter in "ab"]
    vocab(base, words)
    vocab(donor, [f"{letter}{i}" for i in reversed(range(20)) for letter in "ab"])
    first = make_plan(base, donor)
    vocab(donor, [f"{letter}{i}" for i in reversed(range(20)) for letter in "ba"][::-1])
    second = make_plan(base, donor)
    vocab(donor, [f"{letter}{i}" for i in (*range(10, 20), *range(10)) for letter in "ab"])
    assert make_plan(base, donor).identity() != first.identity()
    assert second.identity() != first.identity()


# Imports


def test_planning_imports_neither_torch_nor_numpy_nor_transformers(put: Put) -> None:
    dims = replace(SMALL, kv_heads=2)
    base = vocab(put("base", llama_decoder(dims)), ["a", "b"])
    config = {"architectures": ["MPLUGOwl2LlamaForCausalLM"]}
    donor = vocab(put("donor", mplug_decoder(dims), **config), ["a", "c"])
    code = (
        "import sys\n"
        "from lowmem_adamms import make_plan\n"
        "assert make_plan(sys.argv[1], sys.argv[2]).to_json()['counts']['interpolate'] == 21\n"
        "heavy = ('torch', 'numpy', 'transformers', 'numba', 'safetensors', 'huggingface_hub')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(base.path), str(donor.path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_paths_are_opened(put: Put) -> None:
    base, donor = put("base", llama_decoder(SMALL)), put("donor", llama_decoder(SMALL))
    by_path = make_plan(str(base.path), donor.path)
    assert by_path.to_json() == make_plan(base, donor).to_json()


def test_bare_files_are_planned(put: Put) -> None:
    base, donor = put("base", llama_decoder(SMALL)), put("donor", llama_decoder(SMALL))
    plan = make_plan(base.path / "model.safetensors", donor.path / "model.safetensors")
    assert actions(plan) == {"interpolate": 21}
    assert sum("no config.json" in note for note in plan.notes) == 2
