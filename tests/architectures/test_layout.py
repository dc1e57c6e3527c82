"""Every family and spelling read as the roles it holds, and what fits nothing."""

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

from lowmem_adamms.architectures.arch import BUFFER, UNKNOWN
from lowmem_adamms.architectures.families import ARCHS
from lowmem_adamms.architectures.layout import Layout
from lowmem_adamms.architectures.recognise import recognise
from lowmem_adamms.checkpoints.checkpoint import Checkpoint, open_checkpoint
from lowmem_adamms.errors import MappingError

TOWER, CONNECTOR, NEWLINE = "vision tower", "connector", "image newline"
ONEVISION = {TOWER: 421, CONNECTOR: 4, NEWLINE: 1}
SMALL = DecoderDims(hidden=8, intermediate=12, layers=2, heads=2, kv_heads=1, vocab=20, head_dim=4)

# name: architecture, layers, tensors of the decoder, and how many of each other kind
EXPECTED: dict[str, tuple[str, int, int, dict[str, int]]] = {
    # 9 weights a layer; Qwen2 has 3 biases more, Qwen3 2 norms more; embed, norm, untied head
    "llama-2-7b": ("Llama", 32, 291, {}),
    "llama-3-8b": ("Llama", 32, 291, {}),
    "mistral-7b": ("Mistral", 32, 291, {}),
    "qwen2-1.5b": ("Qwen2", 28, 338, {}),
    "qwen2-7b": ("Qwen2", 28, 339, {}),
    "qwen2.5-3b": ("Qwen2", 36, 434, {}),
    "qwen3-8b": ("Qwen3", 36, 399, {}),
    "qwen2-vl-7b": ("Qwen2-VL", 28, 339, {TOWER: 385, CONNECTOR: 6}),
    "qwen2.5-vl-3b": ("Qwen2.5-VL", 36, 434, {TOWER: 385, CONNECTOR: 5}),
    "qwen2.5-vl-7b": ("Qwen2.5-VL", 28, 339, {TOWER: 385, CONNECTOR: 5}),
    "llava-1.5-7b-hf": ("LLaVA", 32, 291, {TOWER: 391, CONNECTOR: 4}),
    "llava-v1.6-mistral-7b-hf": ("LLaVA", 32, 291, {TOWER: 391, CONNECTOR: 4, NEWLINE: 1}),
    "llava-onevision-qwen2-7b-ov-hf": ("LLaVA-OneVision", 28, 339, ONEVISION),
    "llava-onevision-qwen2-7b-ov-lmms": ("LLaVA-OneVision (lmms-lab)", 28, 339, ONEVISION),
    "llava-1.5-7b-orig": ("LLaVA (liuhaotian)", 32, 291, {CONNECTOR: 4, BUFFER: 32}),
    "sharegpt4v-7b": ("LLaVA (liuhaotian)", 32, 291, {CONNECTOR: 4}),
    # 2 norms, 2 fused qkv, 2 dense, 6 MLP matrices a layer; in CogVLM2 the vision expert's bias
    "cogvlm-chat-7b": ("CogVLM", 32, 387, {TOWER: 2, CONNECTOR: 1}),
    "cogvlm2-llama3-chat-19b": ("CogVLM", 32, 419, {TOWER: 2, CONNECTOR: 1}),
    # q, o, 3 of the MLP, and twice k, v and both norms
    "mplug-owl2-llama2-7b": ("mPLUG-Owl2", 32, 419, {TOWER: 1, CONNECTOR: 1, BUFFER: 32}),
    # 8 layers of 13: 2 norms, 3 of the MLP, 6 of the attention, 2 gates
    "mllama-11b": ("Llama-style", 32, 291, {TOWER: 2, CONNECTOR: 1, "cross-attention layer": 104}),
    "internvl2_5-4b": ("InternVL", 36, 435, {TOWER: 1, CONNECTOR: 2}),
    "qwen2.5-omni-7b": (
        "Llama-style",
        28,
        339,
        {TOWER: 1, CONNECTOR: 1, "audio tower": 1, "talker": 2, "another decoder": 290},
    ),
    # 7 a layer
    "molmo-7b-d": ("Molmo", 28, 199, {TOWER: 1, CONNECTOR: 3, "rows of added tokens": 1}),
    "qwen-7b": ("Qwen and Qwen-VL", 32, 259, {}),
    "qwen-vl": ("Qwen and Qwen-VL", 32, 259, {TOWER: 1, CONNECTOR: 3}),
    "internlm2_5-7b-chat": ("InternLM2", 32, 227, {}),
    "internvl2_5-8b": ("InternVL", 32, 227, {TOWER: 1, CONNECTOR: 2}),
    # 6 a layer
    "phi-3.5-mini": ("Phi-3", 32, 195, {}),
    "phi-3.5-vision": ("Phi-3-style", 32, 195, {TOWER: 2}),
    "gemma-3-4b-text": ("Gemma 2-style", 34, 444, {}),
    "gemma-3-4b": ("Gemma 2-style", 34, 444, {TOWER: 1, CONNECTOR: 1}),
}


def layout_of(checkpoint: Checkpoint) -> Layout:
    return recognise(checkpoint, ARCHS)


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
    kinds = dict(Counter(layout.kinds.values()))
    assert (layout.arch, layout.layers, len(layout.blocks), kinds) == EXPECTED[name]
    assert (layout.assumed is None) == (not layout.arch.endswith("-style"))
    assert set(layout.blocks).isdisjoint(layout.kinds)
    assert set(layout.blocks) | set(layout.kinds) == set(FAMILIES[name].tensors)
    for tensor, blocks in layout.blocks.items():
        edges = [0, *(block.stop for block in blocks)]
        assert [block.start for block in blocks] == edges[:-1]
        assert edges[-1] == FAMILIES[name].tensors[tensor][1][0]
    for pieces in layout.pieces().values():
        edges = [0, *(block.last for _, block in pieces)]
        assert [block.first for _, block in pieces] == edges[:-1]


@pytest.mark.parametrize("name", EXPECTED)
def test_without_a_config_the_names_alone_explain_every_tensor(
    true_size: dict[str, Checkpoint], name: str
) -> None:
    layout = layout_of(replace(true_size[name], config={}))
    more = name == "molmo-7b-d"  # only its declaration tells the rows of added tokens
    assert (layout.layers, len(layout.blocks) - more) == EXPECTED[name][1:3]
    assert layout.arch.endswith("-style")
    assert layout.assumed is not None
    assert layout.assumed.startswith(f"no config.json; a {layout.arch} decoder under")


def test_grouped_queries_in_a_fused_tensor(true_size: dict[str, Checkpoint]) -> None:
    """CogVLM2: 4096 rows of q, 1024 each of k and v; the query is as wide as o_proj's input."""
    layout = layout_of(true_size["cogvlm2-llama3-chat-19b"])
    held = layout.blocks["model.layers.0.self_attn.vision_expert_query_key_value.weight"]
    assert [(block.start, block.stop) for block in held] == [(0, 4096), (4096, 5120), (5120, 6144)]


@pytest.mark.parametrize("rows", [4096, 6145, 0])
def test_a_fused_tensor_that_does_not_divide_is_refused_by_name(tmp_path: Path, rows: int) -> None:
    tensors = dict(FAMILIES["cogvlm-chat-7b"].tensors)
    name = "model.layers.7.self_attn.language_expert_query_key_value.weight"
    tensors[name] = ("BF16", (rows, 4096))
    checkpoint = hollow(tmp_path, tensors, FAMILIES["cogvlm-chat-7b"].config)
    with pytest.raises(MappingError, match=f"{re.escape(name)} has {rows} rows"):
        layout_of(checkpoint)


@pytest.mark.parametrize(("heads", "rows", "head_dim"), [(24, 6144, 170), (32, 6272, 128)])
def test_heads_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, heads: int, rows: int, head_dim: int
) -> None:
    """Rows of k and v that are cut into groups of query heads, but not into heads of their own."""
    family = FAMILIES["internlm2_5-7b-chat"]
    tensors = {
        name: (dtype, (rows, *shape[1:]) if "wqkv" in name else shape)
        for name, (dtype, shape) in family.tensors.items()
    }
    checkpoint = hollow(tmp_path, tensors, family.config | {"num_attention_heads": heads})
    with pytest.raises(MappingError, match=rf"wqkv\.weight has {rows} rows.*heads of {head_dim}"):
        layout_of(checkpoint)


@pytest.mark.parametrize("heads", [0, -1, None, "32"])
def test_without_a_number_of_heads_the_declared_size_is_taken(
    true_size: dict[str, Checkpoint], heads: object
) -> None:
    checkpoint = true_size["internlm2_5-7b-chat"]
    config = {**checkpoint.config, "num_attention_heads": heads}
    assert layout_of(replace(checkpoint, config=config)) == layout_of(checkpoint)


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
    "qwen2": ("Qwen2", QWEN2_ROLES),
    "qwen3": ("Qwen3", QWEN3_ROLES),
}
QWEN_VL = {"qwen2_vl": ("Qwen2-VL", QWEN2_ROLES), "qwen2_5_vl": ("Qwen2.5-VL", QWEN2_ROLES)}
LLAVAS = {
    "llava": ("LLaVA", LLAMA_ROLES),
    "llava_next": ("LLaVA", LLAMA_ROLES),
    "llava_onevision": ("LLaVA-OneVision", QWEN2_ROLES),
}
VISION = QWEN_VL | LLAVAS


def assert_recognised(folder: Path, arch: str, roles: set[str]) -> Layout:
    layout = layout_of(open_checkpoint(folder))
    assert (layout.arch, layout.assumed) == (arch, None)
    assert set(layout.roles()) == roles
    assert UNKNOWN not in layout.kinds.values()
    return layout


@pytest.mark.parametrize("family", TEXT_MODELS | VISION)
def test_what_transformers_writes(tiny_models: dict[str, Path], family: str) -> None:
    layout = assert_recognised(tiny_models[family], *(TEXT_MODELS | VISION)[family])
    assert {TOWER, CONNECTOR} <= set(layout.kinds.values()) or family in TEXT_MODELS


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
        ("llava", "Share4VLlamaForCausalLM", "LLaVA (liuhaotian)"),
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


def test_the_language_model_is_not_mistaken_for_an_embedding_elsewhere(tmp_path: Path) -> None:
    """A tower with `embed_tokens` of its own but no layers in the Llama way."""
    tensors = under("deep.down.model.", "deep.down.lm_head.weight")
    tensors |= {f"vision.{n}.weight": ("BF16", (4, 8)) for n in ("embed_tokens", "norm")}
    assert layout_of(hollow(tmp_path, tensors)).prefix == "deep.down.model."


def test_names_decide_where_the_announced_class_is_spelled_otherwise(tmp_path: Path) -> None:
    tensors = under("model.", "lm_head") | qwen2vl_tower(8)
    config = {"architectures": ["LlavaForConditionalGeneration"]}
    layout = layout_of(hollow(tmp_path, tensors, config))
    assert layout.arch == "Llama-style"
    assert layout.assumed is not None
    assert "LlavaForConditionalGeneration" in layout.assumed


def test_what_nobody_knows_is_a_role_by_its_own_name_in_the_decoder_alone(tmp_path: Path) -> None:
    names = ("layers.0.mamba.A_log", "per_layer_norm.weight", "altup.1.weight")
    strange = [f"model.{name}" for name in (*names, "strange.deep.weight", "vision_scale")]
    tensors = under("model.", "lm_head") | dict.fromkeys(strange, ("BF16", (2, 8)))
    layout = layout_of(hollow(tmp_path, tensors, {"architectures": ["LlamaForCausalLM"]}))
    assert layout.kinds == {strange[3]: UNKNOWN, strange[4]: TOWER}
    assert set(layout.roles()) == {*names, *LLAMA_ROLES}
    assert layout.assumed is None


def test_a_decoder_with_a_layer_missing_is_none(tmp_path: Path) -> None:
    tensors = under("model.", "lm_head", replace(SMALL, layers=3))
    tensors = {name: spec for name, spec in tensors.items() if ".layers.1." not in name}
    with pytest.raises(MappingError, match="no decoder found"):
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


def test_names_and_the_ancestors_of_a_class_are_told_apart() -> None:
    assert len({arch.name for arch in ARCHS}) == len(ARCHS)
    for cls in {cls for arch in ARCHS for cls in arch.classes}:
        decoders = [arch.decoder for arch in ARCHS if cls in arch.classes]
        assert all(decoders.count(decoder) == 1 for decoder in decoders)
