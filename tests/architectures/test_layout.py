"""Recognition: every family and spelling read as the roles it holds, and what fits nothing."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from families import FAMILIES, DecoderDims, Family, llama_decoder, qwen2vl_tower, write_headers

from lowmem_adamms.architectures.families import ARCHS
from lowmem_adamms.architectures.layout import BUFFER, UNKNOWN, Block, Layout
from lowmem_adamms.architectures.recognise import recognise
from lowmem_adamms.checkpoints.checkpoint import Checkpoint, open_checkpoint
from lowmem_adamms.errors import MappingError

TOWER, CONNECTOR, NEWLINE = "vision tower", "connector", "image newline"
SMALL = DecoderDims(hidden=8, intermediate=12, layers=2, heads=2, kv_heads=1, vocab=20, head_dim=4)

# name: architecture, layers, tensors of the decoder, and how many of each other kind
EXPECTED: dict[str, tuple[str, int, int, dict[str, int]]] = {
    # 9 weights a layer; Qwen2 has 3 biases more, Qwen3 2 norms more; embed, norm, untied head
    "llama-2-7b": ("Llama", 32, 291, {}),
    "vicuna-7b-v1.5": ("Llama", 32, 291, {}),
    "llama-3.1-8b": ("Llama", 32, 291, {}),
    "mistral-7b": ("Mistral", 32, 291, {}),
    "qwen2-0.5b": ("Qwen2", 24, 290, {}),
    "qwen2-1.5b": ("Qwen2", 28, 338, {}),
    "qwen2-7b": ("Qwen2", 28, 339, {}),
    "qwen2.5-1.5b": ("Qwen2", 28, 338, {}),
    "qwen2.5-3b": ("Qwen2", 36, 434, {}),
    "qwen2.5-7b": ("Qwen2", 28, 339, {}),
    "qwen3-1.7b": ("Qwen3", 28, 310, {}),
    "qwen3-4b": ("Qwen3", 36, 398, {}),
    "qwen3-8b": ("Qwen3", 36, 399, {}),
    "qwen2-vl-2b": ("Qwen2-VL", 28, 338, {TOWER: 385, CONNECTOR: 6}),
    "qwen2-vl-7b": ("Qwen2-VL", 28, 339, {TOWER: 385, CONNECTOR: 6}),
    "qwen2.5-vl-3b": ("Qwen2.5-VL", 36, 434, {TOWER: 385, CONNECTOR: 5}),
    "qwen2.5-vl-7b": ("Qwen2.5-VL", 28, 339, {TOWER: 385, CONNECTOR: 5}),
    "llava-1.5-7b-hf": ("LLaVA", 32, 291, {TOWER: 391, CONNECTOR: 4}),
    "llava-v1.6-vicuna-7b-hf": ("LLaVA-NeXT", 32, 291, {TOWER: 391, CONNECTOR: 4, NEWLINE: 1}),
    "llava-v1.6-mistral-7b-hf": ("LLaVA-NeXT", 32, 291, {TOWER: 391, CONNECTOR: 4, NEWLINE: 1}),
    "llava-onevision-qwen2-7b-ov-hf": (
        "LLaVA-OneVision",
        28,
        339,
        {TOWER: 421, CONNECTOR: 4, NEWLINE: 1},
    ),
    "llava-onevision-qwen2-7b-ov-lmms": (
        "LLaVA-OneVision (lmms-lab)",
        28,
        339,
        {TOWER: 421, CONNECTOR: 4, NEWLINE: 1},
    ),
    "llava-1.5-7b-orig": ("LLaVA (liuhaotian)", 32, 291, {CONNECTOR: 4, BUFFER: 32}),
    "llava-v1.6-vicuna-7b-orig": (
        "LLaVA (liuhaotian)",
        32,
        291,
        {TOWER: 391, CONNECTOR: 4, NEWLINE: 1},
    ),
    "sharegpt4v-7b": ("ShareGPT4V", 32, 291, {CONNECTOR: 4}),
    # 2 norms, 2 fused qkv, 2 dense, 6 MLP matrices a layer
    "cogvlm-chat-7b": ("CogVLM", 32, 387, {TOWER: 762, CONNECTOR: 6}),
    # q, o, 3 of the MLP, and twice k, v and both norms
    "mplug-owl2-llama2-7b": ("mPLUG-Owl2", 32, 419, {TOWER: 295, CONNECTOR: 136, BUFFER: 32}),
}


def layout_of(checkpoint: Checkpoint) -> Layout:
    return recognise(checkpoint, ARCHS)


def summary(layout: Layout) -> tuple[str, int, int, dict[str, int]]:
    kinds = dict(Counter(layout.kinds.values()))
    return layout.arch, layout.layers, len(layout.blocks), kinds


def hollow(folder: Path, tensors: Any, config: dict[str, Any] | None = None) -> Checkpoint:
    """A checkpoint of these names and shapes, without data."""
    write_headers(folder, Family("hollow", config or {}, tensors))
    return open_checkpoint(folder)


def under(prefix: str, head: str, dims: DecoderDims = SMALL) -> Any:
    return llama_decoder(dims, prefix, head.removesuffix(".weight"))


# True sizes


def test_every_family_has_an_expectation() -> None:
    assert set(EXPECTED) == set(FAMILIES)


@pytest.mark.parametrize("name", EXPECTED)
def test_true_size_families_are_recognised(true_size: dict[str, Checkpoint], name: str) -> None:
    layout = layout_of(true_size[name])
    assert summary(layout) == EXPECTED[name]
    assert layout.assumed is None
    assert set(layout.blocks).isdisjoint(layout.kinds)
    assert set(layout.blocks) | set(layout.kinds) == set(FAMILIES[name].tensors)


@pytest.mark.parametrize("name", EXPECTED)
def test_without_a_config_the_names_alone_explain_every_tensor(
    true_size: dict[str, Checkpoint], name: str
) -> None:
    layout = layout_of(replace(true_size[name], config={}))
    assert UNKNOWN not in layout.kinds.values()
    assert (layout.layers, len(layout.blocks)) == EXPECTED[name][1:3]
    assert layout.assumed is not None
    assert "no config.json" in layout.assumed
    assert layout.arch in layout.assumed


@pytest.mark.parametrize("name", EXPECTED)
def test_each_role_is_held_once_and_blocks_fill_their_tensors(
    true_size: dict[str, Checkpoint], name: str
) -> None:
    layout = layout_of(true_size[name])
    roles = [block.role for blocks in layout.blocks.values() for block in blocks]
    assert len(roles) == len(set(roles)) == len(layout.roles())
    for tensor, blocks in layout.blocks.items():
        edges = [0, *(block.stop for block in blocks)]
        assert [block.start for block in blocks] == edges[:-1]
        assert edges[-1] == FAMILIES[name].tensors[tensor][1][0]


def test_roles_of_a_qwen2_layer(true_size: dict[str, Checkpoint]) -> None:
    roles = layout_of(true_size["qwen2-vl-7b"]).roles()
    assert {
        role: name.removeprefix("model.layers.27.")
        for role, (name, _) in roles.items()
        if role.startswith("layers.27.")
    } == {
        "layers.27.attn_norm.weight": "input_layernorm.weight",
        "layers.27.attn.q.weight": "self_attn.q_proj.weight",
        "layers.27.attn.q.bias": "self_attn.q_proj.bias",
        "layers.27.attn.k.weight": "self_attn.k_proj.weight",
        "layers.27.attn.k.bias": "self_attn.k_proj.bias",
        "layers.27.attn.v.weight": "self_attn.v_proj.weight",
        "layers.27.attn.v.bias": "self_attn.v_proj.bias",
        "layers.27.attn.o.weight": "self_attn.o_proj.weight",
        "layers.27.mlp_norm.weight": "post_attention_layernorm.weight",
        "layers.27.mlp.gate.weight": "mlp.gate_proj.weight",
        "layers.27.mlp.up.weight": "mlp.up_proj.weight",
        "layers.27.mlp.down.weight": "mlp.down_proj.weight",
    }
    assert roles["embed"] == ("model.embed_tokens.weight", Block("embed", 0, 152064))
    assert roles["head"] == ("lm_head.weight", Block("head", 0, 152064))
    assert roles["norm"] == ("model.norm.weight", Block("norm", 0, 3584))


def test_roles_of_qwen3_norms(true_size: dict[str, Checkpoint]) -> None:
    roles = layout_of(true_size["qwen3-8b"]).roles()
    assert roles["layers.0.attn.q_norm.weight"][0] == "model.layers.0.self_attn.q_norm.weight"
    assert roles["layers.35.attn.k_norm.weight"][0] == "model.layers.35.self_attn.k_norm.weight"


def test_cogvlm_experts_hold_q_k_and_v_one_after_the_other(
    true_size: dict[str, Checkpoint],
) -> None:
    blocks = layout_of(true_size["cogvlm-chat-7b"]).blocks
    stem = "model.layers.3.self_attn."
    for expert, stream in (("language", "text"), ("vision", "vision")):
        assert blocks[f"{stem}{expert}_expert_query_key_value.weight"] == (
            Block(f"layers.3.attn.q.weight@{stream}", 0, 4096),
            Block(f"layers.3.attn.k.weight@{stream}", 4096, 8192),
            Block(f"layers.3.attn.v.weight@{stream}", 8192, 12288),
        )
        dense = blocks[f"{stem}{expert}_expert_dense.weight"]
        assert dense == (Block(f"layers.3.attn.o.weight@{stream}", 0, 4096),)


def test_grouped_queries_in_a_fused_tensor(tmp_path: Path) -> None:
    """CogVLM2: 4096 rows of q, 1024 each of k and v; the query is as wide as o_proj's input."""
    tensors = dict(FAMILIES["cogvlm-chat-7b"].tensors)
    for name in list(tensors):
        if name.endswith("query_key_value.weight") and ".vision.transformer" not in name:
            tensors[name] = ("BF16", (6144, 4096))
    layout = layout_of(hollow(tmp_path, tensors, FAMILIES["cogvlm-chat-7b"].config))
    held = layout.blocks["model.layers.0.self_attn.vision_expert_query_key_value.weight"]
    assert [(block.start, block.stop) for block in held] == [(0, 4096), (4096, 5120), (5120, 6144)]


@pytest.mark.parametrize("rows", [4095, 4096, 6145, 0])
def test_a_fused_tensor_that_does_not_divide_is_refused_by_name(tmp_path: Path, rows: int) -> None:
    tensors = dict(FAMILIES["cogvlm-chat-7b"].tensors)
    name = "model.layers.7.self_attn.language_expert_query_key_value.weight"
    tensors[name] = ("BF16", (rows, 4096))
    checkpoint = hollow(tmp_path, tensors, FAMILIES["cogvlm-chat-7b"].config)
    with pytest.raises(MappingError, match=f"{re.escape(name)} has {rows} rows"):
        layout_of(checkpoint)


def test_mplug_owl2_streams(true_size: dict[str, Checkpoint]) -> None:
    roles = layout_of(true_size["mplug-owl2-llama2-7b"]).roles()
    stem = "model.layers.0."
    for role, name in (
        ("attn.k.weight", "self_attn.k_proj"),
        ("attn.v.weight", "self_attn.v_proj"),
        ("attn_norm.weight", "input_layernorm"),
        ("mlp_norm.weight", "post_attention_layernorm"),
    ):
        assert roles[f"layers.0.{role}@text"][0] == f"{stem}{name}.multiway.0.weight"
        assert roles[f"layers.0.{role}@vision"][0] == f"{stem}{name}.multiway.1.weight"
        assert f"layers.0.{role}" not in roles
    assert roles["layers.0.attn.q.weight"][0] == f"{stem}self_attn.q_proj.weight"


def test_mergers_and_projectors_are_connectors_not_towers(
    true_size: dict[str, Checkpoint],
) -> None:
    for family, name in (
        ("qwen2-vl-7b", "visual.merger.mlp.0.weight"),
        ("qwen2.5-vl-7b", "visual.merger.ln_q.weight"),
        ("llava-1.5-7b-hf", "multi_modal_projector.linear_1.weight"),
        ("llava-1.5-7b-orig", "model.mm_projector.0.bias"),
        ("cogvlm-chat-7b", "model.vision.linear_proj.gate_proj.weight"),
        ("mplug-owl2-llama2-7b", "model.visual_abstractor.visual_fc.bias"),
    ):
        assert layout_of(true_size[family]).kinds[name] == CONNECTOR


def test_qwen3_vl(tmp_path: Path) -> None:
    dims = replace(SMALL, qk_norm=True)
    tensors = llama_decoder(dims, "model.language_model.", "lm_head") | {
        "model.visual.blocks.0.attn.qkv.weight": ("BF16", (12, 4)),
        "model.visual.merger.norm.weight": ("BF16", (4,)),
        "model.visual.deepstack_merger_list.0.norm.weight": ("BF16", (4,)),
    }
    config = {"architectures": ["Qwen3VLForConditionalGeneration"]}
    layout = layout_of(hollow(tmp_path, tensors, config))
    assert summary(layout) == ("Qwen3-VL", 2, 25, {TOWER: 1, CONNECTOR: 2})
    assert layout.assumed is None


# What transformers writes, and the other spellings of the same checkpoints

LLAMA_ROLES = {"embed", "norm", "head"} | {
    f"layers.{layer}.{role}.weight"
    for layer in (0, 1)
    for role in (
        *("attn_norm", "mlp_norm", "attn.q", "attn.k", "attn.v", "attn.o"),
        *("mlp.gate", "mlp.up", "mlp.down"),
    )
}
QWEN2_ROLES = LLAMA_ROLES | {f"layers.{i}.attn.{part}.bias" for i in (0, 1) for part in "qkv"}
QWEN3_ROLES = LLAMA_ROLES | {f"layers.{i}.attn.{part}_norm.weight" for i in (0, 1) for part in "qk"}
TEXT_MODELS = {
    "llama": ("Llama", LLAMA_ROLES),
    "mistral": ("Mistral", LLAMA_ROLES),
    "qwen2": ("Qwen2", QWEN2_ROLES),
    "qwen3": ("Qwen3", QWEN3_ROLES),
}
QWEN_VL = {"qwen2_vl": ("Qwen2-VL", QWEN2_ROLES), "qwen2_5_vl": ("Qwen2.5-VL", QWEN2_ROLES)}
LLAVAS = {
    "llava": ("LLaVA", LLAMA_ROLES),
    "llava_next": ("LLaVA-NeXT", LLAMA_ROLES),
    "llava_onevision": ("LLaVA-OneVision", QWEN2_ROLES),
}
VISION = QWEN_VL | LLAVAS


def assert_recognised(folder: Path, arch: str, roles: set[str]) -> Layout:
    layout = layout_of(open_checkpoint(folder))
    assert layout.assumed is None
    assert layout.arch == arch
    assert set(layout.roles()) == roles
    assert UNKNOWN not in layout.kinds.values()
    return layout


@pytest.mark.parametrize("family", TEXT_MODELS | VISION)
def test_what_transformers_writes(tiny_models: dict[str, Path], family: str) -> None:
    layout = assert_recognised(tiny_models[family], *(TEXT_MODELS | VISION)[family])
    assert {TOWER, CONNECTOR} <= set(layout.kinds.values()) or family in TEXT_MODELS


@pytest.mark.parametrize(
    ("family", "arch", "kinds"),
    [
        ("cogvlm", "CogVLM", {TOWER, CONNECTOR}),
        ("mplug_owl2", "mPLUG-Owl2", {TOWER, CONNECTOR, BUFFER}),
    ],
)
def test_hand_spelled_models(
    tiny_models: dict[str, Path], family: str, arch: str, kinds: set[str]
) -> None:
    layout = layout_of(open_checkpoint(tiny_models[family]))
    assert (layout.arch, layout.layers, layout.assumed) == (arch, 2, None)
    assert set(layout.kinds.values()) == kinds
    plain = {role.partition("@")[0] for role in layout.roles()}
    assert plain == LLAMA_ROLES


def qwen_towers_outside(name: str) -> str:
    """`model.language_model.*` with `visual.*`: between the Hub's spelling and transformers 5's."""
    return re.sub(r"^model\.visual\.", "visual.", tiny.modern(name))


def llava_head_on_top(name: str) -> str:
    """`language_model.model.*` with `lm_head.weight`: transformers 4.50 to 4.52 wrote it."""
    return tiny.llava_hub(name).replace("language_model.lm_head.", "lm_head.")


SPELLINGS: list[tuple[str, Callable[[str], str]]] = [
    *((family, tiny.modern) for family in VISION),
    *((family, spell) for family in QWEN_VL for spell in (tiny.qwen_hub, qwen_towers_outside)),
    *((family, spell) for family in LLAVAS for spell in (tiny.llava_hub, llava_head_on_top)),
]


@pytest.mark.parametrize(("family", "spell"), SPELLINGS)
def test_other_spellings(
    tiny_models: dict[str, Path], tmp_path: Path, family: str, spell: Callable[[str], str]
) -> None:
    folder = tiny.respell(tiny_models[family], spell, tmp_path / "m")
    assert_recognised(folder, *VISION[family])


@pytest.mark.parametrize(
    ("family", "cls", "arch"),
    [
        ("llava", "LlavaLlamaForCausalLM", "LLaVA (liuhaotian)"),
        ("llava", "Share4VLlamaForCausalLM", "ShareGPT4V"),
        ("llava_next", "LlavaLlamaForCausalLM", "LLaVA (liuhaotian)"),
        ("llava_next", "LlavaMistralForCausalLM", "LLaVA (liuhaotian)"),
        ("llava_onevision", "LlavaQwenForCausalLM", "LLaVA-OneVision (lmms-lab)"),
    ],
)
@pytest.mark.parametrize("spell", [tiny.llava_original, tiny.llava_original_towerless])
def test_original_llava_spellings(
    tiny_models: dict[str, Path],
    tmp_path: Path,
    family: str,
    cls: str,
    arch: str,
    spell: Callable[[str], str | None],
) -> None:
    folder = tiny.respell(tiny_models[family], spell, tmp_path / "m", extra=tiny.inv_freq())
    tiny.flat_config(folder, architectures=[cls])
    layout = assert_recognised(folder, arch, VISION[family][1])
    assert Counter(layout.kinds.values())[BUFFER] == 2


@pytest.mark.parametrize("family", TEXT_MODELS | VISION)
def test_base_models_saved_without_their_head(
    tiny_models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    """`AutoModel.save_pretrained`: `embed_tokens` or `language_model.` at the top, no head."""

    def spell(name: str) -> str | None:
        return tiny.headless(name if family in TEXT_MODELS else tiny.modern(name))

    folder = tiny.respell(tiny_models[family], spell, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (cls,) = config["architectures"]
    config["architectures"] = [re.sub("For(CausalLM|ConditionalGeneration)$", "Model", cls)]
    (folder / "config.json").write_text(json.dumps(config))
    layout = layout_of(open_checkpoint(folder))
    assert set(layout.roles()) == (TEXT_MODELS | VISION)[family][1] - {"head"}
    assert UNKNOWN not in layout.kinds.values()


# Unknown families, and what is no language model


@pytest.mark.parametrize("config", [None, {"architectures": ["FooForCausalLM"]}])
@pytest.mark.parametrize("prefix", ["", "foo.bar.", "llm.model.", "model.text_model."])
def test_a_llama_spelled_decoder_under_any_prefix_is_assumed(
    tmp_path: Path, prefix: str, config: dict[str, Any] | None
) -> None:
    tensors = under(prefix, f"{prefix}lm_head.weight") | {"eyes.conv.weight": ("BF16", (2, 3))}
    layout = layout_of(hollow(tmp_path, tensors, config))
    assert layout.arch == "Llama-style"
    assert layout.prefix == prefix
    assert layout.assumed is not None
    assert repr(prefix) in layout.assumed
    assert ("FooForCausalLM" if config else "no config.json") in layout.assumed
    assert set(layout.roles()) == LLAMA_ROLES
    assert layout.kinds == {"eyes.conv.weight": UNKNOWN}


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("foo.bar.", "lm_head.weight"),
        ("foo.bar.", "foo.lm_head.weight"),
        ("llm.model.", "llm.lm_head.weight"),  # MiniCPM-V-2.6
        ("model.text_model.", "lm_head.weight"),  # Idefics3
        ("", "lm_head.weight"),
    ],
)
def test_the_head_of_an_unknown_family_is_found_wherever_it_stands(
    tmp_path: Path, prefix: str, head: str
) -> None:
    """Several of the pairs users want look like this; a missed head would stay the base's."""
    config = {"architectures": ["FooForCausalLM"]}
    tensors = under(prefix, head) | {"eyes.conv.weight": ("BF16", (2, 3))}
    layout = layout_of(hollow(tmp_path, tensors, config))
    assert layout.roles()["head"][0] == head
    assert layout.kinds == {"eyes.conv.weight": UNKNOWN}


def test_the_language_model_is_not_mistaken_for_an_embedding_elsewhere(tmp_path: Path) -> None:
    """A tower with `embed_tokens` of its own but no layers in the Llama way."""
    tensors = under("deep.down.model.", "deep.down.lm_head.weight")
    tensors |= {
        "vision.embed_tokens.weight": ("BF16", (4, 8)),
        "vision.norm.weight": ("BF16", (8,)),
    }
    layout = layout_of(hollow(tmp_path, tensors, {"architectures": ["FooForCausalLM"]}))
    assert layout.prefix == "deep.down.model."


def test_names_decide_where_the_announced_class_is_spelled_otherwise(tmp_path: Path) -> None:
    tensors = under("model.", "lm_head") | qwen2vl_tower(8)
    config = {"architectures": ["LlavaForConditionalGeneration"]}
    layout = layout_of(hollow(tmp_path, tensors, config))
    assert layout.arch == "Qwen2-VL"
    assert layout.assumed is not None
    assert "LlavaForConditionalGeneration" in layout.assumed


def test_a_tensor_outside_any_known_part_is_of_unknown_role(tmp_path: Path) -> None:
    tensors = under("model.", "lm_head") | {"model.layers.0.lora.A": ("BF16", (2, 8))}
    layout = layout_of(hollow(tmp_path, tensors, {"architectures": ["LlamaForCausalLM"]}))
    assert layout.kinds == {"model.layers.0.lora.A": UNKNOWN}
    assert layout.assumed is None


@pytest.mark.parametrize(
    "lost",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.input_layernorm.weight",
    ],
)
def test_a_decoder_with_a_weight_missing_is_none(tmp_path: Path, lost: str) -> None:
    tensors = under("model.", "lm_head")
    del tensors[lost]
    checkpoint = hollow(tmp_path, tensors, {"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(MappingError, match=f"{tmp_path}: no decoder found"):
        layout_of(checkpoint)


def test_a_decoder_with_a_layer_missing_is_none(tmp_path: Path) -> None:
    tensors = under("model.", "lm_head", replace(SMALL, layers=3))
    tensors = {name: spec for name, spec in tensors.items() if ".layers.1." not in name}
    with pytest.raises(MappingError, match="no decoder found"):
        layout_of(hollow(tmp_path, tensors))


@pytest.mark.parametrize(
    "tensors",
    [
        {"bert.encoder.layer.0.attention.self.query.weight": ("F32", (4, 4))},
        {"transformer.h.0.attn.c_attn.weight": ("F32", (4, 12)), "wte.weight": ("F32", (9, 4))},
        {"model.embed_tokens.weight": ("F32", (9, 4))},
    ],
)
def test_no_decoder_at_all(tmp_path: Path, tensors: Any) -> None:
    with pytest.raises(MappingError, match=f"{tmp_path}: no decoder found.*first: "):
        layout_of(hollow(tmp_path, tensors))


@pytest.mark.parametrize("classes", [7, [["a"]], [1, "x"], "LlamaForCausalLM", {"a": 1}, None])
def test_a_strange_architectures_entry_does_no_harm(tmp_path: Path, classes: object) -> None:
    config = {"architectures": classes}
    layout = layout_of(hollow(tmp_path, under("model.", "lm_head"), config))
    assert set(layout.roles()) == LLAMA_ROLES


@pytest.mark.parametrize("number", ["9" * 5000, "٣", "-1", "00", "1e3"])
def test_strange_layer_numbers_are_no_layers(tmp_path: Path, number: str) -> None:
    """Python parses Arabic digits and refuses 5000 of any; neither may count as a layer."""
    odd = f"model.layers.{number}.mlp.gate_proj.weight"
    tensors = under("model.", "lm_head") | {odd: ("BF16", (12, 8))}
    layout = layout_of(hollow(tmp_path, tensors, {"architectures": ["LlamaForCausalLM"]}))
    assert layout.kinds == {odd: UNKNOWN}
    assert layout.layers == 2


def test_every_declaration_is_sound() -> None:
    """Each names a class and a source of its own, and an embedding, a final norm and layers."""
    assert len({arch.name for arch in ARCHS}) == len(ARCHS)
    for cls in {cls for arch in ARCHS for cls in arch.classes}:  # one class, several ancestors
        decoders = [arch.decoder for arch in ARCHS if cls in arch.classes]
        assert all(decoders.count(decoder) == 1 for decoder in decoders)
    for arch in ARCHS:
        assert arch.classes and arch.source and arch.spellings
        roles = [role for held in arch.decoder.values() for role in held.split()]
        assert len(roles) == len(set(roles))
        assert {"embed", "norm"} <= set(roles)
        for name, held in arch.decoder.items():
            assert all(role.count("#") == name.count("#") for role in held.split())
        assert set(arch.interleaved) <= {name for name, held in arch.decoder.items() if held}
        assert all("#" in name for name in (*arch.interleaved, *arch.foreign_layers))
