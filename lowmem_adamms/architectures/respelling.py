"""Names that files on the Hub and transformers' modules spell differently.

transformers renames them as it loads and saves (conversion_mapping.py). Here a name within a layer,
or beside the layers, is brought into the form of its modules, so that either form is the same role.
"""

from __future__ import annotations

import re
from functools import lru_cache

_CORRECTION_BIAS = "mlp.gate.e_score_correction_bias"
_RESPELLINGS: tuple[tuple[str, str], ...] = (
    # Where a layer's parts are
    (r"^(block_sparse_moe|feed_forward|ffn)\.", "mlp."),
    (r"^mixer\.(experts|gate|shared_experts)\.", r"mlp.\1."),
    (r"^(experts|shared_experts)\.|^gate\.(?=weight$)", r"mlp.\g<0>"),  # Mistral Large
    (r"^(attention|attn)\.", "self_attn."),
    (r"^mixer\._fp32_params\.", "mixer."),
    (r"^mlp\.post_mlp_layernorm\.", "post_mlp_layernorm."),
    # Norms
    (r"^(attention_norm|attn_norm)\.", "input_layernorm."),
    (r"^(ffn_norm|mlp_norm)\.", "post_attention_layernorm."),
    (r"^post_attn_norm\.", "post_self_attn_layernorm."),
    (r"^post_ffn_norm\.", "post_mlp_layernorm."),
    (r"^(input_layernorm|post_attention_layernorm)\.W_down\.", r"\1.mlp.fc1."),
    (r"^(input_layernorm|post_attention_layernorm)\.W_up\.", r"\1.mlp.fc2."),
    # Attention
    (r"^self_attn\.(?:to_|w)([qkv])\.", r"self_attn.\1_proj."),
    (r"^self_attn\.(?:to_out|wo)\.", "self_attn.o_proj."),
    (r"^self_attn\.norm_([qk])\.", r"self_attn.\1_norm."),
    (r"^self_attn\.w([qkvr])_d[uv]\.", r"self_attn.\1_proj."),
    (r"^self_attn\.wo_ud\.", "self_attn.o_proj."),
    (r"^self_attn\.wkv_a_with_mqa\.", "self_attn.kv_a_proj_with_mqa."),
    (r"^self_attn\.wkv_b\.", "self_attn.kv_b_proj."),
    (r"^self_attn\.kv_a_norm\.", "self_attn.kv_a_layernorm."),
    (r"^self_attn\.q_gate_proj\.", "self_attn.q_b_proj."),
    (r"^self_attn\.(linear_gate|gate_proj)\.", "self_attn.g_proj."),
    (
        r"^self_attn\.(attn_sink|attention_sink_bias|learnable_sink_param|softmax_offset)$",
        "self_attn.sinks",
    ),
    (r"^self_attn\.(A_log|dt_bias|f_proj\.|f_a_proj\.|f_b_proj\.)", r"self_attn.forget_gate.\1"),
    (r"^self_attn\.dense\.", "self_attn.o_proj."),
    (r"ssmax_scaling\.s$", "softmax_scaling.scale"),
    (r"ssmax_scaling\.b$", "softmax_scaling.bias"),
    (r"sconv\.weight$", "sconv.conv1d.weight"),
    # Hyper-connections
    (r"^hc_pre\.hc_(attn|mlp)_layer\.hc_(base|fn|scale)$", r"hc_\1_\2"),
    (r"^hc_attn_(base|fn|scale)$", r"attn_hc.\1"),
    (r"^hc_(?:ffn|mlp)_(base|fn|scale)$", r"ffn_hc.\1"),
    # MLP and experts
    (r"^mlp\.(?:router\.gate|router\.layer)\.weight$", "mlp.gate.weight"),
    (
        r"^(?:mlp\.(?:gate\.|experts\.)?(?:moe_statics\.)?(?:e_score_correction_bias|expert_bias)"
        r"|moe\.router\.expert_bias)$",
        _CORRECTION_BIAS,
    ),
    (r"^mlp\.shared_mlp\.", "mlp.shared_experts."),
    (r"^(mlp\..*)(?:w1|linear_gate)\.", r"\1gate_proj."),
    (r"^(mlp\..*)w3\.", r"\1up_proj."),
    (r"^(mlp\..*)w2\.", r"\1down_proj."),
    (r"^mlp\.fc1\.", "mlp.up_proj."),
    (r"^mlp\.fc2\.", "mlp.down_proj."),
    (r"^mlp\.(?:experts\.fc1|input_linear)\.weight$", "mlp.experts.gate_up_proj"),
    (r"^mlp\.(?:experts\.fc2|output_linear)\.weight$", "mlp.experts.down_proj"),
    # Beside the layers
    (r"^(?:hc_head\.hc_pre|hc_pre\.hc_head)\.hc_head_", "hc_head_"),
    (r"^hc_head_(base|fn|scale)$", r"hc_head.hc_\1"),
    (r"^lerope\.alpha$", "rotary_emb.alpha"),
    (r"^embed_norm\.", "embed_tokens.embed_norm."),
)
FUSED = {"self_attn.conv1d.weight": " ".join(f"self_attn.{part}_conv1d.weight" for part in "qkv")}
"""What transformers' modules have in one tensor, and files in several."""
_COMPILED = [(re.compile(pattern), replacement) for pattern, replacement in _RESPELLINGS]


@lru_cache(maxsize=4096)
def respell(name: str) -> str:
    """A name within a layer, or beside the layers, as transformers' modules have it."""
    for pattern, replacement in _COMPILED:
        name = pattern.sub(replacement, name)
    return name
