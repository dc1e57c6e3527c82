"""What several declarations share: how decoders, prefixes and towers are spelled."""

from __future__ import annotations

from collections.abc import Mapping


def fused(*parts: str, kind: str = "weight", stream: str = "") -> str:
    """The roles of a fused tensor, in memory order."""
    return " ".join(f"{part}.{kind}{stream}" for part in parts)


_NORMS = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "mlp_norm.weight",
}
_ATTENTION = {
    f"self_attn.{part}_proj.{kind}": f"attn.{part}.{kind}"
    for part in "qkvo"
    for kind in ("weight", "bias")
}
_HEAD_NORMS = {f"self_attn.{part}_norm.weight": f"attn.{part}_norm.weight" for part in "qk"}
_MLP = {
    f"mlp.{part}_proj.{kind}": f"mlp.{part}.{kind}"
    for part in ("gate", "up", "down")
    for kind in ("weight", "bias")
}
_BUFFER = {"self_attn.rotary_emb.inv_freq": ""}
_BLOCK = {**_NORMS, **_ATTENTION, **_HEAD_NORMS, **_MLP, **_BUFFER}
QKV = ("attn.q", "attn.k", "attn.v")


def decoder(
    block: Mapping[str, str],
    *,
    embed: str = "embed_tokens.weight",
    norm: str = "norm.weight",
    layers: str = "layers",
) -> dict[str, str]:
    """A whole decoder whose layers are spelled as in `block` (name -> roles within the layer)."""
    stack = {
        f"{layers}.#.{name}": " ".join(f"layers.#.{role}" for role in roles.split())
        for name, roles in block.items()
    }
    return {embed: "embed", norm: "norm", **stack}


LLAMA = decoder(_BLOCK)
"""Llama, Vicuna, Mistral, Qwen2 (biases) and Qwen3 (q and k norms) spell their layers alike:
transformers, models/llama/modeling_llama.py and its copies. Gemma too."""


def _spell_expert(expert: str, stream: str) -> dict[str, str]:
    """CogVLM's weights for the tokens of a stream."""
    return {
        f"self_attn.{expert}_expert_query_key_value.weight": fused(*QKV, stream=stream),
        f"self_attn.{expert}_expert_dense.weight": f"attn.o.weight{stream}",
        **{
            f"mlp.{expert}_mlp.{part}_proj.weight": f"mlp.{part}.weight{stream}"
            for part in ("gate", "up", "down")
        },
    }


COGVLM = decoder(
    {
        **_NORMS,
        **_spell_expert("language", "@text"),
        **_spell_expert("vision", "@vision"),
        # CogVLM2 alone has it
        "self_attn.vision_expert_query_key_value.bias": fused(*QKV, kind="bias", stream="@vision"),
        **_BUFFER,
    }
)

_MULTIWAY = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
}
MPLUG_OWL2 = decoder(
    {name: role for name, role in _BLOCK.items() if name.rpartition(".")[0] not in _MULTIWAY}
    | {
        f"{name}.multiway.{way}.weight": f"{role}.weight@{stream}"
        for name, role in _MULTIWAY.items()
        for way, stream in enumerate(("text", "vision"))
    }
)

QWEN = decoder(
    {
        "ln_1.weight": "attn_norm.weight",
        "ln_2.weight": "mlp_norm.weight",
        **{f"attn.c_attn.{kind}": fused(*QKV, kind=kind) for kind in ("weight", "bias")},
        "attn.c_proj.weight": "attn.o.weight",
        # w1(x) * silu(w2(x))
        "mlp.w1.weight": "mlp.up.weight",
        "mlp.w2.weight": "mlp.gate.weight",
        "mlp.c_proj.weight": "mlp.down.weight",
    },
    embed="wte.weight",
    norm="ln_f.weight",
    layers="h",
)

MOLMO = decoder(
    {
        "attn_norm.weight": "attn_norm.weight",
        "ff_norm.weight": "mlp_norm.weight",
        **{f"att_proj.{kind}": fused(*QKV, kind=kind) for kind in ("weight", "bias")},
        **{f"{part}_norm.weight": f"attn.{part}_norm.weight" for part in "qk"},
        "attn_out.weight": "attn.o.weight",
        # x, gate = ff_proj(x).chunk(2)
        "ff_proj.weight": fused("mlp.up", "mlp.gate"),
        "ff_out.weight": "mlp.down.weight",
    },
    embed="wte.embedding",
    norm="ln_f.weight",
    layers="blocks",
)

INTERNLM2 = decoder(
    {
        "attention_norm.weight": "attn_norm.weight",
        "ffn_norm.weight": "mlp_norm.weight",
        **{f"attention.wqkv.{kind}": fused(*QKV, kind=kind) for kind in ("weight", "bias")},
        **{f"attention.wo.{kind}": f"attn.o.{kind}" for kind in ("weight", "bias")},
        "feed_forward.w1.weight": "mlp.gate.weight",
        "feed_forward.w3.weight": "mlp.up.weight",
        "feed_forward.w2.weight": "mlp.down.weight",
    },
    embed="tok_embeddings.weight",
)
INTERNLM2_INTERLEAVED = ("layers.#.attention.wqkv.weight", "layers.#.attention.wqkv.bias")

PHI3 = decoder(
    {
        **_NORMS,
        "self_attn.qkv_proj.weight": fused(*QKV),
        "self_attn.o_proj.weight": "attn.o.weight",
        "mlp.gate_up_proj.weight": fused("mlp.gate", "mlp.up"),
        "mlp.down_proj.weight": "mlp.down.weight",
        **_BUFFER,
    }
)

GEMMA2 = decoder(
    {
        **_BLOCK,
        "post_attention_layernorm.weight": "attn_post_norm.weight",
        "pre_feedforward_layernorm.weight": "mlp_norm.weight",
        "post_feedforward_layernorm.weight": "mlp_post_norm.weight",
    }
)
"""Gemma 2 and 3 norm what enters attention and MLP, and what leaves them."""

OLMO2 = decoder(
    {
        **_ATTENTION,
        **_HEAD_NORMS,
        **_MLP,
        # It norms only what leaves them; Molmo's attn_norm and ff_norm are these when it is an OLMo
        "post_attention_layernorm.weight": "attn_norm.weight",
        "post_feedforward_layernorm.weight": "mlp_norm.weight",
    }
)

CSM = decoder(
    _BLOCK,
    embed="embed_text_tokens.weight",
    norm="backbone_model.norm.weight",
    layers="backbone_model.layers",
)

QIANFAN_OCR = decoder(_BLOCK, layers="encoder.layers")

HIGGS_AUDIO = decoder(
    {
        **_BLOCK,
        **{
            f"audio_{name}": f"{role}@audio"
            for name, role in {**_NORMS, **_MLP}.items()
            if name.endswith(".weight")
        },
    }
)

_INKLING_EXPERTS = (
    ("mlp.experts.", "mlp.experts.*"),
    ("mlp.shared_experts.shared_", "mlp.shared_experts.*"),
)
INKLING = decoder(
    {
        **_BLOCK,
        **{
            f"{name}w13_weight": fused(f"{role}.gate", f"{role}.up")
            for name, role in _INKLING_EXPERTS
        },
        **{f"{name}w2_weight": f"{role}.down.weight" for name, role in _INKLING_EXPERTS},
        "mlp.gate.bias": "mlp.router.correction_bias",
    },
    embed="embed.weight",
)
INKLING_INTERLEAVED = tuple(f"layers.#.{name}w13_weight" for name, _ in _INKLING_EXPERTS)

_GATE_UP = "mlp.experts.gate_up_proj"
_EXPERTS_GATE_UP = ("mlp.experts.*.gate", "mlp.experts.*.up")
GPT_OSS = decoder(
    {
        **_BLOCK,
        _GATE_UP: fused(*_EXPERTS_GATE_UP),
        f"{_GATE_UP}_bias": fused(*_EXPERTS_GATE_UP, kind="bias"),
    }
)
"""Its stacks alone have biases, by which they are told from those of the same names whose gate and
up do not alternate."""
GPT_OSS_INTERLEAVED = (f"layers.#.{_GATE_UP}", f"layers.#.{_GATE_UP}_bias")

_CORRECTION_BIAS = "mlp.router.correction_bias"
ERNIE_VL = decoder(
    {
        **_BLOCK,
        **{
            f"mlp.experts.*.{part}_proj.weight": f"mlp.experts.*.{part}.weight@text"
            f" mlp.experts.*.{part}.weight@vision_expert"
            for part in ("gate", "up", "down")
        },
        "mlp.gate.weight": "mlp.router.weight@text",
        "mlp.gate.weight_1": "mlp.router.weight@vision_expert",
        "mlp.moe_statics.e_score_correction_bias": f"{_CORRECTION_BIAS}@text"
        f" {_CORRECTION_BIAS}@vision_expert",
    }
)

# Pairs of the decoder's prefix and the head's full name

PLAIN = (
    ("model.", "lm_head.weight"),  # the Hub, and save_pretrained of the …ForCausalLM class
    ("", "lm_head.weight"),  # save_pretrained of the …Model class
)
NESTED = (
    ("model.language_model.", "lm_head.weight"),  # transformers 5's own module names
    ("language_model.model.", "language_model.lm_head.weight"),  # the Hub, transformers 4
    ("language_model.model.", "lm_head.weight"),  # a …Model file loaded and saved with its head
    ("language_model.", "lm_head.weight"),  # save_pretrained of the …Model class
)
