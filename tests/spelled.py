"""One tiny decoder written as every family writes it, with numpy alone: the oracle for joins.

A text is a dictionary of float32 arrays: `embed`, `norm`, `head`, and `0.q`, `0.gate`, … for each
layer. A speller turns it into the tensors of one family. What is fused or interleaved there is
joined here as the authors' code describes it, without any of the package's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Array: TypeAlias = "npt.NDArray[np.float32]"
Arrays: TypeAlias = dict[str, Array]

HIDDEN, INNER, LAYERS, ROWS = 32, 40, 2, 24
HEADS, KV, DIM = 4, 2, 8
KV_ROWS = KV * DIM


@dataclass(frozen=True, slots=True)
class Line:
    """A line of descent: what a layer has besides Llama's matrices and two norms."""

    bias: bool = False
    grouped: bool = True
    head_norms: bool = False
    wide_norms: bool = False  # over all heads at once
    four_norms: bool = False


LINES = {
    "internlm2": Line(),
    "phi3": Line(),
    "llama3": Line(),
    "qwen": Line(bias=True, grouped=False),
    "qwen2": Line(bias=True),
    "qwen3": Line(head_norms=True),
    "gemma": Line(),
    "gemma2": Line(four_norms=True),
    "olmo2": Line(wide_norms=True),
}


def ancestor(line: str, seed: int) -> Arrays:
    """A random decoder."""
    kind, random = LINES[line], np.random.default_rng(seed)
    kv = KV_ROWS if kind.grouped else HIDDEN
    shapes: dict[str, tuple[int, ...]] = {
        "q": (HIDDEN, HIDDEN),
        "k": (kv, HIDDEN),
        "v": (kv, HIDDEN),
        "o": (HIDDEN, HIDDEN),
        "gate": (INNER, HIDDEN),
        "up": (INNER, HIDDEN),
        "down": (HIDDEN, INNER),
        "attn_norm": (HIDDEN,),
        "mlp_norm": (HIDDEN,),
    }
    if kind.bias:
        shapes |= {"q.bias": (HIDDEN,), "k.bias": (kv,), "v.bias": (kv,)}
    if kind.head_norms:
        shapes |= {"q_norm": (DIM,), "k_norm": (DIM,)}
    if kind.wide_norms:
        shapes |= {"q_norm": (HIDDEN,), "k_norm": (kv,)}
    if kind.four_norms:
        shapes |= {"attn_post_norm": (HIDDEN,), "mlp_post_norm": (HIDDEN,)}
    text: dict[str, tuple[int, ...]] = {
        "embed": (ROWS, HIDDEN),
        "norm": (HIDDEN,),
        "head": (ROWS, HIDDEN),
        **{f"{layer}.{name}": shape for layer in range(LAYERS) for name, shape in shapes.items()},
    }
    return {name: random.standard_normal(shape, np.float32) for name, shape in text.items()}


def descend(text: Arrays, seed: int) -> Arrays:
    """A fine-tune: every weight a little off."""
    random = np.random.default_rng(1000 + seed)
    return {
        name: (array + 0.1 * random.standard_normal(array.shape)).astype(np.float32)
        for name, array in text.items()
    }


def layer_of(text: Arrays, layer: int) -> Arrays:
    """One layer's arrays by their short names."""
    stem = f"{layer}."
    return {name.removeprefix(stem): a for name, a in text.items() if name.startswith(stem)}


# Layers as the families spell them


def llama_layer(part: Arrays) -> Arrays:
    """Llama, Mistral, Qwen2, Qwen3."""
    return _split(part, attn_norm="input_layernorm", mlp_norm="post_attention_layernorm")


def gemma2_layer(part: Arrays) -> Arrays:
    """Gemma 2 and 3."""
    return _split(
        part,
        attn_norm="input_layernorm",
        attn_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    )


def olmo2_layer(part: Arrays) -> Arrays:
    """OLMo 2."""
    return _split(part, attn_norm="post_attention_layernorm", mlp_norm="post_feedforward_layernorm")


def _split(part: Arrays, **norms: str) -> Arrays:
    out = {f"{name}.weight": part[norm] for norm, name in norms.items()}
    out |= {f"self_attn.{n}_proj.weight": part[n] for n in "qkvo"}
    out |= {f"mlp.{n}_proj.weight": part[n] for n in ("gate", "up", "down")}
    for n in "qkv":
        if f"{n}.bias" in part:
            out[f"self_attn.{n}_proj.bias"] = part[f"{n}.bias"]
        if f"{n}_norm" in part:
            out[f"self_attn.{n}_norm.weight"] = part[f"{n}_norm"]
    return out


def internlm2_layer(part: Arrays) -> Arrays:
    """wqkv: for each key-value head its queries, its key, its value."""
    wqkv = np.concatenate(
        [
            part["q"].reshape(KV, HEADS // KV, DIM, HIDDEN),
            part["k"].reshape(KV, 1, DIM, HIDDEN),
            part["v"].reshape(KV, 1, DIM, HIDDEN),
        ],
        axis=1,
    ).reshape(-1, HIDDEN)
    return {
        "attention.wqkv.weight": wqkv,
        "attention.wo.weight": part["o"],
        "feed_forward.w1.weight": part["gate"],
        "feed_forward.w2.weight": part["down"],
        "feed_forward.w3.weight": part["up"],
        "attention_norm.weight": part["attn_norm"],
        "ffn_norm.weight": part["mlp_norm"],
    }


def phi3_layer(part: Arrays) -> Arrays:
    """[q; k; v] and [gate; up]."""
    return {
        "self_attn.qkv_proj.weight": np.vstack([part["q"], part["k"], part["v"]]),
        "self_attn.o_proj.weight": part["o"],
        "mlp.gate_up_proj.weight": np.vstack([part["gate"], part["up"]]),
        "mlp.down_proj.weight": part["down"],
        "input_layernorm.weight": part["attn_norm"],
        "post_attention_layernorm.weight": part["mlp_norm"],
    }


def molmo_layer(part: Arrays) -> Arrays:
    """[q; k; v] and [up; gate]."""
    out = {
        "att_proj.weight": np.vstack([part["q"], part["k"], part["v"]]),
        "attn_out.weight": part["o"],
        "ff_proj.weight": np.vstack([part["up"], part["gate"]]),
        "ff_out.weight": part["down"],
        "attn_norm.weight": part["attn_norm"],
        "ff_norm.weight": part["mlp_norm"],
    }
    if "q.bias" in part:
        out["att_proj.bias"] = np.concatenate([part[f"{n}.bias"] for n in "qkv"])
    return out | {f"{n}_norm.weight": part[f"{n}_norm"] for n in "qk" if f"{n}_norm" in part}


def qwen_layer(part: Arrays) -> Arrays:
    """The first Qwen: w2 is the gate."""
    return {
        "attn.c_attn.weight": np.vstack([part["q"], part["k"], part["v"]]),
        "attn.c_attn.bias": np.concatenate([part[f"{n}.bias"] for n in "qkv"]),
        "attn.c_proj.weight": part["o"],
        "mlp.w1.weight": part["up"],
        "mlp.w2.weight": part["gate"],
        "mlp.c_proj.weight": part["down"],
        "ln_1.weight": part["attn_norm"],
        "ln_2.weight": part["mlp_norm"],
    }


# Whole checkpoints


@dataclass(frozen=True, slots=True)
class Speller:
    """How one family writes a text: its class, its layers, what is around them, its own tensors."""

    cls: str
    layer: Callable[[Arrays], Arrays] = llama_layer
    prefix: str = "model."
    head: str = "lm_head.weight"
    embed: str = "embed_tokens.weight"
    norm: str = "norm.weight"
    layers: str = "layers"
    own: tuple[str, ...] = ()
    nest: str | None = None  # where config.json has the decoder's sizes
    foreign: tuple[int, ...] = ()  # layers that are not the ancestor's
    experts: bool = False

    def __call__(self, text: Arrays, vision: Arrays, seed: int) -> Arrays:
        """The tensors; `vision` is what the vision experts are, where the family has such."""
        random = np.random.default_rng(seed)

        def draw(*shape: int) -> Array:
            return random.standard_normal(shape, np.float32)

        out = {
            self.prefix + self.embed: text["embed"],
            self.prefix + self.norm: text["norm"],
            self.head: text["head"],
            **{name: draw(5, 7) for name in self.own},
        }
        numbers = [i for i in range(LAYERS + len(self.foreign)) if i not in self.foreign]
        for layer, number in enumerate(numbers):
            stem = f"{self.prefix}{self.layers}.{number}."
            if self.experts:
                written = _cogvlm2_layer(layer_of(text, layer), layer_of(vision, layer))
                bias = "self_attn.vision_expert_query_key_value.bias"
                written[bias] = draw(HIDDEN + 2 * KV_ROWS)
            else:
                written = self.layer(layer_of(text, layer))
            out |= {stem + name: array for name, array in written.items()}
        for number in self.foreign:
            stem = f"{self.prefix}{self.layers}.{number}."
            out[f"{stem}cross_attn.q_proj.weight"] = draw(HIDDEN, HIDDEN)
            out[f"{stem}mlp.up_proj.weight"] = draw(INNER, HIDDEN)
            out[f"{stem}input_layernorm.weight"] = draw(HIDDEN)
        return out

    def write(self, folder: Path, tensors: Arrays) -> Path:
        """A checkpoint folder of these tensors."""
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        sizes: dict[str, Any] = {"num_attention_heads": HEADS, "num_key_value_heads": KV}
        config: dict[str, Any] = {"architectures": [self.cls], "tie_word_embeddings": False}
        config |= {self.nest: sizes} if self.nest else sizes
        (folder / "config.json").write_text(json.dumps(config))
        return folder


def _cogvlm2_layer(text: Arrays, vision: Arrays) -> Arrays:
    out = {
        "input_layernorm.weight": text["attn_norm"],
        "post_attention_layernorm.weight": text["mlp_norm"],
    }
    for expert, part in (("language", text), ("vision", vision)):
        attention = f"self_attn.{expert}_expert"
        out[f"{attention}_query_key_value.weight"] = np.vstack([part["q"], part["k"], part["v"]])
        out[f"{attention}_dense.weight"] = part["o"]
        for name in ("gate", "up", "down"):
            out[f"mlp.{expert}_mlp.{name}_proj.weight"] = part[name]
    return out


def _nested(cls: str, *own: str, layer: Callable[[Arrays], Arrays] = llama_layer) -> Speller:
    prefix = "language_model.model."
    return Speller(cls, layer, prefix, "language_model.lm_head.weight", own=own, nest="text_config")


def _internvl(layer: Callable[[Arrays], Arrays], **names: Any) -> Speller:
    return Speller(
        "InternVLChatModel",
        layer,
        "language_model.model.",
        own=("vision_model.embeddings.class_embedding", "mlp1.1.weight"),
        nest="llm_config",
        **{"head": "language_model.lm_head.weight", **names},
    )


def _qwen(*own: str) -> Speller:
    return Speller(
        "QWenLMHeadModel",
        qwen_layer,
        "transformer.",
        embed="wte.weight",
        norm="ln_f.weight",
        layers="h",
        own=own,
    )


_MOLMO = Speller(
    "MolmoForCausalLM",
    molmo_layer,
    "model.transformer.",
    "model.transformer.ff_out.weight",
    "wte.embedding",
    "ln_f.weight",
    "blocks",
    ("model.vision_backbone.pad_embed", "model.transformer.wte.new_embedding"),
)
_TOK = "tok_embeddings.weight"
_HF = ("vision_tower.x.weight", "multi_modal_projector.y.weight")
_VISUAL = ("visual.patch_embed.proj.weight", "visual.merger.mlp.0.weight")
_LLAMA = Speller("LlamaForCausalLM")
SPELLERS: dict[str, dict[str, Speller]] = {
    "internlm2": {
        "InternLM2": Speller(
            "InternLM2ForCausalLM", internlm2_layer, head="output.weight", embed=_TOK
        ),
        "InternVL2.5-8B": _internvl(
            internlm2_layer, head="language_model.output.weight", embed=_TOK
        ),
        "split": _LLAMA,
        "fused": Speller("Phi3ForCausalLM", phi3_layer),
    },
    "phi3": {
        "Phi-3": Speller("Phi3ForCausalLM", phi3_layer),
        "Phi-3-vision": Speller(
            "Phi3VForCausalLM", phi3_layer, own=("model.vision_embed_tokens.glb_GN",)
        ),
        "InternVL2-4B": _internvl(phi3_layer),
        "split": _LLAMA,
        "up first": _MOLMO,
    },
    "llama3": {
        "Llama": _LLAMA,
        "LLaVA-NeXT": _nested("LlavaNextForConditionalGeneration", *_HF),
        "CogVLM2": Speller("CogVLMForCausalLM", own=("model.vision.boi",), experts=True),
        "Mllama": Speller(
            "MllamaForConditionalGeneration",
            prefix="language_model.model.",
            head="language_model.lm_head.weight",
            own=("vision_model.class_embedding", "multi_modal_projector.weight"),
            foreign=(1, 3),
        ),
    },
    "qwen": {
        "Qwen": _qwen(),
        "Qwen-VL": _qwen("transformer.visual.conv1.weight", "transformer.visual.attn_pool.query"),
    },
    "qwen2": {
        "Qwen2": Speller("Qwen2ForCausalLM"),
        "Qwen2-VL": Speller("Qwen2VLForConditionalGeneration", own=_VISUAL),
        "LLaVA-OneVision": _nested("LlavaOnevisionForConditionalGeneration", *_HF),
        "InternVL3": _internvl(llama_layer),
        "Omni": Speller(
            "Qwen2_5OmniModel",
            prefix="thinker.model.",
            head="thinker.lm_head.weight",
            own=("thinker.visual.x", "thinker.audio_tower.y", "talker.model.embed_tokens.weight"),
        ),
        "Molmo": _MOLMO,
    },
    "qwen3": {
        "Qwen3": Speller("Qwen3ForCausalLM"),
        "Qwen3-VL": Speller(
            "Qwen3VLForConditionalGeneration",
            prefix="model.language_model.",
            own=("model.visual.pos_embed.weight",),
            nest="text_config",
        ),
    },
    "gemma": {
        "Gemma": Speller("GemmaForCausalLM"),
        "PaliGemma": _nested("PaliGemmaForConditionalGeneration", *_HF),
    },
    "gemma2": {
        "Gemma 2": Speller("Gemma2ForCausalLM", gemma2_layer),
        "PaliGemma 2": _nested("PaliGemmaForConditionalGeneration", *_HF, layer=gemma2_layer),
    },
    "olmo2": {"OLMo 2": Speller("Olmo2ForCausalLM", olmo2_layer), "Molmo-O": _MOLMO},
}
