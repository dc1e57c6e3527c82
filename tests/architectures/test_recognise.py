"""Which declaration is taken: a user's, a known one, a known decoder elsewhere, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import (
    DecoderDims,
    Family,
    Tensors,
    cogvlm_decoder,
    llama_decoder,
    mplug_decoder,
    write_headers,
)

from lowmem_adamms.architectures.arch import UNKNOWN, Arch
from lowmem_adamms.architectures.families import ARCHS
from lowmem_adamms.architectures.layout import Layout, read_layout
from lowmem_adamms.architectures.names import read_stem
from lowmem_adamms.architectures.recognise import recognise
from lowmem_adamms.architectures.structure import ANOTHER
from lowmem_adamms.checkpoints.checkpoint import Checkpoint, open_checkpoint
from lowmem_adamms.errors import MappingError

SMALL = DecoderDims(hidden=8, intermediate=12, layers=2, heads=2, kv_heads=1, vocab=20, head_dim=4)
BIG = replace(SMALL, layers=4, vocab=80)
LLAMA = next(arch for arch in ARCHS if arch.name == "Llama")
SHAPES = {
    "embed": (20, 8),
    "norm": (8,),
    "attn.q.weight": (8, 8),
    "attn.k.weight": (4, 8),
    "attn.v.weight": (4, 8),
    "attn.o.weight": (8, 8),
    "attn.q_norm.weight": (4,),
    "attn.k_norm.weight": (4,),
    "mlp.gate.weight": (12, 8),
    "mlp.up.weight": (12, 8),
    "mlp.down.weight": (8, 12),
}
ODD = Arch(
    name="Odd",
    source="made up",
    classes=("OddForCausalLM",),
    spellings=(("odd.", "odd.out.weight"),),
    decoder={name.replace("self_attn", "att"): held for name, held in LLAMA.decoder.items()},
    others={"eye.": "vision tower"},
)


def hollow(folder: Path, tensors: Tensors, cls: str | None = "FooForCausalLM") -> Checkpoint:
    """A checkpoint of these names and shapes, without data."""
    config: dict[str, Any] = {"architectures": [cls]} if cls else {}
    config["num_attention_heads"] = SMALL.heads
    write_headers(folder, Family("hollow", config, tensors))
    return open_checkpoint(folder)


def shape(role: str) -> tuple[int, ...]:
    plain = role.partition("@")[0].removeprefix("layers.#.")
    if plain.endswith("norm.weight") and plain not in SHAPES:
        return (8,)
    if plain.endswith(".bias"):
        return SHAPES[plain.replace(".bias", ".weight")][:1]
    return SHAPES[plain]


def spelled(decoder: Mapping[str, str], prefix: str, head: str) -> Tensors:
    """A decoder of two layers with every tensor that its declaration knows, but no experts."""
    tensors: Tensors = {head: ("BF16", (20, 8))}
    for name, held in decoder.items():
        if "*" in held or ".router." in held:
            continue
        shapes = [shape(role) for role in held.split()] or [(4,)]
        joined = (sum(one[0] for one in shapes), *shapes[0][1:])
        for layer in ("0", "1") if "#" in name else ("",):
            tensors[prefix + name.replace("#", layer)] = ("BF16", joined)
    return tensors


def odd(prefix: str = "odd.", head: str = "odd.out.weight") -> Tensors:
    return spelled(ODD.decoder, prefix, head)


# Known families: the decoder's prefix on the Hub, something of the tower, of the connector

PUBLISHED = {
    "Idefics3": ("model.text_model.", "model.vision_model.x", "model.connector.x"),
    "SmolVLM": ("model.text_model.", "model.vision_model.x", "model.connector.x"),
    "Qwen3-VL": ("model.language_model.", "model.visual.x", "model.visual.deepstack_merger_list.x"),
    "Qwen2.5-Omni's thinker": ("model.", "visual.blocks.x", "visual.merger.x"),
    "LLaVA-OneVision-1.5": ("model.", "visual.blocks.x", "visual.merger.x"),
    "InternVL (-hf)": ("language_model.model.", "vision_tower.x", "multi_modal_projector.x"),
    "MiniCPM-V": ("llm.model.", "vpm.x", "resampler.x"),
    "VideoLLaMA3": ("model.", "model.vision_encoder.x", "model.mm_projector.x"),
    "VideoLLaMA3 (-hf)": ("model.language_model.", "model.vision_model.x", "model.projector.x"),
    "Ovis2": ("llm.model.", "visual_tokenizer.x", "vte.x"),
    "PaliGemma": ("language_model.model.", "vision_tower.x", "multi_modal_projector.x"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_are_known(tmp_path: Path, name: str) -> None:
    prefix, tower, connector = PUBLISHED[name]
    declared = [arch.classes[0] for arch in ARCHS if arch.name == name]
    stem = "" if prefix.startswith("model.") else prefix.removesuffix("model.")
    eyes: Tensors = {tower: ("BF16", (2, 3)), connector: ("BF16", (2, 3))}
    tensors = llama_decoder(SMALL, prefix, f"{stem}lm_head") | eyes
    for cls in (*declared, None):
        layout = recognise(hollow(tmp_path / str(cls), tensors, cls), ARCHS)
        assert layout.kinds == {tower: "vision tower", connector: "connector"}
        assert layout.prefix == prefix
        assert layout.arch == name or cls is None


# By structure: one decoder


@pytest.mark.parametrize("prefix", ["", "some.where."])
@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
def test_every_known_decoder_is_found_under_any_prefix(
    tmp_path: Path, arch: Arch, prefix: str
) -> None:
    leaf = ".".join(arch.spellings[0][1].split(".")[-2:]) or "lm_head.weight"
    for number, head in enumerate((f"{prefix}lm_head.weight", f"{prefix[:5]}{leaf}")):
        eyes = ("eye.conv.weight", "vision_tower.conv.weight")
        tensors = spelled(arch.decoder, prefix, head) | dict.fromkeys(eyes, ("BF16", (2, 3)))
        checkpoint = hollow(tmp_path / str(number), tensors)
        layout = recognise(checkpoint, ARCHS)
        expected = read_layout(checkpoint, arch, head, read_stem(checkpoint, prefix))
        assert expected is not None
        assert layout.blocks == expected.blocks
        assert layout.roles()["head"][0] == head
        assert [layout.kinds[name] for name in eyes] == [UNKNOWN, "vision tower"]
        assert layout.prefix == prefix
        assert layout.arch.endswith("-style")
        assert layout.assumed is not None
        assert repr(prefix) in layout.assumed
        assert "FooForCausalLM" in layout.assumed


def test_a_decoder_of_experts_is_not_taken_for_a_plain_one(tmp_path: Path) -> None:
    for number, (make, name) in enumerate(
        ((cogvlm_decoder, "CogVLM-style"), (mplug_decoder, "mPLUG-Owl2-style"))
    ):
        tensors = {f"deep.{name}": spec for name, spec in make(SMALL).items()}
        layout = recognise(hollow(tmp_path / str(number), tensors), ARCHS)
        assert (layout.arch, layout.prefix) == (name, "deep.model.")
        assert UNKNOWN not in layout.kinds.values()


def test_of_two_heads_the_nearer_one_is_taken(tmp_path: Path) -> None:
    tensors = llama_decoder(SMALL, "a.llm.model.", "a.llm.lm_head")
    tensors |= {"lm_head.weight": ("BF16", (20, 8)), "a.lm_head.weight": ("BF16", (20, 8))}
    assert recognise(hollow(tmp_path, tensors), ARCHS).roles()["head"][0] == "a.llm.lm_head.weight"


@pytest.mark.parametrize("head", [(20, 4), (10, 8), (8,), (20, 8, 1)])
def test_a_head_that_cannot_be_the_decoders_is_not_taken(
    tmp_path: Path, head: tuple[int, ...]
) -> None:
    tensors = llama_decoder(replace(SMALL, tied=True), "a.") | {"lm_head.weight": ("BF16", head)}
    layout = recognise(hollow(tmp_path, tensors), ARCHS)
    assert "head" not in layout.roles()
    assert layout.kinds["lm_head.weight"] == UNKNOWN


def test_two_spellings_with_other_meanings_are_not_guessed(tmp_path: Path) -> None:
    """As [gate; up] and [up; gate] under one name would be."""
    swap = {"mlp.gate_proj": "mlp.up_proj", "mlp.up_proj": "mlp.gate_proj"}
    decoder = {
        next((name.replace(a, b) for a, b in swap.items() if a in name), name): held
        for name, held in LLAMA.decoder.items()
    }
    checkpoint = hollow(tmp_path, llama_decoder(SMALL, "a.", "a.lm_head"))
    other = replace(LLAMA, name="Swapped", decoder=decoder)
    with pytest.raises(MappingError, match=r"Llama and a Swapped decoder.*mlp\.\w+_proj"):
        recognise(checkpoint, (LLAMA, other))
    own = replace(other, spellings=(("elsewhere.", "elsewhere.head.weight"),))
    assert recognise(checkpoint, (LLAMA,), [own]).arch == "Swapped-style"


def test_of_two_fitting_spellings_the_one_that_explains_more_is_taken(tmp_path: Path) -> None:
    decoder = {**LLAMA.decoder, "layers.#.extra.weight": "layers.#.attn_post_norm.weight"}
    richer = replace(LLAMA, name="Richer", decoder=decoder)
    tensors = llama_decoder(SMALL, "a.", "a.lm_head")
    more = {f"a.layers.{i}.extra.weight": ("BF16", (8,)) for i in range(2)}
    for number, (held, name) in enumerate(
        ((tensors, "Llama-style"), (tensors | more, "Richer-style"))
    ):
        checkpoint = hollow(tmp_path / str(number), held)
        assert recognise(checkpoint, (LLAMA, richer)).arch == name


# By structure: several decoders


def decoders(*sides: tuple[str, str, DecoderDims]) -> Tensors:
    return {
        name: spec
        for prefix, head, dims in sides
        for name, spec in llama_decoder(
            replace(dims, tied=not head), prefix, head.removesuffix(".weight")
        ).items()
    }


def assert_chosen(layout: Layout, prefix: str, other: str) -> None:
    assert layout.prefix == prefix
    assert layout.assumed is not None
    assert f"decoder under {prefix!r}" in layout.assumed
    assert f"layers under {other!r}" in layout.assumed
    assert layout.kinds[f"{other}layers.0.self_attn.q_proj.weight"] == ANOTHER


def test_an_omni_models_thinker_is_taken_and_its_talker_left(tmp_path: Path) -> None:
    tensors = decoders(
        ("voice.model.", "voice.codec_head.weight", SMALL),
        ("mind.model.", "mind.lm_head.weight", BIG),
    )
    layout = recognise(hollow(tmp_path, tensors, "FooOmniModel"), ARCHS)
    assert_chosen(layout, "mind.model.", "voice.model.")
    assert layout.roles()["head"][0] == "mind.lm_head.weight"
    assert layout.kinds["voice.codec_head.weight"] == "talker"
    assert layout.layers == 4


@pytest.mark.parametrize("tower", [SMALL, BIG])
def test_a_text_tower_without_a_head_is_not_the_language_model(
    tmp_path: Path, tower: DecoderDims
) -> None:
    tensors = decoders(("text.", "", tower), ("zzz.llm.", "zzz.lm_head.weight", BIG))
    assert_chosen(recognise(hollow(tmp_path, tensors), ARCHS), "zzz.llm.", "text.")


def test_a_head_as_near_to_the_one_as_to_the_other_is_the_larger_ones(tmp_path: Path) -> None:
    tensors = decoders(("m.text.", "", replace(BIG, layers=3)), ("m.zzz.", "lm_head.weight", BIG))
    layout = recognise(hollow(tmp_path, tensors), ARCHS)
    assert_chosen(layout, "m.zzz.", "m.text.")
    assert layout.roles()["head"][0] == "lm_head.weight"


def test_of_decoders_without_a_head_the_far_larger_is_taken(tmp_path: Path) -> None:
    tensors = decoders(("text.", "", SMALL), ("zzz.llm.", "", BIG))
    assert_chosen(recognise(hollow(tmp_path, tensors), ARCHS), "zzz.llm.", "text.")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("a.", "a.lm_head.weight", SMALL), ("b.", "b.lm_head.weight", SMALL)),
        (("a.", "a.lm_head.weight", SMALL), ("b.", "b.lm_head.weight", replace(SMALL, layers=3))),
        (("a.", "", SMALL), ("b.", "", replace(SMALL, layers=3))),
        (("a.", "a.lm_head.weight", SMALL), ("b.", "", BIG)),
        (("a.", "", SMALL), ("b.", "lm_head.weight", SMALL)),
    ],
)
def test_a_guess_between_decoders_is_refused(tmp_path: Path, first: Any, second: Any) -> None:
    checkpoint = hollow(tmp_path, decoders(first, second))
    with pytest.raises(MappingError, match=r"which decoder is the language model\?") as caught:
        recognise(checkpoint, ARCHS)
    for words in ("layers under 'a.'", "layers under 'b.'", "`arch`", str(tmp_path)):
        assert words in str(caught.value)


def test_where_the_config_ties_the_head_size_alone_decides(tmp_path: Path) -> None:
    tensors = decoders(("a.", "a.lm_head.weight", SMALL), ("b.", "", BIG))
    checkpoint = hollow(tmp_path, tensors)
    checkpoint = replace(checkpoint, config={**checkpoint.config, "tie_word_embeddings": True})
    assert_chosen(recognise(checkpoint, ARCHS), "b.", "a.")


def test_a_declaration_says_which_of_two_decoders(tmp_path: Path) -> None:
    head = "b.lm_head.weight"
    checkpoint = hollow(tmp_path, decoders(("a.", "a.lm_head.weight", BIG), ("b.", head, SMALL)))
    own = replace(LLAMA, name="B", classes=("FooForCausalLM",), spellings=(("b.", head),))
    layout = recognise(checkpoint, ARCHS, [own])
    assert (layout.arch, layout.prefix, layout.layers) == ("B", "b.", 2)
    assert layout.assumed is None


# A user's declarations


def test_a_declared_family_is_read_by_its_class(tmp_path: Path) -> None:
    tensors = odd() | {"eye.conv.weight": ("BF16", (2, 3)), "ear.conv.weight": ("BF16", (2, 3))}
    layout = recognise(hollow(tmp_path, tensors, "OddForCausalLM"), ARCHS, [ODD])
    assert (layout.arch, layout.assumed, layout.declared) == ("Odd", None, True)
    assert layout.roles()["head"][0] == "odd.out.weight"
    assert layout.kinds["eye.conv.weight"] == "vision tower"
    assert layout.kinds["ear.conv.weight"] == UNKNOWN


def test_a_declaration_goes_before_ours_of_the_same_class(tmp_path: Path) -> None:
    """Even one that explains less."""
    tensors = llama_decoder(SMALL) | {"model.layers.0.self_attn.q_proj.bias": ("BF16", (8,))}
    checkpoint = hollow(tmp_path, tensors, "LlamaForCausalLM")
    decoder = {name: held for name, held in LLAMA.decoder.items() if ".bias" not in name}
    own = replace(LLAMA, name="Mine", decoder=decoder)
    assert recognise(checkpoint, ARCHS, [own]).arch == "Mine"
    layout = recognise(checkpoint, ARCHS, [replace(own, classes=("MineForCausalLM",))])
    assert (layout.arch, layout.declared) == ("Llama", False)


def test_without_a_class_names_that_are_explained_go_to_the_declaration(tmp_path: Path) -> None:
    checkpoint = hollow(tmp_path, llama_decoder(SMALL), None)
    layout = recognise(checkpoint, ARCHS, [replace(LLAMA, name="Mine")])
    assert (layout.arch, layout.declared) == ("Mine", True)
    assert (
        layout.assumed == "no config.json; taken for Mine, declared by `arch`, by its tensor names"
    )


def test_a_declaration_that_explains_less_goes_before_a_guess(tmp_path: Path) -> None:
    own = replace(LLAMA, name="Mine")
    tensors = llama_decoder(SMALL)
    tensors["eye.conv.weight"] = ("BF16", (2, 3))
    assert recognise(hollow(tmp_path / "strange", tensors), ARCHS, [own]).arch == "Mine"


def test_a_declared_decoder_is_tried_under_other_prefixes_too(tmp_path: Path) -> None:
    checkpoint = hollow(tmp_path, odd("elsewhere.", "out.weight"))
    layout = recognise(checkpoint, ARCHS, [ODD])
    assert (layout.arch, layout.prefix) == ("Odd-style", "elsewhere.")
    assert layout.roles()["head"][0] == "out.weight"


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("odd.embed_tokens.weight", "odd.embed_tokens.weight"),
        ("odd.layers.0.", "odd.layers.0."),
        ("odd.layers.", "odd.layers.0."),
    ],
)
def test_a_declared_class_that_is_spelled_otherwise_is_an_error(
    tmp_path: Path, lost: str, named: str
) -> None:
    """Not a reason to look for another family that fits: the user has said which it is."""
    tensors = {name: spec for name, spec in odd().items() if not name.startswith(lost)}
    tensors |= llama_decoder(SMALL)
    checkpoint = hollow(tmp_path, tensors, "OddForCausalLM")
    with pytest.raises(MappingError, match=rf"declares as Odd.*there is no {named};"):
        recognise(checkpoint, ARCHS, [ODD])
    assert recognise(checkpoint, ARCHS).prefix == "model."


def test_what_a_declaration_lacks_is_told_of_the_nearest_spelling(tmp_path: Path) -> None:
    arch = replace(ODD, spellings=(("far.", "far.out.weight"), *ODD.spellings))
    tensors = odd()
    del tensors["odd.embed_tokens.weight"]
    with pytest.raises(MappingError, match=r"there is no odd\.embed_tokens\.weight"):
        recognise(hollow(tmp_path, tensors, "OddForCausalLM"), ARCHS, [arch])


# Nothing


@pytest.mark.parametrize(
    ("drop", "lost"), [("layers.", r"a\.layers\.0\."), ("layers.0.", r"a\.layers\.0\.")]
)
def test_what_comes_nearest_to_a_decoder_is_told(tmp_path: Path, drop: str, lost: str) -> None:
    whole = llama_decoder(SMALL, "a.", "a.lm_head")
    tensors = {name: spec for name, spec in whole.items() if not name.startswith(f"a.{drop}")}
    with pytest.raises(
        MappingError, match=rf"no decoder found.*under 'a\.', has no {lost};.*`arch`"
    ):
        recognise(hollow(tmp_path, tensors), ARCHS)


def test_layers_that_the_config_speaks_of_must_be_there(tmp_path: Path) -> None:
    checkpoint = hollow(tmp_path, llama_decoder(SMALL))
    config = {**checkpoint.config, "num_hidden_layers": 3, "hidden_size": 8}
    with pytest.raises(MappingError, match=r"holds 2 decoder layers under 'model\.'.*says 3"):
        recognise(replace(checkpoint, config=config), ARCHS)
    for other in ({"num_hidden_layers": 2}, {"hidden_size": 9}, {"num_hidden_layers": 1}):
        recognise(replace(checkpoint, config=config | other), ARCHS)


@pytest.mark.parametrize("name", ["bert.layer.0.weight", "model.embed_tokens.weight"])
def test_no_decoder_at_all_is_told(tmp_path: Path, name: str) -> None:
    checkpoint = hollow(tmp_path, {name: ("F32", (2, 2))})
    with pytest.raises(
        MappingError, match=rf"no decoder found among its 1 tensors.*{name}.*`arch`"
    ):
        recognise(checkpoint, ARCHS)


# What is in the file decides


def gemma2(prefix: str) -> Tensors:
    norms = {f"{kind}_feedforward_layernorm": (8,) for kind in ("pre", "post")}
    more = {
        f"{prefix}layers.{layer}.{name}.weight": ("BF16", shape)
        for layer in range(2)
        for name, shape in norms.items()
    }
    return llama_decoder(SMALL, prefix, "language_model.lm_head") | more


def test_the_file_decides_how_a_known_class_is_spelled(tmp_path: Path) -> None:
    """LLaVA around Gemma 2 has its four norms, and Ovis too."""
    for cls, prefix in (("LlavaForConditionalGeneration", "language_model.model."), ("X", "llm.")):
        layout = recognise(hollow(tmp_path / cls, gemma2(prefix), cls), ARCHS)
        held = {name: blocks[0].role for name, blocks in layout.blocks.items()}
        stem = f"{prefix}layers.0."
        assert held[f"{stem}post_attention_layernorm.weight"] == "layers.0.attn_post_norm.weight"
        assert held[f"{stem}pre_feedforward_layernorm.weight"] == "layers.0.mlp_norm.weight"
        assert held[f"{stem}post_feedforward_layernorm.weight"] == "layers.0.mlp_post_norm.weight"


def test_layers_of_several_kinds_are_read_as_they_are(tmp_path: Path) -> None:
    tensors = llama_decoder(SMALL)
    for part in "qkvo":
        del tensors[f"model.layers.0.self_attn.{part}_proj.weight"]
    own = {"linear_attn.A_log": (2,), "linear_attn.in_proj.weight": (16, 8)}
    tensors |= {f"model.layers.0.{name}": ("BF16", shape) for name, shape in own.items()}
    layout = recognise(hollow(tmp_path, tensors), ARCHS)
    assert {f"layers.0.{name}" for name in own} <= set(layout.roles())
    assert "layers.1.attn.q.weight" in layout.roles()
    assert layout.layers == 2


def test_the_configs_sizes_tell_the_language_model(tmp_path: Path) -> None:
    tensors = decoders(("a.", "", SMALL), ("b.", "", replace(SMALL, layers=3)))
    checkpoint = hollow(tmp_path, tensors)
    for layers, prefix in ((2, "a."), (3, "b.")):
        text = {"num_hidden_layers": layers, "hidden_size": 8}
        for config in (text, {"text_config": text}, {"llm_config": {"text_config": text}}):
            layout = recognise(replace(checkpoint, config={"x": 1, **config}), ARCHS)
            assert layout.prefix == prefix


@pytest.mark.parametrize("word", ["depth_decoder", "talker", "gemma_expert", "model.dit"])
def test_a_prefix_that_speaks_of_something_else_is_no_language_model(
    tmp_path: Path, word: str
) -> None:
    tensors = decoders((f"{word}.", "", SMALL), ("lm.", "", SMALL))
    assert recognise(hollow(tmp_path, tensors), ARCHS).prefix == "lm."
    alone = recognise(hollow(tmp_path / "alone", decoders((f"{word}.", "", SMALL))), ARCHS)
    assert alone.prefix == f"{word}."


def test_a_head_beside_the_decoder_is_not_its_own(tmp_path: Path) -> None:
    """PI0's action expert has one as wide and as long as the language model's embedding."""
    tensors = decoders(("a.model.", "", SMALL)) | {"b.lm_head.weight": ("BF16", (20, 8))}
    layout = recognise(hollow(tmp_path, tensors), ARCHS)
    assert "head" not in layout.roles()
    assert layout.kinds["b.lm_head.weight"] == UNKNOWN


def test_layers_that_predict_more_tokens_are_left_alone(tmp_path: Path) -> None:
    tensors = llama_decoder(replace(SMALL, layers=3))
    tensors["model.layers.2.eh_proj.weight"] = ("BF16", (8, 16))
    tensors["mtp.fc.weight"] = ("BF16", (8, 16))
    layout = recognise(hollow(tmp_path, tensors), ARCHS)
    assert layout.layers == 2
    assert set(layout.kinds.values()) == {"multi-token prediction"}
    assert len(layout.kinds) == 9 + 2


def test_an_encoder_decoder_is_refused_for_what_it_is(tmp_path: Path) -> None:
    checkpoint = hollow(tmp_path, llama_decoder(SMALL))
    config = {"text_config": {"is_encoder_decoder": True}}
    with pytest.raises(MappingError, match=r"an encoder-decoder, by its config\.json"):
        recognise(replace(checkpoint, config=config), ARCHS)
    crossed = {f"model.layers.{i}.encoder_attn.q_proj.weight": ("BF16", (8, 8)) for i in (0, 1)}
    with pytest.raises(MappingError, match="no decoder found"):
        recognise(hollow(tmp_path / "crossed", llama_decoder(SMALL) | crossed), ARCHS)


def test_towers_under_the_decoders_prefix_are_none_of_its_roles(tmp_path: Path) -> None:
    own = ("per_layer.proj.weight", "mixer.deep.er.weight")
    towers = ("embed_tokens_extend.audio_embed.x.weight", "image_newline")
    tensors = llama_decoder(SMALL, "language_model.model.", "lm_head")
    tensors |= {f"language_model.model.{name}": ("BF16", (2, 8)) for name in (*own, *towers)}
    layout = recognise(hollow(tmp_path, tensors), ARCHS)
    assert set(own) < set(layout.roles())
    assert sorted(layout.kinds.values()) == ["audio tower", "image newline"]


def test_csm_is_its_backbone_and_higgs_audio_has_copies(tmp_path: Path) -> None:
    backbone = llama_decoder(SMALL, "backbone_model.")
    depth = llama_decoder(SMALL, "depth_decoder.model.", "depth_decoder.head")
    tensors = backbone | depth | {"embed_text_tokens.weight": ("BF16", (20, 8))}
    del tensors["backbone_model.embed_tokens.weight"]
    csm = recognise(hollow(tmp_path / "c", tensors, "CsmForConditionalGeneration"), ARCHS)
    assert csm.roles()["embed"][0] == "embed_text_tokens.weight"
    assert "head" not in csm.roles()
    assert csm.kinds["lm_head.weight"] == "head of audio codes"
    assert all(name.startswith(("backbone_model.", "embed_text")) for name in csm.blocks)
    tensors = llama_decoder(SMALL)
    for name in [name for name in tensors if ".mlp." in name]:
        tensors[name.replace(".mlp.", ".audio_mlp.")] = tensors[name]
    higgs = recognise(
        hollow(tmp_path / "h", tensors, "HiggsAudioV2ForConditionalGeneration"), ARCHS
    )
    assert "layers.1.mlp.up.weight@audio" in higgs.roles()


def test_of_spellings_that_explain_as_much_the_first_is_taken(tmp_path: Path) -> None:
    """Latent attention and experts fit ERNIE 4.5 VL's spelling as well, whose router is another."""
    tensors = {name: spec for name, spec in llama_decoder(SMALL).items() if "self_attn" not in name}
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.self_attn.kv_b_proj.weight"] = ("BF16", (8, 4))
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = ("BF16", (4, 8))
    layout = recognise(hollow(tmp_path, tensors), ARCHS)
    assert layout.arch == "Llama-style"
    assert "layers.1.mlp.router.weight" in layout.roles()
