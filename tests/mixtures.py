"""True-size headers of mixtures of experts, each composed from a few dimensions and a form.

Names and sizes are those of the weight indexes and configs on the Hub, so far as the named sources
of `architectures/families/experts.py` tell; of towers and connectors only some tensors are listed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from families import Family, Shapes, Tensors, some_of, typed, weight

Form = Literal["each", "stacked", "transposed"]


@dataclass(frozen=True, slots=True)
class Mixture:
    """Dimensions of a decoder of experts.

    attention: the shapes of a layer's attention. dense: the layers that have no experts, and the
    width of their MLP. shared: the width of the shared expert, 0 for none.
    """

    hidden: int
    layers: int
    experts: int
    inner: int
    vocab: int
    attention: Shapes
    dense: tuple[range, int] = (range(0), 0)
    shared: int = 0
    tied: bool = False


def grouped_attention(
    hidden: int, heads: int, kv_heads: int, *, bias: bool = False, norms: bool = False
) -> Shapes:
    """q, k, v and o with heads of 128."""
    shapes: Shapes = {"self_attn.o_proj.weight": (hidden, heads * 128)}
    for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        shapes[f"self_attn.{name}_proj.weight"] = (count * 128, hidden)
        if bias:
            shapes[f"self_attn.{name}_proj.bias"] = (count * 128,)
    return shapes | (
        {"self_attn.q_norm.weight": (128,), "self_attn.k_norm.weight": (128,)} if norms else {}
    )


def latent_attention(hidden: int, heads: int) -> Shapes:
    """DeepSeek-V3's without a latent query: 512 latent columns, 128 + 64 in a head."""
    return {
        "self_attn.q_proj.weight": (heads * 192, hidden),
        "self_attn.kv_a_proj_with_mqa.weight": (512 + 64, hidden),
        "self_attn.kv_a_layernorm.weight": (512,),
        "self_attn.kv_b_proj.weight": (heads * 256, 512),
        "self_attn.o_proj.weight": (hidden, heads * 128),
    }


QWEN3 = Mixture(2048, 48, 128, 768, 151936, grouped_attention(2048, 32, 4, norms=True))
GLM = Mixture(
    4096, 46, 128, 1408, 151552, grouped_attention(4096, 96, 8, bias=True), (range(1), 10944), 1408
)
MOONLIGHT = Mixture(2048, 27, 64, 1408, 163840, latent_attention(2048, 16), (range(1), 11264), 2816)
SCOUT = Mixture(5120, 48, 16, 8192, 202048, grouped_attention(5120, 40, 8), shared=8192)
MAVERICK = Mixture(
    5120, 48, 128, 8192, 202048, grouped_attention(5120, 40, 8), (range(0, 48, 2), 16384), 8192
)
ERNIE = Mixture(
    2560, 28, 64, 1536, 103424, grouped_attention(2560, 20, 4), (range(1), 12288), 3072, tied=True
)


def mlp(stem: str, hidden: int, inner: int) -> Shapes:
    return {
        f"{stem}.gate_proj.weight": (inner, hidden),
        f"{stem}.up_proj.weight": (inner, hidden),
        f"{stem}.down_proj.weight": (hidden, inner),
    }


def experts(stem: str, dims: Mixture, form: Form) -> Shapes:
    """The experts of one layer, without router."""
    if form == "each":
        return {
            name: shape
            for expert in range(dims.experts)
            for name, shape in mlp(f"{stem}.{expert}", dims.hidden, dims.inner).items()
        }
    gate_up, down = (2 * dims.inner, dims.hidden), (dims.hidden, dims.inner)
    if form == "transposed":
        gate_up, down = gate_up[::-1], down[::-1]
    return {
        f"{stem}.gate_up_proj": (dims.experts, *gate_up),
        f"{stem}.down_proj": (dims.experts, *down),
    }


def decoder(
    dims: Mixture,
    form: Form,
    prefix: str = "model.",
    head: str = "lm_head",
    *,
    names: str = "mlp gate shared_experts",
    sparse: Shapes | None = None,
) -> Tensors:
    """A decoder; names: its MLP's, router's and shared expert's. sparse: more of a sparse layer."""
    block, router, shared = names.split()
    norms = {
        "input_layernorm.weight": (dims.hidden,),
        "post_attention_layernorm.weight": (dims.hidden,),
    }
    body: Shapes = {"embed_tokens.weight": (dims.vocab, dims.hidden), "norm.weight": (dims.hidden,)}
    dense_layers, dense = dims.dense
    for layer in range(dims.layers):
        part: Shapes = {**norms, **dims.attention}
        if layer in dense_layers:
            part |= mlp(block, dims.hidden, dense)
        else:
            part |= experts(f"{block}.experts", dims, form)
            part |= {f"{block}.{router}.weight": (dims.experts, dims.hidden), **(sparse or {})}
            if dims.shared:
                part |= mlp(f"{block}.{shared}", dims.hidden, dims.shared)
        body |= {f"layers.{layer}.{name}": shape for name, shape in part.items()}
    output = {} if dims.tied else weight(head, dims.vocab, dims.hidden)
    return typed(prefix, "BF16", body) | typed("", "BF16", output)


def mixture(
    name: str, cls: str, tensors: Tensors, others: str = "", *, tied: bool = False
) -> Family:
    """A checkpoint of a class; others: some tensors outside of its decoder."""
    config = {"architectures": [cls], "tie_word_embeddings": tied, "num_attention_heads": 32}
    return Family(name, config, tensors | some_of(others))


# Families


def glm_text() -> Tensors:
    """GLM-4.5-Air, whose 47th layer predicts a second token."""
    correction: Shapes = {"mlp.gate.e_score_correction_bias": (128,)}
    tensors = decoder(GLM, "each", sparse=correction)
    mtp: Shapes = {f"layers.46.{name}": (4096,) for name in ("enorm.weight", "hnorm.weight")}
    mtp |= {
        "layers.46.eh_proj.weight": (4096, 8192),
        "layers.46.embed_tokens.weight": (151552, 4096),
    }
    mtp |= {"layers.46.shared_head.head.weight": (151552, 4096)}
    mtp |= {
        f"layers.46.{name}": shape for name, shape in experts("mlp.experts", GLM, "each").items()
    }
    return tensors | typed("model.", "BF16", mtp)


def ernie_vision() -> Tensors:
    """ERNIE-4.5-VL: 64 experts for text, 64 smaller ones for images, two transposed routers."""
    tensors = decoder(ERNIE, "each", sparse={"mlp.moe_statics.e_score_correction_bias": (2, 64)})
    for layer in range(1, ERNIE.layers):
        stem = f"model.layers.{layer}.mlp"
        for name in ("gate.weight", "gate.weight_1"):
            tensors[f"{stem}.{name}"] = ("F32", (2560, 64))
        for expert in range(64, 128):
            tensors |= typed(
                f"{stem}.experts.{expert}.",
                "BF16",
                {name.removeprefix("."): shape for name, shape in mlp("", 2560, 512).items()},
            )
    return tensors


def qwen35(prefix: str, *, mtp: bool) -> Tensors:
    """Qwen3.5-35B-A3B: of four layers three have linear attention; 256 experts of 512."""
    linear: Shapes = {
        "linear_attn.in_proj_qkv.weight": (8192, 2048),
        "linear_attn.in_proj_z.weight": (4096, 2048),
        "linear_attn.in_proj_a.weight": (32, 2048),
        "linear_attn.in_proj_b.weight": (32, 2048),
        "linear_attn.conv1d.weight": (8192, 1, 4),
        "linear_attn.A_log": (32,),
        "linear_attn.dt_bias": (32,),
        "linear_attn.norm.weight": (128,),
        "linear_attn.out_proj.weight": (2048, 4096),
    }
    dims = Mixture(2048, 40, 256, 512, 248320, {}, shared=512)
    gate: Shapes = {"mlp.shared_expert_gate.weight": (1, 2048)}
    tensors = decoder(dims, "stacked", prefix, names="mlp gate shared_expert", sparse=gate)
    full = grouped_attention(2048, 32, 4, norms=True)
    for layer in range(40):
        tensors |= typed(f"{prefix}layers.{layer}.", "BF16", linear if (layer + 1) % 4 else full)
    return tensors | (some_of("mtp.fc.weight mtp.layers.0.self_attn.q_proj.weight") if mtp else {})


_VISUAL = "model.visual.patch_embed.proj.weight model.visual.merger.linear_fc1.weight"
_LLAMA4 = "feed_forward router shared_expert"
_LLAMA4_VISION = "vision_model.class_embedding multi_modal_projector.linear_1.weight"

MIXTURES = {
    family.name: family
    for family in (
        mixture("qwen3-30b-a3b", "Qwen3MoeForCausalLM", decoder(QWEN3, "each")),
        mixture(
            "qwen3-vl-30b-a3b",
            "Qwen3VLMoeForConditionalGeneration",
            decoder(QWEN3, "transposed", "model.language_model."),
            _VISUAL,
        ),
        mixture(
            "qwen3-omni-30b-a3b",
            "Qwen3OmniMoeForConditionalGeneration",
            decoder(QWEN3, "each", "thinker.model.", "thinker.lm_head")
            | decoder(
                Mixture(1024, 20, 128, 384, 3072, grouped_attention(1024, 16, 2, norms=True)),
                "each",
                "talker.model.",
                "talker.codec_head",
            ),
            "thinker.visual.merger.x thinker.audio_tower.conv2d1.weight code2wav.decoder.0.x",
        ),
        mixture("glm-4.5-air", "Glm4MoeForCausalLM", glm_text()),
        mixture(
            "glm-4.5v",
            "Glm4vMoeForConditionalGeneration",
            decoder(
                GLM,
                "each",
                "model.language_model.",
                sparse={"mlp.gate.e_score_correction_bias": (128,)},
            ),
            _VISUAL,
        ),
        mixture(
            "moonlight-16b-a3b",
            "DeepseekV3ForCausalLM",
            decoder(MOONLIGHT, "each", sparse={"mlp.gate.e_score_correction_bias": (64,)}),
        ),
        mixture(
            "kimi-vl-a3b",
            "KimiVLForConditionalGeneration",
            decoder(
                MOONLIGHT,
                "each",
                "language_model.model.",
                "language_model.lm_head",
                sparse={"mlp.gate.e_score_correction_bias": (64,)},
            ),
            "vision_tower.patch_embed.proj.weight multi_modal_projector.linear_1.weight",
        ),
        *(
            mixture(name, cls, decoder(dims, "transposed", prefix, head, names=_LLAMA4), others)
            for name, dims in (("scout", SCOUT), ("maverick", MAVERICK))
            for name, cls, prefix, head, others in (
                (
                    f"llama-4-{name}",
                    "Llama4ForConditionalGeneration",
                    "language_model.model.",
                    "language_model.lm_head",
                    _LLAMA4_VISION,
                ),
                (f"llama-4-{name}-text", "Llama4ForCausalLM", "model.", "lm_head", ""),
            )
        ),
        mixture(
            "ernie-4.5-21b-a3b",
            "Ernie4_5_MoeForCausalLM",
            decoder(ERNIE, "each", sparse={"mlp.moe_statics.e_score_correction_bias": (1, 64)}),
            tied=True,
        ),
        mixture(
            "ernie-4.5-vl-28b-a3b",
            "Ernie4_5_VLMoeForConditionalGeneration",
            ernie_vision(),
            "vision_model.patch_embed.proj.weight model.resampler_model.mlp.weight",
            tied=True,
        ),
        mixture(
            "qwen3.5-35b-a3b",
            "Qwen3_5MoeForConditionalGeneration",
            qwen35("model.language_model.", mtp=True),
            _VISUAL,
        ),
        mixture("qwen3.5-35b-a3b-text", "Qwen3_5MoeForCausalLM", qwen35("model.", mtp=False)),
    )
}
